"""Steps that are more than one forward and one backward: as one device with the whole batch.

One layer in two independent places of a network is in test_model.py (`Shared`).
"""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import DataParallelCriterion, ModelDataParallel, SyncBatchNorm, parallel_backward
from networks import MODES, assert_same_training, convolutional, data_for, split

OPTIMIZER = {"learning_rate": 0.05, "momentum": 0.9}
TWO = [mx.cpu(0), mx.cpu(1)]
hybridized = pytest.mark.parametrize("hybridize", MODES)
# In a graph with static_shape, MXNet 1.9.1 keeps writing gradients to the arrays of the first
# backward.  It takes others where a network runs a varying number of times before a backward, or
# its grad_req changes while a graph is retained: wrong even on one device, without our layers.
not_static_shape = pytest.mark.parametrize("hybridize", MODES[:-1])


def small(norm=SyncBatchNorm):
    return convolutional(norm, widths=(8, 8))


class Run:
    """The tools of a recipe: networks on some devices, and their results."""

    def __init__(self, contexts, hybridize):
        mx.random.seed(3)
        self.contexts, self.hybridize = contexts, hybridize
        self.networks, self.losses = [], []

    def model(self, net, initialize=True):
        if initialize:
            net.initialize(mx.init.Xavier(), ctx=self.contexts)
        if self.hybridize is not None:
            net.hybridize(**self.hybridize)
        self.networks.append(net)
        return ModelDataParallel(net, self.contexts)

    def criterion(self, loss=gluon.loss.SoftmaxCrossEntropyLoss):
        return DataParallelCriterion(loss(), self.contexts)

    def split(self, array):
        return split(array, self.contexts)

    def note(self, *losses):
        self.losses.append(sum(part.sum().asscalar() for parts in losses for part in parts))

    def results(self):
        mx.nd.waitall()
        return self.losses, {
            f"{i} {name}": [array.asnumpy() for array in p.list_data()]
            for i, net in enumerate(self.networks)
            for name, p in net._collect_params_with_prefix().items()
        }


def trainer_of(net, **options):
    return gluon.Trainer(net.collect_params(), "sgd", {**OPTIMIZER, **options})


def assert_as_one_device(recipe, hybridize, **options):
    """Run a recipe on two devices as asked, and plainly on one."""
    runs = []
    for contexts, mode in ((TWO[:1], None), (TWO, hybridize)):
        run = Run(contexts, mode)
        recipe(run, **options)
        runs.append(run.results())
    wanted, got = runs
    assert wanted[0] and np.isfinite(wanted[0]).all()
    assert_same_training(got, wanted)
    return wanted


# 5 and 3 do not divide evenly; 1 leaves a device without input.
SIZES = [4, 5, 6, 1, 3, 4]


def accumulate(run, backward):
    """Three forwards a step; statistics are those of each forward, gradients those of all."""
    net = small()
    model, criterion = run.model(net), run.criterion()
    net.collect_params().setattr("grad_req", "add")
    trainer = trainer_of(net)
    batches = data_for(0, SIZES)
    for step in (batches[:3], batches[3:]) * 2:
        if backward == "each":
            for data, label in step:
                with autograd.record():
                    losses = criterion(model(run.split(data)), run.split(label))
                parallel_backward(losses)
                run.note(losses)
        else:
            # All graphs are kept until the end: memory grows, the gradients are the same.
            several = []
            with autograd.record():
                for data, label in step:
                    several.append(criterion(model(run.split(data)), run.split(label)))
            if backward == "at once":
                parallel_backward(several)
            else:
                # Retained: the first would else clear the moving statistics' place in all.
                for losses in several[::-1] if backward == "reversed" else several:
                    parallel_backward(losses, retain_graph=True)
            run.note(*several)
        trainer.step(sum(len(data) for data, _ in step))
        net.collect_params().zero_grad()


@hybridized
@pytest.mark.parametrize("backward", ["each", "at once", "in order", "reversed"])
def test_gradients_accumulated_over_several_forwards(backward, hybridize):
    assert_as_one_device(accumulate, hybridize, backward=backward)


class InARow(gluon.HybridBlock):
    """One normalization and one convolution, again and again: each use needs the one before."""

    def __init__(self):
        super().__init__(prefix="row_")
        with self.name_scope():
            self.first, self.again = nn.Conv2D(6, 3), nn.Conv2D(6, 3, padding=1)
            self.norm, self.head = SyncBatchNorm(), nn.Dense(5)

    def hybrid_forward(self, F, x):
        x = self.norm(self.first(x))
        for _ in range(3):
            x = F.relu(self.norm(self.again(x)))
        return self.head(x)


def train_some(run, net):
    model, criterion, trainer = run.model(net), run.criterion(), None
    for data, label in data_for(0, SIZES):
        with autograd.record():
            losses = criterion(model(run.split(data)), run.split(label))
        trainer = trainer or trainer_of(net)
        parallel_backward(losses)
        trainer.step(len(data))
        run.note(losses)


@hybridized
def test_a_layer_used_again_on_its_own_output(hybridize):
    assert_as_one_device(lambda run: train_some(run, InARow()), hybridize)


def two_heads(run):
    """Two tasks with batches of their own: two models over one body, one backward."""
    body = small()
    nets = []
    for i in range(2):
        net = nn.HybridSequential(prefix=f"task{i}_")
        net.add(body, SyncBatchNorm(), nn.Dense(5))
        nets.append(net)
    models, criterion = [run.model(net) for net in nets], run.criterion()
    parameters = gluon.ParameterDict()
    for net in nets:
        parameters.update(net.collect_params())
    trainer = gluon.Trainer(parameters, "sgd", OPTIMIZER)
    for first, second in zip(data_for(0, [4, 5, 1, 6]), data_for(0, [4, 1, 6, 5], seed=1)):
        with autograd.record():
            losses = [
                criterion(model(run.split(data)), run.split(label))
                for model, (data, label) in zip(models, (first, second))
            ]
        parallel_backward(losses)
        trainer.step(len(first[0]))
        run.note(*losses)


@pytest.mark.parametrize("hybridize", MODES[1:])
def test_tracing_anew_while_a_graph_is_recorded(hybridize):
    """The run that traces puts the statistics back, which belong to the recorded graph."""

    def recipe(run):
        net = small()
        model, criterion = run.model(net), run.criterion()
        data, label = data_for(1, 5)[0]
        for _ in range(2):
            with autograd.record():
                losses = criterion(model(run.split(data)), run.split(label))
                if run.hybridize is not None:
                    net.hybridize(**run.hybridize)
                later = criterion(model(run.split(data)), run.split(label))
            parallel_backward([losses, later])
            run.note(losses, later)

    assert_as_one_device(recipe, hybridize)


@not_static_shape
@pytest.mark.filterwarnings("ignore:Parameter.*already initialized")
def test_a_body_shared_by_two_models(hybridize):
    assert_as_one_device(two_heads, hybridize)


def generator():
    net = nn.HybridSequential(prefix="generator_")
    net.add(nn.Dense(32), SyncBatchNorm(), nn.Activation("relu"))
    net.add(nn.HybridLambda(lambda F, x: F.reshape(x, (0, 2, 4, 4))))
    net.add(nn.Conv2DTranspose(6, 4, 2, 1, use_bias=False), SyncBatchNorm(), nn.LeakyReLU(0.2))
    net.add(nn.Conv2D(1, 3, padding=1))
    return net


def discriminator():
    net = nn.HybridSequential(prefix="discriminator_")
    net.add(nn.Conv2D(6, 3), nn.LeakyReLU(0.2))
    net.add(nn.Conv2D(8, 3, use_bias=False), SyncBatchNorm(), nn.LeakyReLU(0.2), nn.Dense(1))
    return net


def adversarial(run, backward, freeze):
    """The discriminator on real and on fake images, then the generator through it."""
    g, d = generator(), discriminator()
    generate, judge = run.model(g), run.model(d)
    criterion = run.criterion(gluon.loss.SigmoidBinaryCrossEntropyLoss)
    trainers = {net: trainer_of(net, learning_rate=0.02) for net in (g, d)}
    # The second of two calls must not overwrite the gradients of the first.
    d_req = "add" if backward == "calls" else "write"
    d.collect_params().setattr("grad_req", d_req)
    rng = np.random.RandomState(0)
    # The last batch of real images is smaller than the others, and than the number of devices.
    for size in (4, 5, 4, 1):
        real = run.split(rng.randn(size, 1, 8, 8))
        noise = run.split(rng.randn(5, 7))
        ones, zeros = run.split(np.ones(5)), run.split(np.zeros(5))
        with autograd.record():
            fake = generate(noise)
            on_real = criterion(judge(real), run.split(np.ones(size)))
            on_fake = criterion(judge([image.detach() for image in fake]), zeros)
            total = [loss.sum() for loss in on_fake]  # a device may have fake images only
            for i, loss in enumerate(on_real):
                total[i] = total[i] + loss.sum()
        if backward == "sum":
            parallel_backward(total)
        elif backward == "list":
            parallel_backward([on_real, on_fake])
        else:
            # Else the first clears the moving statistics' place in both, with any BatchNorm.
            parallel_backward(on_real, retain_graph=True)
            parallel_backward(on_fake)
        trainers[d].step(size + 5)
        if freeze:
            d.collect_params().setattr("grad_req", "null")
        with autograd.record():
            fooled = criterion(judge(fake if backward == "list" else generate(noise)), ones)
        parallel_backward(fooled)
        trainers[g].step(5)
        if freeze:
            d.collect_params().setattr("grad_req", d_req)
        d.collect_params().zero_grad()
        run.note(on_real, on_fake, fooled)


@not_static_shape
@pytest.mark.parametrize("backward", ["sum", "list", "calls"])
@pytest.mark.parametrize("freeze", [False, True])
def test_adversarial_networks(backward, freeze, hybridize):
    assert_as_one_device(adversarial, hybridize, backward=backward, freeze=freeze)


def frozen_statistics():
    return small(lambda: SyncBatchNorm(use_global_stats=True))


@hybridized
def test_frozen_statistics(hybridize):
    _, parameters = assert_as_one_device(
        lambda run: train_some(run, frozen_statistics()), hybridize
    )
    for name, (array,) in parameters.items():
        if "running" in name:
            np.testing.assert_array_equal(array, "var" in name, err_msg=name)


def freeze_and_thaw(run, select, when):
    """Freeze some parameters for two of six steps, or from the start on."""
    net = small()
    model, criterion = run.model(net), run.criterion()
    parameters = net.collect_params(select)
    assert parameters
    if when == "before the first":
        parameters.setattr("grad_req", "null")
    trainer = trainer_of(net)
    kept = None
    for i, (data, label) in enumerate(data_for(0, SIZES)):
        if when == "between" and i == 2:
            parameters.setattr("grad_req", "null")
            kept = {name: p.data().asnumpy() for name, p in parameters.items()}
        if i == 4:
            if kept:
                for name, values in kept.items():
                    if "running" not in name:
                        np.testing.assert_array_equal(parameters[name].data().asnumpy(), values)
            parameters.setattr("grad_req", "write")
        with autograd.record():
            losses = criterion(model(run.split(data)), run.split(label))
        parallel_backward(losses)
        trainer.step(len(data))
        run.note(losses)


@hybridized
@pytest.mark.parametrize("when", ["before the first", "between"])
@pytest.mark.parametrize("select", [".*gamma|.*beta", ".*gamma", ".*beta", ".*conv|.*batchnorm"])
def test_freezing_and_thawing(select, when, hybridize):
    """The moving statistics go on all the same, as those of one device do."""
    assert_as_one_device(freeze_and_thaw, hybridize, select=select, when=when)


def gradients_of_the_input(run):
    """Nothing of the network is trained, as for adversarial examples and style transfer."""
    net = small()
    model, criterion = run.model(net), run.criterion()
    net.collect_params().setattr("grad_req", "null")
    for data, label in data_for(0, SIZES):
        xs = run.split(data)
        for x in xs:
            x.attach_grad()
        with autograd.record():
            losses = criterion(model(xs), run.split(label))
        parallel_backward(losses)
        run.note(losses)
        gradient = np.concatenate([x.grad.asnumpy() for x in xs])
        assert np.abs(gradient).max() > 1e-6
        run.losses.extend(np.abs(gradient).sum((1, 2, 3)).tolist())


@hybridized
def test_gradients_of_the_input_of_a_frozen_network(hybridize):
    assert_as_one_device(gradients_of_the_input, hybridize)
