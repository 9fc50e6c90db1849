"""Whole batches among a call's arguments: split by rows into a shard for each device."""

from mxnet import autograd

from ..mxnet_private import is_recorded
from .nested import arrays_in, divide


def rows_of(named):
    """Count the rows of arrays that are to be split together over several devices.

    Parameters
    ----------
    named : list of (str, NDArray)
        At least one array, each with its name for errors.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If one has no rows, or not as many as the others, or is part of a graph being recorded.
    """
    first, rows = named[0][0], None
    for name, array in named:
        if not array.shape:
            raise ValueError(
                f"{name} has no rows that could be split over the devices; give a list with one "
                "array per device, or a number"
            )
        rows = array.shape[0] if rows is None else rows
        if array.shape[0] != rows:
            raise ValueError(
                f"{name} has {array.shape[0]} rows, but {first} has {rows}; what is split over the "
                "devices must have the same number of rows; give lists with one array per device "
                "for all else"
            )
        if autograd.is_recording() and is_recorded(array):
            # The devices' backward passes would run through its graph at the same time and crash.
            raise ValueError(
                f"{name} has a gradient attached, or comes from what has one, and cannot be split "
                "over devices that run backward side by side; run what comes before it on every "
                "device as well (split_and_load, then attach_grad to the parts), or detach() it"
            )
    return rows


def cut(contexts, args, kwargs):
    """Split the whole batches among a call's arguments, as GluonCV's wrappers do.

    A whole batch is an array, or a list, tuple or dict with arrays, on one device.  An argument
    with arrays on several devices has an entry for each already, and is left alone.

    Parameters
    ----------
    contexts : list of Context
        The devices.  If there are fewer rows than devices, the last devices get none.
    args : tuple
    kwargs : dict

    Returns
    -------
    args, kwargs : tuple, dict
        With a list of one entry per device in place of each batch that was split.

    Raises
    ------
    ValueError
        As :func:`rows_of`, if there are several devices.
    """
    named = named_arguments(args, kwargs)
    arrays = {name: list(arrays_in(value)) for name, value in named}
    whole = [name for name, _ in named if len({a.context for a in arrays[name]}) == 1]
    if len(contexts) > 1 and whole:
        rows = rows_of([(name, array) for name in whole for array in arrays[name]])
        contexts = contexts[: max(rows, 1)]
    values = [divide(value, contexts) if name in whole else value for name, value in named]
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :]))


def named_arguments(args, kwargs):
    """List a call's arguments with their names for errors."""
    named = [(f"argument {i + 1}", value) for i, value in enumerate(args)]
    return named + [(f"argument {name!r}", value) for name, value in kwargs.items()]
