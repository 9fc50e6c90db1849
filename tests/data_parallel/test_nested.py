"""Arrays in lists, tuples and dicts."""

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from gluon_syncbn import (
    ModelDataParallel,
    SyncBatchNorm,
)


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
