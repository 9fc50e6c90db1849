"""Files and names of any content raise a Python exception or work; what comes after is right."""

import re

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import fresh_process
from damaged_files import LAYERS
from gluon_syncbn import (
    KeyBarrierSum,
    ModelDataParallel,
    SyncBatchNorm,
    convert_symbol,
    parallel_backward,
    revert_batchnorm,
)
from gluon_syncbn.data_parallel.exchanges import exchanges_of
from gluon_syncbn.symbol import SyncBatchNorm as SymbolSyncBatchNorm
from networks import split
from paths import TESTS
from reference import batch_norm, largest_error

PROGRAM = TESTS / "helpers" / "damaged_files.py"


# glibc then finds writes past the end of an array when it is freed.  Where it has no such library,
# the loader says so and goes on.
CHECKED = {
    "LD_PRELOAD": "libc_malloc_debug.so.0",
    "MALLOC_CHECK_": "3",
    "MALLOC_PERTURB_": "165",
}


def survive(*arguments, timeout=120):
    process = fresh_process.run(PROGRAM, *arguments, timeout=timeout, **CHECKED)
    lines = process.stdout.splitlines()
    assert lines[-1] == "all were survived"
    return lines[:-1]


def test_a_sample_of_damaged_files():
    lines = survive("8")
    assert len(lines) == 8 * len(LAYERS)
    for expected in ("MXNetError", "ValueError", r"\[\]$"):  # some of them happen to work
        assert any(re.search(expected, line) for line in lines), expected


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_all_damaged_files(layer):
    assert len(survive("all", layer, timeout=1200)) > 300


NAMES = [
    *("слой_", "層_", "🙂_", 'with "quotes" and \\ _', "line\nbreak\tand\rtab_", "\x01\x1f\x7f_"),
    *("%s%n{}{0}_", "'; --", "@graph1", "#2", "a" * 100000 + "_", ""),
]


def step(model, two):
    """Train a step; return the largest error of the output."""
    x = np.random.RandomState(0).randn(5, 3)
    with autograd.record():
        ys = model(split(x, two))
    parallel_backward(ys)
    mx.nd.waitall()
    wanted = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    return largest_error(np.concatenate([y.asnumpy() for y in ys]), wanted)


@pytest.mark.parametrize("prefix", NAMES, ids=lambda name: ascii(name)[:20])
def test_names_of_any_content(prefix, two, tmp_path):
    """Trained, exported, loaded, trained, converted to plain and back."""
    layer = SyncBatchNorm(in_channels=3, prefix=prefix)
    layer.initialize(ctx=two)
    layer.hybridize()
    assert step(ModelDataParallel(layer, two), two) < 1e-5
    layer.export(str(tmp_path / "net"))
    files = str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params")
    block = gluon.SymbolBlock.imports(*files, ctx=two)
    assert step(ModelDataParallel(block, two), two) < 1e-5
    plain = revert_batchnorm(mx.sym.load(files[0]))
    assert '"BatchNorm"' in plain.tojson()
    assert '"_syncbn_sum"' in convert_symbol(plain).tojson()


def test_keys_that_c_would_cut_short():
    x = mx.nd.ones(3)
    for call in (KeyBarrierSum, mx.nd.contrib.KeyBarrierSum):
        with pytest.raises(ValueError, match="NUL"):
            call(x, key="a\0b", num_devices=1)
    for call in (KeyBarrierSum, mx.sym.contrib.KeyBarrierSum):
        with pytest.raises(ValueError, match="NUL"):
            call(mx.sym.var("x"), key="a\0b", num_devices=1)
    with pytest.raises(ValueError, match="NUL"):
        SymbolSyncBatchNorm(mx.sym.var("x"), key="a\0b")
    assert SyncBatchNorm(prefix="cut\0b").key != SyncBatchNorm(prefix="cut\0c").key


@pytest.mark.parametrize(
    "key", NAMES[:-1] + ["a" * 1000000, "\ud800"], ids=lambda name: ascii(name)[:20]
)
def test_keys_of_any_content(key, two):
    if key == "\ud800":  # has no encoding
        with pytest.raises(ValueError):
            KeyBarrierSum(mx.nd.ones(1), key=key, num_devices=2)
        return
    parts = [mx.nd.full((2,), i + 1.0, ctx=c) for i, c in enumerate(two)]
    for total in [KeyBarrierSum(part, key=key, num_devices=2) for part in parts]:
        np.testing.assert_array_equal(total.asnumpy(), 3)


@pytest.mark.parametrize("size", ["0", "-2", "1.5", "x", "", "9" * 5000])
def test_a_group_size_that_is_none(size, two, tmp_path):
    layer = SyncBatchNorm(in_channels=3, group_size=2, prefix="grouped_")
    layer.initialize()
    layer.hybridize()
    layer(mx.nd.ones((2, 3)))
    layer.export(str(tmp_path / "net"))
    path = tmp_path / "net-symbol.json"
    text = path.read_text(encoding="utf-8")
    assert '"__group_size__": "2"' in text
    path.write_text(text.replace('"__group_size__": "2"', f'"__group_size__": "{size}"'))
    block = gluon.SymbolBlock.imports(str(path), ["data"], str(tmp_path / "net-0000.params"))
    with pytest.raises(ValueError, match="__group_size__ must be a positive integer"):
        ModelDataParallel(block, two)


def test_two_layers_that_a_file_gives_one_key(two, tmp_path):
    """They could add up each other's sums; so they get a key each."""
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(SyncBatchNorm(in_channels=3), SyncBatchNorm(in_channels=3))
    net.initialize()
    net.hybridize()
    net(mx.nd.ones((2, 3)))
    net.export(str(tmp_path / "net"))
    path = tmp_path / "net-symbol.json"
    text = path.read_text(encoding="utf-8")
    keys = re.findall(r'"key": "([^"]*)"', text)
    path.write_text(text.replace(f'"key": "{keys[0]}"', f'"key": "{keys[1]}"'), encoding="utf-8")
    block = gluon.SymbolBlock.imports(str(path), ["data"], str(tmp_path / "net-0000.params"))
    model = ModelDataParallel(block, two)
    assert len({exchange.key for exchange in exchanges_of(block)}) == 2
    step(model, two)
    x = np.random.RandomState(0).randn(5, 3)
    (first,) = batch_norm([x], [x], np.ones(3), np.zeros(3)).y
    mean, var = 0.1 * first.mean(0), 0.9 + 0.1 * first.var(0)
    statistics = [p for name, p in block.collect_params().items() if "batchnorm1_running" in name]
    for parameter, wanted in zip(statistics, (mean, var)):
        np.testing.assert_allclose(parameter.data(two[1]).asnumpy(), wanted, atol=1e-6)
