"""What every rank of an MPI job runs for the tests of this folder: all cases, one after the other.

    mpirun -n 3 python cases.py FOLDER [NAME ...]

Each rank writes FOLDER/NAME.RANK for each case: nothing if it passed, else why not.  The first case
that fails ends the job.  A case is a function; its attribute ``ranks`` has the sizes of jobs that
it is for.
"""

import contextlib
import json
import os
import pathlib
import sys
import time
import traceback
from functools import partial

import mxnet as mx
import numpy as np
from mpi4py import MPI
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluon_syncbn
from gluon_syncbn import (
    MABN2d,
    ModelDataParallel,
    SyncBatchNorm,
    convert_sync_batchnorm,
    distributed,
    parallel_backward,
)
from networks import MODES, STATIC, Branches, Shared, convolutional

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
CASES = {}


def case(*ranks):
    """Make a function a case, for jobs of so many ranks."""

    def add(function):
        function.ranks = ranks
        CASES[function.__name__] = function
        return function

    return add


def cut(batch, parts=SIZE):
    """Where uneven shards of a batch begin and end: 1, 2, ..., and the rest."""
    ends = np.cumsum(range(1, parts))
    return list(zip([0, *ends], [*ends, batch]))


def same_everywhere(array):
    """Whether all ranks have the same bits."""
    parts = WORLD.allgather(np.ascontiguousarray(array).tobytes())
    return len(set(parts)) == 1


def parameters(net):
    return {
        n: p.data(p.list_ctx()[0]).asnumpy() for n, p in net._collect_params_with_prefix().items()
    }


def sum_gradients(net):
    """What Horovod's trainer or a dist kvstore would do."""
    for parameter in net.collect_params().values():
        if parameter.grad_req != "null":
            gradients = parameter.list_grad()
            local = sum(g.asnumpy().astype("float64") for g in gradients)
            total = WORLD.allreduce(local)
            for gradient in gradients:
                gradient[:] = total


def steps(net, batches, size, hybridize=None, add_up=sum_gradients):
    """Train by plain SGD; batches: [(x, y) or None where this rank has no shard, ...]."""
    if hybridize is not None:
        net.hybridize(**hybridize)
    criterion = gluon.loss.L2Loss()
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.01}, kvstore=None)
    for batch in batches:
        x, y = batches[0] if batch is None else batch
        with contextlib.nullcontext() if batch else distributed.no_shard(net):
            with autograd.record():
                loss = criterion(net(x), y)
            loss.backward()
        add_up(net)
        trainer.step(size)
    return parameters(net)


steps_alone = partial(steps, add_up=lambda net: None)


def data(batch=12, seed=0, shape=(3, 8, 8), outputs=5, dtype="float32"):
    rng = np.random.RandomState(seed)
    x, y = rng.randn(batch, *shape), rng.randn(batch, outputs)
    return mx.nd.array(x, dtype=dtype), mx.nd.array(y, dtype=dtype)


def twins(make, x):
    """Two networks with the same parameters, the same on every rank."""
    mx.random.seed(7)
    np.random.seed(7)
    first, second = make(), make()
    for net in (first, second):
        net.initialize(mx.init.Xavier())
        net(x)
    values = WORLD.bcast(parameters(first))
    for net in (first, second):
        for name, parameter in net._collect_params_with_prefix().items():
            parameter.set_data(mx.nd.array(values[name], dtype=parameter.dtype))
    return first, second


@contextlib.contextmanager
def attached(net, comm=None):
    distributed.attach(net, comm)
    yield net
    WORLD.Barrier()  # not after a failure, of which the others do not know
    distributed.detach(net)


def assert_close(got, wanted, atol=1e-6):
    for name in wanted:
        # Relative where numbers are large: float32 numbers around 20 are 2e-6 apart.
        np.testing.assert_allclose(got[name], wanted[name], rtol=atol, atol=atol, err_msg=name)


def check_training(make, hybridize=None, count=3, atol=1e-6, **kinds):
    """Train on all ranks, and compare with one process that has the whole batch."""
    x, y = data(**kinds)
    whole, parts = twins(make, x)
    wanted = steps_alone(whole, [(x, y)] * count, len(x), hybridize)
    begin, end = cut(len(x))[RANK]
    with attached(parts):
        got = steps(parts, [(x[begin:end], y[begin:end])] * count, len(x), hybridize)
    assert_close(got, wanted, atol)
    for name, value in got.items():
        assert same_everywhere(value), name
    return parts


@case(2, 3, 4)
def training_equals_one_process():
    for mode in MODES:
        check_training(lambda: convolutional(prefix=None), mode)


@case(2, 3)
def float64_is_exact():
    def make():
        net = convolutional(prefix=None)
        net.cast("float64")
        return net

    check_training(make, {}, atol=1e-12, dtype="float64")


@case(2)
def one_layer_matches_its_definition():
    rng = np.random.RandomState(3)
    x, dy = 5 + rng.randn(7, 4, 3), rng.randn(7, 4, 3)
    layer = SyncBatchNorm(epsilon=1e-3)
    layer.initialize()
    begin, end = cut(len(x))[RANK]
    mine = mx.nd.array(x[begin:end], dtype="float64")
    layer.cast("float64")
    mine.attach_grad()
    with attached(layer):
        with autograd.record():
            y = layer(mine)
        y.backward(mx.nd.array(dy[begin:end], dtype="float64"))
        y.wait_to_read()
    axes = (0, 2)
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    r = 1 / np.sqrt(var + 1e-3)
    hat = (x - mean) * r
    dx = r * (dy - dy.mean(axes, keepdims=True) - hat * (dy * hat).mean(axes, keepdims=True))
    np.testing.assert_allclose(y.asnumpy(), hat[begin:end], atol=1e-12)
    np.testing.assert_allclose(mine.grad.asnumpy(), dx[begin:end], atol=1e-12)
    np.testing.assert_allclose(
        layer.running_var.data().asnumpy(), 0.9 + 0.1 * var.ravel(), atol=1e-12
    )
    gamma = layer.gamma.grad().asnumpy()  # this shard's own
    np.testing.assert_allclose(gamma, (dy * hat)[begin:end].sum(axes), atol=1e-12)


@case(3, 4)
def branches_come_in_any_order():
    for mode in (None, STATIC):
        check_training(Branches, mode)

    class Ordered(gluon.Block):
        """Runs its branches in an order of this rank's own."""

        def __init__(self):
            super().__init__()
            with self.name_scope():
                self.branches = [SyncBatchNorm() for _ in range(4)]
                for branch in self.branches:
                    self.register_child(branch)
                self.head = nn.Dense(5)

        def forward(self, x):
            order = np.random.RandomState(RANK).permutation(4)
            outputs = {i: self.branches[i](x * (i + 1)) for i in order}
            return self.head(mx.nd.concat(*[outputs[i] for i in range(4)], dim=1))

    check_training(Ordered)


@case(3, 4)
def groups_are_smaller_than_the_job():
    color = RANK // 2
    comm = WORLD.Split(color)
    x, y = data(batch=12)
    shards = cut(len(x))
    members = [r for r in range(SIZE) if r // 2 == color]
    group = slice(shards[members[0]][0], shards[members[-1]][1])
    whole, parts = twins(lambda: convolutional(prefix=None), x)
    with autograd.record():
        whole(x[group])
    begin, end = shards[RANK]
    with attached(parts, comm):
        with autograd.record():
            parts(x[begin:end])
        got = parameters(parts)
    assert_close(got, parameters(whole))
    comm.Free()


@case(2)
def two_devices_on_each_rank():
    contexts = [mx.cpu(0), mx.cpu(1)]
    x, y = data(batch=11)
    for mode in (None, {}, STATIC):
        whole, parts = twins(lambda: convolutional(prefix=None), x)
        wanted = steps_alone(whole, [(x, y)] * 3, len(x), mode)
        model = ModelDataParallel(parts, contexts)
        if mode is not None:
            parts.hybridize(**mode)
        criterion = gluon.loss.L2Loss()
        trainer = gluon.Trainer(
            parts.collect_params(), "sgd", {"learning_rate": 0.01}, kvstore=None
        )
        # Rank 0 has rows 0-2 and 3-4 and, in the second step, one device without input.
        ends = [[(0, 3), (3, 5)], [(5, 6), (6, 11)]]
        idle = [[(0, 5)], [(5, 6), (6, 11)]]
        with attached(model):
            for mine in (ends[RANK], idle[RANK], ends[RANK]):
                with autograd.record():
                    outputs = model([x[b:e].as_in_context(c) for (b, e), c in zip(mine, contexts)])
                    losses = [
                        criterion(o, y[b:e].as_in_context(c))
                        for o, (b, e), c in zip(outputs, mine, contexts)
                    ]
                parallel_backward(losses)
                sum_gradients(parts)
                trainer.step(len(x))
        assert_close(parameters(parts), wanted)
        for parameter in parts.collect_params().values():
            first, second = (d.asnumpy() for d in parameter.list_data())
            np.testing.assert_array_equal(first, second)
            assert same_everywhere(first), parameter.name


@case(2)
def shared_layer_traced_more_often_on_one_rank():
    x, y = data(batch=8)
    whole, parts = twins(Shared, x)
    wanted = steps_alone(whole, [(x, y)] * 4, len(x), STATIC)
    begin, end = cut(len(x))[RANK]
    with attached(parts):
        steps(parts, [(x[begin:end], y[begin:end])] * 2, len(x), STATIC)
        if RANK == 1:
            parts.hybridize(**STATIC)  # trace anew
        got = steps(parts, [(x[begin:end], y[begin:end])] * 2, len(x))
    assert_close(got, wanted)


@case(2, 3)
def evaluation_does_not_communicate():
    x, _ = data()
    net = convolutional(prefix=None)
    net.initialize()
    net(x)
    for mode in (None, {}):
        if mode is not None:
            net.hybridize(**mode)
        with attached(net):
            if RANK == 0:
                net(x).wait_to_read()
                with autograd.record(train_mode=False):
                    out = net(x)
                out.backward()
                mx.nd.waitall()


@case(2)
def exported_file_and_checkpoint_are_the_same():
    x, y = data(batch=6)
    net, other = twins(lambda: convolutional(prefix="net_"), x)
    folder = pathlib.Path(sys.argv[1])
    for block in (net, other):
        block.hybridize()
    begin, end = cut(len(x))[RANK]
    other(x)
    other.export(str(folder / f"alone{RANK}"))
    with attached(net):
        steps(net, [(x[begin:end], y[begin:end])], len(x))
        net.export(str(folder / f"attached{RANK}"))
        files = [
            (folder / f"{kind}{RANK}-symbol.json").read_text() for kind in ("alone", "attached")
        ]
        graphs = [mx.sym.load_json(text) for text in files]
        assert graphs[0].list_arguments() == graphs[1].list_arguments()
        operators = [[n["op"] for n in json.loads(t)["nodes"]] for t in files]
        assert operators[0] == operators[1]
    loaded = gluon.SymbolBlock.imports(
        str(folder / f"attached{RANK}-symbol.json"),
        ["data"],
        str(folder / f"attached{RANK}-0000.params"),
    )
    np.testing.assert_allclose(loaded(x).asnumpy(), net(x).asnumpy(), atol=1e-6)
    # A loaded graph is attached as well.
    steps_alone(net, [(x, y)] * 2, len(x))
    with attached(loaded):
        steps(loaded, [(x[begin:end], y[begin:end])] * 2, len(x))
    mine = {n: p.data().asnumpy() for n, p in loaded.collect_params().items()}
    for name, parameter in net.collect_params().items():
        np.testing.assert_allclose(mine[name], parameter.data().asnumpy(), atol=1e-6, err_msg=name)


@case(2, 3)
def a_rank_without_a_shard():
    x, y = data(batch=9)
    half = 4
    for mode in (None, STATIC):
        whole, parts = twins(lambda: convolutional(prefix=None), x)
        wanted = steps_alone(whole, [(x, y), (x[:half], y[:half]), (x, y)], len(x), mode)
        begin, end = cut(len(x))[RANK]
        mine = x[begin:end], y[begin:end]
        last = (x[:half], y[:half]) if RANK == 0 else None
        with attached(parts):
            got = steps(parts, [mine, last, mine], len(x), mode)
        assert_close(got, wanted)
        for name, value in got.items():
            assert same_everywhere(value), name


@case(2)
def a_rank_without_a_shard_keeps_what_it_adds_up():
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    layer.gamma.grad_req = layer.beta.grad_req = "add"
    x = mx.nd.array(np.random.RandomState(RANK).randn(5, 3))
    with attached(layer):

        def step():
            with autograd.record():
                y = (layer(x) ** 3).sum()
            y.backward()

        step()
        before = [layer.gamma.grad().asnumpy(), layer.beta.grad().asnumpy()]
        mean = layer.running_mean.data().asnumpy()
        with distributed.no_shard(layer) if RANK == 1 else contextlib.nullcontext():
            step()
        after = [layer.gamma.grad().asnumpy(), layer.beta.grad().asnumpy()]
        moved = layer.running_mean.data().asnumpy()
        assert same_everywhere(moved)
        others = WORLD.bcast(x.asnumpy()).mean(0)
        np.testing.assert_allclose(moved, 0.9 * mean + 0.1 * others, atol=1e-6)
        for one, two in zip(before, after):
            assert (one == two).all() == (RANK == 1)


@case(2)
def other_layers_of_the_family():
    x, y = data(batch=8)

    def make():
        net = nn.HybridSequential()
        net.add(
            nn.Conv2D(6, 3),
            SyncBatchNorm(renorm=True, activation="leaky_relu", momentum=None),
            nn.Conv2D(6, 3),
            SyncBatchNorm(num_devices=1, track_running_stats=False),
            MABN2d(6, num_devices=None, batch_size=2, simulated_batch_size=4, warmup_iters=1),
            nn.Dense(5),
        )
        return net

    for mode in (None, {}):
        check_training(make, mode, count=4, batch=8, atol=2e-6)  # MABN's gradients are larger


@case(2)
def sample_weights():
    rng = np.random.RandomState(5)
    x, weights = rng.randn(6, 3, 4), np.array([1, 0, 2, 1, 0, 0.5])
    layer = SyncBatchNorm()
    layer.initialize()
    begin, end = cut(6)[RANK]
    with attached(layer):
        with autograd.record():
            layer(mx.nd.array(x[begin:end]), mx.nd.array(weights[begin:end]))
        moved = layer.running_mean.data().asnumpy()
    mean = (x * weights[:, None, None]).sum((0, 2)) / (weights.sum() * 4)
    np.testing.assert_allclose(moved, 0.1 * mean, atol=1e-6)


@case(2, 4)
def two_networks_at_once():
    """In another order on each rank; without convolutions, which share temporary space."""
    x = mx.nd.array(np.random.RandomState(RANK).randn(3 + RANK, 4))
    nets = [nn.HybridSequential() for _ in range(2)]
    for net in nets:
        net.add(SyncBatchNorm(), nn.Dense(6), SyncBatchNorm(), nn.Dense(3), SyncBatchNorm())
        net.initialize()
        net(x)
        distributed.attach(net)
    for _ in range(5):
        outputs = {}
        for i in np.random.RandomState(RANK).permutation(2):
            with autograd.record():
                outputs[i] = nets[i](x)
        for i in np.random.RandomState(7 + RANK).permutation(2):
            outputs[i].backward()
        mx.nd.waitall()
    for net in nets:
        assert same_everywhere(net[0].running_mean.data().asnumpy())
        assert same_everywhere(net[0].running_var.data().asnumpy())
    WORLD.Barrier()
    for net in nets:
        distributed.detach(net)


@case(2, 3, 4)
def every_run_has_the_same_bits():
    results = []
    for _ in range(2):
        x, y = data(seed=2)
        _, net = twins(lambda: convolutional(prefix=None), x)
        begin, end = cut(len(x))[RANK]
        with attached(net):
            results.append(steps(net, [(x[begin:end], y[begin:end])] * 3, len(x), {}))
    for name, value in results[0].items():
        assert value.tobytes() == results[1][name].tobytes(), name


@case(2)
def fused_and_float16():
    x, _ = data(batch=6, shape=(3, 32, 32))
    net = convert_sync_batchnorm(gluon.model_zoo.vision.resnet18_v1(classes=4), fuse=True)
    half = SyncBatchNorm(in_channels=3, activation="relu")
    half.cast("float16")
    for block in (net, half):
        block.initialize(mx.init.Xavier())
        block.hybridize(static_alloc=True)
    begin, end = cut(len(x))[RANK]
    with attached(net), attached(half):
        for block, mine in ((net, x), (half, x.astype("float16"))):
            with autograd.record():
                out = block(mine[begin:end])
            out.backward()
            for name, value in parameters(block).items():
                if "running" in name:
                    assert np.isfinite(value).all() and same_everywhere(value), name


@case(2)
def attached_again_and_detached():
    layer = SyncBatchNorm(in_channels=2)
    layer.initialize()
    x = mx.nd.full((3, 2), RANK)

    def mean_after_a_step():
        before = layer.running_mean.data().asnumpy()
        with autograd.record():
            layer(x)
        return (layer.running_mean.data().asnumpy() - 0.9 * before)[0] * 10

    np.testing.assert_allclose(mean_after_a_step(), RANK, atol=1e-5)
    for _ in range(3):
        distributed.attach(layer)  # the one before ends
        np.testing.assert_allclose(mean_after_a_step(), 0.5, atol=1e-5)
    WORLD.Barrier()
    distributed.detach(layer)
    distributed.detach(layer)
    np.testing.assert_allclose(mean_after_a_step(), RANK, atol=1e-5)


@case(2)
def attached_after_it_was_traced():
    """As a layer of one device it is another operator in the graph."""
    layer = SyncBatchNorm(in_channels=2, num_devices=1)
    net = nn.HybridSequential()
    net.add(layer)
    net.initialize()
    net.hybridize(**STATIC)
    x = mx.nd.full((3, 2), RANK)
    means = []
    for step in range(3):
        if step == 1:
            distributed.attach(net)
        if step == 2:
            WORLD.Barrier()
            distributed.detach(net)
        layer.running_mean.set_data(mx.nd.zeros(2))
        with autograd.record():
            net(x).wait_to_read()
        means.append(layer.running_mean.data().asnumpy()[0] * 10)
    np.testing.assert_allclose(means, [RANK, 0.5, RANK], atol=1e-5)


@contextlib.contextmanager
def timeout(seconds):
    before = gluon_syncbn.get_timeout()
    gluon_syncbn.set_timeout(seconds)
    yield
    gluon_syncbn.set_timeout(before)


def error_of(function, kind=mx.MXNetError):
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError("no error was raised")


def step_of(layer):
    x = mx.nd.array(np.random.RandomState(RANK).randn(2 + RANK, 3))
    x.attach_grad()
    with autograd.record():
        out = layer(x)
    out.backward()
    mx.nd.waitall()
    return layer.running_mean.data().asnumpy()


@case(2, 3)
def networks_that_differ_are_refused():
    nets = [SyncBatchNorm(in_channels=3), nn.HybridSequential()]
    nets[1].add(SyncBatchNorm(), SyncBatchNorm())
    message = error_of(lambda: distributed.attach(nets[RANK == 1]), ValueError)
    assert "rank 0" in message and "has 2" in message, message
    channels = SyncBatchNorm(in_channels=3 + RANK)
    message = error_of(lambda: distributed.attach(channels), ValueError)
    assert "with 3 channels" in message and "with 4" in message, message
    with attached(SyncBatchNorm(in_channels=3)) as layer:
        layer.initialize()
        assert same_everywhere(step_of(layer))


@case(2)
def channels_that_differ_fail_in_the_first_step():
    layer = SyncBatchNorm(prefix="deferred_")
    layer.initialize()
    distributed.attach(layer)
    with autograd.record():
        out = layer(mx.nd.ones((2, 3 + RANK)))
    message = error_of(out.wait_to_read)
    assert all(word in message for word in ("deferred_", "brings 7", "brings 9", "channels"))
    mx.nd.waitall()
    WORLD.Barrier()
    distributed.detach(layer)


@case(3)
def a_rank_that_stalls_is_named_and_recovers():
    layer = SyncBatchNorm(in_channels=3, prefix="slow_")
    layer.initialize()
    distributed.attach(layer)
    step_of(layer)
    with timeout(1.5):
        if RANK == 1:
            time.sleep(4.5)
        start = time.monotonic()
        message = error_of(lambda: step_of(layer))
        took = time.monotonic() - start
    assert took < 4, took
    assert (
        "slow_" in message
        and "rank 1" in message
        and "rank 2 ("
        not in message.replace("rank 2 (" + MPI.Get_processor_name() + ") reports", "")
    ), message
    if RANK != 1:
        assert "came last to the backward exchange of 'slow_' (number 1)" in message, message
        assert "not every process" in message, message
    # What comes later fails at once, and says what to do.
    again = error_of(lambda: step_of(layer))
    assert "attach the network again" in again, again
    distributed.attach(layer)
    moved = step_of(layer)
    assert same_everywhere(moved)
    WORLD.Barrier()
    distributed.detach(layer)


@case(2)
def a_rank_that_skips_a_layer_is_named():
    net = nn.Sequential()
    net.add(
        SyncBatchNorm(in_channels=3, prefix="one_"), SyncBatchNorm(in_channels=3, prefix="two_")
    )
    net.initialize()
    distributed.attach(net)
    with timeout(1.5):
        x = mx.nd.ones((2, 3))
        with autograd.record():
            out = net[0](x)
            if RANK == 0:
                out = net[1](out)
        if RANK == 0:
            message = error_of(out.wait_to_read)
            assert "'two_'" in message and "rank 1" in message and "'one_'" in message, message
        else:
            out.wait_to_read()
            time.sleep(3)
            again = error_of(lambda: step_of(net))
            assert "rank 0" in again and "'two_'" in again, again
    mx.nd.waitall()
    WORLD.Barrier()
    distributed.detach(net)


@case(2)
def a_failure_on_a_device_reaches_the_other_rank_at_once():
    class Failing(gluon.Block):
        def __init__(self):
            super().__init__()
            with self.name_scope():
                self.norm = SyncBatchNorm(in_channels=3)

        def forward(self, x):
            y = self.norm(x)
            if RANK == 1 and x.context == mx.cpu(1) and Failing.fail:
                raise ValueError("a broken image")
            return self.norm(y)

    Failing.fail = True
    contexts = [mx.cpu(0), mx.cpu(1)]
    net = Failing()
    net.initialize(ctx=contexts)
    model = ModelDataParallel(net, contexts)
    distributed.attach(model)

    def step():
        with autograd.record():
            outputs = model([mx.nd.ones((2, 3), c) for c in contexts])
        for out in outputs:
            out.wait_to_read()

    start = time.monotonic()
    if RANK == 1:
        assert "a broken image" in error_of(step, ValueError)
    else:
        message = error_of(step)
        assert "rank 1" in message and "raised ValueError" in message, message
    assert time.monotonic() - start < 10
    with contextlib.suppress(mx.MXNetError):
        mx.nd.waitall()
    Failing.fail = False
    distributed.attach(model)
    step()
    WORLD.Barrier()
    distributed.detach(model)


@case(2)
def detached_between_forward_and_backward():
    layer = SyncBatchNorm(in_channels=3, prefix="between_")
    layer.initialize()
    distributed.attach(layer)
    for again in (False, True):
        x = mx.nd.ones((2, 3))
        x.attach_grad()
        with autograd.record():
            out = layer(x)
        mx.nd.waitall()
        WORLD.Barrier()
        if again:
            distributed.attach(layer)
        else:
            distributed.detach(layer)
        out.backward()
        message = error_of(mx.nd.waitall)
        assert "between_" in message and "forward" in message, message
        distributed.attach(layer)
    WORLD.Barrier()
    distributed.detach(layer)


def slowly(x):
    """The same array, but later."""
    y = mx.nd.zeros((500, 500))
    for _ in range(40):
        y = mx.nd.dot(y, y)
    return x + y[0, 0].reshape((1, 1))


@case(2)
def a_step_on_its_way_is_not_for_the_others():
    layer = SyncBatchNorm(in_channels=1, momentum=0)
    layer.initialize()
    x = mx.nd.array([[100.0], [102.0]])
    with autograd.record():
        layer(slowly(x) if RANK == 0 else x)
    distributed.attach(layer)
    for step in range(2):
        with autograd.record():
            layer(mx.nd.array([[10.0 * step + RANK], [10.0 * step + RANK + 2]]))
        assert layer.running_mean.data().asscalar() == 10 * step + 1.5
    WORLD.Barrier()
    distributed.detach(layer)


@case(2)
def a_step_without_a_shard_that_fails_counts_nothing():
    layer = SyncBatchNorm(in_channels=1, momentum=0)
    layer.initialize()
    with attached(layer):
        x = mx.nd.array([[1.0], [3.0]])
        with contextlib.suppress(KeyboardInterrupt):
            with distributed.no_shard(layer) if RANK == 1 else contextlib.nullcontext():
                with autograd.record():
                    layer(slowly(x + 100) if RANK == 1 else x)
                if RANK == 1:
                    raise KeyboardInterrupt
        assert layer.running_mean.data().asscalar() == 2


@case(2)
def devices_without_an_order_are_refused():
    contexts = [mx.cpu(0), mx.cpu(1)]
    for num_devices in (None, 1):
        layer = SyncBatchNorm(in_channels=3, num_devices=num_devices)
        layer.initialize(ctx=contexts)
        with attached(layer):
            with autograd.record():
                message = error_of(partial(layer, mx.nd.ones((2, 3))), RuntimeError)
            assert "on 2 devices here" in message and "ModelDataParallel" in message, message


@case(2)
def a_backward_that_one_rank_runs_once_only():
    layer = SyncBatchNorm(in_channels=3, prefix="again_")
    layer.initialize()
    distributed.attach(layer)
    x = mx.nd.ones((2, 3))
    x.attach_grad()
    with autograd.record():
        out = layer(x)
    out.backward(retain_graph=True)
    x.grad.wait_to_read()
    with timeout(1):
        if RANK == 0:
            out.backward()
            message = error_of(x.grad.wait_to_read)
            assert "backward" in message and "rank 1" in message and "has not" in message, message
        else:
            time.sleep(2)
    mx.nd.waitall()
    WORLD.Barrier()
    distributed.detach(layer)


@case(2)
def a_forked_process_is_refused():
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    with attached(layer):
        step_of(layer)
        mx.nd.waitall()
        child = os.fork()
        if child == 0:
            try:
                message = error_of(lambda: step_of(layer))
                os._exit(0 if "forked" in message else 1)
            except BaseException:
                traceback.print_exc()
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert same_everywhere(step_of(layer))


@case(2)
def many_steps_with_random_delays():
    rng = np.random.RandomState(RANK)
    x, y = data(batch=8)
    net = Branches()
    net.initialize()
    net(x)
    net.hybridize(static_alloc=True)
    begin, end = cut(len(x))[RANK]
    with attached(net):
        for step in range(60):
            if rng.rand() < 0.2:
                time.sleep(rng.rand() * 0.01)
            with autograd.record():
                out = net(x[begin:end])
            out.backward()
            if step % 10 == 0:
                out.wait_to_read()
        mx.nd.waitall()
        for name, value in parameters(net).items():
            if "running" in name:
                assert same_everywhere(value), name


@case(2)
def the_waiting_for_other_processes_is_recorded():
    net = SyncBatchNorm(in_channels=3)
    net.initialize()
    with attached(net):
        gluon_syncbn.barrier_stats(reset=True)
        for _ in range(3):
            if RANK == 1:
                time.sleep(0.05)
            with autograd.record():
                net(mx.nd.ones((2, 3))).wait_to_read()
        stats = gluon_syncbn.barrier_stats()
        key = stats.keys[net.key]
        assert key.rounds == len(stats.waits) == 3
        assert all(w.came == w.complete <= w.ended for w in stats.waits)
        elsewhere = WORLD.allgather(key.elsewhere)
        assert elsewhere[0] > 2 * 0.05 and elsewhere[0] > elsewhere[1], elsewhere
        assert "for other processes." in str(stats)


def main():
    folder, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
    gluon_syncbn.set_timeout(20)
    for name, function in CASES.items():
        if SIZE not in function.ranks or (names and name not in names):
            continue
        WORLD.Barrier()
        start = time.monotonic()
        try:
            function()
            mx.nd.waitall()
        except BaseException:
            (folder / f"{name}.{RANK}").write_text(traceback.format_exc())
            traceback.print_exc()
            sys.stderr.flush()
            time.sleep(2)  # another rank may have something to say, too
            WORLD.Abort(1)
        (folder / f"{name}.{RANK}").write_text("")
        if os.environ.get("SHOW_TIMES") and RANK == 0:
            print(f"{time.monotonic() - start:6.2f} s {name}", flush=True)


if __name__ == "__main__":
    main()
