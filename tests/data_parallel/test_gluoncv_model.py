"""DataParallelModel: whole batches in, and outputs in GluonCV's form."""

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.gluon import nn

from gluon_syncbn import DataParallelCriterion, DataParallelModel
from networks import EvalModel, SegmentationNet, split


def test_without_contexts_gluoncvs_wrappers_just_call():
    net = SegmentationNet(True)
    net.initialize()
    x, y = mx.nd.ones((2, 3, 8, 8)), mx.nd.zeros(2)
    outputs = DataParallelModel(net)(x)
    assert isinstance(outputs, tuple) and outputs[0].shape == (2, 3)
    assert DataParallelModel(net, None, True).module is net
    assert DataParallelModel(EvalModel(net), None)(x, scale=1).shape == (2, 3)
    assert DataParallelCriterion(gluon.loss.L2Loss())(outputs[0], outputs[1]).shape == (2,)
    loss = DataParallelCriterion(lambda a, b, c: a + b * c)(y, y + 1, c=2)
    np.testing.assert_array_equal(loss.asnumpy(), [2, 2])


def test_the_outputs_have_gluoncvs_form(two):
    x = mx.nd.arange(3).reshape((3, 1))
    for contexts, sizes in ((two, [2, 1]), (two[:1], [3])):
        for function in (lambda x: x, lambda x: [x], lambda x: (x,)):
            model = DataParallelModel(nn.Lambda(function), contexts)
            outputs = model(x)
            assert isinstance(outputs, tuple) and all(type(o) is tuple for o in outputs)
            assert [len(o[0]) for o in outputs] == sizes
        assert model.ctx_list == contexts and model.sync is False and "ctx_list" in repr(model)


def test_structures_are_split_as_gluoncv_splits_them(two):
    def forward(pair, z, scale):
        (x, none), w = pair["x"], pair["w"][0]
        assert none is None and isinstance(pair["w"], list)
        return x + w + z * scale

    class Callable:
        collect_params = staticmethod(dict)

        def __call__(self, *args, **kwargs):
            return forward(*args, **kwargs)

    x = mx.nd.arange(5).reshape((5, 1))
    for contexts in (two, two[:1]):
        model = DataParallelModel(Callable(), contexts)
        for outputs in (
            model({"x": (x, None), "w": [x]}, x, 10),
            model(pair={"x": (x, None), "w": [x]}, z=x, scale=10),
        ):
            got = np.concatenate([o[0].asnumpy() for o in outputs])
            np.testing.assert_array_equal(got, 12 * x.asnumpy())
    # So are labels.  What lies on several devices counts as split.
    criterion = DataParallelCriterion(lambda p, labels: p * labels[0] + labels[1], two)
    outputs = DataParallelModel(nn.Lambda(lambda x: x), two)(x)
    for label in ((x, x), [(part, part) for part in split(x, two)]):
        got = np.concatenate([loss.asnumpy() for loss in criterion(outputs, label)])
        np.testing.assert_array_equal(got, (x * x + x).asnumpy())
    parts = DataParallelModel(nn.Lambda(lambda x: x), two)(split(x, two))
    assert [len(part[0]) for part in parts] == [3, 2]
