"""Compare the CUDA kernels with PyTorch's and cuDNN's: bandwidth relative to a copy.

    make bench BENCH_ARGS="--ctx gpu"

Every candidate computes the same training step of batch normalization on the same arrays; results
are checked against each other before anything is timed.  The effective bandwidth is the number of
bytes that the step has to move (each kernel's arrays once) divided by the time between CUDA events.
The copy, device to device, is of the same array and takes turns with the candidates.  Needs PyTorch
with CUDA.
"""

import ctypes
import datetime
import os
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
LIBRARY = os.path.join(HERE, "..", "python", "gluon_syncbn", "libgluon_syncbn_cuda.so")
TESTS = os.path.join(HERE, "..", "tests")
sys.path[:0] = [os.path.join(TESTS, "helpers"), os.path.join(TESTS, "gpu")]

# 100 MB in float16 and 200 MB in float32.  A step uses four such arrays, more than caches hold.
SHAPES = [
    (64, 64, 112, 112),
    (64, 256, 56, 56),
    (128, 512, 28, 28),
    (128, 2048, 14, 14),
    (512, 2048, 7, 7),
    (64, 65, 112, 112),
]
SMALL = [(16, 64, 56, 56), (32, 256, 14, 14)]
DTYPES = ["float32", "float16", "float64"]
REPLAYS = 20  # between two events
# Arrays that the four kernels move: x; x, y; dy, x; dy, x, dx.
PASSES = 1 + 2 + 2 + 3


def unavailable():
    """Return why nothing can be timed here, or an empty string."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed in this environment"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU here"
    if not os.path.exists(LIBRARY):
        return "this build has no CUDA side: no nvcc was found"
    return ""


class Case:
    """The arrays of one shape, dtype and layout, and the candidates' steps on them."""

    def __init__(self, kernels, shape, dtype, channels_last):
        import torch

        import gpu_kernels
        from torch_gpu import TorchArray

        self.torch = torch
        layout = torch.channels_last if channels_last else torch.contiguous_format
        generator = torch.Generator("cuda").manual_seed(0)

        def array():
            values = torch.randn(shape, device="cuda", generator=generator)
            return values.to(getattr(torch, dtype)).to(memory_format=layout)

        self.x, self.dy = array(), array()
        self.y, self.dx = torch.empty_like(self.x), torch.empty_like(self.x)
        n, c, h, w = shape
        of_layout, axis = ((n, h, w, c), -1) if channels_last else (shape, 1)
        self.layer = gpu_kernels.Layer(kernels, dtype, of_layout, axis)
        self.arrays = [TorchArray(t) for t in (self.x, self.y, self.dy, self.dx)]
        self.gamma, self.beta = self.layer.gamma.tensor, self.layer.beta.tensor
        self.count = torch.tensor([self.x.numel() // c], dtype=torch.int32, device="cuda")

    def bytes(self):
        return self.x.numel() * self.x.element_size()

    def ours(self):
        """The four kernels of a synchronized layer, without the all-reduce between them."""
        x, y, dy, dx = self.arrays
        self.layer.forward(x, y)
        self.layer.backward(dy, x, dx)
        return self.y, self.dx, self.layer.gamma_grad.tensor, self.layer.beta_grad.tensor

    def pytorch(self):
        """The four kernels of torch.nn.SyncBatchNorm."""
        torch = self.torch
        mean, invstd = torch.batch_norm_stats(self.x, 1e-5)
        y = torch.batch_norm_elemt(self.x, self.gamma, self.beta, mean, invstd, 1e-5)
        sum_dy, sum_dy_xmu, dgamma, dbeta = torch.batch_norm_backward_reduce(
            self.dy, self.x, mean, invstd, self.gamma, True, True, True
        )
        dx = torch.batch_norm_backward_elemt(
            self.dy, self.x, mean, invstd, self.gamma, sum_dy, sum_dy_xmu, self.count
        )
        return y, dx, dgamma, dbeta

    def cudnn(self):
        """cuDNN's batch normalization, forward and backward; not synchronized."""
        torch = self.torch
        y, mean, invstd, reserve = torch.cudnn_batch_norm(
            self.x, self.gamma, self.beta, None, None, True, 0.1, 1e-5
        )
        dx, dgamma, dbeta = torch.ops.aten.cudnn_batch_norm_backward(
            self.x, self.dy, self.gamma, None, None, mean, invstd, 1e-5, reserve
        )
        return y, dx, dgamma, dbeta

    def copy(self):
        self.y.copy_(self.x)

    def check(self):
        wanted = [t.double() for t in self.ours()]
        tolerance = 1e-2 if self.x.dtype == self.torch.float16 else 1e-4
        for candidate in (self.pytorch, self.cudnn):
            try:
                got = candidate()
            except RuntimeError:  # for example, cuDNN has no float64 with channels last
                continue
            for a, b in zip(got, wanted):
                error = (a.double() - b).abs().max() / b.abs().max()
                assert error < tolerance, (candidate.__name__, float(error))


def seconds_of(torch, function, repeats):
    """Return the median time of a step, replayed many times from a CUDA graph.

    This leaves out launch overhead: the next replay is always queued, so the GPU is never idle.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / REPLAYS)
    return statistics.median(times[3:])


def run(report, quick):
    """Fill a report with tables; return the machine and versions of the figures."""
    import torch

    import gpu_kernels
    from torch_gpu import TorchDevice

    kernels = gpu_kernels.Kernels(ctypes.CDLL(LIBRARY), TorchDevice())
    repeats = 10 if quick else 50
    for title, shapes in (("Arrays beyond the caches", SHAPES), ("Smaller arrays", SMALL)):
        report.table(
            f"{title}: forward and backward on a GPU",
            ["shape", "copy (GB/s)", "ours", "pytorch", "cudnn", "times pytorch's speed"],
            "Effective bandwidth relative to the copy's.",
        )
        for shape in shapes:
            for dtype in DTYPES:
                for channels_last in (False, True):
                    case = Case(kernels, shape, dtype, channels_last)
                    case.check()
                    copy = 2 * case.bytes() / seconds_of(torch, case.copy, repeats)
                    speeds = []
                    for candidate in (case.ours, case.pytorch, case.cudnn):
                        try:
                            taken = seconds_of(torch, candidate, repeats)
                        except RuntimeError:
                            speeds.append(None)
                        else:
                            speeds.append(PASSES * case.bytes() / taken / copy)
                    layout = " channels last" if channels_last else ""
                    report.row(
                        "×".join(map(str, shape)) + f" {dtype}{layout}",
                        copy / 1e9,
                        *speeds,
                        speeds[0] / speeds[1],
                    )
                    del case
                    torch.cuda.empty_cache()
    return (
        f"{datetime.date.today()}, {torch.cuda.get_device_name()}, PyTorch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}. Medians."
    )
