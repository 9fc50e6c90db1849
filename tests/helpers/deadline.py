"""A deadline for tests that exchange: for conftest.py, and for tests/gpu, which lacks that."""

import mxnet as mx
import pytest

import gluon_syncbn


@pytest.fixture(autouse=True)
def deadline():
    """Fail after 30 seconds of waiting instead of 120; so is an error that no test has read."""
    gluon_syncbn.set_timeout(30)
    yield
    gluon_syncbn.set_timeout(30)
    mx.nd.waitall()
