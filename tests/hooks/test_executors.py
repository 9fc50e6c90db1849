"""Executors: mirrored operators, several CPU contexts in Module, and the order of passes."""

import json
import os
import pathlib
import threading

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.executor import Executor

import fresh_process
import gluon_syncbn
from gluon_syncbn import SyncBatchNorm, convert_symbol
from gluon_syncbn.hooks.executors import MIRROR_VARIABLE
from module_training import assert_same, fit, written

SHAPE = (3, 8, 8)


def head(x):
    x = mx.sym.FullyConnected(x, num_hidden=4, name="dense")
    return mx.sym.SoftmaxOutput(x, mx.sym.var("softmax_label"), name="softmax")


def plainly(x, i):
    return x


def layers(num_devices, between=plainly, count=4, prefix=""):
    """Convolution and normalization, several times, with something before each."""
    x = mx.sym.var("data")
    for i in range(count):
        x = between(x, i)
        x = mx.sym.Convolution(
            x, num_filter=6, kernel=(3, 3), no_bias=True, pad=(1, 1), name=f"{prefix}conv{i}"
        )
        x = SyncBatchNorm(num_devices=num_devices, prefix=f"{prefix}norm{i}_")(x)
        x = mx.sym.Activation(x, act_type="softrelu", name=f"{prefix}relu{i}")
    return head(x)


def dropout(x, i):
    return mx.sym.Dropout(x, p=0.5, name=f"drop{i}")


def converted(num_devices):
    x = mx.sym.Convolution(mx.sym.var("data"), num_filter=6, kernel=(3, 3), name="conv")
    x = convert_symbol(mx.sym.BatchNorm(x, fix_gamma=False, name="bn"), num_devices)
    return head(mx.sym.Activation(x, act_type="softrelu", name="relu"))


def batches(count=24, batch=8, seed=2):
    rng = np.random.RandomState(seed)
    data, labels = rng.randn(count, *SHAPE), rng.randint(0, 4, count)
    return mx.io.NDArrayIter(
        data.astype("float32"), labels.astype("float32"), batch, label_name="softmax_label"
    )


def contexts(devices):
    return [mx.cpu(i) for i in range(devices)]


def mirrored(executor):
    """The operators that an executor computes again in its backward pass."""
    found = set()
    for line in executor.debug_str().splitlines():
        if line.startswith("Op:") and line.endswith("_mirror"):
            found.add(line.split("Op:")[1].split(",")[0])
    return found


# --- mirroring ---


@pytest.fixture
def mirror(monkeypatch):
    def switch(on):
        monkeypatch.setenv(MIRROR_VARIABLE, "1" if on else "0")

    return switch


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("make", [written, converted])
def test_statistics_move_once_in_mirrored_graphs(make, devices, mirror):
    mirror(False)
    wanted = fit(make(devices), devices, epochs=1)
    mirror(True)
    assert_same(fit(make(devices), devices, epochs=1), wanted)
    assert os.environ[MIRROR_VARIABLE] == "1"


@mx.operator.register("syncbn_test_twice")
class Twice(mx.operator.CustomOpProp):
    """Takes no keyword argument: an attribute of the node would be one."""

    def create_operator(self, ctx, shapes, dtypes):
        class Operator(mx.operator.CustomOp):
            def forward(self, is_train, req, in_data, out_data, aux):
                self.assign(out_data[0], req[0], in_data[0] * 2)

            def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
                self.assign(in_grad[0], req[0], out_grad[0] * 2)

        return Operator()


def run_mirrored():
    """Run in a fresh process: MXNet ends it if a Custom operator cannot be made."""
    x = mx.sym.Custom(mx.sym.var("data"), op_type="syncbn_test_twice")
    executor = SyncBatchNorm(num_devices=1, prefix="alone_")(x).simple_bind(mx.cpu(), data=(2, 3))
    executor.forward(is_train=True)
    executor.backward(mx.nd.ones((2, 3)))
    mx.nd.waitall()
    found = fit(written(2), 2, epochs=1)
    print(json.dumps({name: array.tolist() for name, array in found.items()}))


def test_mirroring_in_a_fresh_process():
    """As users have it: the variable is set before MXNet is imported."""
    script = "import sys; sys.path.append(sys.argv[1]); import test_executors as tests"
    here = pathlib.Path(__file__).parent
    done = fresh_process.run(f"{script}; tests.run_mirrored()", here, **{MIRROR_VARIABLE: "1"})
    got = {k: np.array(v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    assert_same(got, fit(written(2), 2, epochs=1))


def test_what_is_mirrored(mirror):
    """What MXNet would mirror, less our operators, so it still saves that memory."""
    x = mx.sym.Convolution(mx.sym.var("data"), num_filter=4, kernel=(3, 3), name="conv")
    x = mx.sym.Activation(SyncBatchNorm(num_devices=2, prefix="norm_")(x), act_type="softrelu")
    x = mx.sym.Dropout(x * 2, p=0.5)
    x = mx.sym.contrib.KeyBarrierSum(x, key="mirrored", num_devices=2)
    sym = mx.sym.Activation(SyncBatchNorm(num_devices=1, prefix="alone_")(x), act_type="softrelu")
    names = sym.list_arguments(), sym.list_auxiliary_states(), sym.list_outputs()

    def bound():
        return sym.simple_bind(mx.cpu(), data=(2, *SHAPE))

    mirror(False)
    assert not mirrored(bound())
    mirror(True)
    executor = bound()
    assert mirrored(executor) == {"Activation", "_mul_scalar"}
    bound_to = executor._symbol
    assert names == (
        bound_to.list_arguments(),
        bound_to.list_auxiliary_states(),
        bound_to.list_outputs(),
    )
    assert mirrored(executor.reshape(data=(4, *SHAPE), allow_up_sizing=True)) == mirrored(executor)
    plain = mx.sym.BatchNorm(mx.sym.var("data"), name="bn") * 2
    assert "BatchNorm" in mirrored(plain.simple_bind(mx.cpu(), data=(2, *SHAPE)))


def test_mirroring_by_attribute():
    """The attribute is set on all nodes, ours included."""
    with mx.AttrScope(force_mirroring="True"):
        sym = layers(1, count=2)
    executor = sym.simple_bind(mx.cpu(), data=(2, *SHAPE))
    assert "Activation" in mirrored(executor) and not any("syncbn" in o for o in mirrored(executor))
    assert_same(fit(sym, 1, epochs=1), fit(layers(1, count=2), 1, epochs=1))


@pytest.mark.parametrize("hybridize", [{}, {"static_alloc": True, "static_shape": True}])
def test_gluon_does_not_mirror(hybridize, mirror):
    mirror(True)
    layer = SyncBatchNorm(num_devices=1)
    layer.initialize()
    layer.hybridize(**hybridize)
    with autograd.record():
        y = layer(mx.nd.ones((2, 3)))
    y.backward()
    mx.nd.waitall()
    np.testing.assert_allclose(layer.running_mean.data().asnumpy(), 0.1, rtol=1e-6)


# --- several CPU contexts ---


def seed(number=1):
    mx.random.seed(number)
    np.random.seed(number)


def bound(sym, devices, **options):
    seed()
    module = mx.mod.Module(sym, context=contexts(devices))
    module.bind(batches().provide_data, batches().provide_label, **options)
    module.init_params(mx.init.Xavier())
    module.init_optimizer(optimizer_params={"learning_rate": 0.05})
    return module


def trained(sym, devices=2, number=1, **options):
    seed(number)
    module = mx.mod.Module(sym, context=contexts(devices))
    module.fit(batches(), num_epoch=2, initializer=mx.init.Xavier(), **options)
    return module


def step(module, batch):
    module.forward_backward(batch)
    module.update()


def values(module):
    found, moving = module.get_params()
    return {k: v.asnumpy() for k, v in {**found, **moving}.items()}


def test_dropout_between_layers():
    """It holds random state, and convolutions temporary space, of the thread that binds them."""
    got = [values(trained(layers(2, dropout), number=n)) for n in (1, 1, 2)]
    assert_same(got[0], got[1])
    with pytest.raises(AssertionError):
        assert_same(got[0], got[2])


def test_dropout_differs_between_devices():
    x = mx.sym.Dropout(mx.sym.var("data"), p=0.5, name="dropout")
    sym = mx.sym.Group([SyncBatchNorm(num_devices=2, prefix="norm_")(x), mx.sym.BlockGrad(x)])
    module = mx.mod.Module(sym, label_names=None, context=contexts(2))
    module.bind([("data", (8, 64))])
    module.init_params()

    def masks(number):
        mx.random.seed(number)
        module.forward(mx.io.DataBatch([mx.nd.ones((8, 64))]), is_train=True)
        return [a.asnumpy() for a in module.get_outputs(merge_multi_context=False)[1]]

    first, again, other = masks(7), masks(7), masks(8)
    assert set(np.unique(first)) == {0, 2} and (first[0] != first[1]).any()
    assert all((a == b).all() for a, b in zip(first, again))
    assert all((a != b).any() for a, b in zip(first, other))


def test_a_monitor():
    """It pushes operators of its own between those of the network."""
    monitor = mx.mon.Monitor(1, pattern=".*norm.*output|.*weight")
    module = trained(layers(2), monitor=monitor)
    assert_same(values(module), values(trained(layers(1), 1)))
    monitor.tic()
    module.forward_backward(next(batches()))
    names = [name for _, name, _ in monitor.toc()]
    assert names.count("norm0_fwd_output") == names.count("conv0_weight") == 2


def test_predict_and_score_and_a_checkpoint(tmp_path):
    prefix = str(tmp_path / "net")
    module = trained(layers(2, dropout))
    module.save_checkpoint(prefix, 1, save_optimizer_states=True)
    again = mx.mod.Module.load(prefix, 1, True, context=contexts(2))
    again.bind(batches().provide_data, batches().provide_label)
    again.init_optimizer()
    step(again, next(batches()))
    alone = mx.mod.Module.load(prefix, 1, context=mx.cpu())
    alone.bind(batches().provide_data, batches().provide_label, for_training=False)
    wanted = alone.predict(batches(22)).asnumpy()  # the last batch is padded
    np.testing.assert_allclose(module.predict(batches(22)).asnumpy(), wanted, atol=1e-5)
    assert module.score(batches(), "acc") == alone.score(batches(), "acc")


def test_another_batch_size():
    """Module then binds its executors anew (reshape)."""
    results = []
    for devices in (2, 1):
        module = bound(layers(devices), devices)
        for batch in (8, 6, 8):
            step(module, next(batches(batch=batch)))
        results.append(values(module))
    assert_same(*results)
    module = bound(layers(2, dropout), 2)
    for batch in (8, 6, 8):
        step(module, next(batches(batch=batch)))
    values(module)


def test_gradients_of_the_inputs():
    results = []
    for devices in (2, 1):
        module = bound(layers(devices), devices, inputs_need_grad=True)
        module.forward_backward(next(batches()))
        results.append(module.get_input_grads()[0].asnumpy())
    np.testing.assert_allclose(*results, atol=1e-6)


def test_gradients_from_outside():
    """Of outputs that are no loss."""
    results = []
    for devices in (2, 1):
        sym = layers(devices).get_internals()["relu3_output"]
        seed()
        module = mx.mod.Module(sym, label_names=None, context=contexts(devices))
        module.bind(batches().provide_data)
        module.init_params(mx.init.Xavier())
        module.init_optimizer()
        module.forward(next(batches()), is_train=True)
        module.backward([mx.nd.random.normal(shape=(8, 6, 8, 8))])
        module.update()
        results.append(values(module))
    assert_same(*results)


def trained_in_buckets(devices, between):
    def network(size):
        x = layers(devices, between).get_internals()["relu3_output"]
        sym = head(mx.sym.Pooling(x, global_pool=True, pool_type="avg"))
        return sym, ("data",), ("softmax_label",)

    seed()
    module = mx.mod.BucketingModule(network, 8, context=contexts(devices))
    module.bind([("data", (8, *SHAPE))], [("softmax_label", (8,))])
    module.init_params(mx.init.Xavier())
    module.init_optimizer()
    for i, size in enumerate((8, 6, 8, 7, 6)):
        batch = next(batches(seed=i))
        batch.data = [batch.data[0][:, :, :size]]
        batch.bucket_key = size
        batch.provide_data = [("data", batch.data[0].shape)]
        batch.provide_label = [("softmax_label", (8,))]
        step(module, batch)
    return values(module)


def test_buckets():
    """Their executors share memory."""
    assert_same(trained_in_buckets(2, plainly), trained_in_buckets(1, plainly))
    trained_in_buckets(2, dropout)


def trained_in_a_row(devices, between):
    seed()
    first = layers(devices, between).get_internals()["relu3_output"]
    second = layers(devices, between, prefix="second_")
    module = mx.mod.SequentialModule()
    module.add(mx.mod.Module(first, label_names=None, context=contexts(devices)))
    module.add(mx.mod.Module(second, context=contexts(devices)), take_labels=True, auto_wiring=True)
    module.fit(batches(), num_epoch=1, initializer=mx.init.Xavier())
    return values(module)


def test_modules_in_a_row():
    assert_same(trained_in_a_row(2, plainly), trained_in_a_row(1, plainly))
    trained_in_a_row(2, dropout)


def bound_by_hand(sym):
    shapes, _, states = sym.infer_shape(data=(4, *SHAPE))
    return [
        sym.bind(
            device,
            [mx.nd.random.normal(shape=s, ctx=device) for s in shapes],
            args_grad=[mx.nd.zeros(s, device) for s in shapes],
            aux_states=[mx.nd.ones(s, device) for s in states],
        )
        for device in contexts(2)
    ]


def test_executors_of_ones_own():
    executors = bound_by_hand(layers(2, dropout))
    for executor in executors:
        executor.forward(is_train=True)
    for executor in executors:
        executor.backward()
    mx.nd.waitall()
    states = [[a.asnumpy() for a in executor.aux_arrays] for executor in executors]
    assert all((a == b).all() and (a != 1).any() for a, b in zip(*states))


# --- the order of passes ---


@pytest.mark.parametrize("devices", [1, 2])
def test_statistics_are_read_after_the_step(devices):
    """Without waiting for anything in between."""
    large = mx.io.DataBatch([mx.nd.random.normal(shape=(64, *SHAPE))], [mx.nd.zeros((64,))])
    for _ in range(5):
        module = bound(layers(devices), devices)
        module.reshape([("data", (64, *SHAPE))], [("softmax_label", (64,))])
        step(module, large)
        states = [state for states in module._exec_group.aux_arrays for state in states]
        at_once = [state.copy() for state in states]
        mx.nd.waitall()
        for read, state in zip(at_once, states):
            np.testing.assert_array_equal(read.asnumpy(), state.asnumpy())


@pytest.mark.parametrize("devices", [1, 2])
def test_inference_right_after_training(devices):
    """MXNet keeps one flag for all runs of an executor, which says whether it trains."""
    large = mx.io.DataBatch([mx.nd.random.normal(shape=(64, *SHAPE))], [mx.nd.zeros((64,))])
    results = []
    for wait in (mx.nd.waitall, lambda: None):
        module = bound(layers(devices), devices)
        module.reshape([("data", (64, *SHAPE))], [("softmax_label", (64,))])
        for _ in range(3):
            step(module, large)
            wait()
            module.forward(large, is_train=False)
            wait()
        results.append([module.get_outputs()[0].asnumpy(), values(module)])
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-6)
    assert_same(results[0][1], results[1][1])


def test_a_device_that_does_not_come():
    """It is an error on the other, and the next step works."""
    executors = bound_by_hand(layers(2))
    gluon_syncbn.set_timeout(0.5)
    (output,) = executors[0].forward(is_train=True)
    with pytest.raises(mx.MXNetError, match="not every device came"):
        output.wait_to_read()
    gluon_syncbn.set_timeout(30)
    for executor in executors:
        executor.forward(is_train=True)
    for executor in executors:
        executor.backward()
    mx.nd.waitall()
    for executor in executors:
        assert all(np.isfinite(a.asnumpy()).all() for a in executor.aux_arrays)


# --- what stays as it is ---


def test_other_symbols_are_left_alone():
    plain = mx.sym.FullyConnected(mx.sym.var("data"), num_hidden=2, name="dense")
    for executor in (
        plain.simple_bind(ctx=mx.cpu(), data=(2, 3)),
        plain.bind(mx.cpu(), [mx.nd.ones(s) for s in ((2, 3), (2, 3), (2,))]),
    ):
        assert type(executor) is Executor and executor._symbol.tojson() == plain.tojson()


@pytest.mark.parametrize("num_devices, own", [(1, False), (2, True)])
def test_which_thread_runs_an_executor(num_devices, own):
    """The caller's, unless layers are synchronized."""
    threads = set()
    executor = layers(num_devices).simple_bind(mx.cpu(), data=(2, *SHAPE))
    executor.set_monitor_callback(lambda *_: threads.add(threading.current_thread()))
    executor.forward(is_train=False)
    assert len(threads) == 1 and (threading.current_thread() not in threads) == own


def test_errors_of_binding_come_through():
    sym = SyncBatchNorm(num_devices=2, prefix="norm_")(mx.sym.var("data"))
    with pytest.raises(RuntimeError, match="2 or more dimensions"):
        sym.simple_bind(mx.cpu(), data=(3,))
    with pytest.raises(ValueError, match="Length of args"):
        layers(2).bind(mx.cpu(), [])
