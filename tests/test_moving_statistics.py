"""Moving statistics as an average (momentum=None), and none (track_running_stats=False)."""

import functools
import json

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluon_syncbn as sbn
from gluon_syncbn import ConversionError, ModelDataParallel, SyncBatchNorm
from networks import MODES, assert_same_training, convolutional, data_for, train
from reference import batch_norm, largest_error, rows

TOLERANCE = {"float16": 1e-6, "float32": 1e-6, "float64": 1e-12}

averaging = functools.partial(SyncBatchNorm, momentum=None)


def initialized(layer, hybridize=None, ctx=None):
    layer.initialize(ctx=ctx)
    if hybridize is not None:
        layer.hybridize(**hybridize)
    return layer


def train_on(layer, x):
    with autograd.record():
        y = layer(x)
    y.backward()
    mx.nd.waitall()


def numbers(layer):
    """Moving mean, moving variance and the number of batches, on every device."""
    return [[a.asnumpy() for a in p.list_data()] for p in layer.statistics]


class Batches:
    """What the average over some batches should be."""

    def __init__(self):
        self.means, self.variances = [], []

    def add(self, *xs):
        flat = np.concatenate([rows(x.asnumpy(), 1) for x in xs])
        self.means.append(flat.mean(0))
        self.variances.append(flat.var(0))

    def check(self, layer, tolerance=1e-6):
        means, variances, counts = numbers(layer)
        for mean, variance, count in zip(means, variances, counts):
            np.testing.assert_allclose(mean, np.mean(self.means, 0), atol=tolerance)
            np.testing.assert_allclose(variance, np.mean(self.variances, 0), rtol=tolerance)
            assert count.tolist() == [len(self.means)]


@pytest.mark.parametrize("hybridize", MODES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_devices", [None, 1])
def test_average_over_all_batches(hybridize, dtype, num_devices, rng):
    layer = SyncBatchNorm(momentum=None, num_devices=num_devices)
    layer.cast(dtype)
    initialized(layer, hybridize)
    x = mx.nd.array(rng.randn(4, 3, 5), dtype=dtype)
    # Before the first batch there are the initial statistics.
    np.testing.assert_allclose(layer(x).asnumpy(), x.asnumpy(), rtol=2e-3)
    batches = Batches()
    for step in range(1, 6):
        x = mx.nd.array(step * rng.randn(3 + step, 3, 5) + step, dtype=dtype)
        train_on(layer, x)
        layer(x).wait_to_read()  # inference counts nothing
        batches.add(x)
        batches.check(layer, TOLERANCE[dtype])
    mean, variance, _ = (values[0] for values in numbers(layer))
    want = (x.asnumpy() - mean[:, None]) / np.sqrt(variance[:, None] + 1e-5)
    np.testing.assert_allclose(layer(x).asnumpy(), want, atol=5e-3 if dtype == "float16" else 1e-5)


def test_a_batch_counts_once_however_it_is_cut():
    """On the CPU a large map is normalized a few channels at a time."""
    layer = initialized(averaging(num_devices=1))
    batches = Batches()
    for _ in range(2):
        x = mx.nd.random.normal(shape=(4, 64, 136, 136))  # 18 MiB: no cache holds it
        batches.add(x)
        train_on(layer, x)
    batches.check(layer, 1e-5)


@pytest.mark.parametrize("hybridize", MODES)
def test_several_devices(hybridize):
    """The extra run of a first call is not counted; idle devices get the others' number."""
    batches = data_for(4, [6, 5, 1, 4])
    make = functools.partial(convolutional, averaging)
    got = train(make, 2, batches, hybridize)
    assert_same_training(got, train(make, 1, batches))
    counts = [arrays for name, arrays in got[1].items() if name.endswith("num_batches_tracked")]
    assert len(counts) == 4
    assert {count.item() for arrays in counts for count in arrays} == {4}


def test_a_layer_that_is_used_twice_counts_both(rng):
    layer = initialized(averaging())
    batches = Batches()
    xs = [mx.nd.array(rng.randn(4, 3)) for _ in range(2)]
    with autograd.record():
        y = layer(xs[0]) + layer(xs[1])
    y.backward()
    for x in xs:
        batches.add(x)
    batches.check(layer)


def test_use_global_stats_counts_nothing(rng):
    layer = initialized(averaging(use_global_stats=True))
    train_on(layer, mx.nd.array(rng.randn(4, 3)))
    mean, variance, count = (values[0].tolist() for values in numbers(layer))
    assert (mean, variance, count) == ([0, 0, 0], [1, 1, 1], [0])


def test_statistics_of_numpy_arrays(rng):
    mx.npx.set_np()
    try:
        layer, batches = initialized(averaging(), {}), Batches()
        for _ in range(2):
            x = mx.np.array(rng.randn(4, 3), dtype="float32")
            batches.add(x)
            train_on(layer, x)
        batches.check(layer)
    finally:
        mx.npx.reset_np()


def test_checkpoints(tmp_path, rng):
    """Ordinary layers have the parameters of nn.BatchNorm; the average goes on where it was."""
    ordinary, layer = SyncBatchNorm(), initialized(averaging())
    assert set(ordinary._collect_params_with_prefix()) == {
        *("gamma", "beta", "running_mean", "running_var"),
    }
    assert ordinary.num_batches_tracked is None
    assert ordinary.statistics == (ordinary.running_mean, ordinary.running_var)
    batches = Batches()
    for _ in range(2):
        x = mx.nd.array(rng.randn(4, 3))
        batches.add(x)
        train_on(layer, x)
        layer.save_parameters(str(tmp_path / "layer.params"))
        layer = averaging()
        layer.load_parameters(str(tmp_path / "layer.params"))
        batches.check(layer)
    plain = nn.BatchNorm()
    plain.load_parameters(str(tmp_path / "layer.params"), ignore_extra=True)
    np.testing.assert_allclose(plain(x).asnumpy(), layer(x).asnumpy(), atol=1e-5)


@pytest.mark.parametrize("num_devices", [None, 1])
def test_export_and_import(num_devices, two, tmp_path, rng):
    """A loaded graph goes on averaging, and keeps the number equal on all devices."""
    layer, batches = initialized(averaging(num_devices=num_devices), {}), Batches()
    x = mx.nd.array(rng.randn(4, 3))
    batches.add(x)
    train_on(layer, x)
    layer.export(str(tmp_path / "layer"))
    files = str(tmp_path / "layer-symbol.json"), str(tmp_path / "layer-0000.params")
    contexts = two if num_devices is None else two[:1]
    loaded = gluon.SymbolBlock.imports(files[0], ["data"], files[1], ctx=contexts)
    np.testing.assert_array_equal(loaded(x).asnumpy(), layer(x).asnumpy())
    names = [f"{layer.prefix}{name}" for name in ("running_mean", "running_var")]
    loaded.statistics = [
        loaded.params[name] for name in (*names, f"{layer.prefix}num_batches_tracked")
    ]
    model = ModelDataParallel(loaded, contexts)
    for size in (3, 2):
        xs = [mx.nd.array(rng.randn(size, 3), ctx=c) for c in contexts]
        xs = xs[: size - 1]  # the second time, a device stays away
        batches.add(*xs)
        with autograd.record():
            outs = model(xs)
        sbn.parallel_backward(outs)
    mx.nd.waitall()
    batches.check(loaded)


def test_graphs_of_ordinary_layers_are_what_they_were(tmp_path):
    """Files load in versions without these options, and the other way round."""
    for num_devices in (None, 1):
        y = SyncBatchNorm(num_devices=num_devices, prefix="norm_")(mx.sym.var("data"))
        nodes = json.loads(y.tojson())["nodes"]
        attrs = {key for n in nodes if n["op"] != "null" for key in n["attrs"]}
        assert attrs <= {
            *("axis", "eps", "momentum", "fix_gamma", "use_global_stats"),
            *("key", "num_devices", "call"),
        }
        assert y.list_auxiliary_states() == ["norm_running_mean", "norm_running_var"]


@pytest.mark.parametrize("contexts", [1, 2])
def test_module(contexts, rng):
    """A symbol of the layer has the initial value of its number of batches."""
    contexts = [mx.cpu(i) for i in range(contexts)]
    layer = SyncBatchNorm(momentum=None, num_devices=len(contexts), prefix="norm_")
    module = mx.mod.Module(
        mx.sym.SoftmaxOutput(layer(mx.sym.var("data")), name="softmax"), context=contexts
    )
    module.bind([("data", (8, 3))], [("softmax_label", (8,))])
    module.init_params(mx.init.Xavier())
    module.init_optimizer()
    batches = Batches()
    for _ in range(3):
        x = mx.nd.array(rng.randn(8, 3))
        batches.add(x)
        module.forward(mx.io.DataBatch([x], [mx.nd.zeros(8)]), is_train=True)
        module.backward()
        module.update()
    mx.nd.waitall()
    _, states = module.get_params()
    np.testing.assert_allclose(
        states["norm_running_mean"].asnumpy(), np.mean(batches.means, 0), atol=1e-6
    )
    assert states["norm_num_batches_tracked"].asnumpy().tolist() == [3]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("num_devices", [None, 1])
def test_export_for_inference(fold, num_devices, tmp_path, rng):
    net = nn.HybridSequential()
    net.add(nn.Dense(4), averaging(num_devices=num_devices), averaging(num_devices=num_devices))
    initialized(net, {})
    x = mx.nd.array(rng.randn(5, 3))
    train_on(net, x)
    files = sbn.export_for_inference(net, str(tmp_path / "net"), fold=fold)
    with open(files[0]) as file:
        text = file.read()
    assert "syncbn" not in text and "num_batches_tracked" not in text
    assert not any("num_batches" in name for name in mx.nd.load(files[1]))
    loaded = gluon.SymbolBlock.imports(files[0], ["data"], files[1])
    np.testing.assert_allclose(loaded(x).asnumpy(), net(x).asnumpy(), atol=1e-5)


@pytest.mark.parametrize("num_devices", [None, 1])
def test_it_has_no_plain_form(num_devices, tmp_path, rng):
    net = nn.HybridSequential()
    net.add(SyncBatchNorm(), averaging(num_devices=num_devices))
    with pytest.raises(ConversionError, match="batchnorm.*momentum=None.*load"):
        sbn.revert_batchnorm(net)
    assert type(net[0]) is SyncBatchNorm
    initialized(net, {})
    net(mx.nd.array(rng.randn(4, 3)))
    with pytest.raises(ConversionError, match="momentum=None.*export_for_inference"):
        sbn.revert_batchnorm(net(mx.sym.var("data")))
    net.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), str(tmp_path / "net-0000.params")
    loaded = gluon.SymbolBlock.imports(files[0], ["data"], files[1])
    with pytest.raises(ConversionError, match="momentum=None"):
        sbn.revert_batchnorm(loaded)


# track_running_stats=False

untracked = functools.partial(SyncBatchNorm, track_running_stats=False)


def gradients(call, xs, dys, train_mode):
    """Outputs and gradients of a layer on the shares of a batch."""
    for x in xs:
        x.attach_grad()
    with autograd.record(train_mode=train_mode):
        ys = call(xs)
    sbn.parallel_backward(ys, dys, train_mode=train_mode)
    return [y.asnumpy() for y in ys], [x.grad.asnumpy() for x in xs]


def check_gradients(got, xs, dys, tolerance):
    channels = xs[0].shape[1]
    arrays = [[a.asnumpy() for a in part] for part in (xs, dys)]
    want = batch_norm(*arrays, np.ones(channels), np.zeros(channels))
    for y, dx, want_y, want_dx in zip(*got, want.y, want.dx):
        assert largest_error(y, want_y) < tolerance
        assert largest_error(dx, want_dx) < tolerance


@pytest.mark.parametrize("hybridize", MODES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_devices", [7, 1])
def test_inference_by_the_batch(hybridize, dtype, num_devices, rng):
    """With its gradient; the layer waits for seven devices in training only."""
    layer = untracked(num_devices=num_devices)
    layer.cast(dtype)
    initialized(layer, hybridize)
    x, dy = (mx.nd.array(rng.randn(4, 3, 5) + 2, dtype=dtype) for _ in range(2))
    got = gradients(lambda xs: [layer(xs[0])], [x], [dy], train_mode=False)
    tolerance = {"float16": 2e-3, "float32": 3e-6, "float64": 1e-11}[dtype]
    check_gradients(got, [x], [dy], tolerance)
    np.testing.assert_array_equal(layer(x).asnumpy(), got[0][0])


@pytest.mark.parametrize("hybridize", MODES)
@pytest.mark.parametrize("momentum", [0.9, None])
def test_nothing_is_moved(hybridize, momentum, rng):
    layer = untracked(momentum=momentum)
    initialized(layer, hybridize)
    for x in (rng.randn(4, 3), np.full((4, 3), np.nan)):
        train_on(layer, mx.nd.array(x))
        layer(mx.nd.array(x)).wait_to_read()
    mean, variance = (values[0].tolist() for values in numbers(layer))
    assert (mean, variance) == ([0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize("hybridize", MODES)
def test_training_is_synchronized_and_inference_is_not(hybridize, two, rng):
    layer = initialized(untracked(), hybridize, ctx=two)
    model = ModelDataParallel(layer, two)
    xs, dys = (
        [mx.nd.array((i + 1) * rng.randn(3 + i, 3) + i, ctx=two[i]) for i in range(2)]
        for _ in range(2)
    )
    for _ in range(2):
        check_gradients(gradients(model, xs, dys, train_mode=True), xs, dys, 3e-6)
        ys, dxs = gradients(model, xs, dys, train_mode=False)
        for i in range(2):
            got = [ys[i]], [dxs[i]]
            check_gradients(got, [xs[i]], [dys[i]], 3e-6)
        for y, x in zip(model(xs), xs):
            y.wait_to_read()
            flat = rows(x.asnumpy(), 1)
            want = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
            assert largest_error(y.asnumpy(), want) < 3e-6


def test_untracked_checkpoints_are_those_of_other_layers(tmp_path):
    layers = [nn.BatchNorm(in_channels=3), untracked(in_channels=3), untracked(3, momentum=None)]
    for layer in layers:
        layer.initialize()
    for layer in layers:
        layer.save_parameters(str(tmp_path / "layer.params"))
        for other in layers:
            other.load_parameters(str(tmp_path / "layer.params"))


@pytest.mark.parametrize("num_devices", [None, 1])
def test_export_of_untracked_layers(num_devices, two, tmp_path, rng):
    """Plain export keeps what they do; there is no plain BatchNorm that does it."""
    net = nn.HybridSequential()
    net.add(SyncBatchNorm(), untracked(num_devices=num_devices))
    initialized(net, {})
    x = mx.nd.array(rng.randn(6, 3))
    want = net(x).asnumpy()
    net.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), str(tmp_path / "net-0000.params")
    loaded = gluon.SymbolBlock.imports(files[0], ["data"], files[1], ctx=two)
    np.testing.assert_allclose(loaded(x).asnumpy(), want, atol=1e-6)
    why = "batchnorm.*track_running_stats=False.*use net.export"
    for refuses in (
        lambda: sbn.revert_batchnorm(net),
        lambda: sbn.revert_batchnorm(loaded),
        lambda: sbn.revert_batchnorm(net(mx.sym.var("data"))),
        lambda: sbn.export_for_inference(net, str(tmp_path / "plain")),
    ):
        with pytest.raises(ConversionError, match=why):
            refuses()
    assert type(net[0]) is SyncBatchNorm
    assert not list(tmp_path.glob("plain*"))


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match="use_global_stats=True.*leave one of them out"):
        untracked(use_global_stats=True)


def test_conversion_there_and_back():
    """A layer that was nn.BatchNorm has the options' defaults, and loses them again."""
    layer = nn.BatchNorm(in_channels=3)
    before = repr(layer)
    sbn.convert_sync_batchnorm(layer)
    assert layer.track_running_stats and layer.num_batches_tracked is None
    assert repr(sbn.revert_batchnorm(layer)) == before
