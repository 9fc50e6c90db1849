"""Which all-reduces a network takes part in: its layers of ours, and those in its graphs."""

import weakref

from mxnet.gluon import SymbolBlock

from ..conversion.graph import Graph
from ..conversion.operator_inputs import check_operators, states_of
from ..conversion.rewriting import EXCHANGES
from ..keys import KEYS
from ..moving_average import MABN2d
from ..mxnet_private import graph_of
from ..networks import blocks_of, set_graph
from ..operators import group_size_of
from ..passes import Exchange
from ..sync_batch_norm import SyncBatchNorm

_adopted: weakref.WeakSet = weakref.WeakSet()  # SymbolBlocks whose keys no other copy has
# SymbolBlock -> (its graph, the all-reduces in it)
_read: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def adopt_graphs(net):
    """Give the all-reduces of loaded graphs keys that no other copy of their file has.

    Without that, two networks from one file would sum each other's statistics.
    """
    for block in blocks_of(net):
        if not isinstance(block, SymbolBlock) or block in _adopted:
            continue
        graph = Graph(graph_of(block))
        check_operators(graph)
        nodes = [node for node in graph.nodes if node.op in EXCHANGES]
        for node, key in zip(nodes, new_keys(nodes)):
            node.attrs["key"] = key
        if nodes:
            set_graph(block, graph.symbol())
        _adopted.add(block)


def new_keys(nodes):
    """List keys for a graph's all-reduces that no other graph has; two layers never get one."""
    owners, keys = {}, []  # owners: key -> the moving mean of its layer, or None for KeyBarrierSum
    for node in nodes:
        key = node.attrs["key"]
        owner = node.inputs[1][0] if node.op == "_syncbn_sum" else None
        while owners.setdefault(key, owner) is not owner:
            key += "#"
        keys.append(key)
    return KEYS.of_graph(keys)


def _read_graph(block):
    """List the all-reduces of a loaded graph, and its layers without one."""
    graph = Graph(graph_of(block))

    def statistics_of(node):
        names = [source.name for source, _ in states_of(node)]
        if any(name not in block.params.keys() for name in names):
            return ()  # they are inputs of the block
        return tuple(block.params[name] for name in names)

    found, statistics, late = [], {}, {}  # by the name of the first one
    for node in graph.nodes:
        if node.op in ("_syncbn_normalize", "_syncbn_mabn_normalize"):
            (first, _), *_ = states_of(node)
            name, moments = first.name, node.inputs[0][0]
            statistics[name] = statistics_of(node)
            if moments.op == "_syncbn_mabn_moments":
                late[name] = statistics_of(moments)
            if node.inputs[1][0] is moments:  # without an all-reduce
                exchange = node.name, node.name, None, statistics[name], True
                found.append(Exchange(*exchange, late_statistics=late.get(name, ())))
    for node in graph.nodes:
        if node.op == "_syncbn_batch_norm":
            group_size = group_size_of(node.attrs)
            count = None if group_size or node.flag("use_global_stats", False) else 1
            moved = statistics_of(node)
            found.append(Exchange(node.name, node.name, count, moved, True, group_size))
        elif node.op in EXCHANGES:
            count = int(node.attrs.get("num_devices", 0)) or None
            name = node.inputs[1][0].name if node.op == "_syncbn_sum" else None
            moved, group_size = statistics.get(name, ()), group_size_of(node.attrs)
            found.append(
                Exchange(
                    *(node.name, node.attrs["key"], count, moved, False, group_size),
                    late_statistics=late.get(name, ()),
                )
            )
    return found


def exchanges_of_block(block):
    """List the all-reduces of a block, without what is below it."""
    if isinstance(block, (SyncBatchNorm, MABN2d)):
        return [block.exchange]
    if not isinstance(block, SymbolBlock):
        return []
    graph = graph_of(block)
    if block not in _read or _read[block][0] is not graph:
        _read[block] = graph, _read_graph(block)
    return _read[block][1]


def exchanges_of(net):
    """List the all-reduces of a block and of everything below it, shared layers once."""
    return [e for block in blocks_of(net) for e in exchanges_of_block(block)]
