"""Random numbers in device threads: different on every device, reproducible by mx.random.seed.

MXNet keeps its random state per thread, and a new thread's starts from the same seed as any
other's: every device would draw the same dropout mask, and ``mx.random.seed`` in the main thread
would change none of them.  The state cannot be read, so seeds are recorded when they are set, at
the C functions that all of Python's ways of seeding call; each device thread derives its own seed
from that and its device.
"""

import threading
from collections import namedtuple

import mxnet as mx

from .. import mxnet_private

_Seed = namedtuple("_Seed", "generation value")  # generations grow with every call of seed()


class _Seeds:
    """The last seeds that ``mx.random.seed`` set."""

    def __init__(self):
        self._lock = threading.Lock()
        self._generation = 0
        self._of_all = _Seed(0, 0)
        self._of_context = {}  # (device_typeid, device_id) -> from seed(n, ctx=...)

    def set_all(self, value):
        with self._lock:
            self._of_all = self._next(value)
            self._of_context.clear()

    def set_one(self, value, *device):
        with self._lock:
            self._of_context[device] = self._next(value)

    def of(self, device):
        with self._lock:
            return self._of_context.get(device, self._of_all)

    @property
    def unknown(self):
        """Whether nothing was noted yet."""
        return self._generation == 0

    def _next(self, value):
        self._generation += 1
        return _Seed(self._generation, value)


_seeds = _Seeds()
_thread = threading.local()
_seed_device = None  # sets a device's seed in the calling thread, unwatched


def watch_seeds():
    """Note every seed from now on."""
    global _seed_device

    def all_devices(value):
        if not is_device_thread():
            _seeds.set_all(value)

    def one_device(value, *device):
        if not is_device_thread():
            _seeds.set_one(value, *device)

    _seed_device = mxnet_private.watch_seeds(all_devices, one_device)


def begin():
    """Draw a seed from the caller's generator if no seed was set after import."""
    if _seeds.unknown:
        number = mx.nd.random.randint(0, 2**31 - 1, shape=(1,), dtype="int32").asscalar()
        _seeds.set_all(int(number))


def is_device_thread():
    """Whether the calling thread is a device's."""
    return getattr(_thread, "is_device", False)


def follow(context):
    """Seed this device thread if a seed was set since the last call."""
    _thread.is_device = True
    device = context.device_typeid, context.device_id
    seed = _seeds.of(device)
    if getattr(_thread, "generation", None) != seed.generation:
        # Knuth's multiplicative hash spreads neighbouring devices over the seeds.
        mixed = (seed.value + 2654435761 * (device[0] * 4096 + device[1] + 1)) % 2**31
        _seed_device(mixed, *device)
        _thread.generation = seed.generation
