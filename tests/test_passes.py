"""Passes: which calls are reduced together, and when their statistics can be read."""

import threading
import warnings

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluon_syncbn
from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward, passes
from held import held
from networks import MODES, STATIC, Branches, convolutional, split


def initialized(net, contexts, hybridize=None):
    net.initialize(mx.init.Xavier(), ctx=contexts)
    if hybridize is not None:
        net.hybridize(**hybridize)
    return ModelDataParallel(net, contexts)


def normalized(x):
    return (x - x.mean(0)) / x.std(0)


def concatenated(outs):
    return np.concatenate([out.asnumpy() for out in outs])


def statistics(net, contexts):
    return [
        [p.data(c).asnumpy() for c in contexts] for p in net.collect_params(".*running").values()
    ]


def is_normalized(outs, x):
    np.testing.assert_allclose(concatenated(outs), normalized(x), atol=1e-3)


@pytest.mark.parametrize("hybridize", MODES)
def test_statistics_read_after_a_pass_are_those_that_it_wrote(hybridize, two, rng):
    """As Trainer does in its first step: it broadcasts those of the first device."""
    net = SyncBatchNorm(in_channels=3)
    model = initialized(net, two, hybridize)
    x = rng.randn(6, 3).astype("float32") + 5
    parts = split(x, two)
    with held(parts[0]) as late:
        with autograd.record():
            model([late, parts[1]])
        copies = [net.running_mean.data(c).copy() for c in two]
    for copied in copies:
        np.testing.assert_allclose(copied.asnumpy(), 0.1 * x.mean(0), rtol=1e-4)


@pytest.mark.parametrize("hybridize", [{"static_alloc": True}, STATIC])
def test_the_first_step_moves_the_statistics_of_branches(hybridize, two, rng):
    x = rng.randn(4, 3, 20, 20).astype("float32")

    def step(hybridize):
        mx.random.seed(3)
        np.random.seed(3)
        net = Branches()
        model = initialized(net, two, hybridize)
        trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.01})
        with autograd.record():
            losses = [out.sum() for out in model(split(x, two))]
        parallel_backward(losses)
        trainer.step(4)
        return np.concatenate([array for arrays in statistics(net, two) for array in arrays])

    wanted = step(None)
    for _ in range(5):
        np.testing.assert_allclose(step(hybridize), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hybridize", MODES)
def test_passes_do_not_mix_though_a_later_one_is_ready_first(hybridize, two, rng):
    net = SyncBatchNorm(in_channels=3)
    model = initialized(net, two, hybridize)
    xs = [rng.randn(6, 3).astype("float32") * scale for scale in (1, 100)]
    parts = [split(x, two) for x in xs]
    with held(parts[0][0]) as late:
        with autograd.record():
            first = model([late, parts[0][1]])
            second = model(parts[1])
    is_normalized(first, xs[0])
    is_normalized(second, xs[1])
    parallel_backward([list(pair) for pair in zip(first, second)])
    wanted = 0.1 * xs[0].mean(0) * 0.9 + 0.1 * xs[1].mean(0)
    for context in two:
        got = net.running_mean.data(context).asnumpy()
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


def test_a_first_call_disturbs_no_other_network(rng):
    """Another thread trains while a network is called for the first time."""
    contexts = [[mx.cpu(0), mx.cpu(1)], [mx.cpu(2), mx.cpu(3)]]
    trained = initialized(SyncBatchNorm(in_channels=3), contexts[0])
    x = rng.randn(6, 3).astype("float32")
    outs = []

    def step():
        with autograd.record():
            outs.append(trained(split(x, contexts[0])))

    class Slow(gluon.Block):
        def forward(self, data):
            if not outs:
                thread = threading.Thread(target=step)
                thread.start()
                thread.join(60)
            return data

    net = nn.Sequential()
    net.add(Slow(), nn.Dense(2), SyncBatchNorm())
    with autograd.record():
        initialized(net, contexts[1])(split(x, contexts[1]))
    assert outs
    for out in outs:
        is_normalized(out, x)


def test_a_backward_that_fails_ends_no_exchange_of_another_thread(rng):
    contexts = [[mx.cpu(0), mx.cpu(1)], [mx.cpu(2), mx.cpu(3)]]
    model = initialized(SyncBatchNorm(in_channels=3), contexts[0])
    x = rng.randn(6, 3).astype("float32")
    parts = split(x, contexts[0])
    outs = []
    with held(parts[1]) as late:

        def step():
            with autograd.record():
                outs.extend(model([parts[0], late]))

        thread = threading.Thread(target=step)
        thread.start()
        thread.join(60)
        other = initialized(SyncBatchNorm(in_channels=3), contexts[1])
        with autograd.record():
            good, _ = other(split(x, contexts[1]))
        unrecorded = mx.nd.ones(1, ctx=contexts[1][1])
        failed = threading.Event()

        def fail():  # it waits for everything pending, including what is held here
            with pytest.raises(mx.MXNetError):
                parallel_backward([good, unrecorded])
            failed.set()

        # `good` was recorded by this thread, so only passes of this thread can be aborted.
        thread = threading.Thread(target=fail)
        thread.start()
        assert not failed.wait(0.5)
    thread.join(60)
    assert failed.is_set()
    is_normalized(outs, x)


class InAList(gluon.Block):
    """Layers that Gluon does not know of."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("where", ["list", "closure"])
@pytest.mark.parametrize("hybridize", MODES)
def test_layers_that_gluon_does_not_know_of_are_synchronized(where, hybridize, two, rng):
    layer = SyncBatchNorm(in_channels=3)
    layer.initialize(ctx=two)
    if hybridize is not None:
        layer.hybridize(**hybridize)
    net = InAList([layer]) if where == "list" else nn.Lambda(lambda x: layer(x))
    model = ModelDataParallel(net, two)
    for contexts in (two, two[1:], two):
        x = rng.randn(6, 3).astype("float32")
        with autograd.record():
            outs = model(split(x, contexts))
        is_normalized(outs, x)
        first, second = (layer.running_mean.data(c).asnumpy() for c in two)
        np.testing.assert_array_equal(first, second)


def test_a_layer_of_another_number_of_devices_is_named_where_it_runs(two):
    layer = SyncBatchNorm(in_channels=3, num_devices=3)
    layer.initialize(ctx=two)
    model = ModelDataParallel(InAList([layer]), two)
    with pytest.raises(ValueError, match=f"{layer.name} has num_devices=3, but ctx_list has 2"):
        with autograd.record():
            model([mx.nd.ones((2, 3), ctx=c) for c in two])


@pytest.mark.parametrize("hybridize", MODES)
def test_a_loop_over_devices_without_num_devices_is_warned_of_once(hybridize, two, monkeypatch):
    def loop(net):
        for context in two:
            with autograd.record():
                net(mx.nd.ones((2, 3), ctx=context)).asnumpy()

    monkeypatch.setattr(passes, "_warned", False)
    told, untold = SyncBatchNorm(num_devices=1, in_channels=3), SyncBatchNorm(in_channels=3)
    for net in (told, untold):
        net.initialize(ctx=two)
        if hybridize is not None:
            net.hybridize(**hybridize)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(told)
        with autograd.record():
            ModelDataParallel(untold, two)([mx.nd.ones((2, 3), ctx=c) for c in two])
    with pytest.warns(UserWarning, match=f"{untold.name} is on 2 devices") as caught:
        loop(untold)
        loop(untold)
    assert len([w for w in caught if "num_devices" in str(w.message)]) == 1


@pytest.mark.parametrize("hybridize", MODES)
def test_a_network_by_itself_does_not_wait_for_others(hybridize, two, rng):
    net = SyncBatchNorm(in_channels=3)
    model = initialized(net, two, hybridize)
    gluon_syncbn.set_timeout(5)
    for _ in range(2):
        x = rng.randn(6, 3).astype("float32")
        with autograd.record():
            outs = model(split(x, two))
            alone = net(mx.nd.array(x, ctx=two[0]))
        is_normalized(outs, x)
        is_normalized([alone], x)


@pytest.mark.parametrize("hybridize", MODES)
@pytest.mark.parametrize("together", [False, True])
def test_the_gradients_of_an_absent_device_are_those_of_the_last_backward(
    hybridize, together, two, rng
):
    """Two forwards, the second with fewer inputs than devices, and then their backwards."""

    def gradients(contexts, fewer):
        mx.random.seed(2)
        net = nn.Dense(2, in_units=3)
        model = initialized(net, contexts, hybridize)
        with autograd.record():
            first = [(out**2).sum() for out in model(split(x, contexts))]
            second = [(out**3).sum() for out in model(split(x[:1], fewer))]
        if together:
            parallel_backward([first, second])
        else:
            parallel_backward(first)
            parallel_backward(second)
        return sum(net.weight.grad(c).asnumpy() for c in contexts)

    x = rng.randn(4, 3).astype("float32")
    for fewer in (two[:1], two[1:]):
        np.testing.assert_allclose(
            gradients(two, fewer), gradients(two[:1], two[:1]), rtol=1e-4, atol=1e-5
        )


class FailsAfterTheFirst(nn.HybridSequential):
    """Raises after its first layer while `fails` is set."""

    fails = False

    def forward(self, x):
        x = self[0](x)
        if self.fails:
            raise KeyError("told to")
        return self[1](x)


@pytest.mark.parametrize("hybridize", MODES)
def test_a_first_call_that_raises_leaves_all_devices_alike(hybridize, two, rng):
    net = FailsAfterTheFirst()
    net.add(SyncBatchNorm(), SyncBatchNorm())
    net.initialize(ctx=two)
    if hybridize is not None:
        net.hybridize(**hybridize)
    model = ModelDataParallel(net, two)
    x = rng.randn(6, 3).astype("float32")
    for again in (False, True):
        net.fails = True
        with pytest.raises(KeyError, match="told to"):
            with autograd.record():
                model(split(x, two))
        for first, second in statistics(net[0], two):
            np.testing.assert_array_equal(first, second)
        net.fails = False
        if again and hybridize is not None:
            net.hybridize(**hybridize)
        gluon_syncbn.set_timeout(10)
        with autograd.record():
            outs = model(split(x, two))
        is_normalized(outs, x)
        for first, second in statistics(net, two):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("hybridize", MODES)
def test_one_model_trains_and_another_over_the_same_network_evaluates(hybridize, two, rng):
    net = convolutional(widths=(4, 4))
    trained = initialized(net, two, hybridize)
    evaluated = ModelDataParallel(net, two)
    x = rng.randn(6, 3, 8, 8).astype("float32")
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.01})
    gluon_syncbn.set_timeout(10)
    for _ in range(5):
        with autograd.record():
            losses = [(out**2).sum() for out in trained(split(x, two))]
        parallel_backward(losses)
        trainer.step(6)
        got = concatenated(evaluated(split(x, two)))
        wanted = concatenated(evaluated(split(x, two[:1])))
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("hybridize", MODES)
def test_one_thread_trains_and_another_infers(hybridize, two, rng):
    """The one that infers has a batch smaller than the number of devices."""
    net = convolutional(widths=(4, 4))
    model = initialized(net, two, hybridize)
    x = rng.randn(6, 3, 8, 8).astype("float32")
    gluon_syncbn.set_timeout(10)
    with autograd.record():
        wanted = concatenated(model(split(x, two)))
    stop, errors = threading.Event(), []

    def infer():
        try:
            while not stop.is_set():
                model(split(x[:1], two))[0].asnumpy()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=infer)
    thread.start()
    try:
        for _ in range(40):
            with autograd.record():
                outs = model(split(x, two))
            parallel_backward(outs)
            # By the batch's statistics: the weights do not change.
            np.testing.assert_allclose(concatenated(outs), wanted, rtol=1e-3, atol=1e-4)
    finally:
        stop.set()
        thread.join(60)
    assert not errors


@pytest.mark.parametrize("hybridize", MODES)
def test_a_late_device_learns_at_once_that_its_pass_has_failed(hybridize, two, rng):
    net = SyncBatchNorm(in_channels=3)
    model = initialized(net, two, hybridize)
    x = rng.randn(6, 3).astype("float32")
    parts = split(x, two)
    for _ in range(2):
        with autograd.record():
            is_normalized(model(parts), x)
        gluon_syncbn.set_timeout(0.2)
        with held(parts[1]) as late:
            with autograd.record():
                outs = model([parts[0], late])
            with pytest.raises(mx.MXNetError, match=r"Arrived: cpu\(0\); missing: 1 of 2"):
                outs[0].asnumpy()
            gluon_syncbn.set_timeout(30)
        with pytest.raises(mx.MXNetError, match="its pass had failed before.*not every device"):
            outs[1].asnumpy()


class SumsOnce(gluon.HybridBlock):
    def hybrid_forward(self, F, x):
        return F.contrib.KeyBarrierSum(x, key="sums once", num_devices=2)


# static_shape has no pass for a KeyBarrierSum (docs/limits.md).
@pytest.mark.parametrize("hybridize", [None, {}, {"static_alloc": True}])
def test_a_late_sum_joins_no_later_pass(hybridize, two):
    model = initialized(SumsOnce(), two, hybridize)
    xs = [mx.nd.ones(2, ctx=c) for c in two]
    for _ in range(2):
        gluon_syncbn.set_timeout(0.2)
        with held(xs[1]) as late:
            outs = model([xs[0], late])
            with pytest.raises(mx.MXNetError, match=r"Arrived: cpu\(0\); missing: 1 of 2"):
                outs[0].asnumpy()
            gluon_syncbn.set_timeout(30)
        again = model([x * 10 for x in xs])
        for out in again:
            np.testing.assert_array_equal(out.asnumpy(), [20, 20])
        with pytest.raises(mx.MXNetError, match="its pass had failed before"):
            outs[1].asnumpy()


def test_a_sum_whose_input_has_failed_holds_up_no_later_pass(two):
    """Its operator never runs, and lives as long as its result."""
    model = initialized(SumsOnce(), two)
    xs = [mx.nd.ones(2, ctx=c) for c in two]
    gluon_syncbn.set_timeout(0.2)
    with autograd.record():
        kept = model([xs[0], xs[1] + mx.nd.random.normal(0, -1, shape=2, ctx=two[1])])
    with pytest.raises(mx.MXNetError, match=r"Arrived: cpu\(0\); missing: 1 of 2"):
        kept[0].asnumpy()
    with pytest.raises(mx.MXNetError, match="scale"):
        kept[1].asnumpy()
    gluon_syncbn.set_timeout(5)
    for out in model(xs):
        np.testing.assert_array_equal(out.asnumpy(), [2, 2])


@pytest.mark.parametrize("hybridize", [None, {}, {"static_alloc": True}])
def test_a_late_device_of_a_loop_joins_no_later_step(hybridize, two, rng):
    """The program runs a step anew after its deadline, and the late part of it comes then."""
    net = SyncBatchNorm(in_channels=3, num_devices=2)
    initialized(net, two, hybridize)
    x = rng.randn(6, 3).astype("float32")
    parts = split(x, two)

    def step(parts):
        outs = []
        for part in parts:
            with autograd.record():
                outs.append(net(part))
        return outs

    is_normalized(step(parts), x)
    for _ in range(2):
        gluon_syncbn.set_timeout(0.2)
        with held(100 + parts[1]) as late:
            outs = step([parts[0], late])
            with pytest.raises(mx.MXNetError, match=r"Arrived: cpu\(0\); missing: 1 of 2"):
                outs[0].asnumpy()
            gluon_syncbn.set_timeout(30)
        with pytest.raises(mx.MXNetError, match=r"cpu\(1\) came after its round had failed"):
            outs[1].asnumpy()
        is_normalized(step(parts), x)


def test_the_deadline_names_the_thread_that_ran_several_devices(two):
    """Pushed from one thread, device after device, they can wait for ever."""
    gluon_syncbn.set_timeout(1)
    layers = [SyncBatchNorm(in_channels=3, num_devices=2) for _ in range(2)]
    for layer in layers:
        layer.initialize(ctx=two)
    with held(mx.nd.ones((2, 3), ctx=two[1])) as late:
        with autograd.record():
            first = layers[0](mx.nd.ones((2, 3), ctx=two[0]))
            layers[0](late)
        with pytest.raises(mx.MXNetError) as caught:
            first.asnumpy()
    message = str(caught.value).split("MXNetError: ")[-1]
    assert message.startswith("One thread ran cpu(0) and cpu(1); cpu(1) has been called")
    for part in ("parallel_backward", "MXNET_CPU_TEMP_COPY", "missing: 1 of 2"):
        assert part in message
    with pytest.raises(mx.MXNetError):
        mx.nd.waitall()
