"""Batch renormalization against a transcription of the paper's algorithm in NumPy."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import fresh_process
from gluon_syncbn import (
    ConversionError,
    ModelDataParallel,
    SyncBatchNorm,
    convert_sync_batchnorm,
    export_for_inference,
    parallel_backward,
    recalibrate,
    revert_batchnorm,
    sync_batch_norm,
)
from networks import MODES, STATIC, split
from reference import largest_error, rows, unrows

TOLERANCE = {"float16": 3e-3, "float32": 2e-5, "float64": 1e-11}
# None of them binds, each does, all do.
CLIPPING = [{}, {"rmin": 0.9}, {"rmax": 1.1}, {"dmax": 0.05}, {"rmin": 0.8, "rmax": 1.5, "dmax": 1}]


class Reference:
    """Algorithm 1 of https://arxiv.org/abs/1702.03275, over the whole batch, in float64."""

    def __init__(self, channels, clipping=None, momentum=0.9, renorm_momentum=0.99, epsilon=1e-5):
        self.gamma, self.beta = np.ones(channels), np.zeros(channels)
        self.moving_mean, self.moving_var = np.zeros(channels), np.ones(channels)
        self.mean, self.stddev = np.zeros(channels), np.ones(channels)
        self.clipping = clipping or {}
        self.momentum, self.renorm_momentum = momentum, renorm_momentum
        self.epsilon = epsilon

    def step(self, x, dy, axis=1):
        """Return y, dx, and the gradients of gamma and beta; update the averages."""
        flat, g = rows(x, axis), rows(dy, axis)
        mean, variance = flat.mean(0), flat.var(0)
        sigma = np.sqrt(variance + self.epsilon)
        r, d = sigma / self.stddev, (mean - self.mean) / self.stddev
        r = np.clip(r, self.clipping.get("rmin", 0), self.clipping.get("rmax", np.inf))
        limit = self.clipping.get("dmax", np.inf)
        d = np.clip(d, -limit, limit)
        hat = (flat - mean) / sigma
        corrected = hat * r + d
        # The paper's gradients, from the loss's with respect to y on.
        d_hat = g * self.gamma * r
        d_sigma = (d_hat * (flat - mean) * -(sigma**-2)).sum(0)
        d_mean = -d_hat.sum(0) / sigma
        n = len(flat)
        dx = d_hat / sigma + d_sigma * (flat - mean) / (n * sigma) + d_mean / n
        result = self.gamma * corrected + self.beta, dx, (g * corrected).sum(0), g.sum(0)
        for name, value, momentum in (
            ("mean", mean, self.renorm_momentum),
            ("stddev", sigma, self.renorm_momentum),
            ("moving_mean", mean, self.momentum),
            ("moving_var", variance, self.momentum),
        ):
            setattr(self, name, momentum * getattr(self, name) + (1 - momentum) * value)
        return unrows(result[0], x, axis), unrows(result[1], x, axis), *result[2:]

    def averages(self):
        return self.moving_mean, self.moving_var, self.mean, self.stddev


def initialized(layers, contexts, hybridize=None, dtype="float32"):
    net = nn.HybridSequential()
    net.add(*layers)
    net.cast(dtype)
    net.initialize(ctx=contexts)
    if hybridize is not None:
        net.hybridize(**hybridize)
    return net


def data(rng, step, shape=(6, 3, 2), dtype="float32"):
    """A batch whose mean and deviation change from step to step."""
    return (rng.randn(*shape) * (1 + step % 3) + step - 1).astype(dtype)


def run(model, contexts, xs):
    parts = [split(x, contexts) for x in xs]
    for part in (p for ps in parts for p in ps):
        part.attach_grad()
    with autograd.record():
        outs = [model(part) for part in parts]
    return parts, outs


def joined(arrays):
    return np.concatenate([a.asnumpy() for a in arrays])


def check_averages(layer, reference, contexts, tolerance):
    names = "running_mean", "running_var", "renorm_mean", "renorm_stddev"
    for name, wanted in zip(names, reference.averages()):
        for context in contexts:
            got = getattr(layer, name).data(context).asnumpy()
            assert largest_error(got, wanted) < tolerance, name


@pytest.mark.parametrize("hybridize", [None, {}, STATIC])
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("devices", [1, 2])
def test_several_steps(devices, dtype, clipping, hybridize, two, rng):
    contexts = two[:devices]
    layer = SyncBatchNorm(renorm=True, renorm_clipping=clipping, renorm_momentum=0.7, axis=-1)
    assert layer.renorm_clipping == clipping
    net = initialized([layer], contexts, hybridize, dtype)
    model = ModelDataParallel(net, contexts)
    reference = Reference(3, clipping, renorm_momentum=0.7)
    reference.gamma, reference.beta = np.array([0.5, 1, 2]), np.array([1.0, 0, -1])
    parameter = "float64" if dtype == "float64" else "float32"
    tolerance = TOLERANCE[dtype]
    for step in range(4):
        x, dy = (data(rng, step, (7, 2, 3), dtype) for _ in range(2))
        wanted = reference.step(x, dy, axis=-1)
        if step == 0:
            net(mx.nd.array(x, ctx=contexts[0], dtype=dtype))  # shapes
            layer.gamma.set_data(mx.nd.array(reference.gamma, dtype=parameter))
            layer.beta.set_data(mx.nd.array(reference.beta, dtype=parameter))
        parts, heads = (split(mx.nd.array(a, dtype=dtype), contexts) for a in (x, dy))
        for part in parts:
            part.attach_grad()
        with autograd.record():
            outs = model(parts)
        parallel_backward(outs, heads)
        assert largest_error(joined(outs), wanted[0]) < tolerance
        assert largest_error(joined([part.grad for part in parts]), wanted[1]) < 2 * tolerance
        for p, gradient in ((layer.gamma, wanted[2]), (layer.beta, wanted[3])):
            got = sum(p.grad(c).asnumpy().astype("float64") for c in contexts)
            assert largest_error(got, gradient) < 2 * tolerance
        check_averages(layer, reference, contexts, max(tolerance / 2, 1e-11))
    # Inference knows nothing of it.
    y = net(mx.nd.array(x, ctx=contexts[0], dtype=dtype)).asnumpy()
    hat = (x - reference.moving_mean) / np.sqrt(reference.moving_var + 1e-5)
    assert largest_error(y, hat * reference.gamma + reference.beta) < tolerance


@pytest.mark.parametrize("hybridize", [None, {}, {"static_alloc": True}])
@pytest.mark.parametrize("devices", [1, 2])
def test_backward_uses_the_correction_of_its_own_forward(devices, hybridize, two, rng):
    """Two forward passes, then both backward passes: the averages have moved in between."""
    contexts = two[:devices]
    net = initialized([SyncBatchNorm(renorm=True, renorm_momentum=0.5)], contexts, hybridize)
    model, reference = ModelDataParallel(net, contexts), Reference(3, renorm_momentum=0.5)
    xs = [data(rng, step) for step in (1, 5)]
    wanted = [reference.step(x, np.cos(x)) for x in xs]
    parts, outs = run(model, contexts, xs)
    heads = [split(np.cos(x), contexts) for x in xs]
    parallel_backward([list(pair) for pair in zip(*outs)], [list(pair) for pair in zip(*heads)])
    for own, want in zip(parts, wanted):
        assert largest_error(joined([p.grad for p in own]), want[1]) < 1e-4


def test_many_channels_in_a_large_map(two, rng):
    """One device works through blocks of channels, each with its part of everything."""
    channels, clipping = 32, {"rmax": 1.2, "dmax": 0.5}
    layer = SyncBatchNorm(renorm=True, renorm_clipping=clipping, num_devices=1)
    net = initialized([layer], two[0], dtype="float64")
    x = mx.nd.array(rng.randn(1, channels, 256, 256), dtype="float64")
    net(x)
    reference = Reference(channels, clipping)
    reference.mean, reference.stddev = rng.randn(channels), rng.rand(channels) + 0.5
    layer.renorm_mean.set_data(mx.nd.array(reference.mean, dtype="float64"))
    layer.renorm_stddev.set_data(mx.nd.array(reference.stddev, dtype="float64"))
    x.attach_grad()
    dy = mx.nd.cos(x)
    with autograd.record():
        y = net(x)
    y.backward(dy)
    wanted = reference.step(x.asnumpy(), dy.asnumpy())
    assert largest_error(y.asnumpy(), wanted[0]) < 1e-11
    assert largest_error(x.grad.asnumpy(), wanted[1]) < 1e-11
    assert largest_error(layer.gamma.grad().asnumpy(), wanted[2]) < 1e-11
    check_averages(layer, reference, two[:1], 1e-11)


@pytest.mark.parametrize("num_devices", [1, None])
def test_with_tight_limits_it_is_batch_normalization_bit_for_bit(num_devices, two, rng):
    tight = {"rmin": 1, "rmax": 1, "dmax": 0}
    contexts = two[:1] if num_devices == 1 else two
    results = []
    for options in ({}, {"renorm": True, "renorm_clipping": tight}):
        rng = np.random.RandomState(0)
        model = ModelDataParallel(
            initialized([SyncBatchNorm(num_devices=num_devices, **options)], contexts), contexts
        )
        for step in range(2):
            (parts,), (outs,) = run(model, contexts, [data(rng, step)])
            parallel_backward(outs, split(data(rng, 1), contexts))
        results.append(joined([*outs, *(p.grad for p in parts)]))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
def test_with_an_activation(devices, add, activation, two, rng):
    """The gradient's sign is that of the corrected result."""
    contexts = two[:devices]

    class Net(gluon.HybridBlock):
        def __init__(self, fused):
            super().__init__()
            options = {"activation": activation, "slope": 0.1} if fused else {}
            self.fused, self.norm = fused, SyncBatchNorm(renorm=True, **options)

        def hybrid_forward(self, F, x):
            residual = F.sin(x) if add else None
            if self.fused:
                return self.norm(x, add=residual)
            z = self.norm(x)
            z = z + residual if add else z
            return F.relu(z) if activation == "relu" else F.LeakyReLU(z, slope=0.1)

    results = []
    for fused in (False, True):
        rng = np.random.RandomState(0)
        net = Net(fused)
        net.initialize(ctx=contexts)
        model = ModelDataParallel(net, contexts)
        for step in range(3):
            (parts,), (outs,) = run(model, contexts, [data(rng, step)])
            parallel_backward(outs, split(data(rng, 1), contexts))
        gradients = sum(net.norm.gamma.grad(c).asnumpy() for c in contexts)
        results.append((joined(outs), joined([p.grad for p in parts]), gradients))
    for got, wanted in zip(*results):
        assert largest_error(got, wanted) < 1e-5


@pytest.mark.parametrize("hybridize", MODES)
@pytest.mark.parametrize("in_a_model", [False, True])
def test_limits_can_be_set_while_it_trains(in_a_model, hybridize, two, rng):
    contexts = two if in_a_model else two[:1]
    layer = SyncBatchNorm(renorm=True, renorm_clipping={"rmax": 1, "rmin": 1, "dmax": 0})
    net = initialized([nn.HybridSequential()], contexts, hybridize)
    net[0].add(layer)
    net.initialize(ctx=contexts)
    if hybridize is not None:
        net.hybridize(**hybridize)
    model = ModelDataParallel(net, contexts) if in_a_model else lambda xs: [net(*xs)]
    reference = Reference(3, layer.renorm_clipping)
    schedule = [None, {"rmax": 1.5, "dmax": 0.5}, None, {"dmax": 2}, {}]
    for step, clipping in enumerate(schedule):
        if clipping is not None:
            layer.renorm_clipping = reference.clipping = clipping
            assert layer.renorm_clipping == clipping
        x = data(rng, step)
        wanted = reference.step(x, np.cos(x))
        (parts,), (outs,) = run(model, contexts, [x])
        parallel_backward(outs, split(np.cos(x), contexts))
        assert largest_error(joined(outs), wanted[0]) < 1e-5
        assert largest_error(joined([p.grad for p in parts]), wanted[1]) < 1e-4


@pytest.mark.parametrize("num_devices", [1, None])
@pytest.mark.parametrize("hybridize", [None, {"static_alloc": True}])
def test_after_a_convolution(hybridize, num_devices, two, rng):
    """Whose maps are in a layout of MKL-DNN's."""
    contexts = two[:1] if num_devices == 1 else two
    layers = nn.Conv2D(16, 3, in_channels=3), SyncBatchNorm(renorm=True, num_devices=num_devices)
    net = initialized(layers, contexts, hybridize)
    model, reference = ModelDataParallel(net, contexts), Reference(16)
    for step in range(3):
        x = data(rng, step, (4, 3, 6, 6))
        maps = layers[0](mx.nd.array(x, ctx=contexts[0])).asnumpy()
        wanted = reference.step(maps, np.cos(maps))
        _, (outs,) = run(model, contexts, [x])
        parallel_backward(outs, split(np.cos(maps), contexts))
        assert largest_error(joined(outs), wanted[0]) < 1e-4
        gradient = sum(layers[1].gamma.grad(c).asnumpy() for c in contexts)
        assert largest_error(gradient, wanted[2]) < 1e-4
        check_averages(layers[1], reference, contexts, 1e-4)


@pytest.mark.parametrize("devices", [1, 2])
def test_weights_count_like_repetitions(devices, two, rng):
    contexts, weights = two[:devices], np.array([1, 2, 1, 0, 2, 1], "float32")
    layer = SyncBatchNorm(renorm=True, num_devices=devices)
    layer.initialize(ctx=contexts)
    model, reference = ModelDataParallel(layer, contexts), Reference(3)
    for step in range(3):
        x = data(rng, step, (6, 3))
        repeated = np.repeat(x, weights.astype(int), axis=0)
        reference.step(repeated, repeated)
        with autograd.record():
            model(split(x, contexts), split(weights, contexts))
        mx.nd.waitall()
    check_averages(layer, reference, contexts, 1e-5)


def test_a_device_without_input_gets_the_averages(two, rng):
    layer = SyncBatchNorm(renorm=True)
    model, reference = ModelDataParallel(initialized([layer], two), two), Reference(3)
    for step in range(2):
        x = data(rng, step)
        reference.step(x, np.cos(x))
        run(model, two[1:], [x])
    check_averages(layer, reference, two, 1e-5)


def test_groups(rng):
    four = [mx.cpu(i) for i in range(4)]
    layer = SyncBatchNorm(renorm=True, group_size=2)
    model = ModelDataParallel(initialized([layer], four), four)
    x = data(rng, 2, (8, 3))
    run(model, four, [x])
    for i in (0, 2):
        reference = Reference(3)
        reference.step(x[2 * i : 2 * i + 4], x[:4])
        check_averages(layer, reference, four[i : i + 2], 1e-5)


def trained(rng, *layers, contexts=None, steps=3):
    net = initialized(layers, contexts or mx.cpu(), {})
    for step in range(steps):
        x = data(rng, step, (6, 3, 4, 4))
        with autograd.record():
            for c in contexts or [mx.cpu()]:
                net(mx.nd.array(x, ctx=c))
    mx.nd.waitall()
    return net


@pytest.mark.parametrize("fold", [False, True])
def test_export_for_inference(fold, rng, tmp_path):
    net = trained(rng, nn.Conv2D(4, 3, in_channels=3), SyncBatchNorm(renorm=True))
    files = export_for_inference(net, str(tmp_path / "net"), fold=fold)
    text = (tmp_path / "net-symbol.json").read_text()
    assert ('"BatchNorm"' in text) != fold and "renorm" not in text and "syncbn" not in text
    plain = gluon.SymbolBlock.imports(files[0], ["data"], files[1])
    x = mx.nd.array(data(rng, 1, (2, 3, 4, 4)))
    np.testing.assert_allclose(plain(x).asnumpy(), net(x).asnumpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_devices", [1, None])
def test_an_exported_graph_trains_on(num_devices, two, rng, tmp_path):
    contexts = two[:1] if num_devices == 1 else two
    layer = SyncBatchNorm(
        renorm=True, renorm_clipping={"rmax": 1.5}, momentum=None, num_devices=num_devices
    )
    model = ModelDataParallel(initialized([layer], contexts, {}), contexts)
    run(model, contexts, [data(rng, 1)])
    model.net.export(str(tmp_path / "net"))
    files = [str(tmp_path / name) for name in ("net-symbol.json", "net-0000.params")]
    loaded = gluon.SymbolBlock.imports(files[0], ["data"], files[1], ctx=contexts)
    again = ModelDataParallel(loaded, contexts)
    assert recalibrate(again, [split(data(rng, 1), contexts)]) == 1
    loaded.load_parameters(files[1], ctx=contexts)
    for present in (contexts, contexts, contexts[-1:]):  # in the last step one device is idle
        x = data(rng, len(present))
        results = []
        for one in (model, again):
            (parts,), (outs,) = run(one, present, [x])
            parallel_backward(outs, split(np.cos(x), present))
            results.append(joined([*outs, *(p.grad for p in parts)]))
        np.testing.assert_array_equal(*results)
    for parameter in layer.statistics:
        for context in contexts:
            other = loaded.params[parameter.name].data(context).asnumpy()
            assert (other == parameter.data(contexts[0]).asnumpy()).all()
            np.testing.assert_array_equal(other, parameter.data(context).asnumpy())
    for net in (loaded, model):
        with pytest.raises(ConversionError, match="no batch renormalization"):
            revert_batchnorm(net)
    assert convert_sync_batchnorm(model).net[0] is layer  # synchronized already


def test_groups_and_renormalization_in_a_fresh_process(rng, tmp_path):
    four = [mx.cpu(i) for i in range(4)]
    options = {"renorm": True, "renorm_clipping": {"rmax": 1.5}, "group_size": 2}
    net = initialized([SyncBatchNorm(in_channels=3, **options)], four, {})
    net(mx.nd.ones((2, 3)))
    net.export(str(tmp_path / "net"))
    x = data(rng, 2, (8, 3))
    np.save(tmp_path / "x.npy", x)
    (_, (outs,)) = run(ModelDataParallel(net, four), four, [x])
    np.save(tmp_path / "y.npy", joined(outs))
    fresh_process.run(
        """
import sys, mxnet as mx, numpy as np
from gluon_syncbn import ModelDataParallel
folder = sys.argv[1]
four = [mx.cpu(i) for i in range(4)]
files = f"{folder}/net-symbol.json", f"{folder}/net-0000.params"
net = mx.gluon.SymbolBlock.imports(files[0], ["data"], files[1], ctx=four)
x = mx.gluon.utils.split_and_load(mx.nd.array(np.load(f"{folder}/x.npy")), four)
with mx.autograd.record():
    outs = ModelDataParallel(net, four)(x)
y = np.concatenate([out.asnumpy() for out in outs])
np.testing.assert_array_equal(y, np.load(f"{folder}/y.npy"))
with mx.autograd.record():
    try:
        net(x[0])
    except RuntimeError as error:
        assert "group_size=2" in str(error)
    else:
        raise AssertionError
""",
        tmp_path,
    )


def test_module_initializes_the_averages(rng):
    sym = SyncBatchNorm(renorm=True, renorm_clipping={"dmax": 9}, prefix="norm_")(mx.sym.var("x"))
    states = ["norm_running_mean", "norm_running_var", "norm_renorm_mean", "norm_renorm_stddev"]
    assert sym.list_auxiliary_states() == states
    assert sym.list_outputs() == ["norm_fwd_output"]
    module = mx.mod.Module(sym, ["x"], None)
    module.bind([("x", (6, 3))])
    module.init_params(mx.init.Xavier())
    x = data(rng, 1, (6, 3))
    module.forward(mx.io.DataBatch([mx.nd.array(x)]), is_train=True)
    wanted = Reference(3).step(x, x)[0]
    assert largest_error(module.get_outputs()[0].asnumpy(), wanted) < 1e-5


def test_parameters_are_saved_and_deferred(rng, tmp_path):
    net = trained(rng, SyncBatchNorm(renorm=True))
    path = str(tmp_path / "net.params")
    net.save_parameters(path)
    other = initialized([SyncBatchNorm(renorm=True)], mx.cpu())
    other.load_parameters(path)
    assert (net[0].renorm_mean.data().asnumpy() != 0).all()
    for a, b in zip(net[0].statistics, other[0].statistics):
        np.testing.assert_array_equal(a.data().asnumpy(), b.data().asnumpy())
    plain = initialized([nn.BatchNorm()], mx.cpu())
    plain.load_parameters(path, ignore_extra=True)


def test_recalibration_leaves_the_averages_alone(rng):
    net = trained(rng, SyncBatchNorm(renorm=True))
    before = net[0].renorm_mean.data().asnumpy(), net[0].renorm_stddev.data().asnumpy()
    x = data(rng, 3, (6, 3, 4, 4))
    recalibrate(net, [mx.nd.array(x)])
    np.testing.assert_allclose(net[0].running_mean.data().asnumpy(), x.mean((0, 2, 3)), rtol=1e-4)
    np.testing.assert_array_equal(net[0].renorm_mean.data().asnumpy(), before[0])
    np.testing.assert_array_equal(net[0].renorm_stddev.data().asnumpy(), before[1])


def test_the_function_with_tensorflows_arguments(rng):
    params = gluon.ParameterDict()
    reference = Reference(3, {"dmax": 0.5}, 0.999, 0.8, 1e-3)
    for step in range(3):
        x = data(rng, step, (6, 3))
        y = sync_batch_norm(
            mx.nd.array(x),
            scope="bn",
            reuse=step > 0,
            params=params,
            renorm=True,
            renorm_clipping={"dmax": 0.5},
            renorm_decay=0.8,
        )
        assert largest_error(y.asnumpy(), reference.step(x, np.cos(x))[0]) < 1e-5


def test_in_inference_with_gradients_there_is_no_correction(rng):
    layer = SyncBatchNorm(renorm=True, in_channels=3)
    plain = SyncBatchNorm(in_channels=3)
    gradients = []
    for net in (layer, plain):
        net.initialize()
        net.running_mean.set_data(mx.nd.array([1, 2, 3]))
        x = mx.nd.ones((2, 3))
        x.attach_grad()
        with autograd.record(train_mode=False):
            y = net(x)
        y.backward()
        gradients.append((y.asnumpy(), x.grad.asnumpy(), net.gamma.grad().asnumpy()))
    for got, wanted in zip(*gradients):
        np.testing.assert_array_equal(got, wanted)


def test_infinity_is_no_limit():
    layer = SyncBatchNorm(renorm=True, renorm_clipping={"rmax": float("inf"), "dmax": 2})
    assert layer.renorm_clipping == {"dmax": 2}


def test_errors():
    for wrong, match in (
        ({"r_max": 1}, "renorm_clipping has 'r_max'; its keys are 'rmin', 'rmax', 'dmax'"),
        ({"rmax": -1}, "rmax must be a finite number, 0 or greater, but is -1"),
        ({"dmax": float("nan")}, "dmax must be a finite number, 0 or greater, but is nan"),
        ({"dmax": "much"}, "dmax must be a finite number, 0 or greater, but is 'much'"),
        ("rmax", "renorm_clipping must be a dict or None, but is 'rmax'"),
        ({"rmin": 2, "rmax": 1}, "rmin must not be above rmax"),
    ):
        with pytest.raises(ValueError, match=match):
            SyncBatchNorm(renorm=True, renorm_clipping=wrong)
        layer = SyncBatchNorm(renorm=True, renorm_clipping={"rmax": 3, "rmin": None})
        with pytest.raises(ValueError, match=match):
            layer.renorm_clipping = wrong
        assert layer.renorm_clipping == {"rmax": 3}
    with pytest.raises(ValueError, match="renorm_clipping is given without renorm=True"):
        SyncBatchNorm(renorm_clipping={"rmax": 1})
    with pytest.raises(ValueError, match="norm was made without renorm=True"):
        SyncBatchNorm(prefix="norm_").renorm_clipping = {"rmax": 1}
    with pytest.raises(ValueError, match="renorm_momentum must lie from 0 to 1, but is 2"):
        SyncBatchNorm(renorm=True, renorm_momentum=2)
    for other in ({"use_global_stats": True}, {"track_running_stats": False}):
        with pytest.raises(ValueError, match="renorm=True corrects the batch's statistics"):
            SyncBatchNorm(renorm=True, **other)
    with pytest.raises(ConversionError, match="no batch renormalization; make the network without"):
        revert_batchnorm(SyncBatchNorm(renorm=True))
