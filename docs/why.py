"""Draw docs/why.png: test accuracy with two images per device, with and without synchronization.

    python docs/why.py

Trains the same small network on scikit-learn's handwritten digits, on four CPU contexts with two
images each: once with MXNet's nn.BatchNorm, once with SyncBatchNorm, for several random seeds.
Takes some minutes.
"""

import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import mxnet as mx  # noqa: E402
import numpy as np  # noqa: E402
from mxnet import gluon  # noqa: E402
from mxnet.gluon import nn  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "examples"))
import mnist  # noqa: E402
from gluon_syncbn import DataParallelCriterion, ModelDataParallel, SyncBatchNorm  # noqa: E402

DEVICES, IMAGES, EPOCHS, SEEDS = 4, 2, 6, 5


def accuracies(norm, seed):
    """Train, and return the test accuracy after each epoch."""
    mx.random.seed(seed)
    np.random.seed(seed)
    contexts = [mx.cpu(i) for i in range(DEVICES)]
    train_set, test_set = mnist.load_data("digits")
    # Only full batches, so that every device always has two images.
    size = DEVICES * IMAGES
    images, labels = (array[: len(array) // size * size] for array in train_set)
    train = mnist.batches(images, labels, size, shuffle=True)
    test = mnist.batches(*test_set, 64, shuffle=False)
    net = mnist.make_network(norm)
    net.initialize(mx.init.Xavier(), ctx=contexts)
    net.hybridize()
    model = ModelDataParallel(net, contexts)
    criterion = DataParallelCriterion(gluon.loss.SoftmaxCrossEntropyLoss(), contexts)
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.02, "momentum": 0.9})
    found = []
    for epoch in range(EPOCHS):
        title = f"{norm.__name__} seed {seed} epoch {epoch + 1}"
        mnist.train_epoch(model, criterion, trainer, train, contexts, title)
        found.append(mnist.evaluate(model, test, contexts))
    print(norm.__name__, seed, " ".join(f"{a:.4f}" for a in found), flush=True)
    return found


def main():
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    epochs = np.arange(1, EPOCHS + 1)
    for norm, label, color in (
        (SyncBatchNorm, "SyncBatchNorm: over all 8 images", "tab:green"),
        (nn.BatchNorm, "nn.BatchNorm: over each device's 2 images", "tab:red"),
    ):
        runs = 100 * np.array([accuracies(norm, seed) for seed in range(SEEDS)])
        axes.plot(epochs, runs.mean(0), "o-", color=color, label=label)
        axes.fill_between(epochs, runs.min(0), runs.max(0), color=color, alpha=0.15)
    axes.set(xlabel="epoch", ylabel="test accuracy (%)")
    axes.set_title(f"scikit-learn digits, {DEVICES} devices, {IMAGES} images each", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(os.path.join(HERE, "why.png"), dpi=110)


if __name__ == "__main__":
    main()
