"""Every mistake is a Python exception that says what to do, and the process goes on working."""

import mxnet as mx
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import fresh_process
from gluon_syncbn import (
    DataParallelCriterion,
    DataParallelModel,
    ModelDataParallel,
    SyncBatchNorm,
    parallel_backward,
)
from networks import convolutional, ones


def test_empty_list(model):
    with pytest.raises(ValueError, match="list of inputs is empty"):
        model([])
    with pytest.raises(ValueError, match="list of losses is empty"):
        parallel_backward([])


def test_no_list(model, two):
    with pytest.raises(TypeError, match="must be a list with one NDArray per device.*split_and"):
        model(ones(two[0]))
    with pytest.raises(TypeError, match="is missing"):
        model()
    with pytest.raises(TypeError, match="every entry of the first argument"):
        model([1, 2])
    with pytest.raises(TypeError, match="outputs must be a list with one entry per device"):
        DataParallelCriterion(gluon.loss.L2Loss(), two)(ones(two[0]), ones(two[0]))
    with pytest.raises(TypeError, match="losses must be a list"):
        parallel_backward(ones(two[0]))


def test_a_network_that_is_none(two):
    with pytest.raises(TypeError, match="must be a gluon Block, or a callable.*, but is list"):
        ModelDataParallel(two, two)
    with pytest.raises(TypeError, match="must be a gluon Block, or a callable.*, but is function"):
        DataParallelModel(lambda x: x, two)
    with pytest.raises(TypeError, match="in a ModelDataParallel already; take its module"):
        ModelDataParallel(ModelDataParallel(nn.Dense(1), two), two)
    with pytest.raises(TypeError, match="loss must be callable, but is NoneType"):
        DataParallelCriterion(ctx_list=two)
    with pytest.raises(TypeError, match="two names of one argument"):
        DataParallelCriterion(gluon.loss.L2Loss(), two, module=gluon.loss.L2Loss())


def test_num_devices_that_contradicts_ctx_list(two):
    net = nn.HybridSequential()
    net.add(nn.Dense(2), SyncBatchNorm(num_devices=3, prefix="third_"))
    with pytest.raises(ValueError, match="third has num_devices=3, but ctx_list has 2 devices"):
        ModelDataParallel(net, two)
    ModelDataParallel(net, [*two, mx.cpu(2)])


def test_channel_counts_that_differ_between_devices(model, two):
    model([ones(c, (2, 3)) for c in two])  # infers the number of channels
    with pytest.raises((mx.MXNetError, ValueError), match=r"\(?3,?\)?.*4|4.*3"):
        with autograd.record():
            model([ones(two[0], (2, 3)), ones(two[1], (2, 4))])


def test_channel_counts_that_differ_in_the_operators(two):
    means = [mx.nd.zeros(3 + i, ctx=c) for i, c in enumerate(two)]
    with autograd.train_mode():  # in inference nothing is exchanged
        statistics = [
            mx.nd._internal._syncbn_moments(ones(c, (2, 3 + i)))[1] for i, c in enumerate(two)
        ]
        totals = [
            mx.nd._internal._syncbn_sum(s, m, key="channels", num_devices=2)
            for s, m in zip(statistics, means)
        ]
    for total in totals:
        with pytest.raises(mx.MXNetError, match="same number of channels"):
            total.asnumpy()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hybridize", [False, True])
def test_integer_data(training, hybridize):
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    if hybridize:
        layer.hybridize()
    with autograd.record(train_mode=training):
        with pytest.raises(mx.MXNetError, match=r"x.astype\('float32'\)"):
            layer(mx.nd.ones((2, 3), dtype="int32"))
    layer(mx.nd.ones((2, 3))).wait_to_read()


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_integer_data_in_parallel(hybridize, warm, model, two):
    if hybridize:
        model.hybridize()
    if warm:
        model([ones(c) for c in two])
    with pytest.raises(mx.MXNetError, match=r"x.astype\('float32'\)"):
        with autograd.record():
            model([ones(c, dtype="int32") for c in two])


@pytest.mark.parametrize("axis", [2, -3])
def test_axis_out_of_range(axis):
    layer = SyncBatchNorm(axis=axis, in_channels=3)
    layer.initialize()
    for training in (True, False):
        with autograd.record(train_mode=training):
            with pytest.raises(mx.MXNetError, match=f"axis={axis} is out of range.*from -2 to 1"):
                layer(mx.nd.ones((2, 3)))


def test_one_dimension():
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    with pytest.raises(mx.MXNetError, match="2 or more dimensions.*expand_dims"):
        layer(mx.nd.ones(3))


def test_channels_that_the_layer_does_not_have():
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    with pytest.raises(mx.MXNetError, match="number of channels"):
        layer(mx.nd.ones((2, 4)))


def test_wrong_dtype_of_parameters():
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    with pytest.raises(mx.MXNetError, match=r"cast\(\) on the block"):
        layer(mx.nd.ones((2, 3), dtype="float64"))


def test_uninitialized_network(two):
    model = ModelDataParallel(convolutional(), two)
    with pytest.raises(RuntimeError, match="initialize"):
        model([ones(c, (1, 3, 8, 8)) for c in two])


def test_naive_engine():
    script = """
import mxnet as mx, gluon_syncbn
from mxnet import autograd
layer = gluon_syncbn.SyncBatchNorm(in_channels=3)
layer.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
try:
    gluon_syncbn.ModelDataParallel(layer, [mx.cpu(0), mx.cpu(1)])
except RuntimeError as error:
    print(error)
try:
    mx.nd.contrib.KeyBarrierSum(mx.nd.ones(2), key="k", num_devices=2)
except mx.MXNetError as error:
    print(error)
model = gluon_syncbn.ModelDataParallel(layer, [mx.cpu(0)])
x = mx.nd.array([[1, 2, 3], [3, 4, 5]])
x.attach_grad()
with autograd.record():
    y, = model([x])
y.backward()
print(y.asnumpy().round(2).tolist())
"""
    done = fresh_process.run(script, MXNET_ENGINE_TYPE="NaiveEngine")
    assert done.stdout.count("unset MXNET_ENGINE_TYPE") == 2
    assert "[[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]" in done.stdout
