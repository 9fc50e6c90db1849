"""Attaching a network to the same network in other processes."""

from __future__ import annotations

import socket
import weakref
from typing import Any

from mxnet import MXNetError, ndarray
from mxnet.gluon import Block, SymbolBlock

from .. import mxnet_private
from ..data_parallel.exchanges import adopt_graphs, exchanges_of_block
from ..moving_average import MABN2d
from ..networks import blocks_of, mark_changed, unwrap
from ..processes import connection_of
from ..sync_batch_norm import SyncBatchNorm
from ..version import __version__
from .agreement import check_alike, check_versions, settle
from .connection import MpiConnection, end_with_the_program
from .mpi_library import load_mpi4py, mpi_library

_attached: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # Block -> its MpiConnection


def connection_of_network(net: Any) -> Any:
    """Return a network's MpiConnection, or None if it is not attached."""
    return _attached.get(unwrap(net))


def _refuse_groups(exchange):
    if exchange.group_size is not None:
        raise ValueError(
            f"{exchange.name} has group_size={exchange.group_size}, which divides the devices of a "
            "process; for groups of processes, leave it out and give attach a communicator for "
            "each group"
        )


def _synchronized(net):
    """List the all-reduces that other processes take part in, each key once."""
    adopt_graphs(net)
    found = {}
    for block in blocks_of(net):
        if isinstance(block, SyncBatchNorm):
            never = mxnet_private.settings(block)["use_global_stats"]
            exchanges = [] if never else [block.exchange]
        elif isinstance(block, (MABN2d, SymbolBlock)):
            exchanges = [e for e in exchanges_of_block(block) if e.statistics]
            for e in exchanges:
                if e.local and e.num_devices == 1 and isinstance(block, SymbolBlock):
                    raise ValueError(
                        f"{e.name} was exported with num_devices=1, which left out its all-reduce; "
                        "export the network anew without num_devices, or build it in Python and "
                        "load its parameters"
                    )
            exchanges = [e for e in exchanges if not e.local]
        else:
            continue
        for e in exchanges:
            _refuse_groups(e)
            found.setdefault(e.key, e)
    if not found:
        raise ValueError(
            "the network has no synchronized layer; convert it first, with convert_sync_batchnorm "
            "(layers in a Python list that Gluon does not know of do not count)"
        )
    return list(found.values())


def _describe(exchange):
    (channels,) = exchange.statistics[0].shape or (0,)
    return exchange.name, max(channels, 0)


def attach(net: Any, comm: Any = None) -> None:
    """Synchronize a network over the processes of an MPI job as well.

    From now on, in training, every synchronized layer merges the statistics of the devices of this
    process, as without it, and then those of all processes.  Results are those of one process with
    the whole batch, in moving statistics and gradients too.  Every process of ``comm`` calls it,
    with the same network.

    Parameters
    ----------
    net : Block or ModelDataParallel
        Synchronized layers are SyncBatchNorm, MABN2d unless it has ``num_devices=1``, and those in
        a SymbolBlock.  A SyncBatchNorm with ``num_devices=1`` is synchronized over processes.
        Layers that come into the network later are not attached.
    comm : mpi4py.MPI.Intracomm, optional
        The processes; default ``MPI.COMM_WORLD``.  A part of them is a normalization group:
        ``MPI.COMM_WORLD.Split(rank // 4)`` synchronizes four and four.  Messages go through a
        duplicate.

    Raises
    ------
    RuntimeError
        If mpi4py or the MPI side of this package is missing, MPI was initialized without
        ``MPI_THREAD_MULTIPLE``, or not every process has called it by the deadline
        (:func:`set_timeout`).  After the latter, the communicator cannot be used here again.
    ValueError
        If the network has no synchronized layer, or one with a ``group_size``; if a part of it is
        attached already by itself; if the networks differ between processes.
    TypeError
        If ``net`` or ``comm`` is not what it should be.

    See Also
    --------
    detach : the end of it.
    no_shard : a step in which a process has no shard.

    Notes
    -----
    With one process nothing changes, and nothing costs anything.  Inference never communicates.

    **Order.**  Layers may run in different orders on different processes, as parallel branches do.
    But each process must run the same layers in training, equally often, and call the network
    from one thread.

    **Reproducibility.**  Vectors are float64 and merged in an order that depends on the number of
    processes alone: all get the same bits, on every run.  With another number of processes, or of
    devices in each, the last bits may differ.

    **Failures.**  If a process does not come to an exchange by the deadline, dies, or fails itself,
    the others get an :class:`mxnet.MXNetError` when they read their results, which names the key
    and the process.  As processes may then no longer agree on which exchange is next, all later
    exchanges of the network fail at once, until each process calls ``attach`` again.

    **Devices.**  Outside of :class:`ModelDataParallel`, a layer without ``num_devices`` has one
    device in each process, and with ``num_devices`` it must have as many; anything else is refused
    in the first step.  A :func:`KeyBarrierSum` of your own stays in its process.  A network
    that is converted after it was attached is attached again.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import SyncBatchNorm, distributed
    >>> net = mx.gluon.nn.HybridSequential()
    >>> net.add(mx.gluon.nn.Dense(8), SyncBatchNorm(), mx.gluon.nn.Dense(2))
    >>> net.initialize()
    >>> distributed.attach(net)     # in `mpirun -n 4 python train.py`: over 4 processes
    >>> with mx.autograd.record():
    ...     out = net(mx.nd.ones((3, 4)))
    """
    net = unwrap(net)
    if not isinstance(net, Block):
        raise TypeError(
            f"net must be a Block or a ModelDataParallel, but is a {type(net).__name__}"
        )
    mpi = load_mpi4py()
    comm = mpi.COMM_WORLD if comm is None else comm
    if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
        raise TypeError(
            f"comm must be an mpi4py communicator that this process belongs to, but is {comm!r}"
        )
    detach(net)
    ndarray.waitall()  # steps before are not for the others
    exchanges = _synchronized(net)
    for e in exchanges:
        if connection_of(e.key) is not None:
            raise ValueError(
                f"{e.name} is attached already, with another network that it belongs to; detach "
                "that one first"
            )
    if comm.size == 1:
        return
    mpi_library()  # fails before the others are made to wait
    end_with_the_program()
    here = f"rank {mpi.COMM_WORLD.rank} ({socket.gethostname()})"
    mine = here, __version__, [_describe(e) for e in exchanges]
    own, everyone = settle(mpi, comm, mine)
    names, versions, descriptions = zip(*everyone)
    check_versions(names, versions)
    check_alike(names, descriptions)
    connection = MpiConnection(own, [e.key for e in exchanges], list(names))
    _attached[net] = connection
    weakref.finalize(net, connection.close).atexit = False
    _mark_changed(net)


def detach(net: Any) -> None:
    """Let a network be synchronized over the devices of this process alone again.

    Every process calls it.  The steps under way are completed first.

    Parameters
    ----------
    net : Block or ModelDataParallel
        A network that is not attached is left as it is.

    Raises
    ------
    mxnet.MXNetError
        If something that MXNet still had to do has failed, other than an exchange of this network
        that failed because of an earlier one.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import SyncBatchNorm, distributed
    >>> net = SyncBatchNorm()
    >>> distributed.attach(net)
    >>> distributed.detach(net)
    """
    net = unwrap(net)
    connection = _attached.pop(net, None)
    if connection is None:
        return
    error = None
    try:
        ndarray.waitall()
    except MXNetError as e:
        error = e
    had_failed = connection.close()
    _mark_changed(net)
    if error is not None and not had_failed:
        raise error


def _mark_changed(net):
    """Have graphs traced anew: for one process they may have other operators."""
    for block in blocks_of(net):
        if isinstance(block, (SyncBatchNorm, MABN2d, SymbolBlock)):
            mark_changed(block)
