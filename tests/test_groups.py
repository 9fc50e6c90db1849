"""Groups: a layer synchronized over some of the devices at a time."""

import time

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluon_syncbn
from gluon_syncbn import (
    ModelDataParallel,
    SyncBatchNorm,
    convert_sync_batchnorm,
    export_for_inference,
    parallel_backward,
    revert_batchnorm,
)
from networks import MODES, STATIC
from reference import batch_norm, largest_error

FOUR = [mx.cpu(i) for i in range(4)]


def initialized(net, hybridize=None, contexts=FOUR):
    net.initialize(ctx=contexts)
    if hybridize is not None:
        net.hybridize(**hybridize)
    return ModelDataParallel(net, contexts)


def shards(rng, rows):
    """{device: shard}: as many rows as `rows` says, each device's about another mean."""
    return {d: (rng.randn(n, 3) * (d + 1) + d).astype("float32") for d, n in rows.items()}


def step(model, xs, dys):
    """Run forward and backward; return {device: output}, {device: gradient of the input}."""
    inputs = {d: mx.nd.array(x, ctx=FOUR[d]) for d, x in xs.items()}
    for x in inputs.values():
        x.attach_grad()
    with autograd.record():
        outs = model(list(inputs.values()))
    parallel_backward(outs, [mx.nd.array(dys[d], ctx=FOUR[d]) for d in xs])
    return (
        {d: out.asnumpy() for d, out in zip(xs, outs)},
        {d: x.grad.asnumpy() for d, x in inputs.items()},
    )


def check(model, layer, group_size, rng):
    """Steps in which all, some and one of the devices have an input, against NumPy."""
    means, variances = np.zeros((4, 3)), np.ones((4, 3))
    for rows in ({0: 4, 1: 5, 2: 6, 3: 7}, {3: 6, 0: 4, 1: 5}, {0: 4}, {1: 5, 3: 4, 2: 6, 0: 4}):
        xs, dys = shards(rng, rows), shards(rng, rows)
        ys, dxs = step(model, xs, dys)
        for first in range(0, 4, group_size):
            group = range(first, first + group_size)
            present = [d for d in group if d in xs]
            if not present:
                continue  # the statistics stay
            want = batch_norm(
                [xs[d] for d in present], [dys[d] for d in present], np.ones(3), np.zeros(3)
            )
            for i, d in enumerate(present):
                assert largest_error(ys[d], want.y[i]) < 1e-5
                assert largest_error(dxs[d], want.dx[i]) < 1e-4
                gradient = layer.gamma.grad(FOUR[d]).asnumpy()
                assert largest_error(gradient, want.dgamma[i]) < 1e-4
            means[group] = 0.9 * means[group] + 0.1 * want.mean
            variances[group] = 0.9 * variances[group] + 0.1 * want.var
        for d, context in enumerate(FOUR):
            got = layer.running_mean.data(context).asnumpy()
            np.testing.assert_allclose(got, means[d], rtol=1e-4, atol=1e-5)
            got = layer.running_var.data(context).asnumpy()
            np.testing.assert_allclose(got, variances[d], rtol=1e-4)


@pytest.mark.parametrize("hybridize", MODES)
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_each_group_is_a_batch_of_its_own(group_size, hybridize, rng):
    net = nn.HybridSequential()
    net.add(SyncBatchNorm(group_size=group_size))
    check(initialized(net, hybridize), net[0], group_size, rng)


@pytest.mark.parametrize("hybridize", [None, STATIC])
def test_layers_of_different_groups_in_one_network(hybridize, rng):
    """Each layer's input is normalized already, but over another group."""
    net = nn.HybridSequential()
    net.add(*[SyncBatchNorm(group_size=size, in_channels=3) for size in (2, None, 1, 2)])
    model = initialized(net, hybridize)
    xs = shards(rng, {0: 4, 1: 2, 2: 3, 3: 5})
    for _ in range(2):
        ys, _ = step(model, xs, xs)
    flow = [xs[d].astype("float64") for d in range(4)]
    for size in (2, 4, 1, 2):
        flow = [
            y
            for i in range(0, 4, size)
            for y in batch_norm(flow[i : i + size], flow[i : i + size], np.ones(3), np.zeros(3)).y
        ]
    for d in range(4):
        assert largest_error(ys[d], flow[d]) < 1e-5


class FailsOn(nn.HybridSequential):
    """Raises on one device before its last layer."""

    device = None

    def forward(self, x):
        x = self[0](x)
        if x.context == self.device:
            raise KeyError("told to")
        return self[1](x)


@pytest.mark.parametrize("hybridize", [None, {}])
def test_a_device_that_fails_ends_the_wait_of_its_group(hybridize, rng):
    net = FailsOn()
    net.add(SyncBatchNorm(group_size=2, in_channels=3), SyncBatchNorm(group_size=2, in_channels=3))
    model = initialized(net, hybridize)
    xs = shards(rng, dict.fromkeys(range(4), 2))
    step(model, xs, xs)
    gluon_syncbn.set_timeout(30)
    net.device = FOUR[3]
    start = time.monotonic()
    with pytest.raises(KeyError, match="told to"):
        step(model, xs, xs)
    net.device = None
    outs = step(model, xs, xs)[0]
    with autograd.record():
        heads = model([mx.nd.array(xs[d], ctx=c) for d, c in enumerate(FOUR)])
    heads[3] = mx.nd.ones(1, ctx=FOUR[3])  # not recorded
    with pytest.raises(mx.MXNetError):
        parallel_backward(heads)
    assert time.monotonic() - start < 20
    np.testing.assert_array_equal(step(model, xs, xs)[0][0], outs[0])


@pytest.mark.parametrize("group_size", [1, 2])  # one operator, or three
def test_an_exported_graph_remembers_its_groups(group_size, rng, tmp_path):
    net = nn.HybridSequential()
    net.add(SyncBatchNorm(group_size=group_size, in_channels=3))
    initialized(net, {})([mx.nd.ones((2, 3), ctx=c) for c in FOUR])
    net.export(str(tmp_path / "net"))
    files = [str(tmp_path / name) for name in ("net-symbol.json", "net-0000.params")]
    loaded = gluon.SymbolBlock.imports(files[0], ["data"], files[1], ctx=FOUR)
    model = ModelDataParallel(loaded, FOUR)

    class Layer:
        gamma, running_mean, running_var = (
            loaded.params[f"{net[0].prefix}{name}"]
            for name in ("gamma", "running_mean", "running_var")
        )

    check(model, Layer, group_size, rng)
    if group_size > 1:
        with pytest.raises(ValueError, match="sum has group_size=2, but ctx_list has 3 devices"):
            ModelDataParallel(loaded, FOUR[:3])
    export_for_inference(net, str(tmp_path / "plain"))
    assert "group_size" not in (tmp_path / "plain-symbol.json").read_text()


def test_module_trains_no_groups(tmp_path):
    sym = SyncBatchNorm(group_size=2, prefix="norm_")(mx.sym.var("data"))
    module = mx.mod.Module(sym, label_names=None, context=FOUR[:2])
    batch = mx.io.DataBatch([mx.nd.ones((4, 3))])
    module.bind([("data", (4, 3))])
    module.init_params()
    module.forward(batch, is_train=False)
    assert module.get_outputs()[0].shape == (4, 3)
    with pytest.raises(RuntimeError, match="norm_sum has a group_size.*SymbolBlock in ModelData"):
        module.forward(batch, is_train=True)


@pytest.mark.parametrize("hybridize", [None, {}])
def test_outside_of_a_model_it_is_not_known_what_a_group_is(hybridize, two):
    layer = SyncBatchNorm(group_size=2, in_channels=3)
    initialized(layer, hybridize, two)
    x = mx.nd.ones((2, 3), ctx=two[0])
    assert layer(x).shape == x.shape
    with pytest.raises(RuntimeError, match=f"{layer.name} has group_size=2, but only ModelData"):
        with autograd.record():
            layer(x)


def test_sizes_that_do_not_divide(two):
    for wrong in (0, -1, 1.5, "2", True):
        with pytest.raises(ValueError, match="group_size must be a positive integer, or None"):
            SyncBatchNorm(group_size=wrong)
    with pytest.raises(ValueError, match="num_devices=4 is no multiple of group_size=3"):
        SyncBatchNorm(num_devices=4, group_size=3)
    with pytest.raises(ValueError, match="num_devices=4 is no multiple of group_size=3"):
        convert_sync_batchnorm(nn.BatchNorm(), num_devices=4, group_size=3)
    with pytest.raises(ValueError, match="norm has group_size=3, but ctx_list has 2 devices"):
        ModelDataParallel(SyncBatchNorm(group_size=3, prefix="norm_"), two)


def test_conversion(rng):
    graph = mx.sym.BatchNorm(mx.sym.var("data"), fix_gamma=False, eps=1e-5, name="bn")
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(in_channels=3), gluon.SymbolBlock(graph, mx.sym.var("data")))
    convert_sync_batchnorm(net, group_size=2)
    assert net[0].group_size == 2 and "group_size=2" in repr(net[0])
    model = initialized(net)
    net[1].params["bn_gamma"].set_data(mx.nd.ones(3))
    net[1].params["bn_beta"].set_data(mx.nd.zeros(3))
    xs = shards(rng, dict.fromkeys(range(4), 3))
    ys, _ = step(model, xs, xs)
    for first in (0, 2):  # normalized twice
        pair = [xs[first], xs[first + 1]]
        for _ in range(2):
            pair = batch_norm(pair, pair, np.ones(3), np.zeros(3)).y
        assert largest_error(ys[first], pair[0]) < 1e-5
    revert_batchnorm(net)
    assert "group_size" not in repr(net[0])
    assert "group_size" not in net[1](mx.sym.var("data")).tojson()
    assert revert_batchnorm(convert_sync_batchnorm(nn.BatchNorm(), group_size=1))
