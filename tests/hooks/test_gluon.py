"""Initializing and tracing, which Gluon does once for a block, while several devices call it."""

import gc
import threading
import types
import weakref

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, context, gluon
from mxnet.gluon import nn

from gluon_syncbn import (
    CenConv2d,
    MABN2d,
    ModelDataParallel,
    SyncBatchNorm,
    convert_sync_batchnorm,
    parallel_backward,
    passes,
)
from gluon_syncbn.data_parallel import random_state
from gluon_syncbn.hooks import gluon as gluon_hooks
from held import held
from networks import MODES, STATIC, convolutional, split


class Switched(gluon.Block):
    """An auxiliary head that is switched on later, and an optional input that comes later."""

    auxiliary = False

    def __init__(self):
        super().__init__(prefix="switched_")
        with self.name_scope():
            self.body = convolutional(widths=(4,), prefix="body_")
            self.head = convolutional(widths=(4,), prefix="head_")
            self.side = convolutional(widths=(4,), prefix="side_")

    def forward(self, x, z=None):
        y = self.body(x)
        if self.auxiliary:
            y = y + self.head(x)
        return y if z is None else y + self.side(z)


@pytest.mark.parametrize("hybridize", MODES)
def test_branches_that_first_run_later_start_as_on_one_device(hybridize, two, rng):
    x = rng.randn(6, 3, 6, 6).astype("float32")

    def run(contexts):
        mx.random.seed(7)
        np.random.seed(7)
        net = Switched()
        net.initialize(mx.init.Xavier(), ctx=contexts)
        if hybridize is not None:
            net.hybridize(**hybridize)
        model = ModelDataParallel(net, contexts)
        found = []
        for auxiliary, side in ((False, False), (True, False), (True, True), (True, False)):
            net.auxiliary = auxiliary
            parts = split(x, contexts)
            with autograd.record():
                outs = model(parts, parts) if side else model(parts)
            parallel_backward(outs)
            found.append(np.concatenate([out.asnumpy() for out in outs]))
        weights = {
            name: p.list_data()[0].asnumpy() for name, p in net.collect_params(".*weight").items()
        }
        return found, weights

    wanted, initial = run(two[:1])
    for _ in range(3):
        got, weights = run(two)
        for a, b in zip(got, wanted):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        assert weights.keys() == initial.keys()
        for name in weights:
            np.testing.assert_array_equal(weights[name], initial[name], err_msg=name)


def test_a_parameter_is_never_seen_half_initialized(monkeypatch, two):
    """Another thread finds it deferred, or with its values and their gradients."""
    layer = nn.Dense(3, in_units=2)
    layer.weight.initialize(ctx=two)
    layer = nn.Dense(3)
    layer.initialize(ctx=two)
    weight, seen = layer.weight, []
    copied = mx.nd.NDArray.copyto

    def look(self, other):
        seen.append((weight._data is None, bool(weight._deferred_init)))
        return copied(self, other)

    monkeypatch.setattr(mx.nd.NDArray, "copyto", look)
    layer(mx.nd.ones((1, 2), ctx=two[0]))
    assert seen and set(seen[:2]) == {(True, True)}
    assert weight._data is not None and not weight._deferred_init
    assert [g.context for g in weight.list_grad()] == two
    assert [d.grad is not None for d in weight.list_data()] == [True, True]


def test_a_parameter_with_another_way_to_be_initialized():
    """hvd.broadcast_parameters wraps that of deferred parameters, one by one, as here."""
    layer = nn.Dense(3)
    layer.initialize(mx.init.One())
    usual = layer.weight._init_impl

    def broadcast(self, data, ctx_list):
        usual(data, ctx_list)
        self.data()[:] = 5

    layer.weight._init_impl = types.MethodType(broadcast, layer.weight)
    assert layer(mx.nd.ones((1, 2))).asnumpy().tolist() == [[10, 10, 10]]


def test_gluon_traces_and_initializes_in_the_callers_thread(two):
    threads = []

    class Traced(gluon.HybridBlock):
        def __init__(self):
            super().__init__()
            self.dense = nn.Dense(2)

        def hybrid_forward(self, F, x):
            if F is mx.sym:
                threads.append(threading.current_thread())
            return self.dense(x)

    class Noted(mx.init.Initializer):
        def _init_weight(self, name, array):
            threads.append(threading.current_thread())
            array[:] = 1

    net = Traced()
    net.initialize(Noted(), ctx=two)
    net.hybridize()
    outs = ModelDataParallel(net, two)([mx.nd.ones((1, 3), ctx=c) for c in two])
    assert [out.asnumpy().tolist() for out in outs] == [[[3, 3]]] * 2
    assert threads == [threading.current_thread()] * 2  # once each


def test_a_failure_to_trace_reaches_the_caller(two):
    class Fails(gluon.HybridBlock):
        fails = True

        def hybrid_forward(self, F, x):
            if self.fails:
                raise KeyError("cannot be traced")
            return x + 1

    net = Fails()
    net.hybridize()
    model = ModelDataParallel(net, two)
    xs = [mx.nd.ones(1, ctx=c) for c in two]
    with pytest.raises(KeyError, match="cannot be traced"):
        model(xs)
    net.fails = False
    assert [out.asscalar() for out in model(xs)] == [2, 2]


def test_modes_of_a_part_hold_while_it_is_traced(two):
    seen = []

    class Looks(gluon.HybridBlock):
        def hybrid_forward(self, F, x):
            seen.append((autograd.is_recording(), autograd.is_training()))
            return x + 1

    class Frozen(gluon.Block):
        def __init__(self):
            super().__init__()
            self.part = Looks()

        def forward(self, x):
            with autograd.pause():
                return self.part(x)

    net = Frozen()
    net.hybridize()
    with autograd.record():
        ModelDataParallel(net, two)([mx.nd.ones(1, ctx=c) for c in two])
    assert seen == [(False, False)]


@pytest.mark.parametrize("hybridize", [{}, STATIC])
def test_a_traced_network_notices_that_a_part_was_converted(hybridize, rng):
    net = nn.HybridSequential()
    net.add(nn.HybridSequential(), nn.Dense(2))
    net[0].add(nn.BatchNorm(in_channels=3))
    net.initialize()
    net.hybridize(**hybridize)
    x = mx.nd.array(rng.randn(4, 3))
    with autograd.record():
        net(x)
    convert_sync_batchnorm(net[0])
    with autograd.record():
        net(x)
    net[0][0].running_mean.set_data(mx.nd.zeros(3))
    with autograd.record():
        net(x)  # ours moves its statistics in the forward pass, MXNet's in the backward
    wanted = 0.1 * x.mean(axis=0).asnumpy()
    np.testing.assert_allclose(net[0][0].running_mean.data().asnumpy(), wanted, rtol=1e-4)


def test_networks_called_by_hand_in_several_threads_are_traced_once(two):
    """As GluonCV's own wrapper does."""
    for _ in range(5):
        net = nn.HybridSequential()
        net.add(nn.Conv2D(4, 3), SyncBatchNorm(num_devices=2), nn.Dense(2))
        net.initialize(ctx=two)
        net.hybridize()
        errors, start = [], threading.Barrier(2)

        def call(context, net=net, errors=errors, start=start):
            start.wait()
            try:
                with autograd.record():
                    net(mx.nd.ones((1, 3, 6, 6), ctx=context)).wait_to_read()
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=call, args=(c,)) for c in two]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors


@pytest.mark.parametrize("reader", ["gluon", "executor"])
def test_what_backward_updates_is_complete_when_it_is_read(reader, rng):
    """With static_shape, MXNet does not tell its engine that backward writes auxiliary states."""
    net = nn.HybridSequential()
    net.add(CenConv2d(3, 1, in_channels=3), MABN2d(3, 2, 4))
    net.initialize()
    x = mx.nd.array(rng.randn(2, 3, 2, 2))
    net.hybridize(**STATIC)
    if reader == "executor":
        executor = net(mx.sym.var("data")).simple_bind(mx.cpu(), data=x.shape)
        parameters = {name: p.data() for name, p in net.collect_params().items()}
        executor.copy_params_from(parameters, parameters, allow_extra_params=True)
        buffer = executor.aux_dict[net[1].buffer_gz.name]
    else:
        buffer = net[1].buffer_gz.data()

    def step(x):
        if reader == "executor":
            executor.forward(is_train=True, data=x)
            executor.backward(mx.nd.ones(x.shape))
            return
        with autograd.record():
            y = net(x)
        y.backward()

    step(x)
    mx.nd.waitall()
    assert not buffer.asnumpy()[0].any()
    with held(x) as late:
        step(late)
        copy = buffer.copy()
    mx.nd.waitall()
    assert buffer.asnumpy().all(axis=1).any()
    np.testing.assert_array_equal(copy.asnumpy(), buffer.asnumpy())


def test_devices_threads_fence_what_is_theirs(monkeypatch, rng):
    """Two threads that fence the same arrays can each come first on one, and wait for ever."""
    contexts = [mx.cpu(0), mx.cpu(1)]
    net = nn.HybridSequential()
    net.add(CenConv2d(3, 1, in_channels=3), MABN2d(3, 2, 4))
    net.initialize(ctx=contexts)
    net.hybridize(**STATIC)
    model = ModelDataParallel(net, contexts)
    fenced = []
    handles = passes.handles

    def watched(arrays):
        if random_state.is_device_thread():
            fenced.append((context.current_context(), {array.context for array in arrays}))
        return handles(arrays)

    monkeypatch.setattr(passes, "handles", watched)
    for _ in range(3):
        with autograd.record():
            outs = model([mx.nd.array(rng.randn(2, 3, 2, 2), ctx) for ctx in contexts])
        forward = len(fenced)
        parallel_backward(outs)
    assert {where for where, _ in fenced[forward:]} == set(contexts)
    assert all(devices == {where} for where, devices in fenced), fenced


def small(contexts=None):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(3, 1, in_channels=3), MABN2d(3, 2, 4))
    net.initialize(ctx=contexts)
    net.hybridize(**STATIC)
    return net


def learn(net, shape=(2, 3, 2, 2), ctx=None):
    with autograd.record():
        y = net(mx.nd.ones(shape, ctx=ctx))
    y.backward()


def frozen(net, name):
    net.collect_params(f".*{name}").setattr("grad_req", "null")


@pytest.mark.parametrize(
    "change",
    [
        lambda net: frozen(net, "gamma"),
        lambda net: frozen(net, "weight"),
        lambda net: frozen(net, "(weight|bias|gamma|beta)$"),
        lambda net: net.collect_params().reset_ctx(mx.cpu(1)),
        lambda net: net.initialize(force_reinit=True),
    ],
    ids=["gamma", "weight", "all", "moved", "anew"],
)
@pytest.mark.parametrize("when", ["between steps", "before backward"])
def test_parameters_may_be_frozen_or_moved_after_tracing(change, when):
    net, other = small(), nn.Dense(2, in_units=3)
    other.initialize()
    learn(net)
    with autograd.record():
        y = net(mx.nd.ones((2, 3, 2, 2)))
    if when == "between steps":
        y.backward()
    change(net)
    if when == "before backward":
        y.backward()
    learn(other, (1, 3))
    where = net[0].weight.list_ctx()[0]
    if where != mx.cpu():
        net.hybridize(**STATIC)  # MXNet's own graph does not move
    if any(p.grad_req == "write" for p in net.collect_params().values()):
        learn(net, ctx=where)
    learn(other, (1, 3))
    mx.nd.waitall()


@pytest.fixture
def fences(monkeypatch):
    """The devices of the fences after backward passes."""
    made = []
    fence = gluon_hooks._Trace.after_backward

    def watched(trace, where):
        made.append(where)
        return fence(trace, where)

    monkeypatch.setattr(gluon_hooks._Trace, "after_backward", watched)
    return made


def test_only_a_graphs_own_backward_is_fenced(fences):
    """Once for each run, in any order, also if forward passes have no backward."""
    net, other = small(), nn.Dense(2, in_units=3)
    other.initialize()
    x = mx.nd.ones((2, 3, 2, 2))
    learn(other, (1, 3))
    learn(net)
    assert fences == [mx.cpu()]
    learn(other, (1, 3))
    with autograd.record():
        first, second, _ = net(x), net(x), net(x)
        losses = first.sum(), second.sum()
    learn(other, (1, 3))
    assert len(fences) == 1
    losses[1].backward(retain_graph=True)
    losses[0].backward(retain_graph=True)  # without it, MXNet forgets what they share
    assert len(fences) == 3
    losses[1].backward()
    assert len(fences) == 4
    learn(other, (1, 3))
    learn(net)
    assert len(fences) == 5
    with autograd.record():
        both = net(x) + net(x)
    both.backward()
    assert len(fences) == 6  # of two runs on one device


def test_runs_without_a_backward_keep_nothing_alive(monkeypatch):
    # Of its own: other tests may have left runs in the one of the process.
    monkeypatch.setattr(gluon_hooks, "_recorded", gluon_hooks._RecordedRuns())
    monkeypatch.setattr(gluon_hooks._RecordedRuns, "_MOST", 3)
    net = small()
    for _ in range(5):
        with autograd.record():
            net(mx.nd.ones((2, 3, 2, 2)))
    assert len(gluon_hooks._recorded._runs) == 3
    weight = weakref.ref(net[0].weight)
    del net
    gc.collect()
    assert weight() is None
