"""The CUDA kernels' arithmetic and indices, where there is no GPU.

The very sources are compiled for the CPU, against an emulation of CUDA (tests/cuda_emulation), and
checked against NumPy in float64.  On a GPU, tests/gpu does the same, and more.
"""

import ctypes
import mmap
import pathlib
import subprocess

import numpy as np
import pytest

import gpu_kernels as checks

HERE = pathlib.Path(__file__).parent
DTYPES = ["float16", "float32", "float64"]
# Planes of whole accesses and others, rows of whole accesses and others, few channels and many.
LAYOUTS = [
    ((4, 8, 8, 8), 1),
    ((3, 5, 7, 7), 1),
    ((2, 3, 40, 40), 1),
    ((2, 70, 1, 3), 1),
    ((1, 1, 5), 1),
    ((200, 64), 1),
    ((37, 65), -1),
    ((6, 9, 9, 3), -1),
    ((5, 3, 3, 24), -1),
    ((2, 300), 1),
    ((9, 520), 0),
    ((3, 4, 5, 6, 2), 2),
    ((2, 701), 1),
    ((3000, 1), 1),
]


class GuardedArray:
    """An array that ends where memory ends: to read a whole access behind it is a crash."""

    def __init__(self, values):
        values = np.ascontiguousarray(values)
        self.dtype = str(values.dtype)
        page = mmap.PAGESIZE
        size = (values.nbytes + 15) // 16 * 16
        pages = (size + page - 1) // page + 1
        self.memory = mmap.mmap(-1, pages * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        offset = (pages - 1) * page - size
        libc = ctypes.CDLL(None, use_errno=True)
        guard = ctypes.c_void_p(start + (pages - 1) * page)
        assert libc.mprotect(guard, ctypes.c_size_t(page), 0) == 0  # PROT_NONE
        self.pointer = start + offset
        self.view = np.frombuffer(self.memory, values.dtype, values.size, offset).reshape(
            values.shape
        )
        self.view[...] = values

    def numpy(self):
        return self.view.copy()


class EmulatedDevice:
    index, stream = 0, 1

    def array(self, values):
        return GuardedArray(values)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "emulated.so"
    flags = "-std=c++17 -O2 -Wall -Wextra -Werror -Wno-unknown-pragmas -shared -fPIC".split()
    source = HERE / "cuda_emulation" / "emulated.cc"
    subprocess.run(["c++", *flags, f"-I{source.parent}", source, "-o", path], check=True)
    return ctypes.CDLL(str(path))


# A device of few multiprocessors and one of many; threads in one order and in the other.
@pytest.fixture(params=[(1, 0), (3, 1), (132, 0)], ids=["small", "backwards", "large"])
def kernels(request, library):
    library.Emulate(*request.param)
    return checks.Kernels(library, EmulatedDevice())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", LAYOUTS)
def test_a_step(kernels, dtype, shape, axis):
    checks.check_step(kernels, dtype, shape, axis)
    checks.check_step(kernels, dtype, shape, axis, alone=True, in_place=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", [((8, 3, 9, 9), 1), ((300, 6), 1)])
def test_moving_statistics_requests_and_handing_through(kernels, dtype, shape, axis):
    for alone in (False, True):
        checks.check_moving_statistics(kernels, dtype, shape, axis, alone)
        checks.check_requests(kernels, dtype, shape, axis, alone)
        checks.check_step(kernels, dtype, shape, axis, alone=alone, fix_gamma=True)
    checks.check_no_measuring(kernels, dtype, shape, axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", [((2, 3, 7, 7), 1), ((20, 6), 1)])
def test_two_devices(kernels, dtype, shape, axis):
    checks.check_two_devices(kernels, dtype, shape, axis)


@pytest.mark.parametrize("shape, axis", [((8, 2, 64, 64), 1), ((8, 64, 64, 2), -1)])
def test_far_from_zero(kernels, shape, axis):
    """10,000 standard deviations away float32 holds the data themselves to 1e-3."""
    checks.check_step(kernels, "float32", shape, axis, offset=1e4)


def test_the_same_bits_on_every_run_and_in_any_order(library):
    x = np.random.RandomState(0).randn(5, 3, 31, 17).astype("float32")
    results = []
    for order in (0, 1, 0):
        library.Emulate(3, order)
        kernels = checks.Kernels(library, EmulatedDevice())
        layer = checks.Layer(kernels, "float32", x.shape, 1)
        layer.forward(kernels.device.array(x), kernels.device.array(x))
        results.append(layer.statistics.numpy()[:7].tobytes())
    assert len(set(results)) == 1


def test_arrays_that_do_not_begin_on_16_bytes(kernels):
    """A part of an array, as x[1:] is."""

    class Shifted(EmulatedDevice):
        def array(self, values):
            values = np.ascontiguousarray(values)
            whole = GuardedArray(np.concatenate([np.zeros(1, values.dtype), values.ravel()]))
            whole.pointer += values.itemsize
            whole.numpy = lambda: whole.view[1:].reshape(values.shape).copy()
            return whole

    kernels.device = Shifted()
    for dtype in DTYPES[:2]:  # float64 parameters lie on 8 bytes, too
        for shape, axis in [((4, 8, 8, 8), 1), ((40, 64), 1), ((3, 5, 7), 1)]:
            checks.check_step(kernels, dtype, shape, axis)


def test_nothing_is_allocated_in_the_steady_state(library, kernels):
    for _ in range(2):
        checks.check_two_devices(kernels, "float32", (4, 8, 8, 8), 1)
        checks.check_step(kernels, "float32", (4, 8, 8, 8), 1, alone=True)
        before = library.EmulatedAllocations()
        checks.check_two_devices(kernels, "float32", (4, 8, 8, 8), 1)
        checks.check_step(kernels, "float32", (4, 8, 8, 8), 1, alone=True)
    assert library.EmulatedAllocations() == before


def test_values_to_the_exchange_and_back(kernels):
    checks.check_values(kernels)


def test_errors_are_told(kernels):
    layer = checks.Layer(kernels, "float32", (2, 3), 1)
    kernel = checks.MomentsBackward(1, layer.shape)
    with pytest.raises(RuntimeError, match="on the GPU: invalid device ordinal"):
        kernels.run(kernel, device=7)


def test_a_failure_on_the_device_reaches_who_waits_for_its_numbers(library, kernels):
    array = kernels.device.array(np.ones(3))
    library.EmulateFailure(1)
    try:
        (error,) = kernels.read(array, 3)
    finally:
        library.EmulateFailure(0)
    assert b"an operator on this device failed" in error
