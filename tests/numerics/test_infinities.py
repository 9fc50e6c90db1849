"""Infinities and NaNs spread as in ``nn.BatchNorm`` of the whole batch, on all devices alike.

What decides is where the formula of batch normalization has them.  With one infinity in a channel,
its mean is that infinity, its variance NaN (there is an inf - inf), and so is every y and dx of the
channel, on every device, while the gradient of beta does not see it.

One difference: where gamma is infinite, MXNet's dx, gamma (g - ...), is infinite, and ours,
gamma g - gamma ..., may be NaN, since gamma is multiplied into the numbers per channel.
"""

import mxnet as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mxnet import autograd
from mxnet.gluon import nn

from batches import shapes, splits
from gluon_syncbn import SyncBatchNorm
from networks import MODES
from numerics import Batch, batch_axis, parameter_dtype, run

VALUES = np.nan, np.inf, -np.inf


@st.composite
def spoiled_batches(draw):
    """A batch with 1 to 3 infinities or NaNs in x, dy, gamma or beta."""
    dtype = draw(st.sampled_from(["float16", "float32", "float64"]))
    shape, axis = draw(shapes())
    rng = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    arrays = {
        "x": rng.randn(*shape).astype(dtype),
        "dy": rng.randn(*shape).astype(dtype),
        "gamma": rng.randn(shape[axis]).astype(parameter_dtype(dtype)),
        "beta": rng.randn(shape[axis]).astype(parameter_dtype(dtype)),
    }
    arrays["gamma"][rng.rand(shape[axis]) < draw(st.sampled_from([0.0, 0.5]))] = 0
    for _ in range(draw(st.integers(1, 3))):
        array = arrays[draw(st.sampled_from(["x", "x", "dy", "dy", "gamma", "beta"]))]
        array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from(VALUES))
    x, dy, gamma, beta = arrays.values()
    scale, center = draw(st.booleans()), draw(st.booleans())
    batch = Batch([x], [dy], gamma, beta, axis, scale=scale, center=center)
    batch.hybridize = draw(st.sampled_from(MODES))
    return batch.split(draw(splits(shape[batch_axis(len(shape), axis)])))


def kinds(array):
    """What each number is: finite, NaN, or one of the infinities."""
    array = array.astype("float64")
    return np.where(np.isfinite(array), "finite", np.char.mod("%g", array))


def assert_alike(got, wanted, what):
    np.testing.assert_array_equal(kinds(got), kinds(wanted), what)


@given(spoiled_batches())
def test_as_in_mxnets_batch_norm_of_the_whole_batch(batch):
    got, wanted = run(batch), run(batch.joined(), nn.BatchNorm)
    where = batch_axis(batch.xs[0].ndim, batch.axis)
    y, dx = (np.concatenate(arrays, where) for arrays in (got.y, got.dx))
    assert_alike(y, wanted.y[0], "y")
    for array in dx, wanted.dx[0]:
        channels_last = np.moveaxis(array, batch.axis, -1)
        channels_last[np.isinf(channels_last) & np.isinf(batch.gamma_in_use)] = np.nan
    assert_alike(dx, wanted.dx[0], "dx")
    for name in ("dgamma", "dbeta"):
        (of_whole,) = getattr(wanted, name)
        if of_whole is not None:
            with np.errstate(invalid="ignore"):  # inf - inf
                assert_alike(sum(getattr(got, name)), of_whole, name)
    for name in ("mean", "var"):
        for of_device in getattr(got, name):
            assert_alike(of_device, getattr(wanted, name)[0], name)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("training", [False, True])
def test_in_moving_statistics(value, name, dtype, training, rng):
    """In inference and with use_global_stats."""
    x = mx.nd.array(rng.randn(4, 2, 3, 3), dtype=dtype)
    results = []
    for layer in (
        cls(use_global_stats=True, in_channels=2) for cls in (nn.BatchNorm, SyncBatchNorm)
    ):
        layer.cast(dtype)
        layer.initialize()
        statistics = np.array([value, 2.0])
        getattr(layer, name).set_data(mx.nd.array(statistics, dtype=parameter_dtype(dtype)))
        x.attach_grad()
        with autograd.record(train_mode=training):
            y = layer(x)
        y.backward(train_mode=training)
        results.append([y, x.grad, layer.gamma.grad(), layer.beta.grad()])
    for ours, theirs, what in zip(*reversed(results), ("y", "dx", "dgamma", "dbeta")):
        assert_alike(ours.asnumpy(), theirs.asnumpy(), what)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("place", [0, 3])
def test_an_infinity_anywhere_in_a_large_map(dtype, axis, place, rng):
    """Sums begin anew in every tile, at its first element."""
    x = rng.randn(5, 40, 30, 20).astype(dtype)
    x.reshape(-1, 20)[place * 1500, 3] = np.inf
    x[place, 1, 1, 7] = -np.inf
    if axis == 1:
        x = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    wanted = np.zeros(20)
    wanted[[3, 7]] = np.inf, -np.inf
    batch = Batch([x], [x], np.ones(20, "f"), np.zeros(20, "f"), axis)
    for sizes in ([5], [2, 3], [1, 0, 4]):
        for mean in run(batch.split(sizes)).mean:
            assert_alike(mean, wanted, "mean")
