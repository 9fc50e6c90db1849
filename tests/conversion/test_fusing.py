"""Normalization, residual sum and activation as one operator: found, computed alike, and undone."""

import json
from collections import Counter

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn
from mxnet.gluon.model_zoo import vision

import fresh_process
from gluon_syncbn import (
    ConversionError,
    SyncBatchNorm,
    convert_symbol,
    convert_sync_batchnorm,
    export_for_inference,
    revert_batchnorm,
)
from networks import STATIC, assert_same_training, data_for, train


def operators(sym):
    """Count the operators of a symbol; normalizations with what is fused into them."""
    found = Counter()
    for node in json.loads(sym.tojson())["nodes"]:
        attrs = node.get("attrs", {})
        fused = [attrs[name] for name in ("activation",) if name in attrs]
        fused += ["add"] if attrs.get("add") == "True" else []
        found[" ".join([node["op"], *fused])] += node["op"] != "null"
    return +found


def residual_network():
    """A ResNet in small: two blocks, one with a normalized shortcut."""
    return vision.ResNetV1(vision.BasicBlockV1, [1, 1], [8, 8, 16], classes=4, thumbnail=True)


def graph_of(net):
    return net._cached_graph[1]


@pytest.mark.parametrize("num_devices", [1, None])
def test_a_resnet(num_devices):
    batches = data_for(3, 8, shape=(3, 12, 12))
    devices = 1 if num_devices == 1 else 2
    nets = {}

    def make(fuse):
        def build():
            nets[fuse] = convert_sync_batchnorm(residual_network(), num_devices, fuse=fuse)
            return nets[fuse]

        return build

    for static in ({}, STATIC):
        plain = train(make(False), devices, batches, hybridize=static)
        fused = train(make(True), devices, batches, hybridize=static)
        assert_same_training(fused, plain, tolerance=0)
        found = operators(graph_of(nets[True]))
        norm = "_syncbn_batch_norm" if num_devices == 1 else "_syncbn_normalize"
        assert found[f"{norm} relu"] == 2 and found[f"{norm} relu add"] == 2
        assert found[norm] == 1, found  # the shortcut's
        assert not {"Activation", "elemwise_add"} & set(found)


def fused_symbol(build, **options):
    """A network with one normalization, made by build(F, normalized, x), converted."""
    x = mx.sym.var("data")
    bn = mx.sym.BatchNorm(x, name="bn")
    return convert_symbol(build(mx.sym, bn, x), 1, fuse=True, **options)


@pytest.mark.parametrize(
    "build, fused",
    [
        (lambda F, y, x: F.Activation(y, act_type="relu"), "relu"),
        (lambda F, y, x: F.relu(y), "relu"),
        (lambda F, y, x: F.LeakyReLU(y, act_type="leaky", slope=0.1), "leaky_relu"),
        (lambda F, y, x: F.LeakyReLU(y), "leaky_relu"),
        (lambda F, y, x: F.relu(x + y), "relu add"),
        (lambda F, y, x: F.relu(y + x), "relu add"),
        (lambda F, y, x: F.relu(F.elemwise_add(y, x)), "relu add"),
    ],
)
def test_what_is_fused_and_back(rng, build, fused):
    sym = fused_symbol(build)
    assert operators(sym) == {f"_syncbn_batch_norm {fused}": 1}
    data = mx.sym.var("data")
    before = build(mx.sym, mx.sym.BatchNorm(data, name="bn"), data)
    back = revert_batchnorm(sym)
    assert back.list_arguments() == before.list_arguments()
    x = mx.nd.array(rng.randn(4, 3, 2))
    values = {name: mx.nd.array(rng.rand(3)) for name in ("bn_gamma", "bn_beta")}
    states = {name: mx.nd.array(rng.rand(3)) for name in ("bn_moving_mean", "bn_moving_var")}
    results = []
    for one in (before, sym, back):
        gradients = {name: mx.nd.zeros(shape=a.shape) for name, a in {**values, "data": x}.items()}
        moved = {name: a.copy() for name, a in states.items()}
        executor = one.bind(mx.cpu(), {"data": x, **values}, gradients, "write", moved)
        executor.forward(is_train=True)
        found = [executor.outputs[0].asnumpy()]
        executor.backward(mx.nd.array(np.arange(24).reshape(4, 3, 2)))
        found += [gradient.asnumpy() for gradient in gradients.values()]
        mx.nd.waitall()  # MXNet's BatchNorm moves its statistics in backward, and does not say so
        executor.forward(is_train=False)
        results.append([*found, executor.outputs[0].asnumpy()])
    for others in results[1:]:
        for a, b in zip(results[0], others):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "build",
    [
        lambda F, y, x: F.Activation(y, act_type="tanh"),
        lambda F, y, x: F.LeakyReLU(y, act_type="elu"),
        lambda F, y, x: F.LeakyReLU(y, slope=-0.5),
        lambda F, y, x: y + x,
        lambda F, y, x: F.relu(y - x),
        lambda F, y, x: F.relu(F.broadcast_add(y, x)),
        lambda F, y, x: F.relu(y + 1),
        lambda F, y, x: F.Group([F.relu(y), y]),  # the result is read as well
        lambda F, y, x: F.relu(y) * y,
        lambda F, y, x: F.relu(y + y),
        lambda F, y, x: (lambda s: F.relu(s) + s)(y + x),  # so is the sum
        lambda F, y, x: F.relu(F.identity(y) + y),  # the residual depends on the result
    ],
)
def test_what_is_not_fused(build):
    found = operators(fused_symbol(build))
    assert found["_syncbn_batch_norm"] == 1, found


def test_a_sum_of_two_normalizations_is_fused_into_one():
    x = mx.sym.var("data")
    both = mx.sym.BatchNorm(x, name="a") + mx.sym.BatchNorm(x * 2, name="b")
    sym = convert_symbol(mx.sym.relu(both, name="last"), 2, fuse=True)
    found = operators(sym)
    assert found["_syncbn_normalize relu add"] == 1 and found["_syncbn_normalize"] == 1
    assert sym.list_outputs() == ["last_output"]
    again = revert_batchnorm(sym)
    names = [n["name"] for n in json.loads(again.tojson())["nodes"] if n["op"] != "null"]
    assert {"a", "b", "last"} <= set(names)


def test_back_to_a_plain_network(rng):
    x = mx.nd.array(rng.randn(4, 3, 12, 12))
    net = residual_network()
    net.initialize()
    net.hybridize()
    wanted = net(x).asnumpy()
    convert_sync_batchnorm(net, 1, fuse=True)
    np.testing.assert_array_equal(net(x).asnumpy(), wanted)
    assert "fuse=True" in repr(net.features[2][0].body[1])
    revert_batchnorm(net)
    np.testing.assert_array_equal(net(x).asnumpy(), wanted)
    assert "syncbn" not in graph_of(net).tojson() and "fuse" not in repr(net)


def test_layers_that_are_synchronized_already_take_part(rng):
    net = nn.HybridSequential()
    net.add(SyncBatchNorm(num_devices=1), nn.Activation("relu"))
    net.initialize()
    net.hybridize()
    x = mx.nd.array(rng.randn(4, 3))
    net(x)
    assert operators(graph_of(net))["Activation"] == 1
    convert_sync_batchnorm(net, fuse=True)  # the graph is traced anew
    net(x)
    assert operators(graph_of(net)) == {"_syncbn_batch_norm relu": 1}
    assert net[0].num_devices == 1


def test_only_layers_that_were_converted_so():
    net = nn.HybridSequential()
    for _ in range(2):
        net.add(SyncBatchNorm(num_devices=1), nn.Activation("relu"))
    convert_sync_batchnorm(net[0], fuse=True)
    net.initialize()
    net.hybridize()
    net(mx.nd.ones((2, 3)))
    assert operators(graph_of(net)) == {
        "_syncbn_batch_norm relu": 1,
        "_syncbn_batch_norm": 1,
        "Activation": 1,
    }


ELSEWHERE = """
import sys
import mxnet as mx
if sys.argv[4] == "ours":
    import gluon_syncbn
else:
    sys.modules["gluon_syncbn"] = None
prefix = sys.argv[1]
net = mx.gluon.SymbolBlock.imports(prefix + "-symbol.json", ["data"], prefix + "-0000.params")
mx.nd.save(sys.argv[3], [net(mx.nd.load(sys.argv[2])[0])])
"""


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_exports(rng, tmp_path, activation):
    """By ``net.export`` for us, and by ``export_for_inference`` for plain MXNet."""
    if activation is None:
        net = convert_sync_batchnorm(residual_network(), 1, fuse=True)
    else:

        class Net(gluon.HybridBlock):
            def __init__(self):
                super().__init__()
                with self.name_scope():
                    self.conv = nn.Conv2D(3, 3, padding=1)
                    self.norm = SyncBatchNorm(activation=activation, slope=0.3)

            def hybrid_forward(self, F, x):
                return self.norm(self.conv(x), add=x)

        net = Net()
    net.initialize(mx.init.Normal(0.5))
    net.hybridize()
    x = mx.nd.array(rng.randn(4, 3, 12, 12))
    for _ in range(2):
        with mx.autograd.train_mode():
            net(x)
    wanted = net(x).asnumpy()
    prefix, source, target = (str(tmp_path / name) for name in ("net", "x", "y"))
    mx.nd.save(source, [x])
    net.export(prefix)
    fresh_process.run(ELSEWHERE, prefix, source, target, "ours")
    np.testing.assert_allclose(mx.nd.load(target)[0].asnumpy(), wanted, rtol=1e-5, atol=1e-6)
    for fold in (False, True):
        export_for_inference(net, prefix, fold=fold)
        fresh_process.run(ELSEWHERE, prefix, source, target, "MXNet")
        np.testing.assert_allclose(mx.nd.load(target)[0].asnumpy(), wanted, rtol=1e-4, atol=1e-5)
        assert ("BatchNorm" in operators(mx.sym.load(f"{prefix}-symbol.json"))) != fold


def test_a_loaded_graph(rng, tmp_path):
    net = residual_network()
    net.initialize()
    net.hybridize()
    x = mx.nd.array(rng.randn(4, 3, 12, 12))
    wanted = net(x).asnumpy()
    prefix = str(tmp_path / "net")
    net.export(prefix)
    files = f"{prefix}-symbol.json", f"{prefix}-0000.params"
    loaded = gluon.SymbolBlock.imports(files[0], ["data"], files[1])
    convert_sync_batchnorm(loaded, 1, fuse=True)
    np.testing.assert_array_equal(loaded(x).asnumpy(), wanted)
    assert operators(graph_of(loaded))["_syncbn_batch_norm relu add"] == 2


def test_an_activation_cannot_be_given_to_a_layer_of_mxnets():
    with pytest.raises(ConversionError, match="has no activation"):
        revert_batchnorm(SyncBatchNorm(activation="relu"))
