"""The inputs of our operators in a graph, by name: a symbol's JSON has them by number.

MXNet does not count them when it loads a file.  With too few it crashes when it differentiates the
graph (``OpPropGradient`` in its ``src/nnvm/legacy_op_util.cc``), and so it does where an output is
read that does not exist.  So both are counted here first.
"""

from ..operators import group_size_of

_CHAINED = "data", "statistics", "backward_context", "gamma", "beta"
# auxiliary state -> the option that it comes with
_MOVING = {
    "moving_mean": None,
    "moving_var": None,
    "num_batches_tracked": "cumulative_average",
    "renorm_mean": "renorm",
    "renorm_stddev": "renorm",
}
# operator -> (arguments, auxiliary states)
_NAMES = {
    "_contrib_KeyBarrierSum": (("data",), {}),
    "_syncbn_moments": (("data",), {}),
    "_syncbn_sum": (("statistics",), {"moving_mean": None}),
    "_syncbn_normalize": (_CHAINED, _MOVING),
    "_syncbn_batch_norm": (("data", "gamma", "beta"), _MOVING),
    "_syncbn_mabn_moments": (("data",), {"buffer_gz": None}),
    "_syncbn_mabn_normalize": (_CHAINED, dict.fromkeys(("running_var", "buffer_x2", "iters"))),
}
_HAVE_THREE_OUTPUTS = "_syncbn_moments", "_syncbn_mabn_moments"
_BACKWARD = "_backward_"
# option -> the argument that comes with it
_OPTIONAL = {"add": "residual", "weighted": "weights"}


def arguments_of(node):
    """List the names of a node's arguments."""
    arguments, _ = _NAMES[node.op]
    return (*arguments, *(name for o, name in _OPTIONAL.items() if node.flag(o, False)))


def _names_of(node):
    _, states = _NAMES[node.op]
    present = (s for s, option in states.items() if option is None or node.flag(option, False))
    return (*arguments_of(node), *present)


def count_outputs(node):
    """Count a node's outputs, without hidden ones, which nothing in a file reads."""
    return 3 if node.op in _HAVE_THREE_OUTPUTS else 1


def inputs_of(node):
    """Map the names of a node's arguments and auxiliary states to (node, output)."""
    return dict(zip(_names_of(node), node.inputs))


def states_of(node):
    """List a node's auxiliary states as (node, output)."""
    return node.inputs[len(arguments_of(node)) :]


def check_operators(graph):
    """Raise ValueError if one of our operators in a graph does not have the inputs that it needs.

    Files that MXNet or this package has written are right; others may have any content.
    """

    def refuse(node, why):
        raise ValueError(
            f"{node.name} ({node.op}) {why}; the file that it was loaded from is damaged, or was "
            "not written by net.export or Symbol.save"
        )

    for source, output in (*graph.heads, *(entry for node in graph.nodes for entry in node.inputs)):
        if source.op in _NAMES and not 0 <= output < count_outputs(source):
            refuse(source, f"has no output {output}, which is read")
    for node in graph.nodes:
        if node.op.startswith(_BACKWARD) and node.op[len(_BACKWARD) :] in _NAMES:
            refuse(node, "is no operator of a network")  # it has no gradient, and MXNet takes one
        if node.op not in _NAMES:
            continue
        names = _names_of(node)
        if len(node.inputs) != len(names):
            refuse(node, f"has {len(node.inputs)} inputs, but takes {', '.join(names)}")
        for (source, _), name in zip(states_of(node), names[len(arguments_of(node)) :]):
            if not source.is_variable:
                refuse(node, f"has the result of {source.name} as its {name}, not a variable")
        group_size_of(node.attrs)
