"""Run one candidate of the benchmark in its own process, controlled by run.py.

    python benchmarks/worker.py CANDIDATE

Reads one JSON object per line.  {"case": {...}, "seconds": s} times the case for about s seconds
and answers {"times": [...]} in milliseconds.  {"case": {...}, "save": path} runs the case once and
saves the results for run.py to compare.  {"free": true} frees all cases.  At the start, a candidate
that is not installed answers {"missing": why}, any other {"ready": version}.
"""

import ctypes
import itertools
import json
import os
import sys
import time

import numpy as np

counter = itertools.count()  # MXNet's SyncBatchNorm keeps a barrier per prefix for good
HERE = os.path.dirname(os.path.abspath(__file__))


def arrays_of(case):
    """Make the inputs of a case, the same for every candidate."""
    rng = np.random.RandomState(0)
    x, dy = (rng.randn(*case["shape"]).astype(case["dtype"]) for _ in range(2))
    channels = case["shape"][case["axis"]]
    gamma, beta = rng.rand(channels) + 0.5, rng.randn(channels)
    parameter = "float64" if case["dtype"] == "float64" else "float32"
    return x, dy, gamma.astype(parameter), beta.astype(parameter)


class Compiled:
    """The library of kernels_bench.cc."""

    def __init__(self):
        self.library = ctypes.CDLL(os.environ["GLUON_SYNCBN_BENCH_LIBRARY"])

    version = ""


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


class Floor(Compiled):
    """Eight passes of a plain copy."""

    def prepare(self, case):
        x, dy = arrays_of(case)[:2]
        y, dx = np.empty_like(x), np.empty_like(dy)
        run = self.library.BenchFloor
        arguments = [ctypes.c_size_t(x.nbytes), *map(pointer, (x, y, dy, dx))]
        keep = x, y, dy, dx

        def step():
            run(*arguments)
            return keep

        return step, None


class Kernels(Compiled):
    """The four kernels alone, in place; which=1 to 4 for one of them."""

    def prepare(self, case):
        x, dy, gamma, beta = arrays_of(case)
        axis = case["axis"] % x.ndim
        channels = x.shape[axis]
        layout = int(np.prod(x.shape[:axis])), channels, int(np.prod(x.shape[axis + 1 :]))
        y, mean, var = np.empty_like(x), np.zeros_like(gamma), np.ones_like(gamma)
        dgamma, dbeta = np.empty_like(gamma), np.empty_like(beta)
        doubles = [np.zeros(2 * channels + extra) for extra in (1, 1, 0)]
        keep = [x, y, dy, gamma, beta, mean, var, dgamma, dbeta, *doubles]
        kind = ["float16", "float32", "float64"].index(case["dtype"])
        run = self.library.BenchKernels
        numbers = [ctypes.c_int(kind), *map(ctypes.c_size_t, layout)]
        pointers = [pointer(a) for a in keep]

        def run_kernels(which):
            run(ctypes.c_int(which), *numbers, *pointers)

        def set_gamma(values):
            gamma[...] = values

        given, fresh = gamma.copy(), arrays_of(case)[1]

        def results():
            dy[...] = fresh
            set_gamma(given)
            run_kernels(0)
            return y, dy, dgamma, dbeta

        # Every step overwrites dy with dx.  With gamma / sqrt(var + epsilon) = 1 its size stays the
        # same.  Otherwise it decays to denormal numbers, which are several times slower on some
        # CPUs.
        columns = np.moveaxis(x, axis, -1).reshape(-1, channels).astype("float64")
        steady = np.sqrt(columns.var(0) + 1e-5)

        def step():
            set_gamma(steady)
            run_kernels(case.get("which", 0))

        set_gamma(steady)
        run_kernels(0)  # gives each single kernel statistics to work on
        return step, results


class Mxnet:
    """A layer of MXNet or ours, hybridized with static_alloc and static_shape."""

    def __init__(self, name):
        import mxnet as mx

        self.mx, self.name, self.version = mx, name, mx.__version__

    def layer(self, case):
        mx = self.mx
        if self.name.startswith("ours"):
            from gluon_syncbn import SyncBatchNorm

            # None: the operators for several devices, run on one.
            devices = 1 if self.name == "ours" else None
            return SyncBatchNorm(num_devices=devices, axis=case["axis"])
        if self.name == "mxnet SyncBatchNorm":
            if case["axis"] != 1 or case["dtype"] != "float32":
                return None
            return mx.gluon.contrib.nn.SyncBatchNorm(num_devices=1, prefix=f"sync{next(counter)}_")
        return mx.gluon.nn.BatchNorm(axis=case["axis"])

    def prepare(self, case):
        mx = self.mx
        layer = self.layer(case)
        if layer is None:
            return None, None
        x, dy, gamma, beta = arrays_of(case)
        if case.get("convolution"):
            net = mx.gluon.nn.HybridSequential()
            convolution = mx.gluon.nn.Conv2D(x.shape[1], 3, padding=1, use_bias=False)
            net.add(convolution, layer, mx.gluon.nn.Activation("relu"))
            layer = net
        layer.cast(case["dtype"])
        layer.initialize()
        layer.hybridize(static_alloc=True, static_shape=True)
        x, dy = (mx.nd.array(a, dtype=a.dtype) for a in (x, dy))
        x.attach_grad()
        layer(x)
        if case.get("convolution"):
            return lambda: layer(x).wait_to_read(), None
        layer.gamma.set_data(mx.nd.array(gamma, dtype=gamma.dtype))
        layer.beta.set_data(mx.nd.array(beta, dtype=beta.dtype))
        if case.get("inference"):

            def step():
                layer(x).wait_to_read()

            return step, lambda: (layer(x).asnumpy(),)

        def run():
            with mx.autograd.record():
                y = layer(x)
            y.backward(dy)
            return y

        def step():
            run()
            mx.nd.waitall()

        def results():
            y = run()
            grads = x.grad, layer.gamma.grad(), layer.beta.grad()
            return [a.asnumpy() for a in (y, *grads)]

        return step, results


class Torch:
    """PyTorch's BatchNorm2d; channels last as its memory format."""

    def __init__(self):
        import torch

        self.torch, self.version = torch, torch.__version__
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

    def prepare(self, case):
        torch = self.torch
        if len(case["shape"]) != 4 or case["dtype"] == "float16":
            return None, None
        x, dy, gamma, beta = arrays_of(case)
        last = case["axis"] != 1
        layer = torch.nn.BatchNorm2d(len(gamma)).to(torch.from_numpy(gamma).dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(gamma))
            layer.bias.copy_(torch.from_numpy(beta))
        # A permuted channels-last array is what PyTorch calls memory_format=channels_last.
        x, dy = (torch.from_numpy(a) for a in (x, dy))
        x, dy = (a.permute(0, 3, 1, 2) if last else a for a in (x, dy))
        x.requires_grad_()

        def run():
            layer.zero_grad(set_to_none=True)
            x.grad = None
            y = layer(x)
            y.backward(dy)
            return y

        def results():
            y = run()
            maps = [(a.permute(0, 2, 3, 1) if last else a) for a in (y, x.grad)]
            grads = layer.weight.grad, layer.bias.grad
            return [a.detach().numpy() for a in (*maps, *grads)]

        if case.get("inference"):
            layer.eval()

            def step():
                with torch.no_grad():
                    layer(x)

            return step, lambda: (step(),)
        return run, results


class Synchronized:
    """Layers of ours on several CPU contexts, one thread each, with and without all-reduce."""

    def __init__(self):
        import mxnet as mx

        self.mx, self.version = mx, mx.__version__

    def prepare(self, case):
        from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward, passes

        mx, devices, layers = self.mx, case["devices"], case["layers"]
        contexts = [mx.cpu(i) for i in range(devices)]
        net = mx.gluon.nn.HybridSequential()
        for _ in range(layers):
            net.add(SyncBatchNorm(in_channels=case["shape"][1]))
        net.initialize(ctx=contexts)
        net.hybridize(static_alloc=True, static_shape=True)
        xs = [mx.nd.array(arrays_of(case)[0], ctx=c) for c in contexts]
        for x in xs:
            x.attach_grad()
        model = ModelDataParallel(net, contexts)
        if case["how"] == "num_devices=1":
            for layer in net:
                layer._kwargs["num_devices"] = 1  # after ModelDataParallel, which would refuse it
        # Without an announced pass, a layer without num_devices takes itself to be on one device.
        announce = passes.begin if case["how"] == "together" else lambda exchanges, context: None

        def step():
            before, passes.begin = passes.begin, announce
            try:
                with mx.autograd.record():
                    ys = model(xs)
                parallel_backward(ys)
            finally:
                passes.begin = before
            mx.nd.waitall()

        return step, None


class Network:
    """A training step of ResNet-18 on two CPU contexts."""

    def __init__(self):
        import mxnet as mx

        self.mx, self.version = mx, mx.__version__

    def prepare(self, case):
        from mxnet.gluon.model_zoo import vision

        from gluon_syncbn import (
            DataParallelCriterion,
            ModelDataParallel,
            SyncBatchNorm,
            parallel_backward,
        )

        mx = self.mx
        contexts = [mx.cpu(i) for i in range(case["devices"])]
        net = vision.resnet18_v1(classes=10)
        if case["norm"] != "nn.BatchNorm":
            swap(net, SyncBatchNorm if case["norm"] == "ours" else None)
        net.initialize(ctx=contexts)
        net.hybridize(static_alloc=True, static_shape=True)
        model = ModelDataParallel(net, contexts)
        criterion = DataParallelCriterion(mx.gluon.loss.SoftmaxCrossEntropyLoss(), contexts)
        trainer = mx.gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 1e-3})
        x = arrays_of(case)[0]
        xs = [mx.nd.array(x, ctx=c) for c in contexts]
        labels = [mx.nd.arange(len(x), ctx=c) for c in contexts]

        def step():
            with mx.autograd.record():
                losses = criterion(model(xs), labels)
            parallel_backward(losses)
            trainer.step(len(x) * len(contexts))
            mx.nd.waitall()

        return step, None


def swap(block, norm):
    """Replace every BatchNorm below a block; remove it if ``norm`` is None."""
    from mxnet.gluon import nn

    for name, child in list(block._children.items()):
        if isinstance(child, nn.BatchNorm):
            new = norm(in_channels=child.gamma.shape[0]) if norm else nn.HybridLambda("identity")
            block._children[name] = new
        else:
            swap(child, norm)


CANDIDATES = {
    "floor": Floor,
    "kernels": Kernels,
    "ours": lambda: Mxnet("ours"),
    "ours, exchanging": lambda: Mxnet("ours, exchanging"),
    "mxnet BatchNorm": lambda: Mxnet("mxnet BatchNorm"),
    "mxnet SyncBatchNorm": lambda: Mxnet("mxnet SyncBatchNorm"),
    "pytorch": Torch,
    "synchronized": Synchronized,
    "network": Network,
}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what libraries print out of the answers

    def answer(**what):
        print(json.dumps(what), file=answers, flush=True)

    try:
        candidate = CANDIDATES[sys.argv[1]]()
    except ImportError as error:
        return answer(missing=str(error))
    answer(ready=candidate.version)
    prepared = {}
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("free"):
            prepared.clear()
            answer(freed=True)
            continue
        name = json.dumps(order["case"], sort_keys=True)
        if name not in prepared:
            prepared[name] = candidate.prepare(order["case"])
        step, results = prepared[name]
        if step is None:
            answer(times=None)
        elif "save" in order:
            np.savez(order["save"], *results())
            answer(saved=True)
        else:
            for _ in range(2):
                step()
            times, end = [], time.perf_counter() + order["seconds"]
            while len(times) < 3 or (time.perf_counter() < end and len(times) < 400):
                start = time.perf_counter()
                step()
                times.append(1e3 * (time.perf_counter() - start))
            answer(times=times)


if __name__ == "__main__":
    main()
