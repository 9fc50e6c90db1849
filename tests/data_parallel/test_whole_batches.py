"""Arrays that are not split yet, among the arguments of a call."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import (
    DataParallelModel,
    ModelDataParallel,
    parallel_backward,
)
from networks import (
    ones,
    split,
)


class Adds(gluon.Block):
    def forward(self, x, y, z=1):
        return x + y * z


def test_an_array_is_split_like_lists(rng):
    contexts = [mx.cpu(i) for i in range(3)]
    data = rng.randn(7, 4).astype("float32")
    model, whole = (kind(Adds(), contexts) for kind in (ModelDataParallel, DataParallelModel))
    for rows in (7, 3, 2, 1):
        x = mx.nd.array(data[:rows])
        first = [out for (out,) in whole(x, x, 2)]
        named = [out for (out,) in whole(y=x, z=2, x=x)]
        for outs in (first, named, model(split(x, contexts), x, z=2)):
            assert [o.context for o in outs] == contexts[:rows]
            sizes = [len(o) for o in outs]
            assert sum(sizes) == rows and max(sizes) - min(sizes) <= 1
            np.testing.assert_allclose(np.concatenate([o.asnumpy() for o in outs]), 3 * x.asnumpy())


def test_an_array_follows_the_order_of_the_lists(two):
    model = ModelDataParallel(Adds(), two)
    xs = [mx.nd.zeros((1, 1), ctx=c) for c in reversed(two)]
    outs = model(xs, mx.nd.array([[1], [2]]))
    assert [(o.context, o.asscalar()) for o in outs] == [(two[1], 1), (two[0], 2)]


def test_batches_that_cannot_be_split(model, two):
    x, xs = ones(two[0]), [ones(c) for c in two]
    whole = DataParallelModel(model.module, two)
    for call in (
        lambda: whole(x, x, z=[ones(two[0], (3, 3))]),
        lambda: model(xs, x, z=ones(two[0], (3, 3))),
    ):
        with pytest.raises(ValueError, match=r"argument 'z' has 3 rows, but argument \d has 2"):
            call()
    with pytest.raises(ValueError, match="has 1 rows, too few for the 2 devices that argument 1"):
        model(xs, ones(two[0], (1, 3)))
    with mx.util.np_shape(True):
        with pytest.raises(ValueError, match="argument 2 has no rows"):
            whole(x, mx.nd.ones(()))


@pytest.mark.parametrize("attached", [True, False])
def test_batches_that_are_part_of_a_graph(attached, model, two):
    """Two backward passes through one graph at once end the process."""
    whole = DataParallelModel(model.module, two)
    before = nn.Dense(3, in_units=3)
    before.initialize()
    x = ones(two[0])
    if attached:
        x.attach_grad()
    with autograd.record():
        batch = x if attached else before(x)
        with pytest.raises(ValueError, match=r"argument 1 has a gradient attached.*detach\(\) it"):
            whole(batch)
        outs = whole(batch.detach())
    parallel_backward(outs)
    whole(batch)  # not recorded
