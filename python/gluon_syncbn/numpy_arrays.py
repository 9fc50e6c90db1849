"""Arrays and symbols of ``mx.np``: our operators belong to ``mx.nd`` and ``mx.sym``.

The two kinds are views of the same thing: ``as_nd_ndarray`` and ``as_np_ndarray`` share memory,
gradient and graph.  So a layer takes either kind and returns the kind it got.
"""

import functools

from mxnet import numpy
from mxnet.util import is_np_array

from .mxnet_private import NumpySymbol

NUMPY_KINDS = (numpy.ndarray, NumpySymbol)


def like(value, other):
    """An array or symbol as one of the kind of ``other``."""
    if isinstance(other, NUMPY_KINDS):
        return value.as_np_ndarray()
    return value.as_nd_ndarray()


def either_kind(hybrid_forward):
    """Make a ``hybrid_forward`` that is written for ``mx.nd`` work with ``mx.np`` as well.

    Raises
    ------
    TypeError
        From the call, for data of ``mx.nd`` under ``mx.npx.set_np()``, where parameters and all
        other layers are of ``mx.np``.
    """

    @functools.wraps(hybrid_forward)
    def forward(self, F, x, *args, **kwargs):
        if is_np_array() and not isinstance(x, NUMPY_KINDS):
            raise TypeError(
                f"{self.name} got a {type(x).__module__}.{type(x).__name__} under "
                "mx.npx.set_np(), where layers take arrays of mx.np; give it x.as_np_ndarray()"
            )
        args = [value if value is None else value.as_nd_ndarray() for value in args]
        kwargs = {name: value.as_nd_ndarray() for name, value in kwargs.items()}
        return like(hybrid_forward(self, F, x.as_nd_ndarray(), *args, **kwargs), x)

    return forward
