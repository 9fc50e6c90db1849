"""What each device gets of a call's arguments."""

import mxnet as mx
import pytest
from mxnet import gluon
from mxnet.gluon import nn

from gluon_syncbn import (
    DataParallelCriterion,
    ModelDataParallel,
)
from networks import (
    ones,
)


def test_input_on_an_unknown_context(model, two):
    with pytest.raises(ValueError, match=r"lies on cpu\(5\), which is not in ctx_list"):
        model([ones(two[0]), ones(mx.cpu(5))])


def test_input_on_a_repeated_context(model, two):
    with pytest.raises(ValueError, match=r"repeats cpu\(0\)"):
        model([ones(two[0]), ones(two[0])])


def test_inputs_that_belong_together_on_different_contexts(model, two):
    with pytest.raises(ValueError, match=r"entry 0 of argument 2 lies on cpu\(1\)"):
        model([ones(c) for c in two], [ones(c) for c in reversed(two)])


def test_lists_of_different_lengths(model, two):
    with pytest.raises(ValueError, match="argument 'label' has 1 entries"):
        model([ones(c) for c in two], label=[ones(two[0])])


def test_lists_with_arrays_in_some_entries_only(model, two):
    xs = [ones(c) for c in two]
    for value, entry in (([ones(two[0]), None], "1 is None"), ((3, ones(two[1])), "0 is 3")):
        with pytest.raises(TypeError, match=f"every entry of argument 2 .* but entry {entry}"):
            model(xs, value)
    with pytest.raises(TypeError, match="every entry of argument 'mask'.*left out of every list"):
        model(xs, mask=[ones(two[0]), []])
    with pytest.raises(TypeError, match="every entry of argument 1 .* but entry 1 is None"):
        model([ones(two[0]), None])
    with pytest.raises(TypeError, match="every entry of argument 2"):
        DataParallelCriterion(gluon.loss.L2Loss(), two)(xs, [None, ones(two[1])])
    with pytest.raises(ValueError, match=r"argument 2 is \[None, None\]: give None by itself"):
        model(xs, [None, None])


def test_contexts(two):
    net = nn.Dense(1)
    with pytest.raises(ValueError, match="ctx_list is empty"):
        ModelDataParallel(net, [])
    with pytest.raises(ValueError, match=r"ctx_list repeats cpu\(0\)"):
        ModelDataParallel(net, [two[0], two[0]])
    with pytest.raises(TypeError, match="'cpu', which is no context"):
        DataParallelCriterion(gluon.loss.L2Loss(), ["cpu"])


class Optional(gluon.Block):
    def forward(self, x, pair, states=None):
        y, z = pair
        assert z is None and states == [1, 2, None]
        return x + y


def test_none_beside_an_array_in_an_entry(two):
    model = ModelDataParallel(Optional(), two)
    xs = [mx.nd.ones(1, ctx=c) for c in two]
    outs = model(xs, [(x, None) for x in xs], states=[1, 2, None])
    assert [o.asscalar() for o in outs] == [2, 2]
