"""A network's blocks, and which of them have changed."""

import mxnet as mx
from mxnet import gluon
from mxnet.gluon import nn

from gluon_syncbn import ModelDataParallel, networks
from gluon_syncbn.mxnet_private import graph_of, is_traced


def nested():
    """A network in a network, with one layer that both share."""
    shared = nn.Dense(2)
    inner, outer = nn.HybridSequential(), nn.HybridSequential()
    inner.add(shared, nn.Dense(2))
    outer.add(inner, shared)
    return outer


def test_all_blocks_and_shared_ones_once():
    net = nested()
    found = networks.blocks_of(net)
    assert found[0] is net and len(found) == 4
    assert {id(block) for block in found} == {id(b) for b in (net, net[0], net[0][0], net[0][1])}
    single = nn.Dense(1)
    assert networks.blocks_of(single) == [single]


def test_a_block_that_is_registered_in_itself():
    net = nn.Sequential()
    net.add(net)
    assert networks.blocks_of(net) == [net]


def test_instances_in_lists_tuples_and_dicts():
    value = [1, ("a", {"b": 2, 3: "c"}), [], None, {4}]
    assert list(networks.instances_in(value, int)) == [1, 2]
    assert list(networks.instances_in(value, (str, type(None)))) == ["a", "c", None]
    assert list(networks.instances_in(value, list)) == [value]  # and not what is in it
    assert list(networks.instances_in(5, int)) == [5] and not list(networks.instances_in(5, str))


def test_unwrap(two):
    net = nn.Dense(1)
    assert networks.unwrap(ModelDataParallel(net, two)) is net
    assert networks.unwrap(net) is net and networks.unwrap(None) is None


def test_a_change_shows_in_the_block_and_in_all_above_it():
    net, other = nested(), nested()
    before = networks.graph_version()
    assert not networks.changed_since(net, before)
    networks.mark_changed(net[0][1])
    after = networks.graph_version()
    assert after > before
    assert networks.changed_since(net, before) and networks.changed_since(net[0], before)
    assert not networks.changed_since(net[1], before)
    assert not networks.changed_since(other, before)
    assert not networks.changed_since(net, after)


def test_traces_of_all_blocks_are_forgotten():
    net = nested()
    net.initialize()
    net.hybridize()
    for block in (net, net[0]):
        block(mx.nd.ones((1, 2)))
    assert is_traced(net) and is_traced(net[0])
    networks.forget_traces(net)
    assert not is_traced(net) and not is_traced(net[0])
    wrapped = nn.Sequential()  # which itself has no trace
    wrapped.add(net)
    net(mx.nd.ones((1, 2)))
    networks.forget_traces(wrapped)
    assert not is_traced(net)


def test_another_graph_for_a_symbol_block():
    x = mx.sym.var("x")
    block = gluon.SymbolBlock(x + 1, x)
    assert block(mx.nd.ones(1)).asscalar() == 2
    before = networks.graph_version()
    networks.set_graph(block, x + 10)
    assert block(mx.nd.ones(1)).asscalar() == 11
    assert networks.changed_since(block, before)
    assert "10" in graph_of(block).tojson()
