"""Reference: batch normalization in NumPy and float64, the whole batch at once.

The gradient is the formula of Ioffe and Szegedy, https://arxiv.org/abs/1502.03167, section 3.
"""

from collections import namedtuple

import numpy as np

Result = namedtuple("Result", "y dx dgamma dbeta mean var")


def rows(array, axis, precision="float64"):
    """An array as rows x channels, in float64 or more."""
    moved = np.moveaxis(np.asarray(array, precision), axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def unrows(flat, like, axis):
    shape = np.moveaxis(like, axis, -1).shape
    return np.moveaxis(flat.reshape(shape), -1, axis)


def batch_norm(xs, dys, gamma, beta, axis=1, epsilon=1e-5, statistics=None, precision="float64"):
    """Normalize shards as one batch.

    ``statistics``: (mean, var) to use instead of the batch's, as constants.
    The gradients of gamma and beta are per shard; their sum is the batch's.
    """
    x = np.concatenate([rows(s, axis, precision) for s in xs])
    dy = np.concatenate([rows(s, axis, precision) for s in dys])
    mean, var = statistics or (x.mean(0), x.var(0))
    r = 1 / np.sqrt(var + epsilon)
    hat = (x - mean) * r
    y = gamma * hat + beta
    if statistics:
        dx = gamma * r * dy
    else:
        dx = gamma * r * (dy - dy.mean(0) - hat * (dy * hat).mean(0))
    ends = np.cumsum([rows(s, axis).shape[0] for s in xs])[:-1]

    def shards(flat):
        return [unrows(part, s, axis) for part, s in zip(np.split(flat, ends), xs)]

    return Result(
        shards(y),
        shards(dx),
        [part.sum(0) for part in np.split(dy * hat, ends)],
        [part.sum(0) for part in np.split(dy, ends)],
        mean,
        var,
    )


def batch_norm_far_from_zero(xs, offset, *args, **kwargs):
    """`batch_norm` of float64 data near ``offset``, as exact as near zero."""
    near = [x - offset for x in xs]
    assert all((n + offset == x).all() for n, x in zip(near, xs))  # nothing was rounded
    result = batch_norm(near, *args, **kwargs)
    return result._replace(mean=result.mean + offset)


def moments(rows):
    """Compute what a device contributes: means, sums of squares about them, the count."""
    mean = rows.mean(0) if len(rows) else np.zeros(rows.shape[1])
    return np.concatenate([mean, ((rows - mean) ** 2).sum(0), [len(rows)]])


def batch_norm_layers(xs, dys, layers, axis=1):
    """Layers in a row, without scale and shift: the last y, the first dx, every layer's result."""
    channels = xs[0].shape[axis]
    gamma, beta = np.ones(channels), np.zeros(channels)
    inputs = [xs]
    for _ in range(layers):
        inputs.append(batch_norm(inputs[-1], dys, gamma, beta, axis).y)
    results = []
    for x in inputs[-2::-1]:
        results.insert(0, batch_norm(x, dys, gamma, beta, axis))
        dys = results[0].dx
    return inputs[-1], dys, results


def largest_error(got, wanted):
    """The largest difference, on the scale of the wanted values."""
    got, wanted = np.asarray(got, "float64"), np.asarray(wanted, "float64")
    assert got.shape == wanted.shape
    return np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30)
