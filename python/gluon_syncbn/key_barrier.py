"""The exchange as Python sees it: its deadline, its passes, its failures, and its end."""

from __future__ import annotations

import atexit
import ctypes
import math
import os
from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator

import mxnet as mx

from .library import LIBRARY, Records, check, strings

TIMEOUT_VARIABLE = "GLUON_SYNCBN_TIMEOUT"
LOG_VARIABLE = "GLUON_SYNCBN_LOG"


def _seconds(value: Any, where: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 1e-3 <= seconds <= 1e8:
        raise ValueError(f"{where} must be a number of seconds from 0.001 to 1e8, but is {value!r}")
    return seconds


class KeyBarrier:
    """The rounds of one registry of keys; see ``src/operator/exchange/key_barrier.h``.

    Parameters
    ----------
    handle : int or None
        A barrier of the library; None is the process's own, which the operators use.
    """

    def __init__(self, handle: int | None = None) -> None:
        self._handle = handle

    @property
    def timeout(self) -> float:
        """Seconds from a round's first arrival until it fails if it is incomplete."""
        return LIBRARY.BarrierTimeout(self._handle)

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        LIBRARY.BarrierSetTimeout(self._handle, _seconds(seconds, "the timeout"))

    @property
    def failures(self) -> int:
        """The number of rounds that have failed so far."""
        return LIBRARY.BarrierFailures(self._handle, None, 0)

    def failures_of(self, keys: Iterable[str]) -> int:
        """Return how many rounds of these keys have failed so far."""
        return LIBRARY.BarrierFailures(self._handle, *strings(keys))

    def new_pass(self) -> int:
        """Return the number of a new pass; see ``src/operator/exchange/key_barrier.h``."""
        return LIBRARY.BarrierNewPass(self._handle)

    def abort(self, passes: list, why: str) -> None:
        """Fail every round of these passes that is incomplete, and every later arrival in them."""
        numbers = (ctypes.c_ulonglong * len(passes))(*passes)
        check(LIBRARY.BarrierAbort(self._handle, numbers, len(passes), why.encode()))

    def connect(self, keys: list, transport: int | None) -> None:
        """Let a transport carry these keys' rounds to other processes; None: they end here."""
        check(LIBRARY.BarrierConnect(self._handle, *strings(keys), transport))

    def refuse(self, keys: list, why: str) -> None:
        """Fail every later round of these keys."""
        check(LIBRARY.BarrierRefuse(self._handle, *strings(keys), why.encode()))

    @contextmanager
    def records(self, reset: bool) -> Iterator[Records]:
        """Give what happened so far, until the block ends; see ``src/operator/library.cc``."""
        # No callbacks from the library: they would swallow Ctrl-C.
        records = LIBRARY.BarrierRecords(self._handle, reset)
        if not records:
            raise MemoryError(LIBRARY.LastError().decode())
        try:
            yield records.contents
        finally:
            LIBRARY.RecordsFree(records)

    def close(self, why: str) -> None:
        """Fail all rounds and every later arrival."""
        check(LIBRARY.BarrierClose(self._handle, why.encode()))


BARRIER = KeyBarrier()


def check_variables() -> None:
    """Raise ValueError if the environment asks for a deadline that is none, or no possible log."""
    if TIMEOUT_VARIABLE in os.environ:
        _seconds(os.environ[TIMEOUT_VARIABLE], f"the environment variable {TIMEOUT_VARIABLE}")
    path = os.environ.get(LOG_VARIABLE)
    if path and path != "stderr":
        try:
            # O_NONBLOCK: a pipe that nobody reads is an error, not a hang.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK
            os.close(os.open(path, flags, 0o666))
        except OSError as error:
            raise ValueError(
                f'the environment variable {LOG_VARIABLE} must be "stderr" or the path of a file '
                f"to log every round to, but {path!r} cannot be written: {error.strerror}"
            ) from None


def close_at_exit(*others: Callable[[], None]) -> None:
    """Fail what is incomplete when the process ends: MXNet waits at exit for what is pending.

    Called again, it comes before what has been registered in between.

    Parameters
    ----------
    *others : callable
        Called after that; they may make more fail.
    """
    atexit.unregister(_close)
    atexit.register(_close, others)


def _close(others):
    failures = BARRIER.failures
    BARRIER.close("the process is ending")
    for close in others:
        close()
    if BARRIER.failures != failures:
        try:
            mx.nd.waitall()
        except mx.MXNetError:
            pass  # there is no program left to read it


def set_timeout(seconds: float) -> None:
    """Set the deadline of all-reduces, for the whole process.

    If a device has waited this long for the others, reading its result raises
    :class:`mxnet.MXNetError`; it does not wait for ever.

    Parameters
    ----------
    seconds : float
        From 0.001 to 1e8.  It applies to all-reduces that are waiting already as well.  The default
        is 120, or the value of the environment variable ``GLUON_SYNCBN_TIMEOUT``.

    Raises
    ------
    ValueError
        If ``seconds`` is not a number from 0.001 to 1e8.

    Examples
    --------
    >>> import gluon_syncbn
    >>> gluon_syncbn.set_timeout(600)   # one device compiles for minutes in its first step
    >>> gluon_syncbn.get_timeout()
    600.0
    """
    BARRIER.timeout = seconds


def get_timeout() -> float:
    """Return the deadline of all-reduces in seconds; see :func:`set_timeout`.

    Returns
    -------
    float
        Seconds, for the whole process.

    Examples
    --------
    >>> import gluon_syncbn
    >>> gluon_syncbn.get_timeout() > 0
    True
    """
    return BARRIER.timeout
