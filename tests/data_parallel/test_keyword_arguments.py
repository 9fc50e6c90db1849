"""Keyword arguments for blocks."""

import pytest

from networks import (
    ones,
)


def test_unknown_keyword_argument(model, two):
    with pytest.raises(TypeError, match="wrong"):
        model([ones(c) for c in two], wrong=1)
