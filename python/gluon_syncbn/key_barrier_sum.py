"""The all-reduce by itself, for programs: KeyBarrierSum."""

from __future__ import annotations

from typing import Any

from mxnet import ndarray, symbol

from .numpy_arrays import like


def KeyBarrierSum(  # noqa: N802: the operator's name
    data: Any, key: str, num_devices: int, call: int | None = None, name: str | None = None
) -> Any:
    """All-reduce: the sum of an array over devices, asynchronously.

    Every device calls it with its own array and the same key; each gets

    .. math:: y = \\sum_{d=1}^{D} x_d

    and, since y depends on every x, the gradient of each x is the sum of the gradients of all y.
    It returns at once; what reads the result waits for the other devices.  The operator is
    ``mx.nd.contrib.KeyBarrierSum`` for arrays and ``mx.sym.contrib.KeyBarrierSum`` for symbols,
    also as ``F.contrib.KeyBarrierSum`` in a ``hybrid_forward``; this function picks the one that
    fits.

    Parameters
    ----------
    data : NDArray or Symbol, of mx.nd or of mx.np
        float32 or float64, of any shape, the same on every device.  Sums are taken in float64, in
        the order of the devices, so all of them get the same bits on every run.
    key : str
        Names the all-reduce: calls with one key belong together.
    num_devices : int
        Number of devices D that take part.  All of them must come, also where
        :class:`ModelDataParallel` was given fewer inputs.
    call : int, optional
        Tells apart the uses of one key in a graph, which may run in any order.  Where a Block is
        traced, uses are numbered by themselves; in a symbol of your own, number them 0, 1, ...
        Arrays have no use for it: their calls belong together in the order of the program.
    name : str, optional
        Name of the symbol's node.

    Returns
    -------
    NDArray or Symbol
        Of the kind, shape and dtype of ``data``.

    Raises
    ------
    TypeError
        If ``data`` is neither an NDArray nor a Symbol, or ``key`` is not a string.
    ValueError
        If ``key`` contains a NUL character.
    mxnet.MXNetError
        From the call, for another dtype, an empty key or a number of devices below 1; when the
        result is read, if devices bring different shapes or numbers of devices, or one has not
        arrived by the deadline (:func:`set_timeout`).

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import KeyBarrierSum
    >>> parts = [mx.nd.ones(2, ctx=mx.cpu(i)) * (i + 1) for i in range(2)]
    >>> totals = [KeyBarrierSum(part, key="total", num_devices=2) for part in parts]
    >>> [total.asnumpy().tolist() for total in totals]
    [[3.0, 3.0], [3.0, 3.0]]
    """
    if not isinstance(data, (ndarray.NDArray, symbol.Symbol)):
        raise TypeError(f"data must be an NDArray or a Symbol, but is a {type(data).__name__}")
    if not isinstance(key, str):
        raise TypeError(f"key must be a string, but is a {type(key).__name__}")
    F = symbol if isinstance(data, symbol.Symbol) else ndarray
    options: dict = {"key": key, "num_devices": num_devices}
    if call is not None:
        options["call"] = call
    if name is not None:
        options["name"] = name
    return like(F.contrib.KeyBarrierSum(data.as_nd_ndarray(), **options), data)
