"""What each device gets of a call's arguments."""

import mxnet as mx
import pytest
from mxnet import gluon
from mxnet.gluon import nn

from gluon_syncbn import DataParallelCriterion, ModelDataParallel
from gluon_syncbn.data_parallel.shards import check_contexts, split
from networks import ones


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


def test_none_next_to_an_array_in_an_entry(two):
    model = ModelDataParallel(Optional(), two)
    xs = [mx.nd.ones(1, ctx=c) for c in two]
    outs = model(xs, [(x, None) for x in xs], states=[1, 2, None])
    assert [o.asscalar() for o in outs] == [2, 2]


def test_split(two):
    """Lists per device are handed out, whole arrays are cut, and all else is repeated."""
    xs = [mx.nd.ones(2, ctx=c) * i for i, c in enumerate(two)]
    whole, strings = mx.nd.arange(3), ["a", "b"]
    kwargs = {"pairs": [(x, None) for x in xs], "s": strings}
    shards = split(two, (xs, whole, 5), kwargs)
    assert [shard.context for shard in shards] == two
    for i, (shard, values) in enumerate(zip(shards, ([0, 1], [2]))):
        x, part, number = shard.args
        assert x is xs[i] and number == 5
        assert part.context == two[i] and part.asnumpy().tolist() == values
        assert list(shard.kwargs) == ["pairs", "s"]
        assert shard.kwargs["pairs"][0] is xs[i] and shard.kwargs["s"] is strings


def test_shards_are_in_the_order_of_the_entries(two):
    xs = [mx.nd.ones(1, ctx=c) for c in reversed(two)]
    assert [shard.context for shard in split(two, (tuple(xs),), {})] == two[::-1]
    (shard,) = split(two, (), {"x": xs[:1]})
    assert (shard.context, shard.args, shard.kwargs) == (two[1], (), {"x": xs[0]})


def test_an_entry_with_arrays_on_two_devices(two):
    with pytest.raises(ValueError, match=r"entry 0 of argument 1 lies on cpu\(1\), but.*cpu\(0\)"):
        split(two, ([[ones(two[0]), ones(two[1])]],), {})


def test_check_contexts(two):
    assert check_contexts(two[0]) == two[:1]
    assert check_contexts(iter(two)) == two and check_contexts(tuple(two)) == two
    given = list(two)
    assert check_contexts(given) is not given  # the caller may change its list
    with pytest.raises(ValueError, match=r"devices mixes CPUs and GPUs, cpu\(0\), gpu\(0\)"):
        check_contexts([two[0], mx.gpu(0)], "devices")
    with pytest.raises(ValueError, match=r"repeats cpu\(0\), cpu\(1\);"):
        check_contexts([*two, *two])
