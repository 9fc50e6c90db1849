"""Run scripts in processes where calls of MXNet and the system fail on demand (faults.c)."""

import functools
import os
import subprocess
import tempfile

import fresh_process

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "faults.c")

# `faults.pushes.value = 2` in a script makes the next two pushes fail.
PRELUDE = """
import ctypes
import time
import types
import mxnet as mx
import gluon_syncbn
faults = types.SimpleNamespace(**{
    name: ctypes.c_int.in_dll(ctypes.CDLL(None), "faults_" + name)
    for name in ("pushes", "threads", "hold_push", "hold_thread")
})

def wait_for(fault, value):
    end = time.monotonic() + 60
    while fault.value != value:
        assert time.monotonic() < end
        time.sleep(0.001)
"""


@functools.lru_cache(maxsize=None)
def _library():
    directory = tempfile.TemporaryDirectory()
    path = os.path.join(directory.name, "faults.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-o", path, SOURCE, "-ldl"], check=True)
    return directory, path  # it is deleted with the object


def run(script, timeout=240, **environment):
    """Run ``script`` after the prelude, as :func:`fresh_process.run`."""
    preload = {"LD_PRELOAD": _library()[1], "MALLOC_PERTURB_": "255"}
    return fresh_process.run(PRELUDE + script, timeout=timeout, **preload, **environment)
