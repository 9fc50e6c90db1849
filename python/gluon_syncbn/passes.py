"""A pass: one forward call of a network on several devices, and its backward.

The devices of a pass take part in its all-reduces, and no others do.  While a device runs its
part, the pass is current in its thread; layers and graphs announce it before they run (``begin``),
so it makes no difference whether Gluon knows of them.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
import weakref
from collections import deque, namedtuple
from contextlib import contextmanager

from mxnet import autograd, ndarray

from . import mxnet_private
from .key_barrier import BARRIER
from .library import LIBRARY, check

# The all-reduce of a layer, or a KeyBarrierSum.  `num_devices`: None if the pass determines it.
# `statistics`: the Parameters that training updates, the moving mean first; () for KeyBarrierSum.
# `local`: the layer needs no all-reduce.  `late_statistics`: those that backward updates.
Exchange = namedtuple(
    "Exchange", "name key num_devices statistics local late_statistics", defaults=((),)
)

_thread = threading.local()
_warned = False


class Pass:
    """One forward call of a network.

    Parameters
    ----------
    net : object
        The network.
    present : list of Context
        The devices that take part.
    idle : list of Context
        The network's other devices.
    """

    def __init__(self, net, present, idle=()):
        self.id = BARRIER.new_pass()
        self.present, self.idle = list(present), list(idle)
        self.failure = None  # why the devices should not go on
        self._net = weakref.ref(net)
        self._begun = []
        self._late = []  # Parameters that backward updates

    @property
    def exchanges(self):
        """The all-reduces that were announced in it, each once."""
        return list({e.key: e for exchanges in list(self._begun) for e in exchanges}.values())

    def note(self, exchanges):
        if self.failure:
            raise RuntimeError(f"this device's part has been given up: {self.failure}")
        for e in exchanges:
            check_num_devices(e, len(self.present) + len(self.idle))
        self._begun.append(exchanges)

    def sync_idle_devices(self):
        """Copy the statistics to devices without input."""
        self._copy_to_idle(p for e in self.exchanges for p in e.statistics)

    def sync_idle_devices_late(self):
        """Copy the statistics that backward has updated to devices without input."""
        self._copy_to_idle(self._late)

    def _copy_to_idle(self, parameters):
        source = self.present[0]
        for parameter in parameters:
            for device in self.idle:
                parameter.data(source).copyto(parameter.data(device))

    def zero_idle_gradients(self):
        """Zero the gradients of devices without input."""
        net = self._net()
        for parameter in net.collect_params().values() if net is not None else ():
            if parameter.grad_req == "null" or not mxnet_private.has_data(parameter):
                continue  # without data, the network does not use it
            for device in self.idle:
                if parameter.grad_req == "write":
                    gradient = parameter.grad(device).as_nd_ndarray()  # it may be one of mx.np
                    ndarray.zeros_like(gradient, out=gradient)
                mxnet_private.mark_gradient_fresh(parameter.data(device))

    def close(self):
        """Forget what was needed while the devices ran their forward parts."""
        self._late = [p for e in self.exchanges for p in e.late_statistics] if self.idle else []
        self._begun = []

    def fail(self, why):
        """Fail everything that waits in this pass or would wait later."""
        self.failure = why
        BARRIER.abort([self.id], why)


def check_num_devices(exchange, num_devices):
    """Raise ValueError if a layer was given another number of devices than there are."""
    if exchange.num_devices not in (None, num_devices):
        raise ValueError(
            f"{exchange.name} has num_devices={exchange.num_devices}, but ctx_list has "
            f"{num_devices} devices; give it num_devices=None or {num_devices} (a converted "
            "network: revert_batchnorm, then convert it anew)"
        )


def current():
    """Return the pass that the calling thread runs a device's part of, or None."""
    return getattr(_thread, "current", None)


@contextmanager
def running(a_pass):
    """Make a pass, or None, the current one of this thread."""
    before, _thread.current = current(), a_pass
    try:
        yield
    finally:
        _thread.current = before


@contextmanager
def ordered_calls():
    """Let all-reduces that this thread calls belong together in the order of the program."""
    a_pass = current()
    before = LIBRARY.EnterCall(a_pass.id if a_pass else 0)
    try:
        yield
    finally:
        LIBRARY.LeaveCall(before)


def handles(arrays):
    """Return NDArrays as a C array and its length."""
    return (ctypes.c_void_p * len(arrays))(*[a.handle for a in arrays]), len(arrays)


def begin(exchanges, context):
    """Announce the current pass, or that there is none, to all-reduces that are about to run.

    Parameters
    ----------
    exchanges : sequence of Exchange
    context : Context
        The device on which they run.
    """
    if not autograd.is_training():
        return  # nothing is exchanged
    a_pass = current()
    if a_pass is not None:
        a_pass.note(exchanges)
    synchronized = [
        e
        for e in exchanges
        if e.statistics and not e.local and mxnet_private.has_data(e.statistics[0])
    ]
    if not synchronized:
        return
    if a_pass is None:
        _warn_of_loops(synchronized)
    keys = (ctypes.c_char_p * len(synchronized))(*[e.key.encode() for e in synchronized])
    means = {id(e.statistics[0]): e.statistics[0] for e in synchronized}  # layers may share theirs
    order, count = handles([mean.data(context) for mean in means.values()])
    number, expected = (a_pass.id, len(a_pass.present)) if a_pass else (0, 0)
    check(LIBRARY.BeginPass(keys, len(synchronized), order, count, number, expected))


def _warn_of_loops(exchanges):
    """Warn once of a layer that is on several devices but was given no number of them."""
    global _warned
    if _warned:
        return
    for e in exchanges:
        if e.num_devices is None and len(e.statistics[0].list_ctx()) > 1:
            _warned = True
            warnings.warn(
                f"{e.name} is on {len(e.statistics[0].list_ctx())} devices and was given no "
                "num_devices, so outside of ModelDataParallel it takes the number of visible GPUs, "
                "or 1. Call the network through ModelDataParallel, or give the layer "
                "num_devices.",
                UserWarning,
                stacklevel=3,
            )
            return


def _recorded():
    if not hasattr(_thread, "recorded"):
        _thread.recorded = deque(maxlen=256)  # no loop has more passes on its way
    return _thread.recorded


def remember(a_pass):
    """Note a pass that the calling thread has recorded."""
    _recorded().append(a_pass)


def remembered():
    """The passes that the calling thread has recorded, the oldest first."""
    return list(_recorded())


def forget(a_pass):
    """Forget a pass whose backward has run."""
    if a_pass in _recorded():
        _recorded().remove(a_pass)
