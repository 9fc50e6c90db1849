"""Training by mx.mod.Module, shared by several tests."""

import mxnet as mx
import numpy as np

from gluon_syncbn import SyncBatchNorm
from paths import DATA

# `exported` as written by the first version: users have such files.
EXPORTED = DATA / "exported-by-0.1.0-symbol.json"


def exported(num_devices=2):
    """Compose what a network exports, followed by a KeyBarrierSum of the user's."""
    net = mx.gluon.nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(mx.gluon.nn.Conv2D(4, 3), SyncBatchNorm(num_devices=num_devices))
        net.add(mx.gluon.nn.Dense(3), SyncBatchNorm(num_devices=1))
    x = net(mx.sym.var("data"))
    return mx.sym.contrib.KeyBarrierSum(x, key="own", num_devices=2, name="own") * 2


def written(num_devices):
    """A network in mx.sym; a layer called on a symbol is part of it."""
    x = mx.sym.var("data")
    for i, width in enumerate((6, 8)):
        x = mx.sym.Convolution(x, num_filter=width, kernel=(3, 3), no_bias=True, name=f"conv{i}")
        x = SyncBatchNorm(num_devices=num_devices, prefix=f"norm{i}_")(x)
        x = mx.sym.Activation(x, act_type="relu", name=f"relu{i}")
    x = mx.sym.FullyConnected(x, num_hidden=4, name="dense")
    return mx.sym.SoftmaxOutput(x, mx.sym.var("softmax_label"), name="softmax")


def fit(sym, devices, epochs=2, arguments=None, states=None):
    """Train and return {name: array}."""
    mx.random.seed(1)
    np.random.seed(1)
    rng = np.random.RandomState(2)
    data, labels = rng.randn(24, 3, 8, 8).astype("float32"), rng.randint(0, 4, 24)
    batches = mx.io.NDArrayIter(data, labels.astype("float32"), batch_size=8)
    module = mx.mod.Module(sym, context=[mx.cpu(i) for i in range(devices)])
    module.fit(
        batches,
        num_epoch=epochs,
        optimizer="sgd",
        optimizer_params={"learning_rate": 0.1, "momentum": 0.9},
        initializer=mx.init.Xavier(),
        arg_params=arguments,
        aux_params=states,
    )
    found, moving = module.get_params()
    return {k: v.asnumpy() for k, v in {**found, **moving}.items()}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in got:
        np.testing.assert_allclose(got[name], wanted[name], atol=2e-5, err_msg=name)
