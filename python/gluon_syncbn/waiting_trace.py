"""Waits as events in the file of MXNet's profiler, which a browser's trace viewer opens.

The format: "Trace Event Format", Google, 2016.  MXNet's times are microseconds of the system's
clock.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from typing import Any

_CATEGORY = "gluon_syncbn"
_PROCESS = 1_000_000  # MXNet numbers its devices and categories from 0


def add_events(waits: list, filename: Any) -> None:
    """Add waits to a trace; see ``BarrierStats.add_to_profile``."""
    trace = {"traceEvents": []}
    if os.path.exists(filename):
        try:
            with open(filename, encoding="utf-8") as file:
                trace = json.load(file)
            others = [e for e in trace["traceEvents"] if e.get("pid") != _PROCESS]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{os.fspath(filename)!r} is not a finished profile ({error}); finish it with "
                "mx.profiler.dump()"
            ) from None
        trace["traceEvents"] = others
    trace["traceEvents"] += _events(waits)
    target = os.path.realpath(filename)  # where a link leads
    new = f"{target}.new"
    try:
        with open(new, "w", encoding="utf-8") as file:
            json.dump(trace, file)
        if os.path.exists(target):
            shutil.copymode(target, new)
        os.replace(new, target)  # nobody sees half a file
    finally:
        if os.path.exists(new):
            os.remove(new)


def _events(waits):
    since_epoch = time.time() - time.monotonic()
    events = [_metadata("process_name", 0, "waiting (gluon_syncbn)")]
    rows = {}  # (device, lane) -> its number
    for wait, lane in _in_lanes(waits):
        name = wait.device if lane == 0 else f"{wait.device} ({lane + 1})"
        if name not in rows:
            rows[name] = len(rows)
            events.append(_metadata("thread_name", rows[name], name))
        events.append(
            {
                "name": wait.key,
                "cat": _CATEGORY,
                "ph": "X",
                "pid": _PROCESS,
                "tid": rows[name],
                "ts": 1e6 * (wait.came + since_epoch),
                "dur": 1e6 * (wait.ended - wait.came),
                "args": {
                    "direction": "backward" if wait.backward else "forward",
                    "came last": wait.last,
                    "waited, in ms": 1e3 * (wait.complete - wait.came),
                    "waited for other processes, in ms": 1e3 * (wait.ended - wait.complete),
                    "round": wait.round,
                    "call": wait.call,
                    "succeeded": wait.succeeded,
                },
            }
        )
    return events


def _metadata(name, row, value):
    return {"name": name, "ph": "M", "pid": _PROCESS, "tid": row, "args": {"name": value}}


def _in_lanes(waits):
    """Yield each wait with a number that no overlapping one of its device has."""
    ends = {}  # device -> when each lane is free
    for wait in sorted(waits, key=lambda w: w.came):
        lanes = ends.setdefault(wait.device, [])
        lane = next((i for i, end in enumerate(lanes) if end <= wait.came), len(lanes))
        lanes[lane : lane + 1] = [wait.ended]
        yield wait, lane
