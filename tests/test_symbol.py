"""gluon_syncbn.symbol.SyncBatchNorm, in the place of mx.sym.contrib.SyncBatchNorm."""

import json

import mxnet as mx
import numpy as np
import pytest

from gluon_syncbn import ModelDataParallel
from gluon_syncbn.symbol import SyncBatchNorm
from module_training import assert_same, fit

MXNETS = mx.sym.contrib.SyncBatchNorm
STATES = {"gamma": 1, "beta": 0, "moving_mean": 0, "moving_var": 1}


def network(norm, **options):
    x = mx.sym.var("data")
    for i in range(2):
        x = mx.sym.Convolution(x, num_filter=6, kernel=(3, 3), no_bias=True, name=f"conv{i}")
        x = norm(x, name=f"bn{i}", **options)
        x = mx.sym.Activation(x, act_type="softrelu", name=f"relu{i}")
    x = mx.sym.FullyConnected(x, num_hidden=4, name="dense")
    return mx.sym.SoftmaxOutput(x, mx.sym.var("softmax_label"), name="softmax")


def names(sym):
    return sym.list_arguments(), sym.list_auxiliary_states(), sym.list_outputs()


def nodes(sym, op):
    return [node for node in json.loads(sym.tojson())["nodes"] if node["op"] == op]


@pytest.mark.parametrize("ndev", [1, 2])
def test_names_are_mxnets(ndev):
    """So checkpoints go both ways."""
    x = mx.sym.var("data")
    assert names(network(SyncBatchNorm, ndev=ndev)) == names(network(MXNETS, key="k", ndev=ndev))
    with mx.name.Prefix("net_"):
        assert names(SyncBatchNorm(x, name="bn")) == names(MXNETS(x, name="bn", key="k"))
        fresh = [SyncBatchNorm(x), MXNETS(x, key="k"), SyncBatchNorm(x)]
    for i, sym in enumerate(fresh):
        assert sym.list_outputs() == [f"net_syncbatchnorm{i}_output"]
        assert sym.list_arguments()[1] == f"net_syncbatchnorm{i}_gamma"


@pytest.mark.parametrize("options", [{}, {"eps": 0.1, "momentum": 0.5, "fix_gamma": False}])
def test_two_contexts_are_one_batch_of_mxnets(options):
    """With MXNet's defaults, which fix gamma."""
    wanted = fit(network(mx.sym.BatchNorm, **options), 1, epochs=1)
    for devices in (1, 2):
        got = fit(network(SyncBatchNorm, ndev=devices, **options), devices, epochs=1)
        assert_same(got, wanted)


def test_arguments_by_position_and_by_name():
    x, *own = (mx.sym.var(n) for n in ("x", "a", "b", "c", "d"))
    by_position = SyncBatchNorm(
        x, *own, 0.1, 0.5, False, False, False, 2, "k", "bn", {"__note__": "kept"}
    )
    by_name = SyncBatchNorm(
        data=x,
        gamma=own[0],
        beta=own[1],
        moving_mean=own[2],
        moving_var=own[3],
        eps=0.1,
        momentum=0.5,
        fix_gamma=False,
        num_devices=2,
        key="k2",
        name="bn",
    )
    assert names(by_position) == names(by_name) == (["x", "a", "b"], ["c", "d"], ["bn_output"])
    (exchange,) = nodes(by_position, "_syncbn_sum")
    assert exchange["attrs"]["key"] == "k" and exchange["attrs"]["num_devices"] == "2"
    assert by_position.attr("__note__") == "kept"


def test_keys():
    """Unique by default; uses of a key of one's own are numbered."""
    x = mx.sym.var("data")
    named = [SyncBatchNorm(x, name="same") for _ in range(2)]
    assert len({nodes(sym, "_syncbn_sum")[0]["attrs"]["key"] for sym in named}) == 2
    both = SyncBatchNorm(SyncBatchNorm(x, key="own-key"), key="own-key")
    assert len({node["attrs"]["call"] for node in nodes(both, "_syncbn_sum")}) == 2


def test_without_a_number_it_is_model_data_parallels(two, rng):
    x = mx.sym.var("data")
    block = mx.gluon.SymbolBlock(SyncBatchNorm(x, name="bn", axis=-1), x)
    block.initialize(mx.init.Zero(), ctx=two)  # gamma is fixed
    whole = rng.randn(6, 3).astype("float32")
    xs = [mx.nd.array(part, ctx=device) for part, device in zip((whole[:2], whole[2:]), two)]
    with mx.autograd.record():
        outs = ModelDataParallel(block, two)(xs)
    got = np.concatenate([out.asnumpy() for out in outs])
    np.testing.assert_allclose(got, (whole - whole.mean(0)) / np.sqrt(whole.var(0) + 1e-3), 1e-4)


def test_use_global_stats():
    sym = SyncBatchNorm(mx.sym.var("data"), ndev=2, use_global_stats=True, name="bn")
    assert not nodes(sym, "_syncbn_sum")
    executor = sym.simple_bind(mx.cpu(), data=(2, 3))
    executor.aux_dict["bn_moving_var"][:] = 4 - 1e-3
    (y,) = executor.forward(is_train=True, data=mx.nd.ones((2, 3)))
    np.testing.assert_allclose(y.asnumpy(), 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "options, error, why",
    [
        ({"output_mean_var": True}, ValueError, "output_mean_var: .*no outputs"),
        ({"ndev": 0}, ValueError, "num_devices must be a positive integer"),
        ({"ndev": 2, "num_devices": 3}, ValueError, "ndev=2 and num_devices=3 differ"),
        ({"key": ""}, ValueError, "key must not be empty"),
        ({"key": 3}, TypeError, "key must be a string"),
        ({"data": mx.nd.ones((2, 3))}, TypeError, "data must be a Symbol.*use the layer"),
    ],
)
def test_bad_arguments(options, error, why):
    with pytest.raises(error, match=why):
        SyncBatchNorm(**{"data": mx.sym.var("data"), **options})
