"""Train the network of mnist.py in one process for each device, with Horovod.

On two cores, and on four GPUs:

    mpirun -n 2 --bind-to none python examples/mnist_horovod.py
    mpirun -n 4 --bind-to none python examples/mnist_horovod.py --ctx gpu

Horovod sums the gradients and gluon_syncbn.distributed the statistics, both over MPI, so Horovod
has to be built with MPI.  docs/clusters.md says how, and how to start it on several hosts.  Any
number of processes gives the same training, up to rounding errors.
"""

import os
import time

import horovod.mxnet as hvd
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from gluon_syncbn import distributed

# The script next to this one has the data, the network and the plot.
from mnist import batches, draw, load_data, make_network, parse_arguments


def set_up(arguments):
    """Set the random seeds and return this rank's device."""
    # The same on every rank: each draws the same batches, and takes its part of them.
    mx.random.seed(arguments.seed)
    np.random.seed(arguments.seed)
    if arguments.ctx == "cpu":
        return mx.cpu()
    if hvd.local_size() > mx.context.num_gpus():
        raise SystemExit(
            f"{hvd.local_size()} processes on a host where {mx.context.num_gpus()} GPUs are visible"
        )
    return mx.gpu(hvd.local_rank())


def shard(batch, ctx):
    """Return this rank's part of a batch, or None if there are fewer rows than ranks."""
    begin, end = (len(batch[0]) * rank // hvd.size() for rank in (hvd.rank(), hvd.rank() + 1))
    return [array[begin:end].as_in_context(ctx) for array in batch] if begin < end else None


def add_up(value):
    """Return the sum of the ranks' values."""
    return hvd.allreduce(mx.nd.array([value], dtype="float64"), average=False).asscalar()


def backward(net, criterion, data, label):
    """Compute the gradients, and return the loss, as sums over the images."""
    with autograd.record():
        loss = criterion(net(data), label)
    loss.backward()
    return loss.sum().asscalar()


def train_epoch(net, criterion, trainer, loader, ctx):
    total = count = 0
    for batch in loader:
        mine = shard(batch, ctx)
        if mine:
            total += backward(net, criterion, *mine)
        else:  # the others expect statistics and gradients of this rank as well: it sends zeros
            with distributed.no_shard(net):
                backward(net, criterion, *(array[:1].as_in_context(ctx) for array in batch))
        images = len(batch[0])
        # The trainer divides the sum of the ranks' gradients by this and by the number of ranks.
        trainer.step(images / hvd.size())
        count += images
    return add_up(total) / count


def evaluate(net, loader, ctx):
    correct = count = 0
    for batch in loader:
        mine = shard(batch, ctx)
        if mine:
            data, label = mine
            correct += (net(data).argmax(axis=1) == label).sum().asscalar()
        count += len(batch[0])
    return add_up(correct) / count


def train(net, loaders, arguments, ctx):
    """Train for all epochs and return the losses and the accuracies."""
    train_loader, test_loader = loaders
    criterion = gluon.loss.SoftmaxCrossEntropyLoss()
    trainer = hvd.DistributedTrainer(
        net.collect_params(), "sgd", {"learning_rate": arguments.lr, "momentum": 0.9, "wd": 1e-4}
    )
    losses, accuracies, start = [], [], time.time()
    for epoch in range(1, arguments.epochs + 1):
        losses.append(train_epoch(net, criterion, trainer, train_loader, ctx))
        accuracies.append(evaluate(net, test_loader, ctx))
        if hvd.rank() == 0:
            print(
                f"epoch {epoch}/{arguments.epochs}  loss {losses[-1]:.4f}  "
                f"test accuracy {accuracies[-1]:.2%}",
                flush=True,
            )
    if hvd.rank() == 0:
        print(f"trained in {time.time() - start:.1f} s")
    return losses, accuracies


def save(net, example, curves, arguments):
    os.makedirs(arguments.out, exist_ok=True)
    prefix = os.path.join(arguments.out, arguments.dataset)
    draw(*curves, f"{prefix}.png")
    net.save_parameters(f"{prefix}.params")
    net.hybridize()
    net(example)  # export needs a graph that has run
    net.export(prefix)
    print(
        f"saved {prefix}.params (load_parameters), {prefix}-symbol.json and {prefix}-0000.params "
        f"(SymbolBlock.imports), {prefix}.png (curves)"
    )


def main(argv=None):
    hvd.init()
    arguments = parse_arguments(argv, __doc__, num_devices=None)
    ctx = set_up(arguments)
    train_set, test_set = load_data(arguments.dataset)
    loaders = [
        batches(*train_set, arguments.batch_size, shuffle=True),
        batches(*test_set, arguments.batch_size, shuffle=False),
    ]
    if hvd.rank() == 0:
        print(
            f"{arguments.dataset}: {len(train_set[0])} training and {len(test_set[0])} test "
            f"images, batches of {arguments.batch_size} over {hvd.size()} processes"
        )

    net = make_network()
    net.initialize(mx.init.Xavier(), ctx=ctx)
    if arguments.hybridize:
        net.hybridize(static_alloc=True, static_shape=True)
    distributed.attach(net)
    hvd.broadcast_parameters(net.collect_params(), root_rank=0)
    curves = train(net, loaders, arguments, ctx)
    if hvd.rank() == 0:
        save(net, mx.nd.array(test_set[0][:1], ctx=ctx), curves, arguments)


if __name__ == "__main__":
    main()
