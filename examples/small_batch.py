"""Compare normalization layers over the batch size per device: test error, and inference speed.

Trains a small convolutional network with each layer, batch size and seed, on the handwritten digits
in scikit-learn or on CIFAR-10, and prints a table, writes JSON and draws a chart.  Downloads
nothing.  An interrupted comparison goes on where it was.  See --help.

Conditions are the same for all layers: data parallel training on the same shards in the same order,
the same initial weights for each seed and the same optimizer; layers differ only in the statistics
that they normalize by.  All batch sizes see the same number of images, with a learning rate
proportional to the batch (Goyal et al., https://arxiv.org/abs/1706.02677).
"""

import argparse
import json
import math
import os
import pickle
import statistics
import time
import warnings
from unittest import mock

import matplotlib
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn
from mxnet.gluon.model_zoo import vision
from tqdm import tqdm

from gluon_syncbn import (
    DataParallelCriterion,
    ModelDataParallel,
    SyncBatchNorm,
    convert_mabn,
    convert_sync_batchnorm,
    export_for_inference,
    parallel_backward,
    recalibrate,
)

# The script next to this one has the parts that every training shares.
from mnist import load_data, set_up, split

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

METHODS = {
    "bn": "BN",
    "syncbn": "SyncBN",
    "mabn": "MABN",
    "brn": "Batch renorm.",
    "gn": "GroupNorm",
}
# The batch size per device that --lr is for, and the one that MABN simulates.
REFERENCE = 32
STATIC = {"static_alloc": True, "static_shape": True}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    sizes = [2**i for i in range(int(math.log2(REFERENCE)) + 1)]
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="layers to compare"
    )
    default = [2, 4, 8, 32]
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, choices=sizes, default=default, help="on each device"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each kind")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training data")
    parser.add_argument("--num-devices", type=int, default=4, help="number of devices")
    parser.add_argument("--ctx", choices=["cpu", "gpu"], default="cpu", help="kind of device")
    parser.add_argument(
        "--lr", type=float, default=0.2, help=f"learning rate with {REFERENCE} images on a device"
    )
    parser.add_argument(
        "--cifar",
        metavar="FOLDER",
        help="CIFAR-10 instead of the digits: its python or binary version, unpacked",
    )
    parser.add_argument(
        "--speed", choices=["yes", "no", "only"], default="yes", help="measure inference"
    )
    parser.add_argument("--rounds", type=int, default=40, help="of the measurement of inference")
    parser.add_argument("--out", default="out", help="folder for the results")
    parser.set_defaults(seed=0)
    arguments = parser.parse_args(argv)
    for name in ("seeds", "epochs", "num_devices", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    return arguments


# Data


def load_digits():
    """Return half of the digits for training, half for testing: an image is 0.1 % of error."""
    images, labels = (np.concatenate(arrays) for arrays in zip(*load_data("digits")))
    half = len(images) // 2
    return (images[:half], labels[:half]), (images[half:], labels[half:])


def load_cifar(folder):
    """Read CIFAR-10 as training and test data, (images, labels), from its folder."""
    names = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
    for read, suffix in ((_read_pickled, ""), (_read_binary, ".bin")):
        paths = [[os.path.join(folder, name + suffix) for name in part] for part in names]
        if all(os.path.isfile(path) for part in paths for path in part):
            return [_join([read(path) for path in part]) for part in paths]
    raise SystemExit(
        f"--cifar {folder}: neither data_batch_1 to data_batch_5 and test_batch, nor the same with "
        ".bin, are in this folder; get CIFAR-10 from https://www.cs.toronto.edu/~kriz/cifar.html, "
        "unpack it, and pass the folder cifar-10-batches-py or cifar-10-batches-bin"
    )


def _read_pickled(path):
    with open(path, "rb") as file:
        content = pickle.load(file, encoding="bytes")
    return content[b"data"], np.array(content[b"labels"])


def _read_binary(path):
    rows = np.fromfile(path, "uint8")
    if not len(rows) or len(rows) % 3073:
        raise SystemExit(f"--cifar: {path} has {len(rows)} bytes, no multiple of 3073")
    rows = rows.reshape(-1, 3073)
    return rows[:, 1:], rows[:, 0]


def _join(parts):
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts))
    return images.reshape(-1, 3, 32, 32) / np.float32(255), labels


# Networks


class GroupNorm(nn.HybridBlock):
    """Group normalization with a gamma and a beta for each channel, as in the paper.

    (MXNet 1.9.1's has one for each group.)
    """

    def __init__(self, in_channels, num_groups=8):
        super().__init__()
        with self.name_scope():
            self.norm = nn.GroupNorm(num_groups, center=False, scale=False)
            shape = 1, in_channels, 1, 1
            self.gamma = self.params.get("gamma", shape=shape, init="ones")
            self.beta = self.params.get("beta", shape=shape, init="zeros")

    def hybrid_forward(self, F, x, gamma, beta):
        return F.broadcast_add(F.broadcast_mul(self.norm(x), gamma), beta)


def renormalization(in_channels):
    limits = renormalization_limits(0)
    # A group of one: each device by itself.
    return SyncBatchNorm(in_channels, group_size=1, renorm=True, renorm_clipping=limits)


def renormalization_limits(progress):
    """Return the limits of batch renormalization at a part of the training, from 0 to 1.

    Those of the paper (Ioffe, https://arxiv.org/abs/1702.03275, section 4): batch normalization
    for 5 thousand steps, then rmax rises to 3 at 40 thousand, dmax to 5 at 25 thousand, of 160
    thousand.
    """
    step = 160 * progress
    rmax = 1 + 2 * min(max((step - 5) / (40 - 5), 0), 1)
    return {"rmax": rmax, "rmin": 1 / rmax, "dmax": 5 * min(max((step - 5) / (25 - 5), 0), 1)}


def make_network(method, batch_size, in_channels, ctx_list):
    """Return the network, initialized; random numbers are used in the same way by all methods."""
    norm = {"gn": GroupNorm, "brn": renormalization}.get(
        method, lambda channels: nn.BatchNorm(in_channels=channels)
    )
    net = nn.HybridSequential()
    for stage, channels in enumerate((16, 32, 64)):
        if stage:
            net.add(nn.MaxPool2D(2))
        for _ in range(2):
            net.add(
                nn.Conv2D(channels, 3, padding=1, use_bias=False, in_channels=in_channels),
                norm(channels),
                nn.Activation("relu"),
            )
            in_channels = channels
    net.add(nn.GlobalAvgPool2D(), nn.Dense(10, in_units=in_channels))
    net.initialize(mx.init.Xavier(), ctx=ctx_list)
    if method == "syncbn":
        convert_sync_batchnorm(net)
    elif method == "mabn":
        convert_mabn(net, batch_size, simulated_batch_size=REFERENCE)
    net.hybridize(**STATIC)
    return net


# Training


def steps_of(batch_size, arguments, images):
    """Return the steps of an epoch: all batch sizes see the images that the largest one can."""
    return images // (REFERENCE * arguments.num_devices) * (REFERENCE // batch_size)


def shards(images, labels, indices, ctx_list):
    """Return the inputs and labels of each device, from a row of ``indices`` for each."""
    return tuple(
        [mx.nd.array(array[row], ctx, dtype="float32") for row, ctx in zip(indices, ctx_list)]
        for array in (images, labels)
    )


def train(method, batch_size, seed, data, arguments, ctx_list, progress):
    """Train one network; return its record: the errors on the test data, in percent, and more."""
    (images, labels), test_set = data
    mx.random.seed(seed)
    shuffle = np.random.RandomState(seed)
    start = time.time()
    net = make_network(method, batch_size, images.shape[1], ctx_list)
    model = ModelDataParallel(net, ctx_list)
    criterion = DataParallelCriterion(gluon.loss.SoftmaxCrossEntropyLoss(), ctx_list)
    epoch_steps = steps_of(batch_size, arguments, len(images))
    steps = arguments.epochs * epoch_steps
    optimizer = {
        "learning_rate": arguments.lr * batch_size / REFERENCE,
        "lr_scheduler": mx.lr_scheduler.CosineScheduler(steps),
        "momentum": 0.9,
        "wd": 1e-4,
    }
    trainer = gluon.Trainer(net.collect_params(), "sgd", optimizer)
    for step in range(steps):
        if step % epoch_steps == 0:
            order = shuffle.permutation(len(images))[: epoch_steps * batch_size * len(ctx_list)]
            batches = order.reshape(epoch_steps, len(ctx_list), batch_size)
            epoch_losses = []
        if method == "brn" and step % max(steps // 32, 1) == 0:
            set_limits(net, step / steps)
        xs, ys = shards(images, labels, batches[step % epoch_steps], ctx_list)
        with autograd.record():
            losses = criterion(model(xs), ys)
        parallel_backward(losses)
        trainer.step(batch_size * len(ctx_list))
        # Waits for the step; MXNet would let any number of steps pile up.
        epoch_losses.append(np.mean([loss.asnumpy() for loss in losses]))
        progress.update()
    average_statistics(net, arguments.out, ctx_list)
    record = {"method": method, "batch_size": batch_size, "seed": seed, "steps": steps}
    record["training_loss"] = float(np.mean(epoch_losses))  # of the last epoch
    record["error"] = error_of(model, test_set, ctx_list)
    if method in ("bn", "syncbn", "brn"):
        recalibrate(model, (shards(images, labels, batch, ctx_list)[0] for batch in batches))
        record["recalibrated"] = error_of(model, test_set, ctx_list)
    return {**record, "seconds": round(time.time() - start, 2)}


def set_limits(net, progress):
    """Set the limits of batch renormalization; the network is traced anew if they changed."""
    limits = renormalization_limits(progress)
    for layer in net:
        if isinstance(layer, SyncBatchNorm) and layer.renorm_clipping != limits:
            layer.renorm_clipping = limits


def average_statistics(net, folder, ctx_list):
    """Give all devices the average of their moving statistics, as Gluon's checkpoints do."""
    # With static_shape, MXNet does not tell its engine that nn.BatchNorm writes its statistics.
    mx.nd.waitall()
    file = os.path.join(folder, "small_batch.params")
    net.save_parameters(file)
    net.load_parameters(file, ctx=ctx_list)
    os.remove(file)


def error_of(model, test_set, ctx_list):
    """Return the error in percent."""
    images, labels = test_set
    wrong = 0
    for i in range(0, len(images), 500):
        outputs = model(split(mx.nd.array(images[i : i + 500], dtype="float32"), ctx_list))
        predicted = np.concatenate([out.asnumpy() for out in outputs]).argmax(1)
        wrong += int((predicted != labels[i : i + 500]).sum())
    return 100 * wrong / len(images)


def settings_of(arguments):
    """Return what runs must have in common to be compared."""
    return {
        "data": "CIFAR-10" if arguments.cifar else "digits",
        **{name: getattr(arguments, name) for name in ("epochs", "num_devices", "ctx", "lr")},
    }


def load_results(path, settings):
    if not os.path.exists(path):
        return {"settings": settings, "runs": []}
    with open(path, encoding="utf-8") as file:
        results = json.load(file)
    if results["settings"] != settings:
        raise SystemExit(
            f"{path} has runs with other settings, {results['settings']}; choose another --out"
        )
    return results


def save_results(path, results):
    """Write in one go, so that an interruption leaves the old file or the new one."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    os.replace(f"{path}.new", path)


def compare_errors(arguments, path):
    """Train what has not been trained yet; return all that was asked for."""
    ctx_list = set_up(arguments)
    results = load_results(path, settings_of(arguments))
    data = load_cifar(arguments.cifar) if arguments.cifar else load_digits()
    count = len(data[0][0])
    if not steps_of(REFERENCE, arguments, count):
        raise SystemExit(
            f"--num-devices {arguments.num_devices} is too many: {count} training images are no "
            f"batch of {REFERENCE} on each"
        )
    names = "method", "batch_size", "seed"
    done = {tuple(run[name] for name in names): run for run in results["runs"]}
    # Seed by seed, so that an interrupted comparison has all kinds of runs.
    asked = [
        (method, size, seed)
        for seed in range(arguments.seeds)
        for size in sorted(set(arguments.batch_sizes))
        for method in METHODS
        if method in arguments.methods
    ]
    missing = [key for key in asked if key not in done]
    print(
        f"{results['settings']['data']}: {count} training and {len(data[1][0])} test images; "
        f"{len(asked)} runs, {len(asked) - len(missing)} of them in {path}",
        flush=True,
    )
    steps = sum(steps_of(size, arguments, count) for _, size, _ in missing) * arguments.epochs
    with tqdm(total=steps, unit="step", smoothing=0.05, disable=not missing) as progress:
        for key in missing:
            progress.set_description("{}, batch {}, seed {}".format(*key))
            done[key] = train(*key, data, arguments, ctx_list, progress)
            results["runs"] = list(done.values())
            save_results(path, results)
    return [done[key] for key in asked]


# Results


def spread(runs, method, batch_size, quantity):
    """Return the mean, the least and the greatest over the seeds, or None without any."""
    values = [
        run[quantity]
        for run in runs
        if (run["method"], run["batch_size"]) == (method, batch_size) and quantity in run
    ]
    return (statistics.mean(values), min(values), max(values)) if values else None


def table(runs, quantity, title, digits=2):
    """Return the table in Markdown: means over the seeds, the least and the greatest."""
    sizes = sorted({run["batch_size"] for run in runs})
    lines = [f"| {title} | " + " | ".join(f"batch {size}" for size in sizes) + " |"]
    lines.append("| --- |" + " --- |" * len(sizes))
    for method, name in METHODS.items():
        cells = [spread(runs, method, size, quantity) for size in sizes]
        if any(cells):
            mean, least, most = (f"{{{i}:.{digits}f}}" for i in range(3))
            text = [f"{mean} ({least} to {most})".format(*cell) if cell else "" for cell in cells]
            lines.append(f"| {name} | " + " | ".join(text) + " |")
    return "\n".join(lines)


def tables(runs):
    return "\n\n".join(
        [
            table(runs, "error", "test error (%)"),
            table(runs, "recalibrated", "test error (%), statistics re-estimated"),
            table(runs, "training_loss", "training loss in the last epoch", digits=4),
        ]
    )


def draw(runs, title, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    methods = [method for method in METHODS if any(run["method"] == method for run in runs)]
    sizes = sorted({run["batch_size"] for run in runs})
    for axes, quantity in ((left, "error"), (right, "training_loss")):
        for i, method in enumerate(methods):
            found = {size: spread(runs, method, size, quantity) for size in sizes}
            found = {size: values for size, values in found.items() if values}
            # Next to each other, so that all error bars are seen.
            places = np.array(list(found)) * 2 ** (0.07 * (i - (len(methods) - 1) / 2))
            mean, least, most = np.array(list(found.values())).T
            bars = mean - least, most - mean
            axes.errorbar(places, mean, bars, fmt="o-", ms=4, capsize=3, label=METHODS[method])
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, labels=map(str, sizes))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.grid(alpha=0.3)
        axes.set_xlabel("batch size per device")
    left.set(ylabel="test error (%)", yscale="log", title=title)
    left.yaxis.set_major_formatter("{x:g}")
    right.set(ylabel="training loss, last epoch", yscale="log")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=90)
    plt.close(figure)


# Inference


def zoo_network(norm=None):
    """Return ResNet-18, initialized, with another normalization where ``norm`` makes one."""
    if norm is None:
        net = vision.resnet18_v1()
    else:
        # The zoo has no argument for it.
        with mock.patch.object(nn, "BatchNorm", norm):
            net = vision.resnet18_v1()
    net.initialize(mx.init.Xavier())
    return net


def layer_norm():
    return nn.GroupNorm(1)  # over channels and positions; nn.LayerNorm has one axis


INFERENCE = {  # name -> how to make the network, and whether its normalization can be folded
    "BN, MXNet's": (zoo_network, True),
    "BN, ours": (lambda: convert_sync_batchnorm(zoo_network(), num_devices=1), True),
    "MABN": (lambda: convert_mabn(zoo_network(), 2, 32), True),
    "GroupNorm": (lambda: zoo_network(lambda: nn.GroupNorm(32)), False),
    "LayerNorm": (lambda: zoo_network(layer_norm), False),
    "InstanceNorm": (lambda: zoo_network(nn.InstanceNorm), False),
}


def compare_speed(arguments):
    """Return images per second and, over MXNet's BN in the same round, ratios of times."""
    ctx = set_up(arguments)[0]
    images = mx.nd.random.normal(shape=(8, 3, 64, 64), ctx=ctx)
    nets = {}
    for name, (make, foldable) in INFERENCE.items():
        net = make()
        net.collect_params().reset_ctx(ctx)
        net.hybridize(**STATIC)
        net(images).wait_to_read()
        nets[name, "as it is"] = net
        if foldable:
            prefix = os.path.join(arguments.out, "small_batch_folded")
            files = export_for_inference(net, prefix, fold=True)
            with warnings.catch_warnings():
                # MXNet warns that the file has no dtype for its input; it is that of the weights.
                warnings.filterwarnings("ignore", message="(?s).*Cannot decide type")
                folded = gluon.SymbolBlock.imports(files[0], ["data"], files[1], ctx=ctx)
            folded.hybridize(**STATIC)
            nets[name, "folded"] = folded
            for file in files:
                os.remove(file)
    times = {key: [] for key in nets}
    for _ in tqdm(range(arguments.rounds + 3), desc="inference", unit="round"):
        for key, net in nets.items():
            start = time.perf_counter()
            net(images).wait_to_read()
            times[key].append(time.perf_counter() - start)
    times = {key: values[3:] for key, values in times.items()}  # without the first calls
    base = times["BN, MXNet's", "as it is"]
    return [
        {
            "layer": name,
            "form": form,
            "images_per_second": len(images) / statistics.median(values),
            "speed": statistics.median(b / v for b, v in zip(base, values)),
        }
        for (name, form), values in times.items()
    ]


def table_of_speed(speed):
    lines = [
        "| ResNet-18, 64×64, batch 8 | images/s | of BN's speed | folded: images/s | of BN's |"
    ]
    lines.append("| --- |" + " --- |" * 4)
    for name in INFERENCE:
        cells = []
        for form in ("as it is", "folded"):
            found = [row for row in speed if (row["layer"], row["form"]) == (name, form)]
            row = found[0] if found else None
            cells += [f"{row['images_per_second']:.0f}", f"{row['speed']:.2f}"] if row else ["", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None):
    arguments = parse_arguments(argv)
    os.makedirs(arguments.out, exist_ok=True)
    prefix = os.path.join(arguments.out, "small_batch")
    if arguments.speed != "only":
        runs = compare_errors(arguments, f"{prefix}.json")
        print(f"\nMeans over {arguments.seeds} seeds (least to greatest):\n")
        print(tables(runs))
        data = "CIFAR-10" if arguments.cifar else "digits"
        draw(runs, f"{data}, {arguments.num_devices} devices", f"{prefix}.png")
        print(f"\nsaved {prefix}.json (all runs), {prefix}.png (chart)")
    if arguments.speed != "no":
        speed = compare_speed(arguments)
        print("\nInference, networks taking turns; medians, ratios within each round:\n")
        print(table_of_speed(speed))
        save_results(f"{prefix}_speed.json", speed)
        print(f"\nsaved {prefix}_speed.json")


if __name__ == "__main__":
    main()
