"""The deadline of all-reduces, and the end of the process."""

import numpy as np
import pytest

import fresh_process
import gluon_syncbn
from gluon_syncbn.key_barrier import BARRIER, KeyBarrier
from gluon_syncbn.library import LIBRARY


@pytest.fixture
def barrier():
    handle = LIBRARY.BarrierCreate(10.0)
    yield KeyBarrier(handle)
    LIBRARY.BarrierFree(handle)


def test_a_barrier_has_a_deadline_failures_and_passes_of_its_own(barrier):
    before = gluon_syncbn.get_timeout(), BARRIER.failures
    assert barrier.timeout == 10
    barrier.timeout = 2
    first, second = barrier.new_pass(), barrier.new_pass()
    assert barrier.timeout == 2 and first != second
    assert barrier.failures == barrier.failures_of([]) == barrier.failures_of(["ключ"]) == 0
    barrier.abort([], "nothing to abort")
    barrier.abort([first, second], "both")
    barrier.close("the end")
    assert before == (gluon_syncbn.get_timeout(), BARRIER.failures)


@pytest.mark.parametrize("seconds", [0.001, 1e8, 5, np.float32(2)])
def test_deadlines(seconds):
    gluon_syncbn.set_timeout(seconds)
    assert gluon_syncbn.get_timeout() == pytest.approx(float(seconds))


@pytest.mark.parametrize("seconds", [0, -1, 1e-10, "soon", None, float("nan"), float("inf")])
def test_deadlines_that_are_none(seconds):
    with pytest.raises(ValueError, match="number of seconds from 0.001"):
        gluon_syncbn.set_timeout(seconds)
    assert gluon_syncbn.get_timeout() == 30


def test_deadline_from_the_environment():
    script = "import gluon_syncbn; print(gluon_syncbn.get_timeout())"
    for seconds, wanted in (("7.5", "7.5"), (None, "120.0")):
        done = fresh_process.run(script, GLUON_SYNCBN_TIMEOUT=seconds)
        assert done.stdout.strip() == wanted
    for seconds in ("soon", "1e-10"):
        done = fresh_process.run(script, status=1, GLUON_SYNCBN_TIMEOUT=seconds)
        assert "GLUON_SYNCBN_TIMEOUT must be a number of seconds from 0.001" in done.stderr


def test_a_process_that_ends_while_a_device_waits_does_not_hang():
    script = """
import mxnet as mx, gluon_syncbn
y = mx.nd.contrib.KeyBarrierSum(mx.nd.ones(2), key="k", num_devices=2)
raise SystemExit(3)
"""
    done = fresh_process.run(script, status=3, GLUON_SYNCBN_TIMEOUT="100000")
    assert done.stderr == ""
