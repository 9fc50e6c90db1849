"""The all-reduces that a network takes part in, and their keys."""

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import (
    ModelDataParallel,
    SyncBatchNorm,
)
from gluon_syncbn.data_parallel.exchanges import exchanges_of
from networks import (
    split,
)


def test_keys_stay_apart(tmp_path):
    """Whatever the user called them."""
    x = mx.sym.var("data")
    both = [
        mx.sym.contrib.KeyBarrierSum(x, key=key, num_devices=2) for key in ("k@1", "k@2", "k@2")
    ]
    block = mx.gluon.SymbolBlock(mx.sym.Group(both), x, params=None)
    for _ in range(2):
        keys = [exchange.key for exchange in exchanges_of(block)]
        assert len(set(keys)) == 2 and keys[1] == keys[2]
    assert keys[0].startswith("k@1") and keys[1].startswith("k@2")


def test_two_copies_of_one_file_do_not_mix(two, rng, tmp_path):
    """A teacher and a student from one exported file, on different data, in different order."""
    net = nn.HybridSequential(prefix="copied_")
    net.add(SyncBatchNorm(in_channels=3, prefix="norm_"))
    net.initialize(ctx=two)
    net.hybridize()
    net(mx.nd.ones((1, 3), ctx=two[0]))
    net.export(str(tmp_path / "net"))
    models = [
        ModelDataParallel(
            gluon.SymbolBlock.imports(
                str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params"), two
            ),
            two,
        )
        for _ in range(2)
    ]
    keys = [{e.key for e in exchanges_of(model.net)} for model in models]
    assert not keys[0] & keys[1] and len(keys[0]) == 1
    x = rng.randn(6, 3).astype("float32")
    for model, scale in zip(models, (1, 100)):
        with autograd.record():
            outs = model(split(scale * x, two))
        got = np.concatenate([o.asnumpy() for o in outs])
        np.testing.assert_allclose(got, (x - x.mean(0)) / x.std(0), atol=1e-3)
    # Exported again, the name does not grow.
    models[0].net.export(str(tmp_path / "again"))
    again = gluon.SymbolBlock.imports(
        str(tmp_path / "again-symbol.json"), ["data"], str(tmp_path / "again-0000.params"), two
    )
    (exchange,) = exchanges_of(again)
    assert exchange.key.count("@") == 1
