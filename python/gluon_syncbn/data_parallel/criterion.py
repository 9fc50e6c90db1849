"""A loss on several devices at once."""

from __future__ import annotations

from typing import Any, Callable

from mxnet.gluon import Block

from .callable_block import CallableBlock
from .keyword_arguments import call
from .model import ModelDataParallel
from .nested import arrays_in
from .shards import Shard
from .whole_batches import cut


class DataParallelCriterion(ModelDataParallel):
    """Run a loss over a model's outputs, each on its device.

    Parameters
    ----------
    loss : Block or callable
        The loss.
    ctx_list : list of Context or None, default None
        The devices.  None: the loss is called with the arguments of the criterion, and its result
        is returned as it is.
    sync : bool, default False
        Accepted for GluonCV's programs; the devices run in parallel in any case.
    module : Block or callable
        GluonCV's name for ``loss``.

    Raises
    ------
    TypeError
        If ``loss`` cannot be called.

    See Also
    --------
    ModelDataParallel, DataParallelModel : give the outputs.
    parallel_backward : takes the losses.

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

    def __init__(
        self,
        loss: Callable | None = None,
        ctx_list: list | None = None,
        sync: bool = False,
        *,
        module: Callable | None = None,
    ) -> None:
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

    def __call__(self, outputs: Any, *labels: Any, **kwargs: Any) -> Any:
        """Compute the losses.

        Parameters
        ----------
        outputs : list or tuple
            What :class:`ModelDataParallel` or :class:`DataParallelModel` returns, one entry per
            device.  An entry that is a list or tuple is passed as several arguments, as in GluonCV.
        *labels, **kwargs
            Lists with one entry per device, or NDArrays, which are split by rows over the devices
            of the outputs.  (With outputs of a :class:`DataParallelModel`, which are tuples, also
            lists, tuples and dicts of NDArrays.)

        Returns
        -------
        list
            The loss on each device, for :func:`parallel_backward`.

        Raises
        ------
        TypeError
            If the outputs are neither a list nor a tuple.
        ValueError
            If a label has fewer rows than there are outputs, or another number of rows than another
            label that is split.
        """
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

    def _call(self, shard):
        outputs, *rest = shard.args
        if isinstance(outputs, (list, tuple)):
            rest = [*outputs, *rest]
        else:
            rest = [outputs, *rest]
        return super()._call(Shard(shard.context, rest, shard.kwargs))
