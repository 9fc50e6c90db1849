"""MXNet's private parts: that each function does what it says, in public terms."""

import threading

import mxnet as mx
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import SyncBatchNorm, mxnet_private


def test_states_of_a_parameter(two):
    p = gluon.Parameter("p", shape=(0, 2), allow_deferred_init=True)

    def state():
        return (
            mxnet_private.has_data(p),
            mxnet_private.is_deferred(p),
            mxnet_private.contexts_of(p),
        )

    assert state() == (False, False, None)
    p.initialize(ctx=two)
    assert state() == (False, True, two)
    p.shape = (3, 2)
    p._finish_deferred_init()
    assert state() == (True, False, two)
    there = mxnet_private.contexts_of(p)
    assert mxnet_private.contexts_of(p) is there
    p.reset_ctx(two[1])
    assert state() == (True, False, two[1:]) and mxnet_private.contexts_of(p) is not there


def test_the_average_of_a_parameter_over_its_devices(two):
    p = gluon.Parameter("p", shape=(2,))
    p.initialize(ctx=two)
    for i, array in enumerate(p.list_data()):
        array[:] = 2 * i
    assert mxnet_private.averaged(p).asnumpy().tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["default", "row_sparse"])
def test_storage_type(kind):
    assert mxnet_private.storage_type(gluon.Parameter("p", shape=(2, 2), stype=kind)) == kind


def step(net, trainer, contexts):
    with autograd.record():
        losses = [net(mx.nd.ones((1, 3), ctx=c)).sum() for c in contexts]
    autograd.backward(losses)
    trainer.step(1)


def test_a_trainer_is_moved(two):
    """It updates the other devices then."""
    net = nn.Dense(1, in_units=3)
    net.initialize(mx.init.Zero(), ctx=two[0])
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 1}, kvstore=None)
    assert mxnet_private.trainer_of(net.weight) is trainer
    assert mxnet_private.trainer_of(gluon.Parameter("other")) is None
    assert mxnet_private.trainer_contexts(trainer) == two[:1]
    assert not mxnet_private.has_stepped(trainer)
    net.collect_params().reset_ctx(two)
    mxnet_private.move_trainer(trainer, two)
    step(net, trainer, two)
    assert mxnet_private.trainer_contexts(trainer) == two
    assert mxnet_private.has_stepped(trainer)
    assert [w.asnumpy().tolist() for w in net.weight.list_data()] == [[[-1, -1, -1]]] * 2


def test_a_gradient_that_is_marked_as_fresh():
    """Trainer warns of one that no backward pass has written since the last step."""
    net = nn.Dense(1, in_units=3)
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), "sgd")
    step(net, trainer, [mx.cpu()])
    with pytest.raises(UserWarning, match="has not been updated by backward"):
        trainer.step(1)
    for p in net.collect_params().values():
        mxnet_private.mark_gradient_fresh(p.data())
    trainer.step(1)


def test_traces_and_graphs_of_blocks():
    net = nn.HybridSequential()
    net.add(nn.Dense(2))
    net.initialize()
    assert mxnet_private.children(net) == [net[0]] and mxnet_private.children(net[0]) == []
    assert mxnet_private.graph_of(net) is None and not mxnet_private.is_traced(net)
    net.hybridize()
    assert not mxnet_private.has_static_shape(net)
    net(mx.nd.ones((1, 3)))
    assert mxnet_private.is_traced(net)
    assert mxnet_private.graph_of(net).list_arguments()[0] == "data"
    mxnet_private.forget_trace(net)
    assert not mxnet_private.is_traced(net)
    for static in (True, False):
        net.hybridize(static_alloc=True, static_shape=static)
        assert mxnet_private.has_static_shape(net) == static
    x = mx.sym.var("x")
    assert mxnet_private.graph_of(gluon.SymbolBlock(x + 1, x)).list_inputs() == ["x"]


@pytest.mark.parametrize("kind", [nn.BatchNorm, SyncBatchNorm, gluon.contrib.nn.SyncBatchNorm])
def test_batch_normalization(kind):
    layer = kind(epsilon=0.25)
    assert mxnet_private.is_batch_norm(layer) and mxnet_private.settings(layer)["eps"] == 0.25
    mxnet_private.settings(layer)["eps"] = 0.5
    assert "eps=0.5" in repr(layer)
    assert not mxnet_private.is_batch_norm(nn.InstanceNorm())


def test_tracing_is_noticed_in_the_thread_that_traces():
    seen = []

    def look():
        seen.append(mxnet_private.is_tracing())

    class Looks(gluon.HybridBlock):
        def hybrid_forward(self, F, x):
            look()
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            return x + 1

    net = Looks()
    look()
    net(mx.nd.ones(1))
    net(mx.sym.var("x"))
    assert seen == [False, False, False, True, False]


def test_a_trace_is_put_aside_and_back():
    net = nn.HybridSequential()
    net.add(nn.Dropout(0.5), nn.Dense(1, in_units=2))
    net.initialize()
    net.hybridize()
    net(mx.nd.ones((1, 2)))
    trace, graph = mxnet_private.kept_trace(net), mxnet_private.graph_of(net)
    assert mxnet_private.dropout_rate(net[0]) == 0.5
    mxnet_private.set_dropout_rate(net[0], 0)
    mxnet_private.forget_trace(net)
    net(mx.nd.ones((1, 2)))
    assert "Dropout" not in mxnet_private.graph_of(net).tojson()
    mxnet_private.put_back_trace(net, trace)
    assert mxnet_private.graph_of(net) is graph and "Dropout" in graph.tojson()
    with autograd.train_mode():
        outs = {net(mx.nd.ones((1, 2))).asnumpy().item() for _ in range(20)}
    assert len(outs) > 1


def test_what_autograd_knows():
    x = mx.nd.ones(1)
    assert not mxnet_private.is_recorded(x)
    y = x + 1
    x.attach_grad()
    assert mxnet_private.is_recorded(x) and not mxnet_private.is_recorded(y)
    with autograd.record():
        y = x + 1
        assert mxnet_private.is_recorded(y) and not mxnet_private.is_recorded(y.detach())
        with autograd.pause():
            assert not mxnet_private.is_recorded(x + 1)


def test_names_of_operators_are_those_that_mxnet_would_give():
    def names():
        own = mxnet_private.operator_name(None, "hint"), mxnet_private.operator_name("own", "hint")
        return *own, mx.sym.Variable("x").name

    with mx.name.NameManager():
        assert [names()[:2] for _ in range(2)] == [("hint0", "own"), ("hint1", "own")]
    with mx.name.Prefix("net_"):
        assert names()[:2] == ("net_hint0", "net_own")
    found = []
    thread = threading.Thread(target=lambda: found.extend(names()))  # which has no scope yet
    thread.start()
    thread.join()
    assert found[:2] == ["hint0", "own"]


def test_attributes_of_a_variable():
    x = mx.sym.var("x")
    mxnet_private.set_attribute(x, "__note__", "kept")
    assert x.attr("__note__") == "kept"


def test_seeds_are_seen_before_they_are_set(monkeypatch):
    seen = []
    library = mx.base._LIB
    for name in ("MXRandomSeed", "MXRandomSeedContext"):
        monkeypatch.setattr(library, name, getattr(library, name))  # and put back
    unwatched = mxnet_private.watch_seeds(
        lambda *seed: seen.append(seed), lambda *seed: seen.append(seed)
    )
    mx.random.seed(3)
    mx.random.seed(4, ctx=mx.cpu(1))
    assert seen == [(3,), (4, mx.cpu(1).device_typeid, 1)]
    first = mx.nd.random.uniform(shape=3, ctx=mx.cpu(1)).asnumpy()
    unwatched(4, mx.cpu(1).device_typeid, 1)
    assert len(seen) == 2
    again = mx.nd.random.uniform(shape=3, ctx=mx.cpu(1)).asnumpy()
    assert (first == again).all()
