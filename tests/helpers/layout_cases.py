"""Networks in whose feature maps MKL-DNN's layouts occur, and what they compute.

``main`` runs all of them and saves every number; whether our operators take the layouts is decided
once in a process, so a test runs it twice and compares.
"""

import itertools
import sys

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import MABN2d, ModelDataParallel, SyncBatchNorm, parallel_backward
from gluon_syncbn.library import LIBRARY

MODES = {
    "imperative": None,
    "hybridized": {},
    "static": {"static_alloc": True, "static_shape": True},
}


def relu():
    return nn.Activation("relu")


def convolutions(norm, widths, convolution=nn.Conv2D, **options):
    net = nn.HybridSequential()
    for width in widths:
        net.add(convolution(width, 3, padding=1, use_bias=False), norm(**options), relu())
    return net


class Residual(gluon.HybridBlock):
    """The input of the layer has a second consumer, and its output too."""

    def __init__(self, norm, channels):
        super().__init__()
        with self.name_scope():
            self.before = nn.Conv2D(channels, 3, padding=1)
            self.norm = norm()
            self.after = nn.Conv2D(channels, 3, padding=1)
            self.last = norm()

    def hybrid_forward(self, F, x):
        x = self.before(x)
        y = self.norm(x)
        y = self.last(self.after(F.relu(y)) + y)
        return F.concat(F.relu(y + x), y, x, dim=1)


class Added(gluon.HybridBlock):
    """The layer adds a residual and applies an activation; dy comes from two sides."""

    def __init__(self, norm, slope=0.0):
        super().__init__()
        activation = (
            {"activation": "leaky_relu", "slope": slope} if slope else {"activation": "relu"}
        )
        with self.name_scope():
            self.before = nn.Conv2D(16, 3, padding=1)
            self.first = norm(**activation)
            self.middle = nn.Conv2D(16, 3, padding=1)
            self.last = norm(**activation)
            self.plain = norm()
            self.after = nn.Conv2D(8, 3, padding=1)

    def hybrid_forward(self, F, x):
        y = self.first(self.before(x))
        y = self.last(self.middle(y), add=y)
        return self.after(self.plain(y, add=x))


class Converted(gluon.HybridBlock):
    """The layer computes in another type than the convolutions around it."""

    def __init__(self, norm, dtype):
        super().__init__()
        self._dtype = dtype
        with self.name_scope():
            self.before = nn.Conv2D(16, 3, padding=1)
            self.norm = norm()
            self.norm.cast(dtype)
            self.after = nn.Conv2D(16, 3, padding=1)

    def hybrid_forward(self, F, x):
        y = self.norm(self.before(x).astype(self._dtype))
        return self.after(y.astype("float32"))


class Part(gluon.HybridBlock):
    """The layer sees a part of a convolution's output, and its output in another shape."""

    def __init__(self, norm):
        super().__init__()
        with self.name_scope():
            self.before = nn.Conv2D(32, 3, padding=1)
            self.norm = norm()
            self.reshaped = norm()

    def hybrid_forward(self, F, x):
        x = self.before(x)
        part = self.norm(F.slice_axis(x, axis=0, begin=1, end=3))
        return F.concat(
            part.reshape((-1,)), self.reshaped(x.reshape((0, 16, -1))).reshape((-1,)), dim=0
        )


class Views(gluon.Block):
    """As Part, but the parts are arrays that share their memory with the whole."""

    def __init__(self, norm):
        super().__init__()
        with self.name_scope():
            self.before = nn.Conv2D(32, 3, padding=1)
            self.norm = norm()
            self.reshaped = norm()

    def forward(self, x):
        x = self.before(x)
        y = self.norm(x[1:3])
        return mx.nd.concat(
            y.reshape((-1,)), self.reshaped(x.reshape((0, 16, -1))).reshape((-1,)), dim=0
        )


def sequence(*blocks):
    net = nn.HybridSequential()
    net.add(*blocks)
    return net


def conv(channels=16, **options):
    return nn.Conv2D(channels, 3, padding=1, **options)


# name -> (network of a layer class, shape of its input)
NETWORKS = {
    "convolutions": (lambda n: convolutions(n, (16, 32, 16)), (4, 8, 8, 8)),
    "small maps": (lambda n: convolutions(n, (64, 32)), (6, 16, 2, 2)),
    "single elements": (lambda n: convolutions(n, (32, 32)), (6, 16, 1, 1)),
    "large maps": (lambda n: convolutions(n, (32,)), (2, 8, 96, 96)),
    "odd channels": (lambda n: convolutions(n, (20, 3, 24, 17, 8, 40)), (3, 5, 7, 6)),
    "1-D": (lambda n: convolutions(n, (16, 24, 32), nn.Conv1D), (4, 16, 19)),
    "3-D": (lambda n: convolutions(n, (16, 24, 32), nn.Conv3D), (2, 16, 3, 5, 4)),
    "axis 2": (lambda n: convolutions(n, (16, 16), axis=2), (4, 16, 16, 16)),
    "last axis": (lambda n: convolutions(n, (16, 32), axis=-1), (4, 16, 5, 6)),
    "no parameters": (
        lambda n: convolutions(n, (16, 32), scale=False, center=False, momentum=0.5),
        (4, 16, 6, 6),
    ),
    "average": (lambda n: convolutions(n, (16, 32), momentum=None), (4, 16, 6, 6)),
    "moving": (lambda n: convolutions(n, (16, 32), use_global_stats=True), (4, 16, 6, 6)),
    "first": (lambda n: sequence(n(), conv(), n(), relu()), (4, 16, 6, 6)),
    "before dense": (lambda n: sequence(conv(), n(), nn.Flatten(), nn.Dense(7)), (4, 16, 6, 6)),
    "pooled": (
        lambda n: sequence(conv(), n(), nn.AvgPool2D(), conv(32), nn.AvgPool2D(), n(), conv(8)),
        (4, 16, 12, 12),
    ),
    "strided": (
        lambda n: sequence(
            conv(16, groups=16), n(), conv(32, strides=2), n(), nn.Conv2D(16, 1), n()
        ),
        (4, 16, 9, 9),
    ),
    "residual": (lambda n: sequence(Residual(n, 16), Residual(n, 32), conv(8)), (4, 16, 6, 6)),
    "activated": (lambda n: convolutions(n, (16, 20), activation="relu"), (4, 8, 8, 8)),
    "added": (lambda n: sequence(Added(n), conv(16), Added(n, 0.1)), (4, 16, 6, 6)),
    "float16": (lambda n: Converted(n, "float16"), (4, 16, 6, 6)),
    "float64": (lambda n: Converted(n, "float64"), (4, 16, 6, 6)),
    "part": (lambda n: Part(n), (4, 16, 6, 6)),
    "views": (lambda n: Views(n), (4, 16, 6, 6)),
}

LAYERS = {
    "lone": lambda **options: SyncBatchNorm(num_devices=1, **options),
    "chain": SyncBatchNorm,
    "nn": nn.BatchNorm,
    "averages": lambda: MABN2d(0, 2, 4, warmup_iters=0),
    "averages, chain": lambda: MABN2d(0, 2, 4, warmup_iters=0, num_devices=None),
}


def numbers(shape, seed=0):
    return mx.nd.array(np.random.RandomState(seed).randn(*shape).astype("float32"))


def prepared(name, layer, mode, grad_req="write", ctx=None):
    """The network, initialized, and its input with a gradient."""
    mx.random.seed(3)
    make, shape = NETWORKS[name]
    net = make(LAYERS[layer])
    net.initialize(mx.init.Normal(0.3), ctx=ctx)
    net.collect_params().setattr("grad_req", grad_req)
    if MODES[mode] is not None:
        net.hybridize(**MODES[mode])
    x = numbers(shape)
    x.attach_grad(grad_req)
    return net, x


def results(net, x):
    """Everything that two training steps, gradients of an inference, and an inference compute."""
    for step, train in enumerate((True, True, False)):
        with autograd.record(train_mode=train):
            y = net(x)
            loss = (y * numbers(y.shape, step)).sum()
        loss.backward()
        yield y
        yield x.grad
        for parameter in net.collect_params().values():
            yield parameter.data()
            if parameter.grad_req != "null":
                yield parameter.grad()
    yield net(x)


def two_contexts(mode):
    contexts = [mx.cpu(0), mx.cpu(1)]
    net, x = prepared("convolutions", "chain", mode, ctx=contexts)
    model = ModelDataParallel(net, contexts)
    inputs = [x.copyto(context) for context in contexts]
    inputs[1] *= 1.5
    for _ in range(2):
        with autograd.record():
            ys = model(inputs)
            losses = [(y * y).sum() for y in ys]
        parallel_backward(losses)
        yield from ys
        for parameter in net.collect_params().values():
            yield from parameter.list_data()
            if parameter.grad_req != "null":
                yield from parameter.list_grad()


def cases():
    for name, layer, mode, grad_req in itertools.product(
        NETWORKS, ("lone", "chain"), MODES, ("write", "add")
    ):
        if name != "views" or mode == "imperative":
            yield (
                f"{name}, {layer}, {mode}, {grad_req}",
                results(*prepared(name, layer, mode, grad_req)),
            )
    averages = [layer for layer in LAYERS if layer.startswith("averages")]
    for name, layer, mode in itertools.product(
        ("convolutions", "odd channels", "residual"), averages, MODES
    ):
        yield f"{name}, {layer}, {mode}", results(*prepared(name, layer, mode))
    for mode in MODES:
        yield f"two contexts, {mode}", two_contexts(mode)


def main(path):
    """Save the results of all cases, and print why our operators do not take the layouts."""
    found = {}
    for name, arrays in cases():
        numbers_of_case = [array.asnumpy().astype("float64").ravel() for array in arrays]
        found[name] = np.concatenate(numbers_of_case)
    np.savez(path, **found)
    print(LIBRARY.WhyNoMkldnnLayouts().decode())


if __name__ == "__main__":
    main(sys.argv[1])
