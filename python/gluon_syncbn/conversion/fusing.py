"""Normalization fused with the residual sum and the activation that follow, and split again.

A network that normalizes, adds a residual and applies relu, reads and writes each feature map three
times; the fused operator does it once.  It computes the same: in float32, bit for bit, where
numbers are finite.
"""

from ..sync_batch_norm import checked_activation
from .graph import Node
from .operator_inputs import arguments_of, inputs_of

NORMALIZATIONS = "_syncbn_normalize", "_syncbn_batch_norm"
# On a fused node: what the normalization and the sum were called, the sum possibly "".
_NAMES = "__fused_names__"
# On a fused node: the normalization was the first one in the sum.
_FIRST = "__fused_first__"


def _activation_of(node):
    """Return the options of the activation that a node is, or None."""
    kind = node.attrs.get("act_type")
    if node.op == "relu" or (node.op == "Activation" and kind == "relu"):
        return checked_activation("relu", 0)
    slope = float(node.attrs.get("slope", 0.25))
    if node.op == "LeakyReLU" and kind in (None, "leaky") and slope >= 0:
        return checked_activation("leaky_relu", slope)
    return None


def fuse(graph, gammas=None):
    """Fuse what follows each of our normalizations in a :class:`Graph`; return how many were fused.

    What other nodes read as well stays.  ``gammas``: names of the gammas of the layers to fuse;
    None for all.
    """
    uses = graph.uses()

    def only_reader(node):
        readers = uses[id(node)]
        return readers[0][0] if len(readers) == 1 and readers[0][1] == 0 else None

    new, sums = {}, set()
    for node in graph.nodes:
        if node.op not in NORMALIZATIONS or node.flag("add", False):
            continue
        if node.attrs.get("activation", "none") != "none":
            continue
        inputs = inputs_of(node)
        if gammas is not None and inputs["gamma"][0].name not in gammas:
            continue
        total, residual, last = None, None, only_reader(node)
        if last is not None and last.op == "elemwise_add" and id(last) not in sums:
            total = last
            residual = next(entry for entry in total.inputs if entry[0] is not node)
            last = only_reader(total)
        options = None if last is None else _activation_of(last)
        if options is None:
            continue
        attrs = {**node.attrs, **options}
        if total is not None:
            sums.add(id(total))
            attrs["add"] = True
        attrs[_NAMES] = f"{node.name},{total.name if total else ''}"
        if total is not None and total.inputs[0][0] is node:
            attrs[_FIRST] = True  # so that splitting restores the order of arguments
        first = len(arguments_of(node))
        entries = [*node.inputs[:first], *([residual] if total else []), *node.inputs[first:]]
        new[last] = Node(node.op, last.name, attrs, entries)
    graph.replace(new)
    return len(new)


def split(node, norm):
    """Return the last of the plain nodes that do what a fused one does.

    Parameters
    ----------
    node : Node
        One of our normalizations.
    norm : Node
        The plain normalization that takes its place; named anew if it is not the last.
    """
    activation, residual = node.attrs.get("activation", "none"), inputs_of(node).get("residual")
    if activation == "none" and residual is None:
        return norm
    names = norm.attrs.pop(_NAMES, f"{node.name}_norm,{node.name}_sum").split(",")
    first = norm.attrs.pop(_FIRST, None) is not None
    user = norm.user_attrs
    last = norm
    if residual is not None:
        terms = [(last, 0), residual] if first else [residual, (last, 0)]
        last = Node("elemwise_add", names[1], user, terms)
    if activation == "relu":
        last = Node("Activation", node.name, {"act_type": "relu", **user}, [(last, 0)])
    elif activation == "leaky_relu":
        slope = node.attrs.get("slope", "0.01")
        attrs = {"act_type": "leaky", "slope": slope, **user}
        last = Node("LeakyReLU", node.name, attrs, [(last, 0)])
    else:
        last.name = node.name
    norm.name = names[0]
    return last
