"""Names and numbers by which all-reduces find each other, and none but each other.

A key names an all-reduce.  Layers of one process never share one (``KEYS.of_layer``), and neither
do the graphs that are loaded from files (``KEYS.of_graph``).  Within a graph, which may run its
operators in any order, each use of a key has a number as well (``KEYS.next_call``).
"""

from __future__ import annotations

import itertools
import re
import threading
from collections import Counter
from typing import Iterable


def check_key(key: str) -> None:
    """Raise ValueError if a key that a program has chosen would not reach MXNet as it is."""
    if "\0" in key:
        raise ValueError(f"key must not contain a NUL character, but is {key[:100]!r}")


class Keys:
    """The keys that were given out in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: Counter[str] = Counter()  # how many were given each name
        self._graphs = itertools.count(1)
        self._calls: Counter[str] = Counter()  # uses of each key in graphs

    def of_layer(self, name: str) -> str:
        """Return a key that no layer of this process has had: ``name``, ``name#2``, ..."""
        name = name.partition("\0")[0]  # where C's strings end
        with self._lock:
            self._layers[name] += 1
            count = self._layers[name]
        return name if count == 1 else f"{name}#{count}"

    def of_graph(self, keys: Iterable[str]) -> list[str]:
        """Return keys that no other graph of this process has: ``key@graph1``, ...

        Two networks that are loaded from one file must not add up each other's sums.  Equal keys
        stay equal, and different ones different.
        """
        keys = list(keys)
        new: dict[str, str] = {}
        with self._lock:
            number = next(self._graphs)
            for key in keys:
                if key not in new:
                    name = re.sub("@graph[0-9]+$", "", key)  # of an earlier call
                    if f"{name}@graph{number}" in new.values():
                        number = next(self._graphs)
                    new[key] = f"{name}@graph{number}"
        return [new[key] for key in keys]

    def next_call(self, key: str) -> int:
        """Return the number of the next use of a key in a graph, from 0."""
        with self._lock:
            self._calls[key] += 1
            return self._calls[key] - 1


KEYS = Keys()
