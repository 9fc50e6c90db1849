"""Keys of its own for every Module: two of one symbol or file must not add up each other's sums.

While a Module binds its executors, one per context, the keys of all-reduces among just those
contexts get names that no other Module has.  A key with another ``num_devices`` stays as it is:
others are meant to meet there.  (0 stands for all GPUs.)
"""

from __future__ import annotations

import functools
import threading

from mxnet.module.executor_group import DataParallelExecutorGroup

from ..conversion.graph import Graph
from ..conversion.rewriting import EXCHANGES
from ..data_parallel.exchanges import new_keys

_binding = threading.local()  # .contexts: how many; .keys: new ones, once they are known


def _bind_exec(bind):
    @functools.wraps(bind)
    def bind_with_own_keys(self, *args, **kwargs):
        _binding.contexts, _binding.keys = len(self.contexts), None
        try:
            return bind(self, *args, **kwargs)
        finally:
            del _binding.contexts, _binding.keys

    return bind_with_own_keys


def give_own_keys(graph: Graph) -> bool:
    """Rename the keys of a graph that a Module is binding; return whether it changed."""
    contexts = getattr(_binding, "contexts", 1)
    if contexts == 1:
        return False
    nodes = [
        node
        for node in graph.nodes
        if node.op in EXCHANGES and node.attrs.get("num_devices", "0") in ("0", str(contexts))
    ]
    if _binding.keys is None:
        _binding.keys = new_keys(nodes)
    for node, key in zip(nodes, _binding.keys):  # of the same symbol on every context
        node.attrs["key"] = key
    return bool(nodes)


def install() -> None:
    """Watch Modules bind."""
    DataParallelExecutorGroup.bind_exec = _bind_exec(DataParallelExecutorGroup.bind_exec)
