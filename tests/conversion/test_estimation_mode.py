"""The state in which statistics are estimated: entered, and left without a trace."""

import mxnet as mx
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import ConversionError, SyncBatchNorm
from gluon_syncbn.conversion.estimation_mode import estimation_mode
from gluon_syncbn.conversion.graph import Graph


def network():
    x = mx.sym.Dropout(mx.sym.BatchNorm(mx.sym.var("data"), name="bn"), p=0.5, mode="always")
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(), nn.Dropout(0.5), SyncBatchNorm())
    net.add(gluon.SymbolBlock(x, mx.sym.var("data")))
    net.initialize()
    net.hybridize()
    net(mx.nd.ones((2, 3)))
    return net


def graph(net):
    """The operators and their parameters, without the number that each tracing gives."""
    return [
        (node.op, {**node.attrs, "call": None}) for node in Graph(net(mx.sym.var("data"))).nodes
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_it_is_left_as_it_was_entered(fails):
    net = network()
    before, traced = graph(net), net._cached_graph
    kinds, settings = [type(layer) for layer in net], dict(net[0]._kwargs)
    try:
        with estimation_mode(net):
            assert type(net[0]) is SyncBatchNorm and net[0].group_size == 1
            found = graph(net)
            dropouts = [attrs["p"] for op, attrs in found if op == "Dropout"]
            assert dropouts == ["0"] and "BatchNorm" not in [op for op, _ in found]
            x = mx.nd.random.normal(shape=(4, 3)) + 5
            with autograd.train_mode():
                assert net(x).asnumpy().all()
            assert net[0].running_mean.data().asnumpy().min() > 0.1
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [type(layer) for layer in net] == kinds and net[0]._kwargs == settings
    assert net._cached_graph is traced and graph(net) == before
    with autograd.train_mode():
        assert (net(mx.nd.random.normal(shape=(20, 3))).asnumpy() == 0).any()


def test_what_cannot_be_converted_is_refused_and_nothing_changes():
    net = network()
    net.add(nn.BatchNormReLU())
    kinds = [type(layer) for layer in net]
    with pytest.raises(ConversionError, match="BatchNormReLU"):
        with estimation_mode(net):
            raise AssertionError
    assert [type(layer) for layer in net] == kinds and net[1]._rate == 0.5
