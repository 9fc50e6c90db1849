"""Existing networks: converted and reverted, with checkpoints loading both ways."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn
from mxnet.gluon.contrib.nn import SyncBatchNorm as MxnetSyncBatchNorm

from gluon_syncbn import (
    ConversionError,
    ModelDataParallel,
    SyncBatchNorm,
    convert_sync_batchnorm,
    revert_batchnorm,
)
from networks import STATIC, assert_same_training, convolutional, data_for, train


class Everywhere(gluon.HybridBlock):
    """Normalizations in containers, as attributes, in a list of its own, and shared."""

    def __init__(self):
        super().__init__(prefix="everywhere_")
        with self.name_scope():
            self.first = nn.BatchNorm(epsilon=1e-3, momentum=0.7)
            self.body = nn.HybridSequential()
            self.body.add(nn.HybridSequential(), nn.Dense(6, flatten=False))
            self.body[0].add(nn.Dense(5, flatten=False), nn.BatchNorm(scale=False, axis=-1))
            self.shared = MxnetSyncBatchNorm(num_devices=4, center=False)
            self.listed = [nn.BatchNorm(use_global_stats=True), self.shared]
            for block in self.listed:
                self.register_child(block)

    def hybrid_forward(self, F, x):
        x = self.body(self.first(x))
        for block in self.listed:
            x = block(x)
        return self.shared(x)


def layers(net):
    return [net.first, net.body[0][1], net.listed[0], net.shared]


SETTINGS = ("axis", "eps", "momentum", "fix_gamma", "use_global_stats")


def settings(net):
    return [{k: layer._kwargs.get(k, 1) for k in SETTINGS} for layer in layers(net)]


def test_every_layer_with_its_settings():
    net = Everywhere()
    before, names, shared = settings(net), list(net.collect_params()), net.shared
    parameters = list(net.collect_params().values())
    requests = [p.grad_req for p in parameters]
    assert convert_sync_batchnorm(net, num_devices=3) is net
    for layer in layers(net):
        assert type(layer) is SyncBatchNorm and layer.num_devices == 3
    assert net.shared is shared is net.listed[1]
    assert settings(net) == before
    assert list(net.collect_params()) == names
    assert all(a is b for a, b in zip(net.collect_params().values(), parameters))
    assert [p.grad_req for p in parameters] == requests
    assert "num_devices=3" in repr(net) and "ndev" not in repr(net)

    assert revert_batchnorm(net) is net
    assert [type(layer) for layer in layers(net)] == [nn.BatchNorm] * 4
    assert settings(net) == before
    assert list(net.collect_params()) == names
    assert "num_devices" not in repr(net)


def run(net, x):
    with autograd.record():
        y = net(x)
    y.backward()
    return y


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("when", ["before initialization", "deferred", "initialized", "run"])
def test_at_any_time(when, hybridize, rng):
    def make():
        mx.random.seed(0)
        np.random.seed(0)
        net = convolutional(nn.BatchNorm)
        if hybridize:
            net.hybridize()
        return net

    data = rng.randn(8, 3, 8, 8).astype("float32")
    x = mx.nd.array(data)
    wanted = make()
    wanted.initialize()
    run(wanted, x)
    run(wanted, x)

    net = make()
    if when == "before initialization":
        convert_sync_batchnorm(net)
    net.initialize()
    if when == "deferred":
        convert_sync_batchnorm(net)
    run(net, x) if when == "run" else net(x)
    if when in ("initialized", "run"):
        convert_sync_batchnorm(net)
    if when != "run":
        run(net, x)
    got = run(net, x)
    assert type(net[1]) is SyncBatchNorm
    np.testing.assert_allclose(got.asnumpy(), run(wanted, x).asnumpy(), atol=1e-4)
    for name, parameter in net._collect_params_with_prefix().items():
        other = wanted._collect_params_with_prefix()[name]
        if "running" not in name:  # nn.BatchNorm moves them in backward, here once more
            np.testing.assert_allclose(parameter.data().asnumpy(), other.data().asnumpy())
            error = np.abs((parameter.grad() - other.grad()).asnumpy()).max()
            assert error < 1e-4, name


def converted():
    return convert_sync_batchnorm(convolutional(nn.BatchNorm))


@pytest.mark.parametrize("hybridize", [None, {}, STATIC])
def test_it_is_synchronized(hybridize):
    batches = data_for(3, 6)
    wanted = train(converted, 1, batches)
    assert_same_training(train(converted, 2, batches, hybridize), wanted)
    plain = train(lambda: convolutional(nn.BatchNorm), 2, batches)
    with pytest.raises(AssertionError):
        assert_same_training(plain, wanted)


def test_a_hybridized_network_that_has_run_is_traced_anew(rng):
    net = convolutional(nn.BatchNorm)
    net.initialize()
    net.hybridize()
    x = mx.nd.array(rng.randn(4, 3, 8, 8))
    net(x)
    convert_sync_batchnorm(net)
    net(x)
    assert "_syncbn_normalize" in net._cached_graph[1].tojson()
    revert_batchnorm(net)
    net(x)
    assert "_syncbn" not in net._cached_graph[1].tojson()


def randomized(net, rng):
    net.initialize(mx.init.Xavier())
    net(mx.nd.zeros((1, 3, 8, 8)))
    for parameter in net.collect_params().values():
        parameter.set_data(mx.nd.array(rng.rand(*parameter.shape) + 0.5))
    return net


@pytest.mark.parametrize("how", ["load_parameters", "load_params", "by full names"])
@pytest.mark.parametrize("way", ["to ours", "from ours", "to the layer itself", "from the layer"])
def test_checkpoints_go_both_ways(way, how, tmp_path, rng):
    kinds = {
        "to ours": (nn.BatchNorm, "converted"),
        "from ours": ("converted", nn.BatchNorm),
        "to the layer itself": (nn.BatchNorm, SyncBatchNorm),
        "from the layer": (SyncBatchNorm, nn.BatchNorm),
    }[way]
    saved, loading = (converted() if kind == "converted" else convolutional(kind) for kind in kinds)
    randomized(saved, rng)
    path = str(tmp_path / "weights.params")
    if how == "load_parameters":
        saved.save_parameters(path)
        loading.load_parameters(path)
    elif how == "load_params":
        saved.save_parameters(path)
        with pytest.warns(UserWarning, match="load_params is deprecated"):
            loading.load_params(path)
    else:
        saved.collect_params().save(path)
        loading.collect_params().load(path)
    x = mx.nd.array(rng.randn(2, 3, 8, 8))
    np.testing.assert_allclose(loading(x).asnumpy(), saved(x).asnumpy(), rtol=1e-5)


def test_a_graph_inside_a_network(tmp_path, rng):
    plain = randomized(convolutional(nn.BatchNorm), rng)
    plain.hybridize()
    x = mx.nd.array(rng.randn(4, 3, 8, 8))
    wanted = plain(x).asnumpy()
    plain.export(str(tmp_path / "plain"))

    def load():
        net = nn.HybridSequential()
        net.add(
            gluon.SymbolBlock.imports(
                str(tmp_path / "plain-symbol.json"), ["data"], str(tmp_path / "plain-0000.params")
            )
        )
        return net

    net = load()
    net(x)
    convert_sync_batchnorm(net)
    assert net[0]._cached_graph[1].tojson().count("_syncbn_normalize") == 4
    np.testing.assert_allclose(net(x).asnumpy(), wanted, rtol=1e-5)
    contexts = [mx.cpu(0), mx.cpu(1)]
    net.collect_params().reset_ctx(contexts)
    model = ModelDataParallel(net, contexts)
    with autograd.record():
        parts = model([x[:1].as_in_context(contexts[0]), x[1:].as_in_context(contexts[1])])
    got = np.concatenate([part.asnumpy() for part in parts])
    single = convert_sync_batchnorm(load(), num_devices=1)
    assert single[0]._cached_graph[1].tojson().count("_syncbn_batch_norm") == 4
    with autograd.record():
        np.testing.assert_allclose(got, single(x).asnumpy(), rtol=1e-4)
    revert_batchnorm(net)
    assert "_syncbn" not in net[0]._cached_graph[1].tojson()
    assert net[0]._cached_graph[1].tojson().count('"op": "BatchNorm"') == 4


def shares(two):
    return [mx.nd.ones((2, 3), two[0]), mx.nd.ones((4, 3), two[1]) + 5]


def synchronized(model, xs):
    """Whether the shards were normalized as one batch: the first is then below the mean."""
    with autograd.record():
        ys = model(xs)
    return ys[0].asnumpy().mean() < -0.5


def sequence(*layers, hybridize=True):
    net = nn.HybridSequential()
    net.add(*layers)
    net.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
    net.hybridize(active=hybridize)
    return net


@pytest.mark.parametrize("hybridize", [False, True])
def test_inside_model_data_parallel(hybridize, two):
    for net in (sequence(nn.BatchNorm(), hybridize=hybridize), nn.BatchNorm()):
        net.initialize(ctx=two, force_reinit=True)
        model = ModelDataParallel(net, two)
        xs = shares(two)
        assert not synchronized(model, xs)
        assert convert_sync_batchnorm(model) is model
        assert synchronized(model, xs)
        assert revert_batchnorm(model) is model
        assert not synchronized(model, xs)


def test_a_part_of_a_network_that_has_run(two):
    """The network was traced before its part was converted."""
    xs = shares(two)
    net = sequence(sequence(nn.BatchNorm()))
    net(xs[0])
    model = ModelDataParallel(net, two)
    assert not synchronized(model, xs)
    convert_sync_batchnorm(net[0])
    assert synchronized(model, xs) and synchronized(ModelDataParallel(net, two), xs)
    revert_batchnorm(net[0])
    assert not synchronized(model, xs)


def test_a_loaded_graph_in_a_network_that_has_run(two, tmp_path):
    xs = shares(two)
    layer = sequence(SyncBatchNorm())
    layer(xs[0])
    layer.export(str(tmp_path / "layer"))

    def load():
        return gluon.SymbolBlock.imports(
            str(tmp_path / "layer-symbol.json"),
            ["data"],
            str(tmp_path / "layer-0000.params"),
            ctx=two,
        )

    net = nn.HybridSequential()
    net.add(load())
    net.hybridize()
    net(xs[0])
    assert synchronized(ModelDataParallel(net, two), xs)
    # A contradicting number of devices is an error, as for layers.
    for wrong in (1, 3):
        single = convert_sync_batchnorm(revert_batchnorm(load()), num_devices=wrong)
        with pytest.raises(ValueError, match=f"num_devices={wrong}, .*revert_batchnorm, then"):
            ModelDataParallel(single, two)
    again = convert_sync_batchnorm(revert_batchnorm(single), num_devices=2)
    assert synchronized(ModelDataParallel(again, two), xs)


@pytest.mark.parametrize("holder", [list, tuple, lambda x: {"a": [list(x)]}])
def test_a_list_that_gluon_does_not_know_of(holder):
    class Listed(gluon.Block):
        def __init__(self):
            super().__init__(prefix="outer_")
            with self.name_scope():
                self.known = nn.BatchNorm()
                self.blocks = holder([nn.Dense(3), nn.BatchNorm()])

    net = Listed()
    with pytest.raises(ConversionError, match="outer.blocks holds outer_batchnorm1.*register"):
        convert_sync_batchnorm(net)
    assert type(net.known) is nn.BatchNorm


def test_mxnets_own_synchronized_layer_is_reverted(rng):
    layer = MxnetSyncBatchNorm(num_devices=2, in_channels=3)
    revert_batchnorm(layer)
    layer.initialize()
    assert type(layer) is nn.BatchNorm
    assert layer(mx.nd.array(rng.randn(2, 3))).shape == (2, 3)


def test_one_layer_is_a_network_too():
    layer = nn.BatchNorm(prefix="alone_")
    assert convert_sync_batchnorm(layer) is layer and type(layer) is SyncBatchNorm


def test_ours_stay_as_they_are():
    layer = SyncBatchNorm(num_devices=5)
    assert convert_sync_batchnorm(layer, num_devices=2).num_devices == 5


class Derived(nn.BatchNorm):
    """A subclass that may do anything."""


@pytest.mark.parametrize("odd", [nn.BatchNormReLU, Derived])
def test_another_kind_is_named_and_nothing_is_converted(odd):
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(), odd(prefix="odd_"), nn.BatchNorm())
    with pytest.raises(ConversionError, match=f"odd is a .*{odd.__name__}.*put nn.BatchNorm"):
        convert_sync_batchnorm(net)
    assert type(net[0]) is type(net[2]) is nn.BatchNorm


def test_what_cannot_be_reverted_is_named_and_nothing_is_reverted():
    class Ours(SyncBatchNorm):
        pass

    net = nn.HybridSequential()
    net.add(SyncBatchNorm(), Ours(prefix="odd_"))
    with pytest.raises(ConversionError, match="odd is a Ours"):
        revert_batchnorm(net)
    assert type(net[0]) is SyncBatchNorm


def test_a_graph_that_cannot_be_converted_is_named_and_nothing_is_converted():
    x = mx.sym.var("data")
    odd = mx.sym.contrib.BatchNormWithReLU(mx.sym.BatchNorm(x, name="first"), name="odd")
    net = nn.HybridSequential()
    net.add(nn.BatchNorm(), gluon.SymbolBlock(odd, x, params=None))
    with pytest.raises(ConversionError, match="in symbolblock.*: odd .*fused with a relu"):
        convert_sync_batchnorm(net)
    assert type(net[0]) is nn.BatchNorm
    assert "_syncbn" not in net[1]._cached_graph[1].tojson()


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, revert_batchnorm])
@pytest.mark.parametrize("bad", [None, "net", [nn.BatchNorm()]])
def test_something_else_than_a_network(convert, bad):
    with pytest.raises(TypeError, match="must be a Gluon Block"):
        convert(bad)


def test_a_symbol_has_a_function_of_its_own():
    with pytest.raises(TypeError, match="use gluon_syncbn.convert_symbol"):
        convert_sync_batchnorm(mx.sym.var("x"))


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2"])
def test_num_devices_must_be_right_before_anything_is_converted(bad):
    layer = nn.BatchNorm()
    with pytest.raises(ValueError, match="num_devices must be a positive integer"):
        convert_sync_batchnorm(layer, num_devices=bad)
    assert type(layer) is nn.BatchNorm


def test_a_checkpoint_of_wrong_shapes_names_the_layer(tmp_path, rng):
    path = str(tmp_path / "weights.params")
    net = randomized(converted(), rng)
    net.save_parameters(path)
    weights = mx.nd.load(path)
    weights["4.gamma"] = mx.nd.ones(9)
    mx.nd.save(path, weights)
    with pytest.raises(AssertionError, match="batchnorm1_gamma.*shape incompatible"):
        net.load_parameters(path)
