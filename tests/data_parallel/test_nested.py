"""Arrays in lists, tuples and dicts."""

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from gluon_syncbn import ModelDataParallel, SyncBatchNorm
from gluon_syncbn.data_parallel.nested import arrays_in, divide


class Nested(gluon.Block):
    """Several inputs, keyword arguments, and outputs in lists and tuples."""

    def __init__(self):
        super().__init__()
        self.norm = SyncBatchNorm()

    def forward(self, x, z, scale=1, extra=None, name="name"):
        assert isinstance(name, str)
        y = self.norm(x) * scale
        return y, [z + 1, (y + z, extra)]


def test_nested_inputs_and_outputs(two):
    model = ModelDataParallel(Nested(), two)
    model.initialize(ctx=two)
    xs = [mx.nd.full((2, 3), i, ctx=c) for i, c in enumerate(two)]
    zs = [mx.nd.full((2, 3), 10 * i, ctx=c) for i, c in enumerate(two)]
    with autograd.record():
        outs = model(xs, zs, scale=2, extra=[(x, z) for x, z in zip(xs, zs)], name="text")
    for i, (y, (z, (both, extra))) in enumerate(outs):
        assert y.context == two[i]
        np.testing.assert_allclose(y.asnumpy(), np.full((2, 3), 4.0 * i - 2), atol=1e-3)
        np.testing.assert_array_equal(z.asnumpy(), np.full((2, 3), 10 * i + 1))
        np.testing.assert_allclose(both.asnumpy(), y.asnumpy() + 10 * i, atol=1e-5)
        assert extra[0] is xs[i] and extra[1] is zs[i]


def test_arrays_in_lists_tuples_and_dicts():
    a, b, c = mx.nd.ones(1), mx.np.ones(1), mx.nd.zeros((3,))
    assert [id(x) for x in arrays_in([a, (1, {"x": b, "y": [a]}), "text", None, c])] == [
        id(x) for x in (a, b, a, c)
    ]
    assert [id(x) for x in arrays_in(a)] == [id(a)]
    for nothing in (None, [], {}, ((),), 3, {a}):
        assert list(arrays_in(nothing)) == []


def test_divide(two):
    x = mx.nd.arange(3)
    parts = divide([x, (x, None), {"a": x, "b": "text"}, [], 2], two)
    assert len(parts) == 2
    for part, values, device in zip(parts, ([0, 1], [2]), two):
        first, (second, none), named, empty, number = part
        assert type(part) is list and type(part[1]) is tuple and type(named) is dict
        for array in (first, second, named["a"]):
            assert array.context == device and array.asnumpy().tolist() == values
        assert none is None and named["b"] == "text" and empty == [] and number == 2
    assert divide(None, two) == [None, None] and divide("ab", two) == ["ab", "ab"]
    assert divide({}, two) == [{}, {}] and divide((), two) == [(), ()]


def test_divide_for_one_device(two):
    (part,) = divide({"a": [mx.nd.arange(3)]}, two[:1])
    assert part["a"][0].asnumpy().tolist() == [0, 1, 2]
