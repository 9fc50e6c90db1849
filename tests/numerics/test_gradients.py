"""Gradients in float64 against central differences of the layer's own forward pass.

Every element of every input: data, gamma, beta, the residual.  The loss is the sum of y * dy over
all devices, so each difference goes through the statistics of the whole batch.
"""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

from gluon_syncbn import MABN2d, ModelDataParallel, SyncBatchNorm, parallel_backward

# A central difference with step h has a truncation error of h^2 f''' / 6, and a rounding error of
# 1e-16 |loss| / h.  With numbers of about 1, their sum is least, some 1e-10, near h = 1e-5; third
# derivatives through 1 / sigma are larger, by one or two orders of magnitude.
STEP, TOLERANCE = 1e-5, 2e-8
CHANNELS = 3


class Network:
    """A layer on several devices, as a function from NumPy arrays to the loss and its gradients."""

    def __init__(self, layer, sizes, axis=1, weights=None, add=False, hybridize=None):
        self.rng = np.random.RandomState(7)
        self.contexts = [mx.cpu(i) for i in range(len(sizes))]
        self.layer, self.sizes, self.axis = layer, sizes, axis
        layer.cast("float64")
        layer.initialize(ctx=self.contexts)
        if hybridize is not None:
            layer.hybridize(**hybridize)
        self.model = ModelDataParallel(layer, self.contexts)
        shape = (sum(sizes), CHANNELS, 2, 1) if axis == 1 else (sum(sizes), 2, 1, CHANNELS)
        self.values = {
            "data": self.rng.randn(*shape) * 0.7 + 0.3,
            "gamma": self.rng.rand(CHANNELS) + 0.5,
            "beta": self.rng.randn(CHANNELS),
        }
        if add:
            self.values["add"] = self.rng.randn(*shape)
        self.weights = {
            None: None,
            "samples": self.rng.rand(shape[0]) + 0.1,
            "positions": self.rng.rand(*(n for i, n in enumerate(shape) if i != axis % 4)),
        }[weights]
        if self.weights is not None:
            self.weights.flat[0] = 0.0  # a sample, or a position, that does not count
        self.dy = self.rng.randn(*shape)

    def _shards(self, array):
        parts = np.split(array, np.cumsum(self.sizes)[:-1])
        return [mx.nd.array(p, ctx=c, dtype="float64") for p, c in zip(parts, self.contexts)]

    def _inputs(self, values):
        for name in ("gamma", "beta"):
            getattr(self.layer, name).set_data(mx.nd.array(values[name], dtype="float64"))
        return {name: self._shards(values[name]) for name in ("data", "add") if name in values}

    def _outputs(self, inputs):
        given = {name: arrays for name, arrays in inputs.items() if name != "data"}
        if self.weights is not None:
            given["weights"] = self._shards(self.weights)
        return self.model(inputs["data"], **given)

    def forward(self, values):
        with autograd.train_mode():
            return np.concatenate([y.asnumpy() for y in self._outputs(self._inputs(values))])

    def loss(self, values):
        return (self.forward(values) * self.dy).sum()

    def gradients(self):
        inputs = self._inputs(self.values)
        for arrays in inputs.values():
            for array in arrays:
                array.attach_grad()
        with autograd.record():
            ys = self._outputs(inputs)
        parallel_backward(ys, self._shards(self.dy))
        found = {
            name: np.concatenate([a.grad.asnumpy() for a in arrays])
            for name, arrays in inputs.items()
        }
        for name in ("gamma", "beta"):
            if getattr(self.layer, name).grad_req != "null":
                gradients = getattr(self.layer, name).list_grad()
                found[name] = sum(g.asnumpy() for g in gradients)
        return found

    def differences(self, name):
        found = np.zeros_like(self.values[name])
        for i in np.ndindex(found.shape):
            ends = []
            for step in (STEP, -STEP):
                moved = self.values[name].copy()
                moved[i] += step
                ends.append(self.loss({**self.values, name: moved}))
            found[i] = (ends[0] - ends[1]) / (2 * STEP)
        return found


def check(network):
    for name, gradient in network.gradients().items():
        differences = network.differences(name)
        assert np.abs(differences).max() > 1e-2, "nothing depends on it"
        np.testing.assert_allclose(gradient, differences, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("sizes", [[3], [1, 2], [2, 1, 1]])
@pytest.mark.parametrize("options", [{}, {"axis": -1}, {"scale": False}, {"epsilon": 0.5}])
def test_plain(sizes, options):
    check(Network(SyncBatchNorm(in_channels=CHANNELS, **options), sizes, options.get("axis", 1)))


@pytest.mark.parametrize("sizes", [[3], [1, 2]])
@pytest.mark.parametrize(
    "activation, add",
    [(None, True), ("relu", False), ("relu", True), ("leaky_relu", False), ("leaky_relu", True)],
)
def test_activation_and_residual(sizes, activation, add):
    # A difference across the kink of the activation would be the mean of two slopes.
    plain = Network(SyncBatchNorm(in_channels=CHANNELS), sizes, add=add)
    assert np.abs(plain.forward(plain.values)).min() > 100 * STEP
    layer = SyncBatchNorm(in_channels=CHANNELS, activation=activation, slope=0.3)
    check(Network(layer, sizes, add=add, hybridize={}))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("weights", ["samples", "positions"])
def test_weights(axis, weights, sizes=(1, 3)):
    check(Network(SyncBatchNorm(in_channels=CHANNELS, axis=axis), sizes, axis, weights))


@pytest.mark.parametrize("sizes", [[3], [1, 2]])
def test_renormalization_at_its_limits(sizes):
    """Where r and d are at their limits, they are constants forward as they always are backward."""
    clipping = {"rmin": 1.3, "rmax": 1.3, "dmax": 0.02}
    layer = SyncBatchNorm(in_channels=CHANNELS, renorm=True, renorm_clipping=clipping)
    check(Network(layer, sizes))


@pytest.mark.parametrize("sizes", [[3], [1, 2]])
def test_moving_averages_in_warm_up(sizes):
    """Later, the gradient is an average over iterations by design, and not of this loss."""
    layer = MABN2d(CHANNELS, 2, 8, warmup_iters=100000, num_devices=None)
    check(Network(layer, sizes))


@pytest.mark.parametrize("sizes", [[3], [1, 2]])
def test_by_moving_statistics(sizes):
    check(Network(SyncBatchNorm(in_channels=CHANNELS, use_global_stats=True), sizes))
