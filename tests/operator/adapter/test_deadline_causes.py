"""The message of a deadline begins with the likeliest cause, and says what to do about it."""

import contextlib
import re
import threading
import time

import mxnet as mx
import pytest
from mxnet import autograd, gluon

import gluon_syncbn
from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from held import held

SUM = mx.nd.contrib.KeyBarrierSum


@pytest.fixture
def two():
    gluon_syncbn.set_timeout(0.5)
    return [mx.cpu(0), mx.cpu(1)]


@pytest.fixture
def key(request):
    """A key that no other test has used: what the exchange knows of it begins here."""
    return request.node.name


def message_of(read):
    """Return the message with which ``read()`` fails."""
    with pytest.raises(mx.MXNetError) as caught:
        read()
    return str(caught.value).split("MXNetError: ")[-1].strip()


@pytest.fixture(autouse=True)
def read_all_failures():
    yield
    with contextlib.suppress(mx.MXNetError):
        mx.nd.waitall()


def in_thread(function, *args):
    """Call ``function`` in a thread of its own, as devices do."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    thread.join(30)
    return results[0]


def array(context):
    return mx.nd.ones(3, ctx=context)


def meet(key, contexts, **kwargs):
    for y in [SUM(array(c), key=key, num_devices=len(contexts), **kwargs) for c in contexts]:
        y.wait_to_read()


def test_one_thread_ran_several_devices(two, key):
    with held(array(two[1])) as late:
        first = SUM(array(two[0]), key=key, num_devices=2)
        SUM(late, key=key, num_devices=2)
        message = message_of(first.asnumpy)
    assert message.startswith(
        "One thread ran cpu(0) and cpu(1); cpu(1) has been called here and has not run yet. CPU "
        "contexts of one thread can deadlock"
    )
    for part in ("parallel_backward", "MXNET_CPU_TEMP_COPY", "missing: 1 of 2"):
        assert part in message


def test_devices_use_different_keys(two, key):
    """Two networks, one per device, instead of one."""
    layers = [SyncBatchNorm(in_channels=3, num_devices=2, prefix=f"{key}{i}_") for i in range(2)]
    for layer, context in zip(layers, two):
        layer.initialize(ctx=context)
    with autograd.record():
        ys = [layer(mx.nd.ones((2, 3), ctx=c)) for layer, c in zip(layers, two)]
    message = message_of(ys[0].asnumpy)
    assert message.startswith(
        f"cpu(1) waits under key '{layers[1].key}' and cpu(0) under key '{layers[0].key}', and "
        "neither key has ever met. If that is meant to be one layer: let all devices use one "
    )


def trained(net, contexts):
    """Initialize a network, run it once in training, and return its model and the inputs."""
    net.initialize(ctx=contexts)
    model = ModelDataParallel(net, contexts)
    xs = [mx.nd.ones((2, 3), ctx=c) for c in contexts]
    with autograd.record():
        for y in model(xs):
            y.wait_to_read()
    return model, xs


class Branch(gluon.Block):
    """Each device runs a layer of its own, if ``apart``."""

    def __init__(self):
        super().__init__()
        self.apart = False
        with self.name_scope():
            self.norms = gluon.nn.HybridSequential()
            self.norms.add(SyncBatchNorm(in_channels=3), SyncBatchNorm(in_channels=3))

    def forward(self, x):
        if not self.apart:
            return self.norms(x)
        return self.norms[x.context.device_id](x)


def test_devices_run_different_layers(two):
    net = Branch()
    model, xs = trained(net, two)
    net.apart = True
    with autograd.record():
        y = model(xs)[0]
    message = message_of(y.asnumpy)
    assert re.match(  # the round that failed first ends the step
        r"cpu\((\d)\) waits in the forward exchange of key '.*batchnorm\1_', to which cpu\(\d\) "
        "has not come. In a step, every device must run the same layers",
        message,
    ), message


def test_a_device_is_not_in_backward(two):
    net = SyncBatchNorm(in_channels=3)
    net.initialize(ctx=two)
    xs = [mx.nd.ones((2, 3), ctx=c) for c in two]
    for x in xs:
        x.attach_grad()
    with autograd.record():
        ys = ModelDataParallel(net, two)(xs)
    parallel_backward(ys[:1])
    message = message_of(xs[0].grad.asnumpy)
    assert message.startswith(
        "cpu(1) took part in the forward exchange, and has not come to backward. Give the losses "
        "of all devices to one call of parallel_backward."
    )


def test_num_devices_is_larger_than_the_number_of_devices(two, key):
    contexts = [mx.cpu(40), mx.cpu(41)]
    for context in (two[0], *contexts):
        in_thread(meet, key + " alone", [context])
    meet(key, contexts)
    ys = [SUM(array(c), key=key + " of all", num_devices=100) for c in contexts]
    message = message_of(ys[0].asnumpy)
    assert message.startswith("num_devices is 100, but only cpu(0)")
    assert "cpu(40) and cpu(41) have ever come to any exchange. Set num_devices" in message


def test_devices_that_never_run_this_layer(two, key):
    meet(key + " of both", two)
    message = message_of(SUM(array(two[0]), key=key, num_devices=2).asnumpy)
    assert message.startswith("num_devices is 2, but only cpu(0) has ever come to this key; cpu(1)")
    assert "come to others. Run this layer on them as well, or set num_devices" in message


def test_a_device_that_is_still_running(two, key):
    meet(key, two)
    first = SUM(array(two[0]), key=key, num_devices=2)
    end = time.monotonic() + 0.4
    while time.monotonic() < end:
        in_thread(meet, "another " + key, two[1:])
    message = message_of(first.asnumpy)
    assert message.startswith(f"cpu(1) came last to the forward exchange of key 'another {key}', ")
    assert " s ago. It is still running; for a longer deadline, set" in message


def test_a_device_that_has_stopped(two, key):
    meet(key, two)
    time.sleep(0.1)
    ys = [SUM(array(two[0]), key=key, num_devices=2) for _ in range(3)]
    message = message_of(ys[0].asnumpy)
    assert message.startswith("cpu(1) came last to the forward exchange of this key, 0.")
    assert "; cpu(0) is 3 rounds of this key ahead of it. Look at what that device does" in message


def test_who_is_ahead_is_who_came_most_often(key):
    gluon_syncbn.set_timeout(0.5)
    three = [mx.cpu(i) for i in range(3)]
    meet(key, three)
    ys = [SUM(array(three[0]), key=key, num_devices=3) for _ in range(3)]
    SUM(array(three[1]), key=key, num_devices=3)
    assert "; cpu(0) is 3 rounds of this key ahead of it." in message_of(ys[0].asnumpy)


class Late(gluon.nn.HybridSequential):
    """A layer that one device comes to late, if told so."""

    late = None

    def forward(self, x):
        if x.context == self.late:
            time.sleep(1)
        return super().forward(x)


@pytest.fixture
def four():
    """A network that has been trained on four devices, and one that is to be late."""
    net = Late()
    net.add(SyncBatchNorm(in_channels=3))
    model, xs = trained(net, [mx.cpu(i) for i in range(4)])
    gluon_syncbn.set_timeout(0.5)
    return net, model, xs


def test_a_device_without_input_is_not_missed(four):
    net, model, xs = four
    net.late = mx.cpu(1)
    with autograd.record():
        ys = model(xs[:2])
    message = message_of(ys[0].asnumpy)
    assert message.startswith(
        "Of the 2 devices of this step, only cpu(0) has come to any exchange."
    )


def test_a_step_that_failed_is_not_the_cause_of_the_next(four):
    net, model, xs = four
    for late, others in ((1, "cpu(0), cpu(2) and cpu(3)"), (0, "cpu(1), cpu(2) and cpu(3)")):
        net.late = mx.cpu(late)
        with autograd.record():
            ys = model(xs)
        message = message_of(ys[2].asnumpy)
        # It has been here before, but not in this step.
        assert message.startswith(f"cpu({late}) came last to the forward exchange of this key, ")
        assert "until that failed" not in message and f"only {others}" not in message
        with contextlib.suppress(mx.MXNetError):
            mx.nd.waitall()


def test_a_device_that_came_after_the_others_gave_up(two, key):
    meet(key, two)
    message_of(SUM(array(two[0]), key=key, num_devices=2).asnumpy)
    message = message_of(SUM(array(two[1]), key=key, num_devices=2).asnumpy)
    assert message.startswith("cpu(0) waited in this exchange until that failed, 0.5")
    assert " s ago, and cpu(1) came only after it. After a failure, begin the step anew" in message


def test_a_device_that_has_not_begun_the_step(two):
    class Waits(gluon.Block):
        def __init__(self):
            super().__init__()
            self.go_on = threading.Event()

        def forward(self, x):
            if x.context == two[1]:
                self.go_on.wait(30)
            return x

    net = gluon.nn.Sequential()
    net.add(Waits(), SyncBatchNorm(in_channels=3))
    net.initialize(ctx=two)
    threading.Timer(1.0, net[0].go_on.set).start()
    with autograd.record():
        ys = ModelDataParallel(net, two)([mx.nd.ones((2, 3), ctx=c) for c in two])
    message = message_of(ys[0].asnumpy)
    assert message.startswith(
        "Of the 2 devices of this step, only cpu(0) has come to any exchange. Look at what"
    )


def test_what_follows_the_cause_is_what_was_seen(two, key):
    message = message_of(SUM(array(two[0]), key=key, num_devices=2).asnumpy)
    assert message.endswith(
        f"KeyBarrierSum: the forward exchange of key '{key}' failed: not every device came within "
        "0.5 s. Arrived: cpu(0); missing: 1 of 2."
    )
