"""parallel_backward: what it takes, what it expects, and failures."""

import time

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from networks import ones, split


def test_backward_takes_head_gradients_and_nested_losses(two):
    xs = [mx.nd.ones(2, ctx=c) for c in two]
    for x in xs:
        x.attach_grad()
    with autograd.record():
        losses = [(2 * x, 3 * x) for x in xs]
    parallel_backward(losses, retain_graph=True)
    assert [x.grad[0].asscalar() for x in xs] == [5, 5]
    parallel_backward(losses, [(10 * o, 100 * o) for o in [mx.nd.ones(2, ctx=c) for c in two]])
    assert [x.grad[0].asscalar() for x in xs] == [320, 320]


def test_backward_after_a_later_step_with_fewer_devices(two, rng):
    """A backward pass expects the devices of its forward pass, not of a later one."""
    net = SyncBatchNorm(in_channels=3)
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    x = rng.randn(6, 3).astype("float32")
    weight = mx.nd.array(rng.randn(6, 3))

    def gradients(contexts, parts):
        for part in parts:
            part.attach_grad()
        with autograd.record():
            return [(y * w).sum() for y, w in zip(model(parts), split(weight, contexts))]

    wanted = split(x, two[:1])
    parallel_backward(gradients(two[:1], wanted))
    full, fewer = split(x, two), split(x, two[:1])
    late = gradients(two, full)
    # retain_graph: MXNet's first backward would else clear the moving statistics' place in both.
    parallel_backward(gradients(two[:1], fewer), retain_graph=True)
    parallel_backward(late)
    for parts in (full, fewer):
        got = np.concatenate([part.grad.asnumpy() for part in parts])
        np.testing.assert_allclose(got, wanted[0].grad.asnumpy(), atol=1e-5)


def test_a_backward_that_fails_on_one_device_lets_the_others_go(two):
    net = SyncBatchNorm(in_channels=2)
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    xs = [mx.nd.ones((2, 2), ctx=c) for c in two]
    for x in xs:
        x.attach_grad()
    with autograd.record():
        outs = model(xs)
    unrecorded = mx.nd.ones(1, ctx=two[1])
    start = time.time()
    with pytest.raises(mx.MXNetError):
        parallel_backward([outs[0], unrecorded])
    assert time.time() - start < 20
    with autograd.record():
        outs = model(xs)
    parallel_backward(outs)
    xs[0].grad.wait_to_read()


def test_head_gradients_that_do_not_match(two):
    with pytest.raises(ValueError, match="2 losses, but 1 head"):
        parallel_backward([ones(c) for c in two], [ones(two[0])])
