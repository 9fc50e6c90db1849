"""Splitting the arguments of a data-parallel call into what each device gets."""

from collections import namedtuple

from mxnet.context import Context
from mxnet.ndarray import NDArray

Share = namedtuple("Share", "context args kwargs")


def check_contexts(contexts, name="ctx_list"):
    """Return a list of distinct contexts, or raise an error that says what is wrong with it."""
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


def instances_in(value, kind):
    """Yield what is of a type, be it the value or in the lists, tuples and dicts within it."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from instances_in(entry, kind)
    elif isinstance(value, dict):
        yield from instances_in(list(value.values()), kind)


def arrays_in(value):
    """Yield the NDArrays in a value and in the lists, tuples and dicts within it."""
    return instances_in(value, NDArray)


def _is_per_device(value):
    return isinstance(value, (list, tuple)) and all(
        any(True for _ in arrays_in(entry)) for entry in value
    )


def split(contexts, args, kwargs):
    """Give each device its share of a call's arguments.

    A list or tuple in which every entry is or holds an NDArray has one entry per device; anything
    else goes to every device as it is.

    Parameters
    ----------
    contexts : list of Context
        The devices there are.
    args : tuple
        Positional arguments; the first must be a list with one entry per device.
    kwargs : dict
        Keyword arguments.

    Returns
    -------
    list of Share
        In the order of the entries.

    Raises
    ------
    TypeError
        If the first argument is no list of NDArrays.
    ValueError
        If a list is empty, or its entries do not lie on contexts of ours, each once.
    """
    if not args or not isinstance(args[0], (list, tuple)):
        raise TypeError(
            "the first argument must be a list with one NDArray per device, but is "
            f"{type(args[0]).__name__ if args else 'missing'}; "
            "mxnet.gluon.utils.split_and_load(batch, ctx_list, even_split=False) makes one"
        )
    if not args[0]:
        raise ValueError("the list of inputs is empty; give the input of one device at least")
    if not _is_per_device(args[0]):
        raise TypeError(
            "every entry of the first argument must be an NDArray, or a list or tuple of them; "
            f"got {[type(entry).__name__ for entry in args[0]]}"
        )
    count = len(args[0])
    named = [(f"argument {i + 1}", value) for i, value in enumerate(args)]
    named += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    devices = [None] * count
    for name, value in named:
        if not _is_per_device(value) or not value:
            continue
        if len(value) != count:
            raise ValueError(
                f"{name} has {len(value)} entries, but the first argument has {count}; "
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
    check_contexts(devices, "the list of inputs")

    def entry(value, i):
        return value[i] if _is_per_device(value) and value else value

    return [
        Share(
            device,
            tuple(entry(value, i) for value in args),
            {name: entry(value, i) for name, value in kwargs.items()},
        )
        for i, device in enumerate(devices)
    ]
