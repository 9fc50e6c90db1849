"""MXNet's Estimator on several devices at once.

Its own BatchProcessor pushes device after device from one thread, so devices that wait for each
other can deadlock on CPU contexts, and it refuses a batch that does not divide evenly.
"""

from __future__ import annotations

from typing import Any

from mxnet import autograd
from mxnet.gluon.contrib.estimator import BatchProcessor
from mxnet.gluon.utils import split_and_load

from ..mxnet_private import contexts_of
from .backward import parallel_backward
from .criterion import DataParallelCriterion
from .model import ModelDataParallel


class DataParallelBatchProcessor(BatchProcessor):
    """Run the batches of an Estimator over all of its contexts, synchronized.

    Pass one to :class:`mxnet.gluon.contrib.estimator.Estimator` as ``batch_processor``; the
    estimator then trains as one device with the whole batch would.

    Notes
    -----
    A batch is ``(data, label)``, two arrays of equal length along ``batch_axis``.  It need not
    divide evenly, and may be smaller than the number of devices: event handlers and metrics get
    lists with one entry per device that got a shard.  For batches of another form, override
    ``_get_data_and_label(batch, ctx, batch_axis)``, which returns the two lists.

    The estimator's ``net`` and ``val_net`` may be Blocks or a :class:`ModelDataParallel`; pass the
    latter if you also call it yourself.  An output that is a list or tuple is passed to the
    loss as several arguments.

    Raises
    ------
    TypeError
        From ``fit`` and ``evaluate``, if data or label is not an array.
    ValueError
        From ``fit`` and ``evaluate``, if data and label differ in length, or the network's
        parameters are on several devices that are not the estimator's ``context``.
    Exception
        From ``fit`` and ``evaluate``, whatever :class:`ModelDataParallel` raises.

    Examples
    --------
    >>> import mxnet as mx
    >>> from mxnet import gluon
    >>> from mxnet.gluon.contrib.estimator import Estimator
    >>> from gluon_syncbn import SyncBatchNorm
    >>> from gluon_syncbn.estimator import DataParallelBatchProcessor
    >>> ctx_list = [mx.cpu(0), mx.cpu(1)]
    >>> net = gluon.nn.HybridSequential()
    >>> net.add(gluon.nn.Dense(8), SyncBatchNorm(), gluon.nn.Dense(2))
    >>> net.initialize()
    >>> data = gluon.data.ArrayDataset(mx.nd.random.normal(shape=(5, 4)), mx.nd.zeros(5))
    >>> estimator = Estimator(
    ...     net, gluon.loss.SoftmaxCrossEntropyLoss(),
    ...     trainer=gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1}),
    ...     context=ctx_list, batch_processor=DataParallelBatchProcessor())
    >>> estimator.logger.setLevel('WARNING')
    >>> estimator.fit(gluon.data.DataLoader(data, batch_size=2), epochs=3)
    >>> [name for name, value in (m.get() for m in estimator.train_metrics)]
    ['training accuracy', 'training softmaxcrossentropyloss']
    """

    def __init__(self):
        super().__init__()
        self._wrapped = {}  # (block, contexts) -> what runs it on them

    def fit_batch(self, estimator: Any, train_batch: Any, batch_axis: int = 0) -> tuple:
        """Compute the gradients of a batch; the estimator makes the step.

        Parameters
        ----------
        estimator : Estimator
        train_batch : tuple of NDArray
            Data and label.
        batch_axis : int, default 0

        Returns
        -------
        data, label, pred, loss : list of NDArray
            One entry per device that got a shard.
        """
        model = self._model(estimator.net, estimator.context)
        criterion = self._criterion(estimator.loss, estimator.context)
        data, label = self._get_data_and_label(train_batch, estimator.context, batch_axis)
        with autograd.record():
            pred = model(data)
            loss = criterion(pred, label)
        parallel_backward(loss)
        return data, label, pred, loss

    def evaluate_batch(self, estimator: Any, val_batch: Any, batch_axis: int = 0) -> tuple:
        """Run ``val_net`` and ``val_loss`` on a batch; as :meth:`fit_batch`, without gradients."""
        model = self._model(estimator.val_net, estimator.context)
        criterion = self._criterion(estimator.val_loss, estimator.context)
        data, label = self._get_data_and_label(val_batch, estimator.context, batch_axis)
        pred = model(data)
        return data, label, pred, criterion(pred, label)

    def _get_data_and_label(self, batch, ctx, batch_axis=0):
        data, label = batch[0], batch[1]
        for name, value in (("data", data), ("label", label)):
            if not hasattr(value, "shape"):
                raise TypeError(
                    f"a batch must be (data, label), an array each, but its {name} is a "
                    f"{type(value).__name__}; override _get_data_and_label for other batches"
                )
        sizes = [value.shape[batch_axis : batch_axis + 1] for value in (data, label)]
        if sizes[0] != sizes[1] or not sizes[0]:
            raise ValueError(
                f"data of shape {data.shape} and label of shape {label.shape} must have the same "
                f"length along batch_axis={batch_axis}; override _get_data_and_label for others"
            )
        ctx = ctx[: sizes[0][0]]
        return [split_and_load(value, ctx, batch_axis, even_split=False) for value in batch[:2]]

    def _model(self, net, contexts):
        if isinstance(net, ModelDataParallel):
            if net.ctx_list != contexts:
                raise ValueError(
                    f"the model's ctx_list is {_names(net.ctx_list)}, but the estimator's context "
                    f"is {_names(contexts)}; give Estimator(context=...) the model's list"
                )
            return net
        key = net, tuple(contexts)
        if key not in self._wrapped:
            _check_parameters(net, contexts)
            self._wrapped[key] = ModelDataParallel(net, contexts)
        return self._wrapped[key]

    def _criterion(self, loss, contexts):
        key = loss, tuple(contexts)
        if key not in self._wrapped:
            self._wrapped[key] = DataParallelCriterion(loss, contexts)
        return self._wrapped[key]


def _names(contexts):
    return f"[{', '.join(map(str, contexts))}]"


def _check_parameters(net, contexts):
    """Raise ValueError if parameters on several devices would be moved.

    Estimator takes cpu(0) if it is given no context, wherever the parameters are.  Parameters on
    one device are copied to the estimator's; those on several were put there on purpose.
    """
    for parameter in net.collect_params().values():
        if contexts_of(parameter) is None:
            continue  # not initialized: nothing to worry about unless the network uses it
        there = parameter.list_ctx()
        if len(there) > 1 and set(there) != set(contexts):
            raise ValueError(
                f"{parameter.name} lies on {_names(there)}, but the estimator's context is "
                f"{_names(contexts)}; give Estimator(context=...) the list that "
                "net.initialize(ctx=...) got"
            )
