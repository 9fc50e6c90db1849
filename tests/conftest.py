"""What all tests share: a short deadline, so that a hang is a failure, and networks and data."""

import mxnet as mx
import numpy as np
import pytest

import gluon_syncbn


@pytest.fixture(autouse=True)
def deadline():
    """Fail after 30 seconds of waiting instead of 120; a failure that no test read is one, too."""
    gluon_syncbn.set_timeout(30)
    yield
    gluon_syncbn.set_timeout(30)
    mx.nd.waitall()


@pytest.fixture
def rng():
    return np.random.RandomState(0)


@pytest.fixture
def two():
    return [mx.cpu(0), mx.cpu(1)]
