"""What the processes settle when a network is attached, each step with a deadline.

All of it is collective, and by non-blocking calls: a process that does not come must not let the
others wait for ever.
"""

from __future__ import annotations

import pickle
import time
from typing import Any

import numpy as np

from ..key_barrier import get_timeout


def _complete(request, waiting_for):
    deadline = time.monotonic() + get_timeout()
    pause = 1e-5
    while not request.Test():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"not every process of the communicator has {waiting_for} within {get_timeout():g} "
                "s. Every rank of it must call gluon_syncbn.distributed.attach, in the same order "
                "if for several networks. For a longer deadline, set GLUON_SYNCBN_TIMEOUT or call "
                "gluon_syncbn.set_timeout."
            )
        time.sleep(pause)
        pause = min(2 * pause, 1e-2)


def duplicate(comm: Any) -> Any:
    """Return a communicator of the same processes, for the messages of one attachment.

    It is never freed: a message may still be on its way when a process detaches.
    """
    copy, request = comm.Idup()
    _complete(request, "called attach")
    return copy


def gather(mpi: Any, comm: Any, value: Any) -> list:
    """Return every process's value, by rank."""
    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.empty(comm.size, "int64")
    _complete(comm.Iallgather(np.array([mine.size], "int64"), sizes), "said what it attaches")
    everything = np.empty(int(sizes.sum()), np.uint8)
    request = comm.Iallgatherv(mine, [everything, sizes.tolist(), mpi.BYTE])
    _complete(request, "said what it attaches")
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
