"""A symbol as nodes that can be edited, and back."""

import mxnet as mx
import numpy as np
import pytest

from gluon_syncbn.conversion.graph import Graph, Node


def run(sym, **values):
    executor = sym.bind(mx.cpu(), {k: mx.nd.array(v) for k, v in values.items()})
    return [y.asnumpy().tolist() for y in executor.forward()]


def loop(x, state):
    """Two loops, one inside the other."""

    def inner(data, state):
        return mx.sym.exp(data, name="deep"), state

    def outer(data, state):
        return mx.sym.contrib.foreach(inner, mx.sym.sin(data), state)[0], state

    return mx.sym.contrib.foreach(outer, x, state, name="loop")[0]


def test_what_is_not_edited_stays():
    x, y = mx.sym.var("x", __note__="kept", shape=(4,)), mx.sym.var("y")
    left, right = mx.sym.split(x, num_outputs=2, axis=0, name="cut")
    sym = mx.sym.Group([right * y, left, x, loop(x.reshape((1, 1, 4)), y)])
    again = Graph(sym).symbol()
    assert again.list_inputs() == sym.list_inputs()
    assert again.list_outputs() == sym.list_outputs()
    assert again.attr_dict() == sym.attr_dict()
    values = {"x": [1, 2, 3, 4], "y": [10, 20]}
    assert run(again, **values) == run(sym, **values)
    assert run(again, **values)[:2] == [[30, 80], [1, 2]]


def test_a_variable_alone():
    again = Graph(mx.sym.var("x")).symbol()
    assert again.list_arguments() == again.list_outputs() == ["x"]


@pytest.mark.parametrize("kind", [mx.sym.Symbol, mx.sym.numpy._Symbol])
def test_the_kind_stays(kind):
    x = mx.sym.var("x")
    x = x.as_np_ndarray() if kind is not mx.sym.Symbol else x
    assert type(Graph(x + 1).symbol()) is kind


def test_networks_deeper_than_pythons_stack():
    x = mx.sym.var("x")
    for _ in range(3000):
        x = x + 1
    graph = Graph(x)
    assert len(graph.nodes) == 3001 and graph.nodes[0].is_variable
    assert run(graph.symbol(), x=[1]) == [[3001]]


def test_casts_of_mixed_precision():
    sym = mx.sym.amp_cast(mx.sym.var("x"), dtype="float16") + 1
    assert [n.op for n in Graph(sym).nodes] == ["null", "amp_cast", "_plus_scalar"]
    assert [n.op for n in Graph(sym, remove_amp_cast=True).nodes] == ["null", "_plus_scalar"]


def test_who_reads_what():
    x = mx.sym.var("x")
    parts = mx.sym.split(x, num_outputs=2, axis=0, name="cut")
    graph = Graph(mx.sym.Group([parts[1] * parts[1], parts[0], parts[1], x]))
    data, cut, product = graph.nodes
    uses = graph.uses()
    assert uses[id(data)] == [(cut, 0), (None, 0)]
    assert uses[id(cut)] == [(product, 1), (product, 1), (None, 0), (None, 1)]
    assert uses[id(product)] == [(None, 0)]


def test_replacing_nodes():
    """Also by one that is itself replaced, where a new node reads it, and where it is a head."""
    x = mx.sym.var("x")
    exp = mx.sym.exp(x)
    graph = Graph(mx.sym.Group([mx.sym.sin(exp), exp]))
    data, exp, sin = graph.nodes
    doubled = Node("_mul_scalar", "doubled", {"scalar": 2}, exp.inputs)
    more = Node("_plus_scalar", "more", {"scalar": 1}, [(exp, 0)])
    graph.replace({sin: more, exp: doubled})
    assert graph.nodes == [data, doubled, more]
    assert run(graph.symbol(), x=[3]) == [[7], [6]]
    graph.replace({doubled: sin, sin: exp})
    assert graph.nodes == [data, exp, more]


def test_outputs_of_a_replaced_node_are_those_of_the_new_one():
    parts = mx.sym.split(mx.sym.var("x"), num_outputs=2, axis=0, name="cut")
    graph = Graph(mx.sym.Group([parts[1], parts[0] + 1]))
    old = graph.nodes[1]
    graph.replace({old: Node(old.op, "new", old.attrs, old.inputs)})
    sym = graph.symbol()
    assert run(sym, x=[1, 2]) == [[2], [2]] and sym.list_outputs()[0] == "new_output1"


@pytest.mark.parametrize(
    "written, value", [("True", True), ("true", True), ("1", True), ("False", False), ("0", False)]
)
def test_flags(written, value):
    node = Node("op", "name", {"flag": written})
    assert node.flag("flag", not value) is value
    assert node.flag("missing", value) is value


def test_attributes_of_the_user():
    node = Node("op", "name", {"axis": "1", "__note__": "kept"})
    assert node.user_attrs == {"__note__": "kept"} and not Node("null", "x").user_attrs


def test_nodes_in_the_bodies_of_loops():
    graph = Graph(loop(mx.sym.var("x"), mx.sym.var("y")))
    (node,) = [n for n in graph.nodes if n.op == "_foreach"]
    assert {"sin", "exp", "_foreach", "null"} <= node.operators_inside()
    assert [n.name for n in node.inside() if n.op == "exp"] == ["deep"]
    assert not graph.nodes[0].inside() and graph.nodes[0].operators_inside() == set()


def test_numbers_in_attributes_are_written_as_text():
    x = Node("null", "x")
    graph = Graph(mx.sym.var("x"))
    graph.heads = [(Node("_mul_scalar", "product", {"scalar": 2.5}, [(x, 0)]), 0)]
    np.testing.assert_array_equal(run(graph.symbol(), x=[2]), [[5]])


@pytest.mark.parametrize(
    "text", ["слой 層 🙂", '"\\"', "\n\r\t", "\x01\b\f\x1f\x7f", "\\u0041 \\b \\\\"]
)
def test_names_and_attributes_of_any_characters(text):
    """MXNet's JSON has other escapes than Python's."""
    sym = mx.sym.var(text) + mx.sym.var("y", __note__=text)
    again = Graph(sym).symbol()
    assert again.list_inputs() == sym.list_inputs() == [text, "y"]
    assert again.attr_dict() == sym.attr_dict()
