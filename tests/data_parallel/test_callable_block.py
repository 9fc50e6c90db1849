"""Callables that run a network, in the place of a Block."""

import copy
import functools

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from gluon_syncbn.data_parallel.callable_block import CallableBlock, as_block
from gluon_syncbn.mxnet_private import children
from networks import EvalModel, SegmentationNet, split


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


def test_a_block_stays_as_it_is():
    net = SyncBatchNorm()
    assert as_block(net) is net


@pytest.mark.parametrize("bad", [None, 3, [SyncBatchNorm()], len])
def test_what_is_no_network(bad):
    kind = type(bad).__name__
    with pytest.raises(TypeError, match=f"a callable with collect_params, but is {kind}"):
        as_block(bad)


def test_a_callable_that_refers_to_itself_and_to_nothing_yet():
    """A cycle, a variable of a closure that has no value yet, and a class that has a layer."""
    net = SyncBatchNorm(in_channels=2)

    class Holds:
        unused = SyncBatchNorm()

    def run(x):
        return later(net(x))

    run.itself, run.kind, run.nets = [run], Holds, {"a": (net,)}
    run.collect_params = net.collect_params
    assert children(as_block(run)) == [net]

    def later(x):
        return x


def test_a_callable_block_is_what_it_calls():
    net = SyncBatchNorm(in_channels=2, prefix="inner_")
    block = as_block(EvalModel(Evaluates({"nets": [net]})))
    assert block.module.nets["nets"] == [net] and repr(block) == repr(block.function)
    assert block.collect_params().keys() == net.collect_params().keys()
    assert list(CallableBlock(closure(net)).collect_params(".*gamma")) == ["inner_gamma"]
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = block.nothing_here
    assert copy.copy(block).function is block.function


def test_a_callable_without_parameters():
    block = CallableBlock(lambda x, scale=1: x * scale)
    assert block(3, scale=2) == 6 and list(block.collect_params()) == []
