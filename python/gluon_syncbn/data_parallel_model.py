"""GluonCV's ``DataParallelModel``, so that its programs need another import and no more."""

from mxnet.ndarray import NDArray

from .keyword_arguments import call
from .model_data_parallel import ModelDataParallel
from .whole_batches import cut


class DataParallelModel:
    """Run a network over whole batches, split over several devices.

    What :class:`ModelDataParallel` does, in the form of ``gluoncv.utils.parallel``.

    Parameters
    ----------
    module : Block or callable
        The network, or a callable with ``collect_params`` that runs one.  Parameters that do not
        lie on all devices are put there, see :class:`ModelDataParallel`.
    ctx_list : list of Context or None, default None
        The devices.  None: the network is called with what this is called with, and what it gives
        is returned as it is.
    sync : bool, default False
        There for GluonCV's programs; the devices run side by side in any case.

    Attributes
    ----------
    module, ctx_list, sync
        As given.

    Notes
    -----
    Called with NDArrays, or with lists, tuples and dicts of NDArrays, by position or by name, it
    splits each by rows, unevenly if it must be; of a batch with fewer rows than devices, only so
    many devices get a part.  Numbers and None go to every device.  A list whose arrays lie on
    several devices is taken as already split.

    It gives a tuple with one entry per device that got a part: a tuple of the network's outputs
    there, also if it has but one.  :class:`DataParallelCriterion` takes that.

    Raises
    ------
    TypeError
        If ``module`` is no Block and no callable with ``collect_params``.
    ValueError
        From a call, if arrays that are to be split differ in their number of rows; and whatever
        :class:`ModelDataParallel` raises.

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

    def __init__(self, module, ctx_list=None, sync=False):
        self.module, self.ctx_list, self.sync = module, ctx_list, sync
        self._model = None if ctx_list is None else ModelDataParallel(module, ctx_list)

    def __call__(self, *inputs, **kwargs):
        if self._model is None:
            return call(self.module, inputs, kwargs)
        inputs, kwargs = cut(self._model.ctx_list, inputs, kwargs)
        return tuple(_as_tuple(output) for output in self._model(*inputs, **kwargs))

    def __repr__(self):
        return f"{type(self).__name__}({self.module!r}, ctx_list={self.ctx_list})"


def _as_tuple(output):
    if isinstance(output, NDArray):
        return (output,)
    return tuple(output) if isinstance(output, list) else output
