"""MABN2d: against a transcription in NumPy, across its switches, and as a part of Gluon."""

import functools

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

from gluon_syncbn import MABN2d, ModelDataParallel, parallel_backward
from moving_average_reference import MovingAverage
from networks import MODES, STATIC
from reference import largest_error

CONTEXTS = [mx.cpu(0), mx.cpu(1)]
TOLERANCE = {"float16": 3e-3, "float32": 2e-5, "float64": 1e-11}


def check_states(layer, reference, tolerance=1e-5, context=None):
    for name, wanted in reference.states.items():
        got = getattr(layer, name).data(context).asnumpy()
        assert largest_error(got, wanted) < tolerance, name


class Training:
    """A layer and its reference, which take the same steps."""

    def __init__(self, layer, contexts=CONTEXTS[:1], hybridize=None, dtype="float32", seed=0):
        self.layer, self.contexts, self.dtype = layer, list(contexts), dtype
        self.rng = np.random.RandomState(seed)
        settings = layer._settings
        self.reference = MovingAverage(
            layer.gamma.shape[0],
            layer.buffer_size,
            settings["momentum"],
            settings["epsilon"],
            settings["warmup_iters"],
        )
        layer.cast(dtype)
        layer.initialize(ctx=self.contexts)
        self.gamma, self.beta = (self.rng.rand(2, layer.gamma.shape[0]) + 0.5).astype("float32")
        layer.gamma.set_data(mx.nd.array(self.gamma))
        layer.beta.set_data(mx.nd.array(self.beta))
        if hybridize is not None:
            layer.hybridize(**hybridize)
        self.model = ModelDataParallel(layer, self.contexts)

    def shards(self, sizes, scale=1.0, offset=0.0):
        channels = len(self.gamma)
        shards = [self.rng.randn(n, channels, 2, 3) * scale + offset for n in sizes]
        # What the layer gets.
        return [shard.astype(self.dtype).astype("float64") for shard in shards]

    def arrays(self, shards):
        return [mx.nd.array(s, ctx=c, dtype=self.dtype) for s, c in zip(shards, self.contexts)]

    def step(self, sizes=(2,), scale=1.0, check=True):
        """Take a step; compare the output and the gradients."""
        x, dy = self.shards(sizes, scale, offset=0.3), self.shards(sizes)
        inputs = self.arrays(x)
        for array in inputs:
            array.attach_grad()
        with autograd.record():
            outputs = self.model(inputs)
        parallel_backward(outputs, self.arrays(dy))
        wanted, saved = self.reference.forward(np.concatenate(x), self.gamma, self.beta)
        dx, dgamma, dbeta = self.reference.backward(np.concatenate(dy), saved)
        if not check:
            return
        got = {
            "y": (np.concatenate([y.asnumpy() for y in outputs]), wanted),
            "dx": (np.concatenate([a.grad.asnumpy() for a in inputs]), dx),
            "dgamma": (sum(self.layer.gamma.grad(c).asnumpy() for c in self.contexts), dgamma),
            "dbeta": (sum(self.layer.beta.grad(c).asnumpy() for c in self.contexts), dbeta),
        }
        for name, (have, want) in got.items():
            error = largest_error(have, want)
            assert error < TOLERANCE[self.dtype], (self.reference.iters, name, error)

    def check(self):
        mx.nd.waitall()
        for context in self.contexts:
            check_states(self.layer, self.reference, TOLERANCE[self.dtype], context)
        x = self.shards([2])
        wanted = self.reference.inference(x[0], self.gamma, self.beta)
        got = self.layer(*self.arrays(x)).asnumpy()
        assert largest_error(got, wanted) < TOLERANCE[self.dtype]


make = functools.partial(MABN2d, 3, 2, 8)


def test_1200_iterations_across_both_switches():
    """Averages begin after 100 iterations, and r after 1000."""
    training = Training(make(), hybridize=STATIC, dtype="float64")
    for i in range(1200):
        # The scale changes slowly and in jumps, so that r takes all of its range.
        scale = 1 + 0.5 * np.sin(i / 30) if i % 40 < 20 else 12.0
        training.step(scale=scale)
    assert training.reference.iters == 1200
    training.check()


@pytest.mark.parametrize("hybridize", MODES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_modes_and_types(hybridize, dtype):
    training = Training(make(warmup_iters=6), hybridize=hybridize, dtype=dtype)
    training.layer.iters.set_data(mx.nd.array([0]))
    for step in range(12):
        training.step([1 + step % 3])
    training.check()
    kind = "float64" if dtype == "float64" else "float32"
    assert {np.dtype(p.dtype).name for p in training.layer.collect_params().values()} == {kind}


@pytest.mark.parametrize("hybridize", MODES)
def test_synchronized_with_uneven_shards_and_idle_devices(hybridize):
    """The states are the same on all devices, also on those that had no input."""
    training = Training(make(num_devices=None, warmup_iters=0), CONTEXTS, hybridize)
    for sizes in ([2, 3], [1, 1], [2], [3, 1], [2], [4], [2, 2], [1, 2], [3, 3], [2], [1]):
        training.step(sizes)
    training.check()
    for parameter in training.layer.collect_params().values():
        assert len({a.asnumpy().tobytes() for a in parameter.list_data()}) == 1, parameter.name


@pytest.mark.parametrize("hybridize", MODES)
def test_each_device_by_itself(hybridize):
    layer = make(warmup_iters=0)
    layer.initialize(ctx=CONTEXTS)
    if hybridize is not None:
        layer.hybridize(**hybridize)
    model = ModelDataParallel(layer, CONTEXTS)
    references = [MovingAverage(3, 4, warmup_iters=0) for _ in CONTEXTS]
    rng = np.random.RandomState(0)
    gamma, beta = np.ones(3), np.zeros(3)
    for _ in range(9):
        xs, dys = rng.randn(2, 2, 2, 3, 2, 2)
        inputs = [mx.nd.array(x, ctx=c) for x, c in zip(xs, CONTEXTS)]
        for array in inputs:
            array.attach_grad()
        with autograd.record():
            outputs = model(inputs)
        parallel_backward(outputs, [mx.nd.array(dy, ctx=c) for dy, c in zip(dys, CONTEXTS)])
        for x, dy, array, y, reference in zip(xs, dys, inputs, outputs, references):
            wanted, saved = reference.forward(x, gamma, beta)
            assert largest_error(y.asnumpy(), wanted) < 2e-5
            assert largest_error(array.grad.asnumpy(), reference.backward(dy, saved)[0]) < 2e-5
    mx.nd.waitall()
    for context, reference in zip(CONTEXTS, references):
        check_states(layer, reference, context=context)
