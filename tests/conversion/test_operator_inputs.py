"""Names of our operators' inputs: as the operators themselves list them."""

import mxnet as mx
import pytest

from gluon_syncbn.conversion.graph import Graph
from gluon_syncbn.conversion.operator_inputs import arguments_of, inputs_of, states_of


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
    ],
)
def test_names(op, options):
    sym = getattr(mx.sym._internal, op)(name="n", **options)
    (node,) = (node for node in Graph(sym[0]).nodes if node.op == op)
    arguments = [name[2:] for name in sym.list_arguments()]
    states = [name[2:] for name in sym.list_auxiliary_states()]
    assert list(arguments_of(node)) == arguments
    assert list(inputs_of(node)) == arguments + states
    assert [variable.name[2:] for variable, _ in states_of(node)] == states
