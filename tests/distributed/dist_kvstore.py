"""Training with a dist_sync kvstore: a worker, for test_dist_kvstore.py.

    mpirun -n 2 python -m mpi4py dist_kvstore.py

The kvstore sums the gradients and updates the parameters.  (It does so by default.  With
update_on_kvstore=False MXNet itself is unreliable: docs/clusters.md.)
"""

import mxnet as mx
from cases import RANK, SIZE, assert_close, attached, cut, data, parameters, same_everywhere, twins
from mxnet import autograd, gluon

from gluon_syncbn import set_timeout
from networks import convolutional


def train(net, x, y, size, **store):
    trainer = gluon.Trainer(
        net.collect_params(), "sgd", {"learning_rate": 0.1, "momentum": 0.9}, **store
    )
    criterion = gluon.loss.L2Loss()
    for _ in range(3):
        with autograd.record():
            loss = criterion(net(x), y)
        loss.backward()
        trainer.step(size)
    mx.nd.waitall()
    return parameters(net)


def main():
    set_timeout(20)
    x, y = data()
    begin, end = cut(len(x))[RANK]
    whole, parts = twins(lambda: convolutional(prefix=None), x)
    wanted = train(whole, x, y, len(x), kvstore=None)
    store = mx.kv.create("dist_sync")
    assert store.num_workers == SIZE
    keywords = {"kvstore": store, "update_on_kvstore": True}
    with attached(parts):
        got = train(parts, x[begin:end], y[begin:end], len(x), **keywords)
    assert_close(got, wanted)
    for name, value in got.items():
        assert same_everywhere(value), name


if __name__ == "__main__":
    main()
