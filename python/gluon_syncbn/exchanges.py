"""Which exchanges a network takes part in: its layers of ours, and those in loaded symbols."""

import json
import weakref
from collections import namedtuple

from mxnet.gluon import SymbolBlock

from .sync_batch_norm import SyncBatchNorm

# `statistics`: the moving mean's and variance's Parameter, or () for a bare KeyBarrierSum.
Exchange = namedtuple("Exchange", "name key num_devices statistics")

_in_symbols = weakref.WeakKeyDictionary()  # SymbolBlock -> its exchanges


def _read_symbol(block):
    """The exchanges of a loaded graph: num_devices is 0 where the graph leaves it open."""
    nodes = json.loads(block._cached_graph[1].tojson())["nodes"]
    found = []
    for node in nodes:
        if node["op"] not in ("_syncbn_sum", "_contrib_KeyBarrierSum"):
            continue
        statistics = []
        if node["op"] == "_syncbn_sum":
            mean = nodes[node["inputs"][1][0]]["name"]
            users = (
                n
                for n in nodes
                if n["op"] == "_syncbn_normalize" and nodes[n["inputs"][5][0]]["name"] == mean
            )
            variance = nodes[next(users)["inputs"][6][0]]["name"]
            statistics = [block.params[mean], block.params[variance]]
        attributes = node["attrs"]
        found.append(
            Exchange(
                node["name"],
                attributes["key"],
                int(attributes.get("num_devices", 0)) or None,
                tuple(statistics),
            )
        )
    return found


def exchanges_of(block):
    """List the exchanges of a block and of everything below it, shared layers once."""
    found, seen, stack = [], set(), [block]
    while stack:
        block = stack.pop()
        if id(block) in seen:
            continue
        seen.add(id(block))
        if isinstance(block, SyncBatchNorm):
            statistics = block.running_mean, block.running_var
            found.append(Exchange(block.name, block.key, block.num_devices, statistics))
        elif isinstance(block, SymbolBlock):
            if block not in _in_symbols:
                _in_symbols[block] = _read_symbol(block)
            found.extend(_in_symbols[block])
        stack.extend(block._children.values())
    return found
