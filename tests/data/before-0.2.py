"""Makes before-0.2-*: python before-0.2.py FOLDER, with the package as it was at commit 0c7feea."""

import sys

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluon_syncbn
from gluon_syncbn import ModelDataParallel, SyncBatchNorm, symbol

OUT = f"{sys.argv[1]}/before-0.2"
CONTEXTS = [mx.cpu(0), mx.cpu(1)]
X = np.random.RandomState(1).randn(5, 3, 6, 6).astype("float32")


class Every(gluon.HybridBlock):
    """A layer of every kind, one of them twice, and two all-reduces under one key."""

    def __init__(self):
        super().__init__(prefix="every_")
        with self.name_scope():
            self.conv = nn.Conv2D(4, 3, use_bias=False)
            self.default = SyncBatchNorm()
            self.two = SyncBatchNorm(num_devices=2, momentum=0.8, epsilon=1e-3)
            self.one = SyncBatchNorm(scale=False)
            self.fixed = SyncBatchNorm(use_global_stats=True, center=False)
            self.average = SyncBatchNorm(momentum=None)
            self.untracked = SyncBatchNorm(track_running_stats=False)
            self.last = SyncBatchNorm(axis=-1)
            self.dense = nn.Dense(3)

    def hybrid_forward(self, F, x):
        x = self.two(self.default(self.conv(x)))
        x = F.concat(self.one(x), self.fixed(x), self.default(x), dim=1)
        x = self.untracked(self.average(x))
        x = self.dense(self.last(x))
        total = F.contrib.KeyBarrierSum(F.sum(x, axis=0), key="own", num_devices=2)
        factor = F.contrib.KeyBarrierSum(total * total, key="own", num_devices=2)
        return F.broadcast_mul(x, factor.reshape((1, -1)))


def inputs():
    return [mx.nd.array(X[:3], CONTEXTS[0]), mx.nd.array(X[3:], CONTEXTS[1])]


def whole(parts):
    return np.concatenate([part.asnumpy() for part in parts])


def export_gluon():
    mx.random.seed(0)
    np.random.seed(0)
    net = Every()
    net.initialize(mx.init.Xavier(), ctx=CONTEXTS)
    net.hybridize()
    with autograd.record():
        ModelDataParallel(net, CONTEXTS)(inputs())
    mx.nd.waitall()
    net.export(f"{OUT}-gluon")


def expect_gluon():
    """What the loaded file computes: inference, then a training step."""
    net = gluon.SymbolBlock.imports(
        f"{OUT}-gluon-symbol.json", ["data"], f"{OUT}-gluon-0000.params", ctx=CONTEXTS
    )
    model = ModelDataParallel(net, CONTEXTS)
    found = {"x": X, "inference": whole(model(inputs()))}
    with autograd.record():
        ys = model(inputs())
        losses = [(y * y).sum() for y in ys]
    gluon_syncbn.parallel_backward(losses)
    found["training"] = whole(ys)
    for name, parameter in net.collect_params().items():
        found[f"after:{name}"] = parameter.data(CONTEXTS[0]).asnumpy()
        if parameter.grad_req != "null":
            found[f"gradient:{name}"] = sum(parameter.grad(c).asnumpy() for c in CONTEXTS)
    np.savez_compressed(f"{OUT}-gluon-expected.npz", **found)


def export_symbols():
    x = mx.sym.Convolution(mx.sym.var("data"), num_filter=4, kernel=(3, 3), name="conv")
    x = symbol.SyncBatchNorm(x, ndev=2, key="mine", name="bn")
    x = symbol.SyncBatchNorm(x, use_global_stats=True, name="bn2")
    x = mx.sym.contrib.KeyBarrierSum(x, key="own", num_devices=2, call=3, name="sum")
    x.save(f"{OUT}-symbols-symbol.json")
    plain = mx.sym.BatchNorm(mx.sym.var("data"), name="bn")
    gluon_syncbn.convert_symbol(plain, num_devices=2).save(f"{OUT}-converted-symbol.json")


export_gluon()
expect_gluon()
export_symbols()
