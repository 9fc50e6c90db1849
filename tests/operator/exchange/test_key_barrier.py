"""The C++ class KeyBarrier, driven from threads."""

import itertools
import threading
import time

import numpy as np
import pytest

from barrier import MOMENTS, Barrier
from gluon_syncbn.library import LIBRARY
from reference import moments


@pytest.fixture
def barrier():
    barrier = Barrier(10.0)
    yield barrier
    barrier.close()


def wait(*outs):
    for out in outs:
        assert out["event"].wait(10), "a completion was never called"
    return outs


def test_every_device_gets_the_sum_once_the_last_has_arrived(barrier):
    first = barrier.arrive(0, [1, 2], 3)
    second = barrier.arrive(1, [10, 20], 3)
    assert not first["event"].is_set() and not second["event"].is_set()
    third = barrier.arrive(2, [100, 200], 3)
    for out in wait(first, second, third):
        np.testing.assert_array_equal(out["total"], [111, 222])
        assert out["devices"] == 3 and out["error"] == ""


def test_one_device_completes_at_once(barrier):
    out = barrier.arrive(0, [5], 1)
    assert out["event"].is_set() and out["total"] == [5]


def test_sum_is_the_same_in_every_order_of_arrival(barrier):
    # Values whose float64 sum depends on the order in which they are added.
    values = [1e16, 1.0, -1e16, 3.0]
    assert len({sum(order) for order in itertools.permutations(values)}) > 1
    results = set()
    for order in itertools.permutations(range(4)):
        outs = wait(*[barrier.arrive(p, [values[p]], 4) for p in order])
        results.update(out["total"][0] for out in outs)
    assert len(results) == 1


def total_moments(barrier, shares):
    """Merge shards of rows x channels; the result is the same on all devices, in any order."""
    results = set()
    for order in itertools.permutations(range(len(shares))):
        outs = [barrier.arrive(p, moments(shares[p]), len(shares), merge=MOMENTS) for p in order]
        results.update(out["total"].tobytes() for out in wait(*outs))
    assert len(results) == 1
    return np.frombuffer(results.pop())


def test_moments_are_merged_and_lose_nothing_far_from_zero(barrier, rng):
    spread = np.array([1.0, 10.0])  # and the devices' means are apart
    shares = [rng.randn(n, 2) * spread + i for i, n in enumerate((3, 50, 1, 400))]
    wanted = moments(np.concatenate(shares))
    np.testing.assert_allclose(total_moments(barrier, shares), wanted, rtol=1e-14)
    for offset in (1e6, -1e6):
        far = [share + offset for share in shares]
        # The rounded shards, moved back to zero without rounding again.
        wanted = moments(np.concatenate(far) - offset)
        total = total_moments(barrier, far)
        np.testing.assert_allclose(total[:2], wanted[:2] + offset, rtol=1e-15)
        np.testing.assert_allclose(total[2:], wanted[2:], rtol=1e-9)


def test_moments_of_no_elements_change_nothing(barrier, rng):
    shares = [rng.randn(n, 3) + 5 for n in (4, 2)]
    nothing = np.zeros((0, 3))
    wanted = total_moments(barrier, shares)
    for place in range(3):
        total = total_moments(barrier, [*shares[:place], nothing, *shares[place:]])
        assert total.tobytes() == wanted.tobytes()
    assert not total_moments(barrier, [nothing, nothing]).any()


def test_a_sum_and_moments_do_not_mix(barrier):
    first = barrier.arrive(0, [1, 2, 3], 2, merge=MOMENTS)
    second = barrier.arrive(1, [1, 2, 3], 2)
    for out in wait(first, second):
        assert out["total"] is None and "bring different things under one key" in out["error"]


def test_fast_device_opens_later_rounds(barrier):
    fast = [barrier.arrive(0, [i], 2) for i in range(3)]
    slow = [barrier.arrive(1, [10 * i], 2) for i in range(3)]
    for i, (a, b) in enumerate(zip(fast, slow)):
        wait(a, b)
        assert a["total"] == b["total"] == [11 * i]
    assert len({out["round"] for out in fast}) == 3


def test_keys_passes_and_backward_rounds_do_not_mix(barrier):
    where = [("a", 0, 0), ("b", 0, 0), ("a", 70, 0), ("a", 80, 0), ("a", 70, 7), ("a", 70, 8)]
    outs = [
        barrier.arrive(p, [10**i + p], 2, key, a_pass, round_number)
        for p in (0, 1)
        for i, (key, a_pass, round_number) in enumerate(where)
    ]
    wait(*outs)
    for i in range(6):
        assert outs[i]["total"] == outs[i + 6]["total"] == [2 * 10**i + 1]


def test_many_threads_many_rounds(barrier):
    devices, rounds, sums = 8, 200, {}

    def run(participant):
        rng = np.random.RandomState(participant)
        for i in range(rounds):
            if rng.rand() < 0.1:
                time.sleep(0.001)
            (out,) = wait(barrier.arrive(participant, [participant * i], devices))
            sums[participant, i] = out["total"][0]

    threads = [threading.Thread(target=run, args=(p,)) for p in range(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for (_, i), total in sums.items():
        assert total == i * sum(range(devices))
    assert len(sums) == devices * rounds


def test_deadline_fails_everyone_who_waits_and_the_next_round_works():
    barrier = Barrier(0.2)
    outs = [barrier.arrive(0, [1], 3), barrier.arrive(1, [1], 3)]
    for out in wait(*outs):
        assert out["total"] is None
        for part in ("'k'", "forward", "device 0 device 1", "missing: 1 of 3", "0.2 s"):
            assert part in out["error"]
    (out,) = wait(barrier.arrive(0, [1], 2, round_number=3))
    assert "backward" in out["error"]
    assert barrier.control.failures == 2
    outs = wait(*[barrier.arrive(p, [1], 3) for p in range(3)])
    assert [out["total"][0] for out in outs] == [3, 3, 3]
    barrier.close()


def test_a_shorter_deadline_holds_for_devices_that_wait_already(barrier):
    out = barrier.arrive(0, [1], 2)
    time.sleep(0.1)
    barrier.control.timeout = 0.2
    wait(out)
    assert "not every device came within 0.2 s" in out["error"]


@pytest.mark.parametrize(
    "seconds, deadline", [(1e-10, 1e-3), (0, 1e-3), (-1, 1e-3), (float("nan"), 1e-3), (1e30, 1e9)]
)
def test_a_deadline_that_no_clock_can_keep_is_not_taken(seconds, deadline):
    """A deadline of zero would keep a core busy."""
    barrier = Barrier(seconds)
    assert barrier.control.timeout == deadline
    LIBRARY.BarrierSetTimeout(barrier.handle, 5)
    LIBRARY.BarrierSetTimeout(barrier.handle, seconds)
    assert barrier.control.timeout == deadline
    barrier.close()


@pytest.mark.parametrize(
    "second, message",
    [(([1, 2, 3], 2), "brings 3 values, but device 0 brings 2"), (([1, 2], 4), "num_devices=4")],
)
def test_contradiction_fails_the_round_at_once(barrier, second, message):
    outs = [barrier.arrive(0, [1, 2], 2), barrier.arrive(1, *second)]
    for out in wait(*outs):
        assert out["total"] is None and message in out["error"]
    outs = wait(barrier.arrive(0, [1, 2], 2), barrier.arrive(1, [1, 2], 2))
    np.testing.assert_array_equal(outs[0]["total"], [2, 4])


def test_a_late_device_does_not_join_the_next_pass(barrier):
    first, second = barrier.control.new_pass(), barrier.control.new_pass()
    assert first != second
    barrier.control.timeout = 0.2
    (early,) = wait(barrier.arrive(0, [1], 2, a_pass=first))
    assert "missing: 1 of 2" in early["error"]
    barrier.control.timeout = 10
    late = barrier.arrive(1, [1], 2, a_pass=first)
    outs = wait(*[barrier.arrive(p, [10], 2, a_pass=second) for p in (0, 1)])
    assert [out["total"][0] for out in outs] == [20, 20]
    assert "its pass had failed before" in late["error"] and "0.2 s" in late["error"]


def test_a_round_that_fails_ends_its_pass(barrier):
    """The devices that wait in other rounds of it, and those that come later, learn why."""
    first, second = barrier.control.new_pass(), barrier.control.new_pass()
    waiting, other = (barrier.arrive(0, [1], 3, "a", a_pass=p) for p in (first, second))
    outs = [barrier.arrive(p, [1] * (p + 1), 3, "b", a_pass=first) for p in (0, 1)]
    late = barrier.arrive(2, [1], 3, "a", a_pass=first)
    for out in wait(*outs, waiting, late):
        assert "device 1 brings 2 values, but device 0 brings 1" in out["error"]
    assert not other["event"].is_set()


def test_abort_ends_one_pass_and_no_other(barrier):
    first, second = barrier.control.new_pass(), barrier.control.new_pass()
    waiting, backward, other, outside = (
        barrier.arrive(0, [1], 2, a_pass=first),
        barrier.arrive(0, [1], 2, a_pass=first, round_number=5),
        barrier.arrive(0, [1], 2, a_pass=second),
        barrier.arrive(0, [1], 2),
    )
    barrier.control.abort([first], "cpu(1) broke.")
    for out in wait(waiting, backward):
        assert "cpu(1) broke." in out["error"] and "missing: 1 of 2" in out["error"]
    for late in (dict(a_pass=first), dict(a_pass=first, key="another")):
        (out,) = wait(barrier.arrive(1, [1], 2, **late))
        assert "cpu(1) broke." in out["error"]
    assert not other["event"].is_set() and not outside["event"].is_set()
    wait(other, outside, barrier.arrive(1, [2], 2, a_pass=second), barrier.arrive(1, [2], 2))
    assert other["total"] == outside["total"] == [3]
    assert barrier.control.failures == 4
    assert barrier.control.failures_of(["k"]) == 3
    assert barrier.control.failures_of(["another", "never"]) == 1


def test_close_fails_all(barrier):
    waiting = barrier.arrive(0, [1], 2)
    barrier.control.close("the end")
    wait(waiting)
    assert "the end" in waiting["error"]
    (late,) = wait(barrier.arrive(0, [1], 1))
    assert late["error"] == "the end"


def test_devices_of_two_kinds_do_not_mix(barrier):
    first = barrier.arrive(0, [1.0], 3)
    second = barrier.arrive(1, [1.0], 3, kind="gpu")
    for out in wait(first, second):
        assert out["total"] is None
        assert "device 0 and device 1 cannot meet" in out["error"]
        assert "all devices of a key must be of one kind, cpu or gpu" in out["error"]
    others = [barrier.arrive(i, [1.0], 2, kind="gpu") for i in range(2)]
    for out in wait(*others):
        np.testing.assert_array_equal(out["total"], [2.0])


def test_many_rounds_fail_at_once(barrier):
    """Without a pause between rounds, which would add up to 20 seconds here."""
    outs = [barrier.arrive(0, [1.0], 2, key=f"k{i}") for i in range(2000)]
    closing = threading.Thread(target=barrier.control.close, args=("the end",))
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    assert all(out["total"] is None and "the end" in out["error"] for out in outs)
