"""Fixtures of all tests: a short deadline, so that a hang fails, devices, data and a model."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

from deadline import deadline  # noqa: F401
from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from networks import split


@pytest.fixture
def rng():
    return np.random.RandomState(0)


@pytest.fixture
def two():
    return [mx.cpu(0), mx.cpu(1)]


@pytest.fixture
def model(two):
    """A model of one layer, which must still work after the test."""
    net = SyncBatchNorm()
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    yield model
    x = np.arange(12, dtype="float32").reshape(4, 3)
    with autograd.record():
        outs = model(split(x, two))
    parallel_backward(outs)
    got = np.concatenate([o.asnumpy() for o in outs])
    np.testing.assert_allclose(got, (x - x.mean(0)) / x.std(0), atol=1e-4)
