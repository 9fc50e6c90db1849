"""Moving average batch normalization: for batches too small for statistics of their own.

All of it [1]_, on each of the devices; x is this device's shard, of shape (N, C, H, W), and mean()
is over the elements of a channel, on all devices if the layer is synchronized.  K is
simulated_batch_size / batch_size, and a buffer has the numbers of the last K iterations::

    forward, in training
        iters         = iters + 1
        x2            = mean(x**2), in buffer_x2[iters % K]              # (C,)
        var           = average of buffer_x2                             # (C,)  in warm-up: x2
        z             = x / sqrt(var + epsilon)                          # (N, C, H, W)
        r             = sqrt((var + epsilon) / (running_var + epsilon))  # (C,)  in [1/5, 5]; at
                                                                         #       first: 1
        y             = gamma * r * z + beta                             # (N, C, H, W)
        running_var   = momentum * running_var + (1 - momentum) * var    # (C,)

    backward
        g             = gamma * r * dy                                   # (N, C, H, W)
        gz            = mean(g * z), in buffer_gz[iters % K]             # (C,)
        dx            = (g - z * average of buffer_gz) / sqrt(var + epsilon)
        dgamma, dbeta = sum(dy * r * z), sum(dy)                         # (C,)  of this shard

    inference
        y             = gamma * x / sqrt(running_var + epsilon) + beta

``_syncbn_mabn_moments`` computes what mean(x**2) is made of and, in backward, dx;
``_syncbn_mabn_normalize`` does the rest.  A synchronized layer has the all-reduce of both means,
``_syncbn_sum``, in between.

.. [1] Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch
   Normalization", ICLR 2020, https://arxiv.org/abs/2001.06838, algorithm 1.
"""

from __future__ import annotations

import numbers
import operator
from typing import Any

import numpy as np
from mxnet import autograd
from mxnet.gluon import HybridBlock
from mxnet.initializer import Initializer
from mxnet.ndarray import NDArray

from .keys import KEYS
from .numpy_arrays import either_kind
from .operators import local_batch_norm, moving_average_batch_norm
from .passes import Exchange, begin, calls_of_a_layer
from .sync_batch_norm import checked_num_devices, key_of

_LARGEST = 2**21  # of counts; see NextIteration in src/operator/kernels/moving_average_math.h


def _count(name, value, least):
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not least <= number <= _LARGEST:
        raise ValueError(f"{name} must be an integer from {least} to {_LARGEST}, but is {value!r}")
    return number


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def moving_average_settings(
    batch_size: int,
    simulated_batch_size: int,
    momentum: float,
    epsilon: float,
    warmup_iters: int,
    num_devices: int | None,
) -> dict:
    """Return the settings of a layer, checked; raise ValueError for those that do not fit."""
    batch_size = _count("batch_size", batch_size, 1)
    simulated_batch_size = _count("simulated_batch_size", simulated_batch_size, 1)
    if simulated_batch_size % batch_size:
        raise ValueError(
            f"simulated_batch_size={simulated_batch_size} is not a multiple of "
            f"batch_size={batch_size}; averages are over simulated_batch_size / batch_size batches"
        )
    if not _is_number(momentum) or not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be a number from 0 to 1, but is {momentum!r}")
    if not _is_number(epsilon) or not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon must be a number of 0 or more, but is {epsilon!r}")
    return {
        "batch_size": batch_size,
        "simulated_batch_size": simulated_batch_size,
        "momentum": momentum,
        "epsilon": epsilon,
        "warmup_iters": _count("warmup_iters", warmup_iters, 0),
        "num_devices": checked_num_devices(num_devices),
    }


class MABN2d(HybridBlock):
    """Moving average batch normalization of images.

    For batches of a few images, whose own statistics are noise.  Computes [1]_, for each channel,

    .. math:: y = \\gamma r \\frac{x}{\\sqrt{\\overline{\\mathrm{E}[x^2]} + \\epsilon}} + \\beta

    where the bar is the average over the last ``simulated_batch_size / batch_size`` batches, and
    ``r`` renormalizes by the exponential moving average, ``running_var``, within [1/5, 5].  The
    backward pass averages E[g z], its only statistic, in the same way.  No mean is subtracted;
    centring the weights of the convolution before it, :class:`CenConv2d`, takes the place of that.
    Inference is one scale and shift.

    Parameters
    ----------
    in_channels : int
        Number of channels C.  0: inferred from the first input.
    batch_size : int
        Number of images that a batch's statistics are taken over: on one device, or, with
        ``num_devices``, on all of them.
    simulated_batch_size : int
        Number of images that statistics are to be averaged over, a multiple of ``batch_size``.
    momentum : float, default 0.98
        ``running_var = momentum * running_var + (1 - momentum) * var``.
    epsilon : float, default 1e-5
        Added to the second moment.
    warmup_iters : int, default 100
        In so many iterations, and as long as a buffer is not full, a batch is normalized by its own
        second moment.  ``r`` is 1 in the first ``max(1000, warmup_iters)``.
    num_devices : int or None, default 1
        Number of devices over which statistics are taken.  1: each device by itself, as in the
        paper; more: synchronized.  None: synchronized over the devices of
        :class:`ModelDataParallel`; without one, the number of visible GPUs, or 1.
    gamma_initializer, beta_initializer : str or Initializer, default 'ones' and 'zeros'
    **kwargs
        ``prefix`` and ``params``, as for any Block.

    Raises
    ------
    ValueError
        If ``simulated_batch_size`` is not a multiple of ``batch_size``, or a number is out of
        range.

    See Also
    --------
    CenConv2d : the convolution that belongs before it.
    convert_mabn : converts the layers of an existing network.

    Notes
    -----
    **Call.** ``layer(data)`` returns an array of the kind, shape and dtype of ``data``, an NDArray
    or Symbol of ``mx.nd`` or ``mx.np`` of shape ``(N, C, H, W)``; float16, float32 or float64.
    *ValueError* or *mxnet.MXNetError*: for another number of dimensions or of channels, or integer
    data.  *TypeError*: for ``weights`` or ``add``, which :class:`SyncBatchNorm` takes.

    **Parameters.** ``gamma``, ``beta`` and ``running_var``, of shape ``(C,)``; ``buffer_x2`` and
    ``buffer_gz``, of shape ``(simulated_batch_size / batch_size, C)``, and ``iters``, of shape
    ``(1,)``, which training updates without a gradient.  All are float32, or float64 for float64
    data, and are saved in checkpoints: as the average over the devices, if there are several.
    With ``num_devices=1`` devices have different statistics.

    **Iterations.** Each forward in training is an iteration and has a slot of its own in the
    buffers, which its backward writes as well; so a layer that is used twice in a network has two
    per step, and a forward without a backward leaves an older number in its slot of ``buffer_gz``.
    A number that is not finite is not put into ``buffer_gz``, so an overflow under automatic mixed
    precision costs one step.  If nothing before the layer needs a gradient, it has no ``dx`` and
    does not update ``buffer_gz``.

    References
    ----------
    .. [1] Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch
       Normalization", ICLR 2020, https://arxiv.org/abs/2001.06838

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import CenConv2d, MABN2d
    >>> net = mx.gluon.nn.HybridSequential()
    >>> net.add(CenConv2d(8, 3, use_bias=False), MABN2d(8, batch_size=2, simulated_batch_size=16))
    >>> net.initialize()
    >>> with mx.autograd.record():
    ...     y = net(mx.nd.ones((2, 3, 8, 8)))
    >>> y.backward()
    >>> y.shape, net[1].iters.data().asscalar()
    ((2, 8, 6, 6), 1.0)
    """

    def __init__(
        self,
        in_channels: int,
        batch_size: int,
        simulated_batch_size: int,
        momentum: float = 0.98,
        epsilon: float = 1e-5,
        warmup_iters: int = 100,
        num_devices: int | None = 1,
        gamma_initializer: str | Initializer = "ones",
        beta_initializer: str | Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        settings = moving_average_settings(
            batch_size, simulated_batch_size, momentum, epsilon, warmup_iters, num_devices
        )
        in_channels = _count("in_channels", in_channels, 0)
        super().__init__(**kwargs)
        with self.name_scope():
            for name, init in (("gamma", gamma_initializer), ("beta", beta_initializer)):
                setattr(self, name, self._parameter(name, (in_channels,), init, grad_req="write"))
            self.running_var = self._parameter("running_var", (in_channels,), "ones")
            self._set_up(settings, in_channels, ndim=4)

    def _set_up(
        self,
        settings: dict,
        in_channels: int,
        fix_gamma: bool = False,
        ndim: int = 0,
        dtype: Any = "float32",
    ) -> None:
        """Set what makes a layer with ``gamma``, ``beta`` and ``running_var`` one of this class.

        Parameters
        ----------
        settings : dict
            From :func:`moving_average_settings`.
        in_channels : int
        fix_gamma : bool, default False
            Take gamma as 1.
        ndim : int, default 0
            The number of dimensions that data must have; 0: 2 or more, with channels as axis 1.
        dtype : dtype, default 'float32'
            Of the parameters.
        """
        self._settings, self._fix_gamma, self._ndim = settings, fix_gamma, ndim
        buffer = self.buffer_size, in_channels
        self.buffer_x2 = self._parameter("buffer_x2", buffer, "zeros", dtype=dtype)
        self.buffer_gz = self._parameter("buffer_gz", buffer, "zeros", dtype=dtype)
        self.iters = self._parameter("iters", (1,), "zeros", dtype=dtype)

    def _parameter(self, name, shape, init, grad_req="null", dtype="float32"):
        return self.params.get(
            name,
            grad_req=grad_req,
            shape=shape,
            dtype=dtype,
            init=init,
            allow_deferred_init=True,
            differentiable=grad_req != "null",
        )

    @property
    def buffer_size(self) -> int:
        """The number of batches that averages are over."""
        return self._settings["simulated_batch_size"] // self._settings["batch_size"]

    @property
    def num_devices(self) -> int | None:
        """The number of devices that the layer was given, or None."""
        return self._settings["num_devices"]

    @property
    def statistics(self) -> tuple:
        """The Parameters that forward updates in training."""
        return self.running_var, self.buffer_x2, self.iters

    @property
    def key(self) -> str:
        """The key of the layer's all-reduce: its prefix, made unique in this process."""
        return key_of(self, self.prefix or self._alias())

    @property
    def exchange(self) -> Exchange:
        """The layer's all-reduce, as a pass sees it."""
        local = self.num_devices == 1
        number = None if local else self.num_devices  # each by itself, however many there are
        late = (self.buffer_gz,)
        return Exchange(self.name, self.key, number, self.statistics, local, late_statistics=late)

    def __call__(self, data: Any, *further: Any, **named: Any) -> Any:
        """Normalize an array; see the class."""
        if further or named:
            raise TypeError(
                f"{self.name} is a MABN2d, which takes data alone; weights and add are arguments "
                "of SyncBatchNorm"
            )
        return super().__call__(data)

    def cast(self, dtype: Any) -> None:
        """Cast the parameters; those of a layer for float16 data are float32."""
        super().cast("float32" if np.dtype(dtype).name == "float16" else dtype)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._settings.items())
        return f"{type(self).__name__}(in_channels={self.gamma.shape[0] or None}, {given})"

    @either_kind
    def hybrid_forward(self, F, x, gamma, beta, running_var, buffer_x2, buffer_gz, iters):
        """Compose the operators of one call; see the module's first lines."""
        options = {"eps": self._settings["epsilon"], "fix_gamma": self._fix_gamma}
        imperative = isinstance(x, NDArray)
        if imperative:
            if self._ndim and x.ndim != self._ndim:
                raise ValueError(
                    f"{self.name} takes an input of {self._ndim} dimensions, (batch, channels, "
                    f"height, width), but got one of shape {x.shape}; reshape it, or use "
                    "SyncBatchNorm"
                )
            if not autograd.is_training():
                mean = F.zeros_like(running_var)
                parameters = dict(gamma=gamma, beta=beta, moving_mean=mean, moving_var=running_var)
                return local_batch_norm(F, x, parameters, options, True)
            begin([self.exchange], x.context)
        states = running_var, buffer_x2, iters, buffer_gz
        options["momentum"] = self._settings["momentum"]
        averages = {
            "buffer_size": self.buffer_size,
            "warmup_iters": self._settings["warmup_iters"],
        }
        all_reduce = None
        if self.num_devices != 1:
            call = 0 if imperative else KEYS.next_call(self.key)
            all_reduce = self.key, self.num_devices, call
        with calls_of_a_layer():
            return moving_average_batch_norm(
                F, x, gamma, beta, states, options, averages, self._ndim, all_reduce
            )
