"""Mixed precision: cast('float16'), and MXNet's amp, before and after our import.

``amp.init`` changes a process for good, so what calls it runs in one of its own.  On the CPU MXNet
has no float16 convolution or dense layer (nor, without AVX-512, bfloat16 ones), so there only tanh
is made to run in the low precision.
"""

import collections
import json

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.contrib import amp
from mxnet.contrib.amp import lists

import fresh_process
import gluon_syncbn
from gluon_syncbn.library import OPERATORS

DTYPES = ("float16", "bfloat16")
CASTS = {  # of the lists, those that cast to float32
    "float16": {"_contrib_KeyBarrierSum"},
    "bfloat16": {
        "_contrib_KeyBarrierSum",
        "_syncbn_moments",
        "_syncbn_batch_norm",
        "_syncbn_mabn_moments",
    },
}


def all_lists(dtype):
    module, low = {
        "float16": (lists.symbol_fp16, "FP16"),
        "bfloat16": (lists.symbol_bf16, "BF16"),
    }[dtype]
    names = [f"{low}_FUNCS", f"{low}_FP32_FUNCS", "FP32_FUNCS", "WIDEST_TYPE_CASTS"]
    names += ["LOSS_OUTPUT_FUNCTIONS"]
    plain = {name: list(getattr(module, name)) for name in names}
    return {**plain, "conditional": [entry[0] for entry in module.CONDITIONAL_FP32_FUNCS]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operator_is_on_one_list(dtype):
    count = collections.Counter(name for names in all_lists(dtype).values() for name in names)
    assert {operator: count[operator] for operator in OPERATORS} == dict.fromkeys(OPERATORS, 1)
    assert CASTS[dtype] == set(OPERATORS) & set(all_lists(dtype)["FP32_FUNCS"])


def network(**options):
    net = gluon.nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(
            gluon.nn.Conv2D(4, 3),
            gluon_syncbn.SyncBatchNorm(**options),
            gluon.nn.HybridLambda("tanh"),
            gluon_syncbn.SyncBatchNorm(**options),
            gluon.nn.Dense(3),
        )
    net.initialize(mx.init.Xavier())
    net.hybridize()
    net(mx.nd.zeros((2, 3, 6, 6)))
    return net


# Three ways through a layer: the exchange, a device alone, the moving statistics.
WAYS = ({}, {"num_devices": 1}, {"use_global_stats": True})


def producer(nodes, node, number=0):
    return nodes[node["inputs"][number][0]]


@pytest.mark.parametrize("cast_optional_params", (False, True))
@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_convert_model_casts_what_the_lists_say(tmp_path, dtype, options, cast_optional_params):
    network(**options).export(str(tmp_path / "net"))
    symbol, args, auxes = mx.model.load_checkpoint(str(tmp_path / "net"), 0)
    symbol, args, auxes = amp.convert_model(
        symbol, args, auxes, target_dtype=dtype, cast_optional_params=cast_optional_params
    )
    nodes = json.loads(symbol.tojson(remove_amp_cast=False))["nodes"]
    layers = [n for n in nodes if n["op"] in ("_syncbn_moments", "_syncbn_batch_norm")]
    assert len(layers) == 2
    first = producer(nodes, layers[0])
    if dtype == "float16":
        assert first["op"] == "Convolution"  # whose output is float16
    else:
        assert (first["op"], first["attrs"]["dtype"]) == ("amp_cast", "float32")
        assert producer(nodes, first)["op"] == "Convolution"
    for node in nodes:  # nothing else of ours is cast
        if node["op"] in OPERATORS:
            casts = [producer(nodes, node, i)["op"] for i in range(1, len(node["inputs"]))]
            assert "amp_cast" not in casts, node["name"]
    types = {name: np.dtype(value.dtype) for name, value in {**args, **auxes}.items()}
    ours = {name: t for name, t in types.items() if "batchnorm" in name}
    assert len(ours) == 8 and set(ours.values()) == {np.dtype("float32")}
    out_types = symbol.infer_type(data="float32")[1]
    assert out_types == [np.float32]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_converted_block_computes_the_same(tmp_path, dtype, options):
    net = network(**options)
    x = mx.nd.random.normal(shape=(2, 3, 6, 6))
    with mx.autograd.record():  # moves the moving statistics
        net(x)
    expected = net(x)
    # Only tanh in the low precision.  Lists of one's own must name our operators as well.
    converted = amp.convert_hybrid_block(
        net,
        dtype,
        target_dtype_ops=["tanh"],
        fp32_ops=["Convolution", "FullyConnected", *CASTS[dtype]],
        ctx=mx.cpu(),
    )
    limit = {"float16": 2e-3, "bfloat16": 2e-2}[dtype]
    assert 0 < (converted(x) - expected).abs().max().asscalar() < limit
    imported = reimport(converted, tmp_path)  # MXNet writes parameters only after a first call
    assert (imported(x) - converted(x)).abs().max().asscalar() == 0


def reimport(block, tmp_path):
    block.export(str(tmp_path / "converted"), remove_amp_cast=False)
    return gluon.SymbolBlock.imports(
        str(tmp_path / "converted-symbol.json"), ["data"], str(tmp_path / "converted-0000.params")
    )


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_cast_keeps_float32_parameters(tmp_path, options):
    layer = gluon_syncbn.SyncBatchNorm(in_channels=4, **options)
    layer.initialize()
    layer.hybridize()
    x = mx.nd.random.normal(shape=(5, 4, 3))
    layer(x)
    layer.export(str(tmp_path / "layer"))
    imported = gluon.SymbolBlock.imports(
        str(tmp_path / "layer-symbol.json"), ["data"], str(tmp_path / "layer-0000.params")
    )
    with mx.autograd.record():
        expected = layer(x)
    for block in (layer, imported):
        block.cast("float16")
        assert {p.dtype for p in block.collect_params().values()} <= {"float32", np.float32}
        with mx.autograd.record():
            out = block(x.astype("float16"))
        assert out.dtype == np.float16
        np.testing.assert_allclose(out.asnumpy(), expected.asnumpy(), atol=3e-3)


# One process each: argv is "before", "after" or "never" amp.init, dtype.
SCRIPT = """
import json, sys
import mxnet as mx, numpy as np
from mxnet import autograd, gluon
from mxnet.contrib import amp

when, dtype = sys.argv[1:]
if when == "before":
    amp.init(dtype, target_precision_ops=["tanh"])
import gluon_syncbn as g
if when == "after":
    amp.init(dtype, target_precision_ops=["tanh"])

class Float32(gluon.HybridBlock):  # on the CPU, amp casts no float16 array back
    def hybrid_forward(self, F, x):
        return F.cast(x, dtype="float32")

def train(hybrid, options, scale=10):
    mx.random.seed(1)
    net = gluon.nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(gluon.nn.Dense(16, in_units=6), gluon.nn.HybridLambda("tanh"),
                g.SyncBatchNorm(in_channels=16, **options), Float32(),
                gluon.nn.Dense(3, in_units=16))
    ctx = [mx.cpu(0), mx.cpu(1)]
    net.initialize(mx.init.Xavier(), ctx=ctx)
    if hybrid:
        net.hybridize()
    model = g.ModelDataParallel(net, ctx)
    criterion = g.DataParallelCriterion(gluon.loss.SoftmaxCrossEntropyLoss(), ctx)
    # With the update on the kvstore, amp's check for overflow comes after it.
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.5},
                            update_on_kvstore=False)
    if when != "never":
        amp.init_trainer(trainer)
        scaler = trainer._amp_loss_scaler
        scaler._loss_scale = scaler._next_loss_scale = 2.0**scale
    random, losses = np.random.RandomState(2), []
    x = random.normal(size=(12, 6))
    y = x[:, :3].argmax(axis=1)
    xs = [mx.nd.array(x[:4], ctx[0]), mx.nd.array(x[4:], ctx[1])]
    ys = [mx.nd.array(y[:4], ctx[0]), mx.nd.array(y[4:], ctx[1])]
    for _ in range(12):
        with autograd.record():
            loss = criterion(model(xs), ys)
            if when == "never":
                g.parallel_backward(loss)
            else:
                with amp.scale_loss(loss, trainer) as scaled:
                    g.parallel_backward(scaled)
        trainer.step(12)
        losses.append(sum(float(part.sum().asscalar()) for part in loss) / 12)
    parameters = {k: v.data(ctx[0]) for k, v in net.collect_params().items()}
    assert {v.dtype for v in parameters.values()} == {np.float32}
    return losses, {k: v.asnumpy().tolist() for k, v in parameters.items() if "running" in k}

def casts(symbol):
    nodes = json.loads(symbol.tojson(remove_amp_cast=False))["nodes"]
    node = [n for n in nodes if n["op"] not in ("null", "amp_cast")][-1]
    return [nodes[i[0]]["attrs"]["dtype"] for i in node["inputs"]
            if nodes[i[0]]["op"] == "amp_cast"]

x = mx.sym.var("x")
data = {
    "trained": [train(hybrid, options) for options in ({}, {"use_global_stats": True})
                for hybrid in (False, True)],
    "overflowed": train(True, {}, 16)[0],
    "KeyBarrierSum": casts(mx.sym.contrib.KeyBarrierSum(x, key="k", num_devices=1)),
    "moments": casts(mx.sym._internal._syncbn_moments(x)[0]),
    "normalize": casts(mx.sym._internal._syncbn_normalize(x)),
    "float64": np.dtype(mx.nd.contrib.KeyBarrierSum(
        mx.nd.zeros(3, dtype="float64"), key="k", num_devices=1).dtype).name,
    # wrapped once: ours, and what takes the widest type
    "depth": [sum(n["op"].startswith("amp_") for n in json.loads(
        s.tojson(remove_amp_cast=False))["nodes"])
        for s in (mx.sym.contrib.KeyBarrierSum(x, key="k", num_devices=1),
                  mx.sym.elemwise_add(x, mx.sym.var("y")))],
}
print(json.dumps(data))
"""


def run(when, dtype="none"):
    done = fresh_process.run(
        SCRIPT, when, dtype, timeout=300, GLUON_SYNCBN_TIMEOUT="20", OMP_NUM_THREADS="1"
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def in_float32():
    return run("never")


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_amp_init(dtype, when, in_float32):
    found = run(when, dtype)
    assert found["KeyBarrierSum"] == ["float32"]
    assert found["moments"] == (["float32"] if dtype == "bfloat16" else [])
    assert found["normalize"] == []
    assert found["float64"] == "float64"
    assert found["depth"] == [1, 1]
    for (losses, moving), (expected_losses, expected) in zip(
        found["trained"], in_float32["trained"]
    ):
        assert losses[-1] < 0.5 * losses[0]
        np.testing.assert_allclose(losses, expected_losses, rtol=0.05)
        for name, value in expected.items():
            np.testing.assert_allclose(moving[name], value, rtol=0.05, atol=0.01)
            # (with use_global_stats they stay as they are)
        assert losses != expected_losses
    # At amp's first scale, float16 gradients overflow: steps are skipped until it is small enough.
    skipped = found["overflowed"].count(found["overflowed"][0]) - 1
    assert (skipped > 0) == (dtype == "float16")
    expected_losses = in_float32["overflowed"][: 12 - skipped]
    np.testing.assert_allclose(found["overflowed"][skipped:], expected_losses, rtol=0.05)
