"""Train semantic segmentation with two images a device, with nn.BatchNorm and with SyncBatchNorm.

Downloads nothing: by default the images are shapes that it draws itself; --voc trains on Pascal VOC
where that is on the disk.  See --help.

Both networks start from the same parameters and see the same batches.  They have parallel dilated
branches and a branch that pools the whole image, as in DeepLabv3 (L.-C. Chen et al., "Rethinking
Atrous Convolution for Semantic Image Segmentation", arXiv:1706.05587).

The pooling branch normalizes one value per image, so nn.BatchNorm has two there.  This is a part
of the difference, not all of it: over seeds 0 and 1, the mean IoU of nn.BatchNorm and SyncBatchNorm
was 52.2% and 56.7%; with that branch left out, 55.7% and 58.7% (2026-11-21, MXNet 1.9.1 on four CPU
contexts).  A training as short as this one does better without it, with either normalization.
"""

import os
import random
import tempfile
import time

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.gluon import nn
from mxnet.gluon.contrib.nn import HybridConcurrent

from gluon_syncbn import DataParallelCriterion, ModelDataParallel, SyncBatchNorm

# The script next to this one has the parts that every training shares; it also chooses a backend
# of matplotlib that needs no screen.
from mnist import batches, common_arguments, parse, plt, set_up, split, train_epoch

NORMS = {"nn.BatchNorm": nn.BatchNorm, "SyncBatchNorm": SyncBatchNorm}
MEAN, STD = 0.5, 0.25  # of the pixels, about
IGNORED = -1  # the label of pixels that do not count: the outlines of VOC's objects
# The classes of the drawn images, and their usual colours.
SHAPES = {
    "background": None,  # any
    "disc": (0.8, 0.3, 0.3),
    "square": (0.3, 0.7, 0.3),
    "triangle": (0.3, 0.4, 0.8),
    "cross": (0.8, 0.7, 0.3),
}


def parse_arguments(argv=None):
    parser = common_arguments(__doc__, epochs=15, num_devices=4, lr=0.003)
    parser.add_argument("--images-per-device", type=int, default=2, help="in each batch")
    parser.add_argument("--train-images", type=int, default=480, help="number of images drawn")
    parser.add_argument("--test-images", type=int, default=160, help="number of images drawn")
    parser.add_argument(
        "--image-size", type=int, default=64, help="height and width; of crops of VOC's images"
    )
    parser.add_argument("--seeds", type=int, default=1, help="repeat with this many random seeds")
    parser.add_argument(
        "--voc", metavar="PATH", help="train on Pascal VOC instead: the folder that has VOC2012"
    )
    counts = "epochs num_devices images_per_device train_images test_images image_size seeds"
    arguments = parse(parser, argv, counts.split())
    arguments.batch_size = arguments.images_per_device * arguments.num_devices
    if arguments.train_images < arguments.batch_size:
        parser.error(f"--train-images must be {arguments.batch_size}, one batch, or more")
    if arguments.image_size % 4:
        parser.error("--image-size must be a multiple of 4")
    if arguments.voc and not os.path.isdir(os.path.join(arguments.voc, "VOC2012")):
        parser.error(f"--voc {arguments.voc}: there is no folder VOC2012 in it")
    return arguments


def inside(shape, u, v):
    """Return which of the points (u, v) are in a shape of radius 1."""
    if shape == "disc":
        return u**2 + v**2 < 0.8
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.75
    if shape == "triangle":
        return np.maximum(-v, abs(u) * np.sqrt(3) / 2 + v / 2) < 0.5
    return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.95)


def draw_image(rng, size):
    """Draw a 3 x H x W image in [0, 1] and its H x W labels.

    Each shape has its usual colour, more or less.  But as photographs do, images differ in their
    exposure and in the colour of the light.
    """
    y, x = np.mgrid[:size, :size] / size
    angle = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
    start, end = rng.uniform(size=(2, 3, 1, 1))
    image, labels = start + (end - start) * ramp, np.zeros((size, size))
    for _ in range(rng.randint(2, 5)):
        label = rng.randint(1, len(SHAPES))
        shape, colour = list(SHAPES.items())[label]
        centre_x, centre_y = rng.uniform(0.2, 0.8, 2)
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.3)
        u = ((x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)) / radius
        v = ((y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)) / radius
        where = inside(shape, u, v)
        colour = colour + rng.uniform(-0.25, 0.25, 3)
        image = np.where(where, colour.reshape(3, 1, 1), image)
        labels[where] = label
    light = 2 ** rng.uniform(-1.5, 0) * rng.uniform(0.5, 1, (3, 1, 1))
    return np.clip(light * image + rng.normal(0, 0.04, image.shape), 0, 1), labels


def drawn_loaders(arguments, seed):
    """Draw training and test images, and return a loader of each."""
    rng = np.random.RandomState(seed)

    def draw(count):
        images, labels = zip(*(draw_image(rng, arguments.image_size) for _ in range(count)))
        return (np.stack(images) - MEAN) / STD, np.stack(labels)

    size = arguments.batch_size
    # Only full batches, so that every device always has as many images.
    train, test = draw(arguments.train_images // size * size), draw(arguments.test_images)
    return batches(*train, size, shuffle=True), batches(*test, size, shuffle=False)


def voc_data(arguments):
    """Return loaders of Pascal VOC's training and validation images, and its classes."""
    try:
        from gluoncv.data import VOCSegmentation
    except ImportError as error:
        raise SystemExit(
            f"--voc needs GluonCV ({error}). Versions that work with MXNet 1.9.1: "
            'pip install gluoncv==0.10.5.post0 numpy==1.23.5 "opencv-python==4.8.*"'
        ) from None
    transforms = gluon.data.vision.transforms
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    size = arguments.image_size
    train, test = (
        VOCSegmentation(
            arguments.voc, split, mode=split, transform=transform, base_size=size, crop_size=size
        )
        for split in ("train", "val")
    )
    # GluonCV's "train" is VOC's trainval, which has the validation images as well.
    held_out = set(test.images)
    pairs = [pair for pair in zip(train.images, train.masks) if pair[0] not in held_out]
    train.images, train.masks = ([pair[i] for pair in pairs] for i in range(2))
    if len(train) < arguments.batch_size:
        raise SystemExit(
            f"--voc {arguments.voc} has {len(train)} training images: less than a batch"
        )
    return (
        gluon.data.DataLoader(train, arguments.batch_size, shuffle=True, last_batch="discard"),
        gluon.data.DataLoader(test, arguments.batch_size, shuffle=False),
    ), train.classes


class ImagePooling(gluon.HybridBlock):
    """The branch of DeepLabv3 that sees the whole image: one vector, repeated at each position."""

    def __init__(self, channels, norm):
        super().__init__()
        with self.name_scope():
            self.pooled = nn.HybridSequential()
            self.pooled.add(nn.GlobalAvgPool2D(), *unit(channels, norm, kernel_size=1))

    def hybrid_forward(self, F, x):
        return F.broadcast_like(self.pooled(x), x, lhs_axes=(2, 3), rhs_axes=(2, 3))


class Upsample(gluon.HybridBlock):
    def hybrid_forward(self, F, x):
        return F.contrib.BilinearResize2D(x, scale_height=4, scale_width=4)


def unit(channels, norm, **convolution):
    return nn.Conv2D(channels, use_bias=False, **convolution), norm(), nn.Activation("relu")


def make_network(classes, norm=SyncBatchNorm):
    """Make a fully convolutional network: N x 3 x H x W -> N x classes x H x W."""
    net = nn.HybridSequential()
    with net.name_scope():
        for channels, stride in ((16, 2), (32, 2), (32, 1)):
            net.add(*unit(channels, norm, kernel_size=3, strides=stride, padding=1))
        branches = HybridConcurrent(axis=1)
        point = nn.HybridSequential()
        point.add(*unit(16, norm, kernel_size=1))
        branches.add(point)
        for rate in (2, 4, 6):
            branch = nn.HybridSequential()
            branch.add(*unit(16, norm, kernel_size=3, padding=rate, dilation=rate))
            branches.add(branch)
        branches.add(ImagePooling(16, norm))
        net.add(branches, *unit(32, norm, kernel_size=1), nn.Conv2D(classes, 1), Upsample())
    return net


class PixelLoss(gluon.HybridBlock):
    """Cross entropy of each image: the mean over pixels, in which ignored ones are zero."""

    def hybrid_forward(self, F, scores, labels):
        labels = F.cast(labels, "float32")
        counted = labels != IGNORED
        losses = -F.pick(F.log_softmax(scores, axis=1), labels * counted, axis=1)
        return F.mean(losses * counted, axis=(1, 2))


def intersection_over_union(model, loader, classes):
    """Return the IoU of each class over all pixels; NaN for a class that does not occur."""
    counts = np.zeros(classes**2)
    for data, labels in loader:
        scores = model(split(data, model.ctx_list))
        predicted = np.concatenate([s.argmax(axis=1).asnumpy() for s in scores])
        labels = labels.asnumpy()
        pairs = (labels * classes + predicted)[labels != IGNORED]
        counts += np.bincount(pairs.astype(int), minlength=classes**2)
    counts = counts.reshape(classes, classes)  # truth x prediction
    intersection = counts.diagonal()
    with np.errstate(invalid="ignore"):
        return intersection / (counts.sum(0) + counts.sum(1) - intersection)


def make_start(classes, loaders, ctx, path):
    """Save the parameters that both networks start from."""
    net = make_network(classes)
    net.initialize(mx.init.Xavier(), ctx=ctx)
    images, _ = next(iter(loaders[1]))
    net(images[:1].as_in_context(ctx))  # parameters get their shapes
    net.save_parameters(path)


def train(net, title, loaders, classes, arguments, ctx_list):
    """Train for all epochs, print the progress; return the model and the IoU of each class."""
    net.hybridize(static_alloc=True, static_shape=True)
    model = ModelDataParallel(net, ctx_list)
    criterion = DataParallelCriterion(PixelLoss(), ctx_list)
    trainer = gluon.Trainer(net.collect_params(), "adam", {"learning_rate": arguments.lr})
    start = time.time()
    for epoch in range(1, arguments.epochs + 1):
        line = f"{title}  epoch {epoch}/{arguments.epochs}"
        loss = train_epoch(model, criterion, trainer, loaders[0], ctx_list, line)
        iou = intersection_over_union(model, loaders[1], classes)
        print(f"{line}  loss {loss:.4f}  mean IoU {np.nanmean(iou):.2%}", flush=True)
    print(f"{title}  trained in {time.time() - start:.1f} s", flush=True)
    return model, iou


def print_table(results, classes):
    """Print the IoU of each class, averaged over the seeds, for both normalizations."""
    print(f"\n{'IoU of held-out images':24}" + "".join(f"{norm:>18}" for norm in results))
    for i, name in enumerate(classes):
        cells = (np.mean([iou[i] for iou in ious]) for ious in results.values())
        print(f"{name:24}" + "".join(f"{cell:18.2%}" for cell in cells))
    cells = []
    for ious in results.values():
        means = [np.nanmean(iou) for iou in ious]
        spread = f" ± {np.std(means, ddof=1):.2%}" if len(means) > 1 else ""
        cells.append(f"{np.mean(means):.2%}{spread}")
    print(f"{'mean':24}" + "".join(f"{cell:>18}" for cell in cells))


def draw_predictions(models, loader, classes, path, rows=4):
    """Draw the first images of a loader: input, truth, and what each model predicts."""
    data, labels = next(iter(loader))
    data, labels = data[:rows], labels[:rows].asnumpy()
    columns = {"input": (data.asnumpy() * STD + MEAN).clip(0, 1).transpose(0, 2, 3, 1)}
    columns["truth"] = np.ma.masked_equal(labels, IGNORED)
    for norm, model in models.items():
        scores = model(split(data, model.ctx_list))
        columns[norm] = np.concatenate([s.argmax(axis=1).asnumpy() for s in scores])
    size = 1.9 * len(columns), 1.9 * len(data) + 0.6
    figure, axes = plt.subplots(
        len(data), len(columns), figsize=size, squeeze=False, layout="constrained"
    )
    colours = plt.get_cmap("tab10" if len(classes) <= 10 else "tab20b", len(classes))
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=10)
        for axis, picture in zip(axes[:, column], pictures):
            axis.imshow(picture, cmap=colours, vmin=-0.5, vmax=len(classes) - 0.5)
            axis.set_axis_off()
    patches = [plt.Rectangle((0, 0), 1, 1, color=colours(i)) for i in range(len(classes))]
    figure.legend(patches, classes, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    arguments = parse_arguments(argv)
    ctx_list = set_up(arguments)
    loaders, classes = voc_data(arguments) if arguments.voc else (None, list(SHAPES))
    os.makedirs(arguments.out, exist_ok=True)
    print(
        f"{arguments.voc or 'drawn shapes'}: {len(classes)} classes, "
        f"{arguments.images_per_device} images on each of {', '.join(map(str, ctx_list))}"
    )
    results = {norm: [] for norm in NORMS}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        if not arguments.voc:
            loaders = drawn_loaders(arguments, seed)
        models = {}
        with tempfile.TemporaryDirectory() as folder:
            start = os.path.join(folder, "start.params")
            mx.random.seed(seed)
            make_start(len(classes), loaders, ctx_list[0], start)
            for norm, layer in NORMS.items():
                # These decide the order of the images, and how GluonCV crops them.
                random.seed(seed)
                np.random.seed(seed)
                net = make_network(len(classes), layer)
                net.load_parameters(start, ctx=ctx_list)
                title = f"seed {seed}  {norm:13}"
                models[norm], iou = train(net, title, loaders, len(classes), arguments, ctx_list)
                results[norm].append(iou)
    print_table(results, classes)
    picture = os.path.join(arguments.out, "segmentation.png")
    draw_predictions(models, loaders[1], classes, picture)
    print(f"saved {picture}")


if __name__ == "__main__":
    main()
