"""Where this package takes part in Gluon's own work, below the calls of any network.

Gluon initializes deferred parameters and traces hybridized blocks when they are first called, and
neither is safe in several threads.  What a device's thread needs of that is done in the thread
that called ModelDataParallel, as on one device: in the same order, from the same random state.

Before a traced graph runs, the pass is announced to its exchanges.  After a graph with
``static_shape`` has run, the engine is told that its statistics were written: MXNet does not tell
it, so that whoever reads or saves them could come too early.
"""

import copy
import weakref

from mxnet import autograd, context, ndarray
from mxnet.gluon import HybridBlock
from mxnet.gluon.parameter import Parameter

from . import passes
from .device_threads import in_callers_thread
from .exchanges import edited_since, exchanges_of, last_edit
from .library import LIBRARY, check
from .shares import arrays_in

_build_cache = HybridBlock._build_cache
_call_cached_op = HybridBlock._call_cached_op
_deferred_infer_shape = HybridBlock._deferred_infer_shape
_finish_deferred_init = Parameter._finish_deferred_init

_traces = weakref.WeakKeyDictionary()  # HybridBlock -> _Trace of its graph


class _Trace:
    """What a block's traced graph needs around each run.

    Parameters
    ----------
    block : HybridBlock
    """

    def __init__(self, block):
        self.edit = last_edit()
        self.exchanges = exchanges_of(block)
        self.has_static_shape = bool(dict(block._flags).get("static_shape"))
        self._runs = {}  # Context -> (whether the last run was in training, what it writes last)

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
        statistics = {id(p): p for e in self.exchanges for p in e.statistics if p._data}
        written = [last, *(p.data(where) for p in statistics.values())]
        check(
            LIBRARY.GluonSyncBNFence(
                *passes.handles(list(arrays_in(outputs))), *passes.handles(written)
            )
        )
        self._runs[where] = autograd.is_training(), last


def _traced(block, args):
    """What belongs to a block's graph, which is traced first where it has to be."""
    if block in _traces and block._cached_op is not None:
        trace = _traces[block]
        if trace.edit == last_edit():
            return trace
        if not edited_since(block, trace.edit):
            trace.edit = last_edit()
            return trace
    return in_callers_thread(lambda: _trace(block, args))


def _trace(block, args):
    if block in _traces and edited_since(block, _traces[block].edit):
        block._clear_cached_op()
    if block._cached_op is None or block not in _traces:
        if block._cached_op is None:
            block._build_cache(*args)
        _traces[block] = _Trace(block)
    return _traces[block]


def _run_graph(block, *args):
    trace = _traced(block, args)
    where = context.current_context()
    trace.before(where)
    with passes.ordered_calls():
        outputs = _call_cached_op(block, *args)
    trace.after(where, outputs)
    return outputs


def _build(block, *args, **kwargs):
    def build():
        _build_cache(block, *args, **kwargs)
        _traces[block] = _Trace(block)

    in_callers_thread(build)


def _infer_shape(block, *args):
    in_callers_thread(lambda: _deferred_infer_shape(block, *args))


def _initialize(parameter):
    if parameter._deferred_init:
        in_callers_thread(lambda: _initialize_at_once(parameter))


def _initialize_at_once(parameter):
    """Initialize a deferred parameter so that other threads see it before or after, not between."""
    ready = copy.copy(parameter)
    _finish_deferred_init(ready)
    state = vars(ready)
    last = {name: state.pop(name) for name in ("_data", "_deferred_init")}
    vars(parameter).update(state)
    parameter._data = last["_data"]  # from here on nobody asks whether it is deferred
    parameter._deferred_init = last["_deferred_init"]


def install():
    """Take part from now on; at import, once."""
    HybridBlock._build_cache = _build
    HybridBlock._call_cached_op = _run_graph
    HybridBlock._deferred_infer_shape = _infer_shape
    Parameter._finish_deferred_init = _initialize
