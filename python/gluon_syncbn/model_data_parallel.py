"""A network on several devices at once: each runs its share of the batch in a thread of its own."""

import os

from mxnet import autograd, runtime
from mxnet.context import num_gpus
from mxnet.gluon import Block

from . import device_threads, random_state
from .exchanges import adopt_graphs, exchanges_of, last_edit
from .key_barrier import BARRIER
from .keyword_arguments import call
from .library import LIBRARY, check
from .passes import Pass, check_num_devices, remember, running
from .shares import check_contexts, split


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

    All layers of ours that run in a call are synchronized in it, also those that Gluon does not
    know of, in a Python list or a closure.  What Gluon does once, initializing deferred parameters
    and tracing hybridized blocks, is done in the calling thread, whenever it comes up: initial
    weights are drawn from its random state.

    Several threads may call one model, or several models over one network, at the same time.  The
    network must not wait for all of MXNet in its ``forward`` (``mx.nd.waitall()``): it would wait
    for the other devices, which wait for it, up to the deadline.  To wait for an array is fine.

    An exchange or another operator that failed raises when its result is read, or else at the next
    call of this model, or at the next ``mx.nd.waitall()`` of anybody; the call after that works.

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
        self._read_exchanges()

    def __getattr__(self, name):
        if name == "net":  # not set yet: copying or unpickling
            raise AttributeError(name)
        return getattr(self.net, name)

    def __repr__(self):
        return f"{type(self).__name__}({self.net!r}, ctx_list={self.ctx_list})"

    def __call__(self, *args, **kwargs):
        shares = split(self.ctx_list, args, kwargs)
        if self._edit != last_edit():  # a part of the network may have been converted since
            self._read_exchanges()
        self._raise_failures()
        present = [share.context for share in shares]
        a_pass = Pass(self.net, present, [c for c in self.ctx_list if c not in present])
        outputs = self._run(shares, a_pass)
        if a_pass.absent:
            self._stand_in(a_pass)
        if autograd.is_recording():
            remember(a_pass)
        a_pass.close()
        return outputs

    def _run(self, shares, a_pass):
        if len(self.ctx_list) == 1:
            with shares[0].context, running(a_pass):
                return [self._call(shares[0])]
        tasks = [(share.context, lambda share=share: self._call(share)) for share in shares]
        return device_threads.run(tasks, a_pass)

    def _stand_in(self, a_pass):
        """Copy statistics to the devices without input, and make their gradients zero."""
        recording = autograd.set_recording(False)
        try:
            if autograd.is_training():
                a_pass.stand_in()
            if recording:
                a_pass.zero_absent_gradients()
        finally:
            autograd.set_recording(recording)

    def _call(self, share):
        return call(self.net, share.args, share.kwargs)

    def _read_exchanges(self):
        adopt_graphs(self.net)
        exchanges = exchanges_of(self.net)
        for e in exchanges:
            check_num_devices(e, len(self.ctx_list))
        self._keys = [e.key for e in exchanges]
        self._failures = BARRIER.failures_of(self._keys)
        self._edit = last_edit()

    def _raise_failures(self):
        """After a failed exchange: what nobody has read of it must neither be lost nor linger."""
        failures = BARRIER.failures_of(self._keys)
        if failures != self._failures:
            self._failures = failures
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
