"""Networks and training runs shared by several tests."""

import functools

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import (
    DataParallelCriterion,
    ModelDataParallel,
    SyncBatchNorm,
    parallel_backward,
)

STATIC = {"static_alloc": True, "static_shape": True}
MODES = [None, {}, {"static_alloc": True}, STATIC]  # None: not hybridized

# Smooth: MKL-DNN's convolutions round differently with the size of the batch, by another amount on
# every kind of CPU, and where relu has its kink a rounding error is a different gradient.
SMOOTH = "softrelu"


def convolutional(norm=SyncBatchNorm, widths=(8, 8, 12, 12), prefix="net_"):
    """Several layers of convolution and normalization: what hangs in MXNet's own SyncBatchNorm."""
    net = nn.HybridSequential(prefix=prefix)
    with net.name_scope():
        for width in widths:
            net.add(nn.Conv2D(width, 3, padding=1, use_bias=False), norm(), nn.Activation(SMOOTH))
        net.add(nn.GlobalAvgPool2D(), nn.Dense(5))
    return net


class Branches(gluon.HybridBlock):
    """Parallel branches, as in DeepLab's ASPP."""

    def __init__(self, branches=5):
        super().__init__(prefix="branches_")
        with self.name_scope():
            self.branches = []
            for i in range(branches):
                branch = nn.HybridSequential()
                branch.add(
                    nn.Conv2D(4 + i, 3, padding=1 + i, dilation=1 + i, use_bias=False),
                    SyncBatchNorm(),
                    nn.Activation(SMOOTH),
                )
                self.register_child(branch)
                self.branches.append(branch)
            self.head = nn.Dense(5)

    def hybrid_forward(self, F, x):
        return self.head(F.concat(*[branch(x) for branch in self.branches], dim=1))


class Shared(gluon.HybridBlock):
    """One normalization in two places that do not depend on each other."""

    def __init__(self):
        super().__init__(prefix="shared_")
        with self.name_scope():
            self.left, self.right = nn.Conv2D(6, 3, use_bias=False), nn.Conv2D(6, 1, use_bias=False)
            self.norm, self.head = SyncBatchNorm(), nn.Dense(5)

    def hybrid_forward(self, F, x):
        left, right = self.norm(self.left(x)), self.norm(self.right(x))
        return self.head(F.concat(F.flatten(left), F.flatten(right), dim=1))


class Waiting(nn.HybridSequential):
    """A network that waits for its input in the middle, as one that prints does."""

    def forward(self, x):
        for child in self._children.values():
            x = child(x)
            if isinstance(x, mx.nd.NDArray):
                x.wait_to_read()
        return x


def waiting():
    net = Waiting(prefix="net_")
    net.add(*convolutional()._children.values())
    return net


def data_for(steps, batch, seed=0, shape=(3, 10, 10)):
    rng = np.random.RandomState(seed)
    sizes = batch if isinstance(batch, list) else [batch] * steps
    return [(rng.randn(n, *shape).astype("float32"), rng.randint(0, 5, n)) for n in sizes]


def to_array(values, ctx=None):
    """NumPy values as an array of the kind that layers take: mx.np under set_np."""
    array = mx.np.array if mx.util.is_np_array() else mx.nd.array
    return array(values, ctx=ctx)


def split(array, contexts):
    contexts = contexts[: len(array)]
    return gluon.utils.split_and_load(to_array(array), contexts, even_split=False)


def train(make, devices, batches, hybridize=None, deferred=True, optimizer=None):
    """Train and return (losses, {parameter: one array per device})."""
    mx.random.seed(3)
    np.random.seed(3)
    contexts = [mx.cpu(i) for i in range(devices)]
    net = make()
    net.initialize(mx.init.Xavier(), ctx=contexts)
    if not deferred:
        net(to_array(batches[0][0][:1], ctx=contexts[0]))
    if hybridize is not None:
        net.hybridize(**hybridize)
    model = ModelDataParallel(net, contexts)
    criterion = DataParallelCriterion(gluon.loss.SoftmaxCrossEntropyLoss(), contexts)
    trainer = gluon.Trainer(
        net.collect_params(), "sgd", optimizer or {"learning_rate": 0.05, "momentum": 0.9}
    )
    losses = []
    for data, label in batches:
        with autograd.record():
            parts = criterion(model(split(data, contexts)), split(label, contexts))
        parallel_backward(parts)
        trainer.step(len(data))
        losses.append(sum(part.asnumpy().sum() for part in parts))
    mx.nd.waitall()
    return losses, {
        name: [array.asnumpy() for array in p.list_data()]
        for name, p in net._collect_params_with_prefix().items()
    }


def assert_same_training(got, wanted, tolerance=2e-5):
    """Losses and every parameter on every device agree with those of one device."""
    np.testing.assert_allclose(got[0], wanted[0], rtol=tolerance)
    assert got[1].keys() == wanted[1].keys()
    for name, arrays in got[1].items():
        for array in arrays:
            np.testing.assert_allclose(
                array, wanted[1][name][0], rtol=0, atol=tolerance, err_msg=name
            )
        if "running" in name:
            assert len({array.tobytes() for array in arrays}) == 1, f"{name} differs"


def ones(context, shape=(2, 3), **kwargs):
    return mx.nd.ones(shape, ctx=context, **kwargs)


class SegmentationNet(gluon.HybridBlock):
    """A network in the form of GluonCV's: a tuple of outputs, one an auxiliary head."""

    def __init__(self, aux, **norm):
        super().__init__()
        self.aux = aux
        with self.name_scope():
            self.body = convolutional(functools.partial(SyncBatchNorm, **norm), (4, 6), "body_")
            self.head = nn.Dense(3)
            if aux:
                self.auxiliary = nn.Dense(3)

    def hybrid_forward(self, F, x):
        x = self.body(x)
        return (self.head(x), self.auxiliary(x)) if self.aux else (self.head(x),)

    def evaluate(self, x, scale=1):
        return self.forward(x)[0] * scale


class EvalModel:
    """GluonCV's SegEvalModel: no Block."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *inputs, **kwargs):
        return self.module.evaluate(*inputs, **kwargs)

    def collect_params(self):
        return self.module.collect_params()
