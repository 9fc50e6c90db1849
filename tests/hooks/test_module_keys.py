"""Two Modules of one symbol, or of one file, do not add up each other's sums."""

import threading

import mxnet as mx
import numpy as np
import pytest

from gluon_syncbn import SyncBatchNorm, barrier_stats

TWO = [mx.cpu(0), mx.cpu(1)]


def layer(num_devices=2):
    x = SyncBatchNorm(num_devices=num_devices, in_channels=3, prefix="norm_")(mx.sym.var("data"))
    return mx.sym.SoftmaxOutput(x, mx.sym.var("softmax_label"), name="softmax")


def bound(symbol, contexts=TWO):
    module = mx.mod.Module(symbol, context=contexts)
    module.bind([("data", (4, 3))], [("softmax_label", (4,))])
    module.init_params()
    return module


def batch(values):
    return mx.io.DataBatch([mx.nd.array(values)], [mx.nd.zeros(4)])


@pytest.mark.parametrize("loaded", [False, True])
def test_each_module_has_its_own_sums(loaded, tmp_path, rng):
    """Also if they run at the same time, each device when it likes."""
    symbol = layer()
    symbol.save(str(tmp_path / "symbol.json"))
    symbols = [mx.sym.load(str(tmp_path / "symbol.json")) if loaded else symbol for _ in range(2)]
    inputs = [rng.randn(4, 3).astype("float32") * scale for scale in (1, 100)]

    def outputs(module, values):
        found = []
        for _ in range(20):
            module.forward(batch(values), is_train=True)
            module.backward()
            found.append(module.get_outputs()[0])
        return [array.asnumpy() for array in found]

    wanted = [outputs(bound(s), v)[0] for s, v in zip(symbols, inputs)]
    barrier_stats(reset=True)
    modules, found = [bound(s) for s in symbols], {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: outputs(modules[i], inputs[i])}))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i in range(2):
        for got in found[i]:
            np.testing.assert_array_equal(got, wanted[i])
    keys = barrier_stats().keys
    assert len(keys) == 2 and all(key.rounds == 20 and not key.failures for key in keys.values())


def test_modules_that_are_meant_to_meet_do():
    """One per device, of a symbol for two."""
    symbol = layer()
    modules = [bound(symbol, [context]) for context in TWO]
    barrier_stats(reset=True)
    for module, value in zip(modules, (1, 2)):
        module.forward(batch(np.full((4, 3), value, "float32")), is_train=True)
    mx.nd.waitall()
    (key,) = barrier_stats().keys.values()
    assert key.rounds == 1 and set(key.devices) == {"cpu(0)", "cpu(1)"}


def test_a_module_keeps_its_keys_when_it_is_reshaped():
    module = bound(layer())
    barrier_stats(reset=True)
    for size in (4, 6):
        module.reshape([("data", (size, 3))], [("softmax_label", (size,))])
        module.forward(mx.io.DataBatch([mx.nd.ones((size, 3))], [mx.nd.zeros(size)]), is_train=True)
        mx.nd.waitall()
    (key,) = barrier_stats().keys.values()
    assert key.rounds == 2
