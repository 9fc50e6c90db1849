"""The compiled library: loaded, its operators registered with MXNet and made callable.

The library names ``libmxnet.so`` as what it needs.  MXNet's Python package has loaded that
already, so the loader finds it by name, whichever wheel it came from.
"""

import ctypes
import os

from mxnet import ndarray, symbol
from mxnet.base import _LIB, OpHandle, c_str, check_call
from mxnet.ndarray.register import _make_ndarray_function
from mxnet.symbol.register import _make_symbol_function

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "libgluon_syncbn.so")

# operator -> (submodule of mx.nd and mx.sym that gets it, its name there)
OPERATORS = {
    "_contrib_KeyBarrierSum": ("contrib", "KeyBarrierSum"),
    "_syncbn_moments": ("_internal", "_syncbn_moments"),
    "_syncbn_sum": ("_internal", "_syncbn_sum"),
    "_syncbn_normalize": ("_internal", "_syncbn_normalize"),
    "_syncbn_batch_norm": ("_internal", "_syncbn_batch_norm"),
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

_STRINGS = ctypes.POINTER(ctypes.c_char_p)
_HANDLES = ctypes.POINTER(ctypes.c_void_p)
_SIGNATURES = {
    "LastError": (ctypes.c_char_p, []),
    "RegisterOperators": (ctypes.c_int, []),
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
    "BarrierClose": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]),
    "BarrierSetTimeout": (None, [ctypes.c_void_p, ctypes.c_double]),
    "BarrierTimeout": (ctypes.c_double, [ctypes.c_void_p]),
    "BarrierFailures": (ctypes.c_ulonglong, [ctypes.c_void_p, _STRINGS, ctypes.c_int]),
    "BeginPass": (
        ctypes.c_int,
        [_STRINGS, ctypes.c_int, _HANDLES, ctypes.c_int, ctypes.c_ulonglong, ctypes.c_int],
    ),
    "Fence": (ctypes.c_int, [_HANDLES, ctypes.c_int, _HANDLES, ctypes.c_int]),
    "EnterCall": (ctypes.c_ulonglong, [ctypes.c_ulonglong]),
    "LeaveCall": (None, [ctypes.c_ulonglong]),
}


def _open():
    if not os.path.exists(PATH):
        raise ImportError(
            f"gluon_syncbn's compiled library is missing ({PATH}). Build it: in a checkout, "
            '"make build"; otherwise install the package with "pip install .", which compiles it.'
        )
    try:
        library = ctypes.CDLL(PATH)
    except OSError as error:
        raise ImportError(
            f"gluon_syncbn's compiled library does not load: {error}. Build it again for this "
            'MXNet and this machine: in a checkout, "make build"; otherwise "pip install .".'
        ) from error
    for name, (restype, argtypes) in _SIGNATURES.items():
        function = getattr(library, "GluonSyncBN" + name)
        function.restype, function.argtypes = restype, argtypes
    return library


def check(status):
    """Raise what the library says went wrong when ``status`` is negative; return it otherwise."""
    if status < 0:
        raise RuntimeError(LIBRARY.GluonSyncBNLastError().decode())
    return status


def _register_operators():
    check(LIBRARY.GluonSyncBNRegisterOperators())
    for operator, (submodule, name) in OPERATORS.items():
        handle = OpHandle()
        check_call(_LIB.NNGetOpHandle(c_str(operator), ctypes.byref(handle)))
        for root, make in ((ndarray, _make_ndarray_function), (symbol, _make_symbol_function)):
            module = getattr(root, submodule)
            function = make(handle, operator, name)
            function.__module__ = module.__name__
            setattr(module, name, function)


LIBRARY = _open()
_register_operators()
