"""The key-barrier's face in Python: its deadline, its passes, and ending them."""

import atexit
import ctypes
import math
import os

import mxnet as mx

from .library import LIBRARY, check

TIMEOUT_VARIABLE = "GLUON_SYNCBN_TIMEOUT"


def _strings(keys):
    encoded = [key.encode() for key in keys]
    return (ctypes.c_char_p * len(encoded))(*encoded), len(encoded)


def _seconds(value, where):
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

    def __init__(self, handle=None):
        self._handle = handle

    @property
    def timeout(self):
        """Seconds after its first arrival at which an incomplete round fails."""
        return LIBRARY.GluonSyncBNBarrierTimeout(self._handle)

    @timeout.setter
    def timeout(self, seconds):
        LIBRARY.GluonSyncBNBarrierSetTimeout(self._handle, _seconds(seconds, "the timeout"))

    @property
    def failures(self):
        """How many rounds have failed so far."""
        return LIBRARY.GluonSyncBNBarrierFailures(self._handle, None, 0)

    def failures_of(self, keys):
        """How many rounds of these keys have failed so far."""
        return LIBRARY.GluonSyncBNBarrierFailures(self._handle, *_strings(keys))

    def new_pass(self):
        """The number of a pass that begins; see ``src/operator/exchange/key_barrier.h``."""
        return LIBRARY.GluonSyncBNBarrierNewPass(self._handle)

    def abort(self, passes, why):
        """Fail everything that waits in these passes, and all that comes later in them."""
        numbers = (ctypes.c_ulonglong * len(passes))(*passes)
        check(LIBRARY.GluonSyncBNBarrierAbort(self._handle, numbers, len(passes), why.encode()))

    def close(self, why):
        """Fail all rounds and every later arrival."""
        check(LIBRARY.GluonSyncBNBarrierClose(self._handle, why.encode()))


if TIMEOUT_VARIABLE in os.environ:
    _seconds(os.environ[TIMEOUT_VARIABLE], f"the environment variable {TIMEOUT_VARIABLE}")

BARRIER = KeyBarrier()


@atexit.register
def _end():
    """Let go who still waits: MXNet waits at exit for what is pending."""
    failures = BARRIER.failures
    BARRIER.close("the process is ending")
    if BARRIER.failures != failures:
        try:
            mx.nd.waitall()
        except mx.MXNetError:
            pass  # nobody is left to be told


def set_timeout(seconds):
    """Set the deadline of an exchange.

    A device that waits longer than this for the others raises :class:`mxnet.MXNetError` when its
    result is read, instead of waiting for ever.

    Parameters
    ----------
    seconds : float
        The new deadline, for exchanges that wait already, too; from 0.001 to 1e8.  The default is
        120, or what the environment variable ``GLUON_SYNCBN_TIMEOUT`` says.

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


def get_timeout():
    """The deadline of an exchange in seconds; see :func:`set_timeout`."""
    return BARRIER.timeout
