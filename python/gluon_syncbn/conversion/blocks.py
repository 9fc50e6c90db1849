"""Existing networks and symbols: their batch normalization made synchronized, and back.

A layer is converted in place, by giving it another class.  So every reference to it stays valid:
containers, attributes, a second place that shares it, a Trainer that has its parameters.
"""

from __future__ import annotations

from typing import Any

from mxnet.gluon import Block, SymbolBlock, contrib, nn
from mxnet.symbol import Symbol

from ..dimensions import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..moving_average import MABN2d
from ..mxnet_private import graph_of, is_batch_norm, settings
from ..networks import (
    blocks_of,
    forget_traces,
    instances_in,
    mark_changed,
    set_graph,
    unwrap,
)
from ..sync_batch_norm import SyncBatchNorm, checked_group_size, checked_num_devices
from .fusing import fuse as fuse_graph
from .graph import Graph
from .rewriting import (
    NO_AVERAGE,
    NO_BATCH_STATISTICS,
    NO_MOVING_AVERAGES,
    NO_RENORMALIZATION,
    ConversionError,
    make_plain,
    synchronize,
)

FUSED = (
    "MXNet's BatchNorm has no activation; make the network with an activation layer after it, or, "
    "for inference, use export_for_inference"
)


def _graphs_of(blocks, convert):
    """Return the edited graphs of the SymbolBlocks that had something to convert."""
    found = []
    for block in blocks:
        if isinstance(block, SymbolBlock):
            graph = Graph(graph_of(block))
            try:
                if convert(graph):
                    found.append((block, graph))
            except ConversionError as error:
                raise ConversionError(f"in {block.name}: {error}") from None
    return found


def _apply(net, layers, graphs, change):
    for layer in layers:
        change(layer)
        mark_changed(layer)
    for block, graph in graphs:
        set_graph(block, graph.symbol())
    forget_traces(net)


def check_registered(blocks):
    """Raise ConversionError for a layer in a plain list, which Gluon does not see."""
    known = {id(block) for block in blocks}
    for block in blocks:
        for name, value in vars(block).items():
            if name.startswith("_") or not isinstance(value, (list, tuple, dict)):
                continue
            for held in instances_in(value, Block):
                if id(held) not in known and any(map(is_batch_norm, blocks_of(held))):
                    raise ConversionError(
                        f"{block.name}.{name} holds {held.name}, which Gluon does not know of; "
                        f"register it: self.register_child(...) in {type(block).__name__}.__init__"
                    )


def convert_sync_batchnorm(
    net: Any, num_devices: int | None = None, fuse: bool = False, group_size: int | None = None
) -> Any:
    """Make every batch normalization of a network synchronized.

    Every :class:`mxnet.gluon.nn.BatchNorm` and :class:`mxnet.gluon.contrib.nn.SyncBatchNorm`, at
    any depth, becomes a :class:`SyncBatchNorm`, and so does every ``BatchNorm`` in the graph of a
    :class:`mxnet.gluon.SymbolBlock`.  Settings, names, parameters with their initializers and
    values are kept, so checkpoints load in both directions.  The network may or may not have been
    initialized, hybridized or run.  (If ``net`` is only a part of a network that is hybridized and
    has run, :class:`ModelDataParallel` notices; if you call that network yourself, ``hybridize()``
    it again.)  An ``F.BatchNorm`` that a block calls itself is not found.

    Parameters
    ----------
    net : Block or ModelDataParallel
        Changed in place.  Layers that are synchronized already are left as they are; to change
        their number of devices or their groups, call :func:`revert_batchnorm` first.
    num_devices, group_size : int or None, default None
        As for :class:`SyncBatchNorm`.
    fuse : bool, default False
        Let the layers apply the relu or leaky relu that follows them, and add the residual in
        between, as in a ResNet: results are the same, and steps are faster.  It is done in the
        graphs of blocks that are hybridized, whenever they are traced; what is read by something
        else as well stays.  Layers that are synchronized already take part.

    Returns
    -------
    Block
        ``net``.

    Raises
    ------
    TypeError
        If ``net`` is not a Block.  (For a Symbol, use :func:`convert_symbol`.)
    ConversionError
        A ValueError that names the layer: if it is batch normalization of another kind, or in a
        list that is not registered with Gluon.  Then nothing has been converted.

    Examples
    --------
    >>> from mxnet.gluon.model_zoo import vision
    >>> from gluon_syncbn import convert_sync_batchnorm
    >>> net = convert_sync_batchnorm(vision.resnet18_v1(), num_devices=2)
    >>> type(net.features[1]).__name__
    'SyncBatchNorm'
    """
    if isinstance(net, Symbol):
        raise TypeError("net is a Symbol; use gluon_syncbn.convert_symbol")
    blocks = all_blocks(net)
    num_devices = checked_num_devices(num_devices)
    group_size = checked_group_size(group_size, num_devices)
    check_registered(blocks)
    layers = []
    for block in blocks:
        if type(block) in (nn.BatchNorm, contrib.nn.SyncBatchNorm):
            layers.append(block)
        elif is_batch_norm(block) and not isinstance(block, SyncBatchNorm):
            raise ConversionError(
                f"{block.name} is a {type(block).__module__}.{type(block).__name__}, which is not "
                "known to do what nn.BatchNorm does; put nn.BatchNorm (and, for BatchNormReLU, "
                "nn.Activation('relu')) in its place"
            )

    def convert(graph):
        converted = synchronize(graph, num_devices, group_size)
        return converted + (fuse_graph(graph) if fuse else 0)

    graphs = _graphs_of(blocks, convert)

    def change(layer):
        if not isinstance(layer, SyncBatchNorm):
            layer.__class__ = SyncBatchNorm
            _forget_mxnets(layer)
            settings(layer).update(
                num_devices=num_devices, track_running_stats=True, group_size=group_size
            )
        if fuse:
            settings(layer)["fuse"] = True

    if fuse:
        layers += [block for block in blocks if isinstance(block, SyncBatchNorm)]
    _apply(blocks[0], layers, graphs, change)
    return net


def revert_batchnorm(net: Any) -> Any:
    """Make every synchronized batch normalization of a network plain.

    The way back from :func:`convert_sync_batchnorm`: every :class:`SyncBatchNorm` (and MXNet's)
    becomes an :class:`mxnet.gluon.nn.BatchNorm` with the same settings and parameters; graphs
    likewise.  (What was :class:`BatchNorm2d` no longer checks its input's dimensions.)

    Parameters
    ----------
    net : Block, ModelDataParallel or Symbol
        A network is changed in place.

    Returns
    -------
    Block or Symbol
        ``net``, or a new Symbol.

    Raises
    ------
    TypeError
        If ``net`` is neither.
    ConversionError
        A ValueError: if a layer is of a derived class or does what MXNet's cannot
        (``momentum=None``, ``track_running_stats=False``, ``activation``, ``renorm``,
        :class:`MABN2d`), or a graph has an all-reduce that is not part of a batch normalization.
        Then nothing has been converted.

    Examples
    --------
    >>> from gluon_syncbn import SyncBatchNorm, revert_batchnorm
    >>> revert_batchnorm(SyncBatchNorm(epsilon=1e-3, prefix="bn_"))
    BatchNorm(axis=1, eps=0.001, momentum=0.9, fix_gamma=False, use_global_stats=False, \
in_channels=None)
    """
    if isinstance(net, Symbol):
        graph = Graph(net)
        make_plain(graph)
        return graph.symbol()
    blocks = all_blocks(net)
    kinds = SyncBatchNorm, contrib.nn.SyncBatchNorm
    layers = [block for block in blocks if isinstance(block, kinds)]
    for layer in layers:
        if type(layer) not in (*kinds, BatchNorm1d, BatchNorm2d, BatchNorm3d):
            raise ConversionError(
                f"{layer.name} is a {type(layer).__name__}, which is not known to do what "
                "SyncBatchNorm does; put SyncBatchNorm in its place"
            )
        missing = isinstance(layer, SyncBatchNorm) and _missing_in_mxnets(layer)
        if missing:
            raise ConversionError(f"{layer.name} cannot be converted: {missing}")
    for block in blocks:
        if isinstance(block, MABN2d):
            raise ConversionError(f"{block.name} cannot be converted: {NO_MOVING_AVERAGES}")
    graphs = _graphs_of(blocks, make_plain)

    def change(layer):
        if isinstance(layer, SyncBatchNorm):
            for name in ("num_devices", "track_running_stats", "group_size", "fuse"):
                settings(layer).pop(name, None)
        layer.__class__ = nn.BatchNorm
        _forget_mxnets(layer)

    _apply(blocks[0], layers, graphs, change)
    return net


def _missing_in_mxnets(layer):
    """Say what the layer does that MXNet's cannot, and what to do; or return None."""
    if not layer.track_running_stats:
        return NO_BATCH_STATISTICS
    if layer.activation is not None:
        return FUSED
    if layer.renorm:
        return NO_RENORMALIZATION
    return NO_AVERAGE if settings(layer)["momentum"] is None else None


def _forget_mxnets(layer):
    """Make the settings of MXNet's SyncBatchNorm those of its BatchNorm."""
    settings(layer).setdefault("axis", 1)  # it has no other
    for name in ("ndev", "key"):
        settings(layer).pop(name, None)


def all_blocks(net):
    """List the blocks of a network; raise TypeError if it is none."""
    net = unwrap(net)
    if not isinstance(net, Block):
        raise TypeError(f"net must be a Gluon Block, but is a {type(net).__name__}")
    return blocks_of(net)


def convert_symbol(sym: Symbol, num_devices: int | None = None, fuse: bool = False) -> Symbol:
    """Make every batch normalization of a symbol synchronized.

    Every ``BatchNorm`` (and ``BatchNorm_v1``, and MXNet's ``_contrib_SyncBatchNorm``) is replaced.
    Names of arguments, auxiliary states and outputs are kept, so the same parameters fit.

    Parameters
    ----------
    sym : Symbol
        For example from ``mx.sym.load`` or ``mx.model.load_checkpoint``; it is not changed.
        Layers that are synchronized already are left as they are.
    num_devices : int or None, default None
        Number of devices that take part.  For :class:`mxnet.mod.Module`, the number of its
        contexts.  None: determined by :class:`ModelDataParallel`; without one, the number of
        visible GPUs, or 1: in a Module, every CPU context by itself.
    fuse : bool, default False
        Let each normalization apply the relu or leaky relu that follows it, and add the residual in
        between, where nothing else reads them.  :func:`revert_batchnorm` undoes it.

    Returns
    -------
    Symbol
        A new one.

    Raises
    ------
    TypeError
        If ``sym`` is not a Symbol.
    ConversionError
        A ValueError that names the node: if it cannot be converted.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import convert_symbol
    >>> plain = mx.sym.BatchNorm(mx.sym.var("data"), name="bn")
    >>> convert_symbol(plain, num_devices=2).list_outputs()
    ['bn_output']
    """
    if not isinstance(sym, Symbol):
        raise TypeError(
            f"sym must be a Symbol, but is a {type(sym).__name__}; "
            "for a Block use gluon_syncbn.convert_sync_batchnorm"
        )
    graph = Graph(sym)
    synchronize(graph, checked_num_devices(num_devices))
    if fuse:
        fuse_graph(graph)
    return graph.symbol()
