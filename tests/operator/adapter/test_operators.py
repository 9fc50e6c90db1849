"""The three operators together against NumPy in float64: values, gradients, statistics."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

import fresh_process
from reference import batch_norm, batch_norm_far_from_zero, largest_error

# What float16 outputs and float32 parameters can hold.
TOLERANCE = {"float16": 2e-3, "float32": 3e-6, "float64": 1e-11}
LAYOUTS = [
    ((6, 5), 1),
    ((6, 5), 0),
    ((6, 5, 3), 1),
    ((6, 4, 5), -1),
    ((6, 5, 3, 4), 1),
    ((6, 3, 4, 5), -1),
    ((6, 3, 5, 4), 2),
    ((6, 3, 2, 3, 2), 1),
    ((6, 2, 3, 2, 5), -1),
    ((6, 2, 5, 3, 2), -3),
]


class Layer:
    """The operators as one layer, with arrays of its own on every device."""

    def __init__(self, devices, channels, parameter_dtype, grad_req="write", **options):
        self.options = {"axis": 1, "eps": 1e-5, "momentum": 0.9, "fix_gamma": False, **options}
        self.contexts = [mx.cpu(i) for i in range(devices)]
        rng = np.random.RandomState(1)
        self.gamma, self.beta = rng.rand(channels) + 0.5, rng.randn(channels)

        def copies(value):
            return [mx.nd.array(value, ctx=c, dtype=parameter_dtype) for c in self.contexts]

        self.gammas, self.betas = copies(self.gamma), copies(self.beta)
        self.means, self.vars = copies(np.zeros(channels)), copies(np.ones(channels))
        for array in self.gammas + self.betas:
            array.attach_grad(grad_req)

    def __call__(self, xs):
        return [self.forward(i, x) for i, x in enumerate(xs)]

    def forward(self, i, x):
        op = mx.nd._internal
        handed, local, coefficients = op._syncbn_moments(x, axis=self.options["axis"])
        total = op._syncbn_sum(local, self.means[i], key="layer", num_devices=len(self.contexts))
        parameters = self.gammas[i], self.betas[i], self.means[i], self.vars[i]
        return op._syncbn_normalize(handed, total, coefficients, *parameters, **self.options)


class Alone(Layer):
    """The operator of a layer without all-reduce."""

    def __init__(self, devices, *args, **options):
        assert devices == 1
        super().__init__(devices, *args, **options)

    def forward(self, i, x):
        parameters = self.gammas[i], self.betas[i], self.means[i], self.vars[i]
        return mx.nd._internal._syncbn_batch_norm(x, *parameters, **self.options)


def shards_of(rng, shape, sizes, dtype, scale=1.0, offset=0.0):
    """Split random data along the first axis over the devices; return shards of x and of dy."""
    xs, dys = [], []
    for i, size in enumerate(sizes):
        part = (size, *shape[1:])
        x = (rng.randn(*part) * scale + offset).astype(dtype)
        xs.append(mx.nd.array(x, ctx=mx.cpu(i), dtype=dtype))
        dys.append(mx.nd.array(rng.randn(*part).astype(dtype), ctx=mx.cpu(i), dtype=dtype))
    return xs, dys


def numpy_of(arrays):
    return [a.asnumpy() for a in arrays]


def run(layer, xs, dys, grad_req="write", train_mode=True):
    for x in xs:
        x.attach_grad(grad_req)
    with autograd.record(train_mode=train_mode):
        ys = layer(xs)
    for y, dy in zip(ys, dys):
        y.backward(dy)
    return ys


def check(layer, xs, dys, ys, tolerance, axis, fix_gamma=False):
    gamma = np.ones_like(layer.gamma) if fix_gamma else layer.gamma
    want = batch_norm(numpy_of(xs), numpy_of(dys), gamma, layer.beta, axis)
    scale = np.abs(np.concatenate([d.ravel() for d in want.dx])).max()
    for i in range(len(xs)):
        assert largest_error(ys[i].asnumpy(), want.y[i]) < tolerance
        assert np.abs(xs[i].grad.asnumpy() - want.dx[i]).max() < tolerance * max(scale, 1)
        dgamma = 0 * want.dgamma[i] if fix_gamma else want.dgamma[i]
        parameter_tolerance = max(tolerance if fix_gamma else 0, 1e-5)
        if layer.gammas[i].dtype == np.float64:
            parameter_tolerance = tolerance
        for got, wanted in ((layer.gammas[i], dgamma), (layer.betas[i], want.dbeta[i])):
            error = np.abs(got.grad.asnumpy() - wanted).max()
            assert error < parameter_tolerance * max(np.abs(wanted).max(), 1)
        mean, var = layer.means[i].asnumpy(), layer.vars[i].asnumpy()
        np.testing.assert_allclose(mean, 0.1 * want.mean, atol=1e-6)
        np.testing.assert_allclose(var, 0.9 + 0.1 * want.var, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape, axis", LAYOUTS)
@pytest.mark.parametrize(
    "kind, sizes", [(Alone, [6]), (Layer, [6]), (Layer, [3, 3]), (Layer, [1, 4, 2])]
)
def test_against_numpy(dtype, shape, axis, kind, sizes, rng):
    if axis == 0 and len(sizes) > 1:
        shape = (shape[0], 7)  # the channels lie along the axis that is not split

        def split(size):
            return (shape[0], size)

        xs, dys = [], []
        for i, size in enumerate(sizes):
            for to in (xs, dys):
                to.append(mx.nd.array(rng.randn(*split(size)), ctx=mx.cpu(i), dtype=dtype))
    else:
        xs, dys = shards_of(rng, shape, sizes, dtype)
    layer = kind(len(sizes), shape[axis], "float64" if dtype == "float64" else "float32", axis=axis)
    ys = run(layer, xs, dys)
    assert all(y.dtype == np.dtype(dtype) for y in ys)
    check(layer, xs, dys, ys, TOLERANCE[dtype], axis)


@pytest.mark.parametrize("shape, axis", [((8, 3, 9, 11), 1), ((8, 9, 11, 3), -1)])
@pytest.mark.parametrize("channels", [1, 3, 64, 65])
def test_odd_channel_counts(shape, axis, channels, rng):
    shape = list(shape)
    shape[axis] = channels
    xs, dys = shards_of(rng, tuple(shape), [5, 3], "float32")
    layer = Layer(2, channels, "float32", axis=axis)
    check(layer, xs, dys, run(layer, xs, dys), TOLERANCE["float32"], axis)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "kind, shape, sizes",
    [
        (Layer, (4, 5, 3, 3), [3, 1]),
        (Alone, (4, 5, 3, 3), [4]),
        (Alone, (2, 33, 70, 70), [2]),  # slice by slice
    ],
)
def test_gradients_are_added_where_asked(kind, shape, sizes, dtype, rng):
    xs, dys = shards_of(rng, shape, sizes, dtype)
    parameter = "float64" if dtype == "float64" else "float32"
    once, twice = (kind(len(sizes), shape[1], parameter, grad_req=r) for r in ("write", "add"))
    run(once, xs, dys)
    single = numpy_of([x.grad for x in xs])
    for x in xs:
        x.attach_grad("add")
    for _ in range(2):
        with autograd.record():
            ys = twice(xs)
        for y, dy in zip(ys, dys):
            y.backward(dy)
    for x, dx in zip(xs, single):
        assert largest_error(x.grad.asnumpy(), 2 * dx) < TOLERANCE[dtype]
    for a, b in zip(once.gammas + once.betas, twice.gammas + twice.betas):
        assert largest_error(b.grad.asnumpy(), 2 * a.grad.asnumpy()) < 1e-6


@pytest.mark.parametrize("wanted", ["data", "gamma", "beta"])
@pytest.mark.parametrize("kind, sizes", [(Layer, [2, 2]), (Alone, [4])])
def test_any_one_gradient_alone(kind, sizes, wanted, rng):
    xs, dys = shards_of(rng, (4, 5, 3), sizes, "float32")
    full = kind(len(sizes), 5, "float32")
    run(full, xs, dys)
    want = {
        "data": numpy_of([x.grad for x in xs]),
        "gamma": numpy_of([g.grad for g in full.gammas]),
        "beta": numpy_of([b.grad for b in full.betas]),
    }[wanted]
    layer = kind(len(sizes), 5, "float32", grad_req="null")
    for x in xs:
        x.attach_grad("null")
    arrays = {"data": xs, "gamma": layer.gammas, "beta": layer.betas}[wanted]
    for array in arrays:
        array.attach_grad()
    with autograd.record():
        ys = layer(xs)
    for y, dy in zip(ys, dys):
        y.backward(dy)
    for array, w in zip(arrays, want):
        np.testing.assert_array_equal(array.grad.asnumpy(), w)


def test_fix_gamma_is_one_with_no_gradient(rng):
    xs, dys = shards_of(rng, (4, 5, 3), [2, 2], "float32")
    layer = Layer(2, 5, "float32", fix_gamma=True)
    check(layer, xs, dys, run(layer, xs, dys), TOLERANCE["float32"], 1, fix_gamma=True)


@pytest.mark.parametrize("how", ["use_global_stats", "inference", "alone"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_moving_statistics_are_used_and_nobody_waits(how, dtype, rng):
    (x,), (dy,) = shards_of(rng, (4, 5, 3), [4], dtype)
    parameter = "float64" if dtype == "float64" else "float32"
    # The other never comes.  (By a third, an average with itself would not stay the same.)
    layer = Layer(2, 5, parameter, momentum=1 / 3)
    mean, var = rng.randn(5).astype(parameter), (rng.rand(5) + 0.5).astype(parameter)
    for array, value in ((layer.means[0], mean), (layer.vars[0], var)):
        array[:] = mx.nd.array(value, dtype=parameter)
    if how != "inference":
        parameters = {
            "gamma": layer.gammas[0],
            "beta": layer.betas[0],
            "moving_mean": layer.means[0],
            "moving_var": layer.vars[0],
        }
        layer.forward = lambda i, x: mx.nd._internal._syncbn_batch_norm(
            data=x, use_global_stats=how == "use_global_stats", **parameters, **layer.options
        )
    train = how == "use_global_stats"
    x.attach_grad()
    with autograd.record(train_mode=train):
        y = layer.forward(0, x)
    y.backward(dy)
    statistics = layer.means[0].asnumpy().astype("float64"), layer.vars[0].asnumpy()
    for array, value in zip(statistics, (mean, var)):  # they have not moved
        np.testing.assert_array_equal(array, value)
    want = batch_norm([x.asnumpy()], [dy.asnumpy()], layer.gamma, layer.beta, statistics=statistics)
    assert largest_error(y.asnumpy(), want.y[0]) < TOLERANCE[dtype]
    assert largest_error(x.grad.asnumpy(), want.dx[0]) < TOLERANCE[dtype]
    assert largest_error(layer.gammas[0].grad.asnumpy(), want.dgamma[0]) < 1e-5
    assert largest_error(layer.betas[0].grad.asnumpy(), want.dbeta[0]) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("fix_gamma", [False, True])
@pytest.mark.parametrize("shape", [(5, 41, 60, 60), (3, 131, 40, 31)])
def test_alone_slice_by_slice(dtype, fix_gamma, shape, rng):
    """Large feature maps, of which a layer without all-reduce finishes a few channels at a time."""
    xs, dys = shards_of(rng, shape, [shape[0]], dtype)
    parameter = "float64" if dtype == "float64" else "float32"
    layer = Alone(1, shape[1], parameter, fix_gamma=fix_gamma)
    check(layer, xs, dys, run(layer, xs, dys), TOLERANCE[dtype], 1, fix_gamma)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("kind, sizes", [(Layer, [9, 7]), (Alone, [16])])
def test_a_large_offset_costs_nothing(axis, offset, kind, sizes, rng):
    """float32 data 1e4 standard deviations from zero, against float64 on the same numbers."""
    shape = (16, 4, 40, 40) if axis == 1 else (16, 40, 40, 4)
    xs, dys = shards_of(rng, shape, sizes, "float32", offset=offset)
    dys = [dy + 3 for dy in dys]  # so that an error in the mean shows in the sum over dy (x - mean)
    layer = kind(len(sizes), 4, "float32", axis=axis)
    ys = run(layer, xs, dys)
    want = batch_norm(numpy_of(xs), numpy_of(dys), layer.gamma, layer.beta, axis)
    for i in range(len(sizes)):
        assert largest_error(ys[i].asnumpy(), want.y[i]) < TOLERANCE["float32"]
        assert largest_error(xs[i].grad.asnumpy(), want.dx[i]) < TOLERANCE["float32"]


@pytest.mark.parametrize("shape, axis", [((16, 4, 40, 40), 1), ((16, 40, 40, 4), -1)])
@pytest.mark.parametrize("offset", [1e4, -1e6, 1e8])
@pytest.mark.parametrize("kind, sizes", [(Layer, [9, 7]), (Layer, [2, 5, 9]), (Alone, [16])])
def test_float64_far_from_zero(shape, axis, offset, kind, sizes, rng):
    """As exact as two passes over the data are, and more exact than NumPy's two."""
    xs, dys = shards_of(rng, shape, sizes, "float64", offset=offset)
    xs = [x + i for i, x in enumerate(xs)]  # the devices' means are apart
    dys = [dy + 3 for dy in dys]  # so that an error in the mean shows in the sum over dy (x - mean)
    layer = kind(len(sizes), 4, "float64", axis=axis, momentum=0.0)
    ys = numpy_of(run(layer, xs, dys))
    dxs = numpy_of([x.grad for x in xs])
    of_batch = numpy_of(dys), layer.gamma, layer.beta, axis
    want = batch_norm_far_from_zero(numpy_of(xs), offset, *of_batch)
    two_passes = batch_norm(numpy_of(xs), *of_batch)
    for got, theirs, wanted in ((ys, two_passes.y, want.y), (dxs, two_passes.dx, want.dx)):
        error = max(map(largest_error, got, wanted))
        assert error < max(map(largest_error, theirs, wanted))
    promised = 1e-15 * abs(offset)  # 1e-9 at 1e6
    for mean, var in zip(layer.means, layer.vars):
        np.testing.assert_allclose(var.asnumpy(), want.var, rtol=promised)
        # Its last place, and what the devices' last places are apart.
        np.testing.assert_allclose(mean.asnumpy(), want.mean, rtol=4e-16)


def test_float64_far_from_zero_slice_by_slice(rng):
    """The channels' offsets differ in size and sign."""
    offsets = np.array([1e6, -1e5, 1e4, 3.0] * 10 + [1e6])
    xs, dys = shards_of(rng, (5, 41, 60, 60), [5], "float64")
    x = xs[0].asnumpy() + offsets[:, None, None]
    near = x - offsets[:, None, None]
    layer = Alone(1, 41, "float64", momentum=0.0)
    (y,) = run(layer, [mx.nd.array(x, dtype="float64")], dys)
    want = batch_norm([near], numpy_of(dys), layer.gamma, layer.beta)
    np.testing.assert_allclose(layer.vars[0].asnumpy(), want.var, rtol=1e-12)
    assert largest_error(y.asnumpy(), want.y[0]) < 1e-10


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_far_first_element_costs_nothing(dtype, rng):
    """The sums are taken around a channel's first element, which may be far from all others."""
    xs, dys = shards_of(rng, (8, 3, 30, 30), [4, 4], dtype)
    for x in xs:
        x[0, :, 0, 0] = 1e3
    layer = Layer(2, 3, "float64" if dtype == "float64" else "float32")
    ys = run(layer, xs, dys)
    want = batch_norm(numpy_of(xs), numpy_of(dys), layer.gamma, layer.beta)
    for i in range(2):
        assert largest_error(ys[i].asnumpy(), want.y[i]) < TOLERANCE[dtype]


def test_constant_channels_and_single_elements():
    xs = [mx.nd.full((1, 2), 7.7, ctx=mx.cpu(i)) for i in range(2)]
    layer = Layer(2, 2, "float32")
    ys = run(layer, xs, [mx.nd.ones_like(x) for x in xs])
    for y in ys:
        np.testing.assert_allclose(y.asnumpy()[0], layer.beta, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "shape, axis, nothing",
    [
        ((7, 3), 1, (0, 3)),
        ((7, 3, 4, 4), 1, (0, 3, 4, 4)),
        ((7, 3, 4, 4), 1, (2, 3, 0, 4)),
        ((7, 4, 3), -1, (0, 4, 3)),
        ((7, 4, 3), -1, (2, 0, 3)),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_share_without_elements_is_as_if_it_were_absent(shape, axis, nothing, place, dtype, rng):
    xs, dys = shards_of(rng, shape, [4, 3], dtype)
    parameter = "float64" if dtype == "float64" else "float32"
    without = Layer(2, 3, parameter, axis=axis)
    ys = run(without, xs, dys)
    expected = list(zip(*map(numpy_of, (ys, [x.grad for x in xs], without.gammas, without.betas))))

    with mx.util.np_shape():
        place_for = [i for i in range(3) if i != place]
        xs, dys = (
            [a.as_in_context(mx.cpu(i)) for a, i in zip(arrays, place_for)] for arrays in (xs, dys)
        )
        for arrays in (xs, dys):
            arrays.insert(place, mx.nd.zeros(nothing, ctx=mx.cpu(place), dtype=dtype))
        layer = Layer(3, 3, parameter, axis=axis)
        ys = run(layer, xs, dys)
        got = list(zip(*map(numpy_of, (ys, [x.grad for x in xs], layer.gammas, layer.betas))))
        y, dx = got.pop(place)[:2]
        assert y.shape == dx.shape == nothing and y.dtype == dx.dtype == np.dtype(dtype)
    for ours, theirs in zip(got, expected):
        for a, b in zip(ours, theirs):
            np.testing.assert_array_equal(a, b)
    for parameters in (layer.gammas, layer.betas):
        assert not parameters[place].grad.asnumpy().any()
    for ours, theirs in ((layer.means, without.means), (layer.vars, without.vars)):
        assert {a.asnumpy().tobytes() for a in ours} == {theirs[0].asnumpy().tobytes()}


@pytest.mark.parametrize("shape, axis", [((0, 3), 1), ((2, 3, 0), 1), ((0, 4, 3), -1)])
@pytest.mark.parametrize("kind, devices", [(Layer, 1), (Layer, 2), (Alone, 1)])
@pytest.mark.parametrize("grad_req", ["write", "add"])
def test_without_any_elements_nothing_moves(shape, axis, kind, devices, grad_req):
    layer = kind(devices, 3, "float32", axis=axis, grad_req=grad_req, eps=0.0)
    with mx.util.np_shape():
        xs = [mx.nd.zeros(shape, ctx=mx.cpu(i)) for i in range(devices)]
        ys = run(layer, xs, xs, grad_req)
        for x, y in zip(xs, ys):
            assert x.grad.asnumpy().shape == y.asnumpy().shape == shape
    for array in layer.gammas + layer.betas:
        assert not array.grad.asnumpy().any()
    for mean, var in zip(numpy_of(layer.means), numpy_of(layer.vars)):
        np.testing.assert_array_equal(mean, 0)
        np.testing.assert_array_equal(var, 1)


def test_a_share_without_elements_brings_zeros():
    with mx.util.np_shape(), autograd.train_mode():
        _, brought, _ = mx.nd._internal._syncbn_moments(mx.nd.zeros((0, 3)))
        assert not brought.asnumpy().any()
    with autograd.predict_mode():
        _, brought, _ = mx.nd._internal._syncbn_moments(mx.nd.ones((2, 3)))
        assert brought.asnumpy().ravel()[-1] < 0  # statistics were not computed


@pytest.mark.parametrize("kind", [Layer, Alone])
def test_inference_without_elements(kind):
    layer = kind(1, 3, "float32")
    with mx.util.np_shape():
        (y,) = run(layer, [mx.nd.zeros((0, 3))], [mx.nd.zeros((0, 3))], train_mode=False)
        assert y.asnumpy().shape == (0, 3)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "kind, sizes", [(Alone, [1]), (Layer, [1]), (Layer, [1, 0]), (Layer, [0, 1])]
)
def test_one_value_per_channel(kind, sizes, dtype, rng):
    """It is its own mean, so y is beta and the gradient zero."""
    layer = kind(len(sizes), 3, "float64" if dtype == "float64" else "float32")
    with mx.util.np_shape():
        xs, dys = shards_of(rng, (1, 3), sizes, dtype, offset=100)
        ys = run(layer, xs, dys)
        for i, size in enumerate(sizes):
            y, dx = ys[i].asnumpy(), xs[i].grad.asnumpy()
            assert y.shape == dx.shape == (size, 3)
            if size == 0:
                continue
            np.testing.assert_allclose(y[0], layer.beta, rtol=TOLERANCE[dtype])
            # A part of gamma / sqrt(epsilon), by which the gradient would be multiplied.
            assert np.abs(dx).max() < 1e-6 * 1.5 / np.sqrt(1e-5)
            value = xs[i].asnumpy()[0].astype("float64")
            np.testing.assert_array_equal(layer.gammas[i].grad.asnumpy(), 0)
            np.testing.assert_allclose(layer.betas[i].grad.asnumpy(), dys[i].asnumpy()[0])
    for mean, var in zip(layer.means, layer.vars):
        np.testing.assert_allclose(mean.asnumpy(), 0.1 * value, rtol=1e-6)
        np.testing.assert_allclose(var.asnumpy(), 0.9, rtol=1e-6)


def test_not_a_number_stays_visible(rng):
    xs, dys = shards_of(rng, (4, 3, 5), [2, 2], "float32")
    xs[1][0, 1, 2] = np.nan
    ys = run(Layer(2, 3, "float32"), xs, dys)
    for y in numpy_of(ys):
        assert np.isnan(y[:, 1]).all() and np.isfinite(y[:, [0, 2]]).all()


def test_the_same_bits_on_every_run_in_every_order(rng):
    xs, dys = shards_of(rng, (9, 7, 13, 11), [2, 3, 4], "float32", offset=3)
    seen = set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]) * 3:
        layer = Layer(3, 7, "float32")
        for x in xs:
            x.attach_grad()
        ys = [None] * 3
        with autograd.record():
            for i in order:
                ys[i] = layer.forward(i, xs[i])
        for i in reversed(order):
            ys[i].backward(dys[i])
        results = ys + [x.grad for x in xs] + layer.means + layer.vars
        seen.add(b"".join(a.asnumpy().tobytes() for a in results))
        for means in (layer.means, layer.vars):  # equal on all devices
            assert len({m.asnumpy().tobytes() for m in means}) == 1
    assert len(seen) == 1


THREADS = """
import hashlib, itertools, mxnet as mx, numpy as np
from mxnet import autograd
import gluon_syncbn
digest = hashlib.sha256()
first, last = ((8, 6, 70, 70), (3000, 65), (40, 64, 7, 7), (5, 41, 60, 60)), ((8, 70, 70, 6),)
layouts = [(s, 1) for s in first] + [(s, -1) for s in last]
for (shape, axis), devices in itertools.product(layouts, (None, 1)):
    rng = np.random.RandomState(0)
    x, dy = (mx.nd.array(rng.randn(*shape) + 2) for _ in range(2))
    layer = gluon_syncbn.SyncBatchNorm(axis=axis, num_devices=devices)
    layer.initialize()
    x.attach_grad()
    with autograd.record():
        y = layer(x)
    y.backward(dy)
    for a in (y, x.grad, layer.gamma.grad(), layer.beta.grad(), layer.running_var.data()):
        digest.update(a.asnumpy().tobytes())
print(digest.hexdigest())
"""


def test_the_same_bits_with_any_number_of_threads():
    seen = {fresh_process.run(THREADS, OMP_NUM_THREADS=n).stdout for n in ("1", "2", "3")}
    assert len(seen) == 1 and seen != {""}


def test_momentum_and_epsilon(rng):
    xs, dys = shards_of(rng, (6, 3), [3, 3], "float32")
    layer = Layer(2, 3, "float32", momentum=0.25, eps=0.5)
    ys = run(layer, xs, dys)
    want = batch_norm(numpy_of(xs), numpy_of(dys), layer.gamma, layer.beta, epsilon=0.5)
    assert largest_error(ys[0].asnumpy(), want.y[0]) < TOLERANCE["float32"]
    np.testing.assert_allclose(layer.means[1].asnumpy(), 0.75 * want.mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(layer.vars[1].asnumpy(), 0.25 + 0.75 * want.var, rtol=1e-5)
