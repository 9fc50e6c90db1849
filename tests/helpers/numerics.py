"""Batches of every kind through a layer on several CPU contexts, and how far it may be from exact.

``Batch`` says what is computed, ``run`` computes it by the layer, ``exact`` by NumPy in extended
precision, and ``bounds`` says how far apart the two may be.
"""

import contextlib
from dataclasses import dataclass, field

import mxnet as mx
import numpy as np
from mxnet import autograd

from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from reference import batch_norm, rows, unrows

# Half of the distance from 1 to the next number.
ROUNDOFF = {"float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
# Half of the smallest number: what underflow can lose.
SMALLEST = {"float16": 2.0**-25, "float32": 2.0**-150, "float64": 2.0**-1074}


def parameter_dtype(dtype):
    return "float64" if dtype == "float64" else "float32"


@dataclass
class Batch:
    """A batch, how it is split, and the layer's options."""

    xs: list  # a shard per device, possibly without elements
    dys: list
    gamma: np.ndarray
    beta: np.ndarray
    axis: int = 1
    epsilon: float = 1e-5
    momentum: float = 0.9
    scale: bool = True
    center: bool = True
    hybridize: dict = None
    options: dict = field(default_factory=dict)

    @property
    def dtype(self):
        return self.xs[0].dtype.name

    @property
    def gamma_in_use(self):
        return self.gamma if self.scale else np.ones_like(self.gamma)

    def split(self, sizes):
        """The same batch in shards of other sizes, along the first axis that is not of channels."""
        whole = self.joined()
        ends = np.cumsum(sizes)[:-1]

        def shards(array):
            return np.split(array, ends, axis=batch_axis(array.ndim, self.axis))

        values = {**vars(self), "xs": shards(whole.xs[0]), "dys": shards(whole.dys[0])}
        return Batch(**values)

    def joined(self):
        """The same batch on one device."""
        where = batch_axis(self.xs[0].ndim, self.axis)
        values = {name: [np.concatenate(vars(self)[name], axis=where)] for name in ("xs", "dys")}
        return Batch(**{**vars(self), **values})


def batch_axis(ndim, axis):
    return 1 if axis in (0, -ndim) else 0


@dataclass
class Results:
    """What a layer computes; a list has an array per device."""

    y: list
    dx: list
    dgamma: list
    dbeta: list
    mean: list  # the moving statistics
    var: list

    def __iter__(self):
        return iter(vars(self).items())


def run(batch, layer_class=SyncBatchNorm):
    """Run a layer forward and backward in training; None stands for a gradient that is not there.

    Another ``layer_class``, such as ``nn.BatchNorm``, runs on one device, as it is.
    """
    contexts = [mx.cpu(i) for i in range(len(batch.xs))]
    layer = layer_class(
        axis=batch.axis,
        epsilon=batch.epsilon,
        momentum=batch.momentum,
        scale=batch.scale,
        center=batch.center,
        in_channels=len(batch.gamma),
        **batch.options,
    )
    layer.cast(batch.dtype)
    layer.initialize(ctx=contexts)
    layer.gamma.set_data(mx.nd.array(batch.gamma, dtype=layer.gamma.dtype))
    layer.beta.set_data(mx.nd.array(batch.beta, dtype=layer.beta.dtype))
    if batch.hybridize is not None:
        layer.hybridize(**batch.hybridize)
    model = layer
    if layer_class is SyncBatchNorm:
        model = ModelDataParallel(layer, contexts)
    empty = any(x.size == 0 for x in batch.xs)
    with mx.util.np_shape(True) if empty else contextlib.nullcontext():
        xs, dys = (
            [mx.nd.array(a, ctx=c, dtype=a.dtype) for a, c in zip(arrays, contexts)]
            for arrays in (batch.xs, batch.dys)
        )
        for x in xs:
            x.attach_grad()
        with autograd.record():
            ys = model(xs) if model is not layer else [layer(xs[0])]
        parallel_backward(ys, dys)
        mx.nd.waitall()

        def gradients(parameter):
            if parameter.grad_req == "null":
                return [None] * len(contexts)
            return [g.asnumpy() for g in parameter.list_grad()]

        return Results(
            [y.asnumpy() for y in ys],
            [x.grad.asnumpy() for x in xs],
            gradients(layer.gamma),
            gradients(layer.beta),
            [m.asnumpy() for m in layer.running_mean.list_data()],
            [v.asnumpy() for v in layer.running_var.list_data()],
        )


def exact(batch):
    """Compute the same in NumPy's extended precision (64 bits of mantissa on x86-64)."""
    result = batch_norm(
        batch.xs,
        batch.dys,
        batch.gamma_in_use.astype("longdouble"),
        batch.beta.astype("longdouble"),
        axis=batch.axis,
        epsilon=batch.epsilon,
        precision="longdouble",
    )
    new, count = 1 - np.longdouble(batch.momentum), len(batch.xs)
    return Results(
        result.y,
        result.dx,
        result.dgamma if batch.scale else [None] * count,
        result.dbeta if batch.center else [None] * count,
        [new * result.mean] * count,
        [batch.momentum + new * result.var] * count,
    )


def bounds(batch):
    """Bound the errors of a layer's results, elementwise, to first order.

    In ``batch_norm_kernels.h``, per channel and with the notation of there:

    - u is the roundoff of the data's dtype, s that of the parameters' (in which elementwise
      arithmetic is done), e that of float64 (in which sums are).
    - A sum of n terms in float64 has an error of about sqrt(n) e times the sum of their magnitudes
      (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci.
      Comput. 41, 2019: lambda sqrt(n) u with high probability).  Runs of float16 are first summed
      in float32, 32 terms at a time.  Together: ``sums``, with lambda = 6.
    - mean = pivot + sum(x - pivot) / n, where the pivot is an element, so no x - pivot exceeds the
      range of x:  d_mean = e |mean| + sums * range.
    - M2 / n = sum((x - pivot)^2) / n - (mean - pivot)^2, two numbers of at most range^2; merging
      shards squares differences of means:  d_var = 2 sums range^2 + 2 range d_mean.
      So invstd has a relative error of d_var / (2 (var + epsilon)): ``rho``.  It is what makes the
      error of a channel depend on its condition, range / std and mean / std.
    - y = (x - high) scale + shift, where high is the mean in s, and what that leaves, at most
      s |mean|, is part of the shift.  Each of the operations rounds once, to s of its result.
    - dx = gamma invstd (g - S / n - (x - mean) invstd^2 T / n) with S = sum(g) and
      T = sum(g (x - mean)), likewise.
    """
    u, e = ROUNDOFF[batch.dtype], ROUNDOFF["float64"]
    s = ROUNDOFF[parameter_dtype(batch.dtype)]
    tiny, tiny_parameter = SMALLEST[batch.dtype], SMALLEST[parameter_dtype(batch.dtype)]
    x = np.concatenate([rows(shard, batch.axis) for shard in batch.xs])
    g = np.concatenate([rows(shard, batch.axis) for shard in batch.dys])
    n = len(x)
    truth = exact(batch)
    mean, var = x.mean(0), x.var(0)
    span = x.max(0) - x.min(0)
    sums = 6 * (np.sqrt(n) * e + (np.sqrt(32) * 2.0**-24 if batch.dtype == "float16" else 0))
    d_mean = 2 * e * np.abs(mean) + sums * span
    d_var = 2 * sums * span**2 + 2 * span * d_mean + d_mean**2
    r = 1 / np.sqrt(var + batch.epsilon)
    rho = d_var / (2 * (var + batch.epsilon)) + 2 * e
    low = s * np.abs(mean)  # what rounding the mean to s leaves
    gamma = np.abs(batch.gamma_in_use)

    def of_y(x, y):
        distance = np.abs(x - mean) + low
        absolute = gamma * r * (d_mean + s * low + (rho + 5 * s) * distance)
        return u * np.abs(y) + absolute + 3 * s * np.abs(batch.beta) + tiny

    total, product = np.abs(g.sum(0)), np.abs((g * (x - mean)).sum(0))
    d_total = sums * np.abs(g).sum(0)
    d_product = sums * (np.abs(g) * (np.abs(x - mean) + low)).sum(0) + d_mean * total

    def of_dx(x, g, dx):
        distance = np.abs(x - mean) + low
        of_g, of_total = gamma * r * np.abs(g), gamma * r * total / n
        slope = gamma * r**3 / n
        rounding = (5 * s + 4 * rho) * (of_g + of_total + slope * product * distance)
        of_sums = gamma * r / n * d_total + slope * distance * d_product
        of_mean = slope * product * (d_mean + s * low)
        # What underflows is multiplied by the distance from the mean.
        underflow = tiny + tiny_parameter * (1 + distance)
        return u * np.abs(dx) + rounding + of_sums + of_mean + underflow

    def per_shard(of_parameter):
        return [
            of_parameter(rows(sx, batch.axis), rows(sg, batch.axis))
            for sx, sg in zip(batch.xs, batch.dys)
        ]

    def of_dgamma(x, g):
        magnitude = (np.abs(g) * (np.abs(x - mean) + low)).sum(0)
        error = (sums + s * s) * magnitude + d_mean * np.abs(g).sum(0)
        return r * (error + (rho + 2 * s) * np.abs((g * (x - mean)).sum(0))) + tiny_parameter

    def of_dbeta(x, g):
        return sums * np.abs(g).sum(0) + 2 * s * np.abs(g.sum(0)) + tiny_parameter

    def elementwise(bound, *arrays):
        return [
            unrows(bound(*(rows(a, batch.axis) for a in shard)), shard[0], batch.axis)
            for shard in zip(*arrays)
        ]

    new, devices = 1 - batch.momentum, len(batch.xs)
    return Results(
        elementwise(of_y, batch.xs, truth.y),
        elementwise(of_dx, batch.xs, batch.dys, truth.dx),
        per_shard(of_dgamma),
        per_shard(of_dbeta),
        [new * d_mean + 2 * s * np.abs(new * mean) + tiny_parameter] * devices,
        [new * d_var + 3 * s * (new * var + batch.momentum)] * devices,
    )


def assert_within(got, truth, bound):
    """Every number of the results is as close to the truth as it should be."""
    for (name, arrays), (_, wanted), (_, allowed) in zip(got, truth, bound):
        for device, (a, w, most) in enumerate(zip(arrays, wanted, allowed)):
            assert (a is None) == (w is None), name
            if a is None or a.size == 0:
                continue
            assert a.shape == w.shape
            overflows = np.abs(w) + most > np.finfo(a.dtype).max
            a = np.where(overflows & np.isinf(a) & (np.sign(a) == np.sign(w)), w, a)
            error = np.abs(a.astype("longdouble") - w)
            worst = np.argmax(error / most)
            if not (error <= most).all():
                raise AssertionError(
                    f"{name} of device {device} at {np.unravel_index(worst, a.shape)} is "
                    f"{a.flat[worst]!r}, which is {error.flat[worst]:.2e} from "
                    f"{w.flat[worst]!r}, with a bound of {most.flat[worst]:.2e}"
                )


def largest_ratio(got, truth, bound):
    """The largest error, in terms of its bound, by result."""
    return {
        name: max(
            float((np.abs(a.astype("longdouble") - w) / most).max())
            for a, w, most in zip(arrays, wanted, allowed)
            if a is not None and a.size
        )
        for (name, arrays), (_, wanted), (_, allowed) in zip(got, truth, bound)
        if arrays[0] is not None
    }
