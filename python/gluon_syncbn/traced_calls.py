"""Numbers for the uses of one key in a traced network, SyncBatchNorm's and KeyBarrierSum's.

Imperatively, calls meet in the order of the program.  A graph may run its operators
in any order, and one with static memory runs the same ones again and again, so there each use of a
key gets a number, `call`, when a Block is traced: once for all devices.
"""

import functools
import inspect
import threading
from collections import Counter

from mxnet import ndarray, symbol
from mxnet.gluon.block import _BlockScope

from .passes import ordered_calls

_lock = threading.Lock()
_uses = Counter()  # of a key


def next_call(key):
    """The number of the next use of a key in a graph."""
    with _lock:
        _uses[key] += 1
        return _uses[key] - 1


def _is_tracing():
    return getattr(_BlockScope._current, "value", None) is not None


def _numbered(function):
    signature = inspect.signature(function)

    @functools.wraps(function)
    def key_barrier_sum(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        if "call" not in bound.arguments and _is_tracing():
            bound.arguments["call"] = next_call(bound.arguments.get("key"))
        return function(*bound.args, **bound.kwargs)

    return key_barrier_sum


def _ordered(function):
    @functools.wraps(function)
    def key_barrier_sum(*args, **kwargs):
        with ordered_calls():
            return function(*args, **kwargs)

    return key_barrier_sum


def install():
    """Let KeyBarrierSum number its uses in symbols, and keep its calls in order; once."""
    symbol.contrib.KeyBarrierSum = _numbered(symbol.contrib.KeyBarrierSum)
    ndarray.contrib.KeyBarrierSum = _ordered(ndarray.contrib.KeyBarrierSum)
