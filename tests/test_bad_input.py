"""Every mistake is a Python exception that says what to do, and the process goes on working."""

import os
import shutil

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import fresh_process
import gluon_syncbn
from gluon_syncbn import (
    DataParallelCriterion,
    DataParallelModel,
    ModelDataParallel,
    SyncBatchNorm,
    compatibility,
    parallel_backward,
)
from networks import convolutional, split


@pytest.fixture
def model(two):
    """A working model; after the test it must still work."""
    net = SyncBatchNorm()
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    yield model
    x = np.arange(12, dtype="float32").reshape(4, 3)
    with autograd.record():
        outs = model(split(x, two))
    parallel_backward(outs)
    got = np.concatenate([o.asnumpy() for o in outs])
    np.testing.assert_allclose(got, (x - x.mean(0)) / x.std(0), atol=1e-4)


def ones(context, shape=(2, 3), **kwargs):
    return mx.nd.ones(shape, ctx=context, **kwargs)


def test_input_on_an_unknown_context(model, two):
    with pytest.raises(ValueError, match=r"lies on cpu\(5\), which is not in ctx_list"):
        model([ones(two[0]), ones(mx.cpu(5))])


def test_input_on_a_repeated_context(model, two):
    with pytest.raises(ValueError, match=r"repeats cpu\(0\)"):
        model([ones(two[0]), ones(two[0])])


def test_inputs_that_belong_together_on_different_contexts(model, two):
    with pytest.raises(ValueError, match=r"entry 0 of argument 2 lies on cpu\(1\)"):
        model([ones(c) for c in two], [ones(c) for c in reversed(two)])


def test_lists_of_different_lengths(model, two):
    with pytest.raises(ValueError, match="argument 'label' has 1 entries"):
        model([ones(c) for c in two], label=[ones(two[0])])


def test_lists_with_arrays_in_some_entries_only(model, two):
    xs = [ones(c) for c in two]
    for value, entry in (([ones(two[0]), None], "1 is None"), ((3, ones(two[1])), "0 is 3")):
        with pytest.raises(TypeError, match=f"every entry of argument 2 .* but entry {entry}"):
            model(xs, value)
    with pytest.raises(TypeError, match="every entry of argument 'mask'.*left out of every list"):
        model(xs, mask=[ones(two[0]), []])
    with pytest.raises(TypeError, match="every entry of argument 1 .* but entry 1 is None"):
        model([ones(two[0]), None])
    with pytest.raises(TypeError, match="every entry of argument 2"):
        DataParallelCriterion(gluon.loss.L2Loss(), two)(xs, [None, ones(two[1])])
    with pytest.raises(ValueError, match=r"argument 2 is \[None, None\]: give None by itself"):
        model(xs, [None, None])


def test_batches_that_cannot_be_split(model, two):
    x, xs = ones(two[0]), [ones(c) for c in two]
    whole = DataParallelModel(model.module, two)
    for call in (
        lambda: whole(x, x, z=[ones(two[0], (3, 3))]),
        lambda: model(xs, x, z=ones(two[0], (3, 3))),
    ):
        with pytest.raises(ValueError, match=r"argument 'z' has 3 rows, but argument \d has 2"):
            call()
    with pytest.raises(ValueError, match="has 1 rows, too few for the 2 devices that argument 1"):
        model(xs, ones(two[0], (1, 3)))
    with mx.util.np_shape(True):
        with pytest.raises(ValueError, match="argument 2 has no rows"):
            whole(x, mx.nd.ones(()))


@pytest.mark.parametrize("attached", [True, False])
def test_batches_that_are_part_of_a_graph(attached, model, two):
    """Two backward passes through one graph at once end the process."""
    whole = DataParallelModel(model.module, two)
    before = nn.Dense(3, in_units=3)
    before.initialize()
    x = ones(two[0])
    if attached:
        x.attach_grad()
    with autograd.record():
        batch = x if attached else before(x)
        with pytest.raises(ValueError, match=r"argument 1 has a gradient attached.*detach\(\) it"):
            whole(batch)
        outs = whole(batch.detach())
    parallel_backward(outs)
    whole(batch)  # not recorded


def test_empty_list(model):
    with pytest.raises(ValueError, match="list of inputs is empty"):
        model([])
    with pytest.raises(ValueError, match="list of losses is empty"):
        parallel_backward([])


def test_no_list(model, two):
    with pytest.raises(TypeError, match="must be a list with one NDArray per device.*split_and"):
        model(ones(two[0]))
    with pytest.raises(TypeError, match="is missing"):
        model()
    with pytest.raises(TypeError, match="every entry of the first argument"):
        model([1, 2])
    with pytest.raises(TypeError, match="outputs must be a list with one entry per device"):
        DataParallelCriterion(gluon.loss.L2Loss(), two)(ones(two[0]), ones(two[0]))
    with pytest.raises(TypeError, match="losses must be a list"):
        parallel_backward(ones(two[0]))


def test_head_gradients_that_do_not_match(two):
    with pytest.raises(ValueError, match="2 losses, but 1 head"):
        parallel_backward([ones(c) for c in two], [ones(two[0])])


def test_contexts(two):
    net = nn.Dense(1)
    with pytest.raises(ValueError, match="ctx_list is empty"):
        ModelDataParallel(net, [])
    with pytest.raises(ValueError, match=r"ctx_list repeats cpu\(0\)"):
        ModelDataParallel(net, [two[0], two[0]])
    with pytest.raises(TypeError, match="'cpu', which is no context"):
        DataParallelCriterion(gluon.loss.L2Loss(), ["cpu"])


def test_a_network_that_is_none(two):
    with pytest.raises(TypeError, match="must be a gluon Block, or a callable.*, but is list"):
        ModelDataParallel(two, two)
    with pytest.raises(TypeError, match="must be a gluon Block, or a callable.*, but is function"):
        DataParallelModel(lambda x: x, two)
    with pytest.raises(TypeError, match="in a ModelDataParallel already; take its module"):
        ModelDataParallel(ModelDataParallel(nn.Dense(1), two), two)
    with pytest.raises(TypeError, match="loss must be callable, but is NoneType"):
        DataParallelCriterion(ctx_list=two)
    with pytest.raises(TypeError, match="two names of one argument"):
        DataParallelCriterion(gluon.loss.L2Loss(), two, module=gluon.loss.L2Loss())


def test_a_callable_whose_network_is_not_found(two):
    class Hidden:
        __slots__ = ("net",)

        def __call__(self, x):
            return self.net(x)

        def collect_params(self):
            return self.net.collect_params()

    hidden = Hidden()
    hidden.net = SyncBatchNorm(prefix="hidden_")
    with pytest.raises(TypeError, match="Hidden has the parameter hidden_gamma.* as an attribute"):
        ModelDataParallel(hidden, two)


def test_num_devices_that_contradicts_ctx_list(two):
    net = nn.HybridSequential()
    net.add(nn.Dense(2), SyncBatchNorm(num_devices=3, prefix="third_"))
    with pytest.raises(ValueError, match="third has num_devices=3, but ctx_list has 2 devices"):
        ModelDataParallel(net, two)
    ModelDataParallel(net, [*two, mx.cpu(2)])


def test_channel_counts_that_differ_between_devices(model, two):
    model([ones(c, (2, 3)) for c in two])  # else the device that comes first decides what is right
    with pytest.raises((mx.MXNetError, ValueError), match=r"\(?3,?\)?.*4|4.*3"):
        with autograd.record():
            model([ones(two[0], (2, 3)), ones(two[1], (2, 4))])


def test_channel_counts_that_differ_in_the_operators(two):
    means = [mx.nd.zeros(3 + i, ctx=c) for i, c in enumerate(two)]
    with autograd.train_mode():  # in inference nothing is exchanged
        statistics = [
            mx.nd._internal._syncbn_moments(ones(c, (2, 3 + i)))[1] for i, c in enumerate(two)
        ]
        totals = [
            mx.nd._internal._syncbn_sum(s, m, key="channels", num_devices=2)
            for s, m in zip(statistics, means)
        ]
    for total in totals:
        with pytest.raises(mx.MXNetError, match="same number of channels"):
            total.asnumpy()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hybridize", [False, True])
def test_integer_data(training, hybridize):
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    if hybridize:
        layer.hybridize()
    with autograd.record(train_mode=training):
        with pytest.raises(mx.MXNetError, match=r"x.astype\('float32'\)"):
            layer(mx.nd.ones((2, 3), dtype="int32"))
    layer(mx.nd.ones((2, 3))).wait_to_read()


@pytest.mark.parametrize("hybridize", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_integer_data_in_parallel(hybridize, warm, model, two):
    if hybridize:
        model.hybridize()
    if warm:
        model([ones(c) for c in two])
    with pytest.raises(mx.MXNetError, match=r"x.astype\('float32'\)"):
        with autograd.record():
            model([ones(c, dtype="int32") for c in two])


@pytest.mark.parametrize("axis", [2, -3])
def test_axis_out_of_range(axis):
    layer = SyncBatchNorm(axis=axis, in_channels=3)
    layer.initialize()
    for training in (True, False):
        with autograd.record(train_mode=training):
            with pytest.raises(mx.MXNetError, match=f"axis={axis} is out of range.*from -2 to 1"):
                layer(mx.nd.ones((2, 3)))


def test_one_dimension():
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    with pytest.raises(mx.MXNetError, match="2 or more dimensions.*expand_dims"):
        layer(mx.nd.ones(3))


def test_channels_that_the_layer_does_not_have():
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    with pytest.raises(mx.MXNetError, match="number of channels"):
        layer(mx.nd.ones((2, 4)))


def test_wrong_dtype_of_parameters():
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize()
    with pytest.raises(mx.MXNetError, match=r"cast\(\) on the block"):
        layer(mx.nd.ones((2, 3), dtype="float64"))


def test_uninitialized_network(two):
    model = ModelDataParallel(convolutional(), two)
    with pytest.raises(RuntimeError, match="initialize"):
        model([ones(c, (1, 3, 8, 8)) for c in two])


def test_parameters_that_cannot_be_put_on_all_contexts(two):
    net = SyncBatchNorm(in_channels=3)
    net.initialize(ctx=two[0])
    trainer = gluon.Trainer(net.collect_params(), "sgd")
    with autograd.record():
        y = net(ones(two[0]))
    y.backward()
    trainer.step(2)
    with pytest.raises(ValueError, match=r"made steps with \[cpu\(0\)\].*make a new Trainer"):
        ModelDataParallel(net, two)
    assert net.gamma.list_ctx() == two[:1]
    net.collect_params().reset_ctx(two)  # what the message says
    gluon.Trainer(net.collect_params(), "sgd")
    ModelDataParallel(net, two)
    sparse = gluon.contrib.nn.SparseEmbedding(3, 2)
    sparse.initialize(ctx=two[0])
    with pytest.raises(ValueError, match=r"row_sparse.*net.initialize\(ctx=ctx_list\)"):
        ModelDataParallel(sparse, two)


def test_unknown_keyword_argument(model, two):
    with pytest.raises(TypeError, match="wrong"):
        model([ones(c) for c in two], wrong=1)


@pytest.mark.parametrize("seconds", [0, -1, 1e-10, "soon", None, float("nan"), float("inf")])
def test_deadlines_that_are_none(seconds):
    with pytest.raises(ValueError, match="number of seconds from 0.001"):
        gluon_syncbn.set_timeout(seconds)
    assert gluon_syncbn.get_timeout() == 30


def test_deadline_from_the_environment():
    script = "import gluon_syncbn; print(gluon_syncbn.get_timeout())"
    for seconds, wanted in (("7.5", "7.5"), (None, "120.0")):
        done = fresh_process.run(script, GLUON_SYNCBN_TIMEOUT=seconds)
        assert done.stdout.strip() == wanted
    for seconds in ("soon", "1e-10"):
        done = fresh_process.run(script, status=1, GLUON_SYNCBN_TIMEOUT=seconds)
        assert "GLUON_SYNCBN_TIMEOUT must be a number of seconds from 0.001" in done.stderr


def test_naive_engine():
    script = """
import mxnet as mx, gluon_syncbn
from mxnet import autograd
layer = gluon_syncbn.SyncBatchNorm(in_channels=3)
layer.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
try:
    gluon_syncbn.ModelDataParallel(layer, [mx.cpu(0), mx.cpu(1)])
except RuntimeError as error:
    print(error)
try:
    mx.nd.contrib.KeyBarrierSum(mx.nd.ones(2), key="k", num_devices=2)
except mx.MXNetError as error:
    print(error)
model = gluon_syncbn.ModelDataParallel(layer, [mx.cpu(0)])
x = mx.nd.array([[1, 2, 3], [3, 4, 5]])
x.attach_grad()
with autograd.record():
    y, = model([x])
y.backward()
print(y.asnumpy().round(2).tolist())
"""
    done = fresh_process.run(script, MXNET_ENGINE_TYPE="NaiveEngine")
    assert done.stdout.count("unset MXNET_ENGINE_TYPE") == 2
    assert "[[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]" in done.stdout


def test_a_process_that_ends_while_a_device_waits_does_not_hang():
    script = """
import mxnet as mx, gluon_syncbn
y = mx.nd.contrib.KeyBarrierSum(mx.nd.ones(2), key="k", num_devices=2)
raise SystemExit(3)
"""
    done = fresh_process.run(script, status=3, GLUON_SYNCBN_TIMEOUT="100000")
    assert done.stderr == ""


def test_missing_library(tmp_path):
    package = os.path.dirname(gluon_syncbn.__file__)
    shutil.copytree(
        package, tmp_path / "gluon_syncbn", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    script = "import sys; sys.path.insert(0, sys.argv[1]); import gluon_syncbn"
    done = fresh_process.run(script, tmp_path, status=1)
    assert "ImportError" in done.stderr and '"make build"' in done.stderr
    (tmp_path / "gluon_syncbn" / "libgluon_syncbn.so").write_bytes(b"no library")
    done = fresh_process.run(script, tmp_path, status=1)
    assert "does not load" in done.stderr and '"make build"' in done.stderr


@pytest.mark.parametrize("version", [(3, 7, 9), (3, 12, 1), (2, 7, 18)])
def test_unsupported_python(version):
    with pytest.raises(ImportError, match=r"3\.8 to 3\.11"):
        compatibility.check_python(version)


@pytest.mark.parametrize("version", ["1.24.0", "1.26.4", "2.0.1", "2.1.0rc1"])
def test_unsupported_numpy(version):
    with pytest.raises(ImportError, match='pip install "numpy<1.24"'):
        compatibility.check_numpy(version)


@pytest.mark.parametrize("version", ["1.9.0", "1.8.0", "2.0.0"])
def test_unsupported_mxnet(version):
    with pytest.raises(ImportError, match="pip install mxnet==1.9.1"):
        compatibility.check_mxnet(version)


def test_supported_versions():
    for version in ((3, 8, 0), (3, 11, 7)):
        compatibility.check_python(version)
    for version in ("1.19.5", "1.23.5"):
        compatibility.check_numpy(version)
    compatibility.check_mxnet("1.9.1")


@pytest.mark.parametrize(
    "change, message",
    [
        ("import numpy; numpy.__version__ = '1.26.4'", 'pip install "numpy<1.24"'),
        ("import mxnet; mxnet.__version__ = '1.8.0'", "pip install mxnet==1.9.1"),
        ("import sys; sys.version_info = (3, 12, 0)", "3.8 to 3.11"),
        ("import sys; sys.modules['mxnet'] = None", "pip install mxnet==1.9.1"),
        ("import sys; sys.modules['numpy'] = None", 'pip install "numpy<1.24"'),
    ],
)
def test_the_checks_run_at_import(change, message):
    done = fresh_process.run(f"{change}\nimport gluon_syncbn", status=1)
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError"), done.stderr
    assert message in done.stderr
