"""Names of our operators' inputs: as the operators themselves list them."""

import mxnet as mx
import pytest

from gluon_syncbn import SyncBatchNorm
from gluon_syncbn.conversion.graph import Graph
from gluon_syncbn.conversion.operator_inputs import (
    arguments_of,
    check_operators,
    count_outputs,
    inputs_of,
    states_of,
)


@pytest.mark.parametrize(
    "op, options",
    [
        ("_syncbn_normalize", {}),
        ("_syncbn_normalize", {"add": True, "cumulative_average": True}),
        ("_syncbn_batch_norm", {}),
        ("_syncbn_batch_norm", {"add": True}),
        ("_syncbn_batch_norm", {"cumulative_average": True}),
        ("_syncbn_batch_norm", {"renorm": True}),
        ("_syncbn_normalize", {"renorm": True, "cumulative_average": True}),
        ("_syncbn_mabn_moments", {}),
        ("_syncbn_mabn_normalize", {}),
        ("_syncbn_moments", {}),
        ("_syncbn_moments", {"weighted": True}),
        ("_syncbn_sum", {"key": "k"}),
        ("_contrib_KeyBarrierSum", {"key": "k", "num_devices": 2}),
    ],
)
def test_names(op, options):
    module = mx.sym.contrib if op.startswith("_contrib_") else mx.sym._internal
    sym = getattr(module, op.replace("_contrib_", ""))(name="n", **options)
    (node,) = (node for node in Graph(sym[0]).nodes if node.op == op)
    arguments = [name[2:] for name in sym.list_arguments()]
    states = [name[2:] for name in sym.list_auxiliary_states()]
    assert list(arguments_of(node)) == arguments
    assert list(inputs_of(node)) == arguments + states
    assert [variable.name[2:] for variable, _ in states_of(node)] == states
    outputs = set(sym.get_internals().list_outputs()) - set(sym.list_inputs())
    assert count_outputs(node) == len(outputs)
    check_operators(Graph(sym[0]))


def replaced(**changes):
    """The graph of a layer, with one of its nodes changed."""
    layer = SyncBatchNorm(in_channels=3, prefix="layer_")
    graph = Graph(layer(mx.sym.var("x")))
    (node,) = (node for node in graph.nodes if node.op == "_syncbn_sum")
    for name, value in changes.items():
        setattr(node, name, value(node))
    return graph


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"inputs": lambda n: n.inputs[:1]}, "has 1 inputs, but takes statistics, moving_mean"),
        ({"inputs": lambda n: n.inputs * 2}, "has 4 inputs"),
        ({"inputs": lambda n: [n.inputs[0]] * 2}, "the result of .*moments as its moving_mean"),
        ({"inputs": lambda n: [(n.inputs[0][0], 3), n.inputs[1]]}, "has no output 3"),
        ({"inputs": lambda n: [(n.inputs[0][0], -1), n.inputs[1]]}, "has no output -1"),
        ({"op": lambda n: "_backward__syncbn_sum"}, "is no operator of a network"),
        ({"attrs": lambda n: {**n.attrs, "__group_size__": "-2"}}, "must be a positive integer"),
    ],
)
def test_what_no_file_of_ours_has(changes, message):
    check_operators(replaced())
    with pytest.raises(ValueError, match=message):
        check_operators(replaced(**changes))
