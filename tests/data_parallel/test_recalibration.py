"""recalibrate: moving statistics over a data set, for every kind of layer and of network."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn
from mxnet.gluon.contrib.nn import SyncBatchNorm as MxnetSyncBatchNorm

import fresh_process
from gluon_syncbn import (
    ConversionError,
    DataParallelModel,
    MABN2d,
    ModelDataParallel,
    SyncBatchNorm,
    convert_sync_batchnorm,
    recalibrate,
)
from networks import MODES, STATIC, split

SIZES = (6, 4, 1, 5)


def data(rng, sizes=SIZES, shape=(3, 4)):
    """Batches that differ from each other in their means, and far from zero."""
    return [
        (rng.randn(n, *shape) * (i + 1) + 10 * i + 3).astype("float32") for i, n in enumerate(sizes)
    ]


def moments(batches, axes=(0, 2)):
    x = np.concatenate(batches).astype("float64")
    return x.mean(axes), x.var(axes)


def assert_statistics(layer, wanted, contexts):
    for context in contexts:
        for parameter, value in zip((layer.running_mean, layer.running_var), wanted):
            np.testing.assert_allclose(parameter.data(context).asnumpy(), value, rtol=2e-5)


def values(net):
    return {name: [a.asnumpy() for a in p.list_data()] for name, p in net.collect_params().items()}


def sequence(*layers, prefix=None):
    net = nn.HybridSequential(prefix=prefix)
    net.add(*layers)
    return net


LAYERS = {
    "plain": nn.BatchNorm,
    "mxnets": lambda: MxnetSyncBatchNorm(num_devices=1),
    "synchronized": SyncBatchNorm,
    "local": lambda: SyncBatchNorm(num_devices=1),
    "groups of one": lambda: SyncBatchNorm(group_size=1),
    "average": lambda: SyncBatchNorm(momentum=None),
    "slow": lambda: SyncBatchNorm(momentum=0.999),
    "memoryless": lambda: SyncBatchNorm(momentum=0.0),
}


@pytest.mark.parametrize("hybridize", MODES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("devices", [0, 1, 2])  # 0: a Block
def test_statistics_are_those_of_all_samples(kind, hybridize, devices, rng):
    if devices and kind == "local":
        pytest.skip("num_devices=1 contradicts ModelDataParallel on two")
    contexts = [mx.cpu(i) for i in range(max(devices, 1))]
    net = sequence(LAYERS[kind](), nn.Dense(2))
    made = type(net[0]), dict(net[0]._kwargs)
    net.initialize(ctx=contexts)
    if hybridize is not None:
        net.hybridize(**hybridize)
    model = ModelDataParallel(net, contexts) if devices else net
    batches = data(rng)
    load = (lambda x: split(x, contexts)) if devices else mx.nd.array
    for _ in range(2):  # deferred, then not
        assert recalibrate(model, map(load, batches)) == len(SIZES)
        assert_statistics(net[0], moments(batches), contexts)
        batches = data(rng)[::-1]
    if kind == "average":
        assert net[0].num_batches_tracked.data().asscalar() == len(SIZES)
    before = net[0].running_mean.data(contexts[0]).asnumpy()
    model(load(batches[0]))  # in inference nothing moves
    with autograd.record():
        model(load(batches[0]))
    mx.nd.waitall()
    moved = (net[0].running_mean.data(contexts[0]).asnumpy() != before).any()
    assert moved == (kind not in ("plain", "mxnets"))  # which move in backward
    assert (type(net[0]), net[0]._kwargs) == made


def test_groups_and_devices_without_input(rng):
    four = [mx.cpu(i) for i in range(4)]
    net = sequence(SyncBatchNorm(group_size=2), SyncBatchNorm(), nn.BatchNorm())
    net.initialize(ctx=four)
    batches = data(rng, (9, 8, 3, 1))
    assert recalibrate(ModelDataParallel(net, four), [split(x, four) for x in batches]) == 4
    assert_statistics(net[0], moments(batches), four)


def test_whole_batches_and_several_inputs(two, rng):
    class Sum(gluon.HybridBlock):
        def __init__(self):
            super().__init__()
            self.norm = SyncBatchNorm()

        def hybrid_forward(self, F, x, y):
            return self.norm(x + y)

    batches = data(rng)
    wanted = moments([2 * x for x in batches])
    for contexts in (two, None):
        net = Sum()
        net.initialize(ctx=contexts)
        pairs = [(mx.nd.array(x), mx.nd.array(x)) for x in batches]
        recalibrate(DataParallelModel(net, contexts), pairs)
        assert_statistics(net.norm, wanted, contexts or [mx.cpu()])
    net.initialize(force_reinit=True, ctx=two)
    pairs = [(split(x, two), split(x, two)) for x in batches]
    recalibrate(ModelDataParallel(net, two), pairs)
    assert_statistics(net.norm, wanted, two)


@pytest.mark.parametrize("hybridize", [None, {}, STATIC])
def test_the_rest_stays_as_it_is(hybridize, rng, tmp_path):
    """Parameters, gradients, modes, the exported graph; and Dropout drops nothing meanwhile."""
    net = sequence(nn.Dropout(0.5), nn.BatchNorm(), nn.Dense(2), nn.Dropout(0.9), SyncBatchNorm())
    net.initialize()
    if hybridize is not None:
        net.hybridize(**hybridize)
    batches = data(rng)
    x = mx.nd.array(batches[0])
    with autograd.record():
        net(x).sum().backward()
    before = values(net)
    gradient = net[2].weight.grad().asnumpy()
    with autograd.record():
        recalibrate(net, map(mx.nd.array, batches))
        assert autograd.is_recording() and autograd.is_training()
    assert_statistics(net[1], moments(batches), [mx.cpu()])
    for name, (value,) in values(net).items():
        if "running" not in name:
            np.testing.assert_array_equal(value, before[name][0])
    np.testing.assert_array_equal(net[2].weight.grad().asnumpy(), gradient)
    if hybridize is not None:
        net.export(str(tmp_path / "net"))
        text = (tmp_path / "net-symbol.json").read_text()
        assert '"Dropout"' in text and '"BatchNorm"' in text and '"p": "0.9"' in text
    with autograd.record():
        y = net(x)
    y.backward()
    mx.nd.waitall()
    assert np.abs(net[1].running_mean.data().asnumpy() - moments(batches)[0]).max() > 1e-3


@pytest.mark.parametrize("hybridize", [None, {}])
def test_dropout_is_back_afterwards(hybridize, rng):
    net = sequence(SyncBatchNorm(in_channels=3), nn.Dropout(0.5))
    net.initialize()
    if hybridize is not None:
        net.hybridize(**hybridize)
    x = mx.nd.array(data(rng)[0])
    for _ in range(2):
        with autograd.record():
            assert (net(x).asnumpy() == 0).mean() > 0.1
        recalibrate(net, [x])


def test_a_network_without_dropout_is_not_traced_anew(rng):
    net = sequence(SyncBatchNorm(), nn.Dense(2))
    net.initialize()
    net.hybridize(static_alloc=True, static_shape=True)
    x = mx.nd.array(data(rng)[0])
    net(x)
    traced = net._cached_op
    recalibrate(net, [x])
    net(x)
    assert net._cached_op is traced


@pytest.mark.parametrize("momentum", [0.9, 0.5, 0.99, None])
@pytest.mark.parametrize("hybridize", [None, {}])
def test_a_layer_that_is_used_twice(momentum, hybridize, rng):
    """Its statistics lie between those of the uses."""

    class Twice(gluon.HybridBlock):
        def __init__(self):
            super().__init__()
            self.norm = SyncBatchNorm(momentum=momentum)

        def hybrid_forward(self, F, x):
            return self.norm(x) + self.norm(3 * x)

    net = Twice()
    net.initialize()
    if hybridize is not None:
        net.hybridize()
    x = data(rng)[0]
    recalibrate(net, [mx.nd.array(x)] * 2)
    m = 1 if momentum is None else momentum
    mean, var = moments([x])
    got = net.norm.running_mean.data().asnumpy()
    if hybridize is None:
        np.testing.assert_allclose(got, mean * (m + 3) / (m + 1), rtol=1e-4)
    else:  # a graph runs them in any order
        assert any(np.allclose(got, mean * w / (m + 1), rtol=1e-4) for w in (m + 3, 1 + 3 * m))


def test_layers_that_have_nothing_to_estimate_are_left_alone(rng):
    untracked, fixed = SyncBatchNorm(track_running_stats=False), nn.BatchNorm(use_global_stats=True)
    idle = SyncBatchNorm(in_channels=3)  # in no forward pass

    class Net(nn.HybridSequential):
        def forward(self, x):
            return self[2](self[1](self[0](x)))

    net = Net()
    net.add(untracked, fixed, SyncBatchNorm(), idle, SyncBatchNorm())
    net.initialize()
    batches = list(map(mx.nd.array, data(rng)))
    assert recalibrate(net, batches) == 4
    for layer in (untracked, fixed, idle):
        assert layer.running_mean.data().asnumpy().tolist() == [0, 0, 0]
        assert layer.running_var.data().asnumpy().tolist() == [1, 1, 1]
    untouched = iter(batches)
    assert recalibrate(sequence(nn.Dense(1), untracked), untouched) == 0
    assert next(untouched) is batches[0]


@pytest.mark.parametrize("hybridize", [None, STATIC])
def test_averages_that_are_no_such_estimates_stay(hybridize, two, rng):
    net = sequence(MABN2d(3, 1, 2), SyncBatchNorm(renorm=True))
    net.initialize(ctx=two)
    if hybridize is not None:
        net.hybridize(**hybridize)
    model = ModelDataParallel(net, two)
    batches = [split(x, two) for x in data(rng, shape=(3, 4, 4))]
    with autograd.record():
        model(batches[0])
    mx.nd.waitall()
    before = values(net)
    assert recalibrate(model, batches) == len(batches)
    for name, arrays in values(net).items():
        same = all((a == b).all() for a, b in zip(arrays, before[name]))
        assert same == (name not in (net[1].running_mean.name, net[1].running_var.name)), name


@pytest.mark.parametrize("convert", [False, True])
def test_a_loaded_graph(convert, two, rng, tmp_path):
    source = sequence(nn.Dropout(0.5), nn.BatchNorm(momentum=0.7), nn.Dense(2), nn.BatchNorm())
    source.initialize()
    source.hybridize()
    source(mx.nd.ones((2, 3, 4)))
    source.export(str(tmp_path / "net"))
    files = [str(tmp_path / name) for name in ("net-symbol.json", "net-0000.params")]
    net = gluon.SymbolBlock.imports(files[0], ["data"], files[1], ctx=two)
    if convert:
        convert_sync_batchnorm(net)
    batches = data(rng)
    graph = net(mx.sym.var("data")).tojson()
    recalibrate(ModelDataParallel(net, two), [split(x, two) for x in batches])
    assert net(mx.sym.var("data")).tojson() == graph or convert  # whose keys were made unique
    assert "Dropout" in net(mx.sym.var("data")).tojson()
    name = source[1].running_mean.name
    for context in two:
        got = net.params[name].data(context).asnumpy()
        np.testing.assert_allclose(got, moments(batches)[0], rtol=1e-5)


@pytest.mark.parametrize("hybridize", [None, STATIC])
def test_after_an_exception_the_old_statistics_are_back(hybridize, two, rng):
    class Fails(nn.HybridSequential):
        fails = False

        def forward(self, x):
            if self.fails and x.context == two[1]:
                raise KeyError("told to")
            return super().forward(x)

    net = Fails()
    net.add(SyncBatchNorm(), nn.Dense(2), nn.BatchNorm(momentum=0.8))
    net.initialize(ctx=two)
    if hybridize is not None:
        net.hybridize(**hybridize)
    model = ModelDataParallel(net, two)
    batches = [split(x, two) for x in data(rng)]
    with autograd.record():
        model(batches[0])
    mx.nd.waitall()
    before = values(net)

    def broken():
        yield from batches[:2]
        raise OSError("no disk")

    def wrong():
        yield batches[0]
        yield [mx.nd.ones((2, 7, 4), ctx=c) for c in two]  # 7 channels

    def failing():
        yield batches[0]
        net.fails = True
        yield batches[1]

    def infinite():
        yield [x * np.inf for x in batches[0]]

    for given, error in (
        (broken(), OSError),
        (wrong(), Exception),
        (infinite(), ValueError),
        (failing(), KeyError),
    ):
        if given.__name__ == "failing" and hybridize is not None:
            continue  # `forward` is in no graph
        with pytest.raises(error):
            recalibrate(model, given)
        for name, arrays in values(net).items():
            for got, wanted in zip(arrays, before[name]):
                np.testing.assert_array_equal(got, wanted, err_msg=name)
    net.fails = False
    assert type(net[2]) is nn.BatchNorm
    assert recalibrate(model, batches) == 4
    assert_statistics(net[0], moments(data(np.random.RandomState(0))), two)


def test_errors(two):
    net = sequence(SyncBatchNorm(in_channels=3, prefix="norm_"))
    net.initialize(ctx=two)
    batch = mx.nd.ones((2, 3))
    with pytest.raises(TypeError, match="must be a Block, a ModelDataParallel.*but is a list"):
        recalibrate([net], [batch])
    with pytest.raises(ValueError, match="there are no batches"):
        recalibrate(net, [])
    with mx.util.np_shape(True):
        with pytest.raises(ValueError, match="the batches have no samples"):
            recalibrate(net, [mx.nd.zeros((0, 3))])
    assert net[0].running_var.data(two[0]).asnumpy().tolist() == [1, 1, 1]
    still = SyncBatchNorm(momentum=1, prefix="still_")
    with pytest.raises(ValueError, match="still has a momentum of 1"):
        recalibrate(still, [batch])
    with pytest.raises(ValueError, match="both is synchronized over several devices"):
        recalibrate(SyncBatchNorm(num_devices=2, prefix="both_"), [batch])
    with pytest.raises(ValueError, match="pair is synchronized over several devices"):
        recalibrate(SyncBatchNorm(group_size=2, prefix="pair_"), [batch])
    with pytest.raises(ConversionError, match="BatchNormReLU.*put nn.BatchNorm"):
        recalibrate(sequence(nn.BatchNormReLU()), [batch])
    with pytest.raises(RuntimeError, match="has not been initialized"):
        recalibrate(SyncBatchNorm(), [batch])


def test_accuracy_of_small_batches(rng):
    """What it is for: one sample a batch, and still the variance of the whole."""
    net = SyncBatchNorm(in_channels=2)
    net.initialize()
    x = (rng.randn(50, 2) * 3 + 100).astype("float32")
    recalibrate(net, [mx.nd.array(row[None]) for row in x])
    assert_statistics(net, (x.mean(0), x.astype("float64").var(0)), [mx.cpu()])


def test_mx_np_in_a_fresh_process():
    fresh_process.run("""
import mxnet as mx, numpy as np
from gluon_syncbn import ModelDataParallel, SyncBatchNorm, recalibrate
mx.npx.set_np()
two = [mx.cpu(0), mx.cpu(1)]
net = mx.gluon.nn.HybridSequential()
net.add(mx.gluon.nn.Dropout(0.5), SyncBatchNorm())
net.initialize(ctx=two)
net.hybridize()
x = np.arange(24, dtype="float32").reshape(8, 3)
batches = [[mx.np.array(x[4 * i + 2 * d:][:2], ctx=c) for d, c in enumerate(two)] for i in (0, 1)]
assert recalibrate(ModelDataParallel(net, two), batches) == 2
for c in two:
    np.testing.assert_allclose(net[1].running_mean.data(c).asnumpy(), x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(net[1].running_var.data(c).asnumpy(), x.var(0), rtol=1e-5)
""")
