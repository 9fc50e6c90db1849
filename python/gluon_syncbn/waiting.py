"""Who waited for whom: what the exchange has recorded of past rounds, as data and as a table."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Dict, List, NamedTuple

from .key_barrier import BARRIER
from .waiting_chart import draw
from .waiting_names import by_number, printable
from .waiting_trace import add_events

RESULTS = ["BarrierStats", "DeviceStats", "KeyStats", "Wait"]  # what users get
_KEYS_IN_TABLE = 20


class DeviceStats(NamedTuple):
    """One device, in the rounds of one key or of all that succeeded.

    Attributes
    ----------
    rounds : int
        To how many of these rounds it came.
    last : int
        To how many of them it came last.
    held : float
        Seconds that the others waited for it in those: a straggler has the most.
    waited : float
        Seconds that it waited for the last device to come, in all rounds.
    longest : float
        Seconds that it waited so in one round, at most.
    """

    rounds: int
    last: int
    held: float
    waited: float
    longest: float


class KeyStats(NamedTuple):
    """One key: of a layer, forward and backward, or of a ``KeyBarrierSum``.

    Attributes
    ----------
    rounds : int
        How many rounds succeeded.
    failures : int
        How many failed.
    elsewhere : float
        Seconds in which all devices had come and other processes had not yet answered.
    devices : dict of str to DeviceStats
        By device: ``"cpu(0)"``.
    """

    rounds: int
    failures: int
    elsewhere: float
    devices: Dict[str, DeviceStats]


class Wait(NamedTuple):
    """One device's wait in one round.

    Attributes
    ----------
    key, call, round : str, int, int
        The key, which of its uses in a graph, and the round's number.
    backward : bool
        Whether it was an exchange of gradients.
    succeeded : bool
        Whether the round succeeded.
    device, last : str
        Who waited, and who came last; if the round failed, the last of those who came.
    came, complete, ended : float
        Seconds of ``time.monotonic()``: when the device came, when the last one did, and when the
        result was there, which is later if other processes took part.
    """

    key: str
    call: int
    round: int
    backward: bool
    succeeded: bool
    device: str
    last: str
    came: float
    complete: float
    ended: float


class BarrierStats:
    """What happened in past rounds; ``print`` it for a table.

    Attributes
    ----------
    keys : dict of str to KeyStats
        Totals by key.
    waits : list of Wait
        The last 16384 arrivals, the oldest first.
    """

    def __init__(self, keys: Dict[str, KeyStats], waits: List[Wait]) -> None:
        self.keys = keys
        self.waits = waits

    @property
    def devices(self) -> Dict[str, DeviceStats]:
        """Totals by device, over all keys."""
        found = defaultdict(list)
        for key in self.keys.values():
            for name, device in key.devices.items():
                found[name].append(device)
        return {
            name: DeviceStats(
                sum(d.rounds for d in of_keys),
                sum(d.last for d in of_keys),
                sum(d.held for d in of_keys),
                sum(d.waited for d in of_keys),
                max(d.longest for d in of_keys),
            )
            for name, of_keys in sorted(found.items(), key=lambda item: by_number(item[0]))
        }

    def __str__(self) -> str:
        if not self.keys:
            return "No round has ended yet."
        devices = self.devices
        rows = [("device", "rounds", "came last", "others waited for it", "waited", "longest")]
        for name, d in devices.items():
            counts = str(d.rounds), str(d.last)
            rows.append((name, *counts, _time(d.held), _time(d.waited), _time(d.longest)))
        parts = [_table(rows)]
        slowest = max(devices, key=lambda name: devices[name].held)
        if devices[slowest].held:
            share = devices[slowest].held / sum(d.held for d in devices.values())
            parts.append(f"{share:.0%} of all waiting was for {slowest}.")
        rows = [("key", "rounds", "failed", "waited", "longest", "mostly for")]
        by_waiting = sorted(self.keys.items(), key=lambda item: -_waited(item[1]))
        for name, key in by_waiting[:_KEYS_IN_TABLE]:
            slowest = max(key.devices, key=lambda device: key.devices[device].held)
            longest = max(device.longest for device in key.devices.values())
            rows.append(
                (
                    _shorten(name),
                    str(key.rounds),
                    str(key.failures),
                    _time(_waited(key)),
                    _time(longest),
                    slowest if key.devices[slowest].held else "",
                )
            )
        parts.append(_table(rows))
        if len(by_waiting) > _KEYS_IN_TABLE:
            parts.append(f"{len(by_waiting) - _KEYS_IN_TABLE} more keys, with less waiting.")
        elsewhere = sum(key.elsewhere for key in self.keys.values())
        if elsewhere > 0:
            parts.append(
                f"All devices of this process waited {_time(elsewhere)} for other processes."
            )
        return "\n\n".join(parts)

    def plot(self, filename: str | os.PathLike) -> None:
        """Draw who waited for whom over time, and for which keys.

        Parameters
        ----------
        filename : str or path
            The picture to write; its suffix says in which format: ``.png``, ``.svg``, ``.pdf``.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If no round has ended yet.

        Examples
        --------
        >>> import gluon_syncbn
        >>> gluon_syncbn.barrier_stats().plot("waiting.png")      # doctest: +SKIP
        """
        draw(self.waits, filename)

    def add_to_profile(self, filename: str | os.PathLike) -> None:
        """Add the waits to a file of MXNet's profiler, for a browser's trace viewer.

        There every device gets a row, next to MXNet's rows of operators.

        Parameters
        ----------
        filename : str or path
            What ``mx.profiler.dump()`` has written.  It is made if it does not exist.  Waits that
            were added before are replaced.

        Raises
        ------
        ValueError
            If the file is not a finished profile.

        Examples
        --------
        >>> import mxnet as mx
        >>> import gluon_syncbn
        >>> mx.profiler.set_config(profile_all=True, filename="profile.json")  # doctest: +SKIP
        >>> mx.profiler.set_state("run")                                       # doctest: +SKIP
        >>> # train some steps, then
        >>> mx.profiler.dump()                                                 # doctest: +SKIP
        >>> gluon_syncbn.barrier_stats().add_to_profile("profile.json")        # doctest: +SKIP
        """
        add_events(self.waits, filename)


def _waited(key):
    return sum(device.waited for device in key.devices.values())


def _time(seconds):
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.3f} ms"


def _shorten(key):
    text = printable(key)
    return text if len(text) <= 60 else text[:28] + "..." + text[-29:]


def _table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def barrier_stats(reset: bool = False) -> BarrierStats:
    """Return what the all-reduces of this process have recorded: who waited, and for whom.

    Recording is always on.  In a process of a job (``gluon_syncbn.distributed``), it covers the
    devices of this process.

    Parameters
    ----------
    reset : bool
        Count from zero after this call.

    Returns
    -------
    BarrierStats
        Rounds, seconds waited and who came last, by key and device, and the last waits one by one.
        ``print`` it for a table, call its ``plot`` for a chart and its ``add_to_profile`` for
        events in MXNet's profile.

    Examples
    --------
    >>> import gluon_syncbn
    >>> stats = gluon_syncbn.barrier_stats()
    >>> print(stats)                                    # doctest: +SKIP
    device  rounds  came last  others waited for it      waited    longest
    cpu(0)      80         28             35.793 ms  404.408 ms  23.623 ms
    cpu(1)      80         52            404.408 ms   35.793 ms   5.029 ms
    <BLANKLINE>
    92% of all waiting was for cpu(1).
    <BLANKLINE>
    key          rounds  failed      waited    longest  mostly for
    batchnorm1_      40       0  402.978 ms  23.623 ms      cpu(1)
    batchnorm0_      40       0   37.222 ms   5.029 ms      cpu(0)
    """
    with BARRIER.records(reset) as records:
        return BarrierStats(_keys_in(records), _waits_in(records))


def _text(encoded):
    return encoded.decode(errors="replace")


def _keys_in(records):
    keys, first = {}, 0
    for row in records.keys[: records.num_keys]:
        rows = records.devices[first : first + row.num_devices]
        first += row.num_devices
        devices = {
            _text(d.name): DeviceStats(d.rounds, d.last, d.held, d.waited, d.longest) for d in rows
        }
        keys[_text(row.key)] = KeyStats(row.rounds, row.failures, row.elsewhere, devices)
    return keys


def _waits_in(records):
    return [
        Wait(
            *(_text(row.key), row.call, row.round, bool(row.backward), bool(row.succeeded)),
            *(_text(row.name), _text(row.last), row.came, row.complete, row.ended),
        )
        for row in records.arrivals[: records.num_arrivals]
    ]
