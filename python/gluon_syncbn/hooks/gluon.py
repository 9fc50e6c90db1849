"""This package's part in Gluon's own work, below the call of a network.

Gluon initializes deferred parameters and traces hybridized blocks when they are first called, and
neither is safe in several threads.  When a device's thread needs it, the thread that called
ModelDataParallel does it, as on one device: in the same order, from the same random state.

Before a traced graph runs, the pass is announced to its all-reduces.  After a graph with
``static_shape`` has run, forward or backward, the engine is told that it wrote statistics: MXNet
does not tell it, so they could be read or saved before they are written.
"""

import copy
import threading
import weakref

from mxnet import autograd, context, ndarray
from mxnet.gluon import SymbolBlock

from .. import mxnet_private, passes, processes
from ..conversion.fusing import fuse
from ..conversion.graph import Graph
from ..conversion.operator_inputs import check_operators
from ..conversion.rewriting import EXCHANGES
from ..data_parallel import random_state
from ..data_parallel.device_threads import in_callers_thread
from ..data_parallel.exchanges import exchanges_of
from ..data_parallel.nested import arrays_in
from ..library import LIBRARY, check
from ..networks import blocks_of, changed_since, graph_version
from ..sync_batch_norm import SyncBatchNorm

_MXNETS = mxnet_private.gluon_steps()

_traces: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # HybridBlock -> its _Trace


class _RecordedRuns:
    """Runs of graphs whose backward will update statistics, until it comes.

    A run is known by the name that its first output has in autograd's graph, which is how it is
    told that a backward pass is one of this run.
    """

    _MOST = 1024  # no loop has more on their way; the oldest will have no backward

    def __init__(self):
        self._lock = threading.Lock()  # devices' threads add and take at the same time
        self._runs = {}  # name -> (weak reference to its _Trace, Context)

    def add(self, output, trace, where):
        graph = mxnet_private.recorded_graph(output.handle)
        if graph is None:
            return
        (name,) = graph.list_outputs()
        with self._lock:
            self._runs[name] = weakref.ref(trace), where
            if len(self._runs) > self._MOST:
                del self._runs[next(iter(self._runs))]

    def before_backward(self, heads, is_last):
        """Return the (_Trace, Context) of each run that a backward pass goes through."""
        if not self._runs:
            return []
        names = set()
        for head in heads:
            graph = mxnet_private.recorded_graph(head)
            if graph is not None:
                names.update(graph.get_internals().list_outputs())
        # In a device's thread, for that device alone.  MXNet's engine queues an operator on one
        # array after the other, so two threads that queue operators on the same arrays can each
        # come first on one of them, and both operators would wait for ever.
        device = context.current_context() if random_state.is_device_thread() else None
        with self._lock:
            found = [
                name
                for name, (_, where) in self._runs.items()
                if name in names and device in (None, where)
            ]
            take = self._runs.pop if is_last else self._runs.get
            runs = dict.fromkeys(take(name) for name in found)
        alive = ((trace(), where) for trace, where in runs)
        return [(trace, where) for trace, where in alive if trace is not None]


_recorded = _RecordedRuns()


class _Trace:
    """The work around each run of a block's traced graph.

    Parameters
    ----------
    block : HybridBlock
    """

    def __init__(self, block):
        self.version = graph_version()
        self.exchanges = exchanges_of(block)
        self.has_static_shape = mxnet_private.has_static_shape(block)
        self._runs = {}  # Context -> (whether the last run was in training, what it writes last)
        late = {id(p): p for e in self.exchanges for p in e.late_statistics}
        self._late = list(late.values())
        self._parameters = list(block.collect_params().values())

    def before(self, where):
        """Before a run on a device."""
        if self.has_static_shape and where in self._runs:
            # The graph has one flag for all its runs that says whether it trains.
            training, last = self._runs[where]
            if training != autograd.is_training():
                last.wait_to_read()
        passes.begin(self.exchanges, where)

    def after(self, where, outputs):
        """After a run on a device, which need not be complete."""
        if not self.has_static_shape:
            return
        last = self._runs[where][1] if where in self._runs else ndarray.zeros(1, ctx=where)
        statistics = {
            id(p): p for e in self.exchanges for p in e.statistics if mxnet_private.has_data(p)
        }
        written = [last, *(p.data(where) for p in statistics.values())]
        check(LIBRARY.Fence(*passes.handles(list(arrays_in(outputs))), *passes.handles(written)))
        self._runs[where] = autograd.is_training(), last
        if self._late and autograd.is_recording():
            _recorded.add(next(arrays_in(outputs)), self, where)

    def after_backward(self, where):
        """After a backward pass through a run on a device, which need not be complete.

        A layer updates statistics when it computes the gradient of its input, which that of a
        parameter before it depends on.  Parameters may have been frozen or moved since the graph
        was traced.
        """
        gradients = [
            p.grad(where) for p in self._parameters if p.grad_req != "null" and _is_on(p, where)
        ]
        written = [p.data(where) for p in self._late if _is_on(p, where)]
        check(LIBRARY.Fence(*passes.handles(gradients), *passes.handles(written)))


def _is_on(parameter, where):
    return mxnet_private.has_data(parameter) and where in parameter.list_ctx()


def _after_backward(runs):
    for trace, where in runs:
        trace.after_backward(where)


def _traced(block, args):
    """Return what belongs to a block's graph, which is traced first if it has to be."""
    if block in _traces and mxnet_private.is_traced(block):
        trace = _traces[block]
        if trace.version == graph_version():
            return trace
        if not changed_since(block, trace.version):
            trace.version = graph_version()
            return trace
    return in_callers_thread(lambda: _trace(block, args))


def _trace(block, args):
    if block in _traces and changed_since(block, _traces[block].version):
        mxnet_private.forget_trace(block)
    if not mxnet_private.is_traced(block) or block not in _traces:
        if not mxnet_private.is_traced(block):
            mxnet_private.trace(block, *args)
        _traces[block] = _Trace(block)
    return _traces[block]


def _run_graph(block, *args):
    trace = _traced(block, args)
    where = context.current_context()
    trace.before(where)
    with passes.ordered_calls():
        outputs = _MXNETS.run_graph(block, *args)
    trace.after(where, outputs)
    return outputs


def _get_symbol(block, *args):
    is_new = mxnet_private.graph_of(block) is None
    inputs, sym = _MXNETS.get_symbol(block, *args)
    if is_new:
        layers = (layer for layer in blocks_of(block) if isinstance(layer, SyncBatchNorm))
        gammas = {layer.gamma.name for layer in layers if mxnet_private.settings(layer).get("fuse")}
        if gammas:
            graph = Graph(sym)
            if fuse(graph, gammas):
                sym = graph.symbol()
                mxnet_private.set_traced_graph(block, sym)
        if processes.any_connected():
            nodes = (node for node in Graph(sym).nodes if node.op in EXCHANGES)
            processes.number_calls((n.attrs["key"], int(n.attrs.get("call", 0))) for n in nodes)
    return inputs, sym


def _build(block, *args, **kwargs):
    def build():
        for loaded in blocks_of(block):
            if isinstance(loaded, SymbolBlock):
                check_operators(Graph(mxnet_private.graph_of(loaded)))
        _MXNETS.build_graph(block, *args, **kwargs)
        _traces[block] = _Trace(block)

    in_callers_thread(build)


def _infer_shape(block, *args):
    in_callers_thread(lambda: _MXNETS.infer_shapes(block, *args))


def _initialize(parameter):
    if mxnet_private.is_deferred(parameter):
        in_callers_thread(lambda: _initialize_at_once(parameter))


def _initialize_at_once(parameter):
    """Initialize a deferred parameter; other threads see it before or after, not between."""
    if mxnet_private.has_own_initialization(parameter):
        # hvd.broadcast_parameters makes it one that knows this object and would not see a copy.
        _MXNETS.initialize(parameter)
        return
    ready = copy.copy(parameter)
    _MXNETS.initialize(ready)
    mxnet_private.publish_initialized(parameter, ready)


def install() -> None:
    """Take part from now on."""
    mxnet_private.watch_backward(_recorded.before_backward, _after_backward)
    mxnet_private.set_gluon_steps(
        mxnet_private.GluonSteps(_get_symbol, _build, _run_graph, _infer_shape, _initialize)
    )
