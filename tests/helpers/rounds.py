"""Rounds of the process's exchange whose devices come in a known order, also on a busy machine."""

import time

from barrier import Barrier

_BARRIER = Barrier()


def come(key, devices, delay=0.0):
    """Let CPU contexts of these numbers come to a round, one after the other."""
    for i, device in enumerate(devices):
        if i:
            time.sleep(delay)
        _BARRIER.arrive((1 << 32) + device, [1], len(devices), key=key, name=f"cpu({device})")
