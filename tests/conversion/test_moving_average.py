"""Networks converted to MABN2d and CenConv2d, and exported for plain MXNet."""

import json

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn
from mxnet.gluon.model_zoo import vision

import fresh_process
from gluon_syncbn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    CenConv2d,
    ConversionError,
    MABN2d,
    SyncBatchNorm,
    convert_mabn,
    convert_sync_batchnorm,
    export_for_inference,
    revert_batchnorm,
)
from gluon_syncbn.mxnet_private import settings
from gluon_syncbn.networks import blocks_of

STATES = {"buffer_x2", "buffer_gz", "iters"}


def plain(norm=nn.BatchNorm, **options):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Conv2D(6, 3, use_bias=False, groups=3), norm(**options), nn.Activation("relu"))
        net.add(nn.Conv2D(4, 3), norm(epsilon=1e-3, scale=False), nn.Dense(5), norm())
    return net


def direct():
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(CenConv2d(6, 3, use_bias=False), MABN2d(0, 2, 8), nn.Activation("relu"))
        net.add(CenConv2d(4, 3), MABN2d(0, 2, 8, warmup_iters=1))
    return net


def batch(seed=0):
    return mx.nd.array(np.random.RandomState(seed).randn(2, 3, 8, 8))


def train(net, steps=6):
    for step in range(steps):
        with autograd.record():
            loss = (net(batch(step)) ** 2).sum()
        loss.backward()
    mx.nd.waitall()


@pytest.mark.parametrize("norm", [nn.BatchNorm, SyncBatchNorm])
@pytest.mark.parametrize("when", ["first", "initialized", "run", "hybridized"])
def test_layers_change_their_class_and_keep_their_parameters(norm, when):
    net = plain(norm)
    if when != "first":
        net.initialize(mx.init.Xavier())
    if when == "hybridized":
        net.hybridize()
    if when in ("run", "hybridized"):
        train(net, 2)
    held = net[1]
    before = net._collect_params_with_prefix()
    values = {
        name: p.data().asnumpy() for name, p in before.items() if when in ("run", "hybridized")
    }
    assert convert_mabn(net, 2, 8, momentum=0.9, warmup_iters=3) is net
    if when == "first":
        net.initialize(mx.init.Xavier())
    assert net[1] is held
    kinds = [type(layer) for layer in net]
    assert kinds == [CenConv2d, MABN2d, nn.Activation, CenConv2d, MABN2d, nn.Dense, MABN2d]
    after = net._collect_params_with_prefix()
    assert {name.split(".")[1] for name in after.keys() - before.keys()} == STATES
    assert {name.split(".")[1] for name in before.keys() - after.keys()} == {"running_mean"}
    assert all(after[name] is before[name] for name in after.keys() & before.keys())
    for name in values.keys() & after.keys():
        np.testing.assert_array_equal(after[name].data().asnumpy(), values[name])
    assert "momentum=0.9, epsilon=0.001, warmup_iters=3" in repr(net[4])
    weight = net[4].gamma
    train(net)
    assert net[1].iters.data().asscalar() == 6
    assert net[1].buffer_x2.shape == net[1].buffer_gz.shape == (4, 6)
    assert net[1].buffer_gz.data().asnumpy().all()
    assert weight.grad_req == "null"  # scale=False


def test_it_trains_as_the_network_built_from_these_layers():
    outputs = []
    for build in (direct, lambda: convert_mabn(nn.HybridSequential(prefix="net_"), 2, 8)):
        net = build()
        if not len(net):
            with net.name_scope():
                net.add(nn.Conv2D(6, 3, use_bias=False), nn.BatchNorm(), nn.Activation("relu"))
                net.add(nn.Conv2D(4, 3), nn.BatchNorm())
            convert_mabn(net, 2, 8)
        mx.random.seed(1)
        np.random.seed(1)
        net.initialize(mx.init.Xavier())
        train(net, 4)  # within both warm-ups
        outputs.append(net(batch()).asnumpy())
    np.testing.assert_array_equal(*outputs)


def test_a_model_of_the_zoo(rng):
    net = convert_mabn(vision.resnet18_v1(classes=4), 2, 16, epsilon=1e-4)
    kinds = {type(block) for block in blocks_of(net)}
    assert {MABN2d, CenConv2d} <= kinds and not kinds & {nn.BatchNorm, nn.Conv2D}
    assert {b._settings["epsilon"] for b in blocks_of(net) if type(b) is MABN2d} == {1e-4}
    net.initialize()
    net.hybridize()
    x = mx.nd.array(rng.randn(2, 3, 32, 32))
    with autograd.record():
        y = net(x)
    y.backward()
    assert np.isfinite(y.asnumpy()).all()
    twice = dict(net.collect_params().items())
    assert convert_mabn(net, 2, 16).collect_params().keys() == twice.keys()
    with pytest.raises(ConversionError, match="simulated_batch_size=16 instead of .*=32; build"):
        convert_mabn(net, 2, 32)
    with pytest.raises(ConversionError, match="epsilon=0.0001 instead of epsilon=0.001"):
        convert_mabn(net, 2, 16, epsilon=1e-3)


@pytest.mark.parametrize("kind", [BatchNorm1d, BatchNorm2d, BatchNorm3d])
def test_layers_of_this_package_with_other_names(kind):
    net = nn.HybridSequential()
    net.add(kind(), SyncBatchNorm(momentum=None), SyncBatchNorm(group_size=1))
    net.initialize()
    x = mx.nd.random.normal(shape=(2, 3, *[4] * kind.spatial_dims))
    with autograd.record():
        net(x)
    convert_mabn(net, 2, 8)
    with autograd.record():
        y = net(x)
    y.backward()
    assert np.isfinite(y.asnumpy()).all()
    assert {type(layer) for layer in net} == {MABN2d}
    names = {name.split(".")[1] for name in net._collect_params_with_prefix()}
    assert names == {"gamma", "beta", "running_var", *STATES}


def test_what_was_fused_is_so_no_more(rng):
    """The mark for fusing goes with the layer that it was given to."""
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(in_channels=3), nn.Activation("relu"))
    net.initialize()
    net.hybridize()
    convert_sync_batchnorm(net, fuse=True)
    x = mx.nd.array(rng.randn(2, 3, 4, 4))
    net(x)
    convert_mabn(net, 2, 8)
    with autograd.record():
        y = net(x)
    assert (y.asnumpy() >= 0).all() and net[0].iters.data().asscalar() == 1
    assert not settings(net[0])


class Odd(nn.BatchNorm):
    pass


class InAList(gluon.Block):
    def __init__(self):
        super().__init__()
        self.layers = [nn.BatchNorm()]


def test_what_cannot_be_converted_changes_nothing():
    def graph():
        net = plain()
        net.initialize()
        return gluon.SymbolBlock(net(mx.sym.var("data")), mx.sym.var("data"), net.collect_params())

    for make, message in (
        (lambda: Odd(), "Odd, which is not known"),
        (lambda: nn.BatchNorm(axis=-1), "channel axis is -1"),
        (lambda: nn.BatchNorm(use_global_stats=True), "use_global_stats"),
        (lambda: SyncBatchNorm(activation="relu"), "activation='relu'; .* activation layer after"),
        (lambda: SyncBatchNorm(renorm=True), "without renorm=True"),
        (lambda: SyncBatchNorm(track_running_stats=False), "track_running_stats=False .* leave it"),
        (lambda: SyncBatchNorm(group_size=2), "group_size=2; leave it out"),
        (lambda: MABN2d(3, 2, 16), r"mabn2d\d+ .* simulated_batch_size=16 instead of .*=8; build"),
        (lambda: MABN2d(3, 2, 8, num_devices=None), "num_devices=None instead of num_devices=1"),
        (InAList, "register it"),
        (graph, "SymbolBlock with BatchNorm, Convolution"),
    ):
        net = nn.Sequential()
        net.add(nn.Conv2D(3, 3), nn.BatchNorm(), make())
        with pytest.raises(ConversionError, match=message):
            convert_mabn(net, 2, 8)
        assert [type(net[0]), type(net[1])] == [nn.Conv2D, nn.BatchNorm]
    net = nn.Sequential()
    net.add(nn.BatchNorm())
    with pytest.raises(ValueError, match="not a multiple of batch_size=3"):
        convert_mabn(net, 3, 8)
    assert type(net[0]) is nn.BatchNorm
    with pytest.raises(TypeError, match="Symbol"):
        convert_mabn(mx.sym.var("data"), 2, 8)


def test_there_is_no_way_back(tmp_path):
    net = direct()
    with pytest.raises(ConversionError, match="net_mabn2d. .*: .*export_for_inference"):
        revert_batchnorm(net)
    with pytest.raises(ConversionError, match="export_for_inference"):
        revert_batchnorm(net(mx.sym.var("data")))
    assert type(convert_sync_batchnorm(net)[1]) is MABN2d  # left as it is


LOAD = """
import sys
import mxnet as mx
import numpy as np

prefix, = sys.argv[1:]
block = mx.gluon.SymbolBlock.imports(prefix + "-symbol.json", ["data"], prefix + "-0000.params")
x = mx.nd.array(np.random.RandomState(0).randn(2, 3, 8, 8))
np.save(prefix + ".npy", block(x).asnumpy())
assert "gluon_syncbn" not in sys.modules
"""


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_export_for_plain_mxnet(fold, num_devices, tmp_path):
    net = direct()
    for layer in (net[1], net[4]):
        layer._settings["num_devices"] = num_devices
    net.initialize(mx.init.Xavier())
    net(batch())
    for layer in (net[1], net[4]):
        for parameter in (layer.gamma, layer.beta, layer.running_var):
            parameter.set_data(mx.nd.random.uniform(0.5, 4, shape=parameter.shape))
    net.hybridize()
    wanted = net(batch()).asnumpy()
    prefix = str(tmp_path / "net")
    export_for_inference(net, prefix, fold=fold)
    fresh_process.run(LOAD, prefix)
    np.testing.assert_allclose(np.load(prefix + ".npy"), wanted, atol=2e-5)
    nodes = json.loads((tmp_path / "net-symbol.json").read_text())["nodes"]
    operators = [node["op"] for node in nodes if node["op"] != "null"]
    if fold:
        assert operators == ["Convolution", "Activation", "Convolution"]
    else:
        assert operators.count("BatchNorm") == 2
    assert not any("_syncbn" in op for op in operators)
    saved = mx.nd.load(f"{prefix}-0000.params")
    assert not any("buffer" in name or "iters" in name for name in saved)


def test_a_shared_convolution_is_written_once(tmp_path):
    class Twice(gluon.HybridBlock):
        def __init__(self):
            super().__init__(prefix="twice_")
            with self.name_scope():
                self.convolution, self.norm = CenConv2d(3, 3, padding=1), MABN2d(3, 2, 8)

        def hybrid_forward(self, F, x):
            return self.norm(self.convolution(self.norm(self.convolution(x))))

    net = Twice()
    net.initialize(mx.init.Xavier())
    net.hybridize()
    wanted = net(batch()).asnumpy()
    prefix = str(tmp_path / "net")
    export_for_inference(net, prefix, fold=True)
    fresh_process.run(LOAD, prefix)
    np.testing.assert_allclose(np.load(prefix + ".npy"), wanted, atol=2e-5)
