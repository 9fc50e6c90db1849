"""Rounds of the process's exchange whose devices come in a known order, also on a busy machine."""

import ctypes
import time

from gluon_syncbn.library import DONE, LIBRARY, check

_ignore = DONE(lambda *_: None)


def come(key, devices, delay=0.0):
    """Let CPU contexts of these numbers come to a round, one after the other."""
    for i, device in enumerate(devices):
        if i:
            time.sleep(delay)
        value = (ctypes.c_double * 1)(1)
        names = b"cpu", f"cpu({device})".encode()
        forward = (0, 0)  # pass and round
        arrival = (key.encode(), *forward, (1 << 32) + device, *names, len(devices), 0, value, 1)
        check(LIBRARY.BarrierArrive(None, *arrival, _ignore, None))
