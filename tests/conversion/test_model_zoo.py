"""All networks of mxnet.gluon.model_zoo.vision: converted, they compute what they did.

One of each family; the others are marked slow.
"""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import nn
from mxnet.gluon.model_zoo import vision

from gluon_syncbn import ModelDataParallel, SyncBatchNorm, convert_sync_batchnorm
from gluon_syncbn.networks import blocks_of

FAMILIES = (
    "alexnet",
    "densenet121",
    "inceptionv3",
    "mobilenet0.25",
    "mobilenetv2_0.25",
    "resnet18_v1",
    "resnet18_v2",
    "squeezenet1.0",
    "vgg11_bn",
)
# The sizes that their last pooling was written for; the others take any.
SIZES = {"inceptionv3": 299, "densenet": 224, "alexnet": 224, "squeezenet": 224}


def all_names():
    """List the names that get_model knows: the error for an unknown one has them."""
    try:
        vision.get_model("")
    except ValueError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]


NAMES = [
    pytest.param(name, marks=[] if name in FAMILIES else pytest.mark.slow) for name in all_names()
]


def make(name):
    net = vision.get_model(name, classes=10)
    net.initialize(mx.init.Xavier(magnitude=2), ctx=[mx.cpu(0), mx.cpu(1)])
    for block in blocks_of(net):
        if isinstance(block, nn.Dropout):
            block._rate = 0  # every device draws a mask of its own
    return net


def assert_close(got, wanted, tolerance):
    assert np.isfinite(wanted).all() and np.abs(wanted).max() > 0
    assert np.abs(got - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("name", NAMES)
def test_converted_it_computes_the_same(name, rng):
    contexts = [mx.cpu(0), mx.cpu(1)]
    size = next((s for prefix, s in SIZES.items() if name.startswith(prefix)), 64)
    x = mx.nd.array(rng.randn(3, 3, size, size))
    net = make(name)
    net(x)
    for parameter in net.collect_params(".*(gamma|beta|running_mean|running_var)").values():
        around = 1 if parameter.name.endswith(("gamma", "running_var")) else 0
        parameter.set_data(mx.nd.array(around + 0.2 * rng.uniform(-1, 1, parameter.shape)))
    inference = net(x).asnumpy()
    norms = [block for block in blocks_of(net) if isinstance(block, nn.BatchNorm)]
    with autograd.record():  # MXNet moves its statistics in the backward pass: they stay
        training = net(x).asnumpy()
        apart = np.concatenate([net(part).asnumpy() for part in (x[:1], x[1:])])

    assert convert_sync_batchnorm(net) is net
    assert all(type(block) is SyncBatchNorm for block in norms)
    assert_close(net(x).asnumpy(), inference, 1e-4)
    model = ModelDataParallel(net, contexts)
    parts = [x[:1].as_in_context(contexts[0]), x[1:].as_in_context(contexts[1])]
    with autograd.record():
        got = np.concatenate([y.asnumpy() for y in model(parts)])
    # Deep networks pass on what another order of float32 sums changes: unconverted, resnet152_v1
    # changes by 1.2e-3 when the last bit of its input does.
    assert_close(got, training, 5e-3)
    if norms:  # differs from each device by itself
        assert np.abs(got - apart).max() > 5e-2 * np.abs(training).max()


def test_all_have_a_family():
    assert set(FAMILIES) <= set(all_names()) and len(all_names()) == 34
