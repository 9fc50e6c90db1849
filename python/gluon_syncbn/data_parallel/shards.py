"""Splitting the arguments of a data-parallel call into what each device gets."""

from collections import namedtuple

from mxnet.context import Context
from mxnet.ndarray import NDArray

from .nested import arrays_in, divide
from .whole_batches import named_arguments, rows_of

Shard = namedtuple("Shard", "context args kwargs")  # what one device gets of a call


def check_contexts(contexts, name="ctx_list"):
    """Return a list of distinct contexts; raise an error for anything else."""
    if isinstance(contexts, Context):
        contexts = [contexts]
    contexts = list(contexts)
    if not contexts:
        raise ValueError(f"{name} is empty; give one context per device, such as [mx.gpu(0)]")
    for context in contexts:
        if not isinstance(context, Context):
            raise TypeError(f"{name} holds {context!r}, which is no context; use mx.cpu or mx.gpu")
    repeated = sorted({str(c) for c in contexts if contexts.count(c) > 1})
    if repeated:
        raise ValueError(f"{name} repeats {', '.join(repeated)}; a device takes part once")
    if len({c.device_type == "gpu" for c in contexts}) > 1:
        raise ValueError(
            f"{name} mixes CPUs and GPUs, {', '.join(map(str, contexts))}; take one kind of device"
        )
    return contexts


def _holds_array(value):
    return any(True for _ in arrays_in(value))


def _is_per_device(name, value):
    """Whether a value is a list or tuple with an entry for each device; or raise TypeError."""
    if not isinstance(value, (list, tuple)):
        return False
    without = [i for i, entry in enumerate(value) if not _holds_array(entry)]
    if len(without) == len(value):
        return False
    if without:
        (i, *_) = without
        raise TypeError(
            f"every entry of {name} must be an NDArray, or a list or tuple with one, since it is a "
            f"list with one entry per device; but entry {i} is {value[i]!r}. A device without "
            "input is left out of every list"
        )
    return True


def _check_devices(contexts, lists):
    """The devices of lists that have an entry for each, in their order; or raise ValueError."""
    first, entries = lists[0]
    devices = [None] * len(entries)
    for name, value in lists:
        if len(value) != len(devices):
            raise ValueError(
                f"{name} has {len(value)} entries, but {first} has {len(devices)}; "
                "every list needs one entry per device"
            )
        for i, entry in enumerate(value):
            for array in arrays_in(entry):
                devices[i] = devices[i] or array.context
                if array.context != devices[i]:
                    raise ValueError(
                        f"entry {i} of {name} lies on {array.context}, but what belongs to it "
                        f"lies on {devices[i]}; move it there with as_in_context"
                    )
    for device in devices:
        if device not in contexts:
            raise ValueError(
                f"an input lies on {device}, which is not in ctx_list "
                f"{[str(c) for c in contexts]}; move it with as_in_context"
            )
    return check_contexts(devices, "the list of inputs")


def split(contexts, args, kwargs):
    """Give each device its shard of a call's arguments.

    A list or tuple in which every entry is or holds an NDArray has one entry per device.  An
    NDArray by itself is a whole batch, which is split by rows over the devices of the lists.
    Anything else goes to every device as it is.

    Parameters
    ----------
    contexts : list of Context
        The devices.
    args : tuple
        Positional arguments.
    kwargs : dict
        Keyword arguments.  The first argument must be such a list.

    Returns
    -------
    list of Shard
        In the order of the entries.

    Raises
    ------
    TypeError
        If the first argument is not a list of NDArrays, or a list has them in some entries only.
    ValueError
        If a list is empty, consists of as many None as there are devices, or its entries are not
        on distinct devices of ``contexts``; or an NDArray cannot be split.
    """
    named = named_arguments(args, kwargs)
    first = named[0][1] if named else None
    if not isinstance(first, (list, tuple)):
        raise TypeError(
            "the first argument must be a list with one NDArray per device, but is "
            f"{type(first).__name__ if named else 'missing'}; "
            "mxnet.gluon.utils.split_and_load(batch, ctx_list, even_split=False) makes one, and "
            "DataParallelModel takes whole batches"
        )
    if not first:
        raise ValueError("the list of inputs is empty; give the input of one device at least")
    lists = [(name, value) for name, value in named if _is_per_device(name, value)]
    if not lists or lists[0][1] is not first:
        raise TypeError(
            "every entry of the first argument must be an NDArray, or a list or tuple of them; "
            f"got {[type(entry).__name__ for entry in first]}"
        )
    devices = _check_devices(contexts, lists)
    batches = [(name, value) for name, value in named if isinstance(value, NDArray)]
    if len(devices) > 1 and batches:
        rows = rows_of(batches)
        if rows < len(devices):
            raise ValueError(
                f"{batches[0][0]} has {rows} rows, too few for the {len(devices)} devices that "
                f"{lists[0][0]} has entries for"
            )
    entries = {name: divide(value, devices) for name, value in batches}
    entries.update(lists)
    for name, value in named:
        if name not in entries and isinstance(value, (list, tuple)):
            _check_not_ambiguous(name, value, len(devices))

    def shard(i):
        own = [entries[name][i] if name in entries else value for name, value in named]
        return Shard(devices[i], tuple(own[: len(args)]), dict(zip(kwargs, own[len(args) :])))

    return [shard(i) for i in range(len(devices))]


def _check_not_ambiguous(name, value, count):
    if len(value) == count and all(entry is None for entry in value):
        raise ValueError(
            f"{name} is {value!r}: give None by itself if every device is to get None (a list with "
            "one entry per device holds NDArrays); a list of None that the network itself asks for "
            "must come from the network"
        )
