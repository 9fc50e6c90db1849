"""What the processes compare; the communication is in cases.py."""

import pytest

from gluon_syncbn.distributed.agreement import check_alike, check_versions

NAMES = "rank 0 (a)", "rank 1 (b)", "rank 2 (b)"


def test_networks_that_are_alike():
    layers = [("bn0", 4), ("bn1", 0)]
    check_alike(NAMES, (layers, [("other0", 4), ("other1", 7)], [("bn0", 0), ("bn1", 7)]))


def test_networks_that_differ():
    with pytest.raises(ValueError, match=r"number of synchronized.*rank 0 \(a\) has 1, but rank 2"):
        check_alike(NAMES, ([("bn", 4)], [("bn", 4)], [("bn", 4), ("bn", 4)]))
    with pytest.raises(ValueError, match=r"layer 1 is b with 4 channels on rank 0 .*5 on rank 1"):
        check_alike(NAMES, ([("a", 1), ("b", 4)], [("a", 1), ("b", 5)], [("a", 1), ("b", 4)]))


def test_versions_that_differ():
    check_versions(NAMES, ("0.1.0",) * 3)
    with pytest.raises(RuntimeError, match=r"rank 0 \(a\) runs .* 0.1.0, but rank 2 \(b\) 0.2.0"):
        check_versions(NAMES, ("0.1.0", "0.1.0", "0.2.0"))
