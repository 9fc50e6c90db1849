"""The backward pass of a data-parallel network."""

from mxnet import autograd

from . import device_threads, passes
from .key_barrier import BARRIER
from .nested import arrays_in


def parallel_backward(losses, head_grads=None, retain_graph=False, train_mode=True):
    """Compute the gradients of losses on several devices, each in its device's thread.

    On CPU contexts this is how gradients are taken; plain ``autograd.backward`` pushes one
    device's operators after the other's from one thread, which can deadlock there (see
    docs/architecture.md).  On GPU contexts, each of which has space of its own, both do (shown on
    emulated GPUs; no real ones were at hand yet).

    Parameters
    ----------
    losses : list of NDArray
        What :class:`DataParallelCriterion` gives: one loss per device.  An entry may be a list or
        tuple of losses on one device.
    head_grads : list of NDArray, optional
        The gradients of the losses, in the same arrangement; ones by default.
    retain_graph : bool, default False
        Keep the graph for another backward pass.
    train_mode : bool, default True
        Whether to differentiate for training.

    Notes
    -----
    The devices' graphs must not share anything that was recorded: split a batch before it is
    recorded, not within.  MXNet frees what a backward pass has gone through, and two threads
    that go through one graph fail, or one device's part of the gradient is lost.

    Raises
    ------
    TypeError
        If ``losses`` is no list of NDArrays.
    ValueError
        If ``losses`` is empty or ``head_grads`` does not match it.

    Examples
    --------
    See :class:`ModelDataParallel`.
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
        BARRIER.abort([p.id for p in recorded], why)

    tasks = [(c, lambda pairs=pairs: backward(pairs)) for c, pairs in by_device.items()]
    if len(tasks) == 1:
        backward(by_device[tasks[0][0]])
    else:
        device_threads.run(tasks, fail=fail)
    _zero_gradients_again(recorded, {device: len(pairs) for device, pairs in by_device.items()})


def _zero_gradients_again(recorded, losses):
    """What a pass with fewer inputs left zero, an earlier pass's backward may have written since.

    Parameters
    ----------
    recorded : list of Pass
    losses : dict of Context to int
        How many losses have run backward on each device.
    """
    for a_pass in recorded:
        if not a_pass.absent:
            continue
        if losses.keys() == set(a_pass.present):
            a_pass.zero_absent_gradients()
            passes.forget(a_pass)
        elif all(
            losses.get(c, 0) > losses.get(d, 0) for c in a_pass.present for d in a_pass.absent
        ):
            passes.forget(a_pass)  # its losses ran backward with those of a pass on all devices
