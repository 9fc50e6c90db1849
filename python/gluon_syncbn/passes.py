"""A pass: one forward call of a network on several devices, and its backward.

The devices of a pass take part in its all-reduces, and no others do.  A layer may divide them into
groups that exchange among themselves (``group_size``); each group then has a number of its own.
While a device runs its part, the pass is current in its thread; layers and graphs announce it
before they run (``begin``), so it makes no difference whether Gluon knows of them.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
import weakref
from collections import deque, namedtuple
from contextlib import contextmanager, nullcontext

from mxnet import autograd, ndarray

from . import mxnet_private
from .key_barrier import BARRIER
from .library import LIBRARY, check, strings
from .networks import parameters_with_gradients
from .processes import connection_of

# The all-reduce of a layer, or a KeyBarrierSum.  `num_devices`: None if the pass determines it.
# `statistics`: the Parameters that training updates, the moving mean first; () for KeyBarrierSum,
# and for a graph that has them as inputs.
# `local`: the layer needs no all-reduce.  `group_size`: None if all devices are one group.
# `late_statistics`: those that backward updates.
Exchange = namedtuple(
    "Exchange",
    "name key num_devices statistics local group_size late_statistics",
    defaults=(None, ()),
)

_thread = threading.local()
_warned = False


class Pass:
    """One forward call of a network.

    Parameters
    ----------
    net : object
        The network.
    devices : list of Context
        The network's devices, in the order in which groups divide them.
    present : list of Context
        Those that take part; the others are idle.
    """

    def __init__(self, net, devices, present):
        self.id = BARRIER.new_pass()
        self.present, self.idle = list(present), [d for d in devices if d not in present]
        self.failure = None  # why the devices should not go on
        self.devices = list(devices)
        self._net = weakref.ref(net)
        self._begun = []
        self._late = []  # Parameters that backward updates
        self._groups = {}  # (size, first device) -> the group's number in the exchange
        self._lock = threading.Lock()  # around _groups and failure: devices begin at the same time

    @property
    def numbers(self):
        """All numbers that the pass has in the exchange: its own, and those of groups."""
        with self._lock:
            return [self.id, *self._groups.values()]

    def part_of(self, device, group_size):
        """Return the number of the exchange that a device joins, and how many devices do."""
        if group_size is None:
            return self.id, len(self.present)
        group = self._group_of(device, group_size)
        with self._lock:
            self._check_failure()  # a number that is made after `fail` would not be aborted
            name = group_size, group[0]
            if name not in self._groups:
                self._groups[name] = BARRIER.new_pass()
            return self._groups[name], sum(d in self.present for d in group)

    def _group_of(self, device, group_size):
        if group_size is None:
            return self.devices
        first = self.devices.index(device) // group_size * group_size
        return self.devices[first : first + group_size]

    @property
    def exchanges(self):
        """The all-reduces that were announced in it, each once."""
        return list({e.key: e for exchanges in list(self._begun) for e in exchanges}.values())

    def note(self, exchanges):
        self._check_failure()
        for e in exchanges:
            check_num_devices(e, len(self.devices))
        self._begun.append(exchanges)

    def _check_failure(self):
        if self.failure:
            raise RuntimeError(f"this device's part has been given up: {self.failure}")

    def sync_idle_devices(self):
        """Copy the statistics to devices without input, each from a device of its group.

        In a group without any input, statistics stay as they are.
        """
        for exchange in self.exchanges:
            self._copy_to_idle(exchange.statistics, exchange.group_size)

    def sync_idle_devices_late(self):
        """Copy the statistics that backward has updated to devices without input."""
        self._copy_to_idle(self._late)

    def _copy_to_idle(self, parameters, group_size=None):
        for device in self.idle:
            group = self._group_of(device, group_size)
            source = next((d for d in group if d in self.present), None)
            for parameter in parameters if source is not None else ():
                parameter.data(source).copyto(parameter.data(device))

    def zero_idle_gradients(self):
        """Zero the gradients of devices without input."""
        net = self._net()
        for parameter in parameters_with_gradients(net) if net is not None else ():
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
        with self._lock:
            self.failure = why
        BARRIER.abort(self.numbers, why)


def check_num_devices(exchange, num_devices):
    """Raise ValueError if a layer was made for another number of devices than there are."""
    if exchange.num_devices not in (None, num_devices):
        raise ValueError(
            f"{exchange.name} has num_devices={exchange.num_devices}, but ctx_list has "
            f"{num_devices} devices; give it num_devices=None or {num_devices} (a converted "
            "network: revert_batchnorm, then convert it anew)"
        )
    if exchange.group_size is not None and num_devices % exchange.group_size:
        raise ValueError(
            f"{exchange.name} has group_size={exchange.group_size}, but ctx_list has {num_devices} "
            "devices, which cannot be divided into groups of that size; take a multiple"
        )
    announced = exchange.num_devices is None or exchange.group_size is not None
    if announced and num_devices > 1 and not (exchange.local or exchange.statistics):
        # A pass is announced to an all-reduce by writing the moving mean.
        raise ValueError(
            f"{exchange.name} has its moving statistics as inputs of the graph, so "
            "ModelDataParallel cannot tell it which devices take part; make them parameters, or "
            f"give it num_devices={num_devices}, without a group_size"
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


def calls_of_a_layer():
    """Let the exchange know when this thread calls a layer's all-reduces.

    Outside of a pass, it tells by that a late call from a new one.
    """
    return ordered_calls() if current() is None else nullcontext()


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
        _refuse_groups(synchronized)
        _warn_of_loops(synchronized)
    for group_size in {e.group_size for e in synchronized}:
        number, expected = a_pass.part_of(context, group_size) if a_pass else (0, 0)
        alike = [e for e in synchronized if e.group_size == group_size]
        _announce(alike, context, number, expected)


def _announce(exchanges, context, number, expected):
    means = {id(e.statistics[0]): e.statistics[0] for e in exchanges}  # layers may share theirs
    order, count = handles([mean.data(context) for mean in means.values()])
    keys = strings(e.key for e in exchanges)
    check(LIBRARY.BeginPass(*keys, order, count, number, expected))


def _refuse_groups(exchanges):
    for e in exchanges:
        if e.group_size is not None:
            raise RuntimeError(
                f"{e.name} has group_size={e.group_size}, but only ModelDataParallel, by its "
                "ctx_list, says which devices are a group; train the network through it"
            )


def _warn_of_loops(exchanges):
    """Warn once of a layer that is on several devices but was given no number of them."""
    global _warned
    for e in exchanges:
        devices = len(e.statistics[0].list_ctx())
        if devices > (e.num_devices or 1) and connection_of(e.key) is not None:
            # Each device would have rounds of its own, in another order on every process.
            raise RuntimeError(
                f"{e.name} is attached to other processes and is on {devices} devices here; call "
                f"the network through ModelDataParallel, or give the layer num_devices={devices}"
            )
        if devices > 1 and e.num_devices is None and not _warned:
            _warned = True
            warnings.warn(
                f"{e.name} is on {len(e.statistics[0].list_ctx())} devices and was given no "
                "num_devices, so outside of ModelDataParallel it takes the number of visible GPUs, "
                "or 1. Call the network through ModelDataParallel, or give the layer "
                "num_devices.",
                UserWarning,
                stacklevel=3,
            )


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
