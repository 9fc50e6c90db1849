"""The names with a number of dimensions: what they accept, and that conversion knows them."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import nn

from gluon_syncbn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    ModelDataParallel,
    SyncBatchNorm,
    convert_sync_batchnorm,
    export_for_inference,
    revert_batchnorm,
)
from networks import split

KINDS = {BatchNorm1d: (2, 3), BatchNorm2d: (4,), BatchNorm3d: (5,)}


def shape_of(ndim):
    return (2, 3, 2, 2, 2, 2)[:ndim]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hybridize", [False, True])
def test_other_ranks_are_refused_by_the_name_of_the_right_class(kind, hybridize):
    layer = kind()
    layer.initialize()
    if hybridize:
        layer.hybridize()
    for ndim in KINDS[kind]:
        assert layer(mx.nd.ones(shape_of(ndim))).shape == shape_of(ndim)
    fitting = {ndim: name.__name__ for name, ndims in KINDS.items() for ndim in ndims}
    for ndim in {2, 3, 4, 5, 6} - set(KINDS[kind]):
        advice = f"use {fitting[ndim]}, or SyncBatchNorm" if ndim < 6 else "use SyncBatchNorm"
        with pytest.raises(ValueError, match=f"{layer.name} is a {kind.__name__}.*{advice}"):
            layer(mx.nd.ones(shape_of(ndim)))


@pytest.mark.parametrize("num_devices", [1, None])  # one operator, or three
def test_in_a_graph_the_operators_check(num_devices):
    net = nn.HybridSequential()
    net.add(BatchNorm2d(num_devices=num_devices, in_channels=3), nn.Activation("relu"))
    net.initialize()
    net.hybridize()
    net(mx.nd.ones(shape_of(4)))
    with pytest.raises(mx.MXNetError, match="BatchNorm2d takes.* 4 dim.*got 3; use BatchNorm1d"):
        net(mx.nd.ones(shape_of(3)))
    with pytest.raises(mx.MXNetError, match="got 6; use SyncBatchNorm"):
        net[0](mx.sym.var("x")).infer_shape(x=shape_of(6))


@pytest.mark.parametrize("hybridize", [False, True])
def test_synchronized_and_converted(hybridize, two, rng, tmp_path):
    net = nn.HybridSequential()
    net.add(BatchNorm2d())
    assert type(convert_sync_batchnorm(net)[0]) is BatchNorm2d
    net.initialize(ctx=two)
    if hybridize:
        net.hybridize()
    x = rng.randn(5, 3, 2, 2).astype("float32")
    with autograd.record():
        outs = ModelDataParallel(net, two)(split(x, two))
    wanted = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(np.concatenate([o.asnumpy() for o in outs]), wanted, atol=1e-4)
    if hybridize:
        export_for_inference(net, str(tmp_path / "net"))
        assert '"BatchNorm"' in (tmp_path / "net-symbol.json").read_text()
    assert type(revert_batchnorm(net)[0]) is nn.BatchNorm
    assert type(convert_sync_batchnorm(net)[0]) is SyncBatchNorm
    revert_batchnorm(net)
    assert net(mx.nd.array(x, ctx=two[0])).shape == x.shape
