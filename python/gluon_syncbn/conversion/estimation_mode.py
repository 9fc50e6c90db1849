"""A network in the state in which its statistics are estimated, for a while.

MXNet's BatchNorm moves its statistics in the backward pass, and Dropout would be active in training
mode, where statistics are computed.  So the first is replaced by our layer, which moves them in the
forward pass, and the second is switched off.  Graphs of hybridized blocks have either built in;
they are put aside, traced anew, and put back.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

from mxnet.gluon import HybridBlock, SymbolBlock, nn

from .. import mxnet_private
from ..networks import blocks_of, forget_traces, set_graph
from ..sync_batch_norm import SyncBatchNorm
from .blocks import convert_sync_batchnorm
from .graph import Graph


@contextmanager
def estimation_mode(net: Any) -> Iterator[None]:
    """Let training-mode forwards of a network move all statistics, and drop nothing.

    Layers of MXNet's BatchNorm normalize each device's shard by itself, as they always do.  The
    network is as it was afterwards.

    Parameters
    ----------
    net : Block

    Raises
    ------
    ConversionError
        If a batch normalization is of a kind that cannot be converted.
    """
    blocks = blocks_of(net)
    plain = [
        block
        for block in blocks
        if mxnet_private.is_batch_norm(block) and not isinstance(block, SyncBatchNorm)
    ]
    dropouts = [block for block in blocks if isinstance(block, nn.Dropout)]
    graphs = {
        block: mxnet_private.graph_of(block) for block in blocks if isinstance(block, SymbolBlock)
    }
    concerned = any(_has(Graph(sym), "BatchNorm", "Dropout") for sym in graphs.values())
    if not (plain or dropouts or concerned):
        yield
        return
    kept = {
        block: mxnet_private.kept_trace(block) for block in blocks if isinstance(block, HybridBlock)
    }
    layers = [(layer, type(layer), dict(mxnet_private.settings(layer))) for layer in plain]
    rates = [(block, mxnet_private.dropout_rate(block)) for block in dropouts]
    convert_sync_batchnorm(net, group_size=1)
    try:
        for block in dropouts:
            mxnet_private.set_dropout_rate(block, 0)
        for block in graphs:
            _switch_off_dropout(block)
        forget_traces(net)
        yield
    finally:
        for layer, kind, settings in layers:
            layer.__class__ = kind
            mxnet_private.settings(layer).clear()
            mxnet_private.settings(layer).update(settings)
        for block, rate in rates:
            mxnet_private.set_dropout_rate(block, rate)
        for block, trace in kept.items():
            mxnet_private.put_back_trace(block, trace)


def _has(graph, *names):
    return any(name in node.op for node in graph.nodes for name in names)


def _switch_off_dropout(block):
    graph = Graph(mxnet_private.graph_of(block))
    if _has(graph, "Dropout"):
        for node in graph.nodes:
            if node.op == "Dropout":
                node.attrs["p"] = "0"
        set_graph(block, graph.symbol())
