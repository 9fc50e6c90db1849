"""Draw the picture of docs/stragglers.md: two devices, of which one is slow in the middle.

python docs/waiting.py          # writes docs/waiting.png and prints the table

"""

import pathlib
import time

import mxnet as mx
from mxnet import autograd, gluon

from gluon_syncbn import ModelDataParallel, SyncBatchNorm, barrier_stats, parallel_backward

CTX_LIST = [mx.cpu(0), mx.cpu(1)]


class Slow(gluon.nn.Block):
    """A layer that takes 20 ms longer on cpu(1)."""

    def forward(self, x):
        if x.context == CTX_LIST[1]:
            time.sleep(0.02)
        return x


def main():
    net = gluon.nn.Sequential(prefix="net_")
    with net.name_scope():
        for middle in (False, True, False):
            if middle:
                net.add(Slow())
            net.add(gluon.nn.Conv2D(16, 3, padding=1), SyncBatchNorm(), gluon.nn.Activation("relu"))
    net.initialize(ctx=CTX_LIST)
    model = ModelDataParallel(net, CTX_LIST)
    xs = [mx.nd.random.normal(shape=(4, 3, 64, 64), ctx=context) for context in CTX_LIST]

    def step():
        with autograd.record():
            ys = model(xs)
        parallel_backward(ys)
        mx.nd.waitall()

    step()
    barrier_stats(reset=True)
    for _ in range(10):
        step()
    stats = barrier_stats()
    print(stats)
    stats.plot(pathlib.Path(__file__).with_name("waiting.png"))


if __name__ == "__main__":
    main()
