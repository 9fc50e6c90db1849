"""The compiled library: loaded, its operators registered with MXNet and made callable.

The library names ``libmxnet.so`` as what it needs.  MXNet's Python package has loaded that
already, so the loader finds it by name, whichever wheel it came from.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Iterable

from . import mxnet_private

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "libgluon_syncbn.so")

# operator -> (submodule of mx.nd and mx.sym that gets it, its name there)
OPERATORS = {
    "_contrib_KeyBarrierSum": ("contrib", "KeyBarrierSum"),
    "_syncbn_moments": ("_internal", "_syncbn_moments"),
    "_syncbn_sum": ("_internal", "_syncbn_sum"),
    "_syncbn_normalize": ("_internal", "_syncbn_normalize"),
    "_syncbn_batch_norm": ("_internal", "_syncbn_batch_norm"),
    "_syncbn_mabn_moments": ("_internal", "_syncbn_mabn_moments"),
    "_syncbn_mabn_normalize": ("_internal", "_syncbn_mabn_normalize"),
}

# done(data, total, round, num_devices, error); see src/operator/library.cc
DONE = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_double),
    ctypes.c_ulonglong,
    ctypes.c_int,
    ctypes.c_char_p,
)


def _fields(**types: Any) -> list:
    return list(types.items())


class KeyRow(ctypes.Structure):
    """Of BarrierRecords, as the next three; see ``src/operator/library.cc``."""

    _fields_ = _fields(
        key=ctypes.c_char_p,
        rounds=ctypes.c_ulonglong,
        failures=ctypes.c_ulonglong,
        elsewhere=ctypes.c_double,
        num_devices=ctypes.c_int,
    )


class DeviceRow(ctypes.Structure):
    """One device under a key."""

    _fields_ = _fields(
        name=ctypes.c_char_p,
        rounds=ctypes.c_ulonglong,
        last=ctypes.c_ulonglong,
        held=ctypes.c_double,
        waited=ctypes.c_double,
        longest=ctypes.c_double,
    )


class ArrivalRow(ctypes.Structure):
    """One past arrival."""

    _fields_ = _fields(
        key=ctypes.c_char_p,
        round=ctypes.c_ulonglong,
        name=ctypes.c_char_p,
        last=ctypes.c_char_p,
        came=ctypes.c_double,
        complete=ctypes.c_double,
        ended=ctypes.c_double,
        call=ctypes.c_int,
        backward=ctypes.c_int,
        succeeded=ctypes.c_int,
    )


class Records(ctypes.Structure):
    """Keys, their devices, and past arrivals."""

    _fields_ = _fields(
        keys=ctypes.POINTER(KeyRow),
        devices=ctypes.POINTER(DeviceRow),
        arrivals=ctypes.POINTER(ArrivalRow),
        num_keys=ctypes.c_int,
        num_arrivals=ctypes.c_int,
    )


_STRINGS = ctypes.POINTER(ctypes.c_char_p)
_HANDLES = ctypes.POINTER(ctypes.c_void_p)
_SIGNATURES = {
    "LastError": (ctypes.c_char_p, []),
    "RegisterOperators": (ctypes.c_int, []),
    "WhyNoMkldnnLayouts": (ctypes.c_char_p, []),
    "NeedCuda": (ctypes.c_int, []),
    "BarrierCreate": (ctypes.c_void_p, [ctypes.c_double]),
    "BarrierFree": (None, [ctypes.c_void_p]),
    "BarrierArrive": (
        ctypes.c_int,
        [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_ulonglong,
            ctypes.c_ulonglong,
            ctypes.c_ulonglong,
            ctypes.c_char_p,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_double),
            ctypes.c_size_t,
            DONE,
            ctypes.c_void_p,
        ],
    ),
    "BarrierNewPass": (ctypes.c_ulonglong, [ctypes.c_void_p]),
    "BarrierAbort": (
        ctypes.c_int,
        [ctypes.c_void_p, ctypes.POINTER(ctypes.c_ulonglong), ctypes.c_int, ctypes.c_char_p],
    ),
    "BarrierConnect": (
        ctypes.c_int,
        [ctypes.c_void_p, _STRINGS, ctypes.c_int, ctypes.c_void_p],
    ),
    "BarrierRefuse": (ctypes.c_int, [ctypes.c_void_p, _STRINGS, ctypes.c_int, ctypes.c_char_p]),
    "BarrierClose": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]),
    "BarrierSetTimeout": (None, [ctypes.c_void_p, ctypes.c_double]),
    "BarrierTimeout": (ctypes.c_double, [ctypes.c_void_p]),
    "BarrierFailures": (ctypes.c_ulonglong, [ctypes.c_void_p, _STRINGS, ctypes.c_int]),
    "BarrierRecords": (ctypes.POINTER(Records), [ctypes.c_void_p, ctypes.c_int]),
    "RecordsFree": (None, [ctypes.POINTER(Records)]),
    "BeginPass": (
        ctypes.c_int,
        [_STRINGS, ctypes.c_int, _HANDLES, ctypes.c_int, ctypes.c_ulonglong, ctypes.c_int],
    ),
    "Fence": (ctypes.c_int, [_HANDLES, ctypes.c_int, _HANDLES, ctypes.c_int]),
    "EnterCall": (ctypes.c_ulonglong, [ctypes.c_ulonglong]),
    "LeaveCall": (None, [ctypes.c_ulonglong]),
}


def bind_functions(
    target: Any, library: ctypes.CDLL, prefix: str, signatures: dict[str, tuple]
) -> None:
    """Make C functions attributes of an object, without their prefix.

    ``signatures``: by name, the result's type and a list of the arguments'.
    """
    for name, (restype, argtypes) in signatures.items():
        function = getattr(library, prefix + name)
        function.restype, function.argtypes = restype, argtypes
        setattr(target, name, function)


def strings(texts: Iterable[str]) -> tuple:
    """Return strings as a C array and its length."""
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded), len(encoded)


class Library:
    """The library's C functions, as attributes without their prefix ``GluonSyncBN``."""

    def load(self) -> None:
        """Open the library and register its operators with MXNet; once, at import.

        Raises
        ------
        ImportError
            If it is missing or does not fit this MXNet.
        """
        library = _open()
        bind_functions(self, library, "GluonSyncBN", _SIGNATURES)
        check(self.RegisterOperators())
        for operator, (submodule, name) in OPERATORS.items():
            mxnet_private.make_operator_functions(operator, submodule, name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the library has no function {name}, or is not loaded yet")


LIBRARY = Library()


def _open() -> ctypes.CDLL:
    if not os.path.exists(PATH):
        raise ImportError(
            f"gluon_syncbn's compiled library is missing ({PATH}). Build it: in a checkout, "
            '"make build"; otherwise install the package with "pip install .", which compiles it.'
        )
    try:
        return ctypes.CDLL(PATH)
    except OSError as error:
        raise ImportError(
            f"gluon_syncbn's compiled library does not load: {error}. Build it again for this "
            'MXNet and this machine: in a checkout, "make build"; otherwise "pip install .".'
        ) from error


def check(status: int) -> int:
    """Return ``status``; if it is negative, raise RuntimeError with the library's reason."""
    if status < 0:
        raise RuntimeError(LIBRARY.LastError().decode())
    return status


def operator(F: Any, name: str) -> Any:
    """Return the function of ``mx.nd`` or ``mx.sym`` (``F``) for one of the layer's operators."""
    return getattr(mxnet_private.internal(F), name)
