"""Which exchanges a network takes part in: its layers of ours, and those in its graphs."""

import itertools
import json
import re
import weakref
from collections import namedtuple

from mxnet import symbol
from mxnet.gluon import SymbolBlock

from .sync_batch_norm import SyncBatchNorm

# `statistics`: the moving mean's and variance's Parameter, or () for a bare KeyBarrierSum.
Exchange = namedtuple("Exchange", "name key num_devices statistics")

_loaded = weakref.WeakKeyDictionary()  # SymbolBlock -> its exchanges
_copies = itertools.count(1)


def blocks_of(net):
    """List a block and all below it, shared ones once."""
    found, stack = {}, [net]
    while stack:
        block = stack.pop()
        if id(block) not in found:
            found[id(block)] = block
            stack.extend(block._children.values())
    return list(found.values())


def _read_symbol(block):
    """The exchanges of a loaded graph, under keys that no other copy of its file has.

    Without that, two networks from one file would sum each other's statistics.
    """
    inputs, graph = block._cached_graph
    content = json.loads(graph.tojson())
    nodes = content["nodes"]
    copy, found = next(_copies), []
    for node in nodes:
        if node["op"] not in ("_syncbn_sum", "_contrib_KeyBarrierSum"):
            continue
        attributes, statistics = node["attrs"], []
        attributes["key"] = f"{re.sub('@[0-9]+$', '', attributes['key'])}@{copy}"
        if node["op"] == "_syncbn_sum":
            mean = nodes[node["inputs"][1][0]]["name"]
            users = (
                n
                for n in nodes
                if n["op"] == "_syncbn_normalize"
                and nodes[n["inputs"][5][0]]["name"] == mean
            )
            variance = nodes[next(users)["inputs"][6][0]]["name"]
            statistics = [block.params[mean], block.params[variance]]
        num_devices = int(attributes.get("num_devices", 0)) or None
        found.append(Exchange(node["name"], attributes["key"], num_devices, tuple(statistics)))
    if found:
        block._cached_graph = inputs, symbol.load_json(json.dumps(content))
        block._clear_cached_op()
    return found


def exchanges_of(net):
    """List the exchanges of a block and of everything below it, shared layers once."""
    found = []
    for block in blocks_of(net):
        if isinstance(block, SyncBatchNorm):
            statistics = block.running_mean, block.running_var
            found.append(Exchange(block.name, block.key, block.num_devices, statistics))
        elif isinstance(block, SymbolBlock):
            if block not in _loaded:
                _loaded[block] = _read_symbol(block)
            found.extend(_loaded[block])
    return found
