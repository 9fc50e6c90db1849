"""The layer: batch normalization over the whole batch, however it is split over devices.

All of it, on each of the devices; x is this device's shard, of shape (N, C, *), n = N * prod(*)::

    forward, in training
        mean, M2, n   = moments(x)                   # (C,), (C,), ()    M2 = sum((x - mean)**2)
                        # with weights w: n = sum(w), mean = sum(w * x) / n, and so on
        mean, M2, n   = all_reduce(mean, M2, n)      # merged [1]: the same bits on all devices
        invstd        = 1 / sqrt(M2 / n + epsilon)   # (C,)         of the biased variance
        z             = gamma * (x - mean) * invstd + beta               # (N, C, *)
        y             = activation(z + add)                              # both are optional
        moving_mean   = momentum * moving_mean + (1 - momentum) * mean   # (C,)
        moving_var    = momentum * moving_var + (1 - momentum) * M2 / n  # (C,)

    with batch renormalization [3]
        # (renorm_stddev at least sqrt(epsilon))
        r             = clip(1 / (invstd * renorm_stddev), rmin, rmax)   # (C,)   constants in
        d             = clip((mean - renorm_mean) / renorm_stddev, -dmax, dmax)   # backward
        z             = gamma * ((x - mean) * invstd * r + d) + beta
        renorm_mean   = renorm_momentum * renorm_mean + (1 - renorm_momentum) * mean
        renorm_stddev = renorm_momentum * renorm_stddev + (1 - renorm_momentum) / invstd

    backward [2]
        g             = dy * activation'(z + add)        # also the gradient of add
        s, t          = sum(g), sum(g * (x - mean))      # (C,), (C,)
        dbeta, dgamma = s, t * invstd                    # (C,), (C,)   of this shard alone
        s, t          = all_reduce(s, t)
        dx            = gamma * invstd * (g - s / n - (x - mean) * invstd**2 * t / n)
                        # with weights: w times what is subtracted from g

    inference
        z             = gamma * (x - moving_mean) / sqrt(moving_var + epsilon) + beta

``moments`` and the last line of backward are ``_syncbn_moments``, the all-reduces ``_syncbn_sum``,
the rest ``_syncbn_normalize``; a layer without all-reduce is one operator, ``_syncbn_batch_norm``.
Sums are in float64 whatever the dtype of x.

.. [1] Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
   Variances", 1979.
.. [2] Ioffe and Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167, section 3.
.. [3] Ioffe, "Batch Renormalization", https://arxiv.org/abs/1702.03275, algorithm 1.
"""

from __future__ import annotations

import operator
import threading
import weakref
from typing import Any

from mxnet import autograd
from mxnet.gluon import nn
from mxnet.initializer import Initializer
from mxnet.ndarray import NDArray

from .keys import KEYS
from .mxnet_private import settings
from .networks import mark_changed
from .numpy_arrays import either_kind
from .operators import local_batch_norm, synchronized_batch_norm, weighted_batch_norm
from .passes import Exchange, begin, calls_of_a_layer
from .processes import connection_of

_keys: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # layer -> its key
_lock = threading.Lock()

# The settings that are options of the operators.
_OPTIONS = (
    *("axis", "eps", "momentum", "fix_gamma", "activation", "slope"),
    *("renorm", "renorm_momentum", "renorm_rmin", "renorm_rmax", "renorm_dmax"),
)


def key_of(layer: Any, name: str) -> str:
    """Return the key of a layer's all-reduce: its name, made unique in this process."""
    with _lock:
        if layer not in _keys:
            _keys[layer] = KEYS.of_layer(name)
        return _keys[layer]


def checked_num_devices(num_devices: Any) -> int | None:
    """Return None or a positive integer; raise ValueError for anything else."""
    return _checked("num_devices", num_devices, "what ModelDataParallel says")


def checked_group_size(group_size: Any, num_devices: int | None = None) -> int | None:
    """Return None or a positive integer that divides ``num_devices``, or raise ValueError."""
    group_size = _checked("group_size", group_size, "all devices")
    if group_size is not None and num_devices is not None and num_devices % group_size:
        raise ValueError(
            f"num_devices={num_devices} is no multiple of group_size={group_size}; leave out "
            "num_devices, or take a multiple"
        )
    return group_size


def _checked(name, value, none):
    if value is None:
        return None
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number <= 0:
        raise ValueError(f"{name} must be a positive integer, or None for {none}, but is {value!r}")
    return number


ACTIVATIONS = "relu", "leaky_relu"


def checked_activation(activation: Any, slope: Any) -> dict:
    """Return the operators' options for an activation; {} for none.

    Raises
    ------
    ValueError
        If there is no such activation, or the slope is not a number from 0.
    """
    if activation in (None, "none"):  # PyTorch-Encoding's default is "none"
        return {}
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be None, {' or '.join(map(repr, ACTIVATIONS))}, but is "
            f"{activation!r}; put any other activation after the layer"
        )
    if activation == "relu":
        return {"activation": "relu"}
    return {"activation": "leaky_relu", "slope": _not_negative("slope", slope)}


def _not_negative(name, value):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name} must be a finite number, 0 or greater, but is {value!r}")
    return number


CLIPPING = "rmin", "rmax", "dmax"  # TensorFlow's keys


def checked_clipping(clipping: Any) -> dict:
    """Return the operators' options for ``renorm_clipping``; {} for None.

    Raises
    ------
    ValueError
        For other keys, or values that are negative, no numbers, or a ``rmin`` above ``rmax``.
    """
    if clipping is not None and not isinstance(clipping, dict):
        raise ValueError(f"renorm_clipping must be a dict or None, but is {clipping!r}")
    no_limit = None, float("inf")
    given = {key: value for key, value in (clipping or {}).items() if value not in no_limit}
    wrong = [key for key in given if key not in CLIPPING]
    if wrong:
        raise ValueError(
            f"renorm_clipping has {', '.join(map(repr, wrong))}; its keys are "
            f"{', '.join(map(repr, CLIPPING))}, and any may be missing"
        )
    given = {key: _not_negative(f"renorm_clipping: {key}", value) for key, value in given.items()}
    if given.get("rmin", 0) > given.get("rmax", float("inf")):
        raise ValueError(f"renorm_clipping: rmin must not be above rmax, but is {clipping!r}")
    return {f"renorm_{key}": value for key, value in given.items()}


class SyncBatchNorm(nn.BatchNorm):
    """Batch normalization with statistics over all devices.

    Computes [1]_, for each channel, over the whole batch of all devices [2]_,

    .. math:: y = \\frac{x - \\mathrm{E}[x]}{\\sqrt{\\mathrm{Var}[x] + \\epsilon}} \\gamma + \\beta

    with the biased variance.  It is a drop-in replacement for :class:`mxnet.gluon.nn.BatchNorm`
    with the same parameter names, so checkpoints load in both directions.  Every element counts the
    same, so shards of unequal size give exact results.  Inference uses the moving statistics and
    does not communicate.

    Parameters
    ----------
    in_channels : int, default 0
        Number of channels C.  0: inferred from the first input.
    num_devices : int or None, default None
        Number of devices that take part.  None: determined by :class:`ModelDataParallel`; without
        one, the number of visible GPUs, or 1, with a warning if the layer is on several devices.
    momentum : float or None, default 0.9
        ``moving = momentum * moving + (1 - momentum) * batch``.  None: moving statistics are the
        average over all batches so far, as in PyTorch, and the layer has one more parameter,
        ``num_batches_tracked``, of shape (1,).  The moving variance is the biased one, as in MXNet.
    epsilon : float, default 1e-5
        Added to the variance.
    center : bool, default True
        Learn ``beta``; otherwise it stays as initialized.
    scale : bool, default True
        Learn ``gamma``; otherwise it is 1.
    use_global_stats : bool, default False
        Normalize by the moving statistics in training as well.
    beta_initializer, gamma_initializer : str or Initializer, default 'zeros' and 'ones'
    running_mean_initializer, running_variance_initializer : str or Initializer, \
default 'zeros' and 'ones'
    axis : int, default 1
        The channel axis; negative values count from the end, so -1 is channels last.
    track_running_stats : bool, default True
        False, as in PyTorch: inference normalizes by the statistics of its own batch as well, those
        of the shard on each device, and training moves nothing.  ``running_mean`` and
        ``running_var`` exist all the same, so that checkpoints fit whatever the option.
    group_size : int or None, default None
        Synchronize over groups of so many devices: the first k of :class:`ModelDataParallel`'s
        ``ctx_list``, the next k, and so on, as PyTorch's ``process_group`` and Apex's groups do.
        The number of devices must be a multiple.  1: each device by itself.  None: all devices.
    activation : {None, 'relu', 'leaky_relu'}, default None
        Applied to the result by the same operators, forward and backward, which saves its passes
        over memory.  ``'none'`` is None, as in PyTorch-Encoding.
    slope : float, default 0.01
        Of ``'leaky_relu'``, for negative values; 0 or greater.
    renorm : bool, default False
        Batch renormalization [3]_, for small batches: training normalizes almost as inference does,
        by averages over the batches before.  The layer has two more parameters, ``renorm_mean`` and
        ``renorm_stddev``, of shape (C,).  Inference is as always.
    renorm_clipping : dict or None, default None
        With ``renorm``: limits of its correction, by TensorFlow's keys; r lies from ``rmin`` to
        ``rmax``, and d from ``-dmax`` to ``dmax``.  A missing key means no limit; with rmin and
        rmax of 1 and a dmax of 0 it is batch normalization, with which training should begin.  It
        can be set while the network trains; see Notes.
    renorm_momentum : float, default 0.99
        With ``renorm``: ``renorm_mean = renorm_momentum * renorm_mean + (1 - renorm_momentum) *
        mean``, and likewise with the standard deviation, ``sqrt(variance + epsilon)``.
    **kwargs
        ``prefix`` and ``params``, as for any Block; ``nGPUs``, an older name of ``num_devices``.

    Raises
    ------
    ValueError
        If ``num_devices`` or ``group_size`` is neither None nor a positive integer, or the first is
        no multiple of the second.  If there is no such ``activation`` or ``slope``.  If
        ``renorm_clipping`` or ``renorm_momentum`` is out of range.  If ``use_global_stats`` is
        combined with ``track_running_stats=False``, or ``renorm`` with either.

    See Also
    --------
    ModelDataParallel : runs a network with such layers on several devices.
    convert_sync_batchnorm : converts the layers of an existing network.

    Notes
    -----
    **Call.** ``layer(data, weights=None, add=None)`` returns an array of the kind, shape and dtype
    of ``data``:

    - *data*, NDArray or Symbol of ``mx.nd`` or ``mx.np``, of shape ``(N, C, *)`` with ``axis=1``: 2
      or more dimensions; float16, float32 or float64.
    - *weights*: how much each sample counts, of shape ``(N,)``, or each position, of the shape of
      ``data`` without its channels, or with one: ``(N, *)`` or ``(N, 1, *)``; of the dtype of the
      parameters.  For masked and padded batches: statistics are over what has a weight above 0, on
      all devices.  Everything is normalized, and every position's gradient counts, so padding must
      be finite, and its loss 0.  Weights have no gradient, and mean nothing where the moving
      statistics are used.
    - *add*, of the same kind, shape and dtype: a residual, which is added before the activation, as
      at the end of a ResNet's block.  It does not broadcast.
    - Parameters have shape ``(C,)`` and dtype float32, or float64 for float64 data.
    - *TypeError*: for ``mx.nd`` data under ``mx.npx.set_np()``.
    - *mxnet.MXNetError*: from the call, for integer data, an ``axis`` out of range or a number of
      channels that does not fit; when the output is read, if another device has not arrived by the
      deadline (:func:`set_timeout`).
    - *RuntimeError*: in training outside of :class:`ModelDataParallel`, with a ``group_size`` of 2
      or more.

    **Edge cases.** A shard without elements (under :func:`mxnet.util.np_shape`) contributes
    nothing; if no device has any, the moving statistics do not change.  One value per channel over
    all devices is accepted in training, as by ``nn.BatchNorm``: its variance is 0, so the output is
    ``beta`` and the gradient 0.  (PyTorch raises an error; but a program that works with
    ``nn.BatchNorm`` must not break, and the number of values on all devices is known only after the
    call has returned.)

    **Groups.** With ``group_size`` the moving statistics are those of a device's group, so they
    differ between groups: in inference, what a device computes depends on its group, and a
    checkpoint, in which Gluon writes the average over the devices, has the average of the groups'
    means and of their variances.  A group that has no input in a step keeps its moving statistics.
    (A Trainer's first step copies those of the first device to all.)  Gradients of gamma and beta
    are, as ever, each device's own, and the Trainer sums them over all devices.  An exported graph
    remembers the group size and trains in a ``SymbolBlock`` in :class:`ModelDataParallel`; Module,
    which does not say which of its contexts are a group, refuses to train it.

    **Batch renormalization** computes, with r and d as constants in the backward pass,

    .. math:: y = \\left(\\frac{x - \\mathrm{E}[x]}{\\sqrt{\\mathrm{Var}[x] + \\epsilon}} r
       + d\\right) \\gamma + \\beta

    where r is the batch's standard deviation over ``renorm_stddev``, and d the distance of the
    batch's mean from ``renorm_mean`` over ``renorm_stddev``, both as they were before this batch.
    The paper relaxes the limits slowly, after some thousand steps of plain batch normalization::

        if step >= 5000:
            layer.renorm_clipping = {"rmax": rmax(step), "rmin": 1 / rmax(step), "dmax": dmax(step)}

    Setting them has hybridized networks traced anew at their next call, so set them every few
    hundred steps.  With ``group_size`` the averages are those of a device's group, as the moving
    statistics are.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", ICML 2015, https://arxiv.org/abs/1502.03167
    .. [2] Zhang et al., "Context Encoding for Semantic Segmentation", CVPR 2018,
       https://arxiv.org/abs/1803.08904
    .. [3] Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
       Models", NeurIPS 2017, https://arxiv.org/abs/1702.03275

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

    Moving statistics that are the average over all batches:

    >>> layer = SyncBatchNorm(momentum=None)
    >>> layer.initialize()
    >>> for value in (1, 2, 6):
    ...     with mx.autograd.record():
    ...         out = layer(mx.nd.full((4, 1), value))
    >>> [p.data().asscalar() for p in layer.statistics]
    [3.0, 0.0, 3.0]
    """

    num_batches_tracked = None  # a Parameter if momentum is None
    renorm_mean = renorm_stddev = None  # Parameters with renorm
    spatial_dims: int | None = None  # dimensions that the input must have besides N and C

    def __init__(
        self,
        in_channels: int = 0,
        num_devices: int | None = None,
        momentum: float | None = 0.9,
        epsilon: float = 1e-5,
        center: bool = True,
        scale: bool = True,
        use_global_stats: bool = False,
        beta_initializer: str | Initializer = "zeros",
        gamma_initializer: str | Initializer = "ones",
        running_mean_initializer: str | Initializer = "zeros",
        running_variance_initializer: str | Initializer = "ones",
        axis: int = 1,
        track_running_stats: bool = True,
        activation: str | None = None,
        slope: float = 0.01,
        group_size: int | None = None,
        renorm: bool = False,
        renorm_clipping: dict | None = None,
        renorm_momentum: float = 0.99,
        **kwargs: Any,
    ) -> None:
        if num_devices is None:
            num_devices = kwargs.pop("nGPUs", None)
        num_devices = checked_num_devices(num_devices)
        group_size = checked_group_size(group_size, num_devices)
        if use_global_stats and not track_running_stats:
            raise ValueError(
                "use_global_stats=True normalizes by the moving statistics, which a layer with "
                "track_running_stats=False does not have; leave one of them out"
            )
        if renorm and (use_global_stats or not track_running_stats):
            raise ValueError(
                "renorm=True corrects the batch's statistics by averages, so it cannot be combined "
                "with use_global_stats=True or track_running_stats=False; leave one of them out"
            )
        if renorm_clipping is not None and not renorm:
            raise ValueError("renorm_clipping is given without renorm=True; add it")
        if _not_negative("renorm_momentum", renorm_momentum) > 1:
            raise ValueError(f"renorm_momentum must lie from 0 to 1, but is {renorm_momentum!r}")
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
        settings(self).update(  # shown by repr()
            num_devices=num_devices,
            track_running_stats=bool(track_running_stats),
            group_size=group_size,
            **checked_activation(activation, slope),
        )
        if renorm:
            settings(self).update(
                renorm=True,
                renorm_momentum=float(renorm_momentum),
                **checked_clipping(renorm_clipping),
            )
            for name, init in (("renorm_mean", "zeros"), ("renorm_stddev", "ones")):
                parameter = self.params.get(
                    name,
                    grad_req="null",
                    shape=(in_channels,),
                    init=init,
                    allow_deferred_init=True,
                    differentiable=False,
                )
                setattr(self, name, parameter)
        if momentum is None and track_running_stats:
            self.num_batches_tracked = self.params.get(
                "num_batches_tracked",
                grad_req="null",
                shape=(1,),
                init="zeros",
                allow_deferred_init=True,
                differentiable=False,
            )

    def _alias(self) -> str:
        # Gluon names parameters by this; with nn.BatchNorm's, checkpoints by full names fit as
        # well.
        return "batchnorm"

    @property
    def num_devices(self) -> int | None:
        """The number of devices that the layer was given, or None."""
        return settings(self)["num_devices"]

    @property
    def group_size(self) -> int | None:
        """The number of devices in a group, or None if all are synchronized."""
        return settings(self)["group_size"]

    @property
    def track_running_stats(self) -> bool:
        """Whether training updates moving statistics, by which inference normalizes."""
        return settings(self)["track_running_stats"]

    @property
    def activation(self) -> str | None:
        """The activation that the layer applies, or None."""
        return settings(self).get("activation")

    @property
    def renorm(self) -> bool:
        """Whether the layer does batch renormalization."""
        return settings(self).get("renorm", False)

    @property
    def renorm_clipping(self) -> dict:
        """The limits of batch renormalization, by key; to be set as a whole, also in training."""
        given = settings(self)
        limits = {key: given.get(f"renorm_{key}") for key in CLIPPING}
        return {key: limit for key, limit in limits.items() if limit is not None}

    @renorm_clipping.setter
    def renorm_clipping(self, clipping: dict | None) -> None:
        if not self.renorm:
            raise ValueError(f"{self.name} was made without renorm=True, so it clips nothing")
        limits = checked_clipping(clipping)
        for key in CLIPPING:
            settings(self).pop(f"renorm_{key}", None)
        settings(self).update(limits)
        mark_changed(self)  # graphs have the limits built in

    @property
    def statistics(self) -> tuple:
        """The Parameters that training updates without a gradient, the moving mean first."""
        moved = (
            *(self.running_mean, self.running_var, self.num_batches_tracked),
            *(self.renorm_mean, self.renorm_stddev),
        )
        return tuple(parameter for parameter in moved if parameter is not None)

    @property
    def key(self) -> str:
        """The key of the layer's all-reduce: its prefix, made unique in this process."""
        return key_of(self, self.prefix or self._alias())

    @property
    def _stays_on_device(self):
        one = 1 in (self.num_devices, self.group_size)
        return one and connection_of(self.key) is None

    @property
    def exchange(self) -> Exchange:
        """The layer's all-reduce, as a pass sees it."""
        local = self._stays_on_device or settings(self)["use_global_stats"]
        return Exchange(
            self.name, self.key, self.num_devices, self.statistics, local, self.group_size
        )

    def __call__(self, data: Any, weights: Any = None, add: Any = None) -> Any:
        """Normalize an array; see the class."""
        if weights is None and add is None:
            return super().__call__(data)
        return super().__call__(data, weights, add)

    @either_kind
    def hybrid_forward(
        self,
        F,
        x,
        weights=None,
        add=None,
        *,
        gamma,
        beta,
        running_mean,
        running_var,
        **further,
    ):
        """Compose the operators of one call; see the module's first lines."""
        given = settings(self)
        options = {k: given[k] for k in _OPTIONS if k in given}
        if self.spatial_dims is not None:
            options["spatial_dims"] = self.spatial_dims
        parameters = dict(gamma=gamma, beta=beta, moving_mean=running_mean, moving_var=running_var)
        if not given["track_running_stats"]:
            options["use_batch_stats"] = True
        if options["momentum"] is None:
            del options["momentum"]
            if "num_batches_tracked" in further:
                options["cumulative_average"] = True
        parameters.update(further)  # num_batches_tracked, renorm_mean, renorm_stddev
        if add is not None:
            options["add"] = True
            parameters["residual"] = add
        imperative = isinstance(x, NDArray)
        # A graph learns only when it runs whether that is in training; an imperative call knows
        # now.
        inference = imperative and not autograd.is_training()
        num_devices, use_global_stats = given["num_devices"], given["use_global_stats"]
        group_size = given["group_size"]
        if inference and given["track_running_stats"]:
            weights = None  # the moving statistics are used
        if use_global_stats or inference or self._stays_on_device:
            if weights is not None:
                # Also where they mean nothing: Gluon infers shapes from a graph with all inputs.
                return weighted_batch_norm(F, x, parameters, options, weights, use_global_stats)
            return local_batch_norm(
                F, x, parameters, options, use_global_stats, group_size=group_size
            )
        if imperative:
            begin([self.exchange], x.context)
        # A graph may run a layer's several uses in any order, so each has a number.
        call = 0 if imperative else KEYS.next_call(self.key)
        with calls_of_a_layer():
            return synchronized_batch_norm(
                *(F, x, parameters, options, self.key, num_devices, call),
                weights=weights,
                group_size=group_size,
            )


#: The name by which PyTorch-Encoding's users know the layer: ``from gluon_syncbn import
# BatchNorm``.
BatchNorm = SyncBatchNorm
