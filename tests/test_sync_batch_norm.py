"""The layer as a part of Gluon: parameters, checkpoints, graphs, export, cast."""

import copy
import inspect
import json
import textwrap

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import fresh_process
import gluon_syncbn
from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from networks import MODES, STATIC, Shared, convolutional, data_for, train
from reference import batch_norm, largest_error


def test_parameters_are_those_of_mxnets_own_then_axis():
    own = inspect.signature(mx.gluon.contrib.nn.SyncBatchNorm.__init__).parameters
    ours = inspect.signature(SyncBatchNorm.__init__).parameters
    named = [p for p in own.values() if p.kind != p.VAR_KEYWORD]
    assert [(p.name, p.default) for p in ours.values()][: len(named) + 1] == [
        *[(p.name, p.default) for p in named],
        ("axis", 1),
    ]
    assert gluon_syncbn.BatchNorm is SyncBatchNorm


def randomize(net):
    rng = np.random.RandomState(5)
    for p in net.collect_params().values():
        p.set_data(mx.nd.array(rng.rand(*p.shape) + 0.5, dtype=p.dtype))


@pytest.mark.parametrize("structural", [True, False])
def test_checkpoints_go_both_ways(structural, tmp_path):
    path, x = str(tmp_path / "net.params"), mx.nd.random.normal(shape=(2, 3, 8, 8))
    nets = [convolutional(norm) for norm in (nn.BatchNorm, SyncBatchNorm)]
    for source, target in (nets, reversed(nets)):
        for net in (source, target):
            net.initialize(force_reinit=True)
            net(x)
        randomize(source)
        if structural:
            source.save_parameters(path)
            target.load_parameters(path)
        else:
            source.collect_params().save(path)
            target.collect_params().load(path)
        np.testing.assert_allclose(target(x).asnumpy(), source(x).asnumpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hybridize", MODES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_one_device_against_numpy(hybridize, dtype, rng):
    layer = SyncBatchNorm(epsilon=1e-3, axis=-1)
    layer.cast(dtype)
    layer.initialize(mx.init.Uniform(1))
    if hybridize is not None:
        layer.hybridize(**hybridize)
    x, dy = (mx.nd.array(rng.randn(4, 3, 5), dtype=dtype) for _ in range(2))
    x.attach_grad()
    with autograd.record():
        y = layer(x)
    y.backward(dy)
    parameter = "float64" if dtype == "float64" else "float32"
    assert {np.dtype(p.dtype).name for p in layer.collect_params().values()} == {parameter}
    want = batch_norm([x.asnumpy()], [dy.asnumpy()], np.ones(5), np.zeros(5), axis=-1, epsilon=1e-3)
    tolerance = {"float16": 2e-3, "float32": 3e-6, "float64": 1e-11}[dtype]
    assert largest_error(y.asnumpy(), want.y[0]) < tolerance
    assert largest_error(x.grad.asnumpy(), want.dx[0]) < tolerance
    mx.nd.waitall()
    np.testing.assert_allclose(layer.running_mean.data().asnumpy(), 0.1 * want.mean, atol=1e-6)
    # In inference, by the moving statistics.
    y = layer(x).asnumpy()
    mean, var = layer.running_mean.data().asnumpy(), layer.running_var.data().asnumpy()
    assert largest_error(y, (x.asnumpy() - mean) / np.sqrt(var + 1e-3)) < tolerance


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}])
def test_agrees_with_mxnets_batch_norm(options, hybridize, rng):
    x, dy = (mx.nd.array(rng.randn(6, 3, 7, 7)) for _ in range(2))
    results = []
    for norm in (nn.BatchNorm, SyncBatchNorm):
        layer = norm(**options)
        layer.initialize()
        if hybridize:
            layer.hybridize()
        x.attach_grad()
        with autograd.record():
            y = layer(x)
        y.backward(dy)
        arrays = [y, x.grad, layer(x), *[p.data() for p in layer.collect_params().values()]]
        for p in (layer.gamma, layer.beta):
            if p.grad_req != "null":
                arrays.append(p.grad())
        results.append([a.asnumpy() for a in arrays])
    for theirs, ours in zip(*results):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hybridize", [False, True])
def test_use_global_stats_trains_by_the_moving_statistics(hybridize, rng):
    x, dy = (mx.nd.array(rng.randn(6, 3, 4)) for _ in range(2))
    layer = SyncBatchNorm(use_global_stats=True, num_devices=2, in_channels=3)
    layer.initialize()
    layer.running_mean.set_data(mx.nd.array([1, 2, 3]))
    if hybridize:
        layer.hybridize()
    x.attach_grad()
    with autograd.record():
        y = layer(x)  # num_devices=2: would wait if it synchronized
    y.backward(dy)
    want = batch_norm(
        [x.asnumpy()],
        [dy.asnumpy()],
        np.ones(3),
        np.zeros(3),
        statistics=(np.array([1.0, 2, 3]), np.ones(3)),
    )
    assert largest_error(y.asnumpy(), want.y[0]) < 3e-6
    assert largest_error(x.grad.asnumpy(), want.dx[0]) < 3e-6
    np.testing.assert_array_equal(layer.running_mean.data().asnumpy(), [1, 2, 3])


@pytest.mark.parametrize("hybridize", [None, {}, STATIC])
def test_inference_does_not_wait(hybridize):
    layer = SyncBatchNorm(num_devices=7)
    layer.initialize()
    if hybridize is not None:
        layer.hybridize(**hybridize)
    assert layer(mx.nd.ones((2, 3))).shape == (2, 3)
    with autograd.record(train_mode=False):
        y = layer(mx.nd.ones((2, 3)))
    y.wait_to_read()


@pytest.mark.parametrize("hybridize", MODES)
@pytest.mark.parametrize("num_devices", [None, 1])
@pytest.mark.parametrize("nothing, axis", [((0, 3, 4), 1), ((2, 3, 0), 1), ((0, 4, 3), -1)])
def test_arrays_without_elements(hybridize, num_devices, nothing, axis, rng):
    """As in nn.BatchNorm, but the moving statistics do not become NaN."""
    with mx.util.np_shape():
        some = tuple(n or 5 for n in nothing)
        results = []
        for layer in (SyncBatchNorm(num_devices=num_devices, axis=axis), nn.BatchNorm(axis=axis)):
            layer.initialize()
            if hybridize is not None:
                layer.hybridize(**hybridize)
            statistics = []
            # In training nn.BatchNorm's are NaN after the first array without elements.
            for shape, training in [(some, True), (nothing, False), (some, False), (nothing, True)]:
                x = mx.nd.array(rng.randn(*shape))
                x.attach_grad()
                with autograd.record(train_mode=training):
                    y = layer(x)
                y.backward()
                mx.nd.waitall()
                assert y.shape == y.asnumpy().shape == x.grad.asnumpy().shape == shape
                moving = layer.running_mean, layer.running_var
                statistics.append([p.data().asnumpy() for p in moving])
            results.append((layer.gamma.grad().asnumpy(), statistics))
        (gradient, statistics), (_, theirs) = results
        assert np.isnan(theirs[-1][0]).all()
        np.testing.assert_array_equal(gradient, 0)
        for after in statistics[1:]:
            np.testing.assert_array_equal(after, statistics[0])


@pytest.mark.parametrize("hybridize", [None, {}, STATIC])
@pytest.mark.parametrize("sizes", [(4, 0), (0, 4), (0, 0)])
def test_a_device_without_elements_among_others(hybridize, sizes, two, rng):
    with mx.util.np_shape(True):  # in all threads
        layer = SyncBatchNorm(in_channels=3)
        layer.initialize(ctx=two)
        if hybridize is not None:
            layer.hybridize(**hybridize)
        model = ModelDataParallel(layer, two)
        statistics = np.zeros(3), np.ones(3)
        for _ in range(3):
            values = [rng.randn(size, 3) for size in sizes]
            xs = [mx.nd.array(v, ctx=c) for v, c in zip(values, two)]
            for x in xs:
                x.attach_grad()
            with autograd.record():
                ys = model(xs)
            parallel_backward(ys, xs)
            mx.nd.waitall()
            want = batch_norm(values, values, np.ones(3), np.zeros(3)) if any(sizes) else None
            for i, size in enumerate(sizes):
                assert ys[i].asnumpy().shape == xs[i].grad.asnumpy().shape == (size, 3)
                dgamma = layer.gamma.list_grad()[i].asnumpy()
                if size == 0:
                    assert not dgamma.any() and not layer.beta.list_grad()[i].asnumpy().any()
                    continue
                assert largest_error(ys[i].asnumpy(), want.y[i]) < 3e-6
                assert np.abs(xs[i].grad.asnumpy() - want.dx[i]).max() < 3e-6
                assert largest_error(dgamma, want.dgamma[i]) < 3e-6
            if want is not None:
                statistics = [0.9 * s + 0.1 * n for s, n in zip(statistics, (want.mean, want.var))]
            for p, s in zip((layer.running_mean, layer.running_var), statistics):
                first, second = (a.asnumpy() for a in p.list_data())
                assert first.tobytes() == second.tobytes()
                np.testing.assert_allclose(first, s, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hybridize", [None, {}])
@pytest.mark.parametrize("devices", [1, 2])
def test_one_value_per_channel_over_all_devices(hybridize, devices, two):
    """As in nn.BatchNorm, y is beta.  (With two devices, the second has no input.)"""
    results = []
    for make in (SyncBatchNorm, nn.BatchNorm):
        layer = make(in_channels=3, beta_initializer=mx.init.Constant(0.25))
        layer.initialize(ctx=two[:devices])
        if hybridize is not None:
            layer.hybridize(**hybridize)
        x = mx.nd.array([[1e3, -7.7, 0]])
        x.attach_grad()
        if make is SyncBatchNorm:
            model = ModelDataParallel(layer, two[:devices])
            with autograd.record():
                (y,) = model([x])
            parallel_backward([y])
        else:
            with autograd.record():
                y = layer(x)
            y.backward()
        mx.nd.waitall()
        np.testing.assert_array_equal(y.asnumpy(), 0.25)
        np.testing.assert_array_equal(layer.gamma.grad(two[0]).asnumpy(), 0)
        np.testing.assert_array_equal(layer.beta.grad(two[0]).asnumpy(), 1)
        results.append([x.grad, layer.running_mean.data(), layer.running_var.data()])
    for ours, theirs in zip(*results):
        np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), rtol=1e-6, atol=1e-4)


def test_export_and_import(tmp_path, rng):
    """A trained network's exported file gives the same outputs in a fresh process."""
    net = convolutional()
    net.initialize()
    net.hybridize()
    x = mx.nd.array(rng.randn(4, 3, 8, 8))
    for _ in range(3):
        with autograd.record():
            net(x)
    mx.nd.waitall()
    want = net(x).asnumpy()
    net.export(str(tmp_path / "net"))
    np.save(tmp_path / "x.npy", x.asnumpy())
    script = """
        import mxnet as mx, numpy as np, gluon_syncbn
        from mxnet import autograd
        net = mx.gluon.SymbolBlock.imports(
            "net-symbol.json", ["data"], "net-0000.params", ctx=[mx.cpu(0), mx.cpu(1)])
        x = mx.nd.array(np.load("x.npy"))
        np.save("y.npy", net(x).asnumpy())
        # and it trains, over as many devices as there are
        model = gluon_syncbn.ModelDataParallel(net, [mx.cpu(0), mx.cpu(1)])
        with autograd.record():
            outs = model([x[:3], x[3:].as_in_context(mx.cpu(1))])
        gluon_syncbn.parallel_backward(outs)
        np.save("trained.npy", mx.nd.concat(*[o.as_in_context(mx.cpu(0)) for o in outs], dim=0)
                .asnumpy())
    """
    fresh_process.run(textwrap.dedent(script), cwd=tmp_path, GLUON_SYNCBN_TIMEOUT="20")
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, rtol=1e-5, atol=1e-6)
    with autograd.train_mode():
        want = net(x).asnumpy()
    np.testing.assert_allclose(np.load(tmp_path / "trained.npy"), want, rtol=1e-4, atol=1e-5)


def test_exported_file_says_what_it_needs(tmp_path):
    """Without this package the file does not load, and the message names the operator."""
    net = convolutional()
    net.initialize()
    net.hybridize()
    net(mx.nd.ones((1, 3, 8, 8)))
    net.export(str(tmp_path / "net"))
    nodes = json.load(open(tmp_path / "net-symbol.json"))["nodes"]
    assert {n["op"] for n in nodes if "syncbn" in n["op"]} == {
        "_syncbn_moments",
        "_syncbn_sum",
        "_syncbn_normalize",
    }
    script = "import mxnet as mx; mx.sym.load('net-symbol.json')"
    done = fresh_process.run(script, cwd=tmp_path, status=1)
    assert "_syncbn_moments" in done.stderr


def test_uses_of_a_layer_in_a_graph_are_told_apart():
    """With static_shape MXNet may run them in any order."""
    net = Shared()
    nodes = json.loads(net(mx.sym.var("data")).tojson())["nodes"]
    uses = [n["attrs"] for n in nodes if n["op"] == "_syncbn_sum"]
    assert len({use["key"] for use in uses}) == 1
    assert len({use.get("call", "0") for use in uses}) == 2


def test_summary(capsys):
    net = convolutional()
    net.initialize()
    net.summary(mx.nd.ones((1, 3, 8, 8)))
    printed = capsys.readouterr().out
    assert "SyncBatchNorm" in printed and "Total params" in printed


def test_repr_shows_the_settings():
    text = repr(SyncBatchNorm(in_channels=4, num_devices=2, axis=-1))
    for part in ("SyncBatchNorm", "axis=-1", "num_devices=2", "in_channels=4"):
        assert part in text


def test_deferred_initialization_infers_the_channels():
    for axis, channels in ((1, 3), (-1, 5)):
        layer = SyncBatchNorm(axis=axis)
        layer.initialize()
        layer(mx.nd.ones((2, 3, 4, 5)))
        assert layer.gamma.shape == layer.running_var.shape == (channels,)


def test_float16_network_keeps_float32_parameters(rng):
    net = nn.HybridSequential()  # no convolution: MXNet has none for float16 on the CPU
    net.add(SyncBatchNorm(in_channels=3), nn.Activation("relu"), SyncBatchNorm(in_channels=3))
    net.initialize()
    net.hybridize()
    x = mx.nd.array(rng.randn(2, 3, 8, 8), dtype="float16")
    for dtype, parameters in (
        ("float16", "float32"),
        ("float64", "float64"),
        ("float32", "float32"),
    ):
        net.cast(dtype)
        with autograd.record():
            y = net(x.astype(dtype))
        y.backward()
        assert y.dtype == np.dtype(dtype)
        np.testing.assert_allclose(y.asnumpy().mean((0, 2, 3)), 0, atol=1e-2)
        for p in net.collect_params().values():
            assert np.dtype(p.dtype) == parameters, p.name


def test_every_layer_has_a_key_of_its_own():
    layers = [SyncBatchNorm(prefix="same_") for _ in range(3)]
    first = layers[0].key
    layers.append(copy.copy(layers[0]))
    keys = {layer.key for layer in layers}
    assert len(keys) == 4
    assert first == "same_" == layers[0].key
    del layers
    assert SyncBatchNorm(prefix="same_").key not in keys  # which may still be in use


def test_num_devices_is_one_without_gpus_and_data_parallel_model():
    layer = SyncBatchNorm()
    assert layer.num_devices is None
    layer.initialize()
    with autograd.record():
        y = layer(mx.nd.ones((2, 3)))
    y.wait_to_read()


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", True, np.int64(0)])
def test_num_devices_must_be_a_positive_integer(bad):
    with pytest.raises(ValueError, match="num_devices must be a positive integer"):
        SyncBatchNorm(num_devices=bad)
    assert SyncBatchNorm(num_devices=np.int64(2)).num_devices == 2


def test_explicit_num_devices_without_model_data_parallel(two, rng):
    """As in GluonCV: a plain Gluon loop over devices, each called in turn."""
    x = rng.randn(6, 3, 4, 4).astype("float32")
    layer = SyncBatchNorm(num_devices=2)
    layer.initialize(ctx=two)
    layer.hybridize()
    layer(mx.nd.array(x[:1], ctx=two[0]))
    with autograd.record():
        ys = [layer(part) for part in gluon.utils.split_and_load(mx.nd.array(x), two)]
    want = batch_norm([x], [x], np.ones(3), np.zeros(3)).y[0]
    assert largest_error(np.concatenate([y.asnumpy() for y in ys]), want) < 3e-6


def test_a_symbol_trains_in_module(two):
    """Exported, loaded as a symbol, trained by mx.mod.Module on two contexts from one thread."""
    batches = data_for(4, 8)
    net = convolutional(lambda: SyncBatchNorm(num_devices=2), widths=(8, 8))
    net.initialize(mx.init.Xavier())
    net(mx.nd.array(batches[0][0]))
    start = {k: p.data().copy() for k, p in net.collect_params().items()}
    symbol = mx.sym.SoftmaxOutput(net(mx.sym.var("data")), mx.sym.var("softmax_label"))
    module = mx.mod.Module(symbol, context=two)
    module.bind([("data", (8, 3, 10, 10))], [("softmax_label", (8,))])
    auxiliary = {k: v for k, v in start.items() if "running" in k}
    module.init_params(arg_params=start, aux_params=auxiliary, allow_missing=True)
    module.init_optimizer(optimizer_params={"learning_rate": 0.1})
    for data, label in batches:
        module.forward_backward(mx.io.DataBatch([mx.nd.array(data)], [mx.nd.array(label)]))
        module.update()
    mx.nd.waitall()  # an executor does not tell the engine that it writes statistics
    got, statistics = module.get_params()

    single = convolutional(lambda: SyncBatchNorm(num_devices=1), widths=(8, 8))
    single.initialize()
    for (_, p), value in zip(single.collect_params().items(), start.values()):
        p.shape = value.shape
        p.set_data(value)
    trainer = gluon.Trainer(single.collect_params(), "sgd", {"learning_rate": 0.1})
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    for data, label in batches:
        with autograd.record():
            value = loss(single(mx.nd.array(data)), mx.nd.array(label))
        value.backward()
        trainer.step(8)
    for (name, p), key in zip(single.collect_params().items(), start):
        theirs = statistics[key] if "running" in key else got[key]
        np.testing.assert_allclose(
            theirs.asnumpy(), p.data().asnumpy(), rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_training_is_the_same_imperatively_and_in_graphs():
    batches = data_for(4, 6)
    plain = train(convolutional, 1, batches)
    for hybridize in ({}, STATIC):
        graph = train(convolutional, 1, batches, hybridize)
        np.testing.assert_allclose(graph[0], plain[0], rtol=1e-5)
