"""Moving statistics estimated over a data set, with the network as it is now.

Training averages statistics over batches while the weights change, and with small batches averages
little else than noise.  Before evaluation they can be computed from many batches with the final
weights: "precise batch normalization" (Wu and Johnson, "Rethinking 'Batch' in BatchNorm",
https://arxiv.org/abs/2105.07576, section 3).

A layer's own update gives the statistics of a batch: from a moving mean of 0, one use of the layer
leads to (1 - momentum) * mean.  So any graph, hybridized in any way, can be asked, and only
parameters are written.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Iterable

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.context import num_gpus
from mxnet.gluon import Block, SymbolBlock

from ..conversion.estimation_mode import estimation_mode
from ..conversion.fusing import NORMALIZATIONS
from ..conversion.graph import Graph
from ..conversion.operator_inputs import states_of
from ..mxnet_private import contexts_of, graph_of, has_data, settings
from ..networks import blocks_of
from ..sync_batch_norm import SyncBatchNorm
from . import device_threads
from .exchanges import exchanges_of
from .gluoncv_model import DataParallelModel
from .model import ModelDataParallel
from .nested import arrays_in
from .whole_batches import cut

# A variance is never negative, so one that still is has not been moved.  It is too small to change
# what it is added to.
_UNMOVED = -1e-30
# A moving mean so far from others that the noise of a network that is not deterministic is small.
_FAR = 1e4


def recalibrate(model: Any, batches: Iterable) -> int:
    """Estimate the moving statistics of a network anew, over a data set.

    Runs the network forward, in training mode, over batches, and sets the moving statistics of
    every layer to the mean and the variance of all samples together, not to averages over batches:

    .. math:: \\mu = \\frac{\\sum_b n_b \\mu_b}{\\sum_b n_b}, \\qquad
       \\sigma^2 = \\frac{\\sum_b n_b (\\sigma_b^2 + (\\mu_b - \\mu)^2)}{\\sum_b n_b}

    for batches of :math:`n_b` samples with mean :math:`\\mu_b` and biased variance
    :math:`\\sigma_b^2`.  This is "precise batch normalization" [1]_, as people do it before they
    evaluate a network that was trained with small batches.

    Parameters
    ----------
    model : Block, ModelDataParallel or DataParallelModel
        Initialized.
    batches : iterable
        What ``model`` takes, one entry a call: an array for a Block; a list of shards for
        :class:`ModelDataParallel`; a whole batch for :class:`DataParallelModel`.  A tuple is the
        arguments of a call with several.  (From a data loader that also yields labels:
        ``(data for data, label in loader)``.)

    Returns
    -------
    int
        The number of batches; 0, with ``batches`` left alone, if no layer has moving statistics.

    Raises
    ------
    TypeError
        If ``model`` is none of these.
    ValueError
        If there are no batches or no samples in them; if a layer has a momentum of 1, which lets
        nothing move, or statistics come out as infinite or NaN; if a layer is synchronized over
        several devices and ``model`` is a Block, which runs on one; or (ConversionError) if a batch
        normalization is of a kind that :func:`convert_sync_batchnorm` does not know.
    Exception
        Whatever ``batches`` or the network raises.  After any exception the old statistics are
        back.

    Notes
    -----
    **Layers.** :class:`SyncBatchNorm`, MXNet's ``nn.BatchNorm`` and ``contrib.nn.SyncBatchNorm``,
    and the same in graphs (``SymbolBlock``).  Those with ``use_global_stats`` or with
    ``track_running_stats=False`` are left alone, as is a layer that no batch reaches.  Samples are
    counted by the first dimension of the first array.  Normalization is by the batch, as in
    training: synchronized layers by all devices' samples, others by those of one device; the
    statistics that are set are over all samples in any case, the same on all devices, also with
    ``group_size``.  (Weights of samples count within a batch, not between batches.)  The averages
    of ``renorm`` and of :class:`MABN2d` are no estimates of this kind, and stay as they were.  A
    layer that is used several times in a forward pass gets an average over its
    uses, in which later ones weigh slightly more.  ``num_batches_tracked`` becomes the number of
    batches.

    **The rest of the network** stays as it is: no gradient is recorded and nothing else is written.
    ``nn.Dropout``, and Dropout in graphs of a ``SymbolBlock``, is switched off (an ``F.Dropout``
    that a block calls itself is not found).  A hybridized network with Dropout or MXNet's own
    layers is traced once more for that; one without is not traced anew.

    **Cost.** One forward pass a batch, and one more for the first batch.

    References
    ----------
    .. [1] Wu and Johnson, "Rethinking 'Batch' in BatchNorm", https://arxiv.org/abs/2105.07576

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import SyncBatchNorm, recalibrate
    >>> net = SyncBatchNorm(in_channels=1)
    >>> net.initialize()
    >>> recalibrate(net, [mx.nd.array([[1], [2]]), mx.nd.array([[6]])])
    2
    >>> net.running_mean.data().asscalar().round(3), net.running_var.data().asscalar().round(3)
    (3.0, 4.667)
    """
    runner = _Runner(model)
    # With static_shape, MXNet does not tell its engine that a graph moves statistics of its own
    # BatchNorm; a step that is on its way could move what is set here.
    device_threads.wait_for_all()
    with estimation_mode(runner.net), autograd.pause():
        layers = _layers_of(runner)
        return _recalibrate(runner, layers, iter(batches)) if layers else 0


class _Runner:
    """A model and how to call it, and the devices of a call with the samples that each gets."""

    def __init__(self, model):
        self.devices = None  # in their order; None: a Block, on whichever its input is
        if isinstance(model, DataParallelModel):
            self._cut = True
            model = model.module if model.ctx_list is None else model._model
        else:
            self._cut = False
        self._model = model
        if isinstance(model, ModelDataParallel):
            self.net, self.devices = model.net, model.ctx_list
        elif isinstance(model, Block):
            self.net = model
        else:
            raise TypeError(
                "model must be a Block, a ModelDataParallel or a DataParallelModel, but is a "
                f"{type(model).__name__}"
            )

    def arguments(self, batch):
        """Return the arguments of a call, and {device: samples}."""
        args = batch if isinstance(batch, tuple) else (batch,)
        if self.devices is None:
            arrays = list(arrays_in(args))[:1]
        else:
            if self._cut:
                args, _ = cut(self.devices, args, {})
            arrays = arrays_in(args[0])  # the list with an entry for each device
        samples = {}
        for array in arrays:
            samples.setdefault(array.context, array.shape[0] if array.shape else 1)
        return args, samples

    def run(self, args, training):
        with autograd.pause(train_mode=training):
            for output in arrays_in(self._model(*args)):
                output.wait_to_read()


class _Layer:
    """The moving statistics of one layer, and the estimate of what they should be.

    Parameters
    ----------
    exchange : Exchange
        The layer, as a pass sees it.
    momentum : float or None
    """

    def __init__(self, exchange, momentum):
        self._exchange, self._momentum = exchange, momentum
        self.group_size = 1 if exchange.local else exchange.group_size
        self.estimated = exchange.statistics[: 3 if momentum is None else 2]
        self.mean, self.var, *self._batches = self.estimated
        self._uses = 1  # in a forward pass
        self._count, self._mean, self._m2 = 0, 0.0, 0.0

    def check(self, devices):
        """Raise ValueError if the layer's statistics cannot be estimated on some devices."""
        name, needed = self._exchange.name, self._exchange.num_devices or max(num_gpus(), 1)
        if self._momentum == 1:
            raise ValueError(
                f"{name} has a momentum of 1, so its statistics never move; give it another one"
            )
        if devices is None and self.group_size != 1 and max(needed, self.group_size or 1) > 1:
            raise ValueError(
                f"{name} is synchronized over several devices, but a Block runs on one; give "
                "recalibrate the ModelDataParallel that runs it on all"
            )

    def start(self, mean):
        """Set the statistics to what they move from in the next batch."""
        for parameter, value in ((self.mean, mean), (self.var, _UNMOVED)):
            _set(parameter, value)
        for parameter in self._batches:
            _set(parameter, 0)

    def read(self, device):
        """Return the moving mean and variance on a device, or None if they have not moved."""
        mean, var = (_value(p, device) for p in (self.mean, self.var))
        unmoved = var == np.asarray(_UNMOVED, var.dtype)
        return None if unmoved.all() else (mean.astype("float64"), var.astype("float64"))

    def count_uses(self, near, far):
        """Find how often a forward pass uses the layer, from runs of a batch from 0 and _FAR."""
        if not self._momentum or near is None:  # None: a plain average; 0: the last use alone
            return
        kept = np.median((far[0] - near[0]) / _FAR)  # momentum**uses
        if kept > 0:
            self._uses = max(1, round(math.log(kept) / math.log(self._momentum)))

    def add(self, statistics, samples):
        """Merge the statistics of some samples, which the layer's update led to from zero."""
        moved = 1 if self._momentum is None else 1 - self._momentum**self._uses
        mean, var = statistics[0] / moved, np.maximum(statistics[1] / moved, 0)
        # Chan, Golub and LeVeque, as in src/operator/kernels/batch_norm_math.h.
        count = self._count + samples
        distance = mean - self._mean
        self._m2 = self._m2 + samples * var + distance**2 * (self._count * samples / count)
        self._mean = self._mean + distance * (samples / count)
        self._count = count

    def finish(self, number):
        """Set the statistics to the estimate; return whether there is one."""
        if not self._count:
            return False
        mean, var = self._mean, self._m2 / self._count
        if not (np.isfinite(mean).all() and np.isfinite(var).all()):
            raise ValueError(
                f"the statistics of {self._exchange.name} are not finite; look for infinite or "
                "missing values in the batches, and for weights that have diverged"
            )
        for parameter, value in ((self.mean, mean), (self.var, var)):
            _set(parameter, value)
        for parameter in self._batches:
            _set(parameter, number)
        return True


def _recalibrate(runner, layers, batches):
    first = next(batches, None)
    if first is None:
        raise ValueError("there are no batches; give one at least")
    args, samples = runner.arguments(first)
    moving = {p for e in exchanges_of(runner.net) for p in e.statistics}
    if not all(_is_placed(p, runner.devices) for p in moving):
        runner.run(args, training=False)  # initializes what is deferred
    layers = [layer for layer in layers if has_data(layer.mean)]
    saved = {p: [a.copy() for a in p.list_data()] for p in moving if has_data(p)}
    try:
        _run_from(_FAR, runner, layers, args)
        device = next(iter(samples))
        far = [layer.read(device) for layer in layers]
        number = total = 0
        for batch in itertools.chain([first], batches):
            args, samples = runner.arguments(batch)
            _run_from(0.0, runner, layers, args)
            if number == 0:
                for layer, there in zip(layers, far):
                    layer.count_uses(layer.read(device), there)
            _merge(layers, runner.devices or list(samples), samples)
            number, total = number + 1, total + sum(samples.values())
        if total == 0:
            raise ValueError("the batches have no samples; give one at least")
        estimated = {p for layer in layers if layer.finish(number) for p in layer.estimated}
        _put_back(saved, saved.keys() - estimated)
    except BaseException:
        try:
            device_threads.wait_for_all()
        except mx.MXNetError:
            pass  # what was raised, or what it brought about
        _put_back(saved, saved)
        raise
    return number


def _run_from(mean, runner, layers, args):
    """Run a batch from moving means of this value."""
    for layer in layers:
        layer.start(mean)
    runner.run(args, training=True)


def _merge(layers, devices, samples):
    """Add the statistics of the batch that has just run from zero."""
    for layer in layers:
        for device, count in _groups(layer.group_size, devices, samples):
            statistics = layer.read(device)
            if statistics is not None:
                layer.add(statistics, count)


def _groups(size, devices, samples):
    """Yield, for each group of devices with the same statistics, one of them and all samples."""
    size = size or len(devices)
    for first in range(0, len(devices), size):
        present = [d for d in devices[first : first + size] if samples.get(d)]
        if present:
            yield present[0], sum(samples[d] for d in present)


def _layers_of(runner):
    """List the layers that have moving statistics and use them, shared ones once."""
    found = {}
    for block in blocks_of(runner.net):
        if isinstance(block, SyncBatchNorm):
            if block.track_running_stats and not settings(block)["use_global_stats"]:
                exchange = block.exchange
                layer = _Layer(exchange, settings(block)["momentum"])
                found.setdefault(exchange.statistics[0], layer)
        elif isinstance(block, SymbolBlock):
            for layer in _layers_in(block):
                found.setdefault(layer.mean, layer)
    layers = list(found.values())
    for layer in layers:
        layer.check(runner.devices)
    return layers


def _layers_in(block):
    exchanges = {e.statistics: e for e in exchanges_of(block)}
    for node in Graph(graph_of(block)).nodes:
        if node.op not in NORMALIZATIONS or node.flag("use_global_stats", False):
            continue
        if node.flag("use_batch_stats", False):
            continue
        statistics = tuple(block.params[source.name] for source, _ in states_of(node))
        average = node.flag("cumulative_average", False)
        yield _Layer(
            exchanges[statistics], None if average else float(node.attrs.get("momentum", 0.9))
        )


def _is_placed(parameter, devices):
    return has_data(parameter) and all(d in contexts_of(parameter) for d in devices or ())


def _value(parameter, device):
    return parameter.data(device).asnumpy()


def _set(parameter, value):
    for array in parameter.list_data():
        _write(array, value)


def _put_back(saved, parameters):
    for parameter in parameters:
        for array, value in zip(parameter.list_data(), saved[parameter]):
            _write(array, value.as_nd_ndarray())


def _write(array, value):
    array = array.as_nd_ndarray()
    array[:] = value
    # With static_shape, MXNet does not tell its engine that a graph uses statistics.
    array.wait_to_read()
