"""Train for very many steps on two contexts: memory stays flat, and the loss is that of one device.

    python tests/faults/soak.py [--steps 20000]      (make soak STEPS=20000)

Two runs go side by side over the same batches: a network on two contexts, and the same network on
one, which is fed the whole batches.
"""

import argparse
import gc
import os
import time

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import DataParallelCriterion, ModelDataParallel, SyncBatchNorm, parallel_backward

# Of a step's loss.  Convolutions and gradients add float32 numbers in another order on another
# number of devices, so weights differ in their last bits (6e-8).  The network is smooth, and weight
# decay draws both runs to one minimum, so the difference stays within a few hundred times that.
LOSS_TOLERANCE = 1e-4
GROWTH = 1.0  # MiB that resident memory may grow after the warm-up


def resident():
    """Resident memory in MiB."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Training:
    def __init__(self, contexts):
        mx.random.seed(1)
        np.random.seed(1)
        self.contexts = contexts
        self.net = nn.HybridSequential()
        self.net.add(
            nn.Conv2D(4, 3, use_bias=False, in_channels=2),
            SyncBatchNorm(in_channels=4),
            nn.Activation("softrelu"),  # smooth; see tests/helpers/networks.py
            nn.Conv2D(4, 3, use_bias=False, in_channels=4),
            SyncBatchNorm(in_channels=4),
            nn.GlobalAvgPool2D(),
            nn.Dense(3, in_units=4),
        )
        self.net.initialize(mx.init.Xavier(), ctx=contexts)
        self.net.hybridize()
        self.model = ModelDataParallel(self.net, contexts)
        self.criterion = DataParallelCriterion(gluon.loss.SoftmaxCrossEntropyLoss(), contexts)
        self.trainer = gluon.Trainer(
            self.net.collect_params(), "sgd", {"learning_rate": 0.02, "momentum": 0.9, "wd": 1e-3}
        )

    def step(self, data, label):
        """Train by a batch and return its mean loss."""
        xs, ys = (
            gluon.utils.split_and_load(array, self.contexts, even_split=False)
            for array in (data, label)
        )
        with autograd.record():
            losses = self.criterion(self.model(xs), ys)
        parallel_backward(losses)
        self.trainer.step(len(data))
        return sum(float(loss.sum().asscalar()) for loss in losses) / len(data)

    def check(self):
        """All copies of the statistics are finite and equal."""
        for name, parameter in self.net.collect_params(".*running.*").items():
            arrays = [array.asnumpy() for array in parameter.list_data()]
            assert all(np.isfinite(array).all() for array in arrays), f"{name} is not finite"
            assert len({array.tobytes() for array in arrays}) == 1, f"{name} differs"


def batches(random):
    """Noisy images of three classes, 5 a batch: shards of 3 and 2."""
    patterns = random.randn(3, 2, 8, 8).astype("float32")
    while True:
        label = random.randint(0, 3, 5)
        data = patterns[label] + 2 * random.randn(5, 2, 8, 8).astype("float32")
        yield mx.nd.array(data), mx.nd.array(label)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20000)
    steps = parser.parse_args().steps
    two, one = Training([mx.cpu(0), mx.cpu(1)]), Training([mx.cpu(0)])
    losses = np.ones((steps, 2))  # written, so that its memory is there from the start
    warm = steps // 10
    base, start = None, time.monotonic()
    source = batches(np.random.RandomState(7))
    print("   step  resident MiB  loss on two  on one", flush=True)
    for step in range(steps):
        batch = next(source)
        losses[step] = two.step(*batch), one.step(*batch)
        if (step + 1) % warm == 0:
            gc.collect()
            two.check()
            one.check()
            memory = resident()
            base = memory if base is None else base
            means = losses[step + 1 - warm : step + 1].mean(0)
            worst = np.abs(losses[: step + 1, 0] / losses[: step + 1, 1] - 1).max()
            print(f"{step + 1:7d}  {memory:12.2f}  {means[0]:11.4f}  {means[1]:6.4f}", flush=True)
            assert worst <= LOSS_TOLERANCE, f"the losses differ by {worst:.1e} of their value"
            assert memory - base <= GROWTH, f"resident memory grew by {memory - base:.2f} MiB"
    print(
        f"{steps} steps in {time.monotonic() - start:.0f} s: resident memory {memory - base:+.2f} "
        f"MiB after the first {warm}; no loss differs by more than {worst:.1e} of its value"
    )


if __name__ == "__main__":
    main()
