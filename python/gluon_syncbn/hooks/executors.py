"""Executors: symbols with our operators, bound by Module or by a program of your own.

Three things about how MXNet makes and runs an executor do not suit layers that wait for other
devices and update statistics in the forward pass.  Symbols without our operators pass through here
unchanged.

Mirroring.  ``MXNET_BACKWARD_DO_MIRROR`` makes the backward pass compute most operators again
instead of keeping their outputs (``need_mirror`` in MXNet's ``src/executor/graph_executor.cc``).
Ours would update their statistics, and all-reduce, twice a step.  The list of exceptions is fixed
there, but the attribute ``__force_mirroring__`` selects any operator.  So the variable is 0 while a
symbol of ours is bound, and the operators that it would have selected get the attribute.

Threads.  An executor holds the random state and the temporary space of the thread that binds it,
and a monitor takes those of the thread that runs it.  All CPU contexts of a thread share them, so
one device's later layers could hold what another's earlier layers wait for.  So if a graph has
all-reduces, its executor on a CPU is bound and run in its device's own thread (device_threads.py).

Order.  An executor does not tell the engine that it writes auxiliary states, and has one
is-training flag for all its runs.  So a fence after a training pass (and after backward, where that
updates states) makes every reader of the statistics wait for it, and a pass of the other kind waits
for the one before.
"""

import contextlib
import functools
import os
import threading

from mxnet.executor import Executor
from mxnet.symbol import Symbol

from ..conversion.graph import Graph
from ..conversion.operator_inputs import check_operators
from ..conversion.rewriting import EXCHANGES
from ..data_parallel import device_threads, random_state
from ..library import LIBRARY, OPERATORS, check
from ..operators import group_size_of
from ..passes import handles
from .module_keys import give_own_keys

MIRROR_VARIABLE = "MXNET_BACKWARD_DO_MIRROR"
_FORCE = "__force_mirroring__"
# Excepted by MXNet; Dropout even from the attribute.  A Custom operator takes no such attribute.
_NEVER_MIRRORED = ("Convolution", "FullyConnected", "Concat", "SoftmaxOutput", "Dropout", "Custom")

_lock = threading.Lock()


def _mirrors():
    with _lock:
        return os.environ.get(MIRROR_VARIABLE, "0") not in ("", "0")


@contextlib.contextmanager
def _mirroring_off():
    """Set the variable to 0; a symbol that another thread binds now is not mirrored either."""
    with _lock:
        value = os.environ.get(MIRROR_VARIABLE)
        if value is None:
            yield
            return
        # Never deleted: MXNet's threads may be reading, which replacing a value does not disturb.
        os.environ[MIRROR_VARIABLE] = "0"
        try:
            yield
        finally:
            os.environ[MIRROR_VARIABLE] = value


def _operators(node):
    return {node.op, *(inner.op for inner in node.inside())}


def _compute_once(graph):
    """Select what MXNet would mirror, less our operators; return whether the graph changed."""
    everything = changed = _mirrors()
    for node in graph.nodes:
        if _operators(node) & OPERATORS.keys():
            changed |= node.attrs.pop(_FORCE, None) is not None
        elif everything and not node.is_variable and node.op not in _NEVER_MIRRORED:
            node.attrs[_FORCE] = "True"
    return changed


def _has_all_reduces(graph):
    return any(
        inner.op in EXCHANGES and inner.attrs.get("num_devices") != "1"
        for node in graph.nodes
        for inner in (node, *node.inside())
    )


class _Executor(Executor):
    """An executor of a symbol with our operators; made of one that MXNet has bound."""

    _run = None  # runs a function: right here, or in the device's thread
    _grouped = None  # the name of a layer that is synchronized over groups
    _training = None  # the last forward
    _updates_late = False  # whether backward updates auxiliary states

    def forward(self, is_train=False, **kwargs):
        training = bool(is_train)
        if training and self._grouped is not None:
            raise RuntimeError(
                f"{self._grouped} has a group_size, but an executor (Module) does not say which "
                "devices are a group; train the graph as a SymbolBlock in ModelDataParallel"
            )
        if self._training not in (None, training):
            for output in self.outputs:
                output.wait_to_read()
        self._training = training
        outputs = self._run(lambda: Executor.forward(self, is_train, **kwargs))
        if training:
            check(LIBRARY.Fence(*handles(outputs), *handles(self.aux_arrays)))
        return outputs

    def backward(self, out_grads=None, is_train=True):
        self._run(lambda: Executor.backward(self, out_grads, is_train))
        if self._updates_late:
            gradients = [g for g in self.grad_arrays if g is not None]
            check(LIBRARY.Fence(*handles(gradients), *handles(self.aux_arrays)))

    def reshape(self, partial_shaping=False, allow_up_sizing=False, **kwargs):
        def bind():
            with _mirroring_off():
                return Executor.reshape(self, partial_shaping, allow_up_sizing, **kwargs)

        return _adopt(self._run(bind), self._run, self._grouped, self._updates_late)


def _adopt(executor, run, grouped, updates_late):
    executor.__class__ = _Executor
    executor._run, executor._grouped, executor._updates_late = run, grouped, updates_late
    return executor


def _grouped_in(graph):
    """Return the name of a node that all-reduces over groups, or None."""
    exchanges = (node for node in graph.nodes if node.op in EXCHANGES)
    return next((node.name for node in exchanges if group_size_of(node.attrs)), None)


def _here(function):
    return function()


def _adapted(bind):
    @functools.wraps(bind)
    def bind_ours(self, ctx, *args, **kwargs):
        content = self.tojson(remove_amp_cast=False)
        if not any(f'"{name}"' in content for name in OPERATORS):
            return bind(self, ctx, *args, **kwargs)
        graph = Graph(self)
        check_operators(graph)
        run = _here
        if ctx.device_type != "gpu" and _has_all_reduces(graph):
            random_state.begin()
            run = functools.partial(device_threads.run_on, ctx)
        renamed, selected = give_own_keys(graph), _compute_once(graph)
        symbol = graph.symbol() if renamed or selected else self

        def bind_it():
            with _mirroring_off():
                return bind(symbol, ctx, *args, **kwargs)

        late = '"_syncbn_mabn_moments"' in content
        return _adopt(run(bind_it), run, _grouped_in(graph), late)

    return bind_ours


def install() -> None:
    """Make ``Symbol.bind`` and ``Symbol.simple_bind`` fit our operators."""
    Symbol.bind, Symbol.simple_bind = _adapted(Symbol.bind), _adapted(Symbol.simple_bind)
