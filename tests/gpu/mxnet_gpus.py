"""MXNet's GPUs, as the tests here use them.

Only our operators and copies run on them, so the tests work with GPUs that mxnet-cu112 has no
kernels for, and with emulated ones (helpers/emulated_cuda.py): gradients and heads are explicit,
and nothing is computed with MXNet's own operators.  (After one has failed, MXNet can crash when
the process ends.)
"""

import os
import pathlib

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

from gluon_syncbn.data_parallel import random_state
from gluon_syncbn.library import LIBRARY

EMULATED = "EMULATED_GPUS" in os.environ
TOLERANCE = {"float16": 2e-3, "float32": 3e-6, "float64": 1e-11}


def missing():
    if not mx.runtime.Features().is_enabled("CUDA"):
        return "this MXNet has no CUDA; install mxnet-cu112"
    if not EMULATED and not any(pathlib.Path("/dev").glob("nvidia[0-9]*")):
        return "there is no GPU here (`make emulated` tests without)"
    if LIBRARY.NeedCuda() != 0:
        return LIBRARY.LastError().decode()
    return ""


def need_gpus(count):
    why = missing()
    there = 0 if why else mx.context.num_gpus()
    return pytest.mark.skipif(
        there < count, reason=why or f"needs {count} GPUs, and there is {there}"
    )


def load(values, context, dtype=None):
    return mx.nd.array(values, ctx=context, dtype=dtype or values.dtype)


def differentiable(*arrays, grad_req="write"):
    grads = [load(np.full(a.shape, 2, a.dtype), a.context) for a in arrays]
    autograd.mark_variables(list(arrays), grads, grad_req)
    return grads


def replace_what_gluon_computes(setattr):  # or monkeypatch.setattr
    """Take from the host what Gluon computes on a device: new gradients' zeros, random states."""

    def zeros(shape, ctx=None, dtype=None, **_):
        return mx.nd.array(np.zeros(shape), ctx=ctx, dtype=dtype)

    def zeros_like(array, out):
        return zeros(array.shape, array.context, array.dtype).copyto(out)

    setattr(mx.ndarray, "zeros", zeros)
    setattr(mx.ndarray, "zeros_like", zeros_like)
    setattr(random_state, "_seed_device", lambda *_: 0)
