"""How a layer is composed of operators, for symbols and for arrays.

What the operators compute is in operator/adapter/test_operators.py.
"""

import json

import mxnet as mx
import numpy as np
import pytest

from gluon_syncbn.operators import (
    local_batch_norm,
    moving_average_batch_norm,
    synchronized_batch_norm,
)

OPTIONS = {"axis": -1, "eps": 0.5, "momentum": 0.25, "fix_gamma": True}
NAMES = ("x", "gamma", "beta", "moving_mean", "moving_var")


def variables():
    x, *rest = map(mx.sym.var, NAMES)
    return x, dict(zip(NAMES[1:], rest))


def nodes(sym):
    return {n["op"]: n for n in json.loads(sym.tojson())["nodes"] if n["op"] != "null"}


def assert_has(node, **attributes):
    assert attributes.items() <= node["attrs"].items(), node


@pytest.mark.parametrize("num_devices, written", [(None, "0"), (3, "3")])
def test_a_synchronized_layer(num_devices, written):
    options = {**OPTIONS, "use_batch_stats": True}
    sym = synchronized_batch_norm(mx.sym, *variables(), options, "k", num_devices, 7)
    found = nodes(sym)
    assert list(found) == ["_syncbn_moments", "_syncbn_sum", "_syncbn_normalize"]
    assert [node["name"] for node in found.values()] == ["moments", "sum", "fwd"]
    assert_has(found["_syncbn_moments"], axis="-1", use_batch_stats="True")
    assert "eps" not in found["_syncbn_moments"]["attrs"]
    assert_has(found["_syncbn_sum"], key="k", num_devices=written, call="7")
    assert_has(found["_syncbn_normalize"], axis="-1", eps="0.5", momentum="0.25", fix_gamma="True")
    assert sym.list_arguments() == list(NAMES[:3])
    assert sym.list_auxiliary_states() == list(NAMES[3:])
    assert sym.list_outputs() == ["fwd_output"]


def test_names_of_a_synchronized_layer():
    names = "a", "b", "c"
    sym = synchronized_batch_norm(mx.sym, *variables(), OPTIONS, "k", 2, 0, names)
    assert [node["name"] for node in nodes(sym).values()] == list(names)


@pytest.mark.parametrize("use_global_stats", [False, True])
def test_a_layer_without_an_all_reduce(use_global_stats):
    sym = local_batch_norm(mx.sym, *variables(), OPTIONS, use_global_stats)
    ((op, node),) = nodes(sym).items()
    assert (op, node["name"]) == ("_syncbn_batch_norm", "fwd")
    assert_has(node, axis="-1", momentum="0.25", use_global_stats=str(use_global_stats))
    assert sym.list_arguments() == list(NAMES[:3])
    assert sym.list_auxiliary_states() == list(NAMES[3:])


@pytest.mark.parametrize("all_reduce", [None, ("k", 3, 7)])
def test_moving_averages(all_reduce):
    states = "running_var", "buffer_x2", "iters", "buffer_gz"
    averages = {"buffer_size": 4, "warmup_iters": 5}
    options = {"eps": 0.5, "momentum": 0.25, "fix_gamma": True}
    variables = [mx.sym.var(name) for name in (*NAMES[:3], *states)]
    sym = moving_average_batch_norm(
        mx.sym, *variables[:3], tuple(variables[3:]), options, averages, 4, all_reduce
    )
    found = nodes(sym)
    assert ("_syncbn_sum" in found) == (all_reduce is not None)
    for name in ("_syncbn_mabn_moments", "_syncbn_mabn_normalize"):
        assert_has(found[name], buffer_size="4", warmup_iters="5")
    assert_has(found["_syncbn_mabn_moments"], ndim="4")
    assert_has(found["_syncbn_mabn_normalize"], eps="0.5", momentum="0.25", fix_gamma="True")
    if all_reduce:
        assert_has(found["_syncbn_sum"], key="k", num_devices="3", call="7")
    assert sym.list_arguments() == list(NAMES[:3])
    assert sorted(sym.list_auxiliary_states()) == sorted(states)


def test_both_compute_the_same_on_one_device(rng):
    values = [rng.rand(*shape) + 0.5 for shape in ((6, 3), (3,), (3,), (3,), (3,))]
    options = {**OPTIONS, "fix_gamma": False}
    results = []
    for compose in (
        lambda *inputs: local_batch_norm(mx.nd, *inputs, options, False),
        lambda *inputs: synchronized_batch_norm(mx.nd, *inputs, options, "operators", 1, 0),
    ):
        inputs = [mx.nd.array(value) for value in values]
        with mx.autograd.train_mode():
            y = compose(inputs[0], dict(zip(NAMES[1:], inputs[1:])))
        mx.nd.waitall()
        results.append([y.asnumpy(), *(a.asnumpy() for a in inputs[3:])])
    for local, synchronized in zip(*results):
        np.testing.assert_allclose(local, synchronized, rtol=1e-5)
    x, gamma, beta, mean, _ = values
    np.testing.assert_allclose(
        results[0][0], gamma * (x - x.mean(0)) / np.sqrt(x.var(0) + 0.5) + beta, rtol=1e-5
    )
    np.testing.assert_allclose(results[0][1], 0.25 * mean + 0.75 * x.mean(0), rtol=1e-5)
