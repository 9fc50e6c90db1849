"""What new users run: the example, and the code in the README and in docstrings."""

import doctest
import importlib
import os
import re
import subprocess

import mxnet as mx
import pytest

import fresh_process
import gluon_syncbn
from paths import ROOT


def run_example(*arguments, **options):
    return fresh_process.run(ROOT / "examples" / "mnist.py", *arguments, timeout=300, **options)


@pytest.mark.parametrize("arguments", [[], ["--hybridize", "--num-devices", "3"]])
def test_digits_reach_97_percent(arguments, tmp_path):
    done = run_example("--out", tmp_path, *arguments)
    accuracy = [float(a) for a in re.findall(r"test accuracy (\S+)%", done.stdout)]
    assert len(accuracy) == 8 and accuracy[-1] >= 97, done.stdout
    assert len(re.findall(r"loss \d", done.stdout)) == 8
    for name in ("digits.params", "digits-symbol.json", "digits-0000.params", "digits.png"):
        assert (tmp_path / name).stat().st_size > 1000, name
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    net = mx.gluon.SymbolBlock.imports(
        str(tmp_path / "digits-symbol.json"), ["data"], str(tmp_path / "digits-0000.params")
    )
    assert net(mx.nd.zeros((2, 1, 8, 8))).shape == (2, 10)


def test_the_seed_decides(tmp_path):
    outs = [
        run_example("--epochs", 1, "--out", tmp_path, "--seed", seed).stdout.split("trained")
        for seed in (1, 1, 2)
    ]
    assert outs[0][0] == outs[1][0] != outs[2][0]


def test_bad_arguments():
    done = run_example("--num-devices", 0, status=2)
    assert "--num-devices must be 1 or more" in done.stderr
    done = run_example("--ctx", "gpu", status=1)
    assert "GPUs are visible" in done.stderr


def code_of(document):
    """Extract a document's Python, keeping line numbers, without parts marked "skip"."""
    with open(os.path.join(ROOT, document), encoding="utf-8") as file:
        parts = re.split(r"(```python\n.*?```)", file.read(), flags=re.S)
    return "".join(
        f"\n{part[10:-3]}" if i % 2 else "\n" * part.count("\n") for i, part in enumerate(parts)
    )


@pytest.mark.parametrize("document", ["README.md", "docs/own-model.md"])
def test_the_documents_code_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(code_of(document), document, "exec"), scope)
    assert scope["losses"][1].shape[0] > 1
    assert (tmp_path / "resnet-symbol.json").exists()


@pytest.mark.parametrize(
    "name",
    [
        "conversion.blocks",
        "conversion.inference_export",
        "data_parallel.backward",
        "data_parallel.criterion",
        "data_parallel.estimator",
        "data_parallel.gluoncv_model",
        "data_parallel.model",
        "key_barrier",
        "key_barrier_sum",
        "symbol",
        "sync_batch_norm",
    ],
)
def test_the_docstrings_examples_run(name):
    try:
        failed, tried = doctest.testmod(importlib.import_module(f"gluon_syncbn.{name}"))
    finally:
        gluon_syncbn.set_timeout(30)
    assert failed == 0
    assert tried


def test_make_help_lists_the_targets():
    printed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    targets = "train", "finetune", "small_batch", "segmentation", "test", "build", "lint", "format"
    for target in targets:
        assert re.search(rf"^{target}\s+\S", printed, re.M), printed
