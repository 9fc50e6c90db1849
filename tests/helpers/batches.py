"""Strategies of hypothesis: batches of any shape, split, type, scale and distance from zero."""

import numpy as np
from hypothesis import event
from hypothesis import strategies as st

from networks import MODES
from numerics import Batch, batch_axis, parameter_dtype

DTYPES = "float16", "float32", "float64"
MOST_ELEMENTS = 20000


@st.composite
def shapes(draw):
    """A shape of 2 to 5 dimensions, and its channel axis; up to 70 channels, any remainder."""
    ndim = draw(st.integers(2, 5))
    axis = draw(st.integers(-ndim, ndim - 1))
    channels = draw(st.one_of(st.integers(1, 9), st.integers(1, 70)))
    others = draw(st.lists(st.integers(1, 12), min_size=ndim - 1, max_size=ndim - 1))
    while channels * np.prod(others) > MOST_ELEMENTS:
        others[np.argmax(others)] //= 2
    others.insert(axis % ndim, channels)
    return tuple(others), axis


@st.composite
def splits(draw, rows):
    """The sizes of 1 to 4 shards; some may be empty."""
    cuts = draw(st.lists(st.integers(0, rows), max_size=3))
    return list(np.diff([0, *sorted(cuts), rows]))


@st.composite
def batches(draw, dtypes=DTYPES, epsilons=(1e-5, 1e-3, 1e-8)):
    """A batch of any scale and distance from zero, in shards, possibly with constant channels."""
    dtype = draw(st.sampled_from(dtypes))
    shape, axis = draw(shapes())
    channels = shape[axis]
    rng = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    # float16 ends at 65504, so its data cannot be as large, nor their gradients.
    scale = 10.0 ** draw(st.integers(-6, 3 if dtype == "float16" else 6))
    offset = draw(st.sampled_from([0, 1, -100, 1e3 if dtype == "float16" else 1e4]))
    x = rng.randn(*shape) * scale + offset
    across = [1] * len(shape)
    across[axis] = channels
    constant = draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])) > rng.rand(channels)
    x = np.where(constant.reshape(across), offset + scale, x)
    dy = rng.randn(*shape) * 10.0 ** draw(st.integers(-2, 2 if dtype != "float16" else 0))
    dy += draw(st.sampled_from([0, 1]))
    gamma, beta = rng.randn(channels), rng.randn(channels)
    gamma[rng.rand(channels) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    kind = parameter_dtype(dtype)
    batch = Batch(
        [x.astype(dtype)],
        [dy.astype(dtype)],
        gamma.astype(kind),
        beta.astype(kind),
        axis,
        epsilon=draw(st.sampled_from(epsilons)),
        momentum=draw(st.sampled_from([0.9, 0.0, 0.5, 1.0])),
        scale=draw(st.booleans()),
        center=draw(st.booleans()),
        hybridize=draw(st.sampled_from(MODES)),
    )
    batch = batch.split(draw(splits(shape[batch_axis(len(shape), axis)])))
    event(f"{dtype}, {len(batch.xs)} devices")
    return batch
