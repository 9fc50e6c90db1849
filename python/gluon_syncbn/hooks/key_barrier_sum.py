"""Numbers for KeyBarrierSum's uses in traced networks, and the order of its imperative calls.

Imperative calls belong together in the order of the program.  A graph may run its operators in any
order, and one with static memory runs the same ones again and again, so there each use of a key has
a number, `call`, given when a Block is traced: once for all devices.
"""

import functools
import inspect

from mxnet import ndarray, symbol

from ..keys import KEYS, check_key
from ..mxnet_private import is_tracing
from ..passes import ordered_calls


def _check(args, kwargs):
    for value in (*args, *kwargs.values()):
        if isinstance(value, str):
            check_key(value)


def _numbered(function):
    signature = inspect.signature(function)

    @functools.wraps(function)
    def key_barrier_sum(*args, **kwargs):
        _check(args, kwargs)
        bound = signature.bind(*args, **kwargs)
        if "call" not in bound.arguments and is_tracing():
            bound.arguments["call"] = KEYS.next_call(bound.arguments.get("key"))
        return function(*bound.args, **bound.kwargs)

    return key_barrier_sum


def _ordered(function):
    @functools.wraps(function)
    def key_barrier_sum(*args, **kwargs):
        _check(args, kwargs)
        with ordered_calls():
            return function(*args, **kwargs)

    return key_barrier_sum


def install() -> None:
    """Let KeyBarrierSum number its uses in symbols, and keep its calls in order."""
    symbol.contrib.KeyBarrierSum = _numbered(symbol.contrib.KeyBarrierSum)
    ndarray.contrib.KeyBarrierSum = _ordered(ndarray.contrib.KeyBarrierSum)
