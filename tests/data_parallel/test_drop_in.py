"""Programs written for the original preview or GluonCV's wrappers run with changed imports."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluon_syncbn
from gluon_syncbn import (
    DataParallelCriterion,
    DataParallelModel,
    ModelDataParallel,
    parallel_backward,
)
from networks import EvalModel, SegmentationNet


class PreviewNet(gluon.Block):
    """As in the preview's example: with channels, without a number of devices."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(in_channels=3, channels=10, kernel_size=3, padding=1)
        self.bn = gluon_syncbn.BatchNorm(in_channels=10)
        self.relu = nn.Activation("relu")

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


def test_the_previews_program():
    """Initialized without contexts, then wrapped, then called on what split_and_load gives."""
    ctx_list = [mx.cpu(i) for i in range(4)]
    model = PreviewNet()
    model.initialize()
    model = ModelDataParallel(model, ctx_list)
    data = mx.random.uniform(-1, 1, (8, 3, 24, 24))
    x = gluon.utils.split_and_load(data, ctx_list=ctx_list)
    with autograd.record():
        y = model(x)
    assert [part.context for part in y] == ctx_list
    net = model.module
    with autograd.train_mode():
        conv = net.conv(data).asnumpy()
    over = {"axis": (0, 2, 3), "keepdims": True}
    wanted = np.maximum((conv - conv.mean(**over)) / np.sqrt(conv.var(**over) + 1e-5), 0)
    np.testing.assert_allclose(np.concatenate([p.asnumpy() for p in y]), wanted, atol=1e-5)


def test_the_previews_training_loop(two, rng):
    """Its mnist.py: ``nGPUs``, ``net.module``, a loss a device, parameters on one device."""
    net = nn.HybridSequential()
    norm = gluon_syncbn.BatchNorm(in_channels=8, nGPUs=2)
    assert norm.num_devices == 2
    net.add(nn.Dense(8, in_units=6), norm, nn.Dense(3))
    net.collect_params().initialize(mx.init.Xavier(magnitude=2.24))
    net = ModelDataParallel(net, two)
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    trainer = gluon.Trainer(net.module.collect_params(), "sgd", {"learning_rate": 0.1})
    data, label = mx.nd.array(rng.randn(8, 6)), mx.nd.array(rng.randint(0, 3, 8))
    means = []
    for _ in range(20):
        xs = gluon.utils.split_and_load(data, ctx_list=two)
        ys = gluon.utils.split_and_load(label, ctx_list=two)
        with autograd.record():
            losses = [loss(yhat, y) for yhat, y in zip(net(xs), ys)]
        parallel_backward(losses)
        trainer.step(len(xs) * xs[0].shape[0])
        means.append(np.mean([part.asnumpy() for part in losses]))
    assert means[-1] < 0.7 * means[0]
    for p in net.module.collect_params().values():
        assert p.list_ctx() == two
        np.testing.assert_array_equal(p.data(two[0]).asnumpy(), p.data(two[1]).asnumpy())


class MixLoss(gluon.loss.SoftmaxCrossEntropyLoss):
    """Adds the loss of the auxiliary output."""

    def hybrid_forward(self, F, *inputs):
        *outputs, label = inputs
        losses = [super(MixLoss, self).hybrid_forward(F, output, label) for output in outputs]
        return losses[0] if len(losses) == 1 else losses[0] + 0.5 * losses[1]


def train_segmentation(contexts, aux, named=False, hybridize=None, batches=(6, 5, 1, 6)):
    """Train and validate as GluonCV's scripts/segmentation/train.py, with parallel_backward."""
    mx.random.seed(4)
    rng = np.random.RandomState(0)
    model = SegmentationNet(aux, num_devices=len(contexts))
    model.initialize(mx.init.Xavier())
    if hybridize is not None:
        model.hybridize(**hybridize)
    if named:
        net = DataParallelModel(module=model, ctx_list=contexts, sync=True)
        evaluator = DataParallelModel(module=EvalModel(model), ctx_list=contexts)
        criterion = DataParallelCriterion(module=MixLoss(), ctx_list=contexts, sync=True)
    else:
        net = DataParallelModel(model, contexts, True)
        evaluator = DataParallelModel(EvalModel(model), contexts)
        criterion = DataParallelCriterion(MixLoss(), contexts, True)
    kv = mx.kv.create("local")
    optimizer = gluon.Trainer(
        net.module.collect_params(), "sgd", {"learning_rate": 0.1, "momentum": 0.9}, kvstore=kv
    )
    train_losses, predictions = [], []
    for size in batches:
        data = mx.nd.array(rng.randn(size, 3, 8, 8), dtype="float64")
        target = mx.nd.array(rng.randint(0, 3, size))
        train_loss = 0
        with autograd.record(True):
            outputs = net(data.astype("float32", copy=False))
            losses = criterion(outputs, target)
            mx.nd.waitall()
        parallel_backward(losses)
        optimizer.step(size)
        for loss in losses:
            train_loss += np.sum(loss.asnumpy())
        mx.nd.waitall()
        train_losses.append(train_loss)

        outputs = evaluator(data.astype("float32", copy=False))
        outputs = [x[0] for x in outputs]
        assert [o.context for o in outputs] == contexts[:size]
        predictions.append(np.concatenate([o.asnumpy() for o in outputs]))
        scaled = evaluator(data.astype("float32", copy=False), scale=2)
        np.testing.assert_allclose(scaled[0][0].asnumpy(), 2 * predictions[-1][: len(scaled[0][0])])
    return train_losses, predictions


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("hybridize", [None, {}])
def test_gluoncvs_training_loop(aux, hybridize, two):
    wanted = train_segmentation(two[:1], aux)
    for got in (
        train_segmentation(two, aux, False, hybridize),
        train_segmentation([*two, mx.cpu(2)], aux, True, hybridize),
    ):
        np.testing.assert_allclose(got[0], wanted[0], rtol=2e-5)
        for one, other in zip(got[1], wanted[1]):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_the_names_are_there():
    assert {"DataParallelModel", "DataParallelCriterion"} <= set(gluon_syncbn.__all__)
