"""Random numbers on several devices."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import nn

import fresh_process
from gluon_syncbn import ModelDataParallel
from gluon_syncbn.data_parallel import device_threads, random_state
from networks import STATIC, split


def dropout_masks(two, model, steps=3):
    x = [mx.nd.ones((64,), ctx=c) for c in two]
    masks = []
    for _ in range(steps):
        with autograd.record():
            masks.append([o.asnumpy() for o in model(x)])
    return np.array(masks)


@pytest.mark.parametrize("hybridize", [None, {}, STATIC])
def test_dropout_differs_between_devices_and_is_reproducible(two, hybridize):
    net = nn.HybridSequential()
    net.add(nn.Dropout(0.5))
    if hybridize is not None:
        net.hybridize(**hybridize)
    model = ModelDataParallel(net, two)
    mx.random.seed(11)
    first = dropout_masks(two, model)
    mx.random.seed(11)
    again = dropout_masks(two, model)
    mx.random.seed(12)
    other = dropout_masks(two, model)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[:, 0] != first[:, 1]).any()  # between devices
    assert (first[0] != first[1]).any()  # between steps
    mx.random.seed(5, ctx=two[0])  # one device starts anew
    mixed = dropout_masks(two, model)
    mx.random.seed(5, ctx=two[0])
    np.testing.assert_array_equal(dropout_masks(two, model)[:, 0], mixed[:, 0])


def test_a_seed_set_before_the_import_counts():
    script = """
import mxnet as mx, sys
mx.random.seed(int(sys.argv[1]))
from gluon_syncbn import ModelDataParallel
contexts = [mx.cpu(0), mx.cpu(1)]
model = ModelDataParallel(mx.gluon.nn.Dropout(0.5), contexts)
with mx.autograd.record():
    outs = model([mx.nd.ones(40, ctx=c) for c in contexts])
print([o.asnumpy().tolist() for o in outs])
"""
    printed = [fresh_process.run(script, seed).stdout for seed in (1, 1, 2)]
    assert printed[0] == printed[1] != printed[2]


def test_deferred_initial_weights_follow_the_callers_seed(two, rng):
    """As on one device: the weights are drawn from the random state of the calling thread."""
    x = rng.randn(4, 3).astype("float32")
    weights = []
    for _ in range(2):
        net = nn.Dense(5)
        net.initialize(mx.init.Normal(), ctx=two)
        mx.random.seed(21)
        ModelDataParallel(net, two)(split(x, two))
        weights.append(net.weight.data(two[1]).asnumpy())
    np.testing.assert_array_equal(*weights)


def test_is_device_thread(two):
    assert not random_state.is_device_thread()
    assert device_threads.run_on(two[1], random_state.is_device_thread)
    assert not random_state.is_device_thread()


def test_the_last_seed_counts_of_all_devices_or_of_one():
    seeds = random_state._Seeds()
    first, second = (1, 0), (1, 1)
    assert seeds.unknown and seeds.of(first) == seeds.of(second)
    seeds.set_all(3)
    seeds.set_one(5, *second)
    assert not seeds.unknown
    assert (seeds.of(first).value, seeds.of(second).value) == (3, 5)
    generation = seeds.of(second).generation
    seeds.set_one(5, *second)  # even with the same number
    assert seeds.of(second).generation > generation
    seeds.set_all(4)
    assert seeds.of(first) == seeds.of(second) and seeds.of(first).value == 4
