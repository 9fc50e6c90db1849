"""Our layer and our operators in the place of MXNet's, for all code of this process.

Programs call MXNet's batch normalization by its names: ``nn.BatchNorm``, ``mx.sym.BatchNorm`` and
so on.  ``install`` puts a function or class with MXNet's signature and our operators under each of
them, wherever MXNet's modules have it.  It does so in one of two ways:

- ``"all-reduce"``: the operators of a synchronized layer, with an all-reduce of one device;
- ``"one operator"``: the operator that a layer has with ``num_devices=1``.

What MXNet's operators can do and ours cannot is composed here (``output_mean_var``) or refused.
"""

import sys
import threading

import mxnet as mx
from mxnet.name import NameManager

from gluon_syncbn import SyncBatchNorm, symbol
from gluon_syncbn.mxnet_private import operator_name
from gluon_syncbn.numpy_arrays import like
from gluon_syncbn.operators import local_batch_norm, synchronized_batch_norm

_way = None
_inside = threading.local()  # its "now" is set while ours runs, which uses MXNet's name as well


def install(way):
    """Put ours in the place of MXNet's.

    Parameters
    ----------
    way : {'all-reduce', 'one operator'}
    """
    global _way
    _way = way
    _put(mx.gluon.nn.BatchNorm, BatchNorm)
    _put(mx.gluon.contrib.nn.SyncBatchNorm, ContribSyncBatchNorm)
    for F in (mx.nd, mx.sym):
        normalize = _of_array if F is mx.nd else _of_symbol
        _put(F.BatchNorm, _function(F, F.BatchNorm, normalize, "batchnorm"))
        _put(F.BatchNorm_v1, _function(F, F.BatchNorm_v1, normalize, "batchnorm_v1"))
        synchronized = F.contrib.SyncBatchNorm
        _put(synchronized, _function(F, synchronized, normalize, "syncbatchnorm", variance=True))
    # mx.npx, and the F.npx of a HybridBlock, which is another module.
    for module in (mx.npx, mx.nd.numpy_extension):
        _put(module.batch_norm, _function(mx.nd, module.batch_norm, _of_array, "batch_norm"))
    theirs = mx.sym.numpy_extension.batch_norm
    _put(theirs, _function(mx.sym, theirs, _of_symbol, "batch_norm"))


def _put(theirs, ours):
    """Let every name that MXNet's modules have for ``theirs`` lead to ``ours``."""
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        if name.split(".")[0] != "mxnet":
            continue
        if isinstance(theirs, type) and name == theirs.__module__:
            continue  # a class's own module needs it, for super()
        for attribute, value in list(vars(module).items()):
            if value is theirs:
                setattr(module, attribute, ours)


class BatchNorm(SyncBatchNorm):
    """Our layer with the signature of ``nn.BatchNorm``."""

    def __init__(
        self,
        axis=1,
        momentum=0.9,
        epsilon=1e-5,
        center=True,
        scale=True,
        use_global_stats=False,
        beta_initializer="zeros",
        gamma_initializer="ones",
        running_mean_initializer="zeros",
        running_variance_initializer="ones",
        in_channels=0,
        **kwargs,
    ):
        super().__init__(
            in_channels,
            _number(None),
            momentum,
            epsilon,
            center,
            scale,
            use_global_stats,
            beta_initializer,
            gamma_initializer,
            running_mean_initializer,
            running_variance_initializer,
            axis,
            **kwargs,
        )


class ContribSyncBatchNorm(SyncBatchNorm):
    """Our layer under the name of MXNet's contrib layer, whose signature it has."""

    def __init__(self, in_channels=0, num_devices=None, *args, **kwargs):
        super().__init__(in_channels, _number(num_devices), *args, **kwargs)


def _number(num_devices):
    """Return the number of devices with which one device does, or does not, use the all-reduce."""
    if num_devices in (None, 1):
        return 1 if _way == "one operator" else None
    return num_devices


def _function(F, theirs, normalize, hint, variance=False):
    """Return a function with the signature of MXNet's that calls ``normalize``."""

    def replaced(
        data=None,
        gamma=None,
        beta=None,
        moving_mean=None,
        moving_var=None,
        eps=1e-3,
        momentum=0.9,
        fix_gamma=True,
        use_global_stats=False,
        output_mean_var=False,
        *further,
        axis=1,
        name=None,
        attr=None,
        cudnn_off=False,
        ndev=1,
        key=None,
        **unknown,
    ):
        if getattr(_inside, "now", False):
            # This is our own symbol.SyncBatchNorm, which lets MXNet's operator make its variables.
            return theirs(data, gamma, beta, moving_mean, moving_var, name=name)
        if further or unknown:
            raise TypeError(f"{theirs.__name__}: no replacement takes {further} {unknown}")
        inputs = [
            value if value is None else value.as_nd_ndarray()
            for value in (data, gamma, beta, moving_mean, moving_var)
        ]
        options = dict(axis=axis, eps=eps, momentum=momentum, fix_gamma=fix_gamma)
        _inside.now = True
        try:
            y = normalize(inputs, options, use_global_stats, ndev, operator_name(name, hint), attr)
        finally:
            _inside.now = False
        if data is None:
            return y
        if not output_mean_var:
            return like(y, data)
        outputs = [like(value, data) for value in (y, *_moments(F, inputs[0], axis, eps, variance))]
        return outputs if F is mx.nd else mx.sym.Group(outputs)

    replaced.__name__ = theirs.__name__
    return replaced


def _of_array(inputs, options, use_global_stats, num_devices, name, attr):
    x, *states = inputs
    parameters = dict(zip(("gamma", "beta", "moving_mean", "moving_var"), states))
    if use_global_stats or _way == "one operator":
        return local_batch_norm(mx.nd, x, parameters, options, use_global_stats)
    return synchronized_batch_norm(mx.nd, x, parameters, options, "upstream", num_devices, 0)


def _of_symbol(inputs, options, use_global_stats, num_devices, name, attr):
    with NameManager():  # the name has its prefix already
        return symbol.SyncBatchNorm(
            *inputs,
            use_global_stats=use_global_stats,
            num_devices=_number(num_devices),
            name=name,
            attr=attr,
            **options,
        )


def _moments(F, data, axis, eps, variance):
    """Compose the further outputs of MXNet's operator, which ours does not have."""
    mean = F.mean(data, axis=axis, exclude=True)
    centered = F.broadcast_sub(data, F.mean(data, axis=axis, exclude=True, keepdims=True))
    var = F.mean(F.square(centered), axis=axis, exclude=True)
    return mean, var if variance else F.rsqrt(var + eps)
