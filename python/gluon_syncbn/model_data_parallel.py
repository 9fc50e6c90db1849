"""A network on several devices at once: each runs its share of the batch in a thread of its own."""

import os

from mxnet import autograd, runtime
from mxnet.context import num_gpus
from mxnet.gluon import Block

from . import device_threads, random_state
from .exchanges import blocks_of, edits, exchanges_of, forget_traces
from .first_call import FirstCall
from .key_barrier import BARRIER
from .keyword_arguments import call
from .library import LIBRARY, check
from .shares import arrays_in, check_contexts, split


class ModelDataParallel:
    """Run a network forward over a list of per-device inputs.

    Parameters
    ----------
    net : Block
        The network; its parameters must be initialized on all of ``ctx_list``.  Layers of it that
        were given no ``num_devices`` are synchronized over ``ctx_list``.
    ctx_list : list of Context
        The devices.

    Notes
    -----
    Called with a list of NDArrays, one per device, it gives the list of outputs in the same order.
    Further positional and keyword arguments may be such lists, too; anything else (numbers, None)
    goes to every device.  Attributes of the network are reachable through this object.

    There may be fewer inputs than devices: the list is shorter then.  A device without one
    contributes nothing to any statistic; its moving statistics become those of the others and its
    gradients zero, so that ``trainer.step`` does what one device with the whole batch would do.
    (A ``KeyBarrierSum`` of your own in the network expects its ``num_devices`` all the same.)

    The first call in training and the first in inference run the network once more, on one device
    alone, to initialize and trace it; initial weights are drawn from the caller's random state.

    The network's own calls, without this object, still meet as many devices in training as the
    last call through this object had.  To go on with one device, call
    ``ModelDataParallel(net, [context])``.

    An exchange or another operator that failed raises when its result is read, or else at the next
    call that has to wait for it; the call after that works.

    Raises
    ------
    TypeError
        If ``net`` is no Block; from a call, if the first argument is no list of NDArrays.
    ValueError
        If ``ctx_list`` is empty, repeats a device, mixes CPUs and GPUs or has a GPU that is not
        there, or a layer's
        ``num_devices`` contradicts it; from a call, if the inputs do not lie on distinct devices
        of it.
    RuntimeError
        If there are several devices and MXNet runs on NaiveEngine, or the devices are GPUs and this
        package was built without its CUDA side, or MXNet without CUDA.
    Exception
        From a call, whatever the network raises on one of the devices; the next call works.

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

    def __init__(self, net, ctx_list):
        if not isinstance(net, Block):
            raise TypeError(f"the network must be a gluon Block, but is {type(net).__name__}")
        self.ctx_list = check_contexts(ctx_list)
        self.net = net
        if self.ctx_list[0].device_type == "gpu":
            _need_gpus(self.ctx_list)
        if len(self.ctx_list) > 1 and os.environ.get("MXNET_ENGINE_TYPE") == "NaiveEngine":
            raise RuntimeError(
                "NaiveEngine runs one operator at a time, so several devices can never meet; "
                "unset MXNET_ENGINE_TYPE, or use one device"
            )
        random_state.begin()
        self._first_call = FirstCall(net, self._call)
        self._mode = None
        self._outputs = []  # of the last call, where the next one has to wait for them
        self._failures = BARRIER.failures
        self._edits = 0
        self._exchanges()

    def __getattr__(self, name):
        if name == "net":  # not set yet: copying or unpickling
            raise AttributeError(name)
        return getattr(self.net, name)

    def __repr__(self):
        return f"{type(self).__name__}({self.net!r}, ctx_list={self.ctx_list})"

    def __call__(self, *args, **kwargs):
        shares = split(self.ctx_list, args, kwargs)
        self._raise_failures()
        exchanges = self._exchanges()
        if self._edits != edits():  # a part of the network may have been converted since
            forget_traces(self.net)
            self._edits = edits()
        if len(self.ctx_list) > 1:
            self._first_call.prepare(shares[0], self.ctx_list)
        keys = [e.key for e in exchanges]
        self._enter_mode(keys, len(shares))
        self._keep_order()
        outputs = self._run(shares, keys)
        if autograd.is_training() and len(shares) > 1 and _has_static_shape(self.net):
            self._outputs = list(arrays_in(outputs))
        if len(shares) < len(self.ctx_list):
            self._stand_in([share.context for share in shares], exchanges)
        return outputs

    def _enter_mode(self, keys, num_devices):
        """Switch between training and inference, or to another number of devices.

        What is under way is let run out first: its rounds expect as many devices as before, and a
        graph with ``static_shape`` has one flag for all its runs that says whether it trains.
        """
        mode = autograd.is_training(), num_devices
        if mode == self._mode and not BARRIER.members_differ(keys, num_devices):
            return
        device_threads.settle()
        BARRIER.set_members(keys, num_devices)
        self._mode = mode

    def _keep_order(self):
        """Let the forward pass before this one finish, where the engine would not keep the order.

        A graph with ``static_shape`` does not tell the engine that it writes statistics, so on one
        device the next pass could overtake it in some layer, and meet the others' earlier pass.
        """
        outputs, self._outputs = self._outputs, []
        for output in outputs:
            output.wait_to_read()

    def _stand_in(self, present, exchanges):
        """Do for the devices without input what the others did for themselves."""
        absent = [c for c in self.ctx_list if c not in present]
        recording = autograd.set_recording(False)
        try:
            if autograd.is_training():
                # A graph with static_shape does not tell the engine that it writes statistics, so
                # the engine would not make the copies wait for it.
                device_threads.settle()
                _copy_statistics(exchanges, present[0], absent)
            if recording:
                _zero_gradients(self.net, absent)
        finally:
            autograd.set_recording(recording)

    def _run(self, shares, keys):
        if len(self.ctx_list) == 1:
            with shares[0].context:
                return [self._call(shares[0])]
        tasks = [(share.context, lambda share=share: self._call(share)) for share in shares]
        return device_threads.run(tasks, keys)

    def _call(self, share):
        return call(self.net, share.args, share.kwargs)

    def _exchanges(self):
        exchanges = exchanges_of(self.net)
        for e in exchanges:
            if e.num_devices not in (None, len(self.ctx_list)):
                raise ValueError(
                    f"{e.name} has num_devices={e.num_devices}, but ctx_list has "
                    f"{len(self.ctx_list)} devices; give it num_devices=None or "
                    f"{len(self.ctx_list)} (a converted network: revert_batchnorm, then convert it "
                    "anew)"
                )
        return exchanges

    def _raise_failures(self):
        """After a failed exchange: what nobody has read of it must neither be lost nor linger."""
        if BARRIER.failures != self._failures:
            self._failures = BARRIER.failures
            device_threads.settle()


def _need_gpus(contexts):
    check(LIBRARY.GluonSyncBNNeedCuda())
    if not runtime.Features().is_enabled("CUDA"):
        raise RuntimeError(
            "this MXNet has no CUDA, so it takes CPU contexts only; install mxnet-cu112==1.9.1 "
            "instead of mxnet"
        )
    there = num_gpus()
    missing = [str(c) for c in contexts if c.device_id >= there]
    if missing:
        raise ValueError(f"ctx_list has {', '.join(missing)}, but {there} GPUs are visible")


def _has_static_shape(net):
    return any(dict(getattr(block, "_flags", ())).get("static_shape") for block in blocks_of(net))


def _copy_statistics(exchanges, source, absent):
    for exchange in exchanges:
        for parameter in exchange.statistics:
            for context in absent:
                parameter.data(source).copyto(parameter.data(context))


def _zero_gradients(net, absent):
    for parameter in net.collect_params().values():
        if parameter.grad_req == "null" or not parameter._data:  # the network does not use it
            continue
        for context in absent:
            if parameter.grad_req == "write":
                parameter.grad(context)[:] = 0
            # What Trainer looks at to tell a gradient of this step from an old one.
            parameter.data(context)._fresh_grad = True
