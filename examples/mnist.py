"""Train a small convolutional network with synchronized batch normalization on several devices.

Downloads nothing by default: the data are the handwritten digits in scikit-learn.  See --help.
"""

import argparse
import os
import time

import matplotlib
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn
from tqdm import tqdm

from gluon_syncbn import (
    DataParallelCriterion,
    ModelDataParallel,
    SyncBatchNorm,
    parallel_backward,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)


def common_arguments(doc, num_devices=2, **defaults):
    """Make a parser of the arguments that every training takes; ``defaults`` override these.

    ``num_devices=None`` is for trainings whose launcher decides that.
    """
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training data")
    if num_devices is not None:
        parser.add_argument(
            "--num-devices", type=int, default=num_devices, help="number of devices"
        )
    parser.add_argument("--ctx", choices=["cpu", "gpu"], default="cpu", help="kind of device")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--out", default="out", help="folder for the results")
    parser.set_defaults(**defaults)
    return parser


def training_arguments(doc, num_devices=2, **defaults):
    """Make a parser of the arguments of a training with batches of a given size."""
    parser = common_arguments(doc, num_devices)
    parser.add_argument("--batch-size", type=int, default=64, help="total over all devices")
    parser.set_defaults(**defaults)
    return parser


def parse(parser, argv, positive=("epochs", "batch_size", "num_devices")):
    arguments = parser.parse_args(argv)
    for name in positive:
        if getattr(arguments, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    return arguments


def parse_arguments(argv=None, doc=__doc__, **defaults):
    parser = training_arguments(doc, **defaults)
    parser.add_argument(
        "--dataset", choices=["digits", "mnist"], default="digits", help="mnist: downloaded"
    )
    parser.add_argument("--hybridize", action="store_true", help="compile the network to a graph")
    return parse(parser, argv)


def set_up(arguments):
    """Set the random seeds and return the devices."""
    device = mx.gpu if arguments.ctx == "gpu" else mx.cpu
    if arguments.ctx == "gpu" and arguments.num_devices > mx.context.num_gpus():
        raise SystemExit(
            f"--num-devices {arguments.num_devices}, but {mx.context.num_gpus()} GPUs are visible"
        )
    mx.random.seed(arguments.seed)
    np.random.seed(arguments.seed)
    return [device(i) for i in range(arguments.num_devices)]


def load_data(dataset):
    """Return training and test data as (images, labels); images are N x 1 x H x W in [0, 1]."""
    if dataset == "mnist":
        sets = [gluon.data.vision.MNIST(train=train) for train in (True, False)]
        return [(s._data.asnumpy().transpose(0, 3, 1, 2) / 255, s._label) for s in sets]
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images[:, None] / 16, digits.target
    # Writers in the last part do not occur in the first, so shuffle before splitting.
    order = np.random.RandomState(0).permutation(len(images))
    train, test = order[:1437], order[1437:]
    return [(images[train], labels[train]), (images[test], labels[test])]


def batches(images, labels, batch_size, shuffle):
    data = gluon.data.ArrayDataset(images.astype("float32"), labels.astype("float32"))
    return gluon.data.DataLoader(data, batch_size, shuffle=shuffle)


def make_network(norm=SyncBatchNorm):
    net = nn.HybridSequential()
    with net.name_scope():
        for channels in (16, 32):
            net.add(
                nn.Conv2D(channels, kernel_size=3, padding=1, use_bias=False),
                norm(),
                nn.Activation("relu"),
                nn.MaxPool2D(2),
            )
        net.add(nn.Dense(64, use_bias=False), norm(), nn.Activation("relu"))
        net.add(nn.Dense(10))
    return net


def split(batch, ctx_list):
    """Split a batch over the devices; with fewer rows than devices, some get no shard."""
    ctx_list = ctx_list[: len(batch)]
    return gluon.utils.split_and_load(batch, ctx_list, even_split=False)


def train_epoch(model, criterion, trainer, loader, ctx_list, title):
    total = count = 0
    progress = tqdm(loader, desc=title, unit="batch", leave=False)
    for data, label in progress:
        with autograd.record():
            outputs = model(split(data, ctx_list))
            losses = criterion(outputs, split(label, ctx_list))
        parallel_backward(losses)
        trainer.step(len(data))
        total += sum(loss.sum().asscalar() for loss in losses)
        count += len(data)
        progress.set_postfix(loss=f"{total / count:.3f}", refresh=False)
    return total / count


def evaluate(model, loader, ctx_list):
    accuracy = mx.metric.Accuracy()
    for data, label in loader:
        accuracy.update(split(label, ctx_list), model(split(data, ctx_list)))
    return accuracy.get()[1]


def draw(losses, accuracies, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    epochs = range(1, len(losses) + 1)
    left.plot(epochs, losses, "o-")
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.plot(epochs, [100 * a for a in accuracies], "o-", color="tab:green")
    right.set(xlabel="epoch", ylabel="test accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def make_loaders(name, train_set, test_set, arguments, ctx_list):
    print(
        f"{name}: {len(train_set[0])} training and {len(test_set[0])} test images, "
        f"batches of {arguments.batch_size} over {', '.join(map(str, ctx_list))}"
    )
    return (
        batches(*train_set, arguments.batch_size, shuffle=True),
        batches(*test_set, arguments.batch_size, shuffle=False),
    )


def train(model, train_loader, test_loader, arguments, picture):
    """Train for all epochs, print the progress and draw the curves."""
    ctx_list = model.ctx_list
    criterion = DataParallelCriterion(gluon.loss.SoftmaxCrossEntropyLoss(), ctx_list)
    trainer = gluon.Trainer(
        model.collect_params(), "sgd", {"learning_rate": arguments.lr, "momentum": 0.9, "wd": 1e-4}
    )
    losses, accuracies, start = [], [], time.time()
    for epoch in range(1, arguments.epochs + 1):
        title = f"epoch {epoch}/{arguments.epochs}"
        losses.append(train_epoch(model, criterion, trainer, train_loader, ctx_list, title))
        accuracies.append(evaluate(model, test_loader, ctx_list))
        print(f"{title}  loss {losses[-1]:.4f}  test accuracy {accuracies[-1]:.2%}", flush=True)
    print(f"trained in {time.time() - start:.1f} s")
    os.makedirs(arguments.out, exist_ok=True)
    draw(losses, accuracies, picture)


def main(argv=None):
    arguments = parse_arguments(argv)
    ctx_list = set_up(arguments)
    train_set, test_set = load_data(arguments.dataset)
    loaders = make_loaders(arguments.dataset, train_set, test_set, arguments, ctx_list)

    net = make_network()
    net.initialize(mx.init.Xavier(), ctx=ctx_list)
    if arguments.hybridize:
        net.hybridize(static_alloc=True, static_shape=True)
    model = ModelDataParallel(net, ctx_list)
    prefix = os.path.join(arguments.out, arguments.dataset)
    train(model, *loaders, arguments, f"{prefix}.png")

    net.save_parameters(f"{prefix}.params")
    net.hybridize()
    net(mx.nd.array(test_set[0][:1], ctx=ctx_list[0]))  # export needs a graph that has run
    net.export(prefix)
    print(
        f"saved {prefix}.params (load_parameters), {prefix}-symbol.json and {prefix}-0000.params "
        f"(SymbolBlock.imports), {prefix}.png (curves)"
    )


if __name__ == "__main__":
    main()
