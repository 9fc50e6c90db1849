"""Arrays in a network's inputs and outputs: alone, or in lists, tuples and dicts."""

from mxnet.gluon.utils import split_and_load
from mxnet.ndarray import NDArray

from ..networks import instances_in


def arrays_in(value):
    """Yield the NDArrays in a value and in the lists, tuples and dicts within it."""
    return instances_in(value, NDArray)


def divide(value, devices):
    """Split arrays by rows, one part for each device, unevenly if need be.

    Parameters
    ----------
    value : object
        An NDArray, or lists, tuples and dicts with NDArrays; anything else in them goes to all.
    devices : list of Context

    Returns
    -------
    list
        A value of the same form for each device.
    """
    if isinstance(value, NDArray):
        return split_and_load(value, devices, even_split=False)
    if isinstance(value, (list, tuple)):
        parts = [divide(entry, devices) for entry in value]
        kind = list if isinstance(value, list) else tuple
        return [kind(part[i] for part in parts) for i in range(len(devices))]
    if isinstance(value, dict):
        parts = {key: divide(entry, devices) for key, entry in value.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(len(devices))]
    return [value] * len(devices)
