"""The layer for networks that are written as symbols: a function, as ``mx.sym.BatchNorm`` is."""

from __future__ import annotations

from typing import Any

from mxnet import symbol
from mxnet.attribute import AttrScope
from mxnet.name import NameManager

from . import mxnet_private
from .keys import KEYS, check_key
from .operators import local_batch_norm, synchronized_batch_norm
from .sync_batch_norm import checked_num_devices

__all__ = ["SyncBatchNorm"]


def SyncBatchNorm(  # noqa: N802: the name of MXNet's
    data: Any = None,
    gamma: Any = None,
    beta: Any = None,
    moving_mean: Any = None,
    moving_var: Any = None,
    eps: float = 1e-3,
    momentum: float = 0.9,
    fix_gamma: bool = True,
    use_global_stats: bool = False,
    output_mean_var: bool = False,
    ndev: int | None = None,
    key: str | None = None,
    name: str | None = None,
    attr: dict[str, str] | None = None,
    axis: int = 1,
    num_devices: int | None = None,
) -> Any:
    """Synchronized batch normalization of a symbol.

    A drop-in replacement for :func:`mxnet.symbol.contrib.SyncBatchNorm`: the same arguments in the
    same order with the same defaults (which differ from those of the Gluon layer), and the same
    names of arguments, auxiliary states and outputs, so checkpoints load in both directions.  See
    :class:`gluon_syncbn.SyncBatchNorm` for what it computes.

    Parameters
    ----------
    data : Symbol
        Of shape ``(N, C, *)`` with ``axis=1``: 2 or more dimensions; float16, float32 or float64.
    gamma, beta, moving_mean, moving_var : Symbol, optional
        Of shape ``(C,)``; by default variables ``NAME_gamma`` and so on.
    eps : float, default 1e-3
        Added to the variance.
    momentum : float, default 0.9
        ``moving = momentum * moving + (1 - momentum) * batch``.
    fix_gamma : bool, default True
        Take gamma as 1.
    use_global_stats : bool, default False
        Normalize by the moving statistics in training as well.
    output_mean_var : bool, default False
        Must be False: there are no such outputs.
    ndev, num_devices : int or None, default None
        Two names for the number of devices that take part.  For :class:`mxnet.mod.Module`, the
        number of its contexts.  None: determined by :class:`ModelDataParallel` for a SymbolBlock;
        without one, the number of visible GPUs, or 1.  (MXNet's default is 1.)
    key : str, optional
        The key of the layer's all-reduce; by default one that no other layer has.
    name : str, optional
        Name of the layer; by default ``syncbatchnorm0`` and so on.
    attr : dict of str to str, optional
        Attributes of its nodes.
    axis : int, default 1
        The channel axis; negative values count from the end.

    Returns
    -------
    Symbol
        Of the shape and dtype of ``data``.

    Raises
    ------
    TypeError
        If ``data`` is not a Symbol, or ``key`` not a string.
    ValueError
        If the number of devices is neither None nor a positive integer, or is given twice with
        different values; if ``key`` is empty or contains a NUL character, or ``output_mean_var`` is
        set.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn.symbol import SyncBatchNorm
    >>> SyncBatchNorm(mx.sym.var("data"), ndev=2, name="bn").list_arguments()
    ['data', 'bn_gamma', 'bn_beta']
    """
    if data is not None and not isinstance(data, symbol.Symbol):
        raise TypeError(
            f"data must be a Symbol, but is a {type(data).__name__}; "
            "for arrays use the layer, gluon_syncbn.SyncBatchNorm"
        )
    if output_mean_var:
        raise ValueError(
            "output_mean_var: the mean and variance of the batch are no outputs of this layer; "
            "leave it out, or use mx.sym.BatchNorm where they are needed"
        )
    if key is not None and not isinstance(key, str):
        raise TypeError(f"key must be a string, but is a {type(key).__name__}")
    if key == "":
        raise ValueError("key must not be empty; leave it out for one that no other layer has")
    if key is not None:
        check_key(key)
    num_devices = _one_number(ndev, num_devices)

    name = mxnet_private.operator_name(name, "syncbatchnorm")
    # MXNet's own operator makes the variables: their names, marks and attributes are right then.
    with NameManager(), AttrScope(**(attr or {})):
        plain = symbol.BatchNorm(data, gamma, beta, moving_mean, moving_var, name=name)
        data, *states = plain.get_children()
        parameters = dict(zip(("gamma", "beta", "moving_mean", "moving_var"), states))
        options = {"axis": axis, "eps": eps, "momentum": momentum, "fix_gamma": fix_gamma}
        if use_global_stats or num_devices == 1:
            return local_batch_norm(symbol, data, parameters, options, use_global_stats, name)
        key = KEYS.of_layer(name) if key is None else key
        names = f"{name}_moments", f"{name}_sum", name
        call = KEYS.next_call(key)
        return synchronized_batch_norm(
            symbol, data, parameters, options, key, num_devices, call, names
        )


def _one_number(ndev, num_devices):
    numbers = {checked_num_devices(n) for n in (ndev, num_devices) if n is not None}
    if len(numbers) > 1:
        raise ValueError(f"ndev={ndev} and num_devices={num_devices} differ; give one of them")
    return numbers.pop() if numbers else None
