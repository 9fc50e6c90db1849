"""The example that compares normalization layers over batch sizes, and the speed of inference."""

import json
import pickle
import re

import mxnet as mx
import numpy as np
import pytest

import fresh_process
from gluon_syncbn import CenConv2d, MABN2d, SyncBatchNorm
from paths import ROOT

EXAMPLES = ROOT / "examples"
TINY = ("--epochs", "1", "--num-devices", "2", "--batch-sizes", "32", "--speed", "no")


@pytest.fixture
def small_batch(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import small_batch

    return small_batch


def test_it_prints_a_table_and_draws_a_chart(tmp_path):
    done = fresh_process.run(EXAMPLES / "small_batch.py", *TINY, "--seeds", 1, "--out", tmp_path)
    runs = json.loads((tmp_path / "small_batch.json").read_text())["runs"]
    assert [run["method"] for run in runs] == ["bn", "syncbn", "mabn", "brn", "gn"]
    # 898 images, 64 a step.
    assert all(run["steps"] == 14 and np.isfinite(run["training_loss"]) for run in runs)
    assert "70/70" in done.stderr  # the progress bar, in steps
    for name, run in zip(("BN", "SyncBN", "MABN", "Batch renorm.", "GroupNorm"), runs):
        assert f"\n| {name} | {run['error']:.2f} (" in done.stdout, done.stdout
        assert ("recalibrated" in run) == (run["method"] in ("bn", "syncbn", "brn"))
    assert len(re.findall(r"^\| BN \|", done.stdout, re.M)) == 3
    assert len(re.findall(r"^\| MABN \|", done.stdout, re.M)) == 2  # it is not re-estimated
    assert (tmp_path / "small_batch.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_means_and_extremes_over_the_seeds(small_batch):
    errors = {2: (4, 1, 7), 32: (2, 2, 2)}
    runs = [
        {"method": "gn", "batch_size": size, "seed": seed, "error": error}
        for size, seeds in errors.items()
        for seed, error in enumerate(seeds)
    ]
    last = small_batch.table(runs, "error", "test error").splitlines()[-1]
    assert last == "| GroupNorm | 4.00 (1.00 to 7.00) | 2.00 (2.00 to 2.00) |"


def test_an_interrupted_comparison_goes_on(small_batch, tmp_path, monkeypatch, capsys):
    arguments = [*TINY, "--seeds", "2", "--methods", "bn", "gn", "--out", str(tmp_path)]
    train, trained, limit = small_batch.train, [], 3

    def watched(*run):
        if len(trained) == limit:
            raise KeyboardInterrupt
        trained.append(run[:3])
        return train(*run)

    monkeypatch.setattr(small_batch, "train", watched)
    with pytest.raises(KeyboardInterrupt):
        small_batch.main(arguments)
    before = json.loads((tmp_path / "small_batch.json").read_text())["runs"]
    assert [(r["method"], r["batch_size"], r["seed"]) for r in before] == trained
    assert trained == [("bn", 32, 0), ("gn", 32, 0), ("bn", 32, 1)]

    trained.clear()
    limit = None
    small_batch.main(arguments)
    assert trained == [("gn", 32, 1)]
    assert "4 runs, 3 of them in" in capsys.readouterr().out
    after = json.loads((tmp_path / "small_batch.json").read_text())["runs"]
    assert after[:3] == before and len(after) == 4

    with pytest.raises(SystemExit, match="runs with other settings.*'epochs': 1.*another --out"):
        small_batch.main([*arguments, "--epochs", "2"])


def test_all_methods_start_from_the_same_weights(small_batch):
    def weights(method, seed):
        mx.random.seed(seed)
        net = small_batch.make_network(method, 4, 1, [mx.cpu(0), mx.cpu(1)])
        kinds = {type(layer) for layer in net}
        assert (MABN2d in kinds and CenConv2d in kinds) == (method == "mabn")
        assert (SyncBatchNorm in kinds) == (method in ("syncbn", "brn"))
        found = [p.data(mx.cpu(1)).asnumpy() for p in net.collect_params(".*weight$").values()]
        assert len(found) == 7
        return found

    first = weights("bn", 3)
    for method in small_batch.METHODS:
        for one, other in zip(first, weights(method, 3)):
            np.testing.assert_array_equal(one, other)
    assert abs(first[0] - weights("bn", 4)[0]).max() > 0.01


def test_all_batch_sizes_see_the_same_images(small_batch):
    arguments = small_batch.parse_arguments(["--num-devices", "4"])
    for size in (1, 2, 4, 8, 16, 32):
        assert small_batch.steps_of(size, arguments, 898) * size * 4 == 896


def test_the_limits_of_renormalization_are_the_papers(small_batch):
    limits = small_batch.renormalization_limits
    assert limits(0) == limits(5 / 160) == {"rmax": 1, "rmin": 1, "dmax": 0}
    assert limits(15 / 160)["dmax"] == 2.5
    assert limits(1) == limits(40 / 160) == {"rmax": 3, "rmin": 1 / 3, "dmax": 5}


def test_group_normalization_has_parameters_for_each_channel(small_batch):
    net = small_batch.GroupNorm(16)
    net.initialize()
    values = np.random.RandomState(0).randn(2, 16, 3, 3).astype("float32")
    gamma = np.arange(16, dtype="float32").reshape(1, 16, 1, 1)
    net.gamma.set_data(mx.nd.array(gamma))
    net.beta.set_data(mx.nd.array(gamma + 1))
    groups = values.reshape(2, 8, -1)
    groups = groups - groups.mean(2, keepdims=True)
    groups /= np.sqrt((groups**2).mean(2, keepdims=True) + 1e-5)
    expected = groups.reshape(values.shape) * gamma + gamma + 1
    np.testing.assert_allclose(net(mx.nd.array(values)).asnumpy(), expected, atol=1e-4)


def test_cifar_is_read_in_both_versions(small_batch, tmp_path):
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (6, 2, 3072), dtype="uint8")
    labels = random.randint(0, 10, (6, 2), dtype="uint8")
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for kind in ("python", "binary"):
        (tmp_path / kind).mkdir()
    for name, image, label in zip(names, images, labels):
        content = pickle.dumps({b"data": image, b"labels": label.tolist()})
        (tmp_path / "python" / name).write_bytes(content)
        rows = np.concatenate([label[:, None], image], axis=1)
        (tmp_path / "binary" / f"{name}.bin").write_bytes(rows.tobytes())
    expected = images.reshape(12, 3, 32, 32) / 255
    for kind in ("python", "binary"):
        (train, train_labels), (test, test_labels) = small_batch.load_cifar(tmp_path / kind)
        np.testing.assert_allclose(np.concatenate([train, test]), expected, rtol=1e-6)
        np.testing.assert_array_equal(
            np.concatenate([train_labels, test_labels]), labels.reshape(-1)
        )
    (tmp_path / "binary" / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(SystemExit, match=r"test_batch.bin has 5 bytes, no multiple of 3073"):
        small_batch.load_cifar(tmp_path / "binary")
    with pytest.raises(SystemExit, match="neither data_batch_1 to data_batch_5 .*cifar-10"):
        small_batch.load_cifar(tmp_path)


def test_the_speed_of_inference(small_batch, tmp_path, capsys):
    small_batch.main(["--speed", "only", "--rounds", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (.*?) \| (\d+) \| ([\d.]+) \| (\d*) \| ([\d.]*) \|$", printed, re.M)
    folded = {name: bool(images) for name, _, _, images, _ in rows}
    assert folded == {
        **{"BN, MXNet's": True, "BN, ours": True, "MABN": True},
        **{"GroupNorm": False, "LayerNorm": False, "InstanceNorm": False},
    }
    assert rows[0][2] == "1.00"
    assert not (tmp_path / "small_batch.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small_batch_speed.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--batch-sizes", "3"], "invalid choice: 3"),
        (["--methods", "ln"], "invalid choice: 'ln'"),
    ],
)
def test_bad_arguments(small_batch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        small_batch.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_too_many_devices(small_batch, tmp_path):
    with pytest.raises(SystemExit, match="--num-devices 29 is too many: 898 training images"):
        small_batch.main(["--num-devices", "29", "--out", str(tmp_path)])
