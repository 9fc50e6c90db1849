"""Which exchanges a network takes part in: its layers of ours, and those in its graphs."""

import itertools
import weakref

from mxnet.gluon import HybridBlock, SymbolBlock

from .graph import Graph
from .graph_conversion import EXCHANGES, unique_keys
from .passes import Exchange
from .sync_batch_norm import SyncBatchNorm

_loaded = weakref.WeakKeyDictionary()  # SymbolBlock -> the exchanges in its graph
_adopted = weakref.WeakSet()  # SymbolBlocks whose keys no other copy of their file has
_edited = weakref.WeakKeyDictionary()  # Block -> the number of its last edit
_numbers = itertools.count(1)
_last_edit = 0


def blocks_of(net):
    """List a block and all below it, shared ones once."""
    found, stack = {}, [net]
    while stack:
        block = stack.pop()
        if id(block) not in found:
            found[id(block)] = block
            stack.extend(block._children.values())
    return list(found.values())


def mark_edited(block):
    """Note that a block was changed: graphs of it that were traced before are out of date."""
    global _last_edit
    _last_edit = _edited[block] = next(_numbers)


def last_edit():
    """The number of the last edit of any block."""
    return _last_edit


def edited_since(net, number):
    """Whether a block or any below it has been edited after the edit of this number."""
    return any(_edited.get(block, 0) > number for block in blocks_of(net))


def forget_traces(net):
    """Let every hybridized block be traced anew at its next call."""
    for block in blocks_of(net):
        if isinstance(block, HybridBlock):
            block._clear_cached_op()


def set_graph(block, graph):
    """Give a SymbolBlock an edited graph in place of its own, whose keys are unique."""
    inputs, _ = block._cached_graph
    block._cached_graph = inputs, graph.symbol()
    block._clear_cached_op()
    _loaded.pop(block, None)
    _adopted.add(block)
    mark_edited(block)


def adopt_graphs(net):
    """Give the exchanges of loaded graphs keys that no other copy of their file has.

    Without that, two networks from one file would sum each other's statistics.
    """
    for block in blocks_of(net):
        if not isinstance(block, SymbolBlock) or block in _adopted:
            continue
        graph = Graph(block._cached_graph[1])
        nodes = [node for node in graph.nodes if node.op in EXCHANGES]
        for node, key in zip(nodes, unique_keys(node.attrs["key"] for node in nodes)):
            node.attrs["key"] = key
        if nodes:
            set_graph(block, graph)
        _adopted.add(block)


def _read_graph(block):
    """The exchanges of a loaded graph, and its layers that meet nobody."""
    graph = Graph(block._cached_graph[1])

    def statistics_of(node, first):
        return tuple(block.params[source.name] for source, _ in node.inputs[first:])

    statistics = {
        node.inputs[5][0].name: statistics_of(node, 5)
        for node in graph.nodes
        if node.op == "_syncbn_normalize"
    }
    found = []
    for node in graph.nodes:
        if node.op == "_syncbn_batch_norm":
            count = None if node.flag("use_global_stats", False) else 1
            found.append(Exchange(node.name, node.name, count, statistics_of(node, 3), True))
        elif node.op in EXCHANGES:
            moved = statistics[node.inputs[1][0].name] if node.op == "_syncbn_sum" else ()
            count = int(node.attrs.get("num_devices", 0)) or None
            found.append(Exchange(node.name, node.attrs["key"], count, moved, False))
    return found


def exchanges_of(net):
    """List the exchanges of a block and of everything below it, shared layers once."""
    found = []
    for block in blocks_of(net):
        if isinstance(block, SyncBatchNorm):
            found.append(block.exchange)
        elif isinstance(block, SymbolBlock):
            if block not in _loaded:
                _loaded[block] = _read_graph(block)
            found.extend(_loaded[block])
    return found
