"""What the processes settle when a network is attached, each step with a deadline.

All of it is collective, and by non-blocking calls: a process that does not come must not let the
others wait for ever.
"""

from __future__ import annotations

import pickle
import time
from typing import Any, Callable

import numpy as np

from ..key_barrier import get_timeout

# (mpi4py.MPI, request, what MPI still writes to) where other processes did not come
_unfinished: list = []
_marks: list = []  # the attribute of communicators on which that has happened


def _complete(mpi, request, waiting_for, *written):
    """Wait for a request; ``written`` is what it writes to."""
    deadline = time.monotonic() + get_timeout()
    pause = 1e-5
    while not request.Test():
        if time.monotonic() > deadline:
            _unfinished.append((mpi, request, written))
            raise RuntimeError(
                f"not every process of the communicator has {waiting_for} within {get_timeout():g} "
                "s. Every rank of it must call gluon_syncbn.distributed.attach, in the same order "
                "if for several networks. For a longer deadline, set GLUON_SYNCBN_TIMEOUT or call "
                "gluon_syncbn.set_timeout before; now every rank needs a new communicator for it."
            )
        time.sleep(pause)
        pause = min(2 * pause, 1e-2)


def still_waiting(seconds_left: Callable[[], float]) -> bool:
    """Whether what other processes did not come to is unfinished in so many seconds, too."""
    while not all(mpi.Is_finalized() or request.Test() for mpi, request, _ in _unfinished):
        if seconds_left() == 0:
            return True
        time.sleep(1e-2)
    return False


def forget_what_waits() -> None:
    """Leave what is unfinished to the process that this one was forked from."""
    _unfinished.clear()


def settle(mpi: Any, comm: Any, value: Any) -> tuple:
    """Return a communicator for the messages of one attachment, and every process's value by rank.

    The communicator is never freed: a message may still be on its way when a process detaches.

    Raises
    ------
    RuntimeError
        If not every process has come by the deadline, now or before.
    """
    if not _marks:
        _marks.append(mpi.Comm.Create_keyval())
    if comm.Get_attr(_marks[0]):
        raise RuntimeError(
            "not every process came when attach was called with this communicator before, so they "
            "no longer agree on which call is which; end the job, or give every rank a new one"
        )
    try:
        own = _duplicate(mpi, comm)
        return own, _gather(mpi, own, value)
    except RuntimeError:
        comm.Set_attr(_marks[0], True)
        raise


def _duplicate(mpi, comm):
    copy, request = comm.Idup()
    _complete(mpi, request, "called attach", copy)
    return copy


def _gather(mpi, comm, value):
    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    size, sizes = np.array([mine.size], "int64"), np.empty(comm.size, "int64")
    request = comm.Iallgather(size, sizes)
    _complete(mpi, request, "said what it attaches", comm, size, sizes)
    everything = np.empty(int(sizes.sum()), np.uint8)
    request = comm.Iallgatherv(mine, [everything, sizes.tolist(), mpi.BYTE])
    _complete(mpi, request, "said what it attaches", comm, mine, everything)
    parts = np.split(everything, np.cumsum(sizes)[:-1])
    return [pickle.loads(part.tobytes()) for part in parts]


def check_versions(names: tuple, versions: tuple) -> None:
    """Raise RuntimeError if the processes, named by rank, run different versions."""
    for name, version in zip(names, versions):
        if version != versions[0]:
            raise RuntimeError(
                f"{names[0]} runs gluon_syncbn {versions[0]}, but {name} {version}; install one "
                "version everywhere"
            )


def check_alike(names: tuple, descriptions: tuple) -> None:
    """Raise ValueError if the processes have different networks.

    Parameters
    ----------
    names : tuple of str
        Of the processes, by rank.
    descriptions : tuple of list of (str, int)
        By rank: of each synchronized layer its name, and its number of channels, or 0.
    """
    first = descriptions[0]
    for name, other in zip(names, descriptions):
        if len(other) != len(first):
            raise ValueError(
                f"the networks differ in their number of synchronized layers: {names[0]} has "
                f"{len(first)}, but {name} has {len(other)}; attach the same network on every rank"
            )
        for place, ((layer, channels), (other_layer, other_channels)) in enumerate(
            zip(first, other)
        ):
            if channels and other_channels and channels != other_channels:
                raise ValueError(
                    f"the networks differ: synchronized layer {place} is {layer} with {channels} "
                    f"channels on {names[0]}, but {other_layer} with {other_channels} on {name}; "
                    "attach the same network on every rank"
                )
