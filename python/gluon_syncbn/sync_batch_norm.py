"""The layer: batch normalization over the whole batch, wherever its parts lie."""

import operator
import threading
import weakref
from collections import Counter

from mxnet import autograd
from mxnet.gluon import nn
from mxnet.ndarray import NDArray

from .chain import alone, together
from .numpy_arrays import either_kind
from .passes import Exchange, begin
from .traced_calls import next_call

# No two layers of a process ever meet under one key, not even one after the other.
_keys = weakref.WeakKeyDictionary()  # layer -> its key
_layers_named = Counter()
_lock = threading.RLock()


def unique_key(name):
    """A key that no layer of this process has had, by a layer's name."""
    with _lock:
        _layers_named[name] += 1
        count = _layers_named[name]
        return name if count == 1 else f"{name}#{count}"


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
    whole batch [1]_, [2]_: ``out = gamma * (data - mean) / sqrt(var + epsilon) + beta``, with the
    mean and the biased variance of each channel over all devices.  It takes the place of
    :class:`mxnet.gluon.nn.BatchNorm`: parameter names are the same, so checkpoints go both ways.
    Uneven shares are exact, since every element counts the same.  Outside of
    training it uses its moving statistics and waits for nobody.

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
        the number of visible GPUs, or 1, with a warning if the layer is on several devices.
    momentum : float or None, default 0.9
        How much the moving statistics keep: ``moving = moving * momentum + batch * (1 -
        momentum)``.  None: they are the average over all batches so far, as in PyTorch; the layer
        then has one more parameter, ``num_batches_tracked``, of shape (1,).  The moving variance is
        the biased one, as in MXNet.
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
    track_running_stats : bool, default True
        False, as in PyTorch: inference normalizes by the statistics of its own batch, too, and
        nothing is moved.  What inference sees of the batch is what is on the device: it waits for
        nobody.  ``running_mean`` and ``running_var`` are there all the same and stay what they are,
        so that checkpoints fit whatever the option, and those of ``nn.BatchNorm``, too.

    Inputs
    ------
    data : NDArray or Symbol, of mx.nd or of mx.np
        float16, float32 or float64, of 2 or more dimensions, ``(batch, channels, ...)`` with
        ``axis=1``.  Parameters are of shape ``(channels,)``, float32, and float64 beside float64
        data.

    Outputs
    -------
    out : NDArray or Symbol
        As ``data``: its kind, shape and dtype.

    Raises
    ------
    ValueError
        If ``num_devices`` is neither None nor a positive integer, or ``use_global_stats`` meets
        ``track_running_stats=False``.
    TypeError
        From the call, for data of mx.nd under ``mx.npx.set_np()``.
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

    Statistics that are the average over all batches:

    >>> layer = SyncBatchNorm(momentum=None)
    >>> layer.initialize()
    >>> for value in (1, 2, 6):
    ...     with mx.autograd.record():
    ...         out = layer(mx.nd.full((4, 1), value))
    >>> [p.data().asscalar() for p in layer.statistics]
    [3.0, 0.0, 3.0]
    """

    num_batches_tracked = None  # a Parameter where momentum=None has it

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
        track_running_stats=True,
        **kwargs,
    ):
        if num_devices is None:
            num_devices = kwargs.pop("nGPUs", None)  # the original preview's name for it
        num_devices = checked_num_devices(num_devices)
        if use_global_stats and not track_running_stats:
            raise ValueError(
                "use_global_stats=True normalizes by the moving statistics, which a layer with "
                "track_running_stats=False does not have; leave one of them out"
            )
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
        self._kwargs["track_running_stats"] = bool(track_running_stats)
        if momentum is None and track_running_stats:
            self.num_batches_tracked = self.params.get(
                "num_batches_tracked",
                grad_req="null",
                shape=(1,),
                init="zeros",
                allow_deferred_init=True,
                differentiable=False,
            )

    def _alias(self):
        # Gluon names parameters after this; checkpoints by full names go both ways, too.
        return "batchnorm"

    @property
    def num_devices(self):
        """The number of devices that the layer was given, or None."""
        return self._kwargs["num_devices"]

    @property
    def track_running_stats(self):
        """Whether training moves statistics, by which inference normalizes."""
        return self._kwargs["track_running_stats"]

    @property
    def statistics(self):
        """The parameters that training moves without a gradient, a tuple."""
        moved = self.running_mean, self.running_var, self.num_batches_tracked
        return tuple(parameter for parameter in moved if parameter is not None)

    @property
    def key(self):
        """The name under which the devices meet: the layer's prefix, made unique."""
        with _lock:
            if self not in _keys:
                _keys[self] = unique_key(self.prefix or self._alias())
            return _keys[self]

    @property
    def exchange(self):
        """What the layer takes part in; see ``passes.py``."""
        alone = self.num_devices == 1 or self._kwargs["use_global_stats"]
        return Exchange(self.name, self.key, self.num_devices, self.statistics, alone)

    @either_kind
    def hybrid_forward(
        self, F, x, gamma, beta, running_mean, running_var, num_batches_tracked=None
    ):
        options = {k: self._kwargs[k] for k in ("axis", "eps", "momentum", "fix_gamma")}
        if not self.track_running_stats:
            options["use_batch_stats"] = True
        if options["momentum"] is None:
            del options["momentum"]
            if num_batches_tracked is not None:
                options.update(cumulative_average=True, num_batches_tracked=num_batches_tracked)
        own = self._kwargs["use_global_stats"]
        # A graph learns only when it runs whether it is in training; a call of ours knows now.
        if own or self.num_devices == 1 or isinstance(x, NDArray) and not autograd.is_training():
            return alone(F, x, gamma, beta, running_mean, running_var, options, own)
        if isinstance(x, NDArray):
            begin([self.exchange], x.context)
        call = 0
        if not isinstance(x, NDArray):
            # A graph may run a layer's several uses in any order, so each gets a number.
            call = next_call(self.key)
        return together(
            F,
            x,
            gamma,
            beta,
            running_mean,
            running_var,
            options,
            self.key,
            self.num_devices,
            call,
        )


BatchNorm = SyncBatchNorm
