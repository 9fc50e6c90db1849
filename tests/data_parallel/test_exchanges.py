"""The all-reduces that a network takes part in, and their keys."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import (
    MABN2d,
    ModelDataParallel,
    SyncBatchNorm,
    convert_sync_batchnorm,
    parallel_backward,
    revert_batchnorm,
    symbol,
)
from gluon_syncbn.data_parallel.exchanges import exchanges_of
from networks import split


def test_keys_stay_apart():
    """Keys of the user that look like ours stay distinct."""
    x = mx.sym.var("data")
    both = [
        mx.sym.contrib.KeyBarrierSum(x, key=key, num_devices=2) for key in ("k@1", "k@2", "k@2")
    ]
    block = mx.gluon.SymbolBlock(mx.sym.Group(both), x, params=None)
    for _ in range(2):
        keys = [exchange.key for exchange in exchanges_of(block)]
        assert len(set(keys)) == 2 and keys[1] == keys[2]
    assert keys[0].startswith("k@1") and keys[1].startswith("k@2")


@pytest.mark.parametrize("num_devices", [1, 2, None])
def test_moving_averages_in_blocks_and_in_graphs(num_devices):
    layer = MABN2d(3, 2, 4, num_devices=num_devices, prefix="norm_")
    layer.initialize()
    graph = gluon.SymbolBlock(layer(mx.sym.var("x")), mx.sym.var("x"), layer.collect_params())
    for block in (layer, graph):
        (exchange,) = exchanges_of(block)
        names = [p.name for p in exchange.statistics]
        assert names == ["norm_running_var", "norm_buffer_x2", "norm_iters"]
        assert [p.name for p in exchange.late_statistics] == ["norm_buffer_gz"]
        assert exchange.local == (num_devices == 1)
        # A layer by itself runs on any number of devices.
        assert exchange.num_devices == (None if num_devices == 1 else num_devices)


def test_two_copies_of_one_file_do_not_mix(two, rng, tmp_path):
    """A teacher and a student from one exported file, on different data, in different order."""
    net = nn.HybridSequential(prefix="copied_")
    net.add(SyncBatchNorm(in_channels=3, prefix="norm_"))
    net.initialize(ctx=two)
    net.hybridize()
    net(mx.nd.ones((1, 3), ctx=two[0]))
    net.export(str(tmp_path / "net"))
    models = [
        ModelDataParallel(
            gluon.SymbolBlock.imports(
                str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params"), two
            ),
            two,
        )
        for _ in range(2)
    ]
    keys = [{e.key for e in exchanges_of(model.net)} for model in models]
    assert not keys[0] & keys[1] and len(keys[0]) == 1
    x = rng.randn(6, 3).astype("float32")
    for model, scale in zip(models, (1, 100)):
        with autograd.record():
            outs = model(split(scale * x, two))
        got = np.concatenate([o.asnumpy() for o in outs])
        np.testing.assert_allclose(got, (x - x.mean(0)) / x.std(0), atol=1e-3)
    # Exported again, the name does not grow.
    models[0].net.export(str(tmp_path / "again"))
    again = gluon.SymbolBlock.imports(
        str(tmp_path / "again-symbol.json"), ["data"], str(tmp_path / "again-0000.params"), two
    )
    (exchange,) = exchanges_of(again)
    assert exchange.key.count("@") == 1


class Sums(gluon.HybridBlock):
    def hybrid_forward(self, F, x):
        return F.contrib.KeyBarrierSum(x, key="own", num_devices=2)


@pytest.fixture
def load(tmp_path, two):
    """Load a file with plain layers, a synchronized one and a KeyBarrierSum; again at each call."""
    path = str(tmp_path / "mixed-symbol.json")
    net = nn.HybridSequential(prefix="mixed_")
    with net.name_scope():
        net.add(nn.BatchNorm(scale=False), SyncBatchNorm(), nn.BatchNorm(), Sums())
    net(mx.sym.var("data")).save(path)

    def load():
        block = gluon.SymbolBlock.imports(path, ["data"])
        block.collect_params(".*(gamma|var)").initialize(mx.init.One(), ctx=two)
        block.collect_params(".*(beta|mean)").initialize(mx.init.Zero(), ctx=two)
        return block

    return load


def convert_then_run(block, two):
    return ModelDataParallel(convert_sync_batchnorm(block), two)


def run_then_convert(block, two):
    return convert_sync_batchnorm(ModelDataParallel(block, two))


@pytest.mark.parametrize("first", [convert_then_run, run_then_convert])
@pytest.mark.parametrize("second", [convert_then_run, run_then_convert])
def test_converted_copies_of_a_file_with_both_kinds_of_layers(first, second, load, two, rng):
    """The converted layers get their keys from the conversion, the others from the model."""
    models = [first(load(), two), second(load(), two)]
    xs = [rng.randn(6, 3).astype("float32") for _ in models]
    for _ in range(3):
        with autograd.record():
            outs = [model(split(x, two)) for model, x in zip(models, xs)]
        parallel_backward([list(pair) for pair in zip(*outs)])
        for x, sums in zip(xs, outs):
            y = (x - x.mean(0)) / x.std(0)
            for total in sums:
                np.testing.assert_allclose(total.asnumpy(), y[:3] + y[3:], atol=1e-3)
    keys = [[e.key for e in exchanges_of(model.net)] for model in models]
    assert [len(own) for own in keys] == [4, 4] and len({*keys[0], *keys[1]}) == 8


def test_layers_of_a_network_and_of_its_graphs(two):
    """Each layer once, a local one too; and a graph is read again after it was replaced."""
    x = mx.sym.var("data")
    shared = SyncBatchNorm(prefix="shared_")
    block = gluon.SymbolBlock(SyncBatchNorm(num_devices=1, prefix="alone_")(x), x)
    net = nn.Sequential()
    net.add(shared, block, nn.Dense(2), shared, SyncBatchNorm(num_devices=3, prefix="three_"))
    found = {e.name: e for e in exchanges_of(net)}
    assert len(exchanges_of(net)) == len(found) == 3
    assert {name: (e.num_devices, e.local) for name, e in found.items()} == {
        "shared": (None, False),
        "alone_fwd": (1, True),
        "three": (3, False),
    }
    assert found["shared"].statistics == shared.statistics
    assert [p.name for p in found["alone_fwd"].statistics] == [
        "alone_running_mean",
        "alone_running_var",
    ]
    convert_sync_batchnorm(revert_batchnorm(block), num_devices=2)
    (read,) = exchanges_of(block)
    assert (read.num_devices, read.local) == (2, False)


def with_statistics_as_inputs(num_devices, contexts):
    """A loaded graph that gets its moving statistics with the data, at every call."""
    names = "data", "norm_moving_mean", "norm_moving_var"
    sym = symbol.SyncBatchNorm(mx.sym.var("data"), name="norm", num_devices=num_devices)
    block = gluon.SymbolBlock(sym, [mx.sym.var(name, dtype="float32") for name in names])
    block.initialize(ctx=contexts)
    block.params["norm_beta"].set_data(mx.nd.zeros(3))
    block.hybridize()
    return block


@pytest.mark.parametrize("num_devices", [1, None])
def test_moving_statistics_that_are_inputs(num_devices, rng):
    x = rng.randn(4, 3).astype("float32")
    block = with_statistics_as_inputs(num_devices, [mx.cpu(0)])
    mean, variance = mx.nd.zeros(3), mx.nd.ones(3)
    with autograd.record():
        y = block(mx.nd.array(x), mean, variance)
    np.testing.assert_allclose(y.asnumpy(), (x - x.mean(0)) / x.std(0), atol=1e-2)
    np.testing.assert_allclose(mean.asnumpy(), 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance.asnumpy(), 0.9 + 0.1 * x.var(0), rtol=1e-5)


def test_moving_statistics_that_are_inputs_on_two_devices(two, rng):
    """No pass can be announced to the all-reduce then, so it has to know the number of devices."""
    with pytest.raises(ValueError, match="inputs of the graph.*give it num_devices=2"):
        ModelDataParallel(with_statistics_as_inputs(None, two), two)
    x = rng.randn(4, 3).astype("float32")
    model = ModelDataParallel(with_statistics_as_inputs(2, two), two)
    means, variances = ([value(3, ctx=c) for c in two] for value in (mx.nd.zeros, mx.nd.ones))
    with autograd.record():
        ys = model(split(x, two), means, variances)
    y = np.concatenate([y.asnumpy() for y in ys])
    np.testing.assert_allclose(y, (x - x.mean(0)) / x.std(0), atol=1e-2)
    for mean in means:
        np.testing.assert_allclose(mean.asnumpy(), 0.1 * x.mean(0), rtol=1e-5)
