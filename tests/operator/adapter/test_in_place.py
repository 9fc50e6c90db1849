"""In a graph the feature map and its gradient are passed on in place, without a copy.

In the forward pass this does not hold where MXNet uses MKL-DNN's layouts and our operators do not
(operator_util.h says why).  That is decided once in a process.
"""

import ctypes
import os
import subprocess
import sys

import mxnet as mx
from mxnet import autograd
from mxnet.base import _LIB, NDArrayHandle, check_call
from mxnet.gluon import nn

import fresh_process
from gluon_syncbn import SyncBatchNorm
from paths import OPERATOR

HERE = os.path.dirname(os.path.abspath(__file__))


def test_large_pages_are_asked_for_where_there_is_memory(tmp_path):
    include = os.path.join(os.path.dirname(mx.__file__), "include")
    # As CMakeLists.txt has it: MXNet's own definitions, less what needs other headers.
    off = "MXNET_USE_CUDA MXNET_USE_MKLDNN MSHADOW_USE_CUDA MSHADOW_USE_CBLAS MSHADOW_USE_MKL "
    off += "MSHADOW_USE_F16C _GLIBCXX_USE_CXX11_ABI"
    command = [
        "c++",
        "-std=c++17",
        f"-I{OPERATOR}",
        *(f"-D{name}=0" for name in off.split()),
        "-isystem",
        include,
    ]
    program = str(tmp_path / "program")
    subprocess.run([*command, os.path.join(HERE, "huge_pages.cc"), "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout == "memory\n", done


def addresses_in(net, x):
    """Run forward and backward and return {name of an operator's input or output: address}."""
    found = {}

    def note(name, operator, handle):
        array = mx.nd.NDArray(ctypes.cast(handle, NDArrayHandle), writable=False)
        address = ctypes.c_void_p()
        check_call(_LIB.MXNDArrayGetData(array.handle, ctypes.byref(address)))
        found[name if isinstance(name, str) else name.decode()] = address.value

    net.register_op_hook(note, monitor_all=True)
    with autograd.record():
        y = net(x)
    y.backward()
    mx.nd.waitall()
    return found


def check(forward=True):
    net = nn.HybridSequential(prefix="net_")
    net.add(
        nn.Dense(6, flatten=False, prefix="before_"),
        SyncBatchNorm(prefix="bn_"),
        nn.Dense(3, flatten=False, prefix="after_"),
    )
    net.initialize()
    net.hybridize()
    x = mx.nd.ones((4, 5))
    net(x)
    at = addresses_in(net, x)
    assert at["bn_moments_output"] == at["bn_fwd_data"]
    assert (at["bn_moments_data"] == at["bn_moments_output"]) == forward
    assert at["bn_fwd_output"] != at["bn_fwd_data"]  # backward still reads what came in
    # dy is the gradient of what is normalized, and becomes dx.
    dy = at["after_fwd_backward_0"]
    assert dy == at["bn_fwd_backward_data"] == at["bn_moments_backward_data"]


def in_a_process(forward, **environment):
    script = f"import test_in_place; test_in_place.check({forward})"
    fresh_process.run(script, PYTHONPATH=os.pathsep.join([HERE, *sys.path]), **environment)


def test_both_ways_in_place():
    in_a_process(True, GLUON_SYNCBN_MKLDNN_LAYOUTS="1", MXNET_MKLDNN_ENABLED="1")


def test_both_ways_in_place_without_mkl_dnn():
    in_a_process(True, MXNET_MKLDNN_ENABLED="0")


def test_backward_in_place_without_the_layouts():
    in_a_process(False, GLUON_SYNCBN_MKLDNN_LAYOUTS="0", MXNET_MKLDNN_ENABLED="1")
