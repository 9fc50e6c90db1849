"""Which exchanges a network takes part in: its layers of ours, and those in its graphs."""

import weakref
from collections import namedtuple

from mxnet.gluon import HybridBlock, SymbolBlock

from .graph import Graph
from .graph_conversion import EXCHANGES, unique_keys
from .sync_batch_norm import SyncBatchNorm

# `statistics`: the Parameters that training moves without a gradient; () for a bare KeyBarrierSum.
Exchange = namedtuple("Exchange", "name key num_devices statistics")

_loaded = weakref.WeakKeyDictionary()  # SymbolBlock -> its exchanges
_edits = 0


def blocks_of(net):
    """List a block and all below it, shared ones once."""
    found, stack = {}, [net]
    while stack:
        block = stack.pop()
        if id(block) not in found:
            found[id(block)] = block
            stack.extend(block._children.values())
    return list(found.values())


def edits():
    """How often any network has been changed: what was traced before is out of date."""
    return _edits


def mark_edited():
    global _edits
    _edits += 1


def forget_traces(net):
    """Let every hybridized block be traced anew at its next call."""
    for block in blocks_of(net):
        if isinstance(block, HybridBlock):
            block._clear_cached_op()


def set_graph(block, graph):
    """Give a SymbolBlock an edited graph in place of its own."""
    inputs, _ = block._cached_graph
    block._cached_graph = inputs, graph.symbol()
    block._clear_cached_op()
    _loaded.pop(block, None)
    mark_edited()


def _read_graph(block):
    """The exchanges of a loaded graph, under keys that no other copy of its file has.

    Without that, two networks from one file would sum each other's statistics.
    """
    graph = Graph(block._cached_graph[1])
    nodes = [node for node in graph.nodes if node.op in EXCHANGES]
    alone = [
        Exchange(node.name, node.name, 1, ())
        for node in graph.nodes
        if node.op == "_syncbn_batch_norm" and not node.flag("use_global_stats", False)
    ]
    moved = {
        node.inputs[5][0].name: [source.name for source, _ in node.inputs[5:]]
        for node in graph.nodes
        if node.op == "_syncbn_normalize"
    }
    found = []
    for node, key in zip(nodes, unique_keys(node.attrs["key"] for node in nodes)):
        node.attrs["key"] = key
        statistics = ()
        if node.op == "_syncbn_sum":
            statistics = tuple(block.params[name] for name in moved[node.inputs[1][0].name])
        num_devices = int(node.attrs.get("num_devices", 0)) or None
        found.append(Exchange(node.name, key, num_devices, statistics))
    if found:
        set_graph(block, graph)
    return found + alone


def exchanges_of(net):
    """List the exchanges of a block and of everything below it, shared layers once."""
    found = []
    for block in blocks_of(net):
        if isinstance(block, SyncBatchNorm):
            found.append(Exchange(block.name, block.key, block.num_devices, block.statistics))
        elif isinstance(block, SymbolBlock):
            if block not in _loaded:
                _loaded[block] = _read_graph(block)
            found.extend(_loaded[block])
    return found
