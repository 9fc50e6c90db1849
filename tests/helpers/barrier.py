"""The C++ class KeyBarrier, as tests drive it through ctypes."""

import ctypes
import threading

import numpy as np

from gluon_syncbn import library
from gluon_syncbn.key_barrier import KeyBarrier

LIBRARY = library.LIBRARY
SUM, MOMENTS = 0, 1


class Barrier:
    """An exchange, and what became of arrivals at it.

    ``timeout``: seconds, of an exchange of its own; None: the process's, which the operators use.
    """

    def __init__(self, timeout=None):
        self.handle = None if timeout is None else LIBRARY.BarrierCreate(timeout)
        self.control = KeyBarrier(self.handle)
        self._kept = []

    def close(self):
        LIBRARY.BarrierFree(self.handle)

    def arrive(
        self,
        participant,
        values,
        num_devices,
        key="k",
        a_pass=0,
        round_number=0,
        kind="cpu",
        merge=SUM,
        name=None,
    ):
        """Arrive and return a dict that is filled when the round ends."""
        values = np.ascontiguousarray(values, "float64")
        out = {"event": threading.Event()}

        def done(_, total, number, devices, error):
            out["total"] = np.array(total[: len(values)]) if total else None
            out["round"], out["devices"], out["error"] = number, devices, error.decode()
            out["event"].set()

        callback = library.DONE(done)
        self._kept.append(callback)
        status = LIBRARY.BarrierArrive(
            self.handle,
            key.encode(),
            a_pass,
            round_number,
            participant,
            kind.encode(),
            (name or f"device {participant}").encode(),
            num_devices,
            merge,
            values.ctypes.data_as(ctypes.POINTER(ctypes.c_double)),
            len(values),
            callback,
            None,
        )
        assert status == 0
        return out
