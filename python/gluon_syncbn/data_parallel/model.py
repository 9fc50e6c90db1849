"""A network on several devices at once: each runs its shard of the batch in a thread of its own."""

from __future__ import annotations

import os
from typing import Any

from mxnet import autograd, runtime
from mxnet.context import num_gpus

from ..key_barrier import BARRIER
from ..library import LIBRARY, check
from ..networks import NetworkWrapper, graph_version
from ..passes import Pass, check_num_devices, remember, running
from . import device_threads, random_state
from .callable_block import CallableBlock, as_block
from .exchanges import adopt_graphs, exchanges_of
from .keyword_arguments import call
from .placement import Placement
from .shards import Shard, check_contexts, split


class ModelDataParallel(NetworkWrapper):
    """Run a network forward over a list of per-device inputs.

    Each device runs its shard of the batch in a thread of its own; layers of the network that were
    given no ``num_devices`` are synchronized over ``ctx_list``.

    Parameters
    ----------
    net : Block or callable
        The network, or a callable with ``collect_params`` that runs one.
    ctx_list : list of Context
        The devices: distinct, all CPUs or all GPUs.  Layers with a ``group_size`` of k are
        synchronized over the first k, the next k, and so on.

    Attributes
    ----------
    net : Block
        The network as a Block; its attributes are available on this object as well.
    ctx_list : list of Context
        The devices.

    Raises
    ------
    TypeError
        If ``net`` is neither a Block nor a callable with ``collect_params``.
    ValueError
        If ``ctx_list`` is empty, repeats a device, mixes CPUs and GPUs or names a GPU that does not
        exist; if a layer's ``num_devices`` or ``group_size`` contradicts it; or if a parameter is
        missing on one of the devices and cannot be copied there, because it is sparse or its
        Trainer has made steps.
    RuntimeError
        If there are several devices and MXNet runs on NaiveEngine, or the devices are GPUs and this
        package was built without its CUDA side, or MXNet without CUDA.

    See Also
    --------
    DataParallelCriterion : the loss of the outputs.
    parallel_backward : the gradients.
    DataParallelModel : the same for whole batches, in GluonCV's form.

    Notes
    -----
    **Parameters** that are missing on one of the devices are put on all of them, deferred ones as
    well, when this object is made and when it is called (``reset_ctx``; gradients are then zero).
    Parameters on more devices are left alone.  A Trainer that was made before, but
    has made no step yet, follows.

    **Layers.** All synchronized layers that run in a call take part in it, also those in a Python
    list or a closure that Gluon does not know.  What Gluon does once, initializing deferred
    parameters and tracing hybridized blocks, is done in the calling thread whenever it comes up, so
    initial weights are drawn from that thread's random state.

    **Threads.** Several threads may call one model, or several models over one network, at the same
    time.  The network must not wait for all of MXNet in its ``forward`` (``mx.nd.waitall()``): it
    would wait for the other devices, which wait for it, until the deadline.  Waiting for an array
    is fine.

    **Errors.** A failed all-reduce, or any other operator that failed, raises when its result is
    read, or else at the next call of this model or at the next ``mx.nd.waitall()`` in any thread.
    The call after that works.

    Examples
    --------
    >>> import mxnet as mx
    >>> from mxnet import autograd, gluon
    >>> from gluon_syncbn import (DataParallelCriterion, ModelDataParallel, SyncBatchNorm,
    ...                           parallel_backward)
    >>> ctx_list = [mx.cpu(0), mx.cpu(1)]
    >>> net = gluon.nn.HybridSequential()
    >>> net.add(gluon.nn.Dense(8), SyncBatchNorm(), gluon.nn.Dense(2))
    >>> net.initialize(ctx=ctx_list)
    >>> model = ModelDataParallel(net, ctx_list)
    >>> criterion = DataParallelCriterion(gluon.loss.L2Loss(), ctx_list)
    >>> trainer = gluon.Trainer(net.collect_params(), 'sgd')
    >>> data, label = mx.nd.ones((5, 4)), mx.nd.ones((5, 2))
    >>> xs = gluon.utils.split_and_load(data, ctx_list, even_split=False)
    >>> ys = gluon.utils.split_and_load(label, ctx_list, even_split=False)
    >>> with autograd.record():
    ...     losses = criterion(model(xs), ys)
    >>> parallel_backward(losses)
    >>> trainer.step(len(data))
    """

    def __init__(self, net: Any, ctx_list: list) -> None:
        if isinstance(net, ModelDataParallel):
            raise TypeError("the network is in a ModelDataParallel already; take its module")
        net = as_block(net)
        self.ctx_list = check_contexts(ctx_list)
        self.net = net
        if self.ctx_list[0].device_type == "gpu":
            _check_gpus(self.ctx_list)
        if len(self.ctx_list) > 1 and os.environ.get("MXNET_ENGINE_TYPE") == "NaiveEngine":
            raise RuntimeError(
                "NaiveEngine runs one operator at a time, so devices cannot exchange anything; "
                "unset MXNET_ENGINE_TYPE, or use one device"
            )
        random_state.begin()
        self._read_exchanges()
        self._placement = Placement(net, self.ctx_list)
        self._placement.restore()

    @property
    def module(self) -> Any:
        """The network as it was given."""
        return self.net.function if isinstance(self.net, CallableBlock) else self.net

    def __getattr__(self, name: str) -> Any:
        if name == "net":  # not set yet: copying or unpickling
            raise AttributeError(name)
        return getattr(self.net, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.net!r}, ctx_list={self.ctx_list})"

    def __call__(self, *args: Any, **kwargs: Any) -> list:
        """Run the network on every device that gets an input.

        Parameters
        ----------
        *args, **kwargs
            The first argument is a list with one entry per device: an NDArray of shape ``(N, *)``,
            or a list or tuple with NDArrays (and None).  Others may be such lists as well, or whole
            NDArrays, which are split by rows over the devices of the first list, unevenly if need
            be.  Anything else (numbers, None, lists without NDArrays) goes to every device.

            The lists may be shorter than ``ctx_list``: a device without input contributes nothing
            to any statistic, its moving statistics become those of the others and its gradients
            zero, so ``trainer.step`` does what one device with the whole batch would do.  (With
            ``group_size``, the others are those of its group; if none of them has an input, the
            moving statistics stay.  A :func:`KeyBarrierSum` of your own still waits for its
            ``num_devices``.)

        Returns
        -------
        list
            The network's output on each device, in the order of the inputs.

        Raises
        ------
        TypeError
            If the first argument is not a list with an NDArray in every entry, or another list has
            NDArrays in some entries only.
        ValueError
            If the inputs are not on distinct devices of ``ctx_list``, an NDArray cannot be split,
            or a parameter cannot be put on all devices.
        Exception
            Whatever the network raises on one of the devices; the next call works.
        """
        shards = split(self.ctx_list, args, kwargs)
        if self._version != graph_version():  # a part of the network may have been converted
            self._read_exchanges()
        self._raise_failures()
        self._placement.restore()
        present = [shard.context for shard in shards]
        a_pass = Pass(self.net, self.ctx_list, present)
        outputs = self._run(shards, a_pass)
        if a_pass.idle:
            self._sync_idle_devices(a_pass)
        if autograd.is_recording():
            remember(a_pass)
        a_pass.close()
        return outputs

    def _run(self, shards: list, a_pass: Pass) -> list:
        if len(self.ctx_list) == 1:
            with shards[0].context, running(a_pass):
                return [self._call(shards[0])]
        tasks = [(shard.context, lambda shard=shard: self._call(shard)) for shard in shards]
        return device_threads.run(tasks, a_pass)

    def _sync_idle_devices(self, a_pass: Pass) -> None:
        """Copy statistics to devices without input, and zero their gradients."""
        recording = autograd.set_recording(False)
        try:
            if autograd.is_training():
                a_pass.sync_idle_devices()
            if recording:
                a_pass.zero_idle_gradients()
        finally:
            autograd.set_recording(recording)

    def _call(self, shard: Shard) -> Any:
        return call(self.net, shard.args, shard.kwargs)

    def _read_exchanges(self) -> None:
        adopt_graphs(self.net)
        exchanges = exchanges_of(self.net)
        for e in exchanges:
            check_num_devices(e, len(self.ctx_list))
        self._keys = [e.key for e in exchanges]
        self._failures = BARRIER.failures_of(self._keys)
        self._version = graph_version()

    def _raise_failures(self) -> None:
        """Raise what a failed all-reduce left unread: it must be neither lost nor raised later."""
        failures = BARRIER.failures_of(self._keys)
        if failures != self._failures:
            self._failures = failures
            device_threads.wait_for_all()


def _check_gpus(contexts: list) -> None:
    check(LIBRARY.NeedCuda())
    if not runtime.Features().is_enabled("CUDA"):
        raise RuntimeError(
            "this MXNet has no CUDA, so it takes CPU contexts only; install mxnet-cu112==1.9.1 "
            "instead of mxnet"
        )
    there = num_gpus()
    missing = [str(c) for c in contexts if c.device_id >= there]
    if missing:
        raise ValueError(f"ctx_list has {', '.join(missing)}, but {there} GPUs are visible")
