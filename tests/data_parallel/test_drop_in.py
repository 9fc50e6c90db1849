"""Programs written for the original preview and for GluonCV's wrappers run with other imports."""

import functools

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluon_syncbn
from gluon_syncbn import (
    DataParallelCriterion,
    DataParallelModel,
    ModelDataParallel,
    SyncBatchNorm,
    parallel_backward,
)
from networks import STATIC, convolutional, split


class PreviewNet(gluon.Block):
    """In the form of the preview's example: channels given, nothing said of devices."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(in_channels=3, channels=10, kernel_size=3, padding=1)
        self.bn = gluon_syncbn.BatchNorm(in_channels=10)
        self.relu = nn.Activation("relu")

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def test_the_previews_program():
    """Initialized without contexts, then wrapped, then called on what split_and_load gives."""
    ctx_list = [mx.cpu(i) for i in range(4)]
    model = PreviewNet()
    model.initialize()
    model = ModelDataParallel(model, ctx_list)
    data = mx.random.uniform(-1, 1, (8, 3, 24, 24))
    x = gluon.utils.split_and_load(data, ctx_list=ctx_list)
    with autograd.record():
        y = model(x)
    assert [part.context for part in y] == ctx_list
    net = model.module
    with autograd.train_mode():
        conv = net.conv(data).asnumpy()
    over = {"axis": (0, 2, 3), "keepdims": True}
    wanted = np.maximum((conv - conv.mean(**over)) / np.sqrt(conv.var(**over) + 1e-5), 0)
    np.testing.assert_allclose(np.concatenate([p.asnumpy() for p in y]), wanted, atol=1e-5)


def test_the_previews_training_loop(two, rng):
    """Its mnist.py: ``nGPUs``, ``net.module``, a loss a device, parameters on one device."""
    net = nn.HybridSequential()
    norm = gluon_syncbn.BatchNorm(in_channels=8, nGPUs=2)
    assert norm.num_devices == 2
    net.add(nn.Dense(8, in_units=6), norm, nn.Dense(3))
    net.collect_params().initialize(mx.init.Xavier(magnitude=2.24))
    net = ModelDataParallel(net, two)
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    trainer = gluon.Trainer(net.module.collect_params(), "sgd", {"learning_rate": 0.1})
    data, label = mx.nd.array(rng.randn(8, 6)), mx.nd.array(rng.randint(0, 3, 8))
    means = []
    for _ in range(20):
        xs = gluon.utils.split_and_load(data, ctx_list=two)
        ys = gluon.utils.split_and_load(label, ctx_list=two)
        with autograd.record():
            losses = [loss(yhat, y) for yhat, y in zip(net(xs), ys)]
        parallel_backward(losses)
        trainer.step(len(xs) * xs[0].shape[0])
        means.append(np.mean([part.asnumpy() for part in losses]))
    assert means[-1] < 0.7 * means[0]
    for p in net.module.collect_params().values():
        assert p.list_ctx() == two
        np.testing.assert_array_equal(p.data(two[0]).asnumpy(), p.data(two[1]).asnumpy())


def values(net, context):
    return {name: p.data(context).asnumpy() for name, p in net.collect_params().items()}


@pytest.mark.parametrize("hybridize", [None, STATIC])
@pytest.mark.parametrize("there", [[mx.cpu(0)], [mx.cpu(1)], [mx.cpu(2), mx.cpu(1)], [mx.cpu(3)]])
def test_parameters_are_put_on_all_devices(there, hybridize, two, rng):
    net = convolutional(widths=(4,))
    net.initialize(mx.init.Xavier(), ctx=there)
    if hybridize:
        net.hybridize(**hybridize)
    x = rng.randn(4, 3, 6, 6).astype("float32")
    with autograd.record():
        net(mx.nd.array(x, ctx=there[0]))
    mx.nd.waitall()
    before = values(net, there[0])
    for context in there:  # nobody averages moving statistics
        for name, p in net.collect_params(".*running.*").items():
            mx.nd.array(before[name]).copyto(p.data(context))
    requests = {name: p.grad_req for name, p in net.collect_params().items()}
    model = ModelDataParallel(net, two)
    for context in two:
        for name, value in values(net, context).items():
            np.testing.assert_array_equal(value, before[name])
    assert requests == {name: p.grad_req for name, p in net.collect_params().items()}
    with autograd.record():
        outs = model(split(x, two))
    parallel_backward(outs)
    assert net[0].weight.list_ctx() == two and net[0].weight.grad(two[1]).asnumpy().any()
    mx.nd.waitall()


def test_deferred_parameters_are_put_on_all_devices(two, rng):
    x = rng.randn(4, 3, 6, 6).astype("float32")
    weights = []
    for contexts in (two, None):
        mx.random.seed(5)
        net = convolutional(widths=(4,))
        net.initialize(mx.init.Xavier(), ctx=contexts)
        model = ModelDataParallel(net, two)
        assert net[0].weight.list_ctx() == two
        model(split(x, two))
        weights.append(values(net, two[1]))
    for name, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][name])


def test_parameters_initialized_or_loaded_after_the_model_was_made(two, rng, tmp_path):
    x = rng.randn(4, 3).astype("float32")
    net = nn.HybridSequential(prefix="late_")
    with net.name_scope():
        net.add(nn.Dense(4), SyncBatchNorm())
    model = ModelDataParallel(net, two)
    net.initialize(mx.init.Xavier())
    with autograd.record():
        model(split(x, two))
    assert net[0].weight.list_ctx() == two
    mx.nd.waitall()
    net.save_parameters(str(tmp_path / "net.params"))
    wanted = np.concatenate([y.asnumpy() for y in model(split(x, two))])

    other = nn.HybridSequential()
    other.add(nn.Dense(4), SyncBatchNorm())
    model = ModelDataParallel(other, two)
    for options in ({}, {"ctx": two}, {}):  # onto cpu(0); where they are then
        other.load_parameters(str(tmp_path / "net.params"), **options)
        got = np.concatenate([y.asnumpy() for y in model(split(x, two))])
        np.testing.assert_array_equal(got, wanted)
    other.collect_params().reset_ctx(two[1])  # say, to look at something
    got = np.concatenate([y.asnumpy() for y in model(split(x, two))])
    np.testing.assert_array_equal(got, wanted)


def test_parameters_that_lie_on_all_devices_are_left_alone(two, rng):
    three = [mx.cpu(2), mx.cpu(1), mx.cpu(0)]
    net = nn.Dense(2, in_units=3)
    net.initialize(ctx=three)
    arrays = net.weight.list_data()
    model = ModelDataParallel(net, two)
    model(split(rng.randn(4, 3), two))
    assert all(now is before for now, before in zip(net.weight.list_data(), arrays))
    assert net.weight.list_ctx() == three


class Fixed(gluon.HybridBlock):
    """A Constant, and a parameter that two blocks share."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.table = self.params.get_constant("table", mx.nd.array([[1, 2, 3]], dtype="int32"))
            self.one = nn.Dense(3, in_units=3, use_bias=False)
            self.two = nn.Dense(3, in_units=3, use_bias=False, params=self.one.params)

    def hybrid_forward(self, F, x, table):
        return F.broadcast_add(self.two(self.one(x)), F.cast(table, "float32"))


def test_constants_and_shared_parameters(two):
    net = Fixed()
    net.initialize(mx.init.One())
    outs = ModelDataParallel(net, two)([mx.nd.ones((1, 3), ctx=c) for c in two])
    for out in outs:
        np.testing.assert_array_equal(out.asnumpy(), [[10, 11, 12]])
    assert net.table.list_ctx() == two and net.table.data(two[1]).dtype == np.int32


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("update_on_kvstore", [True, False])
def test_a_trainer_made_before(deferred, update_on_kvstore, two, rng):
    """It would have stepped device 0 alone."""
    batch = split(rng.randn(6, 4), two), split(rng.randn(6, 2), two)
    weights = []
    for late in (False, True):
        mx.random.seed(3)
        net = nn.HybridSequential(prefix="net_")
        with net.name_scope():
            net.add(
                nn.Dense(5, in_units=0 if deferred else 4),
                SyncBatchNorm(in_channels=0 if deferred else 5),
                nn.Dense(2, in_units=0 if deferred else 5),
            )
        net.initialize(mx.init.Xavier(), ctx=two[0] if late else two)
        model = None if late else ModelDataParallel(net, two)
        trainer = gluon.Trainer(
            net.collect_params(),
            "adam",
            {"learning_rate": 0.01},
            update_on_kvstore=update_on_kvstore,
        )
        model = model or ModelDataParallel(net, two)
        criterion = DataParallelCriterion(gluon.loss.L2Loss(), two)
        for _ in range(3):
            with autograd.record():
                losses = criterion(model(batch[0]), batch[1])
            parallel_backward(losses)
            trainer.step(6)
        mx.nd.waitall()
        weights.append([values(net, context) for context in two])
    for name, wanted in weights[0][0].items():
        for device in (0, 1):
            np.testing.assert_array_equal(weights[1][device][name], wanted, err_msg=name)


class Adds(gluon.Block):
    def forward(self, x, y, z=1):
        return x + y * z


def test_an_array_is_split_like_lists(rng):
    contexts = [mx.cpu(i) for i in range(3)]
    data = rng.randn(7, 4).astype("float32")
    model, whole = (kind(Adds(), contexts) for kind in (ModelDataParallel, DataParallelModel))
    for rows in (7, 3, 2, 1):
        x = mx.nd.array(data[:rows])
        first = [out for (out,) in whole(x, x, 2)]
        named = [out for (out,) in whole(y=x, z=2, x=x)]
        for outs in (first, named, model(split(x, contexts), x, z=2)):
            assert [o.context for o in outs] == contexts[:rows]
            sizes = [len(o) for o in outs]
            assert sum(sizes) == rows and max(sizes) - min(sizes) <= 1
            np.testing.assert_allclose(np.concatenate([o.asnumpy() for o in outs]), 3 * x.asnumpy())


def test_an_array_follows_the_order_of_the_lists(two):
    model = ModelDataParallel(Adds(), two)
    xs = [mx.nd.zeros((1, 1), ctx=c) for c in reversed(two)]
    outs = model(xs, mx.nd.array([[1], [2]]))
    assert [(o.context, o.asscalar()) for o in outs] == [(two[1], 1), (two[0], 2)]


def test_labels_in_one_array(two, rng):
    criterion = DataParallelCriterion(gluon.loss.L2Loss(), two)
    data, label = rng.randn(5, 2).astype("float32"), rng.randn(5, 2).astype("float32")
    wanted = [part.asnumpy() for part in criterion(split(data, two), split(label, two))]
    for outputs in (split(data, two), tuple((part,) for part in split(data, two))):
        got = [part.asnumpy() for part in criterion(outputs, mx.nd.array(label))]
        for one, other in zip(got, wanted):
            np.testing.assert_array_equal(one, other)
    one = split(data[:1], two)
    (part,) = criterion(one, mx.nd.array(label[:1]))
    np.testing.assert_array_equal(part.asnumpy(), wanted[0][:1])


class Optional(gluon.Block):
    def forward(self, x, pair, states=None):
        y, z = pair
        assert z is None and states == [1, 2, None]
        return x + y


def test_none_beside_an_array_in_an_entry(two):
    model = ModelDataParallel(Optional(), two)
    xs = [mx.nd.ones(1, ctx=c) for c in two]
    outs = model(xs, [(x, None) for x in xs], states=[1, 2, None])
    assert [o.asscalar() for o in outs] == [2, 2]


class SegmentationNet(gluon.HybridBlock):
    """A network in the form of GluonCV's: a tuple of outputs, one an auxiliary head."""

    def __init__(self, aux, **norm):
        super().__init__()
        self.aux = aux
        with self.name_scope():
            self.body = convolutional(functools.partial(SyncBatchNorm, **norm), (4, 6), "body_")
            self.head = nn.Dense(3)
            if aux:
                self.auxiliary = nn.Dense(3)

    def hybrid_forward(self, F, x):
        x = self.body(x)
        return (self.head(x), self.auxiliary(x)) if self.aux else (self.head(x),)

    def evaluate(self, x, scale=1):
        return self.forward(x)[0] * scale


class EvalModel:
    """GluonCV's SegEvalModel: no Block."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *inputs, **kwargs):
        return self.module.evaluate(*inputs, **kwargs)

    def collect_params(self):
        return self.module.collect_params()


class MixLoss(gluon.loss.SoftmaxCrossEntropyLoss):
    """The auxiliary output counts, too."""

    def hybrid_forward(self, F, *inputs):
        *outputs, label = inputs
        losses = [super(MixLoss, self).hybrid_forward(F, output, label) for output in outputs]
        return losses[0] if len(losses) == 1 else losses[0] + 0.5 * losses[1]


def train_segmentation(contexts, aux, named=False, hybridize=None, batches=(6, 5, 1, 6)):
    """GluonCV's scripts/segmentation/train.py, with parallel_backward; and what it validates."""
    mx.random.seed(4)
    rng = np.random.RandomState(0)
    model = SegmentationNet(aux, num_devices=len(contexts))
    model.initialize(mx.init.Xavier())
    if hybridize is not None:
        model.hybridize(**hybridize)
    if named:
        net = DataParallelModel(module=model, ctx_list=contexts, sync=True)
        evaluator = DataParallelModel(module=EvalModel(model), ctx_list=contexts)
        criterion = DataParallelCriterion(module=MixLoss(), ctx_list=contexts, sync=True)
    else:
        net = DataParallelModel(model, contexts, True)
        evaluator = DataParallelModel(EvalModel(model), contexts)
        criterion = DataParallelCriterion(MixLoss(), contexts, True)
    kv = mx.kv.create("local")
    optimizer = gluon.Trainer(
        net.module.collect_params(), "sgd", {"learning_rate": 0.1, "momentum": 0.9}, kvstore=kv
    )
    train_losses, predictions = [], []
    for size in batches:
        data = mx.nd.array(rng.randn(size, 3, 8, 8), dtype="float64")
        target = mx.nd.array(rng.randint(0, 3, size))
        train_loss = 0
        with autograd.record(True):
            outputs = net(data.astype("float32", copy=False))
            losses = criterion(outputs, target)
            mx.nd.waitall()
        parallel_backward(losses)
        optimizer.step(size)
        for loss in losses:
            train_loss += np.sum(loss.asnumpy())
        mx.nd.waitall()
        train_losses.append(train_loss)

        outputs = evaluator(data.astype("float32", copy=False))
        outputs = [x[0] for x in outputs]
        assert [o.context for o in outputs] == contexts[:size]
        predictions.append(np.concatenate([o.asnumpy() for o in outputs]))
        scaled = evaluator(data.astype("float32", copy=False), scale=2)
        np.testing.assert_allclose(scaled[0][0].asnumpy(), 2 * predictions[-1][: len(scaled[0][0])])
    return train_losses, predictions


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("hybridize", [None, {}])
def test_gluoncvs_training_loop(aux, hybridize, two):
    wanted = train_segmentation(two[:1], aux)
    for got in (
        train_segmentation(two, aux, False, hybridize),
        train_segmentation([*two, mx.cpu(2)], aux, True, hybridize),
    ):
        np.testing.assert_allclose(got[0], wanted[0], rtol=2e-5)
        for one, other in zip(got[1], wanted[1]):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_without_contexts_gluoncvs_wrappers_just_call():
    net = SegmentationNet(True)
    net.initialize()
    x, y = mx.nd.ones((2, 3, 8, 8)), mx.nd.zeros(2)
    outputs = DataParallelModel(net)(x)
    assert isinstance(outputs, tuple) and outputs[0].shape == (2, 3)
    assert DataParallelModel(net, None, True).module is net
    assert DataParallelModel(EvalModel(net), None)(x, scale=1).shape == (2, 3)
    assert DataParallelCriterion(gluon.loss.L2Loss())(outputs[0], outputs[1]).shape == (2,)
    loss = DataParallelCriterion(lambda a, b, c: a + b * c)(y, y + 1, c=2)
    np.testing.assert_array_equal(loss.asnumpy(), [2, 2])


def test_the_outputs_have_gluoncvs_form(two):
    x = mx.nd.arange(3).reshape((3, 1))
    for contexts, sizes in ((two, [2, 1]), (two[:1], [3])):
        for function in (lambda x: x, lambda x: [x], lambda x: (x,)):
            model = DataParallelModel(nn.Lambda(function), contexts)
            outputs = model(x)
            assert isinstance(outputs, tuple) and all(type(o) is tuple for o in outputs)
            assert [len(o[0]) for o in outputs] == sizes
        assert model.ctx_list == contexts and model.sync is False and "ctx_list" in repr(model)


def test_structures_are_split_as_gluoncv_splits_them(two):
    def forward(pair, z, scale):
        (x, none), w = pair["x"], pair["w"][0]
        assert none is None and isinstance(pair["w"], list)
        return x + w + z * scale

    class Callable:
        collect_params = staticmethod(dict)

        def __call__(self, *args, **kwargs):
            return forward(*args, **kwargs)

    x = mx.nd.arange(5).reshape((5, 1))
    for contexts in (two, two[:1]):
        model = DataParallelModel(Callable(), contexts)
        for outputs in (
            model({"x": (x, None), "w": [x]}, x, 10),
            model(pair={"x": (x, None), "w": [x]}, z=x, scale=10),
        ):
            got = np.concatenate([o[0].asnumpy() for o in outputs])
            np.testing.assert_array_equal(got, 12 * x.asnumpy())
    # Labels, too; and what lies on several devices is split already.
    criterion = DataParallelCriterion(lambda p, labels: p * labels[0] + labels[1], two)
    outputs = DataParallelModel(nn.Lambda(lambda x: x), two)(x)
    for label in ((x, x), [(part, part) for part in split(x, two)]):
        got = np.concatenate([loss.asnumpy() for loss in criterion(outputs, label)])
        np.testing.assert_array_equal(got, (x * x + x).asnumpy())
    parts = DataParallelModel(nn.Lambda(lambda x: x), two)(split(x, two))
    assert [len(part[0]) for part in parts] == [3, 2]


def bound(net):
    return EvalModel(net)


def closure(net):
    def run(x):
        return net.evaluate(x)

    run.collect_params = net.collect_params
    return run


def partial(net):
    run = functools.partial(lambda net, x: net.evaluate(x), net)
    run.collect_params = net.collect_params
    return run


def nested(net):
    return EvalModel(Evaluates({"nets": [net]}))


class Evaluates:
    def __init__(self, nets):
        self.nets = nets

    def evaluate(self, x):
        return self.nets["nets"][0].evaluate(x)

    def collect_params(self):
        return self.nets["nets"][0].collect_params()

    __call__ = evaluate


@pytest.mark.parametrize("make", [bound, closure, partial, nested])
def test_a_callable_that_is_no_block(make, two, rng):
    """Its layers are found, given their number of devices, initialized and synchronized."""
    net = SegmentationNet(False)
    net.initialize()
    function = make(net)
    model = ModelDataParallel(function, two)
    assert model.module is function
    assert model.collect_params().keys() == net.collect_params().keys()
    x = rng.randn(4, 3, 8, 8).astype("float32")
    for contexts in (two, two[:1]):
        with autograd.record():
            outs = model(split(x, contexts))
        parallel_backward(outs)
    mx.nd.waitall()
    statistics = net.body[1].running_mean
    conv = net.body[0](mx.nd.array(x)).asnumpy().mean((0, 2, 3))
    for context in two:
        np.testing.assert_allclose(
            statistics.data(context).asnumpy(), conv * (1 - 0.9**2), rtol=1e-4, atol=1e-6
        )


def test_the_names_are_there():
    assert {"DataParallelModel", "DataParallelCriterion"} <= set(gluon_syncbn.__all__)
