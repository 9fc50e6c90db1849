"""What the exchange between processes adds to a training step: ResNet-18 on every rank.

    mpirun -n 2 --bind-to none python benchmarks/ranks_network.py

Prints, on rank 0, the milliseconds of a step (forward and backward; gradients stay where they are)
with statistics over all ranks and with each rank's own, in turns, and their ratio.
"""

import statistics
import time

import mxnet as mx
from mpi4py import MPI
from mxnet import autograd, gluon

from gluon_syncbn import convert_sync_batchnorm, distributed

TURNS, STEPS, BATCH, SIZE = 5, 6, 8, 64


def steps(net, data):
    """Return the median seconds of a step."""
    times = []
    for _ in range(STEPS + 1):
        MPI.COMM_WORLD.Barrier()
        start = time.perf_counter()
        with autograd.record():
            out = net(data)
        out.backward()
        mx.nd.waitall()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one traces


def main():
    net = convert_sync_batchnorm(gluon.model_zoo.vision.resnet18_v1())
    net.initialize()
    net.hybridize(static_alloc=True, static_shape=True)
    data = mx.nd.random.normal(shape=(BATCH, 3, SIZE, SIZE))
    together, alone = [], []
    for _ in range(TURNS):
        distributed.attach(net)
        together.append(steps(net, data))
        distributed.detach(net)
        alone.append(steps(net, data))
    if MPI.COMM_WORLD.rank == 0:
        ratios = [a / b for a, b in zip(together, alone)]
        print(
            f"{MPI.COMM_WORLD.size} ranks, ResNet-18, batch {BATCH} of {SIZE}x{SIZE} a rank: "
            f"{1e3 * statistics.median(together):.1f} ms together, "
            f"{1e3 * statistics.median(alone):.1f} ms alone, ratio {statistics.median(ratios):.3f} "
            f"[{min(ratios):.3f} - {max(ratios):.3f}]"
        )


if __name__ == "__main__":
    main()
