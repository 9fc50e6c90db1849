"""The example that converts, trains and exports a network of the model zoo."""

import re

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn
from mxnet.gluon.model_zoo import vision

import fresh_process
from paths import ROOT

EXAMPLES = ROOT / "examples"


def run_example(*arguments):
    done = fresh_process.run(EXAMPLES / "finetune.py", *arguments, timeout=300)
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture
def finetune(monkeypatch):
    """Import the script as a module, for what ends before training starts."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import finetune

    return finetune


def checkpoint(path, model, classes):
    mx.random.seed(7)  # another seed than the example's, which would draw the same weights
    net = getattr(vision, model)(classes=classes)
    net.initialize(mx.init.Xavier())
    net(mx.nd.zeros((1, 3, 32, 32)))
    net.save_parameters(str(path))
    return net


def check_exports(printed, folder, model):
    """Both exports give what the network gave; the folded one has no BatchNorm any more."""
    same = re.findall(r"same class for (\d+) of (\d+) test images", printed)
    assert same == [("360", "360")] * 2, printed
    differences = [float(d) for d in re.findall(r"differ by at most (\S+)", printed)]
    assert len(differences) == 2 and max(differences) < 1e-3, printed
    for name, norms in ((model, True), (f"{model}-folded", False)):
        assert (folder / f"{name}-0000.params").stat().st_size > 100_000
        symbol = (folder / f"{name}-symbol.json").read_text()
        assert ('"BatchNorm"' in symbol) == norms
        assert "KeyBarrier" not in symbol and "gluon_syncbn" not in symbol
        for file in (f"{name}-symbol.json", f"{name}-0000.params"):
            assert str(folder / file) in printed


def test_it_learns_and_the_exports_agree(tmp_path):
    printed = run_example("--image-size", "48", "--epochs", "5", "--out", str(tmp_path))
    assert "from random weights, 27 batch normalizations synchronized" in printed
    assert "over cpu(0), cpu(1)" in printed
    accuracy = [float(a) for a in re.findall(r"test accuracy (\S+)%", printed)]
    assert len(accuracy) == 5 and accuracy[-1] >= 85, printed
    assert (tmp_path / "mobilenet0_25.png").read_bytes().startswith(b"\x89PNG")
    check_exports(printed, tmp_path, "mobilenet0_25")


def test_it_starts_from_a_checkpoint_of_the_unconverted_network(tmp_path):
    file, model = tmp_path / "base.params", "mobilenet_v2_0_25"
    base = checkpoint(file, model, classes=7)
    # The learning rate is so low that the weights stay as they are.
    printed = run_example(
        *("--model", model, "--params", str(file), "--image-size", "32"),
        *("--epochs", "1", "--lr", "1e-9", "--out", str(tmp_path)),
    )
    assert f"{model} from {file}, 53 batch normalizations synchronized" in printed
    check_exports(printed, tmp_path, model)
    exported = mx.nd.load(str(tmp_path / f"{model}-0000.params"))

    def weights(values):
        # The prefix, which counts the networks that a process has made, is left out.
        named = {name.split("_", 1)[1]: value.asnumpy() for name, value in values}
        return {name: v for name, v in named.items() if re.match("features_.*weight$", name)}

    given = weights((p.name, p.data()) for p in base.features.collect_params().values())
    kept = weights(exported.items())
    assert given.keys() == kept.keys() and len(given) > 50
    for name in given:
        np.testing.assert_allclose(kept[name], given[name], atol=1e-5, err_msg=name)
    assert any(v.shape[0] == 10 for name, v in exported.items() if "pred_weight" in name)


def test_the_models_are_those_with_batch_normalization(finetune):
    with_norm = []
    for name in sorted(set(vars(vision))):
        if not callable(getattr(vision, name)) or not re.fullmatch(r"[a-z]+_?v?\d.*|alexnet", name):
            continue
        found = []
        getattr(vision, name)().apply(lambda b, f=found: f.append(isinstance(b, nn.BatchNorm)))
        if any(found):
            with_norm.append(name)
    assert finetune.MODELS == with_norm and "vgg11_bn" in with_norm


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-devices", "0"], "--num-devices must be 1 or more"),
        (["--image-size", "0"], "--image-size must be 1 or more"),
        (["--model", "vgg11"], "with batch normalization: densenet121, .*vgg19_bn$"),
        (["--params", "nowhere.params"], "--params nowhere.params: there is no such file"),
        (["--params", "a", "--pretrained"], "not allowed with"),
    ],
)
def test_bad_arguments(finetune, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        finetune.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err.strip())


def test_what_cannot_be_had_is_said(finetune, monkeypatch, tmp_path):
    def message(*arguments):
        with pytest.raises(SystemExit) as stopped:
            finetune.main([*arguments, "--out", str(tmp_path / "out")])
        return stopped.value.code

    assert re.search(
        r"99, but \d+ GPUs are visible", message("--ctx", "gpu", "--num-devices", "99")
    )
    small = message("--model", "densenet121", "--image-size", "32")
    assert small.startswith("--image-size 32 does not suit densenet121")

    file = tmp_path / "other.params"
    checkpoint(file, "mobilenet0_5", classes=1000)
    assert f"{file} is no checkpoint of mobilenet0_25" in message("--params", str(file))
    file.write_text("no parameters at all")
    reason = message("--params", str(file))
    assert f"{file} is no checkpoint of mobilenet0_25: MXNetError: Check failed" in reason

    # Nothing listens there.
    monkeypatch.setenv("MXNET_GLUON_REPO", "http://127.0.0.1:9/")
    monkeypatch.setenv("MXNET_HOME", str(tmp_path))
    assert "--pretrained: no weights of vgg11_bn" in message("--model", "vgg11_bn", "--pretrained")
    assert not (tmp_path / "out").exists()
