"""Files that earlier versions exported still load and compute what they did.

``data/before-0.2.py`` made them, with the package as it was at commit 0c7feea, before folders and
words changed.
"""

import mxnet as mx
import numpy as np
import pytest

import gluon_syncbn
from paths import DATA

EXPECTED = dict(np.load(DATA / "before-0.2-gluon-expected.npz"))


@pytest.fixture
def model(two):
    net = mx.gluon.SymbolBlock.imports(
        str(DATA / "before-0.2-gluon-symbol.json"),
        ["data"],
        str(DATA / "before-0.2-gluon-0000.params"),
        ctx=two,
    )
    return gluon_syncbn.ModelDataParallel(net, two)


def inputs(two):
    return [mx.nd.array(part, ctx) for part, ctx in zip(np.split(EXPECTED["x"], [3]), two)]


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)  # another CPU's convolution


def test_inference(model, two):
    close(np.concatenate([y.asnumpy() for y in model(inputs(two))]), EXPECTED["inference"])


def test_training(model, two):
    """Outputs, gradients, and moving statistics of every kind of layer."""
    with mx.autograd.record():
        ys = model(inputs(two))
        losses = [(y * y).sum() for y in ys]
    gluon_syncbn.parallel_backward(losses)
    close(np.concatenate([y.asnumpy() for y in ys]), EXPECTED["training"])
    compared = 0
    for name, parameter in model.collect_params().items():
        close(parameter.data(two[0]).asnumpy(), EXPECTED[f"after:{name}"])
        compared += 1
        if parameter.grad_req != "null":
            gradient = sum(parameter.grad(ctx).asnumpy() for ctx in two)
            scale = np.abs(EXPECTED[f"gradient:{name}"]).max() + 1
            close(gradient / scale, EXPECTED[f"gradient:{name}"] / scale)
            compared += 1
    assert compared == len(EXPECTED) - 3


def test_symbols_written_by_hand():
    sym = mx.sym.load(str(DATA / "before-0.2-symbols-symbol.json"))
    assert sym.list_auxiliary_states() == [
        "bn_moving_mean",
        "bn_moving_var",
        "bn2_moving_mean",
        "bn2_moving_var",
    ]
    attributes = sym.attr_dict()
    assert attributes["bn_sum"]["key"] == "mine" and attributes["bn_sum"]["num_devices"] == "2"
    assert attributes["sum"]["call"] == "3"
    _, (shape,), _ = sym.infer_shape(data=(2, 3, 6, 6))
    assert shape == (2, 4, 4, 4)


def test_converted_symbol_is_reverted():
    sym = mx.sym.load(str(DATA / "before-0.2-converted-symbol.json"))
    plain = gluon_syncbn.revert_batchnorm(sym)
    assert '"BatchNorm"' in plain.tojson() and "_syncbn" not in plain.tojson()
