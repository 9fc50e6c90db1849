"""Keyword arguments for blocks."""

import mxnet as mx
import pytest
from mxnet import gluon

from gluon_syncbn.data_parallel.keyword_arguments import call
from networks import ones


def test_unknown_keyword_argument(model, two):
    with pytest.raises(TypeError, match="wrong"):
        model([ones(c) for c in two], wrong=1)


class Plain(gluon.Block):
    def forward(self, x, scale=2, shift=0):
        return x * scale + shift


class Hybrid(gluon.HybridBlock):
    def __init__(self):
        super().__init__()
        self.own = self.params.get_constant("own", mx.nd.array([100.0]))

    def hybrid_forward(self, F, x, y=None, own=None):
        x = F.broadcast_add(x, own)
        return x if y is None else x + y


class Own(gluon.HybridBlock):
    """Does not use hybrid_forward."""

    def forward(self, x, *, scale=1):
        return x * scale


class Any(gluon.Block):
    def forward(self, x, **options):
        return options


class Calls(gluon.Block):
    """Takes keyword arguments itself."""

    def __call__(self, *args, **kwargs):
        return args, kwargs


def test_names_become_positions():
    net = Plain()
    assert call(net, (3,), {}) == 6 and call(net, (), {"x": 3}) == 6
    assert call(net, (), {"shift": 1, "x": 3, "scale": 10}) == 31
    assert call(net, (3, 10), {"shift": 1}) == 31
    assert call(net, (3,), {"shift": 1}) == 7  # scale has its default


@pytest.mark.parametrize("hybridize", [False, True])
def test_hybrid_blocks(hybridize):
    """F is not counted, and parameters are not given by the caller."""
    net = Hybrid()
    net.initialize()
    net.hybridize(hybridize)
    x = mx.nd.ones(1)
    assert call(net, (), {"y": 10 * x, "x": x}).asscalar() == 111
    assert call(net, (x,), {"y": 20 * x}).asscalar() == 121


def test_blocks_with_a_call_of_their_own():
    assert call(Calls(), (1,), {"a": 2}) == ((1,), {"a": 2})
    assert call(lambda x, a: (x, a), (1,), {"a": 2}) == (1, 2)


def test_names_that_cannot_be_passed():
    with pytest.raises(TypeError, match=r"own0: \['scale'\] cannot be passed by position"):
        call(Own(prefix="own0_"), (1,), {"scale": 2})
    with pytest.raises(TypeError, match=r"\['wrong'\] cannot be passed by position"):
        call(Any(), (1,), {"wrong": 2})
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        call(Plain(), (1,), {"wrong": 2})
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        call(Plain(), (1,), {"x": 2})
