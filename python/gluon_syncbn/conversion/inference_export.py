"""Export for machines without this package: synchronized layers become MXNet's BatchNorm, or go."""

from __future__ import annotations

from typing import Any

import numpy as np
from mxnet import ndarray
from mxnet.contrib.amp.amp import bfloat16
from mxnet.gluon import HybridBlock

from ..mxnet_private import averaged, graph_of
from ..networks import unwrap
from .folding import fold as fold_graph
from .graph import Graph, Node
from .moving_average import to_batch_norm, write_centered_weights
from .rewriting import ConversionError, make_plain

_LOW = (np.float16, bfloat16)


def _exported(net, remove_amp_cast):
    """Return the network's graph, and {name: NDArray} of the parameters it reads."""
    sym = graph_of(net)
    if sym is None:
        raise RuntimeError(
            f"{net.name} has no graph yet; call net.hybridize() and then the network once before "
            "export_for_inference"
        )
    names = set(sym.list_inputs())
    try:
        parameters = {
            name: averaged(parameter).as_nd_ndarray()  # over the devices
            for name, parameter in net.collect_params().items()
            if name in names
        }
    except RuntimeError as error:  # also what it says of deferred initialization
        raise RuntimeError(
            f"{net.name} has parameters without values; initialize or load them, and call the "
            f"network once, before export_for_inference: {error}"
        ) from None
    with_casts = Graph(sym)
    if not remove_amp_cast or all(node.op != "amp_cast" for node in with_casts.nodes):
        return with_casts, parameters
    # Without the casts all is float32, parameters that amp has cast included.
    parameters = {
        name: ndarray.amp_cast(value, dtype="float32") if value.dtype in _LOW else value
        for name, value in parameters.items()
    }
    return Graph(sym, remove_amp_cast=True), parameters


def _norms(graph):
    return [node for node in graph.nodes if node.op == "BatchNorm"]


def _check(graph, parameters):
    for node in _norms(graph):
        shapes = {
            variable.name: parameters[variable.name].shape
            for variable, _ in node.inputs[1:]
            if variable.name in parameters  # else it is computed, or an input
        }
        if len(set(shapes.values())) > 1:
            described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ConversionError(
                f"{node.name}: its parameters differ in shape ({described}); load the parameters "
                "that belong to this network"
            )


def _write_ones(graph, parameters):
    """Write ones for gammas that fix_gamma overrides: ONNX's exporter takes gamma as it is."""
    uses = graph.uses()
    for node in _norms(graph):
        gamma, _ = node.inputs[1]
        if not node.flag("fix_gamma", True) or gamma.name not in parameters:
            continue
        ones = ndarray.ones_like(parameters[gamma.name])
        readers = [reader for reader, _ in uses[id(gamma)]]
        if all(
            r is not None and r.op == "BatchNorm" and r.flag("fix_gamma", True) for r in readers
        ):
            parameters[gamma.name] = ones
        else:
            own = Node("null", f"{node.name}_ones")
            parameters[own.name] = ones
            node.inputs[1] = own, 0


def export_for_inference(
    net: Any, path: str, epoch: int = 0, fold: bool = False, remove_amp_cast: bool = True
) -> tuple[str, str]:
    """Write a symbol and parameters that MXNet loads without this package.

    Like ``net.export``, with a plain ``BatchNorm`` node for every layer of this package.

    Parameters
    ----------
    net : HybridBlock or ModelDataParallel
        Hybridized and called once, as for ``net.export``.
    path : str
        Prefix of the files: ``path-symbol.json`` and ``path-0000.params`` (the epoch in four
        digits).
    epoch : int, default 0
    fold : bool, default False
        Fold each batch normalization into the convolution or dense layer right before it, if there
        is one and nothing else reads its output.  The rest stay ``BatchNorm`` nodes.  A
        :class:`CenConv2d` becomes a plain convolution, with the centred weight.
    remove_amp_cast : bool, default True
        As for ``net.export``: leave out the casts of ``mxnet.contrib.amp``; all parameters are then
        float32.  False keeps the casts and the dtypes of the parameters.

    Returns
    -------
    tuple of str
        The paths of the two files.

    Raises
    ------
    TypeError
        If ``net`` is not a HybridBlock.
    RuntimeError
        If the network has no graph, or parameters without values.
    ConversionError
        A ValueError: if the graph has a :func:`KeyBarrierSum`, an operator of this package in a
        loop, a layer with ``track_running_stats=False``, or parameters that do not fit each other.
        Then nothing is written.

    Notes
    -----
    ``mx.onnx.export_model`` takes the two files; it supports BatchNorm with ``axis=1`` only.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import SyncBatchNorm, export_for_inference
    >>> net = mx.gluon.nn.HybridSequential()
    >>> net.add(mx.gluon.nn.Dense(4), SyncBatchNorm())
    >>> net.initialize()
    >>> net.hybridize()
    >>> _ = net(mx.nd.ones((2, 3)))
    >>> import os, tempfile
    >>> files = export_for_inference(net, os.path.join(tempfile.mkdtemp(), "net"), fold=True)
    >>> [os.path.basename(file) for file in files]
    ['net-symbol.json', 'net-0000.params']
    """
    net = unwrap(net)
    if not isinstance(net, HybridBlock):
        raise TypeError(f"net must be a HybridBlock, but is a {type(net).__name__}")
    graph, parameters = _exported(net, remove_amp_cast)
    to_batch_norm(graph, parameters)
    make_plain(graph, inference=True)
    _check(graph, parameters)
    _write_ones(graph, parameters)
    if fold:
        write_centered_weights(graph, parameters)
        fold_graph(graph, parameters)
    sym = graph.symbol()
    saved = {f"arg:{name}": parameters[name] for name in sym.list_arguments() if name in parameters}
    saved.update({f"aux:{name}": parameters[name] for name in sym.list_auxiliary_states()})
    files = f"{path}-symbol.json", f"{path}-{epoch:04d}.params"
    sym.save(files[0], remove_amp_cast=False)
    ndarray.save(files[1], saved)
    return files
