"""The layer under the names that say how many dimensions its input has, as in PyTorch.

If an input lacks its batch axis, or was not flattened, SyncBatchNorm takes another axis for the
channels, and nothing may tell.  These names catch that.
"""

from __future__ import annotations

from typing import Any

from mxnet.ndarray import NDArray

from .sync_batch_norm import SyncBatchNorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class CheckedDimensions(SyncBatchNorm):
    """A layer that checks the number of dimensions of its input (``spatial_dims``)."""

    def forward(self, x: Any, *args: Any) -> Any:
        # A symbol's dimensions are known to the operators only, which check them as well.
        if isinstance(x, NDArray) and x.ndim not in self._allowed(type(self)):
            raise ValueError(self._wrong(x.shape))
        return super().forward(x, *args)

    @staticmethod
    def _allowed(kind):
        return (2, 3) if kind.spatial_dims == 1 else (kind.spatial_dims + 2,)

    def _wrong(self, shape):
        kinds = BatchNorm1d, BatchNorm2d, BatchNorm3d
        fitting = [kind.__name__ for kind in kinds if len(shape) in self._allowed(kind)]
        return (
            f"{self.name} is a {type(self).__name__}, which takes an input of "
            f"{' or '.join(map(str, self._allowed(type(self))))} dimensions, but got {shape}; use "
            f"{', or '.join([*fitting, 'SyncBatchNorm, which takes 2 or more'])}"
        )


class BatchNorm1d(CheckedDimensions):
    """:class:`SyncBatchNorm` for inputs of shape ``(N, C)`` or ``(N, C, L)``.

    The arguments are those of :class:`SyncBatchNorm`; an ``axis`` other than 1 is allowed.

    Raises
    ------
    ValueError
        From the call, for an array that does not have 2 or 3 dimensions.
    mxnet.MXNetError
        For a symbol, whose dimensions are not known when the layer is called: when its shape is
        inferred, as in the first call of a hybridized network.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import BatchNorm1d
    >>> layer = BatchNorm1d(in_channels=3)
    >>> layer.initialize()
    >>> layer(mx.nd.ones((2, 3))).shape, layer(mx.nd.ones((2, 3, 5))).shape
    ((2, 3), (2, 3, 5))
    """

    spatial_dims = 1


class BatchNorm2d(CheckedDimensions):
    """:class:`SyncBatchNorm` for inputs of shape ``(N, C, H, W)``.

    The arguments are those of :class:`SyncBatchNorm`; an ``axis`` other than 1 is allowed.

    Raises
    ------
    ValueError, mxnet.MXNetError
        As :class:`BatchNorm1d`, for an input that does not have 4 dimensions.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import BatchNorm2d
    >>> layer = BatchNorm2d(in_channels=3, prefix="norm_")
    >>> layer.initialize()
    >>> layer(mx.nd.ones((2, 3, 5)))
    Traceback (most recent call last):
        ...
    ValueError: norm is a BatchNorm2d, which takes an input of 4 dimensions, but got (2, 3, 5); \
use BatchNorm1d, or SyncBatchNorm, which takes 2 or more
    """

    spatial_dims = 2


class BatchNorm3d(CheckedDimensions):
    """:class:`SyncBatchNorm` for inputs of shape ``(N, C, D, H, W)``.

    The arguments are those of :class:`SyncBatchNorm`; an ``axis`` other than 1 is allowed.

    Raises
    ------
    ValueError, mxnet.MXNetError
        As :class:`BatchNorm1d`, for an input that does not have 5 dimensions.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import BatchNorm3d
    >>> layer = BatchNorm3d(in_channels=3)
    >>> layer.initialize()
    >>> layer(mx.nd.ones((2, 3, 4, 5, 5))).shape
    (2, 3, 4, 5, 5)
    """

    spatial_dims = 3
