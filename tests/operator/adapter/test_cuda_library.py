"""The CUDA side as a library: what is in it, and that it is loaded only for GPUs."""

import ctypes
import os
import pathlib
import shutil
import struct
import subprocess

import mxnet as mx
import pytest

import fresh_process
import gluon_syncbn
import gpu_kernels as checks
from gluon_syncbn import library
from paths import OPERATOR

CUDA = pathlib.Path(library.PATH).with_name("libgluon_syncbn_cuda.so")
needs_cuda_build = pytest.mark.skipif(
    not CUDA.exists(), reason="this build has no CUDA side: no nvcc was found"
)


@pytest.mark.skipif("GLUON_SYNCBN_TEST_CU112" not in os.environ, reason="`make cu112` sets it")
def test_these_tests_run_in_mxnet_cu112():
    assert mx.runtime.Features().is_enabled("CUDA")


def test_built_where_there_is_a_compiler():
    if shutil.which("nvcc") and os.environ.get("GLUON_SYNCBN_CUDA", "AUTO") != "OFF":
        assert CUDA.exists(), "nvcc is on the path, but there is no CUDA side; run make clean build"


def test_an_exception_in_a_callback_reaches_the_waiting_thread(tmp_path):
    """It must not propagate into CUDA, which would end the process."""
    here = pathlib.Path(__file__).parent
    source, ours = here / "cuda_callback.cc", OPERATOR / "adapter" / "cuda_library.cc"
    cuda, program = tmp_path / "libgluon_syncbn_cuda.so", tmp_path / "program"
    compiler = ["c++", "-std=c++17", f"-I{OPERATOR}"]
    for command in (
        [*compiler, "-shared", "-fPIC", "-DCUDA_SIDE", source, "-o", cuda],
        [*compiler, source, ours, "-o", program, "-ldl"],
    ):
        subprocess.run([*map(str, command)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "5.000000 then it broke\n"), done


PTX, MACHINE_CODE = 1, 2


def images(path):
    """Find the (kind, architecture) of all device code in a library's fat binaries."""
    data = path.read_bytes()
    found, at = set(), 0
    while True:
        at = data.find(b"\x50\xed\x55\xba\x01\x00\x10\x00", at)
        if at < 0:
            return found
        entry = at + 16
        end = entry + struct.unpack_from("<Q", data, at + 8)[0]
        while entry < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
            found.add((kind, struct.unpack_from("<I", data, entry + 28)[0]))
            entry += header + size
        at = end


@needs_cuda_build
@pytest.mark.skipif("CUDAARCHS" in os.environ, reason="CUDAARCHS says for what it is built")
def test_holds_code_for_several_architectures_and_for_later_ones():
    found = images(CUDA)
    machine_code = {architecture for kind, architecture in found if kind == MACHINE_CODE}
    assert len(machine_code) >= 2
    assert [architecture for kind, architecture in found if kind == PTX] == [max(machine_code)]


def test_nothing_of_cuda_is_touched_on_a_cpu():
    script = """
import mxnet as mx, gluon_syncbn
from mxnet import autograd
layer = gluon_syncbn.SyncBatchNorm()
layer.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
model = gluon_syncbn.ModelDataParallel(layer, [mx.cpu(0), mx.cpu(1)])
with autograd.record():
    outs = model([mx.nd.ones((2, 3), ctx=mx.cpu(i)) for i in range(2)])
gluon_syncbn.parallel_backward(outs)
mx.nd.waitall()
maps = open("/proc/self/maps").read()
assert "libgluon_syncbn.so" in maps
assert "libgluon_syncbn_cuda" not in maps
"""
    fresh_process.run(script)


@needs_cuda_build
@pytest.mark.skipif(
    any(pathlib.Path("/dev").glob("nvidia[0-9]*")), reason="there is a GPU: tests/gpu tests more"
)
def test_loads_without_a_driver_and_says_what_is_missing():
    class NoDevice:
        index, stream = 0, None

    kernels = checks.Kernels(ctypes.CDLL(str(CUDA)), NoDevice())
    params = checks.MomentsBackwardParams(1, checks.feature_shape((2, 3), 1))
    with pytest.raises(RuntimeError, match="gluon_syncbn on the GPU: .*(driver|device)"):
        kernels.run(params)


def test_gpus_without_the_cuda_side(tmp_path):
    """The error comes before anything is computed and says what to do."""
    package = tmp_path / "gluon_syncbn"
    ignore = shutil.ignore_patterns("libgluon_syncbn_cuda.so", "__pycache__")
    shutil.copytree(CUDA.parent, package, ignore=ignore)
    script = """
import mxnet as mx, gluon_syncbn
layer = gluon_syncbn.SyncBatchNorm()
try:
    gluon_syncbn.ModelDataParallel(layer, [mx.gpu(0)])
except RuntimeError as error:
    print(error)
"""
    done = fresh_process.run(script, PYTHONPATH=str(tmp_path))
    assert "has no GPU side here, so it takes CPU contexts only" in done.stdout
    assert "install the toolkit, then build again" in done.stdout


@needs_cuda_build
@pytest.mark.skipif(mx.runtime.Features().is_enabled("CUDA"), reason="this MXNet has CUDA")
def test_gpus_with_an_mxnet_without_cuda():
    with pytest.raises(RuntimeError, match="this MXNet has no CUDA.*install mxnet-cu112"):
        gluon_syncbn.ModelDataParallel(gluon_syncbn.SyncBatchNorm(), [mx.gpu(0)])


def test_cpus_and_gpus_do_not_mix():
    with pytest.raises(ValueError, match=r"mixes CPUs and GPUs, cpu\(0\), gpu\(0\)"):
        gluon_syncbn.ModelDataParallel(gluon_syncbn.SyncBatchNorm(), [mx.cpu(0), mx.gpu(0)])
