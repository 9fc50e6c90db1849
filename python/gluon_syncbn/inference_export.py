"""Export for machines without this package: synchronized layers become MXNet's BatchNorm, or go."""

import os
import tempfile

from mxnet import model, ndarray
from mxnet.gluon import HybridBlock

from .device_threads import settle
from .folding import fold as fold_graph
from .graph import Graph
from .graph_conversion import ConversionError, make_plain
from .model_data_parallel import ModelDataParallel


def _exported(net):
    """What ``net.export`` writes, as (symbol, {name: NDArray})."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "net")
        try:
            net.export(prefix)
        except RuntimeError as error:
            if "hybridize" not in str(error):
                raise
            raise RuntimeError(
                f"{net.name} has no graph yet; call net.hybridize() and then the network once, on "
                "an input of the size it is to be used for, before export_for_inference"
            ) from None
        sym, arguments, states = model.load_checkpoint(prefix, 0)
    return sym, {**arguments, **states}


def _check_shapes(graph, parameters):
    for node in graph.nodes:
        if node.op != "BatchNorm":
            continue
        shapes = {}
        for variable, _ in node.inputs[1:]:
            if variable.name not in parameters:
                raise ConversionError(f"{node.name}: {variable.name} has no value")
            shapes[variable.name] = parameters[variable.name].shape
        if len(set(shapes.values())) > 1:
            described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ConversionError(
                f"{node.name}: its parameters differ in shape ({described}); load the parameters "
                "that belong to this network"
            )


def _fix_gammas(graph, parameters):
    """Write what fix_gamma means: other readers of the file, as ONNX's, take gamma as it is."""
    for node in graph.nodes:
        if node.op == "BatchNorm" and node.flag("fix_gamma", True):
            gamma = node.inputs[1][0].name
            parameters[gamma] = ndarray.ones_like(parameters[gamma])


def export_for_inference(net, path, epoch=0, fold=False):
    """Write a symbol and parameters that MXNet loads without this package.

    As ``net.export``, with every synchronized batch normalization a plain ``BatchNorm`` node.

    Parameters
    ----------
    net : HybridBlock or ModelDataParallel
        Hybridized and called once, as for ``net.export``.
    path : str
        Writes ``path-symbol.json`` and ``path-0000.params`` (the epoch in four digits).
    epoch : int, default 0
    fold : bool, default False
        Fold each batch normalization into the convolution or dense layer right before it, where
        there is one and nothing else reads its output.  The rest stay ``BatchNorm`` nodes.

    Returns
    -------
    tuple of str
        The two files.

    Raises
    ------
    TypeError
        If ``net`` is no HybridBlock.
    RuntimeError
        If the network has no graph yet.
    ConversionError
        A ValueError: if the graph has an operator of this package that is no batch normalization
        (KeyBarrierSum), or parameters that do not fit each other.  Nothing is written then.

    Notes
    -----
    ``mx.onnx.export_model`` takes the two files; it has no BatchNorm with an axis other than 1.

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
    if isinstance(net, ModelDataParallel):
        net = net.net
    if not isinstance(net, HybridBlock):
        raise TypeError(f"net must be a HybridBlock, but is a {type(net).__name__}")
    settle()  # a graph with static_shape writes statistics behind the engine's back
    sym, parameters = _exported(net)
    graph = Graph(sym)
    make_plain(graph)
    _check_shapes(graph, parameters)
    _fix_gammas(graph, parameters)
    if fold:
        fold_graph(graph, parameters)
    sym = graph.symbol()
    saved = {f"arg:{name}": parameters[name] for name in sym.list_arguments() if name in parameters}
    saved.update({f"aux:{name}": parameters[name] for name in sym.list_auxiliary_states()})
    files = f"{path}-symbol.json", f"{path}-{epoch:04d}.params"
    sym.save(files[0])
    ndarray.save(files[1], saved)
    return files
