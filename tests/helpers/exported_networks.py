"""Networks with parameters as after training, and the contents of exported files."""

import json

import mxnet as mx
import numpy as np
from mxnet.gluon import nn


def randomize(net, rng):
    """Set parameters of normalizations to random values, as after some training."""
    for name, parameter in net.collect_params().items():
        if name.endswith(("gamma", "beta", "_mean", "_var")):
            parameter.set_data(mx.nd.array(rng.rand(*parameter.shape) + 0.5))


def ready(net, x, rng, **options):
    net.initialize(mx.init.Xavier())
    net.hybridize(**options)
    net(x)
    randomize(net, rng)
    return net(x).asnumpy()


def operators(path):
    with open(path, encoding="utf-8") as file:
        return [node["op"] for node in json.load(file)["nodes"] if node["op"] != "null"]


def assert_close(got, wanted):
    assert np.abs(wanted).max() > 1e-2
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def sequence(*layers):
    net = nn.HybridSequential()
    net.add(*layers)
    return net
