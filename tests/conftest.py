"""What all tests share: a short deadline, so that a hang is a failure, and networks and data."""

import mxnet as mx
import numpy as np
import pytest

from deadline import deadline  # noqa: F401


@pytest.fixture
def rng():
    return np.random.RandomState(0)


@pytest.fixture
def two():
    return [mx.cpu(0), mx.cpu(1)]
