"""Which all-reduces go on to other processes: ``distributed`` says it, and the layers ask."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Iterable, Protocol


class Connection(Protocol):
    """A network's connection to the same network in other processes."""

    def number_call(self, key: str, call: int, use: int) -> None:
        """Note that all processes know a call of this process by the number ``use``."""


_connections: dict[str, Connection] = {}  # by key


def connect(keys: Iterable[str], connection: Connection) -> None:
    """Note that these all-reduces go on to other processes."""
    _connections.update(dict.fromkeys(keys, connection))


def disconnect(keys: Iterable[str]) -> None:
    """Note that these all-reduces end in this process."""
    for key in keys:
        _connections.pop(key, None)


def connection_of(key: str) -> Any:
    """Return the :class:`Connection` that an all-reduce goes on to, or None."""
    return _connections.get(key)


def any_connected() -> bool:
    """Whether any all-reduce goes on to other processes."""
    return bool(_connections)


def number_calls(exchanges: Iterable[tuple]) -> None:
    """Number the uses of each key in a graph that was just traced, alike in all processes.

    A process may have traced more graphs than another, and call numbers are never used again.

    Parameters
    ----------
    exchanges : iterable of (str, int)
        Key and call of each all-reduce in the graph.
    """
    calls = defaultdict(set)
    for key, call in exchanges:
        calls[key].add(call)
    for key, numbers in calls.items():
        connection = connection_of(key)
        if connection is not None:
            for use, call in enumerate(sorted(numbers)):
                connection.number_call(key, call, use)
