"""mx.sym and mx.mod.Module: networks written with our layers, and converted ones."""

import json

import mxnet as mx
import numpy as np
import pytest
from mxnet.contrib import amp
from mxnet.gluon.contrib.nn import SyncBatchNorm as MxnetSyncBatchNorm

from gluon_syncbn import ConversionError, SyncBatchNorm, convert_symbol, revert_batchnorm
from module_training import EXPORTED, assert_same, exported, fit, written

PARAMETERS = ("gamma", "beta", "moving_mean", "moving_var")


def plain(**options):
    """A network with branches and a shared normalization."""
    x = mx.sym.Convolution(mx.sym.var("data"), num_filter=6, kernel=(3, 3), name="conv")
    shared = [mx.sym.var(f"shared_{name}") for name in PARAMETERS]
    left = mx.sym.BatchNorm(x, *shared, name="shared", fix_gamma=False, **options)
    right = mx.sym.BatchNorm(x * 2, *shared, name="shared", fix_gamma=False, **options)
    x = mx.sym.Activation(left + right, act_type="relu")
    x = mx.sym.BatchNorm(x, name="last", eps=1e-3, **options)  # fix_gamma
    x = mx.sym.FullyConnected(x, num_hidden=4, name="dense")
    return mx.sym.SoftmaxOutput(x, mx.sym.var("softmax_label"), name="softmax")


@pytest.mark.parametrize(
    "make", [written, lambda n: convert_symbol(plain(), n)], ids=["written", "converted"]
)
def test_module_on_two_contexts_is_one_batch(make):
    wanted = fit(make(1), 1)
    assert_same(fit(make(2), 2), wanted)
    with pytest.raises(AssertionError):  # each context by itself
        assert_same(fit(make(1), 2), wanted)


def test_one_device_is_what_it_was():
    got, wanted = fit(convert_symbol(plain(), 1), 1), fit(plain(), 1)
    for found in (got, wanted):
        # MXNet moves these in its backward pass, so a shared layer's uses come in reverse order.
        del found["shared_moving_mean"], found["shared_moving_var"]
    assert_same(got, wanted)


def test_names_and_shapes_stay():
    before, after = plain(), convert_symbol(plain(), num_devices=2)
    for names in ("list_arguments", "list_auxiliary_states", "list_outputs"):
        assert getattr(after, names)() == getattr(before, names)()
    shape = {"data": (2, 3, 8, 8)}
    assert after.infer_shape(**shape) == before.infer_shape(**shape)
    assert "_syncbn" not in before.tojson()
    again = revert_batchnorm(after)
    assert again.tojson().count('"op": "BatchNorm"') == 3 and "_syncbn" not in again.tojson()
    assert again.list_arguments() == before.list_arguments()


def test_files_of_the_first_version_still_work():
    results = []
    for sym in (exported(), mx.sym.load(str(EXPORTED))):
        mx.random.seed(1)
        module = mx.mod.Module(sym, label_names=None, context=[mx.cpu(0), mx.cpu(1)])
        module.bind([("data", (6, 3, 8, 8))])
        module.init_params(mx.init.Xavier())
        module.init_optimizer()
        module.forward(mx.io.DataBatch([mx.nd.random.normal(shape=(6, 3, 8, 8))]), is_train=True)
        module.backward([mx.nd.random.normal(shape=(6, 3))])
        module.update()
        found, moving = module.get_params()
        results.append({k: v.asnumpy() for k, v in {**found, **moving}.items()})
    assert_same(*results)
    assert (results[0]["net_batchnorm0_running_mean"] != 0).all()  # it has moved


OPTIONS = {"eps": 0.25, "momentum": 0.5, "fix_gamma": False, "axis": -1}


@pytest.mark.parametrize("num_devices", [None, 1])
@pytest.mark.parametrize("options", [{}, OPTIONS, {"use_global_stats": True}], ids=str)
@pytest.mark.parametrize("is_train", [False, True])
def test_options_are_kept(options, num_devices, is_train, rng):
    """Defaults included, which are not the same for MXNet's operator as for our layer."""
    before = mx.sym.BatchNorm(mx.sym.var("data"), name="bn", **options)
    x = rng.randn(6, 5, 5).astype("float32")
    values = {name: rng.rand(5).astype("float32") + 0.5 for name in PARAMETERS}

    def run(sym):
        executor = sym.simple_bind(mx.cpu(), data=x.shape)
        executor.copy_params_from(
            {f"bn_{k}": mx.nd.array(values[k]) for k in PARAMETERS[:2]},
            {f"bn_{k}": mx.nd.array(values[k]) for k in PARAMETERS[2:]},
        )
        (y,) = executor.forward(is_train=is_train, data=mx.nd.array(x))
        if is_train:
            executor.backward(mx.nd.ones_like(y))  # MXNet moves its statistics here
        mx.nd.waitall()
        return [y.asnumpy(), *(a.asnumpy() for a in executor.aux_arrays)]

    converted = convert_symbol(before, num_devices)
    for sym in (converted, revert_batchnorm(converted), mx.sym.load_json(converted.tojson())):
        for got, wanted in zip(run(sym), run(before)):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_mxnets_synchronized_layer_is_converted():
    layer = MxnetSyncBatchNorm(num_devices=2, prefix="sync_")
    converted = convert_symbol(layer(mx.sym.var("data")), num_devices=2)
    assert "_contrib_SyncBatchNorm" not in converted.tojson()
    assert "_syncbn_normalize" in converted.tojson()


def test_user_attributes_stay():
    with mx.AttrScope(__note__="kept"):
        sym = mx.sym.BatchNorm(mx.sym.var("data"), name="bn")
    assert convert_symbol(sym).attr("__note__") == "kept"


def test_casts_of_mixed_precision_stay():
    def casts(sym):
        nodes = json.loads(sym.tojson(remove_amp_cast=False))["nodes"]
        return sum(node["op"] == "amp_cast" for node in nodes)

    half = amp.convert_symbol(plain(), "float16")
    assert casts(convert_symbol(half)) == casts(half) > 0


def test_symbols_do_not_share_keys():
    sums = [
        node["attrs"]
        for _ in range(2)
        for node in json.loads(convert_symbol(plain()).tojson())["nodes"]
        if node["op"] == "_syncbn_sum"
    ]
    # A layer that two places share keeps one key within a symbol, and numbers its uses.
    assert len(sums) == 6 and len({attrs["key"] for attrs in sums}) == 4
    assert len({(attrs["key"], attrs["call"]) for attrs in sums}) == 6


def test_defaults_of_ours_written_by_hand():
    layer = mx.sym._internal._syncbn_batch_norm(mx.sym.var("data"), name="norm")
    nodes = json.loads(revert_batchnorm(layer).tojson())["nodes"]
    (node,) = [node for node in nodes if node["op"] == "BatchNorm"]
    assert float(node["attrs"]["eps"]) == 1e-5 and node["attrs"]["fix_gamma"] == "False"


def with_outputs():
    x = mx.sym.BatchNorm(mx.sym.var("data"), name="odd", output_mean_var=True)
    return mx.sym.Group([x[0], x[1]])


def in_a_loop():
    def body(x, state):
        return mx.sym.BatchNorm(x, name="inner"), state

    return mx.sym.contrib.foreach(body, mx.sym.var("data"), mx.sym.var("state"), name="loop")[0]


@pytest.mark.parametrize(
    "make, why",
    [
        (with_outputs, "odd .*its mean and variance are used"),
        (lambda: mx.sym.contrib.BatchNormWithReLU(mx.sym.var("data"), name="odd"), "odd .*relu"),
        (in_a_loop, "_foreach.*its body contains BatchNorm; unroll a loop"),
    ],
)
def test_what_cannot_be_converted_is_named(make, why):
    with pytest.raises(ConversionError, match=why):
        convert_symbol(make())


def test_bad_arguments():
    with pytest.raises(TypeError, match="for a Block use gluon_syncbn.convert_sync_batchnorm"):
        convert_symbol(SyncBatchNorm())
    with pytest.raises(ValueError, match="num_devices must be a positive integer"):
        convert_symbol(plain(), num_devices=0)


def test_revert_refuses_an_exchange_in_a_loop():
    def body(x, state):
        return SyncBatchNorm(num_devices=1, prefix="inner_")(x), state

    loop = mx.sym.contrib.foreach(body, mx.sym.var("data"), mx.sym.var("state"))[0]
    with pytest.raises(ConversionError, match="_foreach.*its body contains _syncbn_batch_norm"):
        revert_batchnorm(loop)


def test_revert_refuses_a_bare_exchange():
    x = mx.sym.contrib.KeyBarrierSum(mx.sym.var("x"), key="k", num_devices=2, name="sums")
    with pytest.raises(ConversionError, match="sums .*take it out"):
        revert_batchnorm(x)


def test_a_symbol_can_be_printed_and_drawn_with_shapes(capsys):
    layer = SyncBatchNorm(in_channels=3, prefix="bn_")
    symbol = mx.sym.Convolution(layer(mx.sym.var("data")), num_filter=4, kernel=(3, 3))
    mx.viz.print_summary(symbol, shape={"data": (2, 3, 8, 9)})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bn_")]
    assert [line.split()[1] for line in lines] == ["3x8x9", "7", "3x8x9"]
    drawn = mx.viz.plot_network(symbol, shape={"data": (2, 3, 8, 9)}).source
    assert "bn_fwd" in drawn and "3x8x9" in drawn
