"""The CUDA kernels on a GPU, on PyTorch's arrays: against NumPy in float64 and PyTorch's own."""

import ctypes
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch with CUDA; it is not installed here")

import gpu_kernels as checks  # noqa: E402
import gpu_moving_average  # noqa: E402
from torch_gpu import TorchDevice  # noqa: E402

LIBRARY = pathlib.Path(__file__).parents[2] / "python" / "gluon_syncbn" / "libgluon_syncbn_cuda.so"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here"),
    pytest.mark.skipif(not LIBRARY.exists(), reason="this build has no CUDA side; run make build"),
]

DTYPES = ["float16", "float32", "float64"]
LAYOUTS = [
    ((16, 64, 56, 56), 1),
    ((16, 56, 56, 64), -1),
    ((32, 256, 14, 14), 1),
    ((64, 512, 7, 7), 1),
    ((64, 7, 7, 512), -1),
    ((8, 3, 224, 224), 1),
    ((8, 224, 224, 3), -1),
    ((4, 65, 33, 31), 1),
    ((4, 33, 31, 65), -1),
    ((4096, 256), 1),
    ((4096, 65), 1),
    ((2, 100_003), 1),
    ((1_000_001, 1), 1),
    ((3, 5, 1, 1), 1),
    ((2, 3, 4, 5, 6), 2),
]


@pytest.fixture(scope="module")
def kernels():
    return checks.Kernels(ctypes.CDLL(str(LIBRARY)), TorchDevice())


@pytest.fixture
def on_another_stream(kernels):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield checks.Kernels(kernels.library, TorchDevice())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", LAYOUTS)
def test_a_step(kernels, dtype, shape, axis):
    checks.check_step(kernels, dtype, shape, axis)
    checks.check_step(kernels, dtype, shape, axis, local=True, in_place=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", LAYOUTS[:2] + LAYOUTS[7:9])
def test_moving_statistics_write_modes_and_two_devices(kernels, dtype, shape, axis):
    for local in (False, True):
        checks.check_moving_statistics(kernels, dtype, shape, axis, local)
        checks.check_write_modes(kernels, dtype, shape, axis, local)
        checks.check_cumulative_average(kernels, dtype, shape, axis, local)
        checks.check_renormalization(kernels, dtype, shape, axis, local)
    checks.check_without_statistics(kernels, dtype, shape, axis)
    checks.check_two_devices(kernels, dtype, shape, axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (2, 300, 1, 2)])
def test_moving_averages(kernels, dtype, shape):
    gpu_moving_average.check_steps(kernels, dtype, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", [((8, 16, 28, 28), 1), ((8, 7, 7, 24), -1)])
def test_activations_residuals_and_weights(kernels, dtype, shape, axis):
    for mode in (checks.WRITE, checks.ADD):
        for slope, residual in ((0.0, False), (0.25, True), (None, True)):
            for local in (False, True):
                checks.check_epilogue(kernels, dtype, shape, axis, local, slope, residual, mode)
        for per_sample in (False, True):
            checks.check_weights(kernels, dtype, shape, axis, per_sample, mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", [((0, 3), 1), ((0, 8, 4, 4), 1), ((2, 8, 0), 1)])
def test_no_elements(kernels, dtype, shape, axis):
    checks.check_no_elements(kernels, dtype, shape, axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis", [((5, 9, 7, 8), 1), ((5, 7, 8, 9), -1), ((30, 65), 1)])
def test_infinities(kernels, dtype, shape, axis):
    for local in (False, True):
        checks.check_infinities(kernels, dtype, shape, axis, local)


@pytest.mark.parametrize("shape, axis", LAYOUTS[:2] + LAYOUTS[7:9])
def test_far_from_zero(kernels, shape, axis):
    checks.check_step(kernels, "float32", shape, axis, offset=1e4)
    for local in (False, True):
        checks.check_float64_far_from_zero(kernels, shape, axis, local)


def test_on_a_stream_of_its_own(on_another_stream):
    checks.check_step(on_another_stream, "float32", (8, 16, 20, 20), 1)


def test_values_to_the_exchange_and_back(kernels):
    checks.check_values(kernels)


def test_the_same_bits_on_every_run(kernels):
    x = np.random.RandomState(0).randn(16, 7, 65, 63).astype("float32")
    results = set()
    for _ in range(5):
        layer = checks.Layer(kernels, "float32", x.shape, 1)
        xd, y = kernels.device.array(x), kernels.device.array(x)
        layer.forward(xd, y)
        results.add(layer.statistics.numpy()[:15].tobytes())
    assert len(results) == 1


def test_an_error_is_reported(kernels):
    params = checks.MomentsBackwardParams(1, checks.feature_shape((2, 3), 1))
    with pytest.raises(RuntimeError, match="on the GPU: invalid device ordinal"):
        kernels.run(params, device=99)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_as_pytorch_does(kernels, dtype, channels_last):
    """Against the four kernels of torch.nn.SyncBatchNorm, on the same data."""
    rng = np.random.RandomState(0)
    shape = (16, 48, 28, 30)
    format = torch.channels_last if channels_last else torch.contiguous_format
    x, dy = (
        torch.from_numpy(rng.randn(*shape).astype(dtype)).to("cuda").to(memory_format=format)
        for _ in range(2)
    )
    memory = (lambda t: t.permute(0, 2, 3, 1)) if channels_last else (lambda t: t)
    layout, axis = ((16, 28, 30, 48), -1) if channels_last else (shape, 1)
    layer = checks.Layer(kernels, dtype, layout, axis)

    gamma, beta = layer.gamma.tensor, layer.beta.tensor
    mean, invstd = torch.batch_norm_stats(x, 1e-5)
    wanted_y = torch.batch_norm_elemt(x, gamma, beta, mean, invstd, 1e-5)
    sum_dy, sum_dy_xmu, wanted_dgamma, wanted_dbeta = torch.batch_norm_backward_reduce(
        dy, x, mean, invstd, gamma, True, True, True
    )
    count = torch.tensor([x.numel() // 48], dtype=torch.int32, device="cuda")
    wanted_dx = torch.batch_norm_backward_elemt(
        dy, x, mean, invstd, gamma, sum_dy, sum_dy_xmu, count
    )

    device = kernels.device
    xd, dyd = (device.array(memory(t).contiguous().cpu().numpy()) for t in (x, dy))
    y, dx = (device.array(np.zeros(layout, dtype)) for _ in range(2))
    layer.forward(xd, y)
    layer.backward(dyd, xd, dx)
    tolerance = 3 * checks.TOLERANCE[dtype]  # each has an error of its own; PyTorch's is larger
    tolerance = max(tolerance, 1e-5 if dtype == "float32" else 0)
    for got, wanted in [
        (y.numpy(), memory(wanted_y)),
        (dx.numpy(), memory(wanted_dx)),
        (layer.gamma_grad.numpy(), wanted_dgamma),
        (layer.beta_grad.numpy(), wanted_dbeta),
    ]:
        assert checks.largest_error(got, wanted.cpu().numpy()) < tolerance
