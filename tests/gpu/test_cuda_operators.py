"""The operators on GPU contexts, inside MXNet."""

import ctypes

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

from gluon_syncbn import SyncBatchNorm, library
from gluon_syncbn.library import LIBRARY
from mxnet_gpus import TOLERANCE, differentiable, load, need_gpus
from reference import batch_norm, batch_norm_layers, largest_error, moments

pytestmark = need_gpus(1)
GPU = mx.gpu(0)


def on_gpu(values):
    return load(values, GPU)


class Layer:
    def __init__(self, channels, dtype):
        rng = np.random.RandomState(1)
        wide = "float64" if dtype == "float64" else "float32"
        self.gamma_value = (rng.rand(channels) + 0.5).astype(wide)
        self.beta_value = rng.randn(channels).astype(wide)
        self.gamma, self.beta = on_gpu(self.gamma_value), on_gpu(self.beta_value)
        self.mean = on_gpu(np.zeros(channels, wide))
        self.var = on_gpu(np.ones(channels, wide))

    def synchronized(self, x, axis, num_devices, key):
        op = mx.nd._internal
        data, moments, backward_context = op._syncbn_moments(x, axis=axis)
        total = op._syncbn_sum(moments, self.mean, key=key, num_devices=num_devices)
        return op._syncbn_normalize(
            data, total, backward_context, self.gamma, self.beta, self.mean, self.var, axis=axis
        )

    def local(self, x, axis):
        return mx.nd._internal._syncbn_batch_norm(
            x, self.gamma, self.beta, self.mean, self.var, axis=axis
        )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape, axis", [((6, 5, 7, 9), 1), ((6, 7, 9, 8), -1), ((64, 10), 1)])
@pytest.mark.parametrize("how", ["synchronized", "local"])
@pytest.mark.parametrize("grad_req", ["write", "add"])
def test_a_step(dtype, shape, axis, how, grad_req):
    rng = np.random.RandomState(0)
    x_value, dy = rng.randn(*shape).astype(dtype), rng.randn(*shape).astype(dtype)
    layer = Layer(shape[axis], dtype)
    x = on_gpu(x_value)
    grads = differentiable(x, layer.gamma, layer.beta, grad_req=grad_req)
    with autograd.record():
        y = layer.synchronized(x, axis, 1, "one") if how == "synchronized" else layer.local(x, axis)
    autograd.backward([y], [on_gpu(dy)])
    wanted = batch_norm([x_value], [dy], layer.gamma_value, layer.beta_value, axis=axis)
    before = 2 if grad_req == "add" else 0
    assert largest_error(y.asnumpy(), wanted.y[0]) < TOLERANCE[dtype]
    for got, value in zip(grads, (wanted.dx[0], wanted.dgamma[0], wanted.dbeta[0])):
        assert largest_error(got.asnumpy(), value + before) < TOLERANCE[dtype]
    assert largest_error(layer.mean.asnumpy(), 0.1 * wanted.mean) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("how", ["synchronized", "local"])
@pytest.mark.parametrize("grad_req", ["write", "add"])
@pytest.mark.parametrize("add", [False, True])
def test_an_activation_and_a_residual(dtype, how, grad_req, add):
    rng = np.random.RandomState(0)
    x_value, r_value, dy = rng.randn(3, 6, 5, 7, 9).astype(dtype)
    layer = Layer(5, dtype)
    inputs = [on_gpu(x_value), on_gpu(r_value)]
    options = {"activation": "leaky_relu", "slope": 0.25}
    if add:
        options.update(add=True, residual=inputs[1])
    grads = differentiable(*inputs, grad_req=grad_req)
    op, states = mx.nd._internal, dict(moving_mean=layer.mean, moving_var=layer.var)
    with autograd.record():
        if how == "local":
            y = op._syncbn_batch_norm(
                data=inputs[0], gamma=layer.gamma, beta=layer.beta, **states, **options
            )
        else:
            data, moments, context = op._syncbn_moments(inputs[0])
            y = op._syncbn_normalize(
                data=data,
                statistics=moments,
                backward_context=context,
                gamma=layer.gamma,
                beta=layer.beta,
                **states,
                **options,
            )
    autograd.backward([y], [on_gpu(dy)])
    z = batch_norm([x_value], [dy], layer.gamma_value, layer.beta_value).y[0]
    z = z + r_value if add else z
    factor = np.where(z > 0, 1, 0.25)
    wanted = batch_norm([x_value], [dy * factor], layer.gamma_value, layer.beta_value)
    before = 2 if grad_req == "add" else 0
    sure = np.abs(z) > 10 * TOLERANCE[dtype]  # elsewhere rounding may have decided the sign
    assert largest_error(y.asnumpy(), z * factor) < TOLERANCE[dtype]
    for got, value in zip(grads[: 1 + add], (wanted.dx[0], dy * factor)):
        error = largest_error(got.asnumpy()[sure], (value + before)[sure])
        assert error < 3 * TOLERANCE[dtype]


def test_weights():
    rng = np.random.RandomState(0)
    x_value, dy = rng.randn(2, 6, 5, 7).astype("float32")
    weights = rng.rand(6).astype("float32")
    weights[2] = 0
    layer, x = Layer(5, "float32"), on_gpu(x_value)
    (grad,) = differentiable(x)
    op = mx.nd._internal
    with autograd.record():
        data, moments, context = op._syncbn_moments(x, on_gpu(weights), weighted=True)
        y = op._syncbn_normalize(
            data=data,
            statistics=moments,
            backward_context=context,
            gamma=layer.gamma,
            beta=layer.beta,
            moving_mean=layer.mean,
            moving_var=layer.var,
        )
    autograd.backward([y], [on_gpu(dy)])
    on_cpu = SyncBatchNorm(num_devices=1)
    on_cpu.initialize()
    on_cpu(mx.nd.array(x_value))
    on_cpu.gamma.set_data(mx.nd.array(layer.gamma_value))
    on_cpu.beta.set_data(mx.nd.array(layer.beta_value))
    same = mx.nd.array(x_value)
    same.attach_grad()
    with autograd.record():
        wanted = on_cpu(same, mx.nd.array(weights))
    wanted.backward(mx.nd.array(dy))
    assert largest_error(y.asnumpy(), wanted.asnumpy()) < TOLERANCE["float32"]
    assert largest_error(grad.asnumpy(), same.grad.asnumpy()) < TOLERANCE["float32"]
    assert largest_error(layer.var.asnumpy(), on_cpu.running_var.data().asnumpy()) < 1e-5


def arrive(key, round_number, name, num_devices, values):
    """A second participant of the process's own exchange, with moments from the host."""
    done = library.DONE(lambda *_: None)
    numbers = (ctypes.c_double * len(values))(*values)
    status = LIBRARY.BarrierArrive(
        None, key.encode(), 0, round_number, 12345, b"gpu", name.encode(), num_devices, 1,
        numbers, len(values), done, None,
    )  # fmt: skip
    assert status == 0
    return done


def test_two_participants_on_one_gpu():
    rng = np.random.RandomState(0)
    x, other = rng.randn(4, 3, 5, 5).astype("float32"), rng.randn(2, 3, 5, 5).astype("float32")
    layer = Layer(3, "float32")
    with autograd.record():
        y = layer.synchronized(on_gpu(x), 1, 2, "two")
    flat = other.transpose(0, 2, 3, 1).reshape(-1, 3).astype("float64")
    kept = arrive("two", 0, "the other", 2, moments(flat))
    wanted = batch_norm([x, other], [x, other], layer.gamma_value, layer.beta_value)
    assert largest_error(y.asnumpy(), wanted.y[0]) < TOLERANCE["float32"]
    del kept


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0)])
def test_a_share_without_elements(shape):
    layer = Layer(3, "float32")
    with mx.util.np_shape():
        x = on_gpu(np.zeros(shape, "float32"))
        grads = differentiable(x, layer.gamma, layer.beta)
        others = np.random.RandomState(0).randn(7, 3)
        with autograd.record():
            y = layer.synchronized(x, 1, 2, "nothing")
        kept = arrive("nothing", 0, "the other", 2, moments(others))
        assert y.asnumpy().shape == shape
        means = layer.mean.asnumpy()
        assert largest_error(means, 0.1 * others.mean(0)) < 1e-6
        for forward in (lambda: layer.synchronized(x, 1, 1, "nothing"), lambda: layer.local(x, 1)):
            with autograd.record():
                y = forward()
            autograd.backward([y], [x])
            assert grads[0].asnumpy().shape == y.asnumpy().shape == shape
            assert not grads[1].asnumpy().any() and not grads[2].asnumpy().any()
            assert (layer.mean.asnumpy() == means).all()
    del kept


def test_sum_and_gradient():
    for dtype in ("float32", "float64"):
        x = on_gpu(np.arange(1000, dtype=dtype))
        (grad,) = differentiable(x, grad_req="add")
        with autograd.record():
            y = mx.nd.contrib.KeyBarrierSum(x, key="sum", num_devices=1)
        autograd.backward([y], [on_gpu(np.full(1000, 3, dtype))])
        assert (y.asnumpy() == np.arange(1000)).all()
        assert (grad.asnumpy() == 5).all()


def test_a_cpu_and_a_gpu_do_not_meet():
    arrays = [mx.nd.ones(3, ctx=mx.cpu(0)), on_gpu(np.ones(3, "float32"))]
    sums = [mx.nd.contrib.KeyBarrierSum(a, key="mixed", num_devices=2) for a in arrays]
    for result in sums:
        with pytest.raises(mx.MXNetError, match="must be of one kind"):
            result.asnumpy()


def test_a_device_that_does_not_come():
    import gluon_syncbn

    gluon_syncbn.set_timeout(1)
    y = mx.nd.contrib.KeyBarrierSum(on_gpu(np.ones(3, "float32")), key="lonely", num_devices=2)
    with pytest.raises(mx.MXNetError, match=r"gpu\(0\)"):
        y.asnumpy()


@need_gpus(2)
def test_plain_backward_on_two_gpus():
    """From one thread, device after device; on CPU contexts that can deadlock."""
    contexts = [mx.gpu(0), mx.gpu(1)]
    rng = np.random.RandomState(0)
    values = [rng.randn(4, 3, 9, 9).astype("float32") for _ in contexts]
    heads = [rng.randn(4, 3, 9, 9).astype("float32") for _ in contexts]
    xs = [mx.nd.array(v, ctx=c) for v, c in zip(values, contexts)]
    grads = [mx.nd.array(np.zeros_like(v), ctx=c) for v, c in zip(values, contexts)]
    autograd.mark_variables(xs, grads)

    def parameters(value, context):
        return [mx.nd.array(np.full(3, v, "float32"), ctx=context) for v in value]

    ys = []
    with autograd.record():
        for x, context in zip(xs, contexts):
            y = x
            for i in range(6):
                gamma, beta, mean, var = parameters((1, 0, 0, 1), context)
                data, moments, backward_context = mx.nd._internal._syncbn_moments(y)
                total = mx.nd._internal._syncbn_sum(moments, mean, key=f"deep{i}", num_devices=2)
                y = mx.nd._internal._syncbn_normalize(
                    data, total, backward_context, gamma, beta, mean, var, eps=1e-5
                )
            ys.append(y)
    autograd.backward(ys, [mx.nd.array(h, ctx=c) for h, c in zip(heads, contexts)])
    outs, dys, _ = batch_norm_layers(values, heads, 6)
    for y, grad, wanted, dx in zip(ys, grads, outs, dys):
        assert largest_error(y.asnumpy(), wanted) < 1e-4
        assert largest_error(grad.asnumpy(), dx) < 1e-4
