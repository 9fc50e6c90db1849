"""Whole networks with our layers, over the same networks with nn.BatchNorm, on the CPU.

    python benchmarks/networks.py [--seconds 8] [CASE ...]

All run in one process and take turns, step by step; a ratio is the median over the rounds, which a
shared machine disturbs least.  CPU time stands beside wall time.  Fused: with the activation and
the residual sum in the layer (``convert_sync_batchnorm(net, fuse=True)``).
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
from gluon_syncbn import DataParallelCriterion, ModelDataParallel, convert_sync_batchnorm
from run import processor

STATIC = {"static_alloc": True, "static_shape": True}
BATCH = 8  # on each device
CANDIDATES = "nn.BatchNorm", "ours", "fused"


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


def make_step(network, shape, devices, train, candidate):
    """A function that runs one step, or one inference, and waits for it."""
    mx.random.seed(0)
    contexts = [mx.cpu(i) for i in range(devices)]
    net = NETWORKS[network](classes=10)
    if candidate != "nn.BatchNorm":
        convert_sync_batchnorm(net, 1 if devices == 1 else None, fuse=candidate == "fused")
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
    steps = {name: make_step(*CASES[case], name) for name in CANDIDATES}
    for _ in range(3):
        for step in steps.values():
            step()
    rounds, end = [], time.perf_counter() + seconds
    while len(rounds) < 5 or time.perf_counter() < end:
        rounds.append({name: timed(step) for name, step in steps.items()})
    median = statistics.median
    plain = [one["nn.BatchNorm"] for one in rounds]
    found = {"ms": 1e3 * median(wall for wall, _ in plain)}
    for name in CANDIDATES[1:]:
        own = [one[name] for one in rounds]
        found[name] = {
            "wall": median(o[0] / p[0] for o, p in zip(own, plain)),
            "cpu": median(o[1] for o in own) / median(p[1] for p in plain),
        }
    return found


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
    print(
        f"\n{'':44} {'BatchNorm':>10} {'ours':>16} {'':>16} {'fused':>16} {'':>16}\n"
        f"{'':44} {'ms':>10}" + f" {'wall time':>16} {'CPU time':>16}" * 2
    )
    for case in arguments.case or CASES:
        command = [sys.executable, "-W", "ignore", __file__, "--json", case]
        command += ["--seconds", str(arguments.seconds)]
        found = [
            json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            for _ in range(arguments.processes)
        ]

        def spread(candidate, kind, found=found):
            values = sorted(one[candidate][kind] for one in found)
            low, high = f"{values[0]:.3f}", f"{values[-1]:.3f}"
            return low if len(values) == 1 else f"{low} to {high}"

        ratios = [spread(name, kind) for name in CANDIDATES[1:] for kind in ("wall", "cpu")]
        row = " ".join(f"{ratio:>16}" for ratio in ratios)
        print(f"{case:44} {found[0]['ms']:10.1f} {row}", flush=True)


if __name__ == "__main__":
    main()
