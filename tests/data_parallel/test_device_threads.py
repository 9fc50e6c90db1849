"""One thread a device: interrupted, forked, and called from within a network."""

import threading
import time

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import fresh_process
from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from gluon_syncbn.data_parallel import device_threads
from networks import convolutional, split


def test_an_interruption_while_the_devices_are_given_their_parts(two, rng, monkeypatch):
    """The first device has started and waits for the second, which never will."""
    net = SyncBatchNorm(in_channels=3)
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    x = rng.randn(6, 3).astype("float32")
    with autograd.record():
        model(split(x, two))
    threads = device_threads._threads
    submit = threads.submit

    def interrupted(device, *task):
        if device == two[1]:
            raise KeyboardInterrupt
        return submit(device, *task)

    monkeypatch.setattr(threads, "submit", interrupted)
    start = time.time()
    with pytest.raises(KeyboardInterrupt):
        with autograd.record():
            model(split(x, two))
    assert time.time() - start < 20, "waited for the deadline"
    monkeypatch.setattr(threads, "submit", submit)
    with autograd.record():
        outs = model(split(x, two))
    got = np.concatenate([out.asnumpy() for out in outs])
    np.testing.assert_allclose(got, (x - x.mean(0)) / x.std(0), atol=1e-3)


def test_an_interruption_that_takes_a_wakeup(two, monkeypatch):
    """Ctrl-C right after a device's message was taken from the queue: nothing waits for it."""

    class Interrupted:
        def __init__(self):
            self._queue, self._first = make(), True
            self.put = self._queue.put

        def get(self, timeout=None):
            self._queue.get(timeout=timeout)
            if self._first:
                self._first = False
                raise KeyboardInterrupt

    def function(x):
        if x.context == slow:
            time.sleep(0.2)
        return x + 1

    slow = None
    make = device_threads.queue.SimpleQueue
    model = ModelDataParallel(nn.Lambda(function), two)
    xs = [mx.nd.ones(1, ctx=c) for c in two]
    model(xs)
    slow = two[1]
    monkeypatch.setattr(device_threads.queue, "SimpleQueue", Interrupted)
    caller = threading.Thread(target=lambda: pytest.raises(KeyboardInterrupt, model, xs))
    caller.daemon = True
    caller.start()
    caller.join(30)
    assert not caller.is_alive()
    monkeypatch.undo()
    assert [out.asscalar() for out in model(xs)] == [2, 2]


# A script begins with it: a model on two contexts, and its training step.
TWO_DEVICES = """
import mxnet as mx
from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
contexts = [mx.cpu(0), mx.cpu(1)]
net = SyncBatchNorm(in_channels=1)
net.initialize(ctx=contexts)
model = ModelDataParallel(net, contexts)
xs = [mx.nd.full((1, 1), i, ctx=c) for i, c in enumerate(contexts)]

def step():
    with mx.autograd.record():
        outs = model(xs)
    parallel_backward(outs)
    assert [round(float(out.asscalar()), 1) for out in outs] == [-1.0, 1.0]
"""


def test_a_forked_child_trains_though_the_parents_locks_were_held():
    """The threads that hold the locks do not exist in the child."""
    script = """
import os, signal, threading
import gluon_syncbn
from gluon_syncbn.data_parallel import device_threads

step()
held, go = threading.Event(), threading.Event()

def hold():
    with device_threads._threads.order, device_threads._threads.gluon:
        held.set()
        go.wait()

threading.Thread(target=hold).start()
held.wait()
gluon_syncbn.set_timeout(1)  # the fork waits no longer for a thread that is in the middle
child = os.fork()
gluon_syncbn.set_timeout(60)
if child == 0:
    signal.alarm(60)
    step()
    os._exit(0)
status = os.waitpid(child, 0)[1]
go.set()
step()
raise SystemExit(status != 0)
"""
    fresh_process.run(TWO_DEVICES + script, timeout=200)


def test_a_fork_while_another_thread_trains():
    """It waits until all devices have their parts, which need the interpreter that it stops."""
    script = """
import os, threading, time
steps = 0

def train():
    global steps
    while go:
        step()
        steps += 1

go = True
thread = threading.Thread(target=train)
thread.start()
for _ in range(20):
    before = steps
    while steps < before + 3 and thread.is_alive():
        time.sleep(0.001)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
go = False
thread.join()
print(steps >= 60)
"""
    assert fresh_process.run(TWO_DEVICES + script, timeout=60).stdout.strip() == "True"


def test_run_on_gives_and_raises_what_the_function_does(two):
    names = device_threads.run_on(two[1], lambda: threading.current_thread().name)
    assert names == "gluon_syncbn-cpu(1)_0"
    assert device_threads.run_on(two[1], lambda: mx.context.current_context()) == two[1]
    with pytest.raises(KeyError, match="told to"):
        device_threads.run_on(two[0], lambda: {}["told to"])
    inner = device_threads.run_on(
        two[0], lambda: device_threads.run_on(two[1], threading.current_thread)
    )
    assert inner.name == "gluon_syncbn-cpu(0)_0"  # not in another: two could wait for each other


def test_threads_are_kept(two):
    model = ModelDataParallel(convolutional(), two)
    model.initialize(ctx=two)
    for _ in range(2):
        model([mx.nd.ones((1, 3, 8, 8), ctx=c) for c in two])
    before = {t.ident for t in threading.enumerate()}
    for _ in range(10):
        model([mx.nd.ones((1, 3, 8, 8), ctx=c) for c in two])
    assert {t.ident for t in threading.enumerate()} == before


def test_recording_and_training_mode_are_carried_over(two):
    seen = []

    def look(x):
        seen.append((autograd.is_recording(), autograd.is_training()))
        return x

    model = ModelDataParallel(nn.Lambda(look), two)
    xs = [mx.nd.ones(1, ctx=c) for c in two]
    for scope, state in (
        (autograd.record(), (True, True)),
        (autograd.record(train_mode=False), (True, False)),
        (autograd.train_mode(), (False, True)),
        (autograd.predict_mode(), (False, False)),
    ):
        seen.clear()
        with scope:
            model(xs)
        assert seen == [state] * 2


def test_calling_a_model_from_within_a_network_is_refused(two):
    inner = ModelDataParallel(SyncBatchNorm(in_channels=1), two)
    inner.initialize(ctx=two)
    xs = [mx.nd.ones((1, 1), ctx=c) for c in two]
    outer = ModelDataParallel(nn.Lambda(lambda x: inner(xs)[0]), two)
    with pytest.raises(RuntimeError, match="would wait for itself"):
        outer(xs)


def test_data_loader_workers_during_training(two, rng):
    """Forked worker processes have none of the device threads, and need none."""
    net = SyncBatchNorm()
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    data = gluon.data.ArrayDataset(rng.randn(32, 3).astype("float32"))
    for _ in range(2):
        for batch in gluon.data.DataLoader(data, 8, num_workers=2):
            with autograd.record():
                outs = model(split(batch.asnumpy(), two))
            parallel_backward(outs)
    mx.nd.waitall()


def test_interrupting_a_call_leaves_a_working_model():
    script = """
import os, signal, threading, time, mxnet as mx
from gluon_syncbn import ModelDataParallel, SyncBatchNorm
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job in the background
contexts = [mx.cpu(0), mx.cpu(1)]
class Slow(mx.gluon.Block):
    slow = False
    def __init__(self):
        super().__init__()
        self.norm = SyncBatchNorm(in_channels=1)
    def forward(self, x):
        if self.slow and x.context == contexts[1]:
            time.sleep(3)
        return self.norm(x)
net = Slow()
net.initialize(ctx=contexts)
model = ModelDataParallel(net, contexts)
xs = [mx.nd.full((1, 1), i, ctx=c) for i, c in enumerate(contexts)]
with mx.autograd.train_mode():
    model(xs)
    net.slow = True
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        model(xs)
    except KeyboardInterrupt:
        net.slow = False
        print([round(float(o.asscalar()), 1) for o in model(xs)])
"""
    assert fresh_process.run(script).stdout.strip() == "[-1.0, 1.0]"
