"""Arrays that are not split yet, among the arguments of a call."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import DataParallelModel, ModelDataParallel, parallel_backward
from gluon_syncbn.data_parallel.whole_batches import cut, named_arguments, rows_of
from networks import ones, split


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
    """Two backward passes in one graph at the same time would crash the process."""
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


def test_cut(rng):
    contexts = [mx.cpu(i) for i in range(3)]
    x = mx.nd.array(rng.randn(4, 2))
    split_already = [mx.nd.ones((2, 2), ctx=c) for c in contexts]
    args, kwargs = cut(contexts, (x, split_already, None), {"y": {"z": (x,)}, "n": 2, "l": [1]})
    assert [len(part) for part in args[0]] == [2, 1, 1]
    assert [part.context for part in args[0]] == contexts
    assert args[1] is split_already and args[2] is None
    assert [len(part["z"][0]) for part in kwargs["y"]] == [2, 1, 1]
    assert kwargs["n"] == 2 and kwargs["l"] == [1] and list(kwargs) == ["y", "n", "l"]


@pytest.mark.parametrize("rows, wanted", [(2, [1, 1]), (1, [1]), (0, [0])])
def test_fewer_rows_than_devices(rows, wanted):
    with mx.util.np_shape(True):
        ((parts,), _) = cut([mx.cpu(i) for i in range(3)], (mx.nd.ones((rows, 2)),), {})
        assert [len(part) for part in parts] == wanted


def test_one_device_takes_arrays_of_different_lengths(two):
    args, kwargs = cut(two[:1], (mx.nd.ones(1), mx.nd.ones(2)), {"y": mx.nd.ones(3)})
    assert [len(value) for (value,) in (*args, kwargs["y"])] == [1, 2, 3]


def test_no_arrays(two):
    assert cut(two, (), {}) == ((), {})
    assert cut(two, (1, [None]), {"x": {}}) == ((1, [None]), {"x": {}})


def test_arguments_are_called_by_their_place_or_name():
    assert named_arguments((1, 2), {"x": 3}) == [
        ("argument 1", 1),
        ("argument 2", 2),
        ("argument 'x'", 3),
    ]
    assert rows_of([("a", mx.nd.ones((3, 1))), ("b", mx.nd.ones(3))]) == 3
