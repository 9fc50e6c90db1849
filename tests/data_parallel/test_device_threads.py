"""A thread for each device: interrupted, forked, and asked for from within."""

import threading
import time

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

import fresh_process
from gluon_syncbn import ModelDataParallel, SyncBatchNorm
from gluon_syncbn.data_parallel import device_threads
from networks import split


def test_an_interruption_while_the_devices_are_given_their_parts(two, rng, monkeypatch):
    """The device that has its part already waits for one that will never have it."""
    net = SyncBatchNorm(in_channels=3)
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    x = rng.randn(6, 3).astype("float32")
    with autograd.record():
        model(split(x, two))
    threads = device_threads._threads
    submit = threads.submit

    def interrupted(device, *task):
        if device == two[1]:
            raise KeyboardInterrupt
        return submit(device, *task)

    monkeypatch.setattr(threads, "submit", interrupted)
    start = time.time()
    with pytest.raises(KeyboardInterrupt):
        with autograd.record():
            model(split(x, two))
    assert time.time() - start < 20, "waited for the deadline"
    monkeypatch.setattr(threads, "submit", submit)
    with autograd.record():
        outs = model(split(x, two))
    got = np.concatenate([out.asnumpy() for out in outs])
    np.testing.assert_allclose(got, (x - x.mean(0)) / x.std(0), atol=1e-3)


def test_a_forked_child_trains_though_the_parents_locks_were_held():
    """The child has none of the parent's threads, so nobody who would open the locks for it."""
    script = """
import os, signal, threading
import mxnet as mx
from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from gluon_syncbn.data_parallel import device_threads
contexts = [mx.cpu(0), mx.cpu(1)]
net = SyncBatchNorm(in_channels=1)
net.initialize(ctx=contexts)
model = ModelDataParallel(net, contexts)
xs = [mx.nd.full((1, 1), i, ctx=c) for i, c in enumerate(contexts)]

def step():
    with mx.autograd.record():
        outs = model(xs)
    parallel_backward(outs)
    assert [round(float(out.asscalar()), 1) for out in outs] == [-1.0, 1.0]

step()
held, go = threading.Event(), threading.Event()

def hold():
    with device_threads._threads.order, device_threads._threads.gluon:
        held.set()
        go.wait()

threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)
    step()
    os._exit(0)
status = os.waitpid(child, 0)[1]
go.set()
step()
raise SystemExit(status != 0)
"""
    fresh_process.run(script, timeout=200)


def test_run_on_gives_and_raises_what_the_function_does(two):
    names = device_threads.run_on(two[1], lambda: threading.current_thread().name)
    assert names == "gluon_syncbn-cpu(1)_0"
    assert device_threads.run_on(two[1], lambda: mx.context.current_context()) == two[1]
    with pytest.raises(KeyError, match="told to"):
        device_threads.run_on(two[0], lambda: {}["told to"])
    inner = device_threads.run_on(
        two[0], lambda: device_threads.run_on(two[1], threading.current_thread)
    )
    assert inner.name == "gluon_syncbn-cpu(0)_0"  # right there: two could wait for each other
