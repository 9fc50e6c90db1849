"""Networks on several devices: they compute what one device would, and never hang."""

import gc
import resource
import time

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluon_syncbn
from gluon_syncbn import DataParallelCriterion, ModelDataParallel, SyncBatchNorm, parallel_backward
from networks import (
    MODES,
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
    parallel_backward(outs)  # in which MXNet's own layer moves its statistics
    mx.nd.waitall()
    inner = [net[0](part).asnumpy() for part in split(x, two)]
    for context, part in zip(two, inner):
        np.testing.assert_allclose(
            net[1].running_mean.data(context).asnumpy(), 0.1 * part.mean(0), rtol=1e-4, atol=1e-6
        )


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
    """Raises on the device `broken`, between two normalizations."""

    broken = None

    def forward(self, x):
        x = self[0](x)
        if x.context == self.broken:
            raise KeyError(f"broken on {x.context}")
        x = self[1](x)
        x.wait_to_read()  # the other device waits here for one that never arrives
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


def test_an_unread_failure_is_raised_by_the_next_call(two):
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


def test_an_unrelated_failure_is_neither_raised_nor_swallowed(two):
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
                mx.nd.waitall()  # on a busy machine the engine's queue would grow
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = run(301)
    after = run(2001)
    # One lost array of this network a step would be 8 MiB or more over 2,000 steps.
    assert after - before < 6, f"{before:.1f} MiB, then {after:.1f} MiB"


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
