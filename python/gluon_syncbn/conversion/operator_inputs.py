"""The inputs of our operators in a graph, by name: a symbol's JSON has them by number."""

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
    "_syncbn_normalize": (_CHAINED, _MOVING),
    "_syncbn_batch_norm": (("data", "gamma", "beta"), _MOVING),
    "_syncbn_mabn_moments": (("data",), {"buffer_gz": None}),
    "_syncbn_mabn_normalize": (_CHAINED, dict.fromkeys(("running_var", "buffer_x2", "iters"))),
}


def arguments_of(node):
    """List the names of a node's arguments."""
    arguments, _ = _NAMES[node.op]
    return (*arguments, "residual") if node.flag("add", False) else arguments


def inputs_of(node):
    """Map the names of a node's arguments and auxiliary states to (node, output)."""
    _, states = _NAMES[node.op]
    present = [s for s, option in states.items() if option is None or node.flag(option, False)]
    return dict(zip((*arguments_of(node), *present), node.inputs))


def states_of(node):
    """List a node's auxiliary states as (node, output)."""
    return node.inputs[len(arguments_of(node)) :]
