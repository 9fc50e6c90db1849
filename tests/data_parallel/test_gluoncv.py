"""GluonCV as it is on our layers: its models, in our ModelDataParallel and in its own wrappers.

Skipped by default, since GluonCV needs an environment of its own: run `make gluoncv`.
"""

import os

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluon_syncbn
from gluon_syncbn import (
    DataParallelCriterion,
    DataParallelModel,
    ModelDataParallel,
    SyncBatchNorm,
    convert_sync_batchnorm,
    parallel_backward,
    symbol,
)
from paths import ROOT

pytest.importorskip("gluoncv")

from gluoncv import model_zoo  # noqa: E402
from gluoncv import utils as gluoncv_utils  # noqa: E402
from gluoncv.loss import MixSoftmaxCrossEntropyLoss  # noqa: E402
from gluoncv.model_zoo.segbase import SegEvalModel  # noqa: E402
from gluoncv.nn import feature  # noqa: E402
from gluoncv.utils import parallel as theirs  # noqa: E402
from PIL import Image  # noqa: E402

BATCH, CLASSES = 4, ["cat", "dog"]
STATIC = {"static_alloc": True, "static_shape": True}


def norm(devices):
    return {"norm_layer": SyncBatchNorm, "norm_kwargs": {"num_devices": devices}}


class Detection(gluon.HybridBlock):
    """A loss that is a sum over images, unlike SSDMultiBoxLoss, which wants all devices at once."""

    def hybrid_forward(self, F, scores, boxes, anchors, labels, targets):
        cross_entropy = gluon.loss.SoftmaxCrossEntropyLoss()(scores, labels)
        return cross_entropy + gluon.loss.HuberLoss()(boxes, targets)


class Weighted(gluon.HybridBlock):
    """YOLO3 computes its losses itself, and GluonCV's criterion must be given some target."""

    def hybrid_forward(self, F, objectness, center, scale, classes, weight):
        return (objectness + center + scale + classes) * weight


class Segmentation:
    dtype, tolerance = "float64", 1e-9  # so deep that float32 hides real differences
    shape = (BATCH, 3, 32, 32)

    def __init__(self, model):
        self.model = model

    def net(self, devices):
        return self.model(
            nclass=4,
            backbone="resnet50",
            aux=True,
            pretrained_base=False,
            crop_size=self.shape[-1],
            **norm(devices),
        )

    def data(self, rng):
        return [rng.randn(*self.shape)], [rng.randint(0, 4, (BATCH,) + self.shape[2:])]

    def loss(self):
        # By default it averages over each device's pixels; then two devices sum to twice the
        # gradient, whatever the layers do.
        return MixSoftmaxCrossEntropyLoss(aux=True, size_average=False)


def small_ssd(**options):
    return model_zoo.get_ssd(
        "mobilenet0.25",
        96,
        features=["relu22_fwd", "relu26_fwd"],
        filters=[64],
        sizes=[10, 30, 60, 90],
        ratios=[[1, 2, 0.5]] * 3,
        steps=[16, 32, 64],
        classes=CLASSES,
        dataset="none",
        pretrained_base=False,
        **options,
    )


class SSD:
    dtype, tolerance = "float32", 1e-4

    def net(self, devices):
        # The layers that GluonCV appends to a named network keep its own BatchNorm; use_bn=False
        # leaves them out, so that the whole network is synchronized.
        return small_ssd(use_bn=False, **norm(devices))

    def data(self, rng):
        anchors = 4 * (6 * 6 + 3 * 3 + 2 * 2)
        labels = rng.randint(0, 3, (BATCH, anchors))
        return [rng.randn(BATCH, 3, 96, 96)], [labels, rng.randn(BATCH, anchors, 4)]

    def loss(self):
        return Detection()


class YOLO3:
    dtype, tolerance = "float32", 1e-4

    def net(self, devices):
        return model_zoo.yolo3_mobilenet0_25_custom(
            classes=CLASSES, pretrained_base=False, **norm(devices)
        )

    def data(self, rng):
        boxes = 3 * (2 * 2 + 4 * 4 + 8 * 8)
        corner = rng.uniform(0, 30, (BATCH, 3, 2))
        objects = rng.rand(BATCH, boxes, 1) < 0.2
        inputs = [
            rng.randn(BATCH, 3, 64, 64),
            np.concatenate([corner, corner + rng.uniform(5, 30, corner.shape)], axis=2),
            objects,
            rng.rand(BATCH, boxes, 2),
            rng.randn(BATCH, boxes, 2),
            np.ones((BATCH, boxes, 2)),
            np.where(objects, np.eye(2)[rng.randint(0, 2, (BATCH, boxes))], -1),
        ]
        return inputs, [np.ones(BATCH)]

    def loss(self):
        return Weighted()


CASES = {
    "fcn": Segmentation(model_zoo.FCN),
    "psp": Segmentation(model_zoo.PSPNet),
    "deeplab": Segmentation(model_zoo.DeepLabV3),
    "ssd": SSD(),
    "yolo3": YOLO3(),
}


def without_dropout(net):
    """Its masks depend on the device."""
    net.apply(lambda block: isinstance(block, nn.Dropout) and setattr(block, "_rate", 0))
    return net


def split(arrays, contexts):
    return [gluon.utils.split_and_load(array, contexts) for array in arrays]


def our_step(net, loss, contexts):
    model, criterion = ModelDataParallel(net, contexts), DataParallelCriterion(loss, contexts)

    def step(inputs, targets):
        with autograd.record():
            losses = criterion(model(*split(inputs, contexts)), *split(targets, contexts))
        parallel_backward(losses)
        return losses

    return step


def prepare(net, contexts, inputs):
    """Initialize and trace in one thread: GluonCV's wrapper would in all of them at once.

    This is what the documentation says to do before; it moves the statistics by a step.
    """
    with autograd.record():
        ModelDataParallel(net, contexts)(*split(inputs, contexts))
    for name, p in net.collect_params(".*running_(mean|var)").items():
        p.set_data(mx.nd.full(p.shape, name.endswith("var"), dtype=p.dtype))


def their_step(net, loss, contexts):
    model = theirs.DataParallelModel(net, contexts, sync=True)
    criterion = theirs.DataParallelCriterion(loss, contexts, sync=True)

    def step(inputs, targets):
        with autograd.record():
            losses = criterion(model(*inputs), *targets)
        theirs.parallel_backward(losses)
        return losses

    return step


def train(case, devices, make_step, hybridize=None):
    """Two steps: the losses of both, and the first one's gradients and moving statistics."""
    contexts = [mx.cpu(i) for i in range(devices)]
    mx.random.seed(1)
    net = without_dropout(case.net(devices))
    net.initialize(mx.init.Normal(0.05), ctx=contexts, force_reinit=True)
    net.cast(case.dtype)
    data = case.data(np.random.RandomState(0))
    inputs, targets = ([mx.nd.array(a, dtype=case.dtype) for a in arrays] for arrays in data)
    net(inputs[0][:1])  # draws the weights, in another order if it were hybridized
    if hybridize is not None:
        net.hybridize(**hybridize)
    if make_step is their_step:
        prepare(net, contexts, inputs)
    step = make_step(net, case.loss(), contexts)
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 1e-4})
    losses, first = [], None
    for _ in range(2):
        parts = step(inputs, targets)
        losses.append(np.concatenate([part.asnumpy().ravel() for part in parts]))
        if first is None:
            mx.nd.waitall()
            parameters = net._collect_params_with_prefix()
            gradients = {
                name: sum(p.grad(c).asnumpy() for c in contexts)
                for name, p in parameters.items()
                if p.grad_req != "null"
            }
            statistics = {
                name: [p.data(c).asnumpy() for c in contexts]
                for name, p in parameters.items()
                if "running" in name
            }
            first = gradients, statistics
        trainer.step(BATCH)
    mx.nd.waitall()
    return losses, *first


@pytest.fixture(scope="module")
def whole_batch():
    """What one device with the whole batch gives, computed once for each model."""
    results = {}

    def get(name):
        if name not in results:
            results[name] = train(CASES[name], 1, our_step)
        return results[name]

    return get


@pytest.mark.parametrize(
    "make_step, hybridize",
    [(our_step, None), (our_step, STATIC), (their_step, None), (their_step, {})],
    ids=["ours", "ours-static", "theirs", "theirs-hybrid"],
)
@pytest.mark.parametrize("name", CASES)
def test_two_devices_train_as_one(name, make_step, hybridize, whole_batch):
    case = CASES[name]
    losses, gradients, statistics = train(case, 2, make_step, hybridize)
    wanted_losses, wanted_gradients, wanted_statistics = whole_batch(name)
    assert len(statistics) >= 50 and statistics.keys() == wanted_statistics.keys()
    # The second only roughly: a step amplifies rounding, as another order of the batch does.
    np.testing.assert_allclose(losses[0], wanted_losses[0], rtol=case.tolerance)
    np.testing.assert_allclose(losses[1], wanted_losses[1], rtol=1e-3)
    largest = max(np.linalg.norm(wanted) for wanted in wanted_gradients.values())
    for key, wanted in wanted_gradients.items():
        error = np.linalg.norm(gradients[key] - wanted)
        assert error <= case.tolerance * (np.linalg.norm(wanted) + 1e-3 * largest), key
    for key, arrays in statistics.items():
        assert arrays[0].tobytes() == arrays[1].tobytes(), key
        (wanted,) = wanted_statistics[key]
        np.testing.assert_allclose(
            arrays[0], wanted, rtol=case.tolerance, atol=case.tolerance, err_msg=key
        )


@pytest.mark.parametrize("network", ["darknet53", "mobilenet1.0", "mobilenet0.25"])
def test_every_normalization_of_yolo3_is_ours(network):
    net = model_zoo.get_model(
        f"yolo3_{network}_custom", classes=CLASSES, pretrained_base=False, **norm(2)
    )
    layers = []
    net.apply(lambda block: isinstance(block, nn.BatchNorm) and layers.append(block))
    assert len(layers) > 40 and all(isinstance(layer, SyncBatchNorm) for layer in layers)
    assert {layer.num_devices for layer in layers} == {2}


def test_evaluation_waits_for_nobody():
    """GluonCV evaluates one device after the other."""
    contexts = [mx.cpu(0), mx.cpu(1)]
    net = CASES["deeplab"].net(2)
    net.initialize(ctx=contexts, force_reinit=True)
    x = mx.nd.random.normal(shape=Segmentation.shape)
    wanted = net(x)[0].asnumpy()
    got = theirs.DataParallelModel(SegEvalModel(net), contexts)(x)
    got = np.concatenate([part[0].asnumpy() for part in got])
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


class Script:
    """Does what scripts/segmentation/train.py --syncbn does, call by call, with other imports.

    What differs: parallel_backward, on CPU contexts; pixels are summed, not averaged over each
    device's, so that one device gives the same gradients; and there is no Dropout.
    """

    dtype, crop = "float64", 32

    def __init__(self, ctx, aux, syncbn=True):
        self.ctx = ctx
        model = without_dropout(
            model_zoo.FCN(
                nclass=4,
                backbone="resnet50",
                norm_layer=SyncBatchNorm,
                norm_kwargs={"num_devices": len(ctx)},
                aux=aux,
                base_size=self.crop,
                crop_size=self.crop,
                pretrained_base=False,
            )
        )
        # Pretrained weights would lie on the CPU, as these do.
        model.initialize(mx.init.Normal(0.05), force_reinit=True)
        model.cast(self.dtype)
        self.net = DataParallelModel(model, ctx, syncbn)
        self.evaluator = DataParallelModel(SegEvalModel(model), ctx)
        criterion = MixSoftmaxCrossEntropyLoss(aux, aux_weight=0.5, size_average=False)
        self.criterion = DataParallelCriterion(criterion, ctx, syncbn)
        self.lr_scheduler = gluoncv_utils.LRSequential(
            [
                gluoncv_utils.LRScheduler("linear", 0, 1e-4, nepochs=0, iters_per_epoch=3),
                gluoncv_utils.LRScheduler("poly", 1e-4, nepochs=1, iters_per_epoch=3, power=0.9),
            ]
        )
        for v in self.net.module.collect_params(".*beta|.*gamma|.*bias").values():
            v.wd_mult = 0.0
        self.optimizer = gluon.Trainer(
            self.net.module.collect_params(),
            "sgd",
            {"lr_scheduler": self.lr_scheduler, "wd": 1e-4, "momentum": 0.9},
            kvstore=mx.kv.create("local"),
        )
        self.metric = gluoncv_utils.metrics.SegmentationMetric(4)

    def training(self, data, target):
        train_loss = 0.0
        with autograd.record(True):
            outputs = self.net(data.astype(self.dtype, copy=False))
            losses = self.criterion(outputs, target)
            mx.nd.waitall()
        parallel_backward(losses)
        self.optimizer.step(len(data))
        for loss in losses:
            train_loss += np.mean(loss.asnumpy()) * len(loss) / len(data)
        mx.nd.waitall()
        return train_loss

    def validation(self, data, target):
        self.metric.reset()
        outputs = self.evaluator(data.astype(self.dtype, copy=False))
        outputs = [x[0] for x in outputs]
        targets = gluon.utils.split_and_load(target, self.ctx, even_split=False)
        self.metric.update(targets, outputs)
        mx.nd.waitall()
        return self.metric.get(), np.concatenate([x.asnumpy() for x in outputs])


@pytest.mark.parametrize("aux", [False, True])
def test_the_segmentation_script(aux, tmp_path):
    results = []
    for devices in (1, 2):
        mx.random.seed(1)
        rng = np.random.RandomState(0)
        script = Script([mx.cpu(i) for i in range(devices)], aux)
        losses, scores = [], []
        for size in (4, 3):
            data = mx.nd.array(rng.randn(size, 3, script.crop, script.crop))
            target = mx.nd.array(rng.randint(0, 4, (size, script.crop, script.crop)))
            losses.append(script.training(data, target))
            scores.append(script.validation(data, target))
        script.net.module.save_parameters(str(tmp_path / "fcn.params"))
        script.net.module.load_parameters(str(tmp_path / "fcn.params"), ctx=script.ctx)
        assert script.net.module.conv1[0].weight.list_ctx() == script.ctx
        results.append((losses, scores))
    (wanted_losses, wanted_scores), (losses, scores) = results
    # Later steps only roughly: a step amplifies rounding.
    np.testing.assert_allclose(losses[0], wanted_losses[0], rtol=1e-9)
    np.testing.assert_allclose(losses[1], wanted_losses[1], rtol=1e-3)
    (_, prediction), (_, wanted) = scores[0], wanted_scores[0]
    np.testing.assert_allclose(prediction, wanted, rtol=1e-3, atol=1e-3)
    for (score, _), (wanted, _) in zip(scores, wanted_scores):
        np.testing.assert_allclose(score, wanted, atol=0.01)


@pytest.mark.parametrize("devices", [1, 2])
def test_our_wrappers_give_what_theirs_give(devices):
    """Form and values, for structures of inputs; theirs without threads, on plain layers."""
    contexts = [mx.cpu(i) for i in range(devices)]

    class Evaluator:
        def __init__(self, net, form):
            self.net, self.form = net, form

        def __call__(self, inputs, scale=1):
            x, (y, _) = inputs
            return self.form(self.net(x) + y * scale)

        def collect_params(self):
            return self.net.collect_params()

    net = nn.Dense(3, in_units=3)
    net.initialize(ctx=contexts)
    x = mx.nd.random.normal(shape=(5, 3))
    loss = gluon.loss.L2Loss()
    for form in (lambda y: y, lambda y: [y], lambda y: (y,)):
        results = []
        for module in (theirs, gluon_syncbn):
            model = module.DataParallelModel(Evaluator(net, form), contexts)
            outputs = model((x, [x, None]), scale=2)
            losses = module.DataParallelCriterion(loss, contexts)(outputs, x)
            results.append((outputs, losses))
        (wanted, wanted_losses), (outputs, losses) = results
        assert type(outputs) is type(wanted) is tuple and len(outputs) == len(wanted) == devices
        for got, want in zip(outputs, wanted):
            assert type(got) is type(want) is tuple and got[0].context == want[0].context
            np.testing.assert_array_equal(got[0].asnumpy(), want[0].asnumpy())
        assert len(losses) == len(wanted_losses)
        for got, want in zip(losses, wanted_losses):
            np.testing.assert_array_equal(got.asnumpy(), want.asnumpy())
    plain = theirs.DataParallelModel(net)(x), gluon_syncbn.DataParallelModel(net)(x)
    np.testing.assert_array_equal(plain[0].asnumpy(), plain[1].asnumpy())


def test_what_ssd_appends_by_itself_is_converted():
    """The layers that GluonCV appends to a named network know nothing of norm_layer."""
    net = small_ssd(**norm(2))
    net.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
    x = mx.nd.random.normal(shape=(2, 3, 96, 96))
    wanted = [y.asnumpy() for y in net(x)]

    def plain():
        return net.features._cached_graph[1].tojson().count('"op": "BatchNorm"')

    assert plain() > 0
    convert_sync_batchnorm(net, num_devices=2)
    assert plain() == 0
    for got, was in zip(net(x), wanted):
        np.testing.assert_allclose(got.asnumpy(), was, rtol=1e-4, atol=1e-5)


def pyramid(norm_layer, **options):
    """Faster R-CNN's, on a small backbone; it names only layers that are MXNet's own function."""
    backbone = nn.HybridSequential(prefix="backbone_")
    with backbone.name_scope():
        for width in (8, 8, 12, 12):
            backbone.add(nn.Conv2D(width, 3, strides=2, padding=1, activation="relu"))
    with mx.name.NameManager():  # the same names every time
        return feature.FPNFeatureExpander(
            backbone,
            [f"conv{i}_relu_fwd" for i in range(4)],
            num_filters=[6] * 4,
            use_p6=True,
            p6_conv=True,
            norm_layer=norm_layer,
            norm_kwargs=options,
        )


def test_a_pyramid_of_symbols(tmp_path):
    """Ours works as sym_norm_layer, in the place of mx.sym.contrib.SyncBatchNorm."""
    contexts, file = [mx.cpu(0), mx.cpu(1)], str(tmp_path / "pyramid.params")
    x = mx.nd.random.normal(shape=(5, 3, 64, 64))
    results = []
    for devices in (1, 2):
        net = pyramid(symbol.SyncBatchNorm, ndev=devices)
        if devices == 1:
            net.initialize(mx.init.Uniform(0.3))
            net(x)
            net.save_parameters(file)
        net.load_parameters(file, ctx=contexts[:devices])
        parts = gluon.utils.split_and_load(x, contexts[:devices], even_split=False)
        with autograd.record():
            outs = ModelDataParallel(net, contexts[:devices])(parts)
            losses = [sum((y**2).sum() for y in out) for out in outs]
        parallel_backward(losses)
        mx.nd.waitall()
        states = {n: p.data().asnumpy() for n, p in net.collect_params(".*moving.*").items()}
        gradients = {
            name: sum(g.asnumpy() for g in p.list_grad())
            for name, p in net.collect_params(".*P.*weight").items()
        }
        results.append({"loss": sum(y.asscalar() for y in losses), **states, **gradients})
    assert len(results[0]) > 25 and results[0].keys() == results[1].keys()
    for name, wanted in results[0].items():
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(results[1][name], wanted, atol=1e-4 * scale, err_msg=name)


def test_a_pyramid_keeps_its_names(monkeypatch):
    """Where the function that GluonCV compares with is ours, as the documentation says."""
    wanted = pyramid(feature.SyncBatchNorm, ndev=2).collect_params().keys()
    monkeypatch.setattr(feature, "SyncBatchNorm", symbol.SyncBatchNorm)
    assert pyramid(symbol.SyncBatchNorm, ndev=2).collect_params().keys() == wanted


def test_the_segmentation_example_trains_on_its_pascal_voc(monkeypatch, tmp_path):
    voc, rng = tmp_path / "VOC2012", np.random.RandomState(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for split, names in (("trainval", "abcdefgh"), ("train", "abcde"), ("val", "fgh")):
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            size = rng.randint(40, 60, 2)
            pixels = rng.randint(0, 256, (*size, 3)).astype("uint8")
            Image.fromarray(pixels).save(voc / "JPEGImages" / f"{name}.jpg")
            labels = rng.choice([0, 7, 255], size).astype("uint8")  # 255 marks outlines
            Image.fromarray(labels).save(voc / "SegmentationClass" / f"{name}.png")
    monkeypatch.syspath_prepend(ROOT / "examples")
    import segmentation

    found = []

    def record(model, loader, classes):
        found.append({int(label) for _, y in loader for label in np.unique(y.asnumpy())})
        return intersection_over_union(model, loader, classes)

    def voc_data(arguments):
        loaders, classes = load(arguments)
        names = [{os.path.basename(p)[0] for p in loader._dataset.images} for loader in loaders]
        assert names == [set("abcde"), set("fgh")] and len(classes) == 21
        return loaders, classes

    load, intersection_over_union = segmentation.voc_data, segmentation.intersection_over_union
    monkeypatch.setattr(segmentation, "voc_data", voc_data)
    monkeypatch.setattr(segmentation, "intersection_over_union", record)
    segmentation.main(
        ["--voc", str(tmp_path), "--image-size", "32", "--num-devices", "2", "--epochs", "1"]
        + ["--out", str(tmp_path)]
    )
    assert found == [{0, 7, segmentation.IGNORED}] * 2
    assert (tmp_path / "segmentation.png").exists()
