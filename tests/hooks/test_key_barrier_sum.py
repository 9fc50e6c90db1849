"""KeyBarrierSum in networks that are called, and that are traced."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon

import gluon_syncbn
from gluon_syncbn import ModelDataParallel
from networks import STATIC


class Sums(gluon.HybridBlock):
    """KeyBarrierSum in a network."""

    def hybrid_forward(self, F, x):
        return F.contrib.KeyBarrierSum(x, key="sums", num_devices=2)


@pytest.mark.parametrize("hybridize", [False, True])
def test_key_barrier_sum_inside_a_network(hybridize, two):
    net = Sums()
    if hybridize:
        net.hybridize()
    gluon_syncbn.set_timeout(5)
    outs = ModelDataParallel(net, two)([mx.nd.full(1, 1 + i, ctx=c) for i, c in enumerate(two)])
    assert [o.asscalar() for o in outs] == [3, 3]


class Twice(gluon.HybridBlock):
    """One key in two places that do not depend on each other."""

    def hybrid_forward(self, F, x, z):
        return [F.contrib.KeyBarrierSum(a, key="twice", num_devices=2) for a in (x, z)]


@pytest.mark.parametrize("flags", [{}, {"static_alloc": True}, STATIC])
def test_one_key_twice_in_a_traced_network(flags, two):
    """Device 0 has x late and device 1 has z late, in every pass."""

    def late(value, context):
        square = mx.nd.ones((700, 700), context) / 700
        for _ in range(4):
            square = mx.nd.dot(square, square)
        return square[0, :4] * 700 * value

    net = Twice()
    net.hybridize(**flags)
    model = ModelDataParallel(net, two)
    for _ in range(3):
        xs = [late(1, two[0]), mx.nd.ones(4, two[1])]
        zs = [mx.nd.ones(4, two[0]) * 10, late(10, two[1])]
        for x, z in model(xs, zs):
            np.testing.assert_allclose(x.asnumpy(), 2, rtol=1e-4)
            np.testing.assert_allclose(z.asnumpy(), 20, rtol=1e-4)
