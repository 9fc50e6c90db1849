"""Random numbers in device threads: different on every device, reproducible by mx.random.seed.

MXNet keeps its random state per thread, and a new thread's starts from the same seed as any
other's: left alone, every device would draw the same dropout mask, and ``mx.random.seed`` in the
main thread would change none of them.  The state cannot be read, so we note what it is set to, at
the C functions that every Python way of seeding calls, and each device thread sets its own from
that and its device.
"""

import threading

import mxnet as mx
from mxnet.base import _LIB, check_call

_lock = threading.Lock()
_thread = threading.local()
_default = (0, 0)  # (generation, seed)
_of_context = {}  # (device_typeid, device_id) -> (generation, seed), from seed(n, ctx=...)
_generations = 0


def _note_seeds():
    seed_all, seed_context = _LIB.MXRandomSeed, _LIB.MXRandomSeedContext

    def number(value):
        return int(getattr(value, "value", value))

    def note_all(seed):
        global _default, _generations
        if not is_device_thread():
            with _lock:
                _generations += 1
                _default = (_generations, number(seed))
                _of_context.clear()
        return seed_all(seed)

    def note_context(seed, device_type, device_id):
        global _generations
        if not is_device_thread():
            with _lock:
                _generations += 1
                _of_context[number(device_type), number(device_id)] = (
                    _generations,
                    number(seed),
                )
        return seed_context(seed, device_type, device_id)

    _LIB.MXRandomSeed, _LIB.MXRandomSeedContext = note_all, note_context
    return seed_context


_seed_context = _note_seeds()


def begin():
    """Note where the calling thread stands, if nobody has seeded since this package came."""
    global _default, _generations
    if not _generations:
        number = mx.nd.random.randint(0, 2**31 - 1, shape=(1,), dtype="int32").asscalar()
        _generations, _default = 1, (1, int(number))


def is_device_thread():
    """Whether the calling thread is a device's."""
    return getattr(_thread, "is_device", False)


def follow(context):
    """Set this device thread's random state, if it has been seeded anew since the last call."""
    _thread.is_device = True
    device = context.device_typeid, context.device_id
    with _lock:
        generation, seed = _of_context.get(device, _default)
    if getattr(_thread, "generation", None) != generation:
        # Knuth's multiplicative hash spreads neighbouring devices over the seeds.
        mixed = (seed + 2654435761 * (device[0] * 4096 + device[1] + 1)) % 2**31
        check_call(_seed_context(mixed, *device))
        _thread.generation = generation
