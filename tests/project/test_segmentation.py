"""The example that trains segmentation: what it draws, computes, prints and writes."""

import re
import sys
import types

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon

import fresh_process
from gluon_syncbn import SyncBatchNorm
from paths import ROOT

EXAMPLES = ROOT / "examples"
TINY = ["--train-images", "8", "--test-images", "5", "--image-size", "24", "--epochs", "2"]


@pytest.fixture
def segmentation(monkeypatch):
    """Import the script as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import segmentation

    return segmentation


def test_it_trains_both_and_writes_a_picture(segmentation, tmp_path):
    out = tmp_path / "out"
    done = fresh_process.run(
        EXAMPLES / "segmentation.py",
        *(*TINY, "--num-devices", "2", "--seeds", "2", "--out", out),
        cwd=tmp_path,
    )
    printed = done.stdout
    assert "Warning" not in done.stderr, done.stderr
    assert "5 classes, 2 images on each of cpu(0), cpu(1)" in printed
    table = printed.split("IoU of held-out images")[1].splitlines()
    assert [line.split()[0] for line in table[1:7]] == [*segmentation.SHAPES, "mean"]
    columns = re.findall(r"(\S+)% ±", table[6])
    for norm, column in zip(("nn.BatchNorm", "SyncBatchNorm"), columns):
        found = re.findall(rf"  {norm} +epoch (\d)/2  loss (\S+)  mean IoU (\S+)%", printed)
        assert [epoch for epoch, _, _ in found] == ["1", "2"] * 2, printed
        assert float(found[1][1]) < float(found[0][1]), printed  # it learns
        last = [float(iou) for epoch, _, iou in found if epoch == "2"]
        assert float(column) == pytest.approx(np.mean(last), abs=0.011)
    assert (out / "segmentation.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [out]


def test_both_start_from_the_same_parameters_and_see_the_same_batches(
    segmentation, monkeypatch, tmp_path
):
    seen = []

    def train(net, title, loaders, *_):
        parameters = [p.data().asnumpy() for p in net.collect_params().values()]
        seen.append([*parameters, *(array.asnumpy() for batch in loaders[0] for array in batch)])
        return net, np.zeros(5)

    monkeypatch.setattr(segmentation, "train", train)
    monkeypatch.setattr(segmentation, "draw_predictions", lambda *_: None)
    segmentation.main([*TINY, "--num-devices", "1", "--seeds", "2", "--out", str(tmp_path)])
    assert len(seen) == 4 and len(seen[0]) > 50
    for plain, synchronized in (seen[:2], seen[2:]):
        for a, b in zip(plain, synchronized):
            np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(seen[0], seen[2]))  # another seed differs


def test_every_class_is_drawn_at_its_place(segmentation):
    rng = np.random.RandomState(0)
    drawn = [segmentation.draw_image(rng, 64) for _ in range(20)]
    for image, labels in drawn:
        assert image.shape == (3, 64, 64) and labels.shape == (64, 64)
        assert image.min() >= 0 and image.max() <= 1
    counts = np.bincount(np.concatenate([labels.ravel() for _, labels in drawn]).astype(int))
    assert len(counts) == 5 and counts.min() > 500, counts
    # Around the centre all shapes have the same radius, about; only a cross has gaps.
    v, u = np.mgrid[-1:1:201j, -1:1:201j]
    areas = {shape: segmentation.inside(shape, u, v).mean() * 4 for shape in segmentation.SHAPES}
    expected = {"disc": 0.8 * np.pi, "square": 1.5**2, "cross": 4 * 0.3 * (1.9 - 0.3)}
    expected["triangle"] = 3 * np.sqrt(3) * 0.5**2
    for shape, area in expected.items():
        assert areas[shape] == pytest.approx(area, rel=0.05), shape


def test_ignored_pixels_count_neither_in_the_loss_nor_in_the_iou(segmentation):
    labels = mx.nd.array([[[0, 1], [1, -1]]], dtype="int32")
    scores = mx.nd.zeros((1, 2, 2, 2))
    scores[0, 1] = 3  # predicts class 1 everywhere
    loss = segmentation.PixelLoss()(scores, labels).asscalar()
    wrong, right = np.log(1 + np.exp(3)), np.log(1 + np.exp(-3))
    assert loss == pytest.approx((wrong + 2 * right) / 4, rel=1e-5)

    def model(shards):
        return [scores]

    model.ctx_list = [mx.cpu(0)]
    iou = segmentation.intersection_over_union(model, [(scores, labels)], 3)
    np.testing.assert_array_equal(iou, [0, 2 / 3, np.nan])


def test_the_network_has_parallel_dilated_branches(segmentation):
    net = segmentation.make_network(5, SyncBatchNorm)
    net.initialize()
    assert net(mx.nd.zeros((2, 3, 24, 32))).shape == (2, 5, 24, 32)
    rates = []
    net.apply(lambda b: isinstance(b, gluon.nn.Conv2D) and rates.append(b._kwargs["dilate"]))
    assert {(2, 2), (4, 4), (6, 6)} <= set(rates)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-devices", "0"], "--num-devices must be 1 or more"),
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--image-size", "30"], "--image-size must be a multiple of 4"),
        (["--train-images", "7"], "--train-images must be 8, one batch, or more"),
        (["--voc", "nowhere"], "--voc nowhere: there is no folder VOC2012 in it"),
    ],
)
def test_bad_arguments(segmentation, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        segmentation.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_voc_needs_gluoncv(segmentation, monkeypatch, tmp_path):
    (tmp_path / "VOC2012").mkdir()
    monkeypatch.setitem(sys.modules, "gluoncv", None)
    with pytest.raises(SystemExit) as stopped:
        segmentation.main(["--voc", str(tmp_path), "--out", str(tmp_path / "out")])
    assert re.search("--voc needs GluonCV .*pip install gluoncv==", stopped.value.code)
    assert not (tmp_path / "out").exists()


class StandIn(gluon.data.Dataset):
    """As GluonCV's VOCSegmentation.  tests/data_parallel/test_gluoncv.py runs the real one."""

    classes = tuple("abc")

    def __init__(self, root, split, mode, transform, base_size, crop_size):
        self._transform, self._size = transform, crop_size
        # Its "train" is trainval.
        self.images = self.masks = list(range(7 if split == "train" else 2))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        rng = np.random.RandomState(index)
        image = mx.nd.array(rng.randint(0, 256, (self._size, self._size, 3)))
        labels = rng.randint(-1, 2, (self._size, self._size))
        return self._transform(image), mx.nd.array(labels, dtype="int32")


def test_voc(segmentation, monkeypatch, tmp_path, capsys):
    (tmp_path / "VOC2012").mkdir()
    package = types.SimpleNamespace(data=types.SimpleNamespace(VOCSegmentation=StandIn))
    monkeypatch.setitem(sys.modules, "gluoncv", package)
    monkeypatch.setitem(sys.modules, "gluoncv.data", package.data)
    arguments = ["--voc", str(tmp_path), "--out", str(tmp_path), "--image-size", "24"]
    segmentation.main([*arguments, "--epochs", "1", "--num-devices", "2"])
    printed = capsys.readouterr().out
    assert "3 classes, 2 images on each of cpu(0), cpu(1)" in printed
    assert re.search(r"^a +\S+% +\S+%\nb .*\nc .*\nmean .*%$", printed, re.M), printed
    assert (tmp_path / "segmentation.png").exists()
    with pytest.raises(SystemExit, match="has 5 training images: less than a batch"):
        segmentation.main([*arguments, "--num-devices", "4"])
