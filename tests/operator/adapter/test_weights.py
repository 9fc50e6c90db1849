"""Weights of samples and positions: the moments that they ask for, and the gradient of those."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import ModelDataParallel, SyncBatchNorm, export_for_inference, parallel_backward
from networks import split

EPSILON = 1e-5
TOLERANCE = {"float16": 5e-3, "float32": 2e-5, "float64": 1e-10}


def normalized(x, weights, gamma, beta):
    """In NumPy, channels on axis 1; weights have the shape of x, or one that broadcasts to it."""
    axes = (0, *range(2, x.ndim))
    per_channel = [1, -1] + [1] * (x.ndim - 2)
    w = np.broadcast_to(weights, x.shape)
    n = w.sum(axes)
    mean = (w * x).sum(axes) / n
    var = (w * (x - mean.reshape(per_channel)) ** 2).sum(axes) / n
    scale, shift = gamma / np.sqrt(var + EPSILON), beta
    y = (x - mean.reshape(per_channel)) * scale.reshape(per_channel) + shift.reshape(per_channel)
    return y, mean, var


def gradient(function, x, step=1e-5):
    """Of a function of x, by central differences."""
    found = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[i] += sign * step
            ends.append(function(moved))
        found[i] = (ends[0] - ends[1]) / (2 * step)
    return found


def of_shape(weights, like):
    """The weights, of samples or of positions, so that they broadcast to ``like``."""
    if weights.ndim == 1:
        return weights.reshape([-1] + [1] * (like.ndim - 1))
    return np.expand_dims(weights, 1)


def trained(layer, x, weights, dy, dtype="float64"):
    """One step of a layer: y, dx, dgamma, dbeta, moving mean and variance."""
    layer.initialize()
    layer.cast(dtype)
    x = mx.nd.array(x, dtype=dtype)
    x.attach_grad()
    weights = mx.nd.array(weights, dtype="float64" if dtype == "float64" else "float32")
    with autograd.record():
        y = layer(x, weights)
    y.backward(mx.nd.array(dy, dtype=dtype))
    norm = layer if isinstance(layer, SyncBatchNorm) else layer.norm
    gradients = norm.gamma.grad(), norm.beta.grad()
    statistics = norm.running_mean.data(), norm.running_var.data()
    return [a.asnumpy() for a in (y, x.grad, *gradients, *statistics)]


@pytest.mark.parametrize("num_devices", [1, None])
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 5), (2, 3, 2, 3)])
@pytest.mark.parametrize("of", ["samples", "positions"])
def test_against_numpy_and_differences(rng, num_devices, shape, of):
    x, dy = rng.randn(2, *shape)
    weights = rng.rand(shape[0]) if of == "samples" else rng.rand(shape[0], *shape[2:])
    weights.ravel()[1] = 0
    w, one, zero = of_shape(weights, x), np.ones(shape[1]), np.zeros(shape[1])
    wanted, mean, var = normalized(x, w, one, zero)
    dx = gradient(lambda moved: (normalized(moved, w, one, zero)[0] * dy).sum(), x)
    axes = (0, *range(2, x.ndim))
    y, got_dx, dgamma, dbeta, moving_mean, moving_var = trained(
        SyncBatchNorm(num_devices=num_devices), x, weights, dy
    )
    np.testing.assert_allclose(y, wanted, atol=1e-10)
    np.testing.assert_allclose(got_dx, dx, atol=1e-7)  # of the differences
    np.testing.assert_allclose(dgamma, (wanted * dy).sum(axes), atol=1e-10)
    np.testing.assert_allclose(dbeta, dy.sum(axes), atol=1e-10)
    np.testing.assert_allclose(moving_mean, 0.1 * mean, atol=1e-10)
    np.testing.assert_allclose(moving_var, 0.9 + 0.1 * var, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("axis", [1, -1])
def test_types_and_axes(rng, dtype, axis):
    x, dy = rng.randn(2, 5, 4, 3, 3)
    weights = rng.rand(5, 3, 3)
    wanted = trained(SyncBatchNorm(), x, weights, dy)
    if axis == -1:
        x, dy = np.moveaxis(x, 1, -1), np.moveaxis(dy, 1, -1)
    got = trained(SyncBatchNorm(axis=axis), x, weights, dy, dtype)
    if axis == -1:
        got[:2] = [np.moveaxis(a, -1, 1) for a in got[:2]]
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a, b, atol=TOLERANCE[dtype] * max(1, np.abs(b).max()))


def test_whole_numbers_count_as_so_many_samples(rng):
    x, dy = rng.randn(2, 4, 3, 5)
    times = np.array([2, 0, 1, 3])
    y, *_, mean, var = trained(SyncBatchNorm(), x, times, dy)
    repeated = trained(SyncBatchNorm(), np.repeat(x, times, 0), np.ones(6), np.repeat(dy, times, 0))
    np.testing.assert_allclose(np.repeat(y, times, 0), repeated[0], atol=1e-12)
    np.testing.assert_allclose([mean, var], repeated[-2:], atol=1e-12)


def test_ones_are_no_weights(rng):
    x, dy = rng.randn(2, 4, 3, 5, 5)
    for num_devices in (1, None):
        layer = SyncBatchNorm(num_devices=num_devices)
        weighted = trained(layer, x, np.ones(4), dy)
        plain = SyncBatchNorm(num_devices=num_devices)
        wanted = trained(lambda_of(plain), x, np.ones(4), dy)
        for a, b in zip(weighted, wanted):
            np.testing.assert_allclose(a, b, atol=1e-12)


def lambda_of(layer):
    """A block that leaves the weights out."""

    class Without(gluon.Block):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def forward(self, x, _):
            return self.norm(x)

    return Without()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("off", [0.0, -1.0, np.nan])
def test_what_does_not_count_may_be_anything(rng, value, off):
    """Padding does not spoil the statistics.  (A gradient is over every position.)"""
    x, dy = rng.randn(2, 4, 3, 5)
    wanted = trained(SyncBatchNorm(), x[1:], np.ones(3), dy[1:])
    x[0], dy[0] = value, 0
    y, _, *rest = trained(SyncBatchNorm(), x, [off, 1, 1, 1], dy)
    np.testing.assert_allclose(y[1:], wanted[0], atol=1e-12)
    np.testing.assert_allclose(rest[-2:], wanted[-2:], atol=1e-12)


def test_nothing_counts(rng):
    """As without elements: nothing moves, and the moving statistics normalize."""
    x, dy = rng.randn(2, 4, 3)
    y, dx, *_, mean, var = trained(SyncBatchNorm(), x, np.zeros(4), dy)
    np.testing.assert_allclose(y, x / np.sqrt(1 + EPSILON))
    np.testing.assert_allclose(dx, dy / np.sqrt(1 + EPSILON))
    assert (mean == 0).all() and (var == 1).all()


@pytest.mark.parametrize("static", [None, {}, {"static_alloc": True, "static_shape": True}])
def test_several_devices_are_one(rng, two, static):
    """Uneven shards, one of which counts for nothing in the second step."""
    net = SyncBatchNorm(activation="relu")
    net.initialize(ctx=two)
    if static is not None:
        net.hybridize(**static)
    model = ModelDataParallel(net, two)
    alone = SyncBatchNorm(num_devices=1, activation="relu")
    for step in range(2):
        x, dy = rng.randn(2, 7, 3, 4)
        weights = rng.rand(7, 4)
        if step == 1:
            weights[4:] = 0
        xs, ws, dys = (split(a.astype("float32"), two) for a in (x, weights, dy))
        for shard in xs:
            shard.attach_grad()
        with autograd.record():
            ys = model(xs, ws)
        parallel_backward(ys, dys)
        wanted = trained(alone, x, weights, dy, "float32")
        for got, right in ((ys, wanted[0]), ([shard.grad for shard in xs], wanted[1])):
            got = np.concatenate([a.asnumpy() for a in got])
            np.testing.assert_allclose(got, right, atol=2e-5)
        for device in two:
            np.testing.assert_allclose(
                net.running_var.data(device).asnumpy(), wanted[-1], rtol=1e-5
            )


class Masked(gluon.HybridBlock):
    """A network with a mask as its second input."""

    def __init__(self, **options):
        super().__init__()
        with self.name_scope():
            self.conv = nn.Conv2D(4, 3, padding=1)
            self.norm = SyncBatchNorm(**options)

    def hybrid_forward(self, F, x, mask):
        return self.norm(self.conv(x), mask)


@pytest.mark.parametrize("num_devices", [1, None])
def test_hybridized_between_convolutions(rng, num_devices):
    """MKL-DNN's layouts are declined, and the mask gets no gradient."""
    x, dy = rng.randn(3, 2, 6, 6), rng.randn(3, 4, 6, 6)
    mask = (rng.rand(3, 6, 6) > 0.3) * 1.0
    results = []
    for static in (None, {}, {"static_alloc": True, "static_shape": True}):
        mx.random.seed(1)
        net = Masked(num_devices=num_devices)
        if static is not None:
            net.hybridize(**static)
        results.append(trained(net, x, mask, dy, "float32"))
        (inference,) = (net(mx.nd.array(x), mx.nd.array(mask)),)
        results[-1].append(inference.asnumpy())
    for others in results[1:]:
        for a, b in zip(results[0], others):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert results[0][0].std() > 0.1


def test_weights_do_not_matter_in_inference(rng, tmp_path):
    net = Masked(num_devices=1)
    net.initialize()
    net.hybridize()
    x, mask = mx.nd.array(rng.randn(2, 2, 5, 5)), mx.nd.array(rng.rand(2, 5, 5))
    wanted = net(x, mask)
    np.testing.assert_array_equal(net(x, mask * 0).asnumpy(), wanted.asnumpy())
    symbol, parameters = export_for_inference(net, str(tmp_path / "net"), fold=True)
    plain = gluon.SymbolBlock.imports(symbol, ["data0"], parameters)
    np.testing.assert_allclose(plain(x).asnumpy(), wanted.asnumpy(), atol=1e-5)


@pytest.mark.parametrize("hybridize", [False, True])
def test_they_mean_nothing_with_global_statistics(rng, hybridize):
    """Shapes are inferred from a graph that has them as an input."""
    x = mx.nd.array(rng.randn(4, 3))
    layer = SyncBatchNorm(use_global_stats=True)
    layer.initialize()
    if hybridize:
        layer.hybridize()
    with autograd.record():
        y = layer(x, mx.nd.array([0, 1, 2, 3]))
    y.backward()
    np.testing.assert_allclose(y.asnumpy(), x.asnumpy() / np.sqrt(1 + EPSILON), rtol=1e-6)
    assert (layer.running_mean.data() == 0).asnumpy().all()


def test_without_moving_statistics_they_matter_in_inference(rng):
    x = rng.randn(4, 3)
    weights = np.array([1, 0, 1, 1])
    layer = SyncBatchNorm(track_running_stats=False)
    layer.initialize()
    got = layer(mx.nd.array(x), mx.nd.array(weights)).asnumpy()
    wanted, *_ = normalized(x, weights[:, None], np.ones(3), np.zeros(3))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (4, 2), (4, 3, 5), (1,), ()])
def test_weights_that_do_not_fit(shape):
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    with pytest.raises(
        mx.MXNetError, match=r"weights of shape .* do not fit data of shape \[4,3,5\]"
    ):
        with autograd.train_mode():
            layer(mx.nd.ones((4, 3, 5)), mx.nd.ones(shape or (1, 1))).wait_to_read()


def test_weights_of_another_dtype():
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    with pytest.raises(mx.MXNetError, match="weights must be float32.*astype"):
        with autograd.train_mode():
            layer(mx.nd.ones((4, 3)), mx.nd.ones(4, dtype="int32")).wait_to_read()
