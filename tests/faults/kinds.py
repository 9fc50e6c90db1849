"""Faults within a process: each strikes one step of a training run.

A fault is a function of the run and of a random generator.  It injects itself into the network (the
caller takes it out again), runs a step as a program would, and asserts what that raises.  It
returns a pattern of the errors that it may leave unread.
"""

import gc
import os
import signal
import threading
import time
from contextlib import contextmanager

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluon_syncbn
from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from gluon_syncbn.key_barrier import BARRIER
from held import held
from training import LONG, PLACES, Background, settle

FAULTS = []  # (function, how often it is chosen)
DEADLINE = r"not every device came within .* Arrived: .*; missing: \d of \d"


def fault(weight):
    """Add a function to the faults; those that fork take long, so they get a smaller weight."""

    def add(function):
        FAULTS.append((function, weight))
        return function

    return add


class Struck(Exception):
    """What a fault raises."""


def strike(device):
    """What a place does if it raises on one device."""

    def act(x):
        if x.context == device:
            raise Struck(f"on {device}")
        return x

    return act


def short(random):
    """A deadline that a fault waits for."""
    gluon_syncbn.set_timeout(random.uniform(0.02, 0.1))


def devices(run, random):
    """The run's devices in random order: the first is to blame."""
    return random.sample(run.contexts, len(run.contexts))


def read_errors(outs, pattern, of=None):
    """Read the outputs of all devices, or of some, which must fail for this reason."""
    for out in outs:
        if of is None or out.context in of:
            with pytest.raises(mx.MXNetError, match=pattern):
                out.asnumpy()


@fault(10)
def never_comes(run, random):
    """A device takes another path; the results are read at once, or never."""
    missing, *others = devices(run, random)
    run.skippable.skips = missing
    short(random)
    xs, ys = run.next_batch()
    outs = run.forward(xs)
    if random.random() < 0.5:
        read_errors(outs, DEADLINE, others)
        return DEADLINE  # of the sum, where it waited for the others
    wait_until_failed(run)
    run.heal()
    gluon_syncbn.set_timeout(LONG)
    with pytest.raises(mx.MXNetError, match=DEADLINE):
        run.forward(xs)  # the next call raises what nobody has read
    return ""


def wait_until_failed(run):
    """Wait for the first round that fails in this step."""
    before = run.failures
    while BARRIER.failures == before:
        time.sleep(0.005)


@fault(10)
def comes_late(run, random):
    """A device's input is ready after the deadline; the step is given up or run again at once."""
    late, *others = devices(run, random)
    again = random.random() < 0.5
    short(random)
    xs, _ = run.next_batch()
    number = run.contexts.index(late)
    with held(xs[number]) as slow:
        outs = run.forward([slow if x.context == late else x for x in xs])
        read_errors(outs, DEADLINE, others)
        gluon_syncbn.set_timeout(LONG)
        if again:  # the step is run again while the late device is on its way
            return "its pass had failed before|" + DEADLINE
    read_errors(outs, "its pass had failed before", [late])
    return ""


@fault(10)
def comes_late_from_python(run, random):
    """A device's thread is slow; its layers come after the deadline."""
    late, *others = devices(run, random)
    place = random.choice(PLACES[:2])

    def wait(x):
        if x.context == late:
            wait_until_failed(run)
        return x

    run.places[place].fault = wait
    short(random)
    xs, _ = run.next_batch()
    outs = run.forward(xs)
    read_errors(outs, "its pass had failed before|" + DEADLINE)
    return ""


@fault(10)
def raises_in_forward(run, random):
    """Before the first layer, between layers or after the last, on one device or on all."""
    place = run.places[random.choice(PLACES)]
    device = random.choice(run.contexts)
    act = strike(device)
    if random.random() < 0.3:

        def act(x):
            raise Struck("everywhere")

    place.fault = act
    xs, ys = run.next_batch()
    with pytest.raises(Struck):
        run.losses(xs, ys)
    return ""


@fault(5)
def raises_in_a_hook(run, random):
    device = random.choice(run.contexts)
    child = run.net[random.choice([1, 3, 4, 6])]

    def hook(block, inputs, *outputs):
        if inputs[0].context == device:
            raise Struck(f"in a hook on {device}")

    register = random.choice([child.register_forward_hook, child.register_forward_pre_hook])
    handle = register(hook)
    try:
        xs, ys = run.next_batch()
        with pytest.raises(Struck):
            run.losses(xs, ys)
    finally:
        handle.detach()
    return ""


@fault(5)
def raises_in_the_loss(run, random):
    device = random.choice(run.contexts)
    xs, ys = run.next_batch()
    outs = run.forward(xs)

    def loss(out, label):
        return strike(device)(out)

    with pytest.raises(Struck):
        gluon_syncbn.DataParallelCriterion(loss, run.contexts)(outs, ys)
    return ""


class FailsBackward(autograd.Function):
    def forward(self, x):
        return x.copy()

    def backward(self, dy):
        raise Struck("in backward")


@fault(5)
def fails_in_backward(run, random):
    """An operator's gradient fails on one device; the others wait for the layers before it."""
    device = random.choice(run.contexts)
    run.places["end"].fault = lambda x: FailsBackward()(x) if x.context == device else x
    xs, ys = run.next_batch()
    losses = run.losses(xs, ys)
    settle()
    short(random)
    try:
        parallel_backward(losses)
    except (mx.MXNetError, Struck):
        pass
    return "Struck|in backward|Check failed|" + DEADLINE


@fault(5)
def one_loss_is_not_recorded(run, random):
    """A device has nothing to differentiate: its backward raises at once."""
    xs, ys = run.next_batch()
    losses = run.losses(xs, ys)
    number = random.randrange(len(losses))
    losses[number] = losses[number].detach()
    with pytest.raises(mx.MXNetError, match="not part of a computational graph|differentia"):
        parallel_backward(losses)
    return ""


@fault(5)
def one_device_runs_no_backward(run, random):
    """The others wait for it in their backward passes, up to the deadline."""
    xs, ys = run.next_batch()
    losses = run.losses(xs, ys)
    absent = random.choice(run.contexts)
    settle()
    short(random)
    parallel_backward([loss for loss in losses if loss.context != absent])
    for p in run.net[1].collect_params(".*conv.*weight").values():
        for context in run.contexts:
            if context != absent:
                with pytest.raises(mx.MXNetError, match="backward exchange.*" + DEADLINE):
                    p.grad(context).asnumpy()
    return DEADLINE


@fault(5)
def brings_other_channels(run, random):
    """To a layer, which is an error of its own; to a sum, which is an error of the exchange."""
    device = random.choice(run.contexts)
    xs, _ = run.next_batch()
    if random.random() < 0.5:
        run.places["middle"].fault = lambda x: (
            mx.nd.concat(x, x, dim=1) if x.context == device else x
        )
        with pytest.raises(mx.MXNetError, match="[Ss]hape"):
            for out in run.forward(xs):
                out.asnumpy()
        return "[Ss]hape|its pass had failed before|raised MXNetError"

    def other(options):
        if options["data"].context == device:
            options["data"] = mx.nd.concat(options["data"], options["data"], dim=0)
        return options

    run.coupled.fault = other
    outs = run.forward(xs)
    read_errors(outs, r"cpu\(\d\) brings \d+ values, but cpu\(\d\) brings \d+")
    return ""


@fault(5)
def says_another_number_of_devices(run, random):
    device = random.choice(run.contexts)
    xs, _ = run.next_batch()

    def other(options):
        if options["data"].context == device:
            options["num_devices"] += 1
        return options

    run.coupled.fault = other
    read_errors(run.forward(xs), "give every device the same num_devices")
    return ""


@fault(5)
def an_input_is_an_error(run, random):
    """What a device is given could not be computed: it never comes, and says why itself."""
    device = random.choice(run.contexts)
    run.places["start"].fault = lambda x: (
        x + mx.nd.random.normal(0, -1, shape=(1,), ctx=device) if x.context == device else x
    )
    short(random)
    xs, _ = run.next_batch()
    for out in run.forward(xs):
        pattern = "scale|sigma|negative" if out.context == device else DEADLINE
        with pytest.raises(mx.MXNetError, match=pattern):
            out.asnumpy()
    return "scale|sigma|negative|" + DEADLINE


@contextmanager
def interruption(delay):
    """Ctrl-C comes after some seconds, wherever the program is then."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
        time.sleep(30)  # it must come, if it has not yet
        raise AssertionError("no interruption came")
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
        autograd.set_recording(False)  # it may come within MXNet's own __exit__
        autograd.set_training(False)


@fault(20)
def interrupted_anywhere(run, random):
    xs, ys = run.next_batch()
    with pytest.raises(KeyboardInterrupt):
        with interruption(random.choice([0.001, 0.004, 0.02]) * random.random()):
            losses = run.losses(xs, ys)
            parallel_backward(losses)
            mx.nd.waitall()
    return ""


@fault(10)
def interrupted_while_devices_run(run, random):
    """The calling thread waits for the devices' threads, one of which takes its time."""
    device = random.choice(run.contexts)
    struck = threading.Event()

    def take_time(x):
        if x.context == device:
            struck.wait(0.1)
        return x

    run.places[random.choice(PLACES)].fault = take_time
    xs, ys = run.next_batch()
    with pytest.raises(KeyboardInterrupt):
        with interruption(0.03):
            run.losses(xs, ys)
    return "the call was interrupted"


@fault(5)
def interrupted_while_a_result_is_read(run, random):
    """Python raises it when the wait is over: at the deadline at the latest."""
    run.skippable.skips = random.choice(run.contexts)
    gluon_syncbn.set_timeout(0.1)
    xs, _ = run.next_batch()
    with pytest.raises((KeyboardInterrupt, mx.MXNetError)):
        with interruption(0.03):
            for out in run.forward(xs):
                out.asnumpy()
    return DEADLINE


@fault(10)
def forgotten_in_flight(run, random):
    """Wrapper, network and results are deleted while their all-reduces wait."""
    xs, _ = run.next_batch()
    late = random.randrange(len(xs))
    comes = random.random() < 0.5
    if not comes:
        short(random)
    with held(xs[late]) as slow:
        net = nn.HybridSequential()
        net.add(nn.Conv2D(3, 3), SyncBatchNorm(), nn.Dense(2))
        net.initialize(ctx=run.contexts)
        if random.random() < 0.5:
            net.hybridize()
        model = ModelDataParallel(net, run.contexts)
        with autograd.record():
            outs = model([slow if i == late else x for i, x in enumerate(xs)])
        if random.random() < 0.5:
            with autograd.record():
                losses = [out.sum() for out in outs]
            parallel_backward(losses)
            del losses
        del net, model, outs
        gc.collect()
        if not comes:
            wait_until_failed(run)
    return "" if comes else "its pass had failed before|" + DEADLINE


@fault(10)
def another_thread_trains_meanwhile(run, random):
    """Its network is another one, on the same devices; it must not notice."""
    side = SyncBatchNorm(in_channels=2)
    side.initialize(ctx=run.contexts)
    model = ModelDataParallel(side, run.contexts)
    xs, _ = run.next_batch()
    rows = np.concatenate([x.asnumpy() for x in xs])
    mean, std = rows.mean((0, 2, 3), keepdims=True), rows.std((0, 2, 3), keepdims=True)

    def train():
        for _ in range(4):
            with autograd.record():
                outs = model(xs)
            parallel_backward(outs)
            got = np.concatenate([out.asnumpy() for out in outs])
            np.testing.assert_allclose(got, (rows - mean) / std, atol=1e-3)

    inner = random.choice([raises_in_forward, raises_in_a_hook, one_loss_is_not_recorded])
    with Background(train):
        return inner(run, random)


@fault(1)
def forks_with_rounds_open(run, random):
    """The child trains a step, and the parent goes on with its own."""
    xs, ys = run.next_batch()
    losses = run.losses(xs, ys)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            run.restore(run.before)
            run.step()
            # OpenMP has one thread in a forked child, so sums may have another order.
            for name, arrays in run.states[-1].items():
                for got, wanted in zip(arrays, run.reference[len(run.states) - 1][name]):
                    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
    parallel_backward(losses)
    return ""


@fault(1)
def a_data_loader_forks_in_the_middle(run, random):
    """Its workers start while a step is under way."""
    xs, ys = run.next_batch()
    losses = run.losses(xs, ys)
    data = gluon.data.ArrayDataset(np.arange(8, dtype="float32"))
    loader = gluon.data.DataLoader(data, 4, num_workers=2)
    batches = iter(loader)
    first = next(batches)
    parallel_backward(losses)
    rest = list(batches)
    assert np.concatenate([b.asnumpy() for b in [first, *rest]]).tolist() == list(range(8))
    return settle()
