"""Convolution with centred weights: what takes the place of subtracting the mean of a batch.

Without a bias, the output of a filter whose weights add up to 0 has a mean near 0 where the inputs
have similar means; so moving average batch normalization can leave the mean out.
"""

from __future__ import annotations

from typing import Any

from mxnet.gluon import nn

from .mxnet_private import with_shape_of
from .numpy_arrays import like


class CenConv2d(nn.Conv2D):
    """2-D convolution, its weight centred per output filter.

    Convolves with [1]_

    .. math:: W_o - \\mathrm{mean}(W_o)

    for each output filter :math:`o`, over its input channels (those of its group), height and
    width.  Gradients go through the centring.  Otherwise it is :class:`mxnet.gluon.nn.Conv2D`, with
    the same arguments, parameters and checkpoints.

    Parameters
    ----------
    channels, kernel_size, strides, padding, dilation, groups, layout, activation, use_bias, \
weight_initializer, bias_initializer, in_channels
        As for :class:`mxnet.gluon.nn.Conv2D`.

    See Also
    --------
    MABN2d : moving average batch normalization, for which this is made.
    export_for_inference : writes, with ``fold=True``, the centred weight as that of a plain
        convolution.

    References
    ----------
    .. [1] Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch
       Normalization", ICLR 2020, https://arxiv.org/abs/2001.06838, section 4.2

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import CenConv2d
    >>> layer = CenConv2d(4, 3, use_bias=False)
    >>> layer.initialize()
    >>> abs(layer(mx.nd.ones((1, 8, 3, 3)))).max().asscalar() < 1e-6
    True
    """

    def hybrid_forward(self, F: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        """Compose the operators of one call."""
        w = weight.as_nd_ndarray()
        mean = F.mean(w, axis=0, exclude=True, keepdims=True, name="weight_mean")
        centered = F.broadcast_sub(w, mean, name="centered_weight")
        # Through broadcast_sub alone, MXNet would not infer the weight's number of input channels.
        centered = with_shape_of(F, centered, w)
        return super().hybrid_forward(F, x, like(centered, weight), bias)
