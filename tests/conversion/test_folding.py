"""Batch normalization folded into the layer before it."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn

from exported_networks import assert_close, operators, randomize, ready, sequence
from gluon_syncbn import SyncBatchNorm, export_for_inference
from gluon_syncbn.conversion.folding import fold as fold_graph
from gluon_syncbn.conversion.graph import Graph
from gluon_syncbn.conversion.rewriting import make_plain


class Twice(gluon.HybridBlock):
    """A convolution with a second reader, besides the normalization."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.layer, self.norm = nn.Conv2D(4, 1), SyncBatchNorm()

    def hybrid_forward(self, F, x):
        x = self.layer(x)
        return self.norm(x) + x


class SharedWeight(gluon.HybridBlock):
    """Two dense layers with one weight, of which one is normalized."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.one = nn.Dense(4, use_bias=False, in_units=4)
            self.two = nn.Dense(4, use_bias=False, params=self.one.params)
            self.norm = SyncBatchNorm()

    def hybrid_forward(self, F, x):
        return self.norm(self.one(x)) + self.two(x)


IMAGE, ROW, SERIES = (2, 4, 6, 6), (3, 4), (2, 5, 4)


@pytest.mark.parametrize(
    "make, shape, left",
    [
        (lambda: sequence(nn.Conv2D(6, 3), SyncBatchNorm(epsilon=0.5)), IMAGE, 0),
        (lambda: sequence(nn.Conv2D(6, 3, use_bias=False), SyncBatchNorm(scale=False)), IMAGE, 0),
        (lambda: sequence(nn.Conv2D(8, 3, groups=4), SyncBatchNorm()), IMAGE, 0),
        (lambda: sequence(nn.Conv1D(6, 3), SyncBatchNorm()), SERIES, 0),
        (lambda: sequence(nn.Conv2DTranspose(6, 3), SyncBatchNorm()), IMAGE, 0),
        (
            lambda: sequence(
                nn.Conv2DTranspose(6, 3, groups=2, use_bias=False, in_channels=4), SyncBatchNorm()
            ),
            IMAGE,
            0,
        ),
        (lambda: sequence(nn.Dense(6), SyncBatchNorm()), IMAGE, 0),
        (lambda: sequence(nn.Dense(6, use_bias=False), SyncBatchNorm(axis=-1)), ROW, 0),
        (lambda: sequence(nn.Dense(6, flatten=False), SyncBatchNorm(axis=-1)), SERIES, 0),
        # axis 1 is not where the dense layer's channels are
        (lambda: sequence(nn.Dense(6, flatten=False), SyncBatchNorm(axis=1)), SERIES, 1),
        (lambda: sequence(nn.Conv2D(6, 3), SyncBatchNorm(axis=2)), IMAGE, 1),
        (lambda: sequence(nn.Conv2D(6, 3), nn.Activation("relu"), SyncBatchNorm()), IMAGE, 1),
        (lambda: sequence(nn.Conv2D(6, 3), SyncBatchNorm(), SyncBatchNorm()), IMAGE, 1),
        (lambda: sequence(SyncBatchNorm(), nn.Conv2D(6, 3)), IMAGE, 1),
        (Twice, IMAGE, 1),
        (SharedWeight, ROW, 1),
    ],
)
def test_folding(make, shape, left, tmp_path, rng):
    x = mx.nd.array(rng.randn(*shape))
    net = make()
    wanted = ready(net, x, rng)
    for parameter in net.collect_params(".*bias").values():
        parameter.set_data(mx.nd.array(rng.randn(*parameter.shape)))
    wanted = net(x).asnumpy()
    files = export_for_inference(net, str(tmp_path / "net"), fold=True)
    assert operators(files[0]).count("BatchNorm") == left
    loaded = gluon.SymbolBlock.imports(files[0], ["data"], files[1])
    assert_close(loaded(x).asnumpy(), wanted)
    # Nothing is left of the folded layers, and outputs keep their names.
    assert sum("gamma" in name for name in mx.nd.load(files[1])) == left
    outputs = mx.sym.load(files[0]).list_outputs()
    assert outputs == net._cached_graph[1].list_outputs()


def test_folding_into_a_deconvolution_that_says_nothing_of_a_bias(tmp_path, rng):
    """By default, MXNet's Deconvolution has no bias and its Convolution has one; Gluon sets it."""
    data = mx.sym.var("data")
    up = mx.sym.Deconvolution(data, name="up", num_filter=4, kernel=(3, 3))
    assert up.list_arguments() == ["data", "up_weight"]
    net = gluon.SymbolBlock(mx.sym.BatchNorm(up, name="norm", fix_gamma=False), data)
    x = mx.nd.array(rng.randn(2, 3, 6, 6))
    net.initialize(mx.init.Uniform())
    net(x)
    randomize(net, rng)
    wanted = net(x).asnumpy()
    files = export_for_inference(net, str(tmp_path / "net"), fold=True)
    assert operators(files[0]) == ["Deconvolution"]
    assert_close(gluon.SymbolBlock.imports(files[0], ["data"], files[1])(x).asnumpy(), wanted)


def test_channels_last_convolutions_are_left_alone(rng):
    """Their weights have another layout, and the CPU cannot run them to check it."""
    x = mx.sym.Convolution(
        mx.sym.var("data"), name="conv", num_filter=2, kernel=(1, 1), layout="NHWC"
    )
    graph = Graph(mx.sym.BatchNorm(x, name="norm"))
    names = graph.symbol().list_arguments() + graph.symbol().list_auxiliary_states()
    make_plain(graph)
    assert fold_graph(graph, {name: mx.nd.ones(2) for name in names}) == 0


def test_folding_in_float16(tmp_path, rng):
    """Compares what is written: MXNet cannot run it on the CPU."""
    net = sequence(nn.Dense(4, in_units=3, use_bias=False), SyncBatchNorm(in_channels=4))
    net.cast("float16")
    net.initialize()
    randomize(net, rng)
    data = mx.sym.var("data", dtype="float16")
    block = gluon.SymbolBlock(net(data), data, params=net.collect_params())
    files = export_for_inference(block, str(tmp_path / "dense"), fold=True)
    weight, bias = mx.nd.load(files[1]).values()
    assert weight.dtype == bias.dtype == np.float16
    norm, dense = net[1], net[0].weight.data().asnumpy().astype("float64")
    gamma, beta, mean, var = (
        p.data().asnumpy().astype("float64")
        for p in (norm.gamma, norm.beta, norm.running_mean, norm.running_var)
    )
    k = gamma / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(weight.asnumpy(), k[:, None] * dense, rtol=1e-3)
    np.testing.assert_allclose(bias.asnumpy(), beta - k * mean, rtol=1e-3, atol=1e-3)
