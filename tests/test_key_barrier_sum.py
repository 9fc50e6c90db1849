"""KeyBarrierSum, the function: for arrays and symbols of mx.nd and mx.np.

What the operator itself does is in operator/adapter/test_key_barrier_sum.py.
"""

import json

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon

import gluon_syncbn
from gluon_syncbn import KeyBarrierSum, ModelDataParallel
from networks import STATIC


def attributes(sym):
    (node,) = [n for n in json.loads(sym.tojson())["nodes"] if n["op"] == "_contrib_KeyBarrierSum"]
    return node["name"], node["attrs"]


@pytest.mark.parametrize("kind", [mx.nd.array, mx.np.array])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("devices", [1, 3])
def test_sum_and_gradient(kind, dtype, devices, rng):
    contexts = [mx.cpu(i) for i in range(devices)]
    values, heads = (rng.randn(devices, 2, 3).astype(dtype) for _ in range(2))
    xs = [kind(value, dtype=dtype, ctx=c) for value, c in zip(values, contexts)]
    for x in xs:
        x.attach_grad()
    with autograd.record():
        ys = [KeyBarrierSum(x, key="function", num_devices=devices) for x in xs]
    for y, head, context in zip(ys, heads, contexts):
        y.backward(kind(head, dtype=dtype, ctx=context))
    tolerance = {"float32": 1e-6, "float64": 1e-14}[dtype]
    for x, y, context in zip(xs, ys, contexts):
        assert type(y) is type(x) and y.dtype == np.dtype(dtype) and y.context == context
        np.testing.assert_allclose(y.asnumpy(), values.sum(0), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(x.grad.asnumpy(), heads.sum(0), rtol=tolerance, atol=tolerance)


def test_arrays_of_numpys_shapes(two):
    with mx.util.np_shape(True):
        for shape in ((), (0,), (2, 0)):
            ys = [KeyBarrierSum(mx.np.ones(shape, ctx=c), "shapes", 2) for c in two]
            assert [y.shape for y in ys] == [shape] * 2
            assert all((y.asnumpy() == 2).all() for y in ys)


def test_symbols():
    x = mx.sym.var("x")
    plain, numpy = KeyBarrierSum(x, "k", 2), KeyBarrierSum(x.as_np_ndarray(), "k", 2, 3, "own")
    assert type(plain) is mx.sym.Symbol and type(numpy) is mx.sym.numpy._Symbol
    assert attributes(plain)[1] == {"key": "k", "num_devices": "2"}
    assert attributes(numpy) == ("own", {"key": "k", "num_devices": "2", "call": "3"})
    executor = KeyBarrierSum(x, "symbol", 1).simple_bind(mx.cpu(), x=(2,))
    (y,) = executor.forward(is_train=True, x=mx.nd.array([1, 2]))
    executor.backward(mx.nd.array([10, 20]))
    np.testing.assert_array_equal(y.asnumpy(), [1, 2])
    np.testing.assert_array_equal(executor.grad_dict["x"].asnumpy(), [10, 20])


class Sums(gluon.HybridBlock):
    """Two sums under one key, which do not depend on each other."""

    def hybrid_forward(self, F, x):
        return [KeyBarrierSum(a, key="in a network", num_devices=2) for a in (x, 10 * x)]


@pytest.mark.parametrize("hybridize", [None, {}, STATIC])
@pytest.mark.parametrize("kind", [mx.nd, mx.np])
def test_in_a_network(kind, hybridize, two):
    if kind is mx.np:
        mx.npx.set_np()
    try:
        net = Sums()
        if hybridize is not None:
            net.hybridize(**hybridize)
        model = ModelDataParallel(net, two)
        for _ in range(2):
            xs = [kind.ones(3, ctx=c) * (i + 1) for i, c in enumerate(two)]
            for sums in model(xs):
                assert {type(y) for y in sums} == {type(xs[0])}
                assert [y.asnumpy().tolist() for y in sums] == [[3] * 3, [30] * 3]
    finally:
        mx.npx.reset_np()


def test_uses_are_numbered_where_a_block_is_traced():
    nodes = json.loads(mx.sym.Group(Sums()(mx.sym.var("x"))).tojson())["nodes"]
    calls = [int(n["attrs"].get("call", 0)) for n in nodes if "KeyBarrierSum" in n["op"]]
    assert len(calls) == 2 and calls[1] == calls[0] + 1


@pytest.mark.parametrize(
    "options, why",
    [
        ({"key": ""}, "key must not be empty"),
        ({"num_devices": 0}, "num_devices must say how many devices"),
        ({"num_devices": -1}, "num_devices"),
        ({"num_devices": None}, "num_devices expect int but value='None'"),
        ({"num_devices": 1.5}, "num_devices expect int but value='1.5'"),
        ({"data": mx.nd.ones(2, dtype="int32")}, "takes float32 or float64 data"),
        ({"data": mx.np.ones(2, dtype="float16")}, "takes float32 or float64 data"),
    ],
)
def test_bad_arguments(options, why):
    with pytest.raises(mx.MXNetError, match=why):
        KeyBarrierSum(**{"data": mx.nd.ones(2), "key": "bad", "num_devices": 1, **options})


@pytest.mark.parametrize(
    "options, why",
    [
        ({"data": 3}, "data must be an NDArray or a Symbol, but is a int"),
        ({"data": [mx.nd.ones(2)]}, "but is a list"),
        ({"key": 3}, "key must be a string, but is a int"),
        ({"key": None}, "but is a NoneType"),
    ],
)
def test_wrong_types(options, why):
    with pytest.raises(TypeError, match=why):
        KeyBarrierSum(**{"data": mx.nd.ones(2), "key": "bad", "num_devices": 1, **options})


def test_arguments_that_are_missing():
    with pytest.raises(TypeError, match="'key' and 'num_devices'"):
        KeyBarrierSum(mx.nd.ones(2))


def test_devices_that_differ(two):
    gluon_syncbn.set_timeout(10)
    for arguments in (lambda i: (2 + i, 2), lambda i: (2, 2 + i)):
        ys = []
        for i, context in enumerate(two):
            size, devices = arguments(i)
            ys.append(KeyBarrierSum(mx.nd.ones(size, ctx=context), "differ", devices))
        for y in ys:
            with pytest.raises(mx.MXNetError, match="brings 3|same num_devices"):
                y.asnumpy()
