"""MABN2d: against a transcription in NumPy, across its switches, and as a part of Gluon."""

import copy
import functools

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import fresh_process
from gluon_syncbn import CenConv2d, MABN2d, ModelDataParallel, parallel_backward
from moving_average_reference import MovingAverage
from networks import MODES, STATIC, assert_same_training, data_for, train
from reference import largest_error

CONTEXTS = [mx.cpu(0), mx.cpu(1)]
TOLERANCE = {"float16": 3e-3, "float32": 2e-5, "float64": 1e-11}


def check_states(layer, reference, tolerance=1e-5, context=None):
    for name, wanted in reference.states.items():
        got = getattr(layer, name).data(context).asnumpy()
        assert largest_error(got, wanted) < tolerance, name


class Training:
    """A layer and its reference, which take the same steps."""

    def __init__(self, layer, contexts=CONTEXTS[:1], hybridize=None, dtype="float32", seed=0):
        self.layer, self.contexts, self.dtype = layer, list(contexts), dtype
        self.rng = np.random.RandomState(seed)
        settings = layer._settings
        self.reference = MovingAverage(
            layer.gamma.shape[0],
            layer.buffer_size,
            settings["momentum"],
            settings["epsilon"],
            settings["warmup_iters"],
        )
        layer.cast(dtype)
        layer.initialize(ctx=self.contexts)
        self.gamma, self.beta = (self.rng.rand(2, layer.gamma.shape[0]) + 0.5).astype("float32")
        layer.gamma.set_data(mx.nd.array(self.gamma))
        layer.beta.set_data(mx.nd.array(self.beta))
        if hybridize is not None:
            layer.hybridize(**hybridize)
        self.model = ModelDataParallel(layer, self.contexts)

    def shards(self, sizes, scale=1.0, offset=0.0):
        channels = len(self.gamma)
        shards = [self.rng.randn(n, channels, 2, 3) * scale + offset for n in sizes]
        # What the layer gets.
        return [shard.astype(self.dtype).astype("float64") for shard in shards]

    def arrays(self, shards):
        return [mx.nd.array(s, ctx=c, dtype=self.dtype) for s, c in zip(shards, self.contexts)]

    def step(self, sizes=(2,), scale=1.0, check=True):
        """Take a step; compare the output and the gradients."""
        x, dy = self.shards(sizes, scale, offset=0.3), self.shards(sizes)
        inputs = self.arrays(x)
        for array in inputs:
            array.attach_grad()
        with autograd.record():
            outputs = self.model(inputs)
        parallel_backward(outputs, self.arrays(dy))
        wanted, saved = self.reference.forward(np.concatenate(x), self.gamma, self.beta)
        dx, dgamma, dbeta = self.reference.backward(np.concatenate(dy), saved)
        if not check:
            return
        got = {
            "y": (np.concatenate([y.asnumpy() for y in outputs]), wanted),
            "dx": (np.concatenate([a.grad.asnumpy() for a in inputs]), dx),
            "dgamma": (sum(self.layer.gamma.grad(c).asnumpy() for c in self.contexts), dgamma),
            "dbeta": (sum(self.layer.beta.grad(c).asnumpy() for c in self.contexts), dbeta),
        }
        for name, (have, want) in got.items():
            error = largest_error(have, want)
            assert error < TOLERANCE[self.dtype], (self.reference.iters, name, error)

    def check(self):
        mx.nd.waitall()
        for context in self.contexts:
            check_states(self.layer, self.reference, TOLERANCE[self.dtype], context)
        x = self.shards([2])
        wanted = self.reference.inference(x[0], self.gamma, self.beta)
        got = self.layer(*self.arrays(x)).asnumpy()
        assert largest_error(got, wanted) < TOLERANCE[self.dtype]


make = functools.partial(MABN2d, 3, 2, 8)


def test_1200_iterations_across_both_switches():
    """Averages begin after 100 iterations, and r after 1000."""
    training = Training(make(momentum=0.9), hybridize=STATIC, dtype="float64")
    scales = []  # r, which is fixed, free or at either limit
    for i in range(1200):
        # The scale changes slowly and in jumps, so that r takes all of its range.
        scale = 1 + 0.5 * np.sin(i / 30) if i % 100 < 80 else 12.0
        training.step(scale=scale)
        scales.append(training.reference.r)
    assert (np.array(scales[:1000]) == 1).all() and (scales[1000] != 1).any()
    assert {np.min(scales), np.max(scales)} == {1 / 5, 5}
    assert np.mean([(r > 1 / 5) & (r < 5) & (r != 1) for r in scales[1000:]]) > 0.2
    assert training.reference.iters == 1200
    training.check()


@pytest.mark.parametrize("hybridize", MODES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_modes_and_types(hybridize, dtype):
    training = Training(make(warmup_iters=6), hybridize=hybridize, dtype=dtype)
    training.layer.iters.set_data(mx.nd.array([0]))
    for step in range(12):
        training.step([1 + step % 3])
    training.check()
    kind = "float64" if dtype == "float64" else "float32"
    assert {np.dtype(p.dtype).name for p in training.layer.collect_params().values()} == {kind}


@pytest.mark.parametrize("hybridize", MODES)
def test_synchronized_with_uneven_shards_and_idle_devices(hybridize):
    """The states are the same on all devices, also on those that had no input."""
    training = Training(make(num_devices=None, warmup_iters=0), CONTEXTS, hybridize)
    for sizes in ([2, 3], [1, 1], [2], [3, 1], [2], [4], [2, 2], [1, 2], [3, 3], [2], [1]):
        training.step(sizes)
    training.check()
    for parameter in training.layer.collect_params().values():
        assert len({a.asnumpy().tobytes() for a in parameter.list_data()}) == 1, parameter.name


@pytest.mark.parametrize("hybridize", MODES)
def test_each_device_by_itself(hybridize):
    layer = make(warmup_iters=0)
    layer.initialize(ctx=CONTEXTS)
    if hybridize is not None:
        layer.hybridize(**hybridize)
    model = ModelDataParallel(layer, CONTEXTS)
    references = [MovingAverage(3, 4, warmup_iters=0) for _ in CONTEXTS]
    rng = np.random.RandomState(0)
    gamma, beta = np.ones(3), np.zeros(3)
    for _ in range(9):
        xs, dys = rng.randn(2, 2, 2, 3, 2, 2)
        inputs = [mx.nd.array(x, ctx=c) for x, c in zip(xs, CONTEXTS)]
        for array in inputs:
            array.attach_grad()
        with autograd.record():
            outputs = model(inputs)
        parallel_backward(outputs, [mx.nd.array(dy, ctx=c) for dy, c in zip(dys, CONTEXTS)])
        for x, dy, array, y, reference in zip(xs, dys, inputs, outputs, references):
            wanted, saved = reference.forward(x, gamma, beta)
            assert largest_error(y.asnumpy(), wanted) < 2e-5
            assert largest_error(array.grad.asnumpy(), reference.backward(dy, saved)[0]) < 2e-5
    mx.nd.waitall()
    for context, reference in zip(CONTEXTS, references):
        check_states(layer, reference, context=context)


def test_inference_is_a_scale_and_a_shift(rng):
    """Of which gradients are taken as well."""
    for hybridize in (None, {}):
        layer = make()
        layer.initialize()
        if hybridize is not None:
            layer.hybridize(**hybridize)
        layer.gamma.set_data(mx.nd.array([1, 2, 3]))
        layer.running_var.set_data(mx.nd.array([4, 1, 0.25]))
        x, dy = mx.nd.array(rng.randn(2, 3, 2, 2)), mx.nd.array(rng.randn(2, 3, 2, 2))
        x.attach_grad()
        with autograd.record(train_mode=False):
            y = layer(x)
        y.backward(dy, train_mode=False)
        scale = np.array([0.5, 2, 6]).reshape(3, 1, 1)
        np.testing.assert_allclose(y.asnumpy(), scale * x.asnumpy(), rtol=1e-4)
        np.testing.assert_allclose(x.grad.asnumpy(), scale * dy.asnumpy(), rtol=1e-4)
        dgamma = (dy * x).asnumpy().sum((0, 2, 3)) * scale.ravel() / [1, 2, 3]
        np.testing.assert_allclose(layer.gamma.grad().asnumpy(), dgamma, rtol=1e-4)
        mx.nd.waitall()
        assert layer.iters.data().asscalar() == 0
        assert not layer.buffer_x2.data().asnumpy().any()
        assert not layer.buffer_gz.data().asnumpy().any()


@pytest.mark.parametrize("hybridize", MODES[:3])
def test_forwards_in_a_row_have_slots_of_their_own(hybridize):
    """Two forwards, then their backwards: each writes the slot of its own iteration."""
    training = Training(make(warmup_iters=0), hybridize=hybridize)
    layer, reference = training.layer, training.reference
    for _ in range(5):
        (x1,), (x2,), (dy1,), (dy2,) = (training.shards([2]) for _ in range(4))
        inputs = training.arrays([x1]) + [mx.nd.array(x2, dtype=training.dtype)]
        for array in inputs:
            array.attach_grad()
        with autograd.record():
            y1, y2 = layer(inputs[0]), layer(inputs[1])
        saved = [reference.forward(x, training.gamma, training.beta)[1] for x in (x1, x2)]
        autograd.backward([y1, y2], [mx.nd.array(dy1), mx.nd.array(dy2)])
        for array, dy, one in zip(inputs, (dy1, dy2), saved):
            wanted = reference.backward(dy, one)[0]
            assert largest_error(array.grad.asnumpy(), wanted) < 2e-5
    training.check()


def test_a_gradient_that_overflows_costs_one_step():
    training = Training(make(warmup_iters=0))
    for _ in range(6):
        training.step()
    x = training.arrays(training.shards([2]))[0]
    x.attach_grad()
    with autograd.record():
        y = training.layer(x)
    y.backward(mx.nd.full(y.shape, np.inf))
    assert not np.isfinite(x.grad.asnumpy()).all()
    assert np.isfinite(training.layer.buffer_gz.data().asnumpy()).all()
    with autograd.record():
        y = training.layer(x)
    y.backward(mx.nd.ones(y.shape))
    assert np.isfinite(x.grad.asnumpy()).all()


@pytest.mark.parametrize("size", [4, 3, 1])
def test_the_number_of_iterations_has_no_end(size):
    """In float32, counting by one ends at 2**24."""
    layer = MABN2d(3, 2, 2 * size)
    layer.initialize()
    cycle = 2**22 // size * size
    layer.iters.set_data(mx.nd.array([2 * cycle - 2]))
    numbers = []
    for _ in range(3):
        with autograd.train_mode():
            layer(mx.nd.ones((2, 3, 2, 2))).wait_to_read()
        mx.nd.waitall()
        numbers.append(int(layer.iters.data().asscalar()))
    assert numbers == [2 * cycle - 1, cycle, cycle + 1]
    assert {n % size for n in numbers} == {(2 * cycle + i) % size for i in (-1, 0, 1)}


def network(**options):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        for width in (6, 4):
            norm = MABN2d(0, 2, 6, warmup_iters=0, **options)
            net.add(CenConv2d(width, 3, use_bias=False), norm, nn.Activation("softrelu"))
        net.add(nn.GlobalAvgPool2D(), nn.Dense(5))
    return net


@pytest.mark.parametrize("hybridize", MODES)
def test_a_synchronized_network_trains_as_on_one_device(hybridize):
    """Uneven batches, deferred initialization, and devices without input."""
    batches = data_for(6, [5, 4, 1, 6, 3, 4])
    synchronized = functools.partial(network, num_devices=None)
    got = train(synchronized, 2, batches, hybridize)
    assert_same_training(got, train(synchronized, 1, batches))
    assert_same_training(got, train(network, 1, batches))


@pytest.mark.parametrize("source", ["parameters", "export"])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_averages_are_saved_and_training_goes_on(source, num_devices, tmp_path):
    contexts = CONTEXTS[:num_devices]
    rng = np.random.RandomState(1)
    batches = rng.randn(6, 2 * num_devices, 3, 8, 8).astype("float32")

    def steps(net, batches):
        model = ModelDataParallel(net, contexts)
        trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
        for i, batch in enumerate(batches):
            parts = gluon.utils.split_and_load(mx.nd.array(batch), contexts)
            # In the second step, all but one are without input.  (In its first step, a Trainer
            # copies parameters from device to device.)
            parts = parts[:1] if i == 1 else parts
            with autograd.record():
                losses = [(y**2).mean() for y in model(parts)]
            parallel_backward(losses)
            trainer.step(1)
        mx.nd.waitall()
        return [y.asnumpy() for y in model(parts)]

    net = network(num_devices=num_devices)
    net.initialize(mx.init.Xavier(), ctx=contexts)
    net.hybridize()
    steps(net, batches[:4])
    files = str(tmp_path / "net")
    if source == "parameters":
        net.save_parameters(files)
        other = network(num_devices=num_devices)
        other.load_parameters(files, ctx=contexts)
    else:
        net.export(files)
        other = gluon.SymbolBlock.imports(
            f"{files}-symbol.json", ["data"], f"{files}-0000.params", contexts
        )
    np.testing.assert_allclose(steps(other, batches[4:]), steps(net, batches[4:]), atol=1e-6)
    for parameter in (*net.collect_params().values(), *other.collect_params().values()):
        assert len({a.asnumpy().tobytes() for a in parameter.list_data()}) == 1, parameter.name


LOADED = """
import sys
import mxnet as mx
import numpy as np
import gluon_syncbn
from mxnet import autograd, gluon
from mxnet.gluon import nn

prefix, = sys.argv[1:]
net = mx.gluon.SymbolBlock.imports(prefix + "-symbol.json", ["data"], prefix + "-0000.params")
x = mx.nd.array(np.random.RandomState(0).randn(2, 3, 8, 8))
np.save(prefix + "-inference.npy", net(x).asnumpy())
with autograd.record():
    y = net(x)
y.backward()
np.save(prefix + "-training.npy", y.asnumpy())
mx.nd.waitall()
names = [name for name in net.collect_params() if name.endswith("iters")]
assert [net.collect_params()[name].data().asscalar() for name in names] == [2, 2], names
"""


def test_an_exported_network_loads_in_a_fresh_process(tmp_path):
    net = network()
    net.initialize(mx.init.Xavier())
    net.hybridize()
    x = mx.nd.array(np.random.RandomState(0).randn(2, 3, 8, 8))
    with autograd.record():
        net(x).backward()
    mx.nd.waitall()
    prefix = str(tmp_path / "net")
    net.export(prefix)
    inference = net(x).asnumpy()
    with autograd.record():
        y = net(x)
    fresh_process.run(LOADED, prefix)
    np.testing.assert_allclose(np.load(prefix + "-inference.npy"), inference, atol=1e-6)
    np.testing.assert_allclose(np.load(prefix + "-training.npy"), y.asnumpy(), atol=1e-6)


def test_numpy_arrays(rng):
    x = rng.randn(2, 3, 4, 4).astype("float32")
    mx.npx.set_np()
    try:
        for hybridize in (None, {}):
            layer = MABN2d(0, 2, 8)
            layer.initialize()
            if hybridize is not None:
                layer.hybridize(**hybridize)
            with autograd.record():
                y = layer(mx.np.array(x))
            y.backward()
            assert isinstance(y, mx.np.ndarray)
            wanted = MovingAverage(3, 4).forward(x.astype("float64"), np.ones(3), np.zeros(3))[0]
            assert largest_error(y.asnumpy(), wanted) < 2e-5
    finally:
        mx.npx.reset_np()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"simulated_batch_size": 7}, "simulated_batch_size=7 is not a multiple of batch_size=2"),
        ({"simulated_batch_size": 0}, "simulated_batch_size must be an integer from 1"),
        ({"batch_size": 0}, "batch_size must be an integer from 1"),
        ({"batch_size": 2.0}, "batch_size must be an integer"),
        ({"warmup_iters": -1}, "warmup_iters must be an integer from 0"),
        ({"warmup_iters": 2**21 + 1}, "warmup_iters must be"),
        ({"momentum": 1.5}, "momentum must be a number from 0 to 1, but is 1.5"),
        ({"momentum": None}, "momentum must be a number from 0 to 1, but is None"),
        ({"epsilon": None}, "epsilon must be a number of 0 or more, but is None"),
        ({"epsilon": -1}, "epsilon must be a number of 0 or more, but is -1"),
        ({"epsilon": float("nan")}, "epsilon must be"),
        ({"num_devices": 0}, "num_devices must be a positive integer"),
        ({"in_channels": None}, "in_channels must be an integer"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        MABN2d(**{"in_channels": 3, "batch_size": 2, "simulated_batch_size": 8, **options})


def test_data_that_do_not_fit():
    layer = make()
    layer.initialize()
    for x in (mx.nd.ones((2, 3)), mx.nd.ones((2, 3, 4, 4, 4))):
        for mode in (autograd.train_mode, autograd.predict_mode):
            with mode(), pytest.raises(ValueError, match="takes an input of 4 dimensions"):
                layer(x)
    with autograd.train_mode(), pytest.raises(mx.MXNetError, match="of buffer_gz is"):
        layer(mx.nd.ones((2, 4, 2, 2))).wait_to_read()
    layer.hybridize()
    with pytest.raises(Exception, match="MABN2d takes an input of 4 dimensions"):
        layer(mx.nd.ones((2, 3))).wait_to_read()


@pytest.mark.parametrize("hybridize", [None, {}])
def test_weights_and_residuals_are_refused(hybridize):
    layer = make()
    layer.initialize()
    if hybridize is not None:
        layer.hybridize()
    x = mx.nd.ones((2, 3, 4, 4))
    for data in (x, mx.sym.var("data")):
        with pytest.raises(TypeError, match="mabn2d.* takes data alone; weights and add"):
            layer(data, mx.nd.ones(2))
        with pytest.raises(TypeError, match="takes data alone"):
            layer(data, add=x)


def test_repr():
    wanted = (
        "MABN2d(in_channels=3, batch_size=2, simulated_batch_size=8, momentum=0.98, "
        "epsilon=1e-05, warmup_iters=100, num_devices=1)"
    )
    assert repr(make()) == wanted


def test_a_copy_has_a_key_of_its_own():
    layer = make(num_devices=None)
    assert copy.deepcopy(layer).key != layer.key
    assert layer.key == layer.key
