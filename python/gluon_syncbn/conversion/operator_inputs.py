"""The inputs of our operators in a graph, by name: a symbol's JSON has them by number."""

_CHAINED = "data", "statistics", "backward_context", "gamma", "beta"
_MOVING = "moving_mean", "moving_var", "num_batches_tracked", "renorm_mean", "renorm_stddev"
# auxiliary state -> the option without which a node does not have it
_OPTIONAL = {
    "num_batches_tracked": "cumulative_average",
    "renorm_mean": "renorm",
    "renorm_stddev": "renorm",
}
# operator -> (arguments, auxiliary states)
_NAMES = {
    "_syncbn_normalize": (_CHAINED, _MOVING),
    "_syncbn_batch_norm": (("data", "gamma", "beta"), _MOVING),
    "_syncbn_mabn_moments": (("data",), ("buffer_gz",)),
    "_syncbn_mabn_normalize": (_CHAINED, ("running_var", "buffer_x2", "iters")),
}


def arguments_of(node):
    """List the names of a node's arguments."""
    arguments, _ = _NAMES[node.op]
    return (*arguments, "residual") if node.flag("add", False) else arguments


def inputs_of(node):
    """Map the names of a node's arguments and auxiliary states to (node, output)."""
    _, states = _NAMES[node.op]
    states = [s for s in states if s not in _OPTIONAL or node.flag(_OPTIONAL[s], False)]
    return dict(zip((*arguments_of(node), *states), node.inputs))


def states_of(node):
    """List a node's auxiliary states as (node, output)."""
    return node.inputs[len(arguments_of(node)) :]
