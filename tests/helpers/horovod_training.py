"""A small training on whole batches, and the same by the ranks of a job with Horovod.

As a script it is a rank: ``mpirun python horovod_training.py FOLDER FIRST HYBRIDIZE`` writes the
parameters of each to the folder.  FIRST is what comes first, or initializes MPI:

- ``hvd.init``: before gluon_syncbn is imported, which therefore ends before Horovod;
- ``gluon_syncbn``: imported before hvd.init(), so Horovod ends before it;
- ``mpi4py``: it initializes MPI, and the network is attached before hvd.init().
"""

import sys

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

FIRST = ["hvd.init", "gluon_syncbn", "mpi4py"]
# With one image, a rank has no shard; shards differ in size.
BATCHES = [7, 1, 5, 6]
OPTIMIZER = "sgd", {"learning_rate": 0.05, "momentum": 0.9}


def make_network(hybridize, seed):
    from networks import STATIC, convolutional  # which imports gluon_syncbn

    mx.random.seed(seed)
    net = convolutional(widths=(4, 6))
    net.cast("float64")
    net.initialize(mx.init.Xavier())
    if hybridize:
        net.hybridize(**STATIC)
    return net


def batches():
    from networks import data_for

    for data, label in data_for(None, BATCHES):
        yield mx.nd.array(data, dtype="float64"), mx.nd.array(label)


def backward(net, data, label):
    with autograd.record():
        loss = gluon.loss.SoftmaxCrossEntropyLoss()(net(data), label)
    loss.backward()


def parameters(net):
    return {name: p.data().asnumpy() for name, p in net.collect_params().items()}


def train_alone():
    net = make_network(False, seed=3)
    trainer = gluon.Trainer(net.collect_params(), *OPTIMIZER)
    for data, label in batches():
        backward(net, data, label)
        trainer.step(len(data))
    return parameters(net)


def train_rank(folder, first, hybridize):
    if first == "mpi4py":
        import mpi4py.MPI  # noqa: F401
    if first == "gluon_syncbn":
        import gluon_syncbn  # noqa: F401
    import horovod.mxnet as hvd

    if first != "mpi4py":
        hvd.init()
    from mpi4py import MPI

    from gluon_syncbn import distributed

    net = make_network(hybridize, seed=3 + MPI.COMM_WORLD.rank)  # rank 0's is broadcast
    distributed.attach(net)
    if first == "mpi4py":
        hvd.init()
    assert hvd.mpi_threads_supported()
    hvd.broadcast_parameters(net.collect_params(), root_rank=0)
    trainer = hvd.DistributedTrainer(net.collect_params(), *OPTIMIZER)
    for data, label in batches():
        begin, end = (len(data) * rank // hvd.size() for rank in (hvd.rank(), hvd.rank() + 1))
        if begin < end:
            backward(net, data[begin:end], label[begin:end])
        else:
            with distributed.no_shard(net):
                backward(net, data, label)
        trainer.step(len(data) / hvd.size())
    np.savez(f"{folder}/{hvd.rank()}.npz", **parameters(net))


if __name__ == "__main__":
    train_rank(sys.argv[1], sys.argv[2], sys.argv[3] == "True")
