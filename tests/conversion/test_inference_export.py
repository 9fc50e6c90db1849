"""Export for machines without the package: files load in plain MXNet and as ONNX."""

import contextlib
from unittest import mock

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.contrib import amp
from mxnet.gluon import nn

import fresh_process
from exported_networks import assert_close, operators, randomize, ready, sequence
from gluon_syncbn import (
    ConversionError,
    ModelDataParallel,
    SyncBatchNorm,
    export_for_inference,
    parallel_backward,
)
from networks import STATIC, Branches, Shared, convolutional

# Runs where gluon_syncbn cannot be imported: arguments are prefix, input, output, how.
ELSEWHERE = """
import sys
sys.modules["gluon_syncbn"] = None
import mxnet as mx
prefix, source, target, how = sys.argv[1:]
x = mx.nd.load(source)[0]
if how == "SymbolBlock":
    net = mx.gluon.SymbolBlock.imports(prefix + "-symbol.json", ["data"], prefix + "-0000.params")
    y = net(x)
else:
    sym, arguments, states = mx.model.load_checkpoint(prefix, 0)
    module = mx.mod.Module(sym, label_names=None)
    module.bind([("data", x.shape)], for_training=False)
    module.set_params(arguments, states)
    module.forward(mx.io.DataBatch([x]))
    y = module.get_outputs()[0]
mx.nd.save(target, [y])
assert not any("syncbn" in name for name in dir(mx.nd._internal))
"""


def elsewhere(prefix, x, tmp_path, how, script=ELSEWHERE):
    source, target = str(tmp_path / "x"), str(tmp_path / "y")
    mx.nd.save(source, [x])
    fresh_process.run(script, prefix, source, target, how)
    return mx.nd.load(target)[0].asnumpy()


def of_any_kind():
    """One use of every kind of layer in one network."""
    net = nn.HybridSequential()
    net.add(
        nn.Conv2D(6, 3, use_bias=False),
        SyncBatchNorm(),
        nn.Activation("relu"),
        SyncBatchNorm(num_devices=1, epsilon=1e-2),
        SyncBatchNorm(use_global_stats=True, scale=False),
        nn.BatchNorm(center=False),
        nn.Dense(5),
        SyncBatchNorm(axis=-1),
    )
    return net


@pytest.mark.parametrize("how", ["SymbolBlock", "Module"])
@pytest.mark.parametrize("fold", [False, True])
def test_loaded_where_the_package_is_not(fold, how, tmp_path, rng):
    x = mx.nd.array(rng.randn(4, 3, 8, 8))
    net = of_any_kind()
    wanted = ready(net, x, rng)
    symbol, parameters = export_for_inference(net, str(tmp_path / "net"), fold=fold)
    assert operators(symbol).count("BatchNorm") == (3 if fold else 5)
    assert not any("syncbn" in op for op in operators(symbol))
    assert_close(elsewhere(str(tmp_path / "net"), x, tmp_path, how), wanted)


@pytest.mark.parametrize("make", [Branches, Shared, convolutional])
@pytest.mark.parametrize("options", [{}, STATIC])
def test_trained_networks(make, options, tmp_path, rng):
    contexts = [mx.cpu(0), mx.cpu(1)]
    net = make()
    net.initialize(mx.init.Xavier(), ctx=contexts)
    net.hybridize(**options)
    model = ModelDataParallel(net, contexts)
    xs = [mx.nd.array(rng.randn(n, 3, 10, 10), ctx=c) for n, c in zip((3, 2), contexts)]
    for _ in range(3):
        with autograd.record():
            ys = model(xs)
        parallel_backward(ys)
    wanted = net(xs[0]).asnumpy()
    before = {name: p.data(contexts[0]).asnumpy() for name, p in net.collect_params().items()}
    for fold in (False, True):
        files = export_for_inference(model, str(tmp_path / f"net{fold}"), epoch=7, fold=fold)
        assert files[1].endswith("-0007.params")
        loaded = gluon.SymbolBlock.imports(files[0], ["data"], files[1])
        assert_close(loaded(xs[0]).asnumpy(), wanted)
    for name, parameter in net.collect_params().items():  # the network itself is as it was
        np.testing.assert_array_equal(parameter.data(contexts[0]).asnumpy(), before[name])


def test_export_and_back_with_the_package(tmp_path, rng):
    """net.export itself: SymbolBlock and Module load it after import gluon_syncbn."""
    x = mx.nd.array(rng.randn(4, 3, 8, 8))
    net = of_any_kind()
    wanted = ready(net, x, rng)
    net.export(str(tmp_path / "net"))
    script = ELSEWHERE.replace('sys.modules["gluon_syncbn"] = None', "import gluon_syncbn")
    script = script.replace("assert not any", "assert any")
    for how in ("SymbolBlock", "Module"):
        assert_close(elsewhere(str(tmp_path / "net"), x, tmp_path, how, script), wanted)
    with pytest.raises(AssertionError, match="_syncbn"):  # for this there is export_for_inference
        elsewhere(str(tmp_path / "net"), x, tmp_path, "SymbolBlock")


@pytest.mark.parametrize("fold", [False, True])
def test_float16(fold, tmp_path, rng):
    """No float16 convolution on the CPU, so layers around a relu."""
    net = sequence(SyncBatchNorm(), nn.Activation("relu"), SyncBatchNorm(num_devices=1))
    net.cast("float16")
    x = mx.nd.array(rng.randn(4, 3, 8, 8), dtype="float16")
    wanted = ready(net, x, rng)
    files = export_for_inference(net, str(tmp_path / "net"), fold=fold)
    got = gluon.SymbolBlock.imports(files[0], ["data"], files[1])(x)
    assert got.dtype == np.float16
    # A last bit of float16 is 1e-3 of the value.
    np.testing.assert_allclose(got.asnumpy(), wanted, rtol=2e-3, atol=2e-3)


def types_fit(files):
    """Infer the dtypes of a symbol and its parameters with plain MXNet."""
    types = {name[4:]: value.dtype for name, value in mx.nd.load(files[1]).items()}
    return mx.sym.load(files[0]).infer_type(data="float32", **types)[1]


@pytest.mark.parametrize("cast_optional_params", [False, True])
def test_after_mixed_precision(cast_optional_params, tmp_path, rng):
    net = sequence(nn.Dense(4), SyncBatchNorm(), nn.Dense(2))
    x = mx.nd.array(rng.randn(3, 5))
    wanted = ready(net, x, rng)
    half = amp.convert_hybrid_block(
        net, "float16", cast_optional_params=cast_optional_params, ctx=mx.cpu()
    )
    for fold in (False, True):
        files = export_for_inference(half, str(tmp_path / f"plain{fold}"), fold=fold)
        # MXNet leaves the cast of the output, to float32, which it is already.
        assert "amp_cast" not in operators(files[0])[:-1] and types_fit(files)
        got = gluon.SymbolBlock.imports(files[0], ["data"], files[1])(x).asnumpy()
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-3)  # weights were float16
        files = export_for_inference(
            half, str(tmp_path / f"half{fold}"), fold=fold, remove_amp_cast=False
        )
        assert "amp_cast" in operators(files[0])[:-1] and types_fit(files)
        weights = {v.dtype for n, v in mx.nd.load(files[1]).items() if n.endswith("weight")}
        assert weights == {np.float16 if cast_optional_params else np.float32}


def test_a_network_without_a_graph():
    net = of_any_kind()
    net.initialize()
    with pytest.raises(RuntimeError, match="call net.hybridize.. and then the network once"):
        export_for_inference(net, "nowhere")


def test_parameters_without_values(tmp_path):
    net = of_any_kind()
    net.hybridize()
    data = mx.sym.var("data")
    block = gluon.SymbolBlock(net(data), data, params=net.collect_params())
    with pytest.raises(RuntimeError, match="has parameters without values; initialize or load"):
        export_for_inference(block, str(tmp_path / "net"))
    assert not list(tmp_path.iterdir())


def test_a_loaded_file_needs_no_call(tmp_path, rng):
    x = mx.nd.array(rng.randn(4, 3, 8, 8))
    net = of_any_kind()
    wanted = ready(net, x, rng)
    net.export(str(tmp_path / "net"))
    loaded = gluon.SymbolBlock.imports(
        str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params")
    )
    files = export_for_inference(loaded, str(tmp_path / "plain"))
    got = gluon.SymbolBlock.imports(files[0], ["data"], files[1])(x)
    assert_close(got.asnumpy(), wanted)


class InALoop(gluon.HybridBlock):
    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.norm = SyncBatchNorm(in_channels=3)

    def hybrid_forward(self, F, x):
        return F.contrib.foreach(lambda d, s: (self.norm(d), s), x, F.zeros((1,)))[0]


def test_a_layer_in_a_loop_is_refused_and_nothing_is_written(tmp_path):
    net = InALoop()
    net.initialize()
    net.hybridize()
    net(mx.nd.ones((2, 4, 3)))
    with pytest.raises(ConversionError, match="_foreach.*its body contains .*_syncbn"):
        export_for_inference(net, str(tmp_path / "net"))
    assert not list(tmp_path.iterdir())


def test_a_gamma_of_two_minds(tmp_path, rng):
    """One layer uses it, one takes it as 1, and a third computes its own."""
    data, gamma = mx.sym.var("data"), mx.sym.var("gamma")
    x = mx.sym.BatchNorm(data, gamma=gamma, name="free", fix_gamma=False)
    x = mx.sym.BatchNorm(x, gamma=gamma, name="fixed", fix_gamma=True)
    x = mx.sym.BatchNorm(x, gamma=mx.sym.exp(gamma), name="computed", fix_gamma=False)
    net = gluon.SymbolBlock(x, data, params=None)
    net.initialize()
    batch = mx.nd.array(rng.randn(4, 3, 8))
    net(batch)
    randomize(net, rng)
    # (Running the layer with fix_gamma sets it to 1.)
    net.collect_params()["gamma"].set_data(mx.nd.array([2.0, 3.0, 4.0]))
    files = export_for_inference(net, str(tmp_path / "net"))
    values = mx.nd.load(files[1])
    assert values["arg:gamma"].asnumpy().tolist() == [2, 3, 4]
    assert values["arg:fixed_ones"].asnumpy().tolist() == [1, 1, 1]
    shapes = {"data": (4, 3, 8)}
    assert mx.sym.load(files[0]).infer_shape(**shapes)[1] == [(4, 3, 8)]


def test_not_a_network(tmp_path):
    with pytest.raises(TypeError, match="must be a HybridBlock, but is a Sequential"):
        export_for_inference(nn.Sequential(), str(tmp_path / "net"))


class Exchanging(gluon.HybridBlock):
    def hybrid_forward(self, F, x):
        return F.contrib.KeyBarrierSum(x, key="sums", num_devices=1, name="sums")


def test_an_exchange_cannot_be_exported_and_nothing_is_written(tmp_path):
    net = sequence(SyncBatchNorm(), Exchanging())
    net.initialize()
    net.hybridize()
    net(mx.nd.ones((2, 3)))
    with pytest.raises(ConversionError, match="sums .*plain MXNet has no such operator"):
        export_for_inference(net, str(tmp_path / "net"))
    assert not list(tmp_path.iterdir())


def test_parameters_that_do_not_fit_are_named_and_nothing_is_written(tmp_path, rng):
    net = of_any_kind()
    ready(net, mx.nd.array(rng.randn(4, 3, 8, 8)), rng)
    layer = net[1]
    layer.running_var._data = [mx.nd.ones(7)]  # as a damaged checkpoint would have it
    with pytest.raises(ConversionError, match=f"{layer.name}_fwd: .*running_var .7,"):
        export_for_inference(net, str(tmp_path / "net"))
    assert not list(tmp_path.iterdir())


OPSET = 13  # the latest that MXNet 1.9.1 writes, though it declares the latest of the onnx package


@contextlib.contextmanager
def opset(version):
    import onnx

    context = onnx.checker.DEFAULT_CONTEXT
    kept = context.opset_imports
    context.opset_imports = {"": version}
    try:
        with mock.patch("onnx.defs.onnx_opset_version", lambda: version):
            yield
    finally:
        context.opset_imports = kept


def run_onnx(path, x):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that weights are listed as inputs
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("make", [Branches, lambda: sequence(*of_any_kind()[:-1])])
def test_onnx(make, fold, tmp_path, rng):
    x = mx.nd.array(rng.randn(2, 3, 8, 8))
    net = make()
    wanted = ready(net, x, rng)
    for layer in net.collect_params(".*gamma").values():
        if layer.grad_req == "null":  # counts as 1, which MXNet's exporter ignores
            layer.set_data(mx.nd.full(layer.shape, 3.0))
    files = export_for_inference(net, str(tmp_path / "net"), fold=fold)
    path = str(tmp_path / "net.onnx")
    with opset(OPSET):
        mx.onnx.export_model(*files, [x.shape], np.float32, path)
    assert_close(run_onnx(path, x.asnumpy()), wanted)
