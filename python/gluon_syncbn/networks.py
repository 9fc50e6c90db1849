"""A network's blocks: all of them, and which were changed after a graph of them was traced."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Iterator

from mxnet.gluon import HybridBlock

from . import mxnet_private

_versions: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # Block -> its last change's number
_numbers = itertools.count(1)
_version = 0


class NetworkWrapper:
    """Something that runs a network, ``net``, and is accepted in its place."""

    net: Any


def unwrap(net: Any) -> Any:
    """Return the network in a :class:`NetworkWrapper`, and anything else as it is."""
    return net.net if isinstance(net, NetworkWrapper) else net


def blocks_of(net: Any) -> list:
    """List a block and all below it, shared ones once."""
    found, stack = {}, [net]
    while stack:
        block = stack.pop()
        if id(block) not in found:
            found[id(block)] = block
            stack.extend(mxnet_private.children(block))
    return list(found.values())


def parameters_with_gradients(net: Any) -> list:
    """List the parameters that have gradients; one without data has none, and is not used."""
    parameters = net.collect_params().values()
    return [p for p in parameters if p.grad_req != "null" and mxnet_private.has_data(p)]


def instances_in(value: Any, kind: type | tuple) -> Iterator[Any]:
    """Yield what is of a type: the value, or what is in the lists, tuples and dicts within it."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from instances_in(entry, kind)
    elif isinstance(value, dict):
        yield from instances_in(list(value.values()), kind)


def graph_version() -> int:
    """Return a number that grows whenever the graph of any block changes.

    It costs a call of a model nothing to compare it; to look at all blocks would.
    """
    return _version


def mark_changed(block: Any) -> None:
    """Note that what a block computes was changed: graphs traced before are out of date."""
    global _version
    _version = _versions[block] = next(_numbers)


def changed_since(net: Any, version: int) -> bool:
    """Whether a block or any below it was changed after this version."""
    return any(_versions.get(block, 0) > version for block in blocks_of(net))


def forget_traces(net: Any) -> None:
    """Let every hybridized block of a network be traced anew at its next call."""
    for block in blocks_of(net):
        if isinstance(block, HybridBlock):
            mxnet_private.forget_trace(block)


def set_graph(block: Any, sym: Any) -> None:
    """Replace a SymbolBlock's graph."""
    mxnet_private.set_graph_of(block, sym)
    mark_changed(block)
