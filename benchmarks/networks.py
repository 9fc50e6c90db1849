"""Whole networks with our layers, over the same networks with nn.BatchNorm, on the CPU.

    python benchmarks/networks.py [--seconds 8] [CASE ...]

Both run in one process and take turns, step by step; a ratio is the median over the pairs of steps,
which a shared machine disturbs least.  CPU time stands beside wall time.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn
from mxnet.gluon.model_zoo import vision

import gluon_syncbn
from gluon_syncbn import DataParallelCriterion, ModelDataParallel, SyncBatchNorm
from run import processor
from worker import swap

STATIC = {"static_alloc": True, "static_shape": True}
BATCH = 8  # on each device


def block(**options):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(64, 3, padding=1, in_channels=64, use_bias=False))
    net.add(nn.BatchNorm(in_channels=64), nn.Activation("relu"))
    return net


NETWORKS = {
    "ResNet-18": vision.resnet18_v1,
    "MobileNetV2": vision.mobilenet_v2_1_0,
    "DenseNet-121": vision.densenet121,
    "conv + norm + relu": block,
}
# name -> network, shape of an image, devices, whether it trains
CASES = {
    f"{network}, {what}, {size}×{size}": (network, (3, size, size), devices, what != "inference")
    for network, sizes in (
        ("ResNet-18", (64, 224)),
        ("MobileNetV2", (64,)),
        ("DenseNet-121", (224,)),
    )
    for size in sizes
    for what, devices in (("a step", 1), ("inference", 1), ("a step on two contexts", 2))
    if devices == 1 or network == "ResNet-18"
}
CASES["conv + norm + relu, inference, 64×56×56"] = "conv + norm + relu", (64, 56, 56), 1, False


def make_step(network, shape, devices, train, ours):
    """A function that runs one step, or one inference, and waits for it."""
    mx.random.seed(0)
    contexts = [mx.cpu(i) for i in range(devices)]
    net = NETWORKS[network](classes=10)
    if ours:
        alone = {"num_devices": 1} if devices == 1 else {}
        swap(net, lambda in_channels: SyncBatchNorm(in_channels=in_channels, **alone))
    net.initialize(ctx=contexts)
    net.hybridize(**STATIC)
    values = np.random.RandomState(0).randn(BATCH, *shape).astype("float32")
    xs = [mx.nd.array(values, ctx=c) for c in contexts]
    if not train:

        def infer():
            net(xs[0])
            mx.nd.waitall()

        return infer
    labels = [mx.nd.arange(BATCH, ctx=c) for c in contexts]
    model = ModelDataParallel(net, contexts)
    criterion = DataParallelCriterion(gluon.loss.SoftmaxCrossEntropyLoss(), contexts)
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 1e-3})

    def step():
        with autograd.record():
            losses = criterion(model(xs), labels)
        gluon_syncbn.parallel_backward(losses)
        trainer.step(BATCH * devices)
        mx.nd.waitall()

    return step


def timed(step):
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(case, seconds):
    steps = [make_step(*CASES[case], ours) for ours in (False, True)]
    for _ in range(3):
        for step in steps:
            step()
    pairs, end = [], time.perf_counter() + seconds
    while len(pairs) < 5 or time.perf_counter() < end:
        pairs.append([timed(step) for step in steps])
    median = statistics.median
    return {
        "ms": 1e3 * median(plain[0] for plain, _ in pairs),
        "wall": median(ours[0] / plain[0] for plain, ours in pairs),
        "cpu": median(o[1] for _, o in pairs) / median(p[1] for p, _ in pairs),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="*", help="some of the cases; all by default")
    parser.add_argument("--seconds", type=float, default=8, help="for each case and process")
    parser.add_argument("--processes", type=int, default=1, help="fresh ones for each case")
    parser.add_argument("--json", action="store_true", help="one case, for this script itself")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(measure(arguments.case[0], arguments.seconds)))
        return
    print(
        f"\nNetworks with our layers over those with nn.BatchNorm, batch {BATCH} on each device\n"
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores"
    )
    print(f"\n{'':44} {'BatchNorm (ms)':>14} {'wall time':>16} {'CPU time':>16}")
    for case in arguments.case or CASES:
        command = [sys.executable, "-W", "ignore", __file__, "--json", case]
        command += ["--seconds", str(arguments.seconds)]
        found = [
            json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            for _ in range(arguments.processes)
        ]

        def spread(name, found=found):
            values = sorted(one[name] for one in found)
            low, high = f"{values[0]:.3f}", f"{values[-1]:.3f}"
            return low if len(values) == 1 else f"{low} to {high}"

        print(
            f"{case:44} {found[0]['ms']:14.1f} {spread('wall'):>16} {spread('cpu'):>16}",
            flush=True,
        )


if __name__ == "__main__":
    main()
