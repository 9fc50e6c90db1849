"""An activation and a residual inside the operators: what the same operators of MXNet's compute."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon

from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from networks import split
from reference import batch_norm

SHAPES = [((4, 5, 7, 6), 1), ((3, 7, 6, 5), -1), ((6, 33), 1), ((20, 3, 2, 2), 1)]
ACTIVATIONS = [
    (None, 1.0),
    ("relu", 0.0),
    ("leaky_relu", 0.125),
]  # a slope that MXNet stores exactly


class Net(gluon.HybridBlock):
    """A layer and what follows it, inside it or as operators of MXNet's."""

    def __init__(self, inside, activation, slope, **options):
        super().__init__()
        self._inside, self._activation, self._slope = inside, activation, slope
        if inside:
            options.update(activation=activation, slope=slope)
        with self.name_scope():
            self.norm = SyncBatchNorm(**options)

    def hybrid_forward(self, F, x, r=None):
        if self._inside:
            return self.norm(x, add=r)
        y = self.norm(x)
        y = y if r is None else y + r
        if self._activation == "relu":
            return F.relu(y)
        if self._activation == "leaky_relu":
            return F.LeakyReLU(y, act_type="leaky", slope=self._slope)
        return y


# Beyond the caches, where the lone layer works in blocks of channels.
LARGE = (16, 64, 70, 65), 1


def steps(net, dtype, x, r, dy, grad_req="write"):
    """Everything that two training steps and an inference compute."""
    net.initialize()
    net.norm.cast(dtype)
    net(*[mx.nd.array(a, dtype=dtype) for a in (x, r) if a is not None])
    (channels,) = net.norm.gamma.shape
    net.norm.gamma.set_data(mx.nd.array(np.linspace(-1, 2, channels)))
    net.norm.beta.set_data(mx.nd.array(np.linspace(1, -1, channels)))
    inputs = [mx.nd.array(a, dtype=dtype) for a in (x, r) if a is not None]
    for a in inputs:
        a.attach_grad(grad_req)
    for _ in range(2):
        with autograd.record():
            y = net(*inputs)
        y.backward(mx.nd.array(dy, dtype=dtype))
    parameters = net.collect_params().values()
    found = [y, *(a.grad for a in inputs), net(*inputs), *(p.data() for p in parameters)]
    found += [p.grad() for p in parameters if p.grad_req != "null"]
    return [a.asnumpy() for a in found]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape, axis", SHAPES)
@pytest.mark.parametrize("num_devices", [1, None])
def test_the_same_bits_as_operators_one_after_the_other(rng, dtype, shape, axis, num_devices):
    x, r, dy = rng.randn(3, *shape)
    for activation, slope in ACTIVATIONS:
        for residual in (None, r):
            for grad_req in ("write", "add"):
                inside, outside = (
                    steps(
                        Net(here, activation, slope, axis=axis, num_devices=num_devices),
                        *(dtype, x, residual, dy, grad_req),
                    )
                    for here in (True, False)
                )
                # MXNet's leaky relu computes in float32.
                tolerance = 1e-6 if dtype == "float64" and activation == "leaky_relu" else 0
                for a, b in zip(inside, outside):
                    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_devices", [1, None])
def test_large_maps(rng, num_devices):
    shape, axis = LARGE
    x, r, dy = rng.randn(3, *shape).astype("float32")
    for residual, grad_req in ((None, "write"), (r, "write"), (None, "add")):
        inside, outside = (
            steps(
                Net(here, "relu", 0.0, num_devices=num_devices),
                "float32",
                x,
                residual,
                dy,
                grad_req,
            )
            for here in (True, False)
        )
        for a, b in zip(inside, outside):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_devices", [1, None])
@pytest.mark.parametrize("options", [{}, {"static_alloc": True, "static_shape": True}])
def test_hybridized(rng, num_devices, options):
    x, r, dy = rng.randn(3, 4, 5, 7, 6)
    for residual in (None, r):
        results = []
        for hybridized in (False, True):
            net = Net(True, "relu", 0.0, num_devices=num_devices)
            if hybridized:
                net.hybridize(**options)
            results.append(steps(net, "float32", x, residual, dy))
        for a, b in zip(*results):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_devices", [1, None])
def test_gradients_by_themselves(rng, num_devices):
    """Whichever of the gradients are wanted, and whether they are written or added."""
    x, r, dy = rng.randn(3, 4, 5, 3, 3).astype("float32")
    wanted = steps(Net(True, "relu", 0.0, num_devices=num_devices), "float32", x, r, dy)[1:3]
    for of_x in ("null", "write", "add"):
        for of_r in ("null", "write", "add"):
            net = Net(True, "relu", 0.0, num_devices=num_devices)
            net.initialize()
            net(mx.nd.array(x))
            net.norm.gamma.set_data(mx.nd.array(np.linspace(-1, 2, 5)))
            net.norm.beta.set_data(mx.nd.array(np.linspace(1, -1, 5)))
            inputs = [mx.nd.array(x), mx.nd.array(r)]
            for a, req in zip(inputs, (of_x, of_r)):
                if req != "null":
                    a.attach_grad(req)
                    a.grad[:] = 3
            with autograd.record():
                y = net(*inputs)
            y.backward(mx.nd.array(dy))
            for a, req, right in zip(inputs, (of_x, of_r), wanted):
                if req == "write":
                    np.testing.assert_array_equal(a.grad.asnumpy(), right)
                elif req == "add":
                    np.testing.assert_allclose(a.grad.asnumpy(), right + 3, rtol=1e-6)


def test_float16(rng):
    x, r, dy = rng.randn(3, 4, 5, 7, 6).astype("float16").astype("float64")
    gamma, beta = np.linspace(-1, 2, 5), np.linspace(1, -1, 5)
    z = batch_norm([x], [dy], gamma, beta).y[0] + r
    g = dy * (z > 0)
    for num_devices in (1, None):
        net = Net(True, "relu", 0.0, num_devices=num_devices)
        y, dx, dr, *_ = steps(net, "float16", x, r, dy)
        np.testing.assert_allclose(y, z * (z > 0), atol=5e-3)
        sure = np.abs(z) > 1e-2  # elsewhere rounding decides the sign
        np.testing.assert_allclose(dr[sure], g[sure], atol=1e-3)
        np.testing.assert_allclose(dx, batch_norm([x], [g], gamma, beta).dx[0], atol=2e-2)


@pytest.mark.parametrize("residual", [False, True])
def test_several_devices(rng, two, residual):
    x, r, dy = rng.randn(3, 7, 4, 5, 5).astype("float32")
    net = Net(True, "leaky_relu", 0.1)
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    shards = [split(a, two) for a in (x, r, dy)]
    for shard in (*shards[0], *shards[1]):
        shard.attach_grad()
    with autograd.record():
        ys = model(*shards[: 1 + residual])
    parallel_backward(ys, shards[2])
    z = batch_norm([x], [dy], np.ones(4), np.zeros(4)).y[0] + (r if residual else 0)
    g = dy * np.where(z > 0, 1, 0.1)
    wanted = batch_norm([x], [g], np.ones(4), np.zeros(4))

    def joined(arrays):
        return np.concatenate([a.asnumpy() for a in arrays])

    np.testing.assert_allclose(joined(ys), np.where(z > 0, z, 0.1 * z), atol=1e-5)
    np.testing.assert_allclose(joined([a.grad for a in shards[0]]), wanted.dx[0], atol=1e-5)
    if residual:
        np.testing.assert_allclose(joined([a.grad for a in shards[1]]), g, atol=1e-6)


@pytest.mark.parametrize("num_devices", [1, None])
def test_infinity_and_nan(num_devices):
    """As relu of MXNet's: infinity is not times a slope of 0, and NaN stays."""
    for activation, of_minus_infinity in (("relu", 0.0), ("leaky_relu", -np.inf)):
        layer = SyncBatchNorm(activation=activation, use_global_stats=True, num_devices=num_devices)
        layer.initialize()
        x = mx.nd.array([[-np.inf], [np.inf], [np.nan], [-0.0]])
        with autograd.record():
            y = layer(x)
        np.testing.assert_array_equal(y.asnumpy().ravel()[:3], [of_minus_infinity, np.inf, np.nan])


@pytest.mark.parametrize("num_devices", [1, None])
@pytest.mark.parametrize("activation, slope", [("relu", 0.0), ("leaky_relu", 0.125)])
@pytest.mark.parametrize("where", ["residual", "gradient"])
def test_no_nan_is_lost_in_backward(rng, num_devices, activation, slope, where):
    """A loss scaler must see them: as with separate operators, all of the channel's gradients."""
    x, r, dy = rng.randn(3, 4, 3, 5).astype("float32")
    for residual in (True, False) if where == "gradient" else (True,):
        if where == "residual":
            r[1, 2, 3] = np.nan
        else:
            net = Net(True, activation, slope, num_devices=num_devices)
            y = steps(net, "float32", x, r if residual else None, dy)[0]
            dy[np.unravel_index(y.argmin(), y.shape)] = np.nan  # where the activation is low
        net = Net(True, activation, slope, num_devices=num_devices)
        dx = steps(net, "float32", x, r if residual else None, dy)[1]
        (_, channels, _) = np.nonzero(np.isnan(dx))
        assert np.isnan(dx).sum() == 20 * len(set(channels)) > 0
        dy = rng.randn(4, 3, 5).astype("float32")


def test_a_residual_that_does_not_fit():
    layer = SyncBatchNorm()
    layer.initialize()
    layer(mx.nd.ones((4, 3)))
    with pytest.raises(mx.MXNetError, match=r"add has the shape \[4,2\].*does not broadcast"):
        layer(mx.nd.ones((4, 3)), add=mx.nd.ones((4, 2))).wait_to_read()
    with pytest.raises(mx.MXNetError, match="add has another dtype .*astype"):
        layer(mx.nd.ones((4, 3)), add=mx.nd.ones((4, 3), dtype="float16")).wait_to_read()
