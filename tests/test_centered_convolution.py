"""CenConv2d: nn.Conv2D with the weight centred per output filter."""

import inspect

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import nn

from gluon_syncbn import CenConv2d
from networks import MODES

FORMS = [
    {"channels": 4, "kernel_size": 3},
    {"channels": 4, "kernel_size": (1, 3), "use_bias": False, "strides": 2, "padding": (0, 1)},
    {"channels": 6, "kernel_size": 3, "groups": 2, "dilation": 2, "activation": "tanh"},
]


def test_arguments_are_those_of_conv2d():
    assert inspect.signature(CenConv2d.__init__) == inspect.signature(nn.Conv2D.__init__)


def made(kind, form, x, hybridize=None):
    layer = kind(prefix="conv_", bias_initializer=mx.init.Uniform(1), **form)
    mx.random.seed(5)
    np.random.seed(5)
    layer.initialize(mx.init.Uniform(1))
    if hybridize is not None:
        layer.hybridize(**hybridize)
    layer(x)  # its number of input channels is inferred
    return layer


def outcome(layer, x, dy=None):
    x.attach_grad()
    with autograd.record():
        y = layer(x)
    y.backward(mx.nd.sin(mx.nd.arange(y.size).reshape(y.shape)))
    return y.asnumpy(), x.grad.asnumpy(), layer.weight.grad().asnumpy()


@pytest.mark.parametrize("hybridize", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_it_convolves_with_the_centred_weight(form, hybridize, rng):
    x = mx.nd.array(rng.randn(2, 4, 7, 8))
    layer, plain = made(CenConv2d, form, x, hybridize), made(nn.Conv2D, form, x)
    weight = plain.weight.data().asnumpy()
    assert (layer.weight.data().asnumpy() == weight).all()  # the parameter is not centred
    plain.weight.set_data(mx.nd.array(weight - weight.mean((1, 2, 3), keepdims=True)))
    y, dx, dw = outcome(layer, x)
    wanted_y, wanted_dx, wanted_dw = outcome(plain, x)
    np.testing.assert_allclose(y, wanted_y, atol=1e-5)
    np.testing.assert_allclose(dx, wanted_dx, atol=1e-5)
    wanted_dw -= wanted_dw.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(dw, wanted_dw, atol=1e-4)


def test_numpy_arrays(rng):
    x = rng.randn(2, 4, 7, 8).astype("float32")
    plain = made(CenConv2d, FORMS[0], mx.nd.array(x))
    wanted, weight = plain(mx.nd.array(x)).asnumpy(), plain.weight.data().asnumpy()
    bias = plain.bias.data().asnumpy()
    mx.npx.set_np()
    try:
        for hybridize in (None, {}):
            layer = made(CenConv2d, FORMS[0], mx.np.array(x), hybridize)
            layer.weight.set_data(mx.np.array(weight))
            layer.bias.set_data(mx.np.array(bias))
            y = layer(mx.np.array(x))
            assert isinstance(y, mx.np.ndarray)
            np.testing.assert_allclose(y.asnumpy(), wanted, atol=1e-5)
    finally:
        mx.npx.reset_np()


def test_checkpoints_are_those_of_conv2d(tmp_path, rng):
    x, path = mx.nd.array(rng.randn(1, 4, 5, 5)), str(tmp_path / "layer.params")
    plain, layer = made(nn.Conv2D, FORMS[0], x), CenConv2d(**FORMS[0])
    plain.save_parameters(path)
    layer.load_parameters(path)
    weight = layer.weight.data().asnumpy()
    assert (weight == plain.weight.data().asnumpy()).all()
    constant = mx.nd.ones((1, 4, 3, 3))  # without padding, all of a filter's weights add up to 0
    bias = layer.bias.data().asnumpy()
    np.testing.assert_allclose(layer(constant).asnumpy().ravel(), bias, atol=1e-5)
