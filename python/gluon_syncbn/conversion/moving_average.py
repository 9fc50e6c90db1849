"""Moving average batch normalization: existing networks converted, and graphs made plain."""

from __future__ import annotations

from typing import Any

from mxnet import ndarray
from mxnet.gluon import SymbolBlock, contrib, nn
from mxnet.symbol import Symbol

from ..centered_convolution import CenConv2d
from ..dimensions import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..moving_average import MABN2d, moving_average_settings
from ..mxnet_private import (
    contexts_of,
    forget_parameter,
    graph_of,
    is_batch_norm,
    settings,
)
from ..networks import forget_traces, mark_changed
from ..sync_batch_norm import SyncBatchNorm
from .blocks import all_blocks, check_registered
from .graph import Graph, Node
from .rewriting import CONVERTIBLE, ConversionError

_NORMS = (
    *(nn.BatchNorm, contrib.nn.SyncBatchNorm, SyncBatchNorm),
    *(BatchNorm1d, BatchNorm2d, BatchNorm3d),
)


def convert_mabn(
    net: Any,
    batch_size: int,
    simulated_batch_size: int,
    momentum: float = 0.98,
    epsilon: float | None = None,
    warmup_iters: int = 100,
    num_devices: int | None = 1,
) -> Any:
    """Make a network one with moving average batch normalization.

    Every :class:`mxnet.gluon.nn.BatchNorm` and :class:`SyncBatchNorm` (and MXNet's), at any depth,
    becomes a :class:`MABN2d`, and every :class:`mxnet.gluon.nn.Conv2D` a :class:`CenConv2d`.  They
    compute something else than before, so train the network from the start, or on from there.

    Names and values of parameters are kept, with two exceptions.  The normalization's running mean,
    which has no use any more, is dropped (as is ``num_batches_tracked``); and ``buffer_x2``,
    ``buffer_gz`` and ``iters`` are new, with zeros.  So checkpoints are those of a network that was
    built from these layers.  To start from a checkpoint of the network as it was, load it before
    converting.

    Parameters
    ----------
    net : Block or ModelDataParallel
        Changed in place.  It may or may not have been initialized, hybridized or run.  Layers of
        classes derived from ``nn.Conv2D`` are left as they are.
    batch_size, simulated_batch_size, momentum, warmup_iters, num_devices
        As for :class:`MABN2d`.
    epsilon : float, optional
        Added to the second moment; by default each layer keeps its own.

    Returns
    -------
    Block
        ``net``.

    Raises
    ------
    TypeError
        If ``net`` is not a Block.
    ValueError
        For settings that do not fit; see :class:`MABN2d`.
    ConversionError
        A ValueError that names the layer: for batch normalization of another kind, with another
        channel axis than 1, with ``use_global_stats``, ``track_running_stats=False``, ``renorm``,
        ``activation`` or a ``group_size`` above 1, in the graph of a ``SymbolBlock``, or in a list
        that is not registered with Gluon; and for a :class:`MABN2d` that has other settings than
        given here.  Then nothing has been converted.

    Notes
    -----
    A converted layer takes data of any number of dimensions with channels as axis 1, as before.
    (What was :class:`BatchNorm2d` no longer checks them.)  The ``momentum`` and ``num_devices`` of
    a layer give way to those given here.  Converting again with the same settings changes nothing.

    Examples
    --------
    >>> from mxnet.gluon.model_zoo import vision
    >>> from gluon_syncbn import convert_mabn
    >>> net = convert_mabn(vision.resnet18_v1(), batch_size=2, simulated_batch_size=32)
    >>> [type(layer).__name__ for layer in net.features[:2]]
    ['CenConv2d', 'MABN2d']
    """
    if isinstance(net, Symbol):
        raise TypeError("net is a Symbol; convert_mabn takes networks of Gluon's Blocks")
    blocks = all_blocks(net)

    def of_layer(eps):
        own = eps if epsilon is None else epsilon
        sizes = batch_size, simulated_batch_size
        return moving_average_settings(*sizes, momentum, own, warmup_iters, num_devices)

    of_layer(1e-5)  # raises, or not, for all of them
    check_registered(blocks)
    norms = [block for block in blocks if is_batch_norm(block)]
    for norm in norms:
        _check_norm(norm)
    for block in blocks:
        if isinstance(block, MABN2d):
            _check_converted(block, of_layer(block._settings["epsilon"]))
    for block in blocks:
        if isinstance(block, SymbolBlock):
            _check_graph(block)
    convolutions = [block for block in blocks if type(block) is nn.Conv2D]
    for norm in norms:
        _convert(norm, of_layer(settings(norm)["eps"]))
    for convolution in convolutions:
        convolution.__class__ = CenConv2d
    for layer in (*norms, *convolutions):
        mark_changed(layer)
    forget_traces(blocks[0])
    return net


def _check_norm(layer):
    def cannot(why):
        raise ConversionError(f"{layer.name} cannot be converted: {why}")

    if type(layer) not in _NORMS:
        cannot(
            f"it is a {type(layer).__module__}.{type(layer).__name__}, which is not known to do "
            "what nn.BatchNorm does; put nn.BatchNorm in its place"
        )
    given = settings(layer)
    if given.get("axis", 1) != 1:
        cannot(f"its channel axis is {given['axis']}; MABN2d takes channels as axis 1")
    if given["use_global_stats"]:
        cannot("use_global_stats=True leaves nothing to average; leave it out")
    if not given.get("track_running_stats", True):
        cannot(
            "with track_running_stats=False it normalizes by its batch in inference, which MABN2d "
            "cannot do; leave it out"
        )
    if given.get("renorm"):
        cannot("MABN2d renormalizes in a way of its own; make the network without renorm=True")
    if given.get("activation"):
        cannot(
            f"MABN2d has no activation={given['activation']!r}; make the network with an "
            "activation layer after it"
        )
    if given.get("group_size") not in (None, 1):
        cannot(
            f"MABN2d has no group_size={given['group_size']}; leave it out, and give convert_mabn "
            "num_devices=None for statistics over all devices"
        )


def _check_converted(layer, wanted):
    given = layer._settings
    other = [name for name, value in given.items() if value != wanted[name]]
    if other:
        has, asked = (
            ", ".join(f"{name}={values[name]!r}" for name in other) for values in (given, wanted)
        )
        raise ConversionError(
            f"{layer.name} is a MABN2d already, with {has} instead of {asked}; build the network "
            "anew, or convert the parts without such layers"
        )


def _check_graph(block):
    found = {node.op for node in Graph(graph_of(block)).nodes}
    found &= {"Convolution", "_syncbn_normalize", "_syncbn_batch_norm", *CONVERTIBLE}
    if found:
        raise ConversionError(
            f"{block.name} is a SymbolBlock with {', '.join(sorted(found))}, whose graph has no "
            "place for the new parameters; build the network from Blocks and load its parameters"
        )


def _convert(layer, new):
    fix_gamma = settings(layer)["fix_gamma"]
    settings(layer).clear()  # nothing of what it was may count any more
    for name in ("running_mean", "num_batches_tracked"):
        forget_parameter(layer, name)
    layer.__class__ = MABN2d
    channels = layer.gamma.shape[0]
    layer._set_up(new, max(channels, 0), fix_gamma, dtype=layer.gamma.dtype)
    contexts = contexts_of(layer.gamma)
    if contexts is not None:  # it has been initialized, or will be when its shape is known
        for parameter in (layer.buffer_x2, layer.buffer_gz, layer.iters):
            if contexts_of(parameter) is None:  # else it is shared, and was converted before
                parameter.initialize(ctx=contexts)


def to_batch_norm(graph, parameters):
    """Replace every MABN2d of a :class:`Graph` by what it is in inference: MXNet's BatchNorm.

    ``parameters``, name to NDArray, gets the means, which are 0.
    """
    means, new = {}, {}
    for node in graph.nodes:
        if node.op != "_syncbn_mabn_normalize":
            continue
        moments = node.inputs[0][0]
        _, _, _, gamma, beta, variance, *_ = node.inputs
        name = variance[0].name
        if name not in means:
            means[name] = Node("null", f"{name}_mean", {"__init__": '["zero", {}]'})
            parameters[means[name].name] = ndarray.zeros_like(parameters[name])
        inputs = [moments.inputs[0], gamma, beta, (means[name], 0), variance]
        attrs = {
            "axis": "1",
            "eps": node.attrs.get("eps", "1e-05"),
            "fix_gamma": node.attrs.get("fix_gamma", "False"),
            "use_global_stats": "True",
            **node.user_attrs,
        }
        new[node] = Node("BatchNorm", node.name, attrs, inputs)
    graph.replace(new)


def write_centered_weights(graph, parameters):
    """Make every CenConv2d of a :class:`Graph` a plain convolution, with a centred weight.

    ``parameters``, name to NDArray, gets those weights under names of their own.
    """
    written = {}
    for node in graph.nodes:
        if node.op != "Convolution":
            continue
        weight = _centered(node.inputs[1][0])
        if weight is None or weight.name not in parameters:
            continue
        if weight.name not in written:
            own = written[weight.name] = Node("null", f"{weight.name}_centered")
            parameters[own.name] = _without_mean(parameters[weight.name])
        node.inputs[1] = written[weight.name], 0


def _without_mean(weight):
    values = weight.asnumpy().astype("float64")
    values -= values.mean(axis=tuple(range(1, values.ndim)), keepdims=True)
    return ndarray.array(values, ctx=weight.context, dtype=weight.dtype)


def _centered(node):
    """Return the variable that a CenConv2d centres, if this is how it does that; or None."""
    if node.op != "_identity_with_attr_like_rhs":
        return None
    difference, weight = (source for source, _ in node.inputs)
    if not weight.is_variable or difference.op != "broadcast_sub":
        return None
    minuend, mean = (source for source, _ in difference.inputs)
    is_mean = (
        mean.op == "mean"
        and mean.inputs[0][0] is weight
        and mean.attrs.get("axis") in ("0", "(0,)")
        and mean.flag("exclude", False)
    )
    return weight if minuend is weight and is_mean else None
