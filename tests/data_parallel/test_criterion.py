"""The loss on several devices."""

import mxnet as mx
import numpy as np
from mxnet import gluon

from gluon_syncbn import DataParallelCriterion
from networks import split


def test_criterion_passes_a_tuple_of_outputs_as_arguments(two):
    class Loss(gluon.HybridBlock):
        def hybrid_forward(self, F, first, second, label):
            return first + 10 * second + 100 * label

    ones = [mx.nd.ones(2, ctx=c) for c in two]
    losses = DataParallelCriterion(Loss(), two)([(o, 2 * o) for o in ones], [3 * o for o in ones])
    assert [loss.context for loss in losses] == two
    np.testing.assert_array_equal(losses[1].asnumpy(), [321, 321])


def test_labels_in_one_array(two, rng):
    criterion = DataParallelCriterion(gluon.loss.L2Loss(), two)
    data, label = rng.randn(5, 2).astype("float32"), rng.randn(5, 2).astype("float32")
    wanted = [part.asnumpy() for part in criterion(split(data, two), split(label, two))]
    for outputs in (split(data, two), tuple((part,) for part in split(data, two))):
        got = [part.asnumpy() for part in criterion(outputs, mx.nd.array(label))]
        for one, other in zip(got, wanted):
            np.testing.assert_array_equal(one, other)
    one = split(data[:1], two)
    (part,) = criterion(one, mx.nd.array(label[:1]))
    np.testing.assert_array_equal(part.asnumpy(), wanted[0][:1])
