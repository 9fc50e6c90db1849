"""A loss on several devices at once."""

from mxnet.gluon import Block

from .callable_block import CallableBlock
from .keyword_arguments import call
from .model_data_parallel import ModelDataParallel
from .nested import arrays_in
from .shares import Share
from .whole_batches import cut


class DataParallelCriterion(ModelDataParallel):
    """Run a loss over a model's outputs, each on its device.

    Parameters
    ----------
    loss : Block or callable
        The loss.
    ctx_list : list of Context or None, default None
        The devices.  None: the loss is called with what the criterion is called with, and what it
        gives is returned as it is.
    sync : bool, default False
        There for GluonCV's programs; the devices run side by side in any case.
    module : Block or callable
        Another name for ``loss``, GluonCV's.

    Notes
    -----
    Called as ``criterion(outputs, labels, ...)`` with what :class:`ModelDataParallel` or
    :class:`DataParallelModel` gives; an output that is a list or tuple is passed as so many
    arguments, as in GluonCV.  Labels are lists with one entry per device, or NDArrays, which are
    split by rows over the devices of the outputs.  (With outputs of a :class:`DataParallelModel`,
    tuples, also lists, tuples and dicts of NDArrays.)  It gives the list of losses, for
    :func:`parallel_backward`.

    Raises
    ------
    TypeError
        If ``loss`` cannot be called; from a call, if the outputs are no list or tuple.
    ValueError
        From a call, if a label has fewer rows than there are outputs, or another number of rows
        than other labels that are split.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import DataParallelCriterion
    >>> ctx_list = [mx.cpu(0), mx.cpu(1)]
    >>> criterion = DataParallelCriterion(mx.gluon.loss.L1Loss(), ctx_list)
    >>> outputs = [mx.nd.zeros((2, 1), ctx_list[0]), mx.nd.zeros((1, 1), ctx_list[1])]
    >>> losses = criterion(outputs, mx.nd.array([[1], [2], [3]]))
    >>> [loss.asnumpy().tolist() for loss in losses]
    [[1.0, 2.0], [3.0]]
    """

    def __init__(self, loss=None, ctx_list=None, sync=False, *, module=None):
        if loss is not None and module is not None:
            raise TypeError("loss and module are two names of one argument; give one of them")
        loss = module if loss is None else loss
        if not callable(loss):
            raise TypeError(f"the loss must be callable, but is {type(loss).__name__}")
        self.sync = sync
        if ctx_list is None:
            self.net, self.ctx_list = loss, None
        else:
            super().__init__(loss if isinstance(loss, Block) else CallableBlock(loss), ctx_list)

    def __call__(self, outputs, *labels, **kwargs):
        if self.ctx_list is None:
            return call(self.net, (outputs, *labels), kwargs)
        if not isinstance(outputs, (list, tuple)):
            raise TypeError(
                "the outputs must be a list with one entry per device, as the model gives it, but "
                f"are {type(outputs).__name__}"
            )
        if isinstance(outputs, tuple) and all(isinstance(output, tuple) for output in outputs):
            devices = [next(arrays_in(output)).context for output in outputs]
            labels, kwargs = cut(devices, labels, kwargs)
        return super().__call__(outputs, *labels, **kwargs)

    def _call(self, share):
        outputs, *rest = share.args
        if isinstance(outputs, (list, tuple)):
            rest = [*outputs, *rest]
        else:
            rest = [outputs, *rest]
        return super()._call(Share(share.context, rest, share.kwargs))
