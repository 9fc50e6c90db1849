"""A network's connection to the same network in other processes, from attach to detach.

Connections end before MPI does, and do not exist in a forked process.

After a failure, MPI may not end: ``MPI_Finalize`` waits for all processes, and one that stands
still never comes.  So where a connection has failed, the program ends with MPI only once the other
processes have said goodbye, and by ``MPI_Abort`` if they have not by the deadline.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from ..key_barrier import BARRIER, close_at_exit, get_timeout
from ..library import strings
from ..processes import connect, disconnect
from .agreement import forget_what_waits, still_waiting
from .mpi_library import mpi_library

_failed: list = []  # (library, handle) of connections that failed
_open: list = []  # they outlive their networks, which Python's garbage collector frees at any time


class MpiConnection:
    """A network's connection to the same network in other processes.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        For the messages of this connection alone.
    keys : list of str
        The keys of the network's all-reduces; the i-th belongs to the i-th of every other process.
    names : list of str
        Of the processes, by rank.
    """

    def __init__(self, comm: Any, keys: list, names: list) -> None:
        self.keys = keys
        self._library = mpi_library()
        self._process = os.getpid()
        self._handle = self._library.Attach(
            comm.py2f(), *strings(keys), strings(names)[0], get_timeout()
        )
        if not self._handle:
            raise RuntimeError(self._library.LastError().decode())
        BARRIER.connect(keys, self._library.Transport(self._handle))
        connect(keys, self)
        _open.append(self)

    def number_call(self, key: str, call: int, use: int) -> None:
        """Note that all processes know a call of this process by the number ``use``."""
        self._library.NumberCall(self._handle, key.encode(), call, use)

    def set_silent(self, silent: bool) -> None:
        """Say whether this process contributes nothing to what it takes part in."""
        self._library.SetSilent(self._handle, silent)

    def close(self, why: str = "the network was detached") -> bool:
        """End the connection; what waits in it fails.  Returns whether something had failed."""
        if self._handle is None or os.getpid() != self._process:
            return False
        handle, self._handle = self._handle, None
        _open.remove(self)
        disconnect(self.keys)
        BARRIER.connect(self.keys, None)
        if self._library.Stop(handle, why.encode()):
            _failed.append((self._library, handle))
            return True
        self._library.Free(handle)
        return False


def end() -> None:
    """End all connections, and MPI if it would not end by itself: the program has ended."""
    for connection in list(_open):
        connection.close("the program has ended")
    until = time.monotonic() + get_timeout()

    def left():
        return max(0.0, until - time.monotonic())

    if not all(library.WaitForGoodbyes(handle, left()) for library, handle in _failed):
        _abort("an exchange between processes failed, and others have not ended")
    if still_waiting(left):
        _abort("other processes have not called gluon_syncbn.distributed.attach")


def _abort(why):
    print(
        f"gluon_syncbn: {why} {get_timeout():g} s after this process; aborting the job",
        file=sys.stderr,
        flush=True,
    )
    mpi_library().Abort()


def end_with_the_program() -> None:
    """Call :func:`end` when the program ends, before what has been initialized by now.

    Horovod's own end waits for all processes.
    """
    close_at_exit(end)


def _refuse_in_child():
    _failed.clear()
    forget_what_waits()
    for connection in _open:
        BARRIER.refuse(
            connection.keys,
            "this process was forked from one that is attached to others by MPI, which it cannot "
            "use; train in the process that called attach",
        )


def refuse_after_fork() -> None:
    """Let a forked process get an error where this one communicates."""
    os.register_at_fork(after_in_child=_refuse_in_child)
