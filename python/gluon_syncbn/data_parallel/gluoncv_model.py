"""GluonCV's ``DataParallelModel``, so that its programs need another import and no more."""

from __future__ import annotations

from typing import Any

from mxnet.ndarray import NDArray

from .keyword_arguments import call
from .model import ModelDataParallel
from .whole_batches import cut


class DataParallelModel:
    """Run a network over whole batches, which it splits over several devices.

    :class:`ModelDataParallel` in the form of ``gluoncv.utils.parallel``.

    Parameters
    ----------
    module : Block or callable
        The network, or a callable with ``collect_params`` that runs one.  Its parameters are put on
        all devices, see :class:`ModelDataParallel`.
    ctx_list : list of Context or None, default None
        The devices.  None: the network is called with the arguments of this object, and its result
        is returned as it is.
    sync : bool, default False
        Accepted for GluonCV's programs; the devices run in parallel in any case.

    Attributes
    ----------
    module, ctx_list, sync
        As given.

    Raises
    ------
    TypeError
        If ``module`` is neither a Block nor a callable with ``collect_params``.
    ValueError
        As :class:`ModelDataParallel`.

    Examples
    --------
    >>> import mxnet as mx
    >>> from mxnet import autograd, gluon
    >>> from gluon_syncbn import (DataParallelCriterion, DataParallelModel, SyncBatchNorm,
    ...                           parallel_backward)
    >>> ctx_list = [mx.cpu(0), mx.cpu(1)]
    >>> net = gluon.nn.HybridSequential()
    >>> net.add(gluon.nn.Dense(8), SyncBatchNorm(), gluon.nn.Dense(2))
    >>> net.initialize()
    >>> model = DataParallelModel(net, ctx_list, True)
    >>> criterion = DataParallelCriterion(gluon.loss.L2Loss(), ctx_list, True)
    >>> trainer = gluon.Trainer(model.module.collect_params(), 'sgd')
    >>> data, label = mx.nd.ones((5, 4)), mx.nd.ones((5, 2))
    >>> with autograd.record():
    ...     losses = criterion(model(data), label)
    >>> parallel_backward(losses)
    >>> trainer.step(len(data))
    """

    def __init__(self, module: Any, ctx_list: list | None = None, sync: bool = False) -> None:
        self.module, self.ctx_list, self.sync = module, ctx_list, sync
        self._model = None if ctx_list is None else ModelDataParallel(module, ctx_list)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Split whole batches by rows and run the network on every device that gets some.

        Parameters
        ----------
        *inputs, **kwargs
            NDArrays of shape ``(N, *)``, or lists, tuples and dicts of them: each is split by rows,
            unevenly if need be; with fewer rows than devices, some devices get none.  Numbers and
            None go to every device.  A list whose arrays are on several devices counts as split.

        Returns
        -------
        tuple of tuple
            For each device that got rows, the outputs of the network there, a tuple even of one.
            :class:`DataParallelCriterion` takes it.

        Raises
        ------
        ValueError
            If arrays that are split differ in their number of rows; and whatever
            :class:`ModelDataParallel` raises.
        """
        if self._model is None:
            return call(self.module, inputs, kwargs)
        inputs, kwargs = cut(self._model.ctx_list, inputs, kwargs)
        return tuple(_as_tuple(output) for output in self._model(*inputs, **kwargs))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module!r}, ctx_list={self.ctx_list})"


def _as_tuple(output):
    if isinstance(output, NDArray):
        return (output,)
    return tuple(output) if isinstance(output, list) else output
