"""Batch normalization in a graph, made synchronized and plain again.

Plain is MXNet's ``BatchNorm``, one node.  Synchronized is three nodes around the all-reduce, or one
if no all-reduce is needed; see docs/architecture.md.
"""

from collections import Counter

from ..keys import KEYS
from ..operators import GROUP_SIZE, group_attributes
from .fusing import split
from .graph import Node
from .operator_inputs import inputs_of

# The parameters that both kinds have, with MXNet's defaults, and with ours where they differ.
_MXNET = {
    "eps": "0.001",
    "momentum": "0.9",
    "fix_gamma": "True",
    "use_global_stats": "False",
    "axis": "1",
}
_OURS = {**_MXNET, "eps": "1e-05", "fix_gamma": "False"}
CONVERTIBLE = ("BatchNorm", "BatchNorm_v1", "_contrib_SyncBatchNorm")
_INCONVERTIBLE = {
    "_contrib_BatchNormWithReLU": "it is fused with a relu; use BatchNorm and Activation",
}
_UNWRAP = "unroll a loop; convert before a graph is fused (optimize_for)"
NO_AVERAGE = (
    "MXNet's BatchNorm has no momentum=None, the average over all batches; make the network with a "
    "momentum and load its parameters with ignore_extra=True, or, for inference, use "
    "export_for_inference"
)
NO_RENORMALIZATION = (
    "MXNet's BatchNorm has no batch renormalization; make the network without renorm and load its "
    "parameters with ignore_extra=True, or, for inference, use export_for_inference"
)
NO_BATCH_STATISTICS = (
    "with track_running_stats=False it normalizes by its batch in inference, which MXNet's "
    "BatchNorm cannot do; use net.export, whose files load where gluon_syncbn is imported"
)
NO_MOVING_AVERAGES = (
    "plain MXNet has no moving average batch normalization; build the network anew with "
    "nn.BatchNorm, or, for inference, use export_for_inference"
)
EXCHANGES = ("_syncbn_sum", "_contrib_KeyBarrierSum")


class ConversionError(ValueError):
    """A layer cannot be converted; the message names it and says what to do."""


def _cannot(node, why):
    raise ConversionError(f"{node.name} ({node.op}) cannot be converted: {why}")


def _check(graph):
    """Raise before anything is changed if there is something that cannot be converted."""
    for node in graph.nodes:
        if node.op in _INCONVERTIBLE:
            _cannot(node, _INCONVERTIBLE[node.op])
        inside = node.operators_inside() & {*CONVERTIBLE, *_INCONVERTIBLE, *EXCHANGES}
        if inside:
            _cannot(node, f"its body contains {', '.join(sorted(inside))}; {_UNWRAP}")
        if node.op in CONVERTIBLE:
            if node.flag("output_mean_var", False):
                _cannot(node, "its mean and variance are used as outputs, which ours does not have")
            if len(node.inputs) != 5:
                _cannot(node, "it needs data, gamma, beta, moving mean and moving variance")


def _options(node):
    defaults = _OURS if node.op.startswith("_syncbn") else _MXNET
    return {name: node.attrs.get(name, default) for name, default in defaults.items()}


def _plain_attrs(node):
    attrs = {**_options(node), **node.user_attrs}
    attrs.pop(GROUP_SIZE, None)
    return attrs


def synchronize(graph, num_devices=None, group_size=None):
    """Replace every batch normalization of a :class:`Graph` by ours; return how many there were."""
    _check(graph)
    plain = [node for node in graph.nodes if node.op in CONVERTIBLE]
    calls = Counter()  # a layer that is used twice has one name
    new = {}
    for node, key in zip(plain, KEYS.of_graph(node.name for node in plain)):
        options = _options(node)
        data, gamma, beta, mean, variance = node.inputs
        user = node.user_attrs
        for (state, _), value in ((mean, "zero"), (variance, "one")):
            if state.is_variable:  # as MXNet marks them; files of other programs may lack it
                state.attrs.setdefault("__init__", f'["{value}", {{}}]')
        groups = group_attributes(group_size)
        if node.flag("use_global_stats", False) or 1 in (num_devices, group_size):
            attrs = {**options, **user, **groups}
            new[node] = Node("_syncbn_batch_norm", node.name, attrs, node.inputs)
            continue
        del options["use_global_stats"]
        moments = Node(
            "_syncbn_moments", f"{node.name}_moments", {"axis": options["axis"], **user}, [data]
        )
        exchange = {"key": key, "num_devices": num_devices or 0, "call": calls[node.name]}
        calls[node.name] += 1
        exchange.update(**user, **groups)
        total = Node("_syncbn_sum", f"{node.name}_sum", exchange, [(moments, 1), mean])
        inputs = [(moments, 0), (total, 0), (moments, 2), gamma, beta, mean, variance]
        new[node] = Node("_syncbn_normalize", node.name, {**options, **user}, inputs)
    graph.replace(new)
    return len(plain)


def make_plain(graph, inference=False):
    """Replace every synchronized batch normalization of a :class:`Graph` by MXNet's BatchNorm.

    All BatchNorm nodes have all their parameters written then.  ``inference``: the graph will not
    be trained, so how the moving statistics move does not matter.
    """
    new = {}
    for node in graph.nodes:
        if node.op in ("_syncbn_mabn_normalize", "_syncbn_mabn_moments"):
            _cannot(node, NO_MOVING_AVERAGES)
        if node.op == "BatchNorm":
            node.attrs = {**_options(node), **node.attrs}
        if node.op == "_contrib_SyncBatchNorm":
            new[node] = Node("BatchNorm", node.name, _plain_attrs(node), node.inputs)
        if node.op not in ("_syncbn_batch_norm", "_syncbn_normalize"):
            continue
        if node.flag("use_batch_stats", False):
            _cannot(node, NO_BATCH_STATISTICS)
        if node.flag("renorm", False) and not inference:
            _cannot(node, NO_RENORMALIZATION)
        if node.flag("cumulative_average", False) and not inference:
            _cannot(node, NO_AVERAGE)
        given, attrs = inputs_of(node), _plain_attrs(node)
        if node.op == "_syncbn_normalize":
            moments = given["data"][0]
            if moments.op != "_syncbn_moments":
                _cannot(node, f"its data come from {moments.name} ({moments.op})")
            given["data"] = moments.inputs[0]
            if moments.flag("use_global_stats", False):  # with weights, which mean nothing then
                attrs["use_global_stats"] = "True"
        inputs = [given[name] for name in ("data", "gamma", "beta", "moving_mean", "moving_var")]
        new[node] = split(node, Node("BatchNorm", node.name, attrs, inputs))
    graph.replace(new)
    for node in graph.nodes:
        if node.op in (*EXCHANGES, "_syncbn_moments"):
            _cannot(node, "plain MXNet has no such operator; take it out of the network")
        inside = {op for op in node.operators_inside() if op in EXCHANGES or "_syncbn_" in op}
        if inside:
            _cannot(node, f"its body contains {', '.join(sorted(inside))}; {_UNWRAP}")
    return len(new)
