"""The CUDA side's C functions (src/operator/kernels/cuda/functions.h) on arrays of a device.

The same checks run on a GPU (tests/gpu) and on emulated CUDA (test_gpu_kernels.py).  A device has
``index``, ``stream``, ``synchronize()`` and ``array(numpy_array)``, whose result has ``pointer``,
``dtype`` and ``numpy()``.
"""

import ctypes

import numpy as np

from reference import batch_norm, batch_norm_far_from_zero, largest_error, moments, rows

TYPES = {"float16": 0, "float32": 1, "float64": 2}
SKIP, WRITE, ADD = 0, 1, 2
NO_STATISTICS = -1
# As for the operators; see test_operators.py.
TOLERANCE = {"float16": 2e-3, "float32": 3e-6, "float64": 1e-11}

POINTER, SIZE, DOUBLE, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_double, ctypes.c_int


def structure(name, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Activation = structure("Activation", present=ctypes.c_bool, slope=DOUBLE)
EpilogueBackward = structure(
    "EpilogueBackward",
    activation=Activation,
    beta=POINTER,
    y=POINTER,
    residual_grad_mode=INT,
    residual_grad=POINTER,
)
Renormalization = structure(
    "Renormalization",
    momentum=DOUBLE,
    r_min=DOUBLE,
    r_max=DOUBLE,
    d_max=DOUBLE,
    mean=POINTER,
    stddev=POINTER,
    correction=POINTER,
)
Gpu = structure("Gpu", device=INT, stream=POINTER)
FeatureShape = structure(
    "FeatureShape", outer=SIZE, channels=SIZE, inner=SIZE, stride=SIZE, block=SIZE
)
MomentsForwardParams = structure(
    "MomentsForwardParams",
    type=INT,
    shape=FeatureShape,
    x=POINTER,
    copy=POINTER,
    compute_statistics=ctypes.c_bool,
    statistics=POINTER,
)
NormalizeForwardParams = structure(
    "NormalizeForwardParams",
    type=INT,
    shape=FeatureShape,
    epsilon=DOUBLE,
    momentum=DOUBLE,
    fix_gamma=ctypes.c_bool,
    x=POINTER,
    statistics=POINTER,
    gamma=POINTER,
    beta=POINTER,
    moving_mean=POINTER,
    moving_var=POINTER,
    y_mode=INT,
    y=POINTER,
    batches=POINTER,
    activation=Activation,
    residual=POINTER,
    renorm=Renormalization,
)
NormalizeBackwardParams = structure(
    "NormalizeBackwardParams",
    type=INT,
    shape=FeatureShape,
    epsilon=DOUBLE,
    fix_gamma=ctypes.c_bool,
    dy=POINTER,
    x=POINTER,
    statistics=POINTER,
    gamma=POINTER,
    moving_mean=POINTER,
    moving_var=POINTER,
    g=POINTER,
    backward_sums=POINTER,
    backward_context=POINTER,
    gamma_grad_mode=INT,
    gamma_grad=POINTER,
    beta_grad_mode=INT,
    beta_grad=POINTER,
    epilogue=EpilogueBackward,
    correction=POINTER,
)
MomentsBackwardParams = structure(
    "MomentsBackwardParams",
    type=INT,
    shape=FeatureShape,
    g=POINTER,
    x=POINTER,
    backward_sums=POINTER,
    backward_context=POINTER,
    dx_mode=INT,
    dx=POINTER,
)
LocalBackwardParams = structure(
    "LocalBackwardParams",
    type=INT,
    shape=FeatureShape,
    epsilon=DOUBLE,
    fix_gamma=ctypes.c_bool,
    dy=POINTER,
    x=POINTER,
    statistics=POINTER,
    gamma=POINTER,
    moving_mean=POINTER,
    moving_var=POINTER,
    dx_mode=INT,
    dx=POINTER,
    gamma_grad_mode=INT,
    gamma_grad=POINTER,
    beta_grad_mode=INT,
    beta_grad=POINTER,
    epilogue=EpilogueBackward,
    correction=POINTER,
)
PositionWeights = structure("PositionWeights", values=POINTER, outer_per_sample=SIZE)
VALUES_READ = ctypes.CFUNCTYPE(None, POINTER, ctypes.POINTER(DOUBLE), SIZE, ctypes.c_char_p)


class Kernels:
    """The functions of one library, on one device; errors are raised as RuntimeError."""

    def __init__(self, library, device):
        self.library, self.device = library, device

    def call(self, name, *arguments, device=None, stream=None):
        function = getattr(self.library, "GluonSyncBNCuda" + name)
        function.restype = ctypes.c_char_p
        gpu = Gpu(self.device.index if device is None else device, stream or self.device.stream)
        error = function(ctypes.byref(gpu), *arguments)
        if error is not None:
            raise RuntimeError(error.decode())

    def run(self, params, **where):
        self.call(type(params).__name__.replace("Params", ""), ctypes.byref(params), **where)

    def read(self, array, count):
        """The numbers of a float32 or float64 array, as they go to the exchange."""
        import threading

        self.device.synchronize()
        got, there = [], threading.Event()

        def done(_, values, n, error):
            got.extend(values[:n] if error is None else [error])
            there.set()

        callback = VALUES_READ(done)
        function = self.library.GluonSyncBNCudaReadValues
        function.restype = ctypes.c_char_p
        error = function(
            self.device.index,
            TYPES[array.dtype],
            POINTER(array.pointer),
            SIZE(count),
            callback,
            None,
        )
        assert error is None, error
        assert there.wait(10)
        return np.array(got)

    def write(self, values, array, mode=WRITE):
        values = np.ascontiguousarray(values, "float64")
        source = values.ctypes.data_as(ctypes.POINTER(DOUBLE))
        self.call(
            "WriteValues",
            TYPES[array.dtype],
            mode,
            source,
            SIZE(len(values)),
            POINTER(array.pointer),
        )


def feature_shape(shape, axis):
    axis %= len(shape)
    outer, inner = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
    return FeatureShape(outer, shape[axis], inner, 0, 1)


class Layer:
    """Parameters and moving statistics on a device, and one device's shard of a layer's step."""

    def __init__(self, kernels, dtype, shape, axis, fix_gamma=False, local=False, batches=None):
        self.kernels, self.dtype, self.axis, self.local = kernels, dtype, axis, local
        self.fix_gamma, self.momentum = fix_gamma, 0.9
        self.shape = feature_shape(shape, axis)
        self.channels = channels = shape[axis]
        self.acc_type = "float64" if dtype == "float64" else "float32"
        rng = np.random.RandomState(1)
        self.gamma_value = rng.rand(channels).astype(self.acc_type) + 0.5
        self.beta_value = rng.randn(channels).astype(self.acc_type)
        if fix_gamma:
            self.gamma_value[:] = 1
        self.gamma = self.array(self.gamma_value if not fix_gamma else self.gamma_value + 7)
        self.beta = self.array(self.beta_value)
        self.mean = self.array(np.full(channels, 0.5, self.acc_type))
        self.var = self.array(np.full(channels, 2.0, self.acc_type))
        self.batches = None if batches is None else self.array(np.array([batches], self.acc_type))
        self.gamma_grad = self.array(np.full(channels, 3.0, self.acc_type))
        self.beta_grad = self.array(np.full(channels, 4.0, self.acc_type))
        self.statistics = self.array(np.full(3 * channels, np.nan))
        self.sums = self.array(np.full(2 * channels + 1, np.nan))
        self.context = self.array(np.full(2 * channels, np.nan))
        self.no_statistics = self.array(np.append(np.zeros(2 * channels), NO_STATISTICS))
        # What comes after normalization; the arrays are of a device.
        self.activation = Activation(False, 0.0)
        self.residual = self.residual_grad = self.y = None
        self.residual_mode = SKIP
        self.renorm, self.correction = Renormalization(), None

    def array(self, values):
        return self.kernels.device.array(values)

    def forward(self, x, y, mode=WRITE, batch_statistics=True, total=None):
        """``total``: the result of the exchange; by default what this device contributes to it."""
        kernels, p = self.kernels, self
        statistics = self.statistics.pointer if batch_statistics else None
        params = NormalizeForwardParams(
            TYPES[self.dtype], self.shape, 1e-5, p.momentum, self.fix_gamma, x.pointer, statistics,
            p.gamma.pointer, p.beta.pointer, p.mean.pointer, p.var.pointer, mode, y.pointer,
            p.batches and p.batches.pointer, p.activation, p.residual and p.residual.pointer,
            p.renorm,
        )  # fmt: skip
        self.y = y
        if self.local:
            kernels.call("LocalForward", ctypes.byref(params), POINTER(statistics))
            return
        if batch_statistics:
            kernels.run(
                MomentsForwardParams(
                    TYPES[self.dtype], self.shape, x.pointer, x.pointer, True, statistics
                )
            )
            if total is not None:
                kernels.write(total, self.statistics)
        else:
            params.statistics = self.no_statistics.pointer
        kernels.run(params)

    def backward(self, dy, x, dx, mode=WRITE, batch_statistics=True, parameters=WRITE, add=None):
        """``add``: the backward sums of the other devices."""
        kernels, p = self.kernels, self
        step = TYPES[self.dtype], self.shape
        epilogue = EpilogueBackward(
            p.activation,
            p.beta.pointer,
            p.y.pointer if p.residual and p.activation.present else None,
            p.residual_mode,
            p.residual_grad and p.residual_grad.pointer,
        )
        gradients = parameters, p.gamma_grad.pointer, parameters, p.beta_grad.pointer, epilogue
        gradients += (p.correction and p.correction.pointer,)
        if self.local:
            statistics = self.statistics.pointer if batch_statistics else None
            params = LocalBackwardParams(
                *step, 1e-5, self.fix_gamma, dy.pointer, x.pointer, statistics, p.gamma.pointer,
                p.mean.pointer, p.var.pointer, mode, dx.pointer, *gradients,
            )  # fmt: skip
            kernels.call("LocalBackward", ctypes.byref(params))
            return
        statistics = (self.statistics if batch_statistics else self.no_statistics).pointer
        kernels.run(
            NormalizeBackwardParams(
                *step,
                1e-5,
                self.fix_gamma,
                dy.pointer,
                x.pointer,
                statistics,
                p.gamma.pointer,
                p.mean.pointer,
                p.var.pointer,
                dy.pointer,
                p.sums.pointer,
                p.context.pointer,
                *gradients,
            )  # fmt: skip
        )
        if add is not None:
            size = 2 * self.channels + 1
            kernels.write(kernels.read(self.sums, size) + add, self.sums)
        kernels.run(
            MomentsBackwardParams(
                *step, dy.pointer, x.pointer, p.sums.pointer, p.context.pointer, mode, dx.pointer
            )
        )


def check_step(
    kernels, dtype, shape, axis, local=False, in_place=False, offset=0.0, first=None, **options
):
    """One training step of one device against NumPy in float64.

    ``offset``: how far from zero the channels are, one above and the next below.
    ``first``: what the first element of every channel is.
    """
    rng = np.random.RandomState(0)
    signs = np.where(np.arange(shape[axis]) % 2, -1, 1)
    per_channel = [1] * len(shape)
    per_channel[axis] = -1
    x = (rng.randn(*shape) + offset * signs.reshape(per_channel)).astype(dtype)
    if first is not None:
        np.moveaxis(x, axis, -1)[(0,) * (x.ndim - 1)] = first
    dy = rng.randn(*shape).astype(dtype)
    layer = Layer(kernels, dtype, shape, axis, local=local, **options)
    wanted = batch_norm([x], [dy], layer.gamma_value.astype("float64"), layer.beta_value, axis=axis)
    device = kernels.device
    xd, dyd = device.array(x), device.array(dy)
    y = device.array(np.full(shape, np.nan, dtype))
    dx = dyd if in_place else device.array(np.full(shape, np.nan, dtype))
    layer.forward(xd, y)
    layer.backward(dyd, xd, dx)
    tolerance = TOLERANCE[dtype]
    assert largest_error(y.numpy(), wanted.y[0]) < tolerance
    assert largest_error(dx.numpy(), wanted.dx[0]) < tolerance
    parameters = max(1e-6, tolerance / 100) if layer.acc_type == "float32" else tolerance
    if options.get("fix_gamma"):
        assert not layer.gamma_grad.numpy().any()
    else:
        scale = np.abs(wanted.dgamma[0]).max() + np.abs(wanted.dbeta[0]).max()
        assert np.abs(layer.gamma_grad.numpy() - wanted.dgamma[0]).max() < parameters * 10 * scale
    assert largest_error(layer.beta_grad.numpy(), wanted.dbeta[0]) < parameters * 10
    assert largest_error(layer.mean.numpy(), 0.45 + 0.1 * wanted.mean) < parameters
    assert largest_error(layer.var.numpy(), 1.8 + 0.1 * wanted.var) < parameters


def check_epilogue(kernels, dtype, shape, axis, local, slope, residual, mode=WRITE):
    """A step with an activation (``slope`` is not None) and a residual, against NumPy in float64.

    ``mode`` is that of the gradients of x and of the residual.
    """
    rng = np.random.RandomState(0)
    x, r, dy, before = (rng.randn(*shape).astype(dtype) for _ in range(4))
    layer = Layer(kernels, dtype, shape, axis, local=local)
    gamma, array = layer.gamma_value.astype("float64"), kernels.device.array
    if slope is not None:
        layer.activation = Activation(True, slope)
    xd, dyd, y = array(x), array(dy), array(np.full(shape, np.nan, dtype))
    dx, dr = array(before), array(before)
    if residual:
        layer.residual, layer.residual_grad, layer.residual_mode = array(r), dr, mode
    layer.forward(xd, y)
    # The synchronized layer's first kernel leaves g in dy.
    layer.backward(dyd, xd, dx, mode=mode)

    z = batch_norm([x], [dy], gamma, layer.beta_value, axis=axis).y[0]
    z = z + r if residual else z
    factor = np.ones_like(z) if slope is None else np.where(z > 0, 1, slope)
    g = dy * factor
    if dtype == "float16":  # as it is stored
        g = g.astype(dtype).astype("float64")
    wanted = batch_norm([x], [g], gamma, layer.beta_value, axis=axis)
    earlier = before.astype("float64") if mode == ADD else 0
    tolerance = TOLERANCE[dtype]
    assert largest_error(y.numpy(), z * factor) < tolerance
    sure = np.abs(z) > 10 * tolerance  # elsewhere rounding may have decided the sign of z
    assert sure.mean() > 0.9
    tolerance *= 2 if mode == ADD else 1
    assert largest_error(dx.numpy()[sure], (wanted.dx[0] + earlier)[sure]) < 3 * tolerance
    if residual:
        assert largest_error(dr.numpy()[sure], (g + earlier)[sure]) < tolerance
    assert largest_error(layer.beta_grad.numpy(), wanted.dbeta[0]) < 30 * tolerance


def check_weights(kernels, dtype, shape, axis, per_sample, mode=WRITE):
    """Weighted moments, and the gradient that goes through them, against NumPy in float64."""
    rng = np.random.RandomState(0)
    x, g, before = (rng.randn(*shape).astype(dtype) for _ in range(3))
    form = feature_shape(shape, axis)
    channels, array = shape[axis], kernels.device.array
    acc_type = "float64" if dtype == "float64" else "float32"
    positions = (
        shape[:1] if per_sample else [n for i, n in enumerate(shape) if i != axis % len(shape)]
    )
    weights = (rng.rand(*positions) * (rng.rand(*positions) > 0.3)).astype(acc_type)
    given = array(weights)
    how = PositionWeights(given.pointer, form.outer // shape[0] if per_sample else 0)
    xd, gd, dx = array(x), array(g), array(before)
    statistics = array(np.full(2 * channels + 1, np.nan))
    forward = MomentsForwardParams(TYPES[dtype], form, xd.pointer, None, True, statistics.pointer)
    kernels.call("WeightedMomentsForward", ctypes.byref(forward), ctypes.byref(how))
    flat = rows(x, axis)
    if per_sample:
        weights = np.broadcast_to(
            weights.reshape([-1] + [1] * (len(shape) - 2)), np.delete(shape, axis % len(shape))
        )
    w = weights.astype("float64").reshape(-1, 1)
    n = w.sum()
    mean = (w * flat).sum(0) / n
    m2 = (w * (flat - mean) ** 2).sum(0)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(statistics.numpy(), [*mean, *m2, n], rtol=1e-9, atol=1e-9)
    sums, context = array(rng.randn(2 * channels + 1)), array(rng.randn(2 * channels))
    backward = MomentsBackwardParams(
        TYPES[dtype], form, gd.pointer, xd.pointer, sums.pointer, context.pointer, mode, dx.pointer
    )
    kernels.call("WeightedMomentsBackward", ctypes.byref(backward), ctypes.byref(how))
    c, b = sums.numpy()[:channels], sums.numpy()[channels : 2 * channels]
    factor, about = np.split(context.numpy(), 2)
    wanted = factor * rows(g, axis) + w * (b * (flat - about) + c)
    if mode == ADD:
        wanted = wanted + rows(before, axis)
    assert largest_error(rows(dx.numpy(), axis), wanted) < 3 * tolerance


def check_float64_far_from_zero(kernels, shape, axis, local, offset=1e6):
    """As exact as two passes over the data are."""
    rng = np.random.RandomState(0)
    x, dy = rng.randn(*shape) + offset, rng.randn(*shape) + 3
    layer = Layer(kernels, "float64", shape, axis, local=local)
    of_batch = [dy], layer.gamma_value, layer.beta_value, axis
    wanted = batch_norm_far_from_zero([x], offset, *of_batch)
    two_passes = batch_norm([x], *of_batch)
    array = layer.kernels.device.array
    xd, dyd, y, dx = array(x), array(dy), array(np.zeros(shape)), array(np.zeros(shape))
    layer.forward(xd, y)
    layer.backward(dyd, xd, dx)
    # Where a two-pass computation happens to be exact, the last place of the mean.
    least = np.spacing(offset)
    assert largest_error(y.numpy(), wanted.y[0]) < max(
        least, largest_error(two_passes.y[0], wanted.y[0])
    )
    assert largest_error(dx.numpy(), wanted.dx[0]) < max(
        4 * least, largest_error(two_passes.dx[0], wanted.dx[0])
    )
    np.testing.assert_allclose(layer.var.numpy(), 1.8 + 0.1 * wanted.var, rtol=1e-10)
    variance = layer.statistics.numpy()[layer.channels : 2 * layer.channels] / (
        x.size / x.shape[axis]
    )
    np.testing.assert_allclose(variance, wanted.var, rtol=1e-9)


def check_two_devices(kernels, dtype, shape, axis):
    """Two shards of a batch, each with the sums of the other, give what one batch does."""
    rng = np.random.RandomState(0)
    xs = [rng.randn(*shape).astype(dtype) for _ in range(2)]
    dys = [rng.randn(*shape).astype(dtype) for _ in range(2)]
    layer = Layer(kernels, dtype, shape, axis)
    wanted = batch_norm(xs, dys, layer.gamma_value.astype("float64"), layer.beta_value, axis=axis)
    shards = [rows(x, axis) for x in xs]
    total = moments(np.concatenate(shards))
    device = kernels.device
    sums = []
    for i in range(2):
        one = Layer(kernels, dtype, shape, axis)
        x, dy, y = device.array(xs[i]), device.array(dys[i]), device.array(np.zeros_like(xs[i]))
        one.forward(x, y)
        contribution = kernels.read(one.statistics, 2 * one.channels + 1)
        np.testing.assert_allclose(contribution, moments(shards[i]), rtol=1e-5, atol=1e-6)
        one.forward(x, y, total=total)
        assert largest_error(y.numpy(), wanted.y[i]) < TOLERANCE[dtype]
        one.backward(dy, x, device.array(np.zeros_like(xs[i])))
        sums.append(kernels.read(one.sums, 2 * one.channels + 1))
    for i in range(2):
        one = Layer(kernels, dtype, shape, axis)
        x, dy, dx = device.array(xs[i]), device.array(dys[i]), device.array(np.zeros_like(xs[i]))
        one.forward(x, device.array(np.zeros_like(xs[i])), total=total)
        one.backward(dy, x, dx, add=sums[1 - i])
        assert largest_error(dx.numpy(), wanted.dx[i]) < TOLERANCE[dtype]


def check_moving_statistics(kernels, dtype, shape, axis, local):
    """Inference, and training by the moving statistics: values, gradients, no updates."""
    rng = np.random.RandomState(0)
    x, dy = rng.randn(*shape).astype(dtype), rng.randn(*shape).astype(dtype)
    layer = Layer(kernels, dtype, shape, axis, local=local)
    fixed = (np.full(layer.channels, 0.5), np.full(layer.channels, 2.0))
    wanted = batch_norm(
        [x],
        [dy],
        layer.gamma_value.astype("float64"),
        layer.beta_value,
        axis=axis,
        statistics=fixed,
    )
    device = kernels.device
    xd, dyd = device.array(x), device.array(dy)
    y, dx = device.array(np.zeros(shape, dtype)), device.array(np.zeros(shape, dtype))
    layer.forward(xd, y, batch_statistics=False)
    layer.backward(dyd, xd, dx, batch_statistics=False)
    assert largest_error(y.numpy(), wanted.y[0]) < TOLERANCE[dtype]
    assert largest_error(dx.numpy(), wanted.dx[0]) < TOLERANCE[dtype]
    assert largest_error(layer.beta_grad.numpy(), wanted.dbeta[0]) < max(
        TOLERANCE[dtype] / 10, 1e-11
    )
    assert (layer.mean.numpy() == 0.5).all() and (layer.var.numpy() == 2).all()
    layer.momentum = 1.0
    layer.forward(device.array(np.full(shape, np.nan, dtype)), y)
    assert np.isnan(y.numpy()).all()
    assert (layer.mean.numpy() == 0.5).all() and (layer.var.numpy() == 2).all()


def check_infinities(kernels, dtype, shape, axis, local):
    """An infinite mean where there is an infinity, wherever it is; see tests/numerics."""
    rng = np.random.RandomState(0)
    x, dy = rng.randn(*shape).astype(dtype), rng.randn(*shape).astype(dtype)
    of_channels = np.moveaxis(x, axis, -1)
    of_channels[(0,) * (x.ndim - 1)][0] = np.inf  # the pivot
    of_channels[(-1,) * (x.ndim - 1)][1] = -np.inf
    of_gradients = np.moveaxis(dy, axis, -1)
    of_gradients[(-1,) * (x.ndim - 1)][2] = np.inf
    layer, device = Layer(kernels, dtype, shape, axis, local=local), kernels.device
    xd, dyd = device.array(x), device.array(dy)
    y, dx = device.array(np.zeros(shape, dtype)), device.array(np.zeros(shape, dtype))
    layer.forward(xd, y)
    layer.backward(dyd, xd, dx)
    mean, var = layer.mean.numpy(), layer.var.numpy()
    np.testing.assert_array_equal(mean[:2], [np.inf, -np.inf])
    assert np.isnan(var[:2]).all() and np.isfinite(mean[2:]).all() and np.isfinite(var[2:]).all()
    assert np.isnan(layer.gamma_grad.numpy()[:2]).all() and np.isinf(layer.gamma_grad.numpy()[2])
    np.testing.assert_array_equal(np.isinf(layer.beta_grad.numpy()), np.arange(shape[axis]) == 2)
    for array in y, dx:
        flat = rows(array.numpy(), axis)
        assert np.isnan(flat[:, :2]).all() and np.isfinite(flat[:, 3:]).all()
    # gamma invstd (g - inf - (x - mean) dgamma / n): with dgamma's sign, infinite or NaN.
    of_x = rows(x, axis)[:, 2]
    sign = np.sign(of_x - of_x.mean()) * np.sign(layer.gamma_grad.numpy()[2])
    sign[-1] = -1  # the infinite g itself
    wanted = np.where(sign < 0, np.nan, -np.inf)
    np.testing.assert_array_equal(rows(dx.numpy(), axis)[:, 2], wanted)


def check_cumulative_average(kernels, dtype, shape, axis, local):
    """The average over all batches, counted on the device; inference does not count."""
    rng = np.random.RandomState(0)
    layer = Layer(kernels, dtype, shape, axis, local=local, batches=0)
    tolerance = 1e-6 if layer.acc_type == "float32" else 1e-12
    device, means, variances = kernels.device, [], []
    for step in range(1, 5):
        x = (step * rng.randn(*shape) + step).astype(dtype)
        flat = rows(x, axis)
        means.append(flat.mean(0))
        variances.append(flat.var(0))
        for batch_statistics in (True, False):
            layer.forward(
                device.array(x), device.array(np.zeros_like(x)), batch_statistics=batch_statistics
            )
            assert layer.batches.numpy().tolist() == [step]
            assert largest_error(layer.mean.numpy(), np.mean(means, 0)) < tolerance
            assert largest_error(layer.var.numpy(), np.mean(variances, 0)) < tolerance


def check_renormalization(kernels, dtype, shape, axis, local):
    """A step's result, gradients, saved correction and averages, with some channels clipped."""
    rng = np.random.RandomState(0)
    x, dy = (rng.randn(*shape).astype(dtype) for _ in range(2))
    layer, device = Layer(kernels, dtype, shape, axis, local=local), kernels.device
    averages = rng.randn(layer.channels) / 2, rng.rand(layer.channels) + 0.5
    mean, stddev = (device.array(a.astype(layer.acc_type)) for a in averages)
    layer.correction = device.array(np.full(2 * layer.channels, np.nan))
    layer.renorm = Renormalization(
        0.75, 0.8, 1.4, 0.5, mean.pointer, stddev.pointer, layer.correction.pointer
    )
    xd, y, dx = device.array(x), device.array(np.zeros_like(x)), device.array(np.zeros_like(x))
    layer.forward(xd, y)
    layer.backward(device.array(dy), xd, dx)
    flat, g = rows(x, axis), rows(dy, axis)
    sigma = np.sqrt(flat.var(0) + 1e-5)
    r = np.clip(sigma / averages[1], 0.8, 1.4)
    d = np.clip((flat.mean(0) - averages[0]) / averages[1], -0.5, 0.5)
    wanted = batch_norm([x], [dy], layer.gamma_value * r, layer.beta_value, axis)
    hat = (flat - flat.mean(0)) / sigma * r + d
    tolerance = TOLERANCE[dtype]
    assert largest_error(rows(y.numpy(), axis), layer.gamma_value * hat + layer.beta_value) < (
        tolerance
    )
    assert largest_error(dx.numpy(), wanted.dx[0]) < tolerance
    assert largest_error(layer.gamma_grad.numpy(), (g * hat).sum(0)) < max(tolerance, 1e-11)
    saved = layer.correction.numpy().reshape(-1, 2)
    np.testing.assert_allclose(
        saved, np.transpose([r, d]), rtol=1e-3 if dtype != "float64" else 1e-9
    )
    for got, before, batch in zip((mean, stddev), averages, (flat.mean(0), sigma)):
        assert largest_error(got.numpy(), 0.75 * before + 0.25 * batch) < max(tolerance, 1e-11)
    layer.forward(xd, y, batch_statistics=False)
    assert (layer.correction.numpy().reshape(-1, 2) == [1, 0]).all()


def check_write_modes(kernels, dtype, shape, axis, local):
    """Results overwrite, accumulate or are skipped, as asked for."""
    rng = np.random.RandomState(0)
    x, dy = rng.randn(*shape).astype(dtype), rng.randn(*shape).astype(dtype)
    device = kernels.device
    plain, other = (Layer(kernels, dtype, shape, axis, local=local) for _ in range(2))
    xd = device.array(x)

    def step(layer, mode, parameters, before):
        y = device.array(np.full(shape, before, dtype))
        dx = device.array(np.full(shape, before, dtype))
        dyd = device.array(dy)
        layer.forward(xd, y, mode=mode)
        layer.backward(dyd, xd, dx, mode=mode, parameters=parameters)
        return [a.numpy().astype("float64") for a in (y, dx, layer.gamma_grad, layer.beta_grad)]

    written = step(plain, WRITE, WRITE, 9)
    added = step(other, ADD, ADD, 2)
    for got, wanted, before in zip(added, written, (2, 2, 3, 4)):
        assert largest_error(got, wanted + before) < TOLERANCE[dtype]
    left = Layer(kernels, dtype, shape, axis, local=local)
    for got, before in zip(step(left, SKIP, SKIP, 9), (9, 9, 3, 4)):
        assert (got == before).all()


def check_without_statistics(kernels, dtype, shape, axis):
    """Without statistics the count says so; the data are copied in either case."""
    device = kernels.device
    x = np.random.RandomState(0).randn(*shape).astype(dtype)
    xd, copy = device.array(x), device.array(np.zeros(shape, dtype))
    layer = Layer(kernels, dtype, shape, axis)
    for compute in (False, True):
        kernels.run(
            MomentsForwardParams(
                TYPES[dtype],
                layer.shape,
                xd.pointer,
                copy.pointer,
                compute,
                layer.statistics.pointer,
            )
        )
        assert (copy.numpy() == x).all()
        count = layer.statistics.numpy()[2 * layer.channels]
        assert count == (x.size / shape[axis] if compute else NO_STATISTICS)


def check_no_elements(kernels, dtype, shape, axis):
    """A shard without elements adds nothing, and a batch without any changes no statistics."""
    device = kernels.device
    nothing = device.array(np.zeros(shape, dtype))
    for local in (False, True):
        layer = Layer(kernels, dtype, shape, axis, local=local)
        layer.forward(nothing, nothing)
        layer.backward(nothing, nothing, nothing)
        assert not layer.statistics.numpy()[: 2 * layer.channels + 1].any()
        assert not layer.gamma_grad.numpy().any() and not layer.beta_grad.numpy().any()
        assert (layer.mean.numpy() == 0.5).all() and (layer.var.numpy() == 2).all()
        layer.forward(nothing, nothing, batch_statistics=False)
        layer.backward(nothing, nothing, nothing, batch_statistics=False)
    layer = Layer(kernels, dtype, shape, axis)
    others = np.random.RandomState(0).randn(7, layer.channels)
    layer.forward(nothing, nothing, total=moments(others))
    layer.backward(nothing, nothing, nothing)
    assert not kernels.read(layer.sums, 2 * layer.channels + 1).any()
    assert largest_error(layer.mean.numpy(), 0.45 + 0.1 * others.mean(0)) < 1e-6
    assert largest_error(layer.var.numpy(), 1.8 + 0.1 * others.var(0)) < 1e-6


def check_values(kernels):
    """Copies to the host and back, with conversion."""
    rng = np.random.RandomState(0)
    for dtype in ("float32", "float64"):
        for count in (1, 257, 70_001):
            values = rng.randn(count).astype(dtype)
            array = kernels.device.array(values)
            assert (kernels.read(array, count) == values.astype("float64")).all()
            new = rng.randn(count)
            kernels.write(new, array)
            assert (array.numpy() == new.astype(dtype)).all()
            kernels.write(new, array, ADD)
            np.testing.assert_allclose(array.numpy(), 2 * new, rtol=1e-6)
            kernels.write(new, array, SKIP)
            np.testing.assert_allclose(array.numpy(), 2 * new, rtol=1e-6)
