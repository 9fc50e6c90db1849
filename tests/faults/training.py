"""A training run in which faults can be injected, and the run without any that it must equal.

The network has places where a fault may strike: before, between and after its layers, in a layer
that a device can skip, and in a sum of its own.
"""

import threading

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluon_syncbn
from gluon_syncbn import (
    DataParallelCriterion,
    KeyBarrierSum,
    ModelDataParallel,
    SyncBatchNorm,
    parallel_backward,
)

LONG = 60  # seconds: the deadline of a step without fault
PLACES = ("start", "middle", "end")


class Place(gluon.Block):
    """Passes its input on, or does what a fault says."""

    fault = None

    def forward(self, x):
        return x if self.fault is None else self.fault(x)


class Skippable(gluon.Block):
    """A part of a network that one device may skip."""

    skips = None

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x if x.context == self.skips else self.body(x)


class Coupled(gluon.Block):
    """Scales its input by a sum over the devices; a fault may give the sum another argument."""

    def __init__(self, key, num_devices):
        super().__init__()
        self.key, self.num_devices = key, num_devices
        self.fault = None

    def forward(self, x):
        options = {"data": x.mean((0, 2, 3)), "key": self.key, "num_devices": self.num_devices}
        if self.fault is not None:
            options = self.fault(options)
        return x * (1 + KeyBarrierSum(**options).tanh().mean())


def _part(channels, hybridize):
    part = nn.HybridSequential()
    part.add(
        nn.Conv2D(channels, 3, padding=1, use_bias=False),
        SyncBatchNorm(),
        nn.Activation("softrelu"),
        SyncBatchNorm(),
    )
    if hybridize is not None:
        part.hybridize(**hybridize)
    return part


class Training:
    """A network on several devices, trained step by step.

    Parameters
    ----------
    contexts : list of Context
    hybridize : dict or None
        How the network's parts are hybridized; None: not at all.
    seed : int
        Determines the initial weights and the batches.
    """

    def __init__(self, contexts, hybridize, seed):
        self.contexts, self._seed = contexts, seed
        self.net = nn.Sequential()
        self.places = {name: Place() for name in PLACES}
        self.skippable = Skippable(_part(4, hybridize))
        self.coupled = Coupled(f"coupled{id(self)}", len(contexts))
        self.net.add(
            self.places["start"],
            _part(4, hybridize),
            self.places["middle"],
            self.skippable,
            self.coupled,
            self.places["end"],
            nn.GlobalAvgPool2D(),
            nn.Dense(3),
        )
        mx.random.seed(seed)
        np.random.seed(seed)
        self.net.initialize(mx.init.Xavier(), ctx=contexts)
        self.model = ModelDataParallel(self.net, contexts)
        loss = gluon.loss.SoftmaxCrossEntropyLoss()
        self.criterion = DataParallelCriterion(loss, contexts)
        self.trainer = gluon.Trainer(
            self.net.collect_params(), "sgd", {"learning_rate": 0.05, "momentum": 0.9}
        )
        self.states = []  # after each step

    def next_batch(self):
        """The shards of the next step's data, and of its labels."""
        random = np.random.RandomState([self._seed, len(self.states)])
        rows = 2 * len(self.contexts) + 1  # shards of different size
        data, label = random.randn(rows, 2, 6, 6), random.randint(0, 3, rows)
        return [
            gluon.utils.split_and_load(mx.nd.array(x), self.contexts, even_split=False)
            for x in (data, label)
        ]

    def forward(self, xs):
        with autograd.record():
            return self.model(xs)

    def losses(self, xs, ys):
        with autograd.record():
            return self.criterion(self.model(xs), ys)

    def step(self):
        """Train by the next batch, and note the state that this leads to."""
        xs, ys = self.next_batch()
        parallel_backward(self.losses(xs, ys))
        self.trainer.step(sum(map(len, xs)))
        self.states.append(self.state())

    def state(self):
        """{name: one array a device} of parameters, gradients and moving statistics."""
        found = {}
        for name, p in self.net._collect_params_with_prefix().items():
            found[name] = [a.asnumpy() for a in p.list_data()]
            if p.grad_req != "null":
                found[f"gradient of {name}"] = [a.asnumpy() for a in p.list_grad()]
        return found

    def statistics(self):
        """Copies of the moving statistics, for `restore`."""
        parameters = self.net._collect_params_with_prefix().items()
        return {n: [a.asnumpy() for a in p.list_data()] for n, p in parameters if "running" in n}

    def restore(self, statistics):
        """Set the moving statistics to what they were."""
        parameters = self.net._collect_params_with_prefix()
        for name, arrays in statistics.items():
            for array, value in zip(parameters[name].list_data(), arrays):
                array[:] = value

    def heal(self):
        """Take all faults out of the network."""
        for place in self.places.values():
            place.fault = None
        self.skippable.skips = self.coupled.fault = None


def differences(state, wanted, only=None):
    """The names in which two states differ in any bit, of those that `only` selects."""
    return [
        name
        for name, arrays in wanted.items()
        if (only is None or only(name))
        and [a.tobytes() for a in state[name]] != [a.tobytes() for a in arrays]
    ]


def is_weight(name):
    """Whether training changes what has this name in the Trainer's step alone."""
    return "running" not in name and not name.startswith("gradient")


class Background:
    """A thread that runs a function while a fault strikes, and raises here what that raised."""

    def __init__(self, function):
        self._function, self._error = function, None
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            self._function()
        except BaseException as error:
            self._error = error

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._thread.join()
        if self._error is not None:
            raise self._error


def settle():
    """Wait for all that is pending; return the message of an error that nobody has read, or ""."""
    try:
        mx.nd.waitall()
    except mx.MXNetError as error:
        return str(error)
    finally:
        gluon_syncbn.set_timeout(LONG)
    return ""
