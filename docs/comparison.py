"""Try MXNet's own SyncBatchNorm and ours on CPU contexts, for docs/comparison.md.

    python docs/comparison.py

Each trial runs in its own process, and is ended after 30 seconds.  Takes some minutes.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import contrib, nn

import gluon_syncbn

LAYERS = {"ours": gluon_syncbn.SyncBatchNorm, "mxnet": contrib.nn.SyncBatchNorm}
STEPS, RUNS = 100, 30


def in_threads(function, shards):
    """Call a function for each device's shard, each in a new thread, as GluonCV's wrappers do."""
    threads = [ThreadPoolExecutor(1) for _ in shards]
    futures = [thread.submit(function, shard) for thread, shard in zip(threads, shards)]
    results = [future.result() for future in futures]
    for thread in threads:
        thread.shutdown()
    return results


def run(net, shards):
    """Run a network on all devices in training; return the whole batch's output."""

    def forward(shard):
        with autograd.record():
            return net(shard).asnumpy()

    return np.concatenate(in_threads(forward, shards))


def split(x, sizes):
    parts = np.split(x, np.cumsum(sizes)[:-1])
    return [mx.nd.array(part, mx.cpu(i), dtype=x.dtype) for i, part in enumerate(parts)]


def batch(rows, dtype="float32", offset=0.0):
    """Make a batch whose rows have different means."""
    noise = np.random.RandomState(0).randn(rows, 16, 5, 5)
    return (noise + np.arange(rows).reshape(-1, 1, 1, 1) + offset).astype(dtype)


def make(layer, devices):
    net = layer(in_channels=16, num_devices=devices)
    net.initialize(ctx=[mx.cpu(i) for i in range(devices)])
    return net


def largest_error(layer, sizes, offset=0.0):
    x = batch(sum(sizes), offset=offset)
    got = run(make(layer, len(sizes)), split(x, sizes))
    x = x.astype("float64")
    mean, var = (f((0, 2, 3), keepdims=True) for f in (x.mean, x.var))
    return f"largest error {abs(got - (x - mean) / np.sqrt(var + 1e-5)).max():.1e}"


def different_results(layer, devices):
    net, shards = make(layer, devices), split(batch(2 * devices), [2] * devices)
    return f"{len({run(net, shards).tobytes() for _ in range(RUNS)})} results in {RUNS} runs"


class Branches(gluon.HybridBlock):
    """Two layers that do not depend on each other."""

    def __init__(self, layer):
        super().__init__()
        with self.name_scope():
            self.left, self.right = (layer(in_channels=16, num_devices=2) for _ in range(2))

    def hybrid_forward(self, F, x, z):
        return self.left(x) + self.right(z)


def two_branches(layer):
    """Train two branches; their inputs become ready in opposite orders on the two devices."""
    net = Branches(layer)
    net.initialize(ctx=[mx.cpu(0), mx.cpu(1)])

    def step(ctx):
        early, late = (mx.nd.ones((2, 16, 5, 5), ctx) for _ in range(2))
        large = mx.nd.ones((700, 700), ctx)
        late = late + mx.nd.dot(large, large)[0, 0]
        with autograd.record():
            output = net(early, late) if ctx.device_id else net(late, early)
        output.backward()

    for _ in range(10):
        in_threads(step, [mx.cpu(0), mx.cpu(1)])
        mx.nd.waitall()
    return "trains"


def four_layers(layer):
    net = nn.HybridSequential()
    for _ in range(4):
        net.add(nn.Conv2D(16, 3, padding=1, in_channels=16))
        net.add(layer(in_channels=16, num_devices=2))
    return net


def train(net, thread_per_device):
    gluon_syncbn.set_timeout(20)
    net.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
    net.hybridize()
    shards = split(batch(4), [2, 2])
    net(shards[0])  # traced here, since tracing in several threads is not safe

    def step(shards):
        with autograd.record():
            outputs = [net(shard) for shard in shards]
        autograd.backward(outputs)

    for i in range(STEPS):
        if thread_per_device:
            in_threads(step, [[shard] for shard in shards])
        else:
            step(shards)
        if i % 10 == 9:
            mx.nd.waitall()
    return "trains"


def of_dtype(layer, dtype):
    net = layer(in_channels=16, num_devices=1)
    net.cast(dtype)
    net.initialize()
    return f"works, in {run(net, split(batch(2, dtype), [2])).dtype}"


def one_device_missing(layer):
    gluon_syncbn.set_timeout(5)
    net = make(layer, 2)
    with autograd.record():
        out = net(split(batch(2), [2])[0])
    out.wait_to_read()


TRIALS = {
    "equal shards": lambda layer: largest_error(layer, [2, 2]),
    "uneven shards, 1 and 4 rows": lambda layer: largest_error(layer, [1, 4]),
    "equal shards, 10,000 from zero": lambda layer: largest_error(layer, [2, 2], 1e4),
    "float16": lambda layer: of_dtype(layer, "float16"),
    "float64": lambda layer: of_dtype(layer, "float64"),
    "same bits, 4 devices": lambda layer: different_results(layer, 4),
    "one device never comes": one_device_missing,
    "four layers, a thread per device": lambda layer: train(four_layers(layer), True),
    "four layers, one thread": lambda layer: train(four_layers(layer), False),
    "two branches, a thread per device": two_branches,
}


def attempt(trial, layer):
    command = [sys.executable, "-W", "ignore", __file__, trial, layer]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0:
        return done.stdout.strip()
    error = [line for line in done.stderr.splitlines() if "Error: " in line]
    return f"error: {error[-1].split('Error: ', 1)[1][:100] if error else done.returncode}"


def main():
    if len(sys.argv) == 3:
        print(TRIALS[sys.argv[1]](LAYERS[sys.argv[2]]))
        return
    for trial in TRIALS:
        for layer in LAYERS:
            print(f"{trial:34} {layer:6} {attempt(trial, layer)}", flush=True)


if __name__ == "__main__":
    main()
