"""The layer: batch normalization over the whole batch, wherever its parts lie."""

import operator
import threading
import weakref
from collections import Counter

from mxnet import autograd
from mxnet.gluon import nn
from mxnet.ndarray import NDArray

from .traced_calls import next_call

# No two layers of a process ever meet under one key, not even one after the other.
_keys = weakref.WeakKeyDictionary()  # layer -> its key
_layers_named = Counter()
_lock = threading.Lock()


def checked_num_devices(num_devices):
    """None or a positive integer; raises ValueError for all else."""
    if num_devices is None:
        return None
    try:
        number = 0 if isinstance(num_devices, bool) else operator.index(num_devices)
    except TypeError:
        number = 0
    if number <= 0:
        raise ValueError(
            "num_devices must be a positive integer, or None for what ModelDataParallel says, but "
            f"is {num_devices!r}"
        )
    return number


class SyncBatchNorm(nn.BatchNorm):
    """Batch normalization with statistics over all devices.

    Ordinary batch normalization sees one device's share of the batch; this one normalizes over the
    whole batch [1]_, [2]_.  It takes the place of :class:`mxnet.gluon.nn.BatchNorm`: parameter
    names are the same, so checkpoints go both ways.  Uneven shares are exact, since every element
    counts the same.  Outside of training it uses its moving statistics and waits for nobody.

    A share without elements (under :func:`mxnet.util.np_shape`) adds nothing; where no device has
    any, the moving statistics stay.  One value per channel over all devices is taken in training,
    as nn.BatchNorm takes it: its variance is 0, so the result is ``beta`` and the gradient 0.
    (PyTorch raises.  But a program with nn.BatchNorm must not break, and how many values all
    devices have is known only after the call has returned.)

    Parameters
    ----------
    in_channels : int, default 0
        Number of channels.  0: taken from the first input.
    num_devices : int or None, default None
        How many devices take part.  None: what :class:`ModelDataParallel` says; outside of one,
        the number of visible GPUs, or 1.  (A network that has been called through a
        ModelDataParallel keeps to what that said.)
    momentum : float, default 0.9
        How much the moving statistics keep: ``moving = moving * momentum + batch * (1 -
        momentum)``.  The moving variance is the biased one, as in MXNet.
    epsilon : float, default 1e-5
        Added to the variance.
    center : bool, default True
        Learn ``beta``.
    scale : bool, default True
        Learn ``gamma``; otherwise it is taken as 1.
    use_global_stats : bool, default False
        Normalize by the moving statistics in training, too.
    beta_initializer, gamma_initializer : str or Initializer, default 'zeros' and 'ones'
    running_mean_initializer, running_variance_initializer : str or Initializer, \
default 'zeros' and 'ones'
    axis : int, default 1
        The channel axis; negative from the end, so -1 is channels last.

    Inputs
    ------
    data : NDArray or Symbol
        float16, float32 or float64, of 2 or more dimensions.

    Outputs
    -------
    out : NDArray or Symbol
        As ``data``.

    Raises
    ------
    ValueError
        If ``num_devices`` is neither None nor a positive integer.
    mxnet.MXNetError
        From the call for integer data, an axis out of range or channels that do not match; when
        the output is read, if another device did not come within the deadline (see
        :func:`gluon_syncbn.set_timeout`).

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", ICML 2015, https://arxiv.org/abs/1502.03167
    .. [2] Zhang et al., "Context Encoding for Semantic Segmentation", CVPR 2018,
       https://arxiv.org/abs/1803.08904

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import ModelDataParallel, SyncBatchNorm
    >>> ctx = [mx.cpu(0), mx.cpu(1)]
    >>> layer = SyncBatchNorm()
    >>> layer.initialize(ctx=ctx)
    >>> net = ModelDataParallel(layer, ctx)
    >>> with mx.autograd.record():
    ...     out = net([mx.nd.zeros((2, 3), ctx[0]), mx.nd.ones((2, 3), ctx[1])])
    >>> [o[0, 0].asscalar().round(2) for o in out]
    [-1.0, 1.0]
    """

    def __init__(
        self,
        in_channels=0,
        num_devices=None,
        momentum=0.9,
        epsilon=1e-5,
        center=True,
        scale=True,
        use_global_stats=False,
        beta_initializer="zeros",
        gamma_initializer="ones",
        running_mean_initializer="zeros",
        running_variance_initializer="ones",
        axis=1,
        **kwargs,
    ):
        num_devices = checked_num_devices(num_devices)
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            use_global_stats=use_global_stats,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            running_mean_initializer=running_mean_initializer,
            running_variance_initializer=running_variance_initializer,
            in_channels=in_channels,
            **kwargs,
        )
        self._kwargs["num_devices"] = num_devices  # shown by repr()

    def _alias(self):
        # Gluon names parameters after this; checkpoints by full names go both ways, too.
        return "batchnorm"

    @property
    def num_devices(self):
        """The number of devices that the layer was given, or None."""
        return self._kwargs["num_devices"]

    @property
    def key(self):
        """The name under which the devices meet: the layer's prefix, made unique."""
        with _lock:
            if self not in _keys:
                name = self.prefix or self._alias()
                _layers_named[name] += 1
                count = _layers_named[name]
                _keys[self] = name if count == 1 else f"{name}#{count}"
            return _keys[self]

    def hybrid_forward(self, F, x, gamma, beta, running_mean, running_var):
        options = {k: self._kwargs[k] for k in ("axis", "eps", "momentum", "fix_gamma")}
        own = self._kwargs["use_global_stats"]
        # A graph learns only when it runs whether it is in training; a call of ours knows now.
        if own or self.num_devices == 1 or isinstance(x, NDArray) and not autograd.is_training():
            return F._internal._syncbn_batch_norm(
                x,
                gamma,
                beta,
                running_mean,
                running_var,
                use_global_stats=own,
                name="fwd",
                **options,
            )
        handed, local, coefficients = F._internal._syncbn_moments(
            x, axis=options["axis"], name="moments"
        )
        call = 0
        if not isinstance(x, NDArray):
            # A graph may run a layer's several uses in any order, so each gets a number.
            call = next_call(self.key)
        total = F._internal._syncbn_sum(
            local,
            running_mean,
            key=self.key,
            num_devices=self.num_devices or 0,
            call=call,
            name="sum",
        )
        return F._internal._syncbn_normalize(
            handed,
            total,
            coefficients,
            gamma,
            beta,
            running_mean,
            running_var,
            name="fwd",
            **options,
        )


BatchNorm = SyncBatchNorm
