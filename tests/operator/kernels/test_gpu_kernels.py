"""The CUDA kernels' arithmetic and indices, without a GPU.

The same sources are compiled for the CPU, against an emulation of CUDA (tests/cuda_emulation), and
checked against NumPy in float64.  On a GPU, tests/gpu does the same, and more.
"""

import ctypes
import mmap
import os

import numpy as np
import pytest

import emulated_cuda
import gpu_kernels as checks
import gpu_moving_average

DTYPES = ["float16", "float32", "float64"]
# Planes and rows with and without whole accesses, few channels and many.
LAYOUTS = [
    ((4, 8, 8, 8), 1),
    ((3, 5, 7, 7), 1),
    ((2, 3, 40, 40), 1),
    ((3, 5, 14, 14), 1),
    ((5, 4, 3, 2), 1),
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
    """An array that ends, up to rounding to 16 bytes, at the end of accessible memory.

    Reading an access after its end crashes, and writes into the padding are detected.
    """

    CANARY = 0xA5

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
        self.padding = np.frombuffer(
            self.memory, "uint8", size - values.nbytes, offset + values.nbytes
        )
        self.padding[...] = self.CANARY

    def numpy(self):
        assert (
            self.padding == self.CANARY
        ).all(), "something was written after the end of the array"
        return self.view.copy()


class DeviceArray:
    """An array in a device's memory, accessible to the device's own kernels and copies only."""

    def __init__(self, library, values):
        values = np.ascontiguousarray(values)
        self.library, self.shape, self.dtype = library, values.shape, str(values.dtype)
        pointer = ctypes.c_void_p()
        assert library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(values.nbytes)) == 0
        self.pointer = pointer.value
        self.copy(self.pointer, values.ctypes.data, values.nbytes)

    def copy(self, to, source, size):
        arguments = ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), 4
        assert self.library.cudaMemcpy(*arguments) == 0

    def numpy(self):
        values = np.empty(self.shape, self.dtype)
        self.copy(values.ctypes.data, self.pointer, values.nbytes)
        return values


class EmulatedDevice:
    index = 0

    def __init__(self, library):
        self.library = library
        stream = ctypes.c_void_p()
        assert library.cudaStreamCreate(ctypes.byref(stream)) == 0
        self.stream = stream.value
        self.in_use = []

    def array(self, values):
        return self.keep(GuardedArray(values))

    def keep(self, array):
        """Keep the array as long as a kernel may use it, and read it after all kernels have run."""
        self.in_use.append(array)
        numpy = array.numpy

        def synchronized_numpy():
            self.synchronize()
            return numpy()

        array.numpy = synchronized_numpy
        return array

    def synchronize(self):
        assert self.library.cudaDeviceSynchronize() == 0
        self.in_use.clear()


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    os.environ.setdefault("EMULATED_GPUS", "2")
    return ctypes.CDLL(str(emulated_cuda.build_alone(tmp_path_factory.mktemp("cuda"))))


@pytest.fixture(scope="session")
def device(library):
    return EmulatedDevice(library)


# A device with few multiprocessors and one with many; both orders of threads.
@pytest.fixture(params=[(1, 0), (3, 1), (132, 0)], ids=["small", "backwards", "large"])
def kernels(request, library, device):
    library.Emulate(*request.param)
    return checks.Kernels(library, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", LAYOUTS)
def test_a_step(kernels, dtype, shape, axis):
    checks.check_step(kernels, dtype, shape, axis)
    checks.check_step(kernels, dtype, shape, axis, local=True, in_place=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", [((8, 3, 9, 9), 1), ((300, 6), 1), ((7, 600), 1)])
def test_moving_statistics_write_modes_and_copies(kernels, dtype, shape, axis):
    for local in (False, True):
        checks.check_moving_statistics(kernels, dtype, shape, axis, local)
        checks.check_write_modes(kernels, dtype, shape, axis, local)
        checks.check_cumulative_average(kernels, dtype, shape, axis, local)
        checks.check_renormalization(kernels, dtype, shape, axis, local)
        checks.check_step(kernels, dtype, shape, axis, local=local, fix_gamma=True)
    checks.check_without_statistics(kernels, dtype, shape, axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_weights(kernels, dtype, per_sample):
    for shape, axis in (((5, 3, 7, 6), 1), ((5, 4, 6, 3), -1), ((300, 6), 1)):
        for mode in (checks.WRITE, checks.ADD):
            checks.check_weights(kernels, dtype, shape, axis, per_sample, mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(
    "slope, residual", [(0.0, False), (0.25, False), (0.0, True), (None, True)]
)
def test_activations_and_residuals(kernels, dtype, local, slope, residual):
    for shape, axis in (((5, 3, 7, 6), 1), ((40, 24), 1)):
        for mode in (checks.WRITE, checks.ADD):
            checks.check_epilogue(kernels, dtype, shape, axis, local, slope, residual, mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", [((2, 3, 7, 7), 1), ((20, 6), 1)])
def test_two_devices(kernels, dtype, shape, axis):
    checks.check_two_devices(kernels, dtype, shape, axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", [((0, 3), 1), ((0, 8, 4, 4), 1), ((2, 8, 0), 1)])
def test_no_elements(kernels, dtype, shape, axis):
    checks.check_no_elements(kernels, dtype, shape, axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (2, 300, 1, 2)])
def test_moving_averages(kernels, dtype, shape):
    gpu_moving_average.check_steps(kernels, dtype, shape)


def test_on_a_device_that_is_not_the_current_one(library):
    class Second(EmulatedDevice):
        index = 1

        def array(self, values):
            with self:
                return self.keep(DeviceArray(self.library, values))

        def synchronize(self):
            with self:
                super().synchronize()

        def __enter__(self):
            assert self.library.cudaSetDevice(1) == 0

        def __exit__(self, *_):
            assert self.library.cudaSetDevice(0) == 0

    assert library.cudaSetDevice(1) == 0
    second = Second(library)

    class FromTheFirst(checks.Kernels):
        def call(self, *arguments, **options):
            assert library.cudaSetDevice(0) == 0
            super().call(*arguments, **options)

    kernels = FromTheFirst(library, second)
    checks.check_two_devices(kernels, "float32", (4, 3, 7, 7), 1)
    checks.check_step(kernels, "float16", (4, 7, 7, 8), -1, local=True)
    assert library.cudaSetDevice(0) == 0


@pytest.mark.parametrize(
    "shape, axis",
    [
        ((8, 2, 64, 64), 1),
        ((8, 64, 64, 2), -1),
        ((8, 3, 31, 33), 1),
        ((8, 33, 31, 5), -1),
        ((300, 65), 1),
    ],
)
def test_far_from_zero(kernels, shape, axis):
    """At 10,000 standard deviations, float32 represents the data themselves to 1e-3."""
    checks.check_step(kernels, "float32", shape, axis, offset=1e4)
    for local in (False, True):
        checks.check_float64_far_from_zero(kernels, shape, axis, local)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", [((5, 9, 7, 8), 1), ((5, 7, 8, 9), -1), ((30, 65), 1)])
def test_infinities(kernels, dtype, shape, axis):
    for local in (False, True):
        checks.check_infinities(kernels, dtype, shape, axis, local)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", [((8, 2, 64, 64), 1), ((8, 64, 64, 2), -1)])
def test_a_far_first_element_costs_nothing(kernels, dtype, shape, axis):
    checks.check_step(kernels, dtype, shape, axis, first=1e3)


def test_the_same_bits_on_every_run_and_in_any_order(library, device):
    x = np.random.RandomState(0).randn(5, 3, 31, 17).astype("float32")
    results = []
    for order in (0, 1, 0):
        library.Emulate(3, order)
        kernels = checks.Kernels(library, device)
        layer = checks.Layer(kernels, "float32", x.shape, 1)
        xd, y = kernels.device.array(x), kernels.device.array(x)
        layer.forward(xd, y)
        results.append(layer.statistics.numpy()[:7].tobytes())
    assert len(set(results)) == 1


def test_arrays_that_do_not_begin_on_16_bytes(kernels):
    """A view of an array, such as x[1:]."""

    class Shifted(EmulatedDevice):
        def array(self, values):
            values = np.ascontiguousarray(values)
            whole = GuardedArray(np.concatenate([np.zeros(1, values.dtype), values.ravel()]))
            whole.pointer += values.itemsize
            whole.numpy = lambda: whole.view[1:].reshape(values.shape).copy()
            return self.keep(whole)

    kernels.device = Shifted(kernels.library)
    for dtype in DTYPES[:2]:  # float64 parameters are at multiples of 8 bytes as well
        for shape, axis in [((4, 8, 8, 8), 1), ((40, 64), 1), ((3, 5, 7), 1)]:
            checks.check_step(kernels, dtype, shape, axis)


def test_nothing_is_allocated_in_the_steady_state(library, kernels):
    for _ in range(2):
        checks.check_two_devices(kernels, "float32", (4, 8, 8, 8), 1)
        checks.check_step(kernels, "float32", (4, 8, 8, 8), 1, local=True)
        before = library.EmulatedAllocations()
        checks.check_two_devices(kernels, "float32", (4, 8, 8, 8), 1)
        checks.check_step(kernels, "float32", (4, 8, 8, 8), 1, local=True)
    assert library.EmulatedAllocations() == before


def test_scratch_memory_grows_and_stays_valid(library, device):
    """A captured CUDA graph may hold a pointer to what a smaller layer used."""
    kernels = checks.Kernels(library, device)
    frees, allocations = library.EmulatedFrees(), library.EmulatedAllocations()
    for channels in (1000, 3000):
        checks.check_step(kernels, "float32", (2, channels, 2, 2), 1)
    assert library.EmulatedAllocations() > allocations
    assert library.EmulatedFrees() == frees


def test_values_to_the_exchange_and_back(kernels):
    checks.check_values(kernels)


def test_values_leave_the_thread_on_its_device(library):
    """They are read in whichever thread finds them ready, perhaps the user's."""
    library.Emulate(1, 0)
    kernels = checks.Kernels(library, EmulatedDevice(library))  # device 0
    current = ctypes.c_int()
    assert library.cudaSetDevice(1) == 0
    try:
        checks.check_values(kernels)
        assert library.cudaGetDevice(ctypes.byref(current)) == 0
        assert current.value == 1
    finally:
        assert library.cudaSetDevice(0) == 0


def test_planes_of_more_elements_than_an_int_counts(library):
    """With one element per access, as for unaligned arrays: the elements that threads read."""
    outer, channels, inner, chunk, threads = 2, 3, 2**31 + 5, 10_000, 256
    last_plane = inner // chunk  # the slice with the end of the first plane
    for part in (0, last_plane, 2 * inner // chunk):
        places = set()
        for thread in range(threads):
            at = (ctypes.c_int64 * chunk)()
            arguments = [ctypes.c_int64(n) for n in (outer, channels, inner, chunk, part)]
            count = library.EmulatedPlaneCursor(*arguments, thread, ctypes.c_int64(1), chunk, at)
            places.update(at[:count])
        wanted = range(part * chunk, min((part + 1) * chunk, outer * inner))
        assert places == {i // inner * channels * inner + inner + i % inner for i in wanted}


def test_errors_are_reported(kernels):
    layer = checks.Layer(kernels, "float32", (2, 3), 1)
    params = checks.MomentsBackwardParams(1, layer.shape)
    with pytest.raises(RuntimeError, match="on the GPU: invalid device ordinal"):
        kernels.run(params, device=7)


def test_a_failure_on_the_device_is_passed_to_the_callback(library, kernels):
    array = kernels.device.array(np.ones(3))
    library.EmulateFailure(1)
    try:
        (error,) = kernels.read(array, 3)
    finally:
        library.EmulateFailure(0)
    assert b"an operator on this device failed" in error
