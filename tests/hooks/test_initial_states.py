"""What a symbol's moving statistics begin with."""

import json

import mxnet as mx
import numpy as np
import pytest

from gluon_syncbn import convert_symbol
from gluon_syncbn.conversion.graph import Graph
from gluon_syncbn.symbol import SyncBatchNorm


def raw():
    """The operators themselves."""
    op, mean = mx.sym._internal, mx.sym.var("norm_moving_mean")
    data, local, coefficients = op._syncbn_moments(mx.sym.var("data"))
    total = op._syncbn_sum(local, mean, key="raw", num_devices=1)
    return op._syncbn_normalize(data, total, coefficients, moving_mean=mean, name="norm")


def raw_alone():
    own = mx.sym.var("odd"), mx.sym.var("even")  # names that say nothing
    return mx.sym._internal._syncbn_batch_norm(
        mx.sym.var("data"), moving_mean=own[0], moving_var=own[1], name="norm"
    )


def raw_options():
    return mx.sym._internal._syncbn_batch_norm(
        mx.sym.var("data"), cumulative_average=True, renorm=True, name="norm"
    )


def raw_moving_average():
    op = mx.sym._internal
    data, moments, context = op._syncbn_mabn_moments(mx.sym.var("data"), buffer_size=2, name="m")
    return op._syncbn_mabn_normalize(data, moments, context, buffer_size=2, name="norm")


def without_marks():
    """As in a file that another program has written."""
    graph = Graph(mx.sym.BatchNorm(mx.sym.var("data"), name="norm"))
    for node in graph.nodes:
        node.attrs.pop("__init__", None)
    return convert_symbol(graph.symbol(), num_devices=2)


@pytest.mark.parametrize(
    "make, number",
    [
        (lambda: SyncBatchNorm(mx.sym.var("data"), ndev=2), 2),
        (lambda: SyncBatchNorm(mx.sym.var("data"), ndev=1), 2),
        (
            lambda: SyncBatchNorm(
                mx.sym.var("data"), moving_mean=mx.sym.var("odd"), moving_var=mx.sym.var("even")
            ),
            2,
        ),
        (raw, 2),
        (raw_alone, 2),
        (raw_options, 5),
        (raw_moving_average, 4),
        (without_marks, 2),
    ],
    ids=[
        "function",
        "alone",
        "own-variables",
        "raw",
        "raw-alone",
        "options",
        "raw-moving-average",
        "without-marks",
    ],
)
def test_statistics_are_initialized(make, number):
    """Independently of the initializer of the weights, and of names."""
    sym = make()
    module = mx.mod.Module(sym, label_names=None)
    module.bind([("data", (2, 3))])
    module.init_params(mx.init.Mixed([".*"], [mx.init.Constant(7)]))
    _, states = module.get_params()
    assert len(states) == number
    for name, state in states.items():
        wanted = 1 if name.endswith(("var", "stddev")) or name == "even" else 0
        np.testing.assert_array_equal(state.asnumpy(), wanted)


def test_the_users_own_mark_comes_first():
    mean = mx.sym.var("mean", init=mx.init.Constant(3))
    sym = SyncBatchNorm(mx.sym.var("data"), moving_mean=mean, ndev=2, name="bn")
    assert json.loads(sym.attr_dict()["mean"]["__init__"])[0] == "constant"
