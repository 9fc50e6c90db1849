"""Networks on several devices at once: as one device with the whole batch, and never hanging."""

import gc
import resource
import threading
import time

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import fresh_process
import gluon_syncbn
from gluon_syncbn import (
    DataParallelCriterion,
    ModelDataParallel,
    SyncBatchNorm,
    parallel_backward,
)
from gluon_syncbn.data_parallel.exchanges import exchanges_of
from networks import (
    STATIC,
    Branches,
    Shared,
    assert_same_training,
    convolutional,
    data_for,
    split,
    train,
    waiting,
)

MODES = [None, {}, {"static_alloc": True}, STATIC]


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("hybridize", MODES)
def test_several_devices_train_as_one(devices, hybridize):
    # 7 and 9 do not divide evenly; 1 leaves all devices but one without input.
    batches = data_for(0, [8, 7, 9, 1, 8, 2, 8, 8])
    wanted = train(convolutional, 1, batches)
    assert_same_training(train(convolutional, devices, batches, hybridize), wanted)


@pytest.mark.parametrize("make", [Branches, Shared, waiting])
@pytest.mark.parametrize("hybridize", [None, {}, STATIC])
def test_branches_shared_layers_and_waiting_networks(make, hybridize):
    batches = data_for(5, 6)
    wanted = train(make, 1, batches)
    for devices in (2, 3):
        assert_same_training(train(make, devices, batches, hybridize), wanted)


@pytest.mark.parametrize("deferred", [True, False])
def test_the_first_call_leaves_no_trace(deferred):
    """Initialization and tracing run the network once more; its statistics must not show it."""
    batches = data_for(2, 6)
    wanted = train(convolutional, 1, batches, deferred=deferred)
    assert_same_training(train(convolutional, 2, batches, {}, deferred=deferred), wanted)


def test_plain_batch_norm_keeps_its_own_statistics(two, rng):
    net = nn.HybridSequential()
    net.add(nn.Dense(4), nn.BatchNorm())
    net.initialize(ctx=two)
    net.hybridize()
    x = rng.randn(6, 3).astype("float32")
    with autograd.record():
        outs = ModelDataParallel(net, two)(split(x, two))
    parallel_backward(outs)  # where MXNet's own moves its statistics
    mx.nd.waitall()
    inner = [net[0](part).asnumpy() for part in split(x, two)]
    for context, part in zip(two, inner):
        np.testing.assert_allclose(
            net[1].running_mean.data(context).asnumpy(), 0.1 * part.mean(0), rtol=1e-4, atol=1e-6
        )


class Nested(gluon.Block):
    """Several inputs, keyword arguments, and outputs in lists and tuples."""

    def __init__(self):
        super().__init__()
        self.norm = SyncBatchNorm()

    def forward(self, x, z, scale=1, extra=None, name="name"):
        assert isinstance(name, str)
        y = self.norm(x) * scale
        return y, [z + 1, (y + z, extra)]


def test_nested_inputs_and_outputs(two):
    model = ModelDataParallel(Nested(), two)
    model.initialize(ctx=two)
    xs = [mx.nd.full((2, 3), i, ctx=c) for i, c in enumerate(two)]
    zs = [mx.nd.full((2, 3), 10 * i, ctx=c) for i, c in enumerate(two)]
    with autograd.record():
        outs = model(xs, zs, scale=2, extra=[(x, z) for x, z in zip(xs, zs)], name="text")
    for i, (y, (z, (both, extra))) in enumerate(outs):
        assert y.context == two[i]
        np.testing.assert_allclose(y.asnumpy(), np.full((2, 3), 4.0 * i - 2), atol=1e-3)
        np.testing.assert_array_equal(z.asnumpy(), np.full((2, 3), 10 * i + 1))
        np.testing.assert_allclose(both.asnumpy(), y.asnumpy() + 10 * i, atol=1e-5)
        assert extra[0] is xs[i] and extra[1] is zs[i]


def test_outputs_come_in_the_order_of_the_inputs(two):
    model = ModelDataParallel(nn.Lambda(lambda x: x + 1), two)
    inputs = [mx.nd.zeros(1, ctx=two[1]), mx.nd.ones(1, ctx=two[0])]
    outs = model(inputs)
    assert [(o.context, o.asscalar()) for o in outs] == [(two[1], 1), (two[0], 2)]


def test_attributes_of_the_network_are_reachable(two):
    net = convolutional()
    model = ModelDataParallel(net, two)
    assert model.net is net and model.prefix == net.prefix
    assert set(model.collect_params()) == set(net.collect_params())
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = model.nothing_here
    assert "ctx_list" in repr(model)


def test_one_device(rng):
    model = ModelDataParallel(SyncBatchNorm(), mx.cpu(0))
    model.initialize()
    x = mx.nd.array(rng.randn(8, 3))
    x.attach_grad()
    with autograd.record():
        (y,) = model([x])
    parallel_backward([y])
    np.testing.assert_allclose(y.asnumpy().std(0), 1, rtol=1e-3)


def test_devices_without_input_have_zero_and_fresh_gradients(two, rng):
    net = convolutional()
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    trainer = gluon.Trainer(net.collect_params(), "sgd")
    x = rng.randn(4, 3, 8, 8).astype("float32")
    for contexts in (two, two[1:]):
        with autograd.record():
            outs = model(split(x, contexts))
        parallel_backward(outs)
        if contexts != two:
            for p in net.collect_params().values():
                if p.grad_req != "null":
                    assert not p.grad(two[0]).asnumpy().any()
            assert net[0].weight.grad(two[1]).asnumpy().any()
        trainer.step(4)  # raises a UserWarning for a gradient that is not fresh
    weights = net[0].weight.list_data()
    np.testing.assert_array_equal(weights[0].asnumpy(), weights[1].asnumpy())


def test_backward_after_a_later_step_with_fewer_devices(two, rng):
    """A backward round expects the devices of its own forward, whoever came since."""
    net = SyncBatchNorm(in_channels=3)
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    x = rng.randn(6, 3).astype("float32")
    weight = mx.nd.array(rng.randn(6, 3))

    def gradients(contexts, parts):
        for part in parts:
            part.attach_grad()
        with autograd.record():
            return [(y * w).sum() for y, w in zip(model(parts), split(weight, contexts))]

    wanted = split(x, two[:1])
    parallel_backward(gradients(two[:1], wanted))
    full, fewer = split(x, two), split(x, two[:1])
    late = gradients(two, full)
    # retain_graph: MXNet's first backward would else clear the moving statistics' place in both.
    parallel_backward(gradients(two[:1], fewer), retain_graph=True)
    parallel_backward(late)
    for parts in (full, fewer):
        got = np.concatenate([part.grad.asnumpy() for part in parts])
        np.testing.assert_allclose(got, wanted[0].grad.asnumpy(), atol=1e-5)


def test_accumulated_gradients_stay_where_a_device_has_no_input(two, rng):
    net = nn.Dense(2, in_units=3)
    net.initialize(ctx=two)
    net.collect_params().setattr("grad_req", "add")
    model = ModelDataParallel(net, two)
    x = rng.randn(4, 3).astype("float32")
    for contexts in (two, two[:1]):
        with autograd.record():
            outs = model(split(x, contexts))
        parallel_backward(outs)
    np.testing.assert_allclose(net.weight.grad(two[1]).asnumpy()[0], x[2:].sum(0), rtol=1e-5)


@pytest.mark.parametrize("hybridize", [None, STATIC])
def test_inference_between_training_steps(hybridize, two, rng):
    """A graph with static_shape has one flag for all its runs: none may see another's."""
    net = convolutional(widths=(8, 8, 8, 8))
    net.add(nn.Dense(64), nn.Dense(64), SyncBatchNorm(epsilon=1e-9))
    net.initialize(mx.init.Xavier(magnitude=20), ctx=two)
    if hybridize:
        net.hybridize(**hybridize)
    model = ModelDataParallel(net, two)
    x = rng.randn(16, 3, 24, 24).astype("float32")
    for _ in range(10):
        with autograd.record():
            outs = model(split(x, two))
        parallel_backward(outs)
        fewer = model(split(x, two[:1]))[0]
        both = model(split(x, two))
        trained = np.concatenate([o.asnumpy() for o in outs])
        np.testing.assert_allclose(trained.std(0), 1, atol=1e-2)  # by the batch's statistics
        assert np.abs(fewer.asnumpy().std(0) - 1).max() > 0.05  # by the moving ones
        both = np.concatenate([o.asnumpy() for o in both])
        np.testing.assert_allclose(both, fewer.asnumpy(), rtol=1e-3, atol=1e-4)


def test_different_sizes_on_each_device(two, rng):
    """Detection feeds images of different sizes; every element counts the same."""
    net = SyncBatchNorm(in_channels=3)
    net.initialize(ctx=two)
    shapes = [(2, 3, 8, 8), (1, 3, 5, 12)]
    arrays = [rng.randn(*shape).astype("float32") for shape in shapes]
    with autograd.record():
        ModelDataParallel(net, two)([mx.nd.array(a, ctx=c) for a, c in zip(arrays, two)])
    mx.nd.waitall()
    flat = np.concatenate([a.transpose(0, 2, 3, 1).reshape(-1, 3) for a in arrays])
    for context in two:
        got = net.running_mean.data(context).asnumpy()
        np.testing.assert_allclose(got, 0.1 * flat.mean(0), rtol=1e-5)


class FailsOn(nn.HybridSequential):
    """Raises on one device between two normalizations while it is told to."""

    broken = None

    def forward(self, x):
        x = self[0](x)
        if x.context == self.broken:
            raise KeyError(f"broken on {x.context}")
        x = self[1](x)
        x.wait_to_read()  # the other device waits here for what never comes
        return x


@pytest.mark.parametrize("where", [0, 1])
def test_an_exception_on_one_device_reaches_the_caller_and_the_next_call_works(where, two, rng):
    net = FailsOn()
    net.add(SyncBatchNorm(), SyncBatchNorm())
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    x = rng.randn(4, 3).astype("float32")
    for _ in range(3):
        net.broken = two[where]
        start = time.time()
        with pytest.raises(KeyError, match="broken on"):
            with autograd.record():
                model(split(x, two))
        assert time.time() - start < 20, "waited for the deadline"
        net.broken = None
        with autograd.record():
            outs = model(split(x, two))
        parallel_backward(outs)
        got = np.concatenate([o.asnumpy() for o in outs])
        np.testing.assert_allclose(got, (x - x.mean(0)) / x.std(0), atol=1e-3)


def test_a_backward_that_fails_on_one_device_lets_the_others_go(two):
    net = SyncBatchNorm(in_channels=2)
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    xs = [mx.nd.ones((2, 2), ctx=c) for c in two]
    for x in xs:
        x.attach_grad()
    with autograd.record():
        outs = model(xs)
    unrecorded = mx.nd.ones(1, ctx=two[1])
    start = time.time()
    with pytest.raises(mx.MXNetError):
        parallel_backward([outs[0], unrecorded])
    assert time.time() - start < 20
    with autograd.record():
        outs = model(xs)
    parallel_backward(outs)
    xs[0].grad.wait_to_read()


class SkipsOn(gluon.Block):
    """Takes another path on one device: a bug that must not become a hang."""

    skips = None

    def __init__(self):
        super().__init__()
        self.norm = SyncBatchNorm(in_channels=3)

    def forward(self, x):
        return x if x.context == self.skips else self.norm(x)


def test_a_device_that_never_comes_is_an_error_on_the_others_and_the_next_step_works(two):
    net = SkipsOn()
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    xs = [mx.nd.array([[1, 2, 3], [4, 5, 6]], ctx=c) for c in two]
    with autograd.record():
        model(xs)
    net.skips = two[1]
    gluon_syncbn.set_timeout(0.5)
    with autograd.record():
        outs = model(xs)
    with pytest.raises(mx.MXNetError, match=r"forward.*Arrived: cpu\(0\); missing: 1 of 2"):
        outs[0].asnumpy()
    outs[1].asnumpy()
    net.skips = None
    gluon_syncbn.set_timeout(30)
    with autograd.record():
        outs = model(xs)
    parallel_backward(outs)
    np.testing.assert_allclose(outs[0].asnumpy(), outs[1].asnumpy())


def test_a_failure_that_nobody_read_is_raised_by_the_next_call(two):
    net = SkipsOn()
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    xs = [mx.nd.ones((2, 3), ctx=c) for c in two]
    with autograd.record():
        model(xs)
    net.skips = two[1]
    gluon_syncbn.set_timeout(0.3)
    with autograd.record():
        model(xs)
    time.sleep(1)
    net.skips = None
    gluon_syncbn.set_timeout(30)
    with pytest.raises(mx.MXNetError, match="not every device came"):
        with autograd.record():
            model(xs)
    with autograd.record():
        outs = model(xs)
    outs[0].asnumpy()


def test_an_unrelated_failure_is_neither_met_nor_swallowed(two):
    net = SyncBatchNorm()
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    mx.nd.random.normal(0, -1, shape=(2, 2))
    model([mx.nd.ones((2, 3), ctx=c) for c in two])
    with pytest.raises(mx.MXNetError, match="scale|sigma"):
        mx.nd.waitall()


class TrainingHead(gluon.Block):
    """A part that only runs in training, as auxiliary heads do; and one that never runs."""

    def __init__(self):
        super().__init__()
        self.body = convolutional(widths=(4,))
        self.head = convolutional(widths=(4,), prefix="head_")
        self.unused = nn.Dense(3)

    def forward(self, x):
        return self.body(x) + self.head(x) if autograd.is_training() else self.body(x)


@pytest.mark.parametrize("hybridize", [False, True])
def test_parts_that_only_run_in_training(hybridize, two, rng):
    """Initialized and traced by one thread, though an inference call came first."""
    x = rng.randn(4, 3, 6, 6).astype("float32")
    for _ in range(5):
        net = TrainingHead()
        net.initialize(ctx=two)
        if hybridize:
            net.hybridize()
        model = ModelDataParallel(net, two)
        model(split(x, two))
        for contexts in (two, two[:1], two):  # one without input: an unused part has no gradient
            with autograd.record():
                outs = model(split(x, contexts))
            parallel_backward(outs)
    mx.nd.waitall()


@pytest.mark.parametrize("make", [convolutional, waiting, Branches])
def test_hybridizing_again_and_again(make, two, rng):
    net = make()
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    x = rng.randn(4, 3, 8, 8).astype("float32")
    for i in range(8):
        net.hybridize(static_alloc=bool(i % 2))
        with autograd.record():
            outs = model(split(x, two))
        parallel_backward(outs)
    mx.nd.waitall()


def dropout_masks(two, model, steps=3):
    x = [mx.nd.ones((64,), ctx=c) for c in two]
    masks = []
    for _ in range(steps):
        with autograd.record():
            masks.append([o.asnumpy() for o in model(x)])
    return np.array(masks)


@pytest.mark.parametrize("hybridize", [None, {}, STATIC])
def test_dropout_differs_between_devices_and_is_reproducible(two, hybridize):
    net = nn.HybridSequential()
    net.add(nn.Dropout(0.5))
    if hybridize is not None:
        net.hybridize(**hybridize)
    model = ModelDataParallel(net, two)
    mx.random.seed(11)
    first = dropout_masks(two, model)
    mx.random.seed(11)
    again = dropout_masks(two, model)
    mx.random.seed(12)
    other = dropout_masks(two, model)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[:, 0] != first[:, 1]).any()  # between devices
    assert (first[0] != first[1]).any()  # between steps
    mx.random.seed(5, ctx=two[0])  # one device anew
    mixed = dropout_masks(two, model)
    mx.random.seed(5, ctx=two[0])
    np.testing.assert_array_equal(dropout_masks(two, model)[:, 0], mixed[:, 0])


def test_a_seed_set_before_the_import_counts():
    script = """
import mxnet as mx, sys
mx.random.seed(int(sys.argv[1]))
from gluon_syncbn import ModelDataParallel
contexts = [mx.cpu(0), mx.cpu(1)]
model = ModelDataParallel(mx.gluon.nn.Dropout(0.5), contexts)
with mx.autograd.record():
    outs = model([mx.nd.ones(40, ctx=c) for c in contexts])
print([o.asnumpy().tolist() for o in outs])
"""
    printed = [fresh_process.run(script, seed).stdout for seed in (1, 1, 2)]
    assert printed[0] == printed[1] != printed[2]


def test_deferred_initial_weights_follow_the_callers_seed(two, rng):
    """As on one device: the weights are drawn from the random state of the calling thread."""
    x = rng.randn(4, 3).astype("float32")
    weights = []
    for _ in range(2):
        net = nn.Dense(5)
        net.initialize(mx.init.Normal(), ctx=two)
        mx.random.seed(21)
        ModelDataParallel(net, two)(split(x, two))
        weights.append(net.weight.data(two[1]).asnumpy())
    np.testing.assert_array_equal(*weights)


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


def test_data_loader_workers_beside_training(two, rng):
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


def test_calling_a_model_from_within_a_network_is_refused(two):
    inner = ModelDataParallel(SyncBatchNorm(in_channels=1), two)
    inner.initialize(ctx=two)
    xs = [mx.nd.ones((1, 1), ctx=c) for c in two]
    outer = ModelDataParallel(nn.Lambda(lambda x: inner(xs)[0]), two)
    with pytest.raises(RuntimeError, match="would wait for itself"):
        outer(xs)


def test_threads_are_kept(two):
    model = ModelDataParallel(convolutional(), two)
    model.initialize(ctx=two)
    for _ in range(2):
        model([mx.nd.ones((1, 3, 8, 8), ctx=c) for c in two])
    before = {t.ident for t in threading.enumerate()}
    for _ in range(10):
        model([mx.nd.ones((1, 3, 8, 8), ctx=c) for c in two])
    assert {t.ident for t in threading.enumerate()} == before


def test_memory_does_not_grow_over_2000_steps(two, rng):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3, use_bias=False), SyncBatchNorm(), nn.Dropout(0.1), nn.Dense(3))
    net.initialize(ctx=two)
    net.hybridize()
    model = ModelDataParallel(net, two)
    criterion = DataParallelCriterion(gluon.loss.L2Loss(), two)
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.01})
    xs = split(rng.randn(4, 2, 8, 8), two)
    ys = split(rng.randn(4, 3), two)

    def run(steps):
        for step in range(steps):
            with autograd.record():
                losses = criterion(model(xs), ys)
            parallel_backward(losses)
            trainer.step(4)
            if step % 20 == 0:
                mx.nd.waitall()  # on a busy machine the queue of what is to be done grows, too
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = run(301)
    after = run(2001)
    # One lost array of this network a step would be 8 MiB or more over 2,000 steps.
    assert after - before < 6, f"{before:.1f} MiB, then {after:.1f} MiB"


def test_criterion_passes_a_tuple_of_outputs_as_arguments(two):
    class Loss(gluon.HybridBlock):
        def hybrid_forward(self, F, first, second, label):
            return first + 10 * second + 100 * label

    ones = [mx.nd.ones(2, ctx=c) for c in two]
    losses = DataParallelCriterion(Loss(), two)([(o, 2 * o) for o in ones], [3 * o for o in ones])
    assert [loss.context for loss in losses] == two
    np.testing.assert_array_equal(losses[1].asnumpy(), [321, 321])


def test_backward_takes_head_gradients_and_nested_losses(two):
    xs = [mx.nd.ones(2, ctx=c) for c in two]
    for x in xs:
        x.attach_grad()
    with autograd.record():
        losses = [(2 * x, 3 * x) for x in xs]
    parallel_backward(losses, retain_graph=True)
    assert [x.grad[0].asscalar() for x in xs] == [5, 5]
    parallel_backward(losses, [(10 * o, 100 * o) for o in [mx.nd.ones(2, ctx=c) for c in two]])
    assert [x.grad[0].asscalar() for x in xs] == [320, 320]


def test_two_copies_of_one_file_do_not_mix(two, rng, tmp_path):
    """A teacher and a student from one exported file, on different data, in different order."""
    net = nn.HybridSequential(prefix="copied_")
    net.add(SyncBatchNorm(in_channels=3, prefix="norm_"))
    net.initialize(ctx=two)
    net.hybridize()
    net(mx.nd.ones((1, 3), ctx=two[0]))
    net.export(str(tmp_path / "net"))
    models = [
        ModelDataParallel(
            gluon.SymbolBlock.imports(
                str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params"), two
            ),
            two,
        )
        for _ in range(2)
    ]
    keys = [{e.key for e in exchanges_of(model.net)} for model in models]
    assert not keys[0] & keys[1] and len(keys[0]) == 1
    x = rng.randn(6, 3).astype("float32")
    for model, scale in zip(models, (1, 100)):
        with autograd.record():
            outs = model(split(scale * x, two))
        got = np.concatenate([o.asnumpy() for o in outs])
        np.testing.assert_allclose(got, (x - x.mean(0)) / x.std(0), atol=1e-3)
    # Exported again, the name does not grow.
    models[0].net.export(str(tmp_path / "again"))
    again = gluon.SymbolBlock.imports(
        str(tmp_path / "again-symbol.json"), ["data"], str(tmp_path / "again-0000.params"), two
    )
    (exchange,) = exchanges_of(again)
    assert exchange.key.count("@") == 1


class Sums(gluon.HybridBlock):
    """The exchange by itself inside a network."""

    def hybrid_forward(self, F, x):
        return F.contrib.KeyBarrierSum(x, key="sums", num_devices=2)


@pytest.mark.parametrize("hybridize", [False, True])
def test_key_barrier_sum_inside_a_network(hybridize, two):
    net = Sums()
    if hybridize:
        net.hybridize()
    gluon_syncbn.set_timeout(5)
    outs = ModelDataParallel(net, two)([mx.nd.full(1, 1 + i, ctx=c) for i, c in enumerate(two)])
    assert [o.asscalar() for o in outs] == [3, 3]


def test_two_networks_in_one_step(two, rng):
    """As in a GAN: rounds of several networks are under way at once, with equal layer names."""
    models = []
    for _ in range(2):
        net = nn.HybridSequential(prefix="same_")
        net.add(SyncBatchNorm(prefix="norm_"), nn.Dense(3))
        net.initialize(ctx=two)
        net.hybridize()
        models.append(ModelDataParallel(net, two))
    x = rng.randn(6, 3).astype("float32")
    for _ in range(20):
        with autograd.record():
            first = models[0](split(x, two))
            second = models[1](split(100 * x, two))
        parallel_backward([list(pair) for pair in zip(first, second)])
    for model, scale in zip(models, (1, 100)):
        mean = model.net[0].running_mean.data(two[1]).asnumpy()
        np.testing.assert_allclose(mean, scale * x.mean(0) * (1 - 0.9**20), rtol=1e-3, atol=1e-5)


class LossesInside(gluon.HybridBlock):
    """What its graph is depends on recording, as that of GluonCV's YOLO3 does."""

    def __init__(self):
        super().__init__(prefix="losses_")
        with self.name_scope():
            self.norm = SyncBatchNorm()

    def hybrid_forward(self, F, x):
        x = self.norm(x)
        return (x, (x * x).mean()) if autograd.is_recording() else x


@pytest.mark.parametrize("hybridize", [None, {}, STATIC])
def test_a_network_that_asks_whether_it_is_recorded(hybridize, two, rng):
    net = LossesInside()
    net.initialize(ctx=two)
    if hybridize is not None:
        net.hybridize(**hybridize)
    model = ModelDataParallel(net, two)
    xs = [mx.nd.array(rng.randn(3, 4), ctx=c) for c in two]
    with autograd.record():
        losses = [loss for _, loss in model(xs)]
    parallel_backward(losses)
    assert sum(loss.asscalar() for loss in losses) == pytest.approx(2, rel=1e-3)
