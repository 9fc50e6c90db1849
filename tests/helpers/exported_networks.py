"""Networks with parameters as after training, and what an export of them has in it."""

import json

import mxnet as mx
import numpy as np
from mxnet.gluon import nn


def randomize(net, rng):
    """Parameters as after some training; gamma stays as it is where it counts as 1."""
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
