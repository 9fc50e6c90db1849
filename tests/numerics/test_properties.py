"""Any batch, split in any way, gives what NumPy computes of the whole batch, to rounding.

The bounds are derived, not tuned: see ``bounds`` in ``tests/helpers/numerics.py``.
"""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from batches import batches
from numerics import Batch, assert_within, bounds, exact, run
from reference import rows


@given(batches())
def test_against_extended_precision(batch):
    got = run(batch)
    assert_within(got, exact(batch), bounds(batch))
    for statistics in got.mean, got.var:
        assert len({array.tobytes() for array in statistics}) == 1, "devices differ"


@given(batches(), st.data())
def test_any_other_split_and_order(batch, data):
    """Both are near the truth, so near each other; and the same one gives the same bits again."""
    order = data.draw(st.permutations(range(len(batch.xs))))
    other = Batch(
        **{**vars(batch), "xs": [batch.xs[i] for i in order], "dys": [batch.dys[i] for i in order]}
    )
    got, again, permuted = run(batch), run(batch), run(other)
    for (name, first), (_, second) in zip(got, again):
        for a, b in zip(first, second):
            assert a is b is None or a.tobytes() == b.tobytes(), name
    assert_within(permuted, exact(other), bounds(other))


@given(batches(["float32", "float64"], [0.0]), st.integers(-30, 30))
def test_a_power_of_two_changes_no_bit(batch, power):
    """x times 2^k: the same y; dx is divided by it, statistics are multiplied.

    With an epsilon of 0, because MXNet reads the decimals of one with an error of a last bit.
    """
    factor = 2.0**power
    scaled = Batch(**vars(batch))
    scaled.xs = [(x * factor).astype(x.dtype) for x in batch.xs]
    batch.momentum = scaled.momentum = 0.0
    got, wanted = run(scaled), run(batch)
    powers = {"y": 0, "dx": -1, "dgamma": 0, "dbeta": 0, "mean": 1, "var": 2}
    for name, arrays in wanted:
        for a, b in zip(getattr(got, name), arrays):
            if b is not None:
                np.testing.assert_array_equal(a, b * b.dtype.type(factor ** powers[name]), name)


@given(batches(["float64"]))
def test_dx_sums_to_zero(batch):
    """Normalization removes a shift of the channel, so the loss does not depend on one."""

    def per_channel(arrays):
        return sum(rows(array, batch.axis).sum(0) for array in arrays)

    assert (np.abs(per_channel(run(batch).dx)) <= per_channel(bounds(batch).dx)).all()
