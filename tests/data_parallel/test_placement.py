"""Parameters are put on all devices that need them."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import DataParallelCriterion, ModelDataParallel, SyncBatchNorm, parallel_backward
from networks import STATIC, convolutional, ones, split


def values(net, context):
    return {name: p.data(context).asnumpy() for name, p in net.collect_params().items()}


@pytest.mark.parametrize("hybridize", [None, STATIC])
@pytest.mark.parametrize("there", [[mx.cpu(0)], [mx.cpu(1)], [mx.cpu(2), mx.cpu(1)], [mx.cpu(3)]])
def test_parameters_are_put_on_all_devices(there, hybridize, two, rng):
    net = convolutional(widths=(4,))
    net.initialize(mx.init.Xavier(), ctx=there)
    if hybridize:
        net.hybridize(**hybridize)
    x = rng.randn(4, 3, 6, 6).astype("float32")
    with autograd.record():
        net(mx.nd.array(x, ctx=there[0]))
    mx.nd.waitall()
    before = values(net, there[0])
    for context in there:  # reset_ctx averages; make them equal first
        for name, p in net.collect_params(".*running.*").items():
            mx.nd.array(before[name]).copyto(p.data(context))
    requests = {name: p.grad_req for name, p in net.collect_params().items()}
    model = ModelDataParallel(net, two)
    for context in two:
        for name, value in values(net, context).items():
            np.testing.assert_array_equal(value, before[name])
    assert requests == {name: p.grad_req for name, p in net.collect_params().items()}
    with autograd.record():
        outs = model(split(x, two))
    parallel_backward(outs)
    assert net[0].weight.list_ctx() == two and net[0].weight.grad(two[1]).asnumpy().any()
    mx.nd.waitall()


def test_deferred_parameters_are_put_on_all_devices(two, rng):
    x = rng.randn(4, 3, 6, 6).astype("float32")
    weights = []
    for contexts in (two, None):
        mx.random.seed(5)
        net = convolutional(widths=(4,))
        net.initialize(mx.init.Xavier(), ctx=contexts)
        model = ModelDataParallel(net, two)
        assert net[0].weight.list_ctx() == two
        model(split(x, two))
        weights.append(values(net, two[1]))
    for name, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][name])


def test_parameters_initialized_or_loaded_after_the_model_was_made(two, rng, tmp_path):
    x = rng.randn(4, 3).astype("float32")
    net = nn.HybridSequential(prefix="late_")
    with net.name_scope():
        net.add(nn.Dense(4), SyncBatchNorm())
    model = ModelDataParallel(net, two)
    net.initialize(mx.init.Xavier())
    with autograd.record():
        model(split(x, two))
    assert net[0].weight.list_ctx() == two
    mx.nd.waitall()
    net.save_parameters(str(tmp_path / "net.params"))
    wanted = np.concatenate([y.asnumpy() for y in model(split(x, two))])

    other = nn.HybridSequential()
    other.add(nn.Dense(4), SyncBatchNorm())
    model = ModelDataParallel(other, two)
    for options in (
        {},
        {"ctx": two},
        {},
    ):  # onto cpu(0), onto both, where they are
        other.load_parameters(str(tmp_path / "net.params"), **options)
        got = np.concatenate([y.asnumpy() for y in model(split(x, two))])
        np.testing.assert_array_equal(got, wanted)
    other.collect_params().reset_ctx(two[1])  # as a user may, to look at them
    got = np.concatenate([y.asnumpy() for y in model(split(x, two))])
    np.testing.assert_array_equal(got, wanted)


def test_parameters_that_lie_on_all_devices_are_left_alone(two, rng):
    three = [mx.cpu(2), mx.cpu(1), mx.cpu(0)]
    net = nn.Dense(2, in_units=3)
    net.initialize(ctx=three)
    arrays = net.weight.list_data()
    model = ModelDataParallel(net, two)
    model(split(rng.randn(4, 3), two))
    assert all(now is before for now, before in zip(net.weight.list_data(), arrays))
    assert net.weight.list_ctx() == three


class Fixed(gluon.HybridBlock):
    """A Constant, and a parameter that two blocks share."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.table = self.params.get_constant("table", mx.nd.array([[1, 2, 3]], dtype="int32"))
            self.one = nn.Dense(3, in_units=3, use_bias=False)
            self.two = nn.Dense(3, in_units=3, use_bias=False, params=self.one.params)

    def hybrid_forward(self, F, x, table):
        return F.broadcast_add(self.two(self.one(x)), F.cast(table, "float32"))


def test_constants_and_shared_parameters(two):
    net = Fixed()
    net.initialize(mx.init.One())
    outs = ModelDataParallel(net, two)([mx.nd.ones((1, 3), ctx=c) for c in two])
    for out in outs:
        np.testing.assert_array_equal(out.asnumpy(), [[10, 11, 12]])
    assert net.table.list_ctx() == two and net.table.data(two[1]).dtype == np.int32


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("update_on_kvstore", [True, False])
def test_a_trainer_made_before(deferred, update_on_kvstore, two, rng):
    """It must follow to the other devices, or it would step device 0 alone."""
    batch = split(rng.randn(6, 4), two), split(rng.randn(6, 2), two)
    weights = []
    for late in (False, True):
        mx.random.seed(3)
        net = nn.HybridSequential(prefix="net_")
        with net.name_scope():
            net.add(
                nn.Dense(5, in_units=0 if deferred else 4),
                SyncBatchNorm(in_channels=0 if deferred else 5),
                nn.Dense(2, in_units=0 if deferred else 5),
            )
        net.initialize(mx.init.Xavier(), ctx=two[0] if late else two)
        model = None if late else ModelDataParallel(net, two)
        trainer = gluon.Trainer(
            net.collect_params(),
            "adam",
            {"learning_rate": 0.01},
            update_on_kvstore=update_on_kvstore,
        )
        model = model or ModelDataParallel(net, two)
        criterion = DataParallelCriterion(gluon.loss.L2Loss(), two)
        for _ in range(3):
            with autograd.record():
                losses = criterion(model(batch[0]), batch[1])
            parallel_backward(losses)
            trainer.step(6)
        mx.nd.waitall()
        weights.append([values(net, context) for context in two])
    for name, wanted in weights[0][0].items():
        for device in (0, 1):
            np.testing.assert_array_equal(weights[1][device][name], wanted, err_msg=name)


def test_parameters_that_cannot_be_put_on_all_contexts(two):
    net = SyncBatchNorm(in_channels=3)
    net.initialize(ctx=two[0])
    trainer = gluon.Trainer(net.collect_params(), "sgd")
    with autograd.record():
        y = net(ones(two[0]))
    y.backward()
    trainer.step(2)
    with pytest.raises(ValueError, match=r"made steps with \[cpu\(0\)\].*make a new Trainer"):
        ModelDataParallel(net, two)
    assert net.gamma.list_ctx() == two[:1]
    net.collect_params().reset_ctx(two)  # what the message says
    gluon.Trainer(net.collect_params(), "sgd")
    ModelDataParallel(net, two)
    sparse = gluon.contrib.nn.SparseEmbedding(3, 2)
    sparse.initialize(ctx=two[0])
    with pytest.raises(ValueError, match=r"row_sparse.*net.initialize\(ctx=ctx_list\)"):
        ModelDataParallel(sparse, two)
