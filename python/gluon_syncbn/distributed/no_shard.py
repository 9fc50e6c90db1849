"""A step in which a process has no shard."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import Any, Iterator

from mxnet import MXNetError, ndarray

from ..networks import parameters_with_gradients, unwrap
from .attachment import connection_of_network


def _gradients(net):
    for parameter in parameters_with_gradients(net):
        for gradient in parameter.list_grad():
            yield parameter, gradient.as_nd_ndarray()


@contextmanager
def no_shard(net: Any) -> Iterator[None]:
    """Run a step in which this process has no shard, as in the last batch of an epoch.

    The others wait for this process in every layer, so it runs the step like them, forward and
    backward, on any batch: the one before, or zeros.  What it brings counts nothing: statistics
    are those of the other processes' shards, which this one gets as well, and its gradients are
    zero when the step is over.

    Parameters
    ----------
    net : Block or ModelDataParallel
        One that is attached.

    Notes
    -----
    Forward and backward belong into the ``with`` block; :meth:`mxnet.gluon.Trainer.step` comes
    after it, as on every process.  With ``grad_req='add'`` gradients are what they were before.
    ``nn.BatchNorm`` layers and random states are as after any step.  If the step raises an error,
    the others wait for the rest of it, until the deadline.

    Raises
    ------
    RuntimeError
        If the network is not attached: there is no other process that would have a shard.

    Examples
    --------
    In a loop whose batches may have run out on this process, with ``criterion`` and ``trainer``
    as always, and ``size`` the number of images that all processes have in this step::

        for batch, size in batches:
            last = batch or last
            with contextlib.nullcontext() if batch else distributed.no_shard(net):
                with autograd.record():
                    loss = criterion(net(last.data), last.label)
                loss.backward()
            trainer.step(size)
    """
    connection = connection_of_network(net)
    if connection is None:
        raise RuntimeError(
            "the network is not attached to other processes, so none of them has a shard either; "
            "leave the step out"
        )
    net = unwrap(net)
    ndarray.waitall()  # steps before count
    kept = [(g, g.copy()) for p, g in _gradients(net) if p.grad_req == "add"]
    ndarray.waitall()
    connection.set_silent(True)
    try:
        yield
        ndarray.waitall()
    except BaseException:
        with suppress(MXNetError):  # the first error is the one to raise
            ndarray.waitall()  # what is still on its way must not count either
        raise
    finally:
        connection.set_silent(False)
    for parameter, gradient in _gradients(net):
        if parameter.grad_req == "write":
            gradient[:] = 0
    for gradient, before in kept:
        before.copyto(gradient)
