"""A loss on several devices at once."""

from .model_data_parallel import ModelDataParallel
from .shares import Share


class DataParallelCriterion(ModelDataParallel):
    """Run a loss over the outputs of :class:`ModelDataParallel`, each on its device.

    Parameters
    ----------
    loss : Block
        The loss.
    ctx_list : list of Context
        The devices.

    Notes
    -----
    Called as ``criterion(outputs, labels, ...)``; an output that is a list or tuple is passed as
    so many arguments, as in GluonCV.  It gives the list of losses, for :func:`parallel_backward`.

    Examples
    --------
    See :class:`ModelDataParallel`.
    """

    def __init__(self, loss, ctx_list):
        super().__init__(loss, ctx_list)

    def _call(self, share):
        outputs, *rest = share.args
        if isinstance(outputs, (list, tuple)):
            rest = [*outputs, *rest]
        else:
            rest = [outputs, *rest]
        return super()._call(Share(share.context, rest, share.kwargs))
