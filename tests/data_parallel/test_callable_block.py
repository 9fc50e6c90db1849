"""Callables that run a network, in the place of a Block."""

import functools

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

from gluon_syncbn import (
    ModelDataParallel,
    SyncBatchNorm,
    parallel_backward,
)
from networks import (
    EvalModel,
    SegmentationNet,
    split,
)


def bound(net):
    return EvalModel(net)


def closure(net):
    def run(x):
        return net.evaluate(x)

    run.collect_params = net.collect_params
    return run


def partial(net):
    run = functools.partial(lambda net, x: net.evaluate(x), net)
    run.collect_params = net.collect_params
    return run


def nested(net):
    return EvalModel(Evaluates({"nets": [net]}))


class Evaluates:
    def __init__(self, nets):
        self.nets = nets

    def evaluate(self, x):
        return self.nets["nets"][0].evaluate(x)

    def collect_params(self):
        return self.nets["nets"][0].collect_params()

    __call__ = evaluate


@pytest.mark.parametrize("make", [bound, closure, partial, nested])
def test_a_callable_that_is_no_block(make, two, rng):
    """Its layers are found, given their number of devices, initialized and synchronized."""
    net = SegmentationNet(False)
    net.initialize()
    function = make(net)
    model = ModelDataParallel(function, two)
    assert model.module is function
    assert model.collect_params().keys() == net.collect_params().keys()
    x = rng.randn(4, 3, 8, 8).astype("float32")
    for contexts in (two, two[:1]):
        with autograd.record():
            outs = model(split(x, contexts))
        parallel_backward(outs)
    mx.nd.waitall()
    statistics = net.body[1].running_mean
    conv = net.body[0](mx.nd.array(x)).asnumpy().mean((0, 2, 3))
    for context in two:
        np.testing.assert_allclose(
            statistics.data(context).asnumpy(), conv * (1 - 0.9**2), rtol=1e-4, atol=1e-6
        )


def test_a_callable_whose_network_is_not_found(two):
    class Hidden:
        __slots__ = ("net",)

        def __call__(self, x):
            return self.net(x)

        def collect_params(self):
            return self.net.collect_params()

    hidden = Hidden()
    hidden.net = SyncBatchNorm(prefix="hidden_")
    with pytest.raises(TypeError, match="Hidden has the parameter hidden_gamma.* as an attribute"):
        ModelDataParallel(hidden, two)
