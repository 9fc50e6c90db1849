"""The backward pass of a data-parallel network."""

from __future__ import annotations

from typing import Any

from mxnet import autograd

from .. import passes
from ..key_barrier import BARRIER
from . import device_threads
from .nested import arrays_in


def parallel_backward(
    losses: list,
    head_grads: Any = None,
    retain_graph: bool = False,
    train_mode: bool = True,
) -> None:
    """Compute the gradients of losses on several devices, each in its device's thread.

    Use it on CPU contexts: plain ``autograd.backward`` pushes the operators of all devices from one
    thread, which can deadlock there (see docs/architecture.md).  On GPU contexts, each of which has
    temporary space of its own, both work (shown on emulated GPUs; no real ones were at hand yet).

    Parameters
    ----------
    losses : list of NDArray
        What :class:`DataParallelCriterion` returns: one loss per device.  An entry may be a list or
        tuple of losses on one device.
    head_grads : list of NDArray, optional
        The gradients of the losses, in the same arrangement; ones by default.
    retain_graph : bool, default False
        Keep the recorded graph for another backward pass.
    train_mode : bool, default True
        Whether to differentiate for training.

    Notes
    -----
    The graphs of the devices must not share anything recorded: split a batch before recording, not
    within.  MXNet frees a graph as a backward pass goes through it, so two threads in one graph
    fail, or one device's part of the gradient is lost.

    Raises
    ------
    TypeError
        If ``losses`` is not a list of NDArrays.
    ValueError
        If ``losses`` is empty or ``head_grads`` does not match it.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import parallel_backward
    >>> ctx_list = [mx.cpu(0), mx.cpu(1)]
    >>> weights = [mx.nd.ones(2, ctx=ctx) for ctx in ctx_list]
    >>> for weight in weights:
    ...     weight.attach_grad()
    >>> with mx.autograd.record():
    ...     losses = [(3 * weight).sum() for weight in weights]
    >>> parallel_backward(losses)
    >>> [weight.grad.asnumpy().tolist() for weight in weights]
    [[3.0, 3.0], [3.0, 3.0]]
    """
    heads = list(arrays_in(losses))
    if isinstance(losses, (list, tuple)) and not losses:
        raise ValueError("the list of losses is empty; give the loss of one device at least")
    if not isinstance(losses, (list, tuple)) or not heads:
        raise TypeError("losses must be a list with one NDArray per device")
    grads = [None] * len(heads) if head_grads is None else list(arrays_in(head_grads))
    if len(grads) != len(heads):
        raise ValueError(f"there are {len(heads)} losses, but {len(grads)} head gradients")
    by_device = {}
    for head, grad in zip(heads, grads):
        by_device.setdefault(head.context, []).append((head, grad))

    def backward(pairs):
        head, grad = zip(*pairs)
        autograd.backward(
            list(head), None if head_grads is None else list(grad), retain_graph, train_mode
        )

    recorded = passes.remembered()

    def fail(why):  # which of its passes these losses are of cannot be known
        BARRIER.abort([number for p in recorded for number in p.numbers], why)

    tasks = [(c, lambda pairs=pairs: backward(pairs)) for c, pairs in by_device.items()]
    if len(tasks) == 1:
        backward(by_device[tasks[0][0]])
    else:
        device_threads.run(tasks, fail=fail)
    _sync_idle_devices(recorded, {device: len(pairs) for device, pairs in by_device.items()})


def _sync_idle_devices(recorded, losses):
    """Do for devices without input what backward has done for the others.

    Their gradients are zeroed again, if another pass has written them since.

    Parameters
    ----------
    recorded : list of Pass
    losses : dict of Context to int
        How many losses have run backward on each device.
    """
    for a_pass in recorded:
        if not a_pass.idle:
            continue
        if losses.keys() == set(a_pass.present):
            a_pass.zero_idle_gradients()
            a_pass.sync_idle_devices_late()
            passes.forget(a_pass)
        elif all(losses.get(c, 0) > losses.get(d, 0) for c in a_pass.present for d in a_pass.idle):
            passes.forget(a_pass)  # its losses ran backward with those of a pass on all devices
