"""Networks and arrays of mx.np: everything that works with mx.nd works with them."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluon_syncbn as sbn
from gluon_syncbn import ModelDataParallel, SyncBatchNorm
from networks import STATIC, assert_same_training, convolutional, data_for, train
from reference import batch_norm, largest_error

HYBRIDIZE = [None, {}, STATIC]


@pytest.fixture
def np_mode():
    mx.npx.set_np()
    yield
    mx.npx.reset_np()


def normalizing(norm=SyncBatchNorm):
    """Dense layers around two normalizations."""
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(nn.Dense(6), norm(), nn.Dense(4), norm(), nn.Dense(3))
    return net


def random(rng, *shape, ctx=None):
    return mx.np.array(rng.randn(*shape), dtype="float32", ctx=ctx)


def on_both(rng, *shape):
    """An array for each of two contexts."""
    return [random(rng, *shape, ctx=mx.cpu(i)) for i in range(2)]


@pytest.mark.parametrize("hybridize", HYBRIDIZE)
def test_layer_against_numpy(np_mode, hybridize, rng):
    layer = SyncBatchNorm(num_devices=1)
    synchronized = SyncBatchNorm()
    x, dy = (random(rng, 4, 5, 3) for _ in range(2))
    want = batch_norm([x.asnumpy()], [dy.asnumpy()], np.ones(5), np.zeros(5))
    for net in (layer, synchronized):
        net.initialize()
        if hybridize is not None:
            net.hybridize(**hybridize)
        x.attach_grad()
        with autograd.record():
            y = net(x)
        y.backward(dy)
        assert type(y) is mx.np.ndarray
        assert largest_error(y.asnumpy(), want.y[0]) < 3e-6
        assert largest_error(x.grad.asnumpy(), want.dx[0]) < 3e-6
        assert largest_error(net.gamma.grad().asnumpy(), want.dgamma[0]) < 3e-6
        assert largest_error(net.beta.grad().asnumpy(), want.dbeta[0]) < 3e-6
        mx.npx.waitall()
        np.testing.assert_allclose(net.running_mean.data().asnumpy(), 0.1 * want.mean, atol=1e-6)
        mean, var = net.running_mean.data().asnumpy(), net.running_var.data().asnumpy()
        mean, var = mean[:, None], var[:, None]
        assert largest_error(net(x).asnumpy(), (x.asnumpy() - mean) / np.sqrt(var + 1e-5)) < 3e-6


@pytest.mark.parametrize("hybridize", HYBRIDIZE)
def test_gradients_are_added(np_mode, hybridize, rng):
    layer = SyncBatchNorm(in_channels=5)
    layer.initialize()
    layer.collect_params().setattr("grad_req", "add")
    if hybridize is not None:
        layer.hybridize(**hybridize)
    x, dy = (random(rng, 4, 5, 3) for _ in range(2))
    x.attach_grad("add")
    for _ in range(2):
        with autograd.record():
            y = layer(x)
        y.backward(dy)
    want = batch_norm([x.asnumpy()], [dy.asnumpy()], np.ones(5), np.zeros(5))
    assert largest_error(x.grad.asnumpy(), 2 * want.dx[0]) < 3e-6
    assert largest_error(layer.gamma.grad().asnumpy(), 2 * want.dgamma[0]) < 3e-6


@pytest.mark.parametrize("hybridize", HYBRIDIZE)
def test_training_on_two_devices(np_mode, hybridize):
    """The last batch is smaller than the number of devices."""
    batches = data_for(3, [6, 5, 1])
    wanted = train(convolutional, 1, batches)
    assert_same_training(train(convolutional, 2, batches, hybridize), wanted)


class States(gluon.Block):
    """Records the np mode in which it runs."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def forward(self, x):
        self.seen.add((mx.util.is_np_shape(), mx.util.is_np_array()))
        return x


@pytest.mark.parametrize("shape, array", [(True, True), (True, False), (False, False)])
def test_devices_follow_the_callers_mode(two, shape, array):
    net = States()
    model = ModelDataParallel(net, two)
    for state in ((True, True), (shape, array)):  # the first must leave nothing behind
        mx.npx.set_np(*state)
        try:
            net.seen.clear()
            # Without np arrays, layers take those of mx.nd.
            xs = [mx.np.ones((2, 3), ctx=c) for c in two]
            model(xs if state[1] else [x.as_nd_ndarray() for x in xs])
        finally:
            mx.npx.reset_np()
        assert net.seen == {state}


class ScalarAndMore(gluon.HybridBlock):
    """Gives an array, and a tuple with a scalar."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.norm = SyncBatchNorm()

    def hybrid_forward(self, F, x):
        y = self.norm(x)
        return y, (F.np.sum(y * y * y), F.np.max(y, axis=0))


@pytest.mark.parametrize("hybridize", HYBRIDIZE)
def test_scalars_and_tuples(np_mode, hybridize, two, rng):
    """Shapes of () need the mode in the backward pass as well."""
    net = ScalarAndMore()
    net.initialize(ctx=two)
    if hybridize is not None:
        net.hybridize(**hybridize)
    xs = on_both(rng, 4, 3)
    for x in xs:
        x.attach_grad()
    model = ModelDataParallel(net, two)
    with autograd.record():
        outs = model(xs)
        losses = [out[1][0] for out in outs]
    sbn.parallel_backward(losses)
    for out in outs:
        assert out[0].shape == (4, 3) and out[1][0].shape == () and out[1][1].shape == (3,)
        assert {type(a) for a in (out[0], *out[1])} == {mx.np.ndarray}
    values = [x.asnumpy() for x in xs]
    forward = batch_norm(values, values, np.ones(3), np.zeros(3))
    want = batch_norm(values, [3 * y**2 for y in forward.y], np.ones(3), np.zeros(3))
    for x, dx in zip(xs, want.dx):
        np.testing.assert_allclose(x.grad.asnumpy(), dx, atol=1e-5)


def test_export_and_import(np_mode, two, tmp_path, rng):
    net = normalizing()
    net.initialize()
    net.hybridize()
    x = random(rng, 5, 4)
    with autograd.record():
        net(x)
    want = net(x).asnumpy()
    net.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), str(tmp_path / "net-0000.params")
    loaded = gluon.SymbolBlock.imports(files[0], ["data"], files[1], ctx=two)
    np.testing.assert_array_equal(loaded(x).asnumpy(), want)
    # A copy has keys of its own, and still gives arrays of mx.np.
    model, shares = ModelDataParallel(loaded, two), [x[:3], x[3:].as_in_ctx(two[1])]
    with autograd.record():
        outs, whole = model(shares), net(x)
    sbn.parallel_backward(outs)
    assert {type(out) for out in outs} == {mx.np.ndarray}
    np.testing.assert_allclose(
        np.concatenate([out.asnumpy() for out in outs]), whole.asnumpy(), atol=1e-5
    )


def test_conversion_of_networks(np_mode):
    batches = data_for(2, 6)

    def converted():
        return sbn.convert_sync_batchnorm(convolutional(nn.BatchNorm))

    assert_same_training(train(converted, 2, batches), train(convolutional, 1, batches))
    assert type(sbn.revert_batchnorm(converted())[1]) is nn.BatchNorm


def test_conversion_of_loaded_graphs(np_mode, two, tmp_path, rng):
    plain = normalizing(nn.BatchNorm)
    plain.initialize()
    plain.hybridize()
    x = random(rng, 6, 4)
    want = plain(x).asnumpy()
    plain.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), str(tmp_path / "net-0000.params")
    loaded = gluon.SymbolBlock.imports(files[0], ["data"], files[1], ctx=two)
    sbn.convert_sync_batchnorm(loaded)
    np.testing.assert_allclose(loaded(x).asnumpy(), want, atol=1e-5)
    shares = [x[:2], x[2:].as_in_ctx(two[1])]
    with autograd.record():
        outs, whole = ModelDataParallel(loaded, two)(shares), plain(x)
    np.testing.assert_allclose(
        np.concatenate([out.asnumpy() for out in outs]), whole.asnumpy(), atol=1e-5
    )
    sbn.revert_batchnorm(loaded)
    assert type(loaded(x)) is mx.np.ndarray
    symbol = mx.sym.load(files[0]).as_np_ndarray()
    for new in (sbn.convert_symbol(symbol, 2), sbn.revert_batchnorm(symbol)):
        assert type(new) is mx.sym.numpy._Symbol


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("contexts", [1, 2])
def test_export_for_inference(np_mode, fold, contexts, tmp_path, rng):
    contexts = [mx.cpu(i) for i in range(contexts)]
    net = nn.HybridSequential()
    net.add(nn.Dense(6), SyncBatchNorm(scale=False), nn.Activation("relu"), SyncBatchNorm())
    net.initialize(ctx=contexts)
    net.hybridize()
    x = random(rng, 5, 4)
    model = ModelDataParallel(net, contexts)
    with autograd.record():
        model(gluon.utils.split_and_load(x, contexts, even_split=False))
    want = net(x).asnumpy()
    files = sbn.export_for_inference(net, str(tmp_path / "net"), fold=fold)
    with open(files[0]) as file:
        assert "syncbn" not in file.read()
    loaded = gluon.SymbolBlock.imports(files[0], ["data"], files[1])
    np.testing.assert_allclose(loaded(x).asnumpy(), want, atol=1e-5)


class Sum(gluon.HybridBlock):
    """The operator itself, on mx.nd views."""

    def hybrid_forward(self, F, x):
        total = F.contrib.KeyBarrierSum(x.as_nd_ndarray(), key="np_sum", num_devices=2)
        return total.as_np_ndarray()


@pytest.mark.parametrize("hybridize", HYBRIDIZE)
def test_key_barrier_sum_of_views(np_mode, hybridize, two, rng):
    net = Sum()
    if hybridize is not None:
        net.hybridize(**hybridize)
    model = ModelDataParallel(net, two)
    for shape in ((4, 3), ()):
        xs, dys = on_both(rng, *shape), on_both(rng, *shape)
        for x in xs:
            x.attach_grad()
        with autograd.record():
            outs = model(xs)
        sbn.parallel_backward(outs, dys)
        for out, x in zip(outs, xs):
            assert type(out) is mx.np.ndarray and out.shape == shape
            np.testing.assert_allclose(out.asnumpy(), sum(v.asnumpy() for v in xs), rtol=1e-6)
            np.testing.assert_allclose(x.grad.asnumpy(), sum(v.asnumpy() for v in dys), rtol=1e-6)


def test_errors_say_what_to_do(np_mode):
    with pytest.raises(TypeError, match="call `as_nd_ndarray"):
        mx.nd.contrib.KeyBarrierSum(mx.np.ones(3), key="np_error", num_devices=1)
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    for x in (mx.nd.ones((2, 3)), mx.sym.var("data")):
        with pytest.raises(TypeError, match="under mx.npx.set_np.*give it x.as_np_ndarray()"):
            layer(x)
