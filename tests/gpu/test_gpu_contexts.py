"""SyncBatchNorm and ModelDataParallel on several GPUs, in every mode, against NumPy in float64."""

import ctypes
import pathlib

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import nn

import fresh_process
from deadline import deadline  # noqa: F401
from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from mxnet_gpus import (
    EMULATED,
    TOLERANCE,
    differentiable,
    load,
    need_gpus,
    replace_what_gluon_computes,
)
from networks import STATIC
from reference import batch_norm, batch_norm_layers, largest_error

HERE = pathlib.Path(__file__).parent
pytestmark = need_gpus(2)
GPUS = [mx.gpu(0), mx.gpu(1)]
MODES = {
    "imperative": None,
    "hybridized": {},
    "static_alloc": {"static_alloc": True},
    "static_shape": STATIC,
}


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    replace_what_gluon_computes(monkeypatch.setattr)


def shares(rng, sizes, rest, dtype="float32"):
    return [rng.randn(n, *rest).astype(dtype) for n in sizes]


def inputs(values, contexts):
    """Arrays on the devices, with gradients attached."""
    arrays = [load(v, c) for v, c in zip(values, contexts)]
    differentiable(*arrays)
    return arrays


def network(contexts, mode, layers=1, dtype="float32", **options):
    net = nn.HybridSequential()
    for _ in range(layers):
        net.add(SyncBatchNorm(**options))
    net.cast(dtype)
    net.initialize(ctx=contexts)
    if MODES[mode] is not None:
        net.hybridize(**MODES[mode])
    return net


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("axis, rest", [(1, (3, 5, 7)), (-1, (4, 4, 8))])
def test_training_as_one_batch(mode, dtype, axis, rest):
    """Uneven shards, several steps: outputs, all gradients, statistics."""
    rng = np.random.RandomState(0)
    channels = rest[0] if axis == 1 else rest[-1]
    net = network(GPUS, mode, dtype=dtype, axis=axis, in_channels=channels)
    model = ModelDataParallel(net, GPUS)
    moving_mean, moving_var = np.zeros(channels), np.ones(channels)
    for _ in range(3):
        values, heads = (shares(rng, (4, 2), rest, dtype) for _ in range(2))
        wanted = batch_norm(values, heads, np.ones(channels), np.zeros(channels), axis)
        xs = inputs(values, GPUS)
        with autograd.record():
            ys = model(xs)
        parallel_backward(ys, [load(h, c) for h, c in zip(heads, GPUS)])
        for x, y, wanted_y, wanted_dx in zip(xs, ys, wanted.y, wanted.dx):
            assert y.context == x.context
            assert largest_error(y.asnumpy(), wanted_y) < TOLERANCE[dtype]
            assert largest_error(x.grad.asnumpy(), wanted_dx) < TOLERANCE[dtype]
        layer = net[0]
        for context, dgamma, dbeta in zip(GPUS, wanted.dgamma, wanted.dbeta):
            scale = np.abs(dgamma).max() + np.abs(dbeta).max()
            for parameter, gradient in ((layer.gamma, dgamma), (layer.beta, dbeta)):
                error = np.abs(parameter.grad(context).asnumpy() - gradient).max()
                assert error < TOLERANCE[dtype] * scale
        moving_mean = 0.9 * moving_mean + 0.1 * wanted.mean
        moving_var = 0.9 * moving_var + 0.1 * wanted.var
        mx.nd.waitall()  # static_shape does not tell the engine that statistics are written
        means = [layer.running_mean.data(c).asnumpy() for c in GPUS]
        variances = [layer.running_var.data(c).asnumpy() for c in GPUS]
        assert largest_error(means[0], moving_mean) < 1e-5
        assert largest_error(variances[0], moving_var) < 1e-5
        assert (means[0] == means[1]).all() and (variances[0] == variances[1]).all()


@pytest.mark.parametrize("mode", MODES)
def test_inference_and_back_to_training(mode):
    rng = np.random.RandomState(0)
    net = network(GPUS, mode, in_channels=3)
    model = ModelDataParallel(net, GPUS)
    values = shares(rng, (4, 2), (3, 5, 5))
    for _ in range(2):
        with autograd.record():
            model([load(v, c) for v, c in zip(values, GPUS)])
        mx.nd.waitall()
        mean, var = (p.data(GPUS[0]).asnumpy() for p in (net[0].running_mean, net[0].running_var))
        ys = model([load(v, c) for v, c in zip(values, GPUS)])
        wanted = batch_norm(values, values, np.ones(3), np.zeros(3), statistics=(mean, var)).y
        for y, wanted_y in zip(ys, wanted):
            assert largest_error(y.asnumpy(), wanted_y) < TOLERANCE["float32"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backward", ["plain", "parallel"])
def test_many_layers(mode, backward):
    """No deadlock on up to four GPUs, even with plain autograd.backward."""
    contexts = [mx.gpu(i) for i in range(min(4, mx.context.num_gpus()))]
    rng = np.random.RandomState(0)
    layers = 12
    net = network(contexts, mode, layers, in_channels=3)
    model = ModelDataParallel(net, contexts)
    for _ in range(4):
        values, heads = (shares(rng, (3, 1, 2, 2)[: len(contexts)], (3, 4, 5)) for _ in range(2))
        wanted_y, wanted_dx, results = batch_norm_layers(values, heads, layers)
        xs = inputs(values, contexts)
        with autograd.record():
            ys = model(xs)
        gradients = [load(h, c) for h, c in zip(heads, contexts)]
        if backward == "plain":
            autograd.backward(ys, gradients)
        else:
            parallel_backward(ys, gradients)
        for x, y, wanted, dx in zip(xs, ys, wanted_y, wanted_dx):
            assert largest_error(y.asnumpy(), wanted) < 1e-4
            assert largest_error(x.grad.asnumpy(), dx) < 1e-4
        for layer, result in zip(net, results):
            for context, dbeta in zip(contexts, result.dbeta):
                error = np.abs(layer.beta.grad(context).asnumpy() - dbeta).max()
                assert error < 1e-3  # sums of up to 60 elements of size 1


def test_a_device_without_input():
    rng = np.random.RandomState(0)
    net = network(GPUS, "hybridized", in_channels=3)
    model = ModelDataParallel(net, GPUS)
    for sizes in ((4, 2), (5,), (1, 3)):
        values = shares(rng, sizes, (3, 4, 4))
        wanted = batch_norm(values, values, np.ones(3), np.zeros(3))
        xs = inputs(values, GPUS)
        with autograd.record():
            ys = model(xs)
        parallel_backward(ys, [load(v, c) for v, c in zip(values, GPUS)])
        assert largest_error(ys[0].asnumpy(), wanted.y[0]) < TOLERANCE["float32"]
        means = [net[0].running_mean.data(c).asnumpy() for c in GPUS]
        assert (means[0] == means[1]).all()
        if len(sizes) == 1:
            assert not net[0].gamma.grad(GPUS[1]).asnumpy().any()


def test_a_device_that_fails_and_the_step_after():
    net = network(GPUS, "hybridized", in_channels=3)
    model = ModelDataParallel(net, GPUS)
    good = [np.ones((2, 3), "float32"), np.full((2, 3), 3, "float32")]
    with autograd.record():
        model([load(v, c) for v, c in zip(good, GPUS)])
    bad = [load(good[0], GPUS[0]), load(np.ones((2, 4), "float32"), GPUS[1])]
    with pytest.raises(mx.MXNetError), autograd.record():
        for y in model(bad):
            y.asnumpy()
    with autograd.record():
        ys = model([load(v, c) for v, c in zip(good, GPUS)])
    assert largest_error(ys[0].asnumpy(), np.full((2, 3), -1)) < 1e-4


@pytest.mark.skipif(not EMULATED, reason="makes the emulation fail")
def test_a_gpu_that_fails_and_the_step_after():
    net = network(GPUS, "hybridized", in_channels=3)
    model = ModelDataParallel(net, GPUS)
    emulation = ctypes.CDLL("libcudart.so.11.0")

    def step():
        with autograd.record():
            ys = model([mx.nd.array([[i, i, i], [i + 1] * 3], ctx=c) for i, c in enumerate(GPUS)])
        return [y.asnumpy() for y in ys]

    wanted = step()
    emulation.EmulateFailure(1)
    try:
        with pytest.raises(mx.MXNetError, match="an operator on this device failed"):
            step()
        with pytest.raises(mx.MXNetError):
            mx.nd.waitall()  # the other device's
    finally:
        emulation.EmulateFailure(0)
    for got, value in zip(step(), wanted):
        assert (got == value).all()


def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match=r"ctx_list has gpu\(99\), but \d+ GPUs are visible"):
        ModelDataParallel(SyncBatchNorm(), [mx.gpu(0), mx.gpu(99)])


def test_a_process_that_ends_while_a_gpu_waits():
    script = """
import mxnet as mx, gluon_syncbn
x = mx.nd.array([1, 2, 3], ctx=mx.gpu(0))
y = mx.nd.contrib.KeyBarrierSum(x, key="lonely", num_devices=2)
"""
    fresh_process.run(script, timeout=60)


@pytest.mark.filterwarnings("ignore:register_op_hook")
def test_the_feature_map_travels_in_place():
    """From the second layer on, because the input of the first is the caller's."""
    net = nn.HybridSequential(prefix="net_")
    net.add(SyncBatchNorm(in_channels=3, prefix="a_"), SyncBatchNorm(in_channels=3, prefix="b_"))
    net.initialize(ctx=GPUS[0])
    net.hybridize()
    xs = inputs([np.random.RandomState(0).randn(4, 3, 5).astype("float32")], GPUS)
    model = ModelDataParallel(net, GPUS[:1])
    with autograd.record():
        model(xs)
    at = {}

    def note(name, _, handle):
        address = ctypes.c_void_p()
        array = ctypes.cast(handle, mx.base.NDArrayHandle)
        mx.base.check_call(mx.base._LIB.MXNDArrayGetData(array, ctypes.byref(address)))
        at[name if isinstance(name, str) else name.decode()] = address.value

    net.register_op_hook(note, monitor_all=True)
    with autograd.record():
        ys = model(xs)
    autograd.backward(ys, [load(np.ones((4, 3, 5), "float32"), GPUS[0])])
    mx.nd.waitall()
    assert at["a_moments_output"] == at["a_fwd_data"] != at["a_moments_data"]
    assert at["a_fwd_output"] == at["b_moments_data"] == at["b_moments_output"] == at["b_fwd_data"]
    assert at["b_fwd_output"] != at["b_fwd_data"]  # backward still reads what came in
    # dy becomes dx.
    dy = at["b_fwd_backward_data"]
    assert dy == at["b_moments_backward_data"] == at["a_fwd_backward_data"]


def test_an_exported_network(tmp_path):
    """From two GPUs to a file, and from there to another GPU in a fresh process."""
    rng = np.random.RandomState(0)
    net = network(GPUS, "hybridized", in_channels=3)
    model = ModelDataParallel(net, GPUS)
    values = shares(rng, (4, 2), (3, 5, 5))
    with autograd.record():
        model([load(v, c) for v, c in zip(values, GPUS)])
    wanted = model([load(v, c) for v, c in zip(values, GPUS)])[0].asnumpy()
    net.export(str(tmp_path / "net"))
    np.save(tmp_path / "x.npy", values[0])
    script = """
import sys, mxnet as mx, numpy as np, gluon_syncbn
folder, here = sys.argv[1:]
sys.path.append(here)
__import__("mxnet_gpus").replace_what_gluon_computes(setattr)
files = f"{folder}/net-symbol.json", ["data"], f"{folder}/net-0000.params"
net = mx.gluon.SymbolBlock.imports(*files, ctx=mx.gpu(1))
x = mx.nd.array(np.load(f"{folder}/x.npy"), ctx=mx.gpu(1))
np.save(f"{folder}/y.npy", net(x).asnumpy())
"""
    fresh_process.run(script, tmp_path, HERE)
    assert largest_error(np.load(tmp_path / "y.npy"), wanted) < 1e-6


@pytest.mark.skipif(not EMULATED, reason="counts the emulation's allocations")
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_allocated_in_the_steady_state(mode):
    net = network(GPUS, mode, layers=3, in_channels=3)
    model = ModelDataParallel(net, GPUS)
    values = shares(np.random.RandomState(0), (4, 2), (3, 5, 5))

    def step():
        xs = inputs(values, GPUS)
        with autograd.record():
            ys = model(xs)
        parallel_backward(ys, [load(v, c) for v, c in zip(values, GPUS)])
        mx.nd.waitall()

    count = ctypes.CDLL("libcudart.so.11.0").EmulatedAllocations
    # A worker allocates in its first operation of a layer, which can come late.
    for _ in range(8):
        before = count()
        for _ in range(10):
            step()
        if count() == before:
            return
    raise AssertionError("memory is allocated on and on")
