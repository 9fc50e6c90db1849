"""MXNet's private parts, all that this package touches of them.

MXNet 1.9.1 is the last of its line, so they will not change; but whoever builds a fork of it finds
here, and only here, what must stay.  Each function says what it does in public terms.
"""

from __future__ import annotations

import ctypes
import inspect
from collections import namedtuple
from typing import Any, Callable

from mxnet import ndarray, optimizer, symbol
from mxnet.base import _LIB, NDArrayHandle, OpHandle, SymbolHandle, c_str, check_call
from mxnet.contrib.amp import amp
from mxnet.gluon import HybridBlock, nn
from mxnet.gluon.block import _BlockScope
from mxnet.gluon.parameter import Parameter
from mxnet.name import NameManager
from mxnet.ndarray.register import _make_ndarray_function
from mxnet.symbol.numpy import _Symbol as NumpySymbol
from mxnet.symbol.register import _make_symbol_function

__all__ = ["NumpySymbol"]

# --- operators


def internal(F: Any) -> Any:
    """Return the module of ``mx.nd`` or ``mx.sym`` that holds operators without a public name."""
    return F._internal


def with_shape_of(F: Any, value: Any, other: Any) -> Any:
    """Return ``value``, letting MXNet infer its shape and that of ``other`` from each other."""
    return internal(F)._identity_with_attr_like_rhs(value, other)


def make_operator_functions(operator: str, submodule: str, name: str) -> None:
    """Create ``mx.nd.submodule.name`` and ``mx.sym.submodule.name`` for a registered operator."""
    handle = OpHandle()
    check_call(_LIB.NNGetOpHandle(c_str(operator), ctypes.byref(handle)))
    for root, make in ((ndarray, _make_ndarray_function), (symbol, _make_symbol_function)):
        module = getattr(root, submodule)
        function = make(handle, operator, name)
        function.__module__ = module.__name__
        setattr(module, name, function)


def set_attribute(variable: Any, name: str, value: str) -> None:
    """Set an attribute of a symbol's variable."""
    variable._set_attr(**{name: value})


def operator_name(name: str | None, hint: str) -> str:
    """Name an operator as MXNet does: numbered without a name, with the prefix of the scope."""
    if not hasattr(NameManager._current, "value"):  # the first use in a thread
        NameManager._current.value = NameManager()
    return NameManager._current.value.get(name, hint)


# --- parameters and trainers


def has_data(parameter: Any) -> bool:
    """Whether a parameter has been initialized, not only promised to be."""
    return bool(parameter._data)


def contexts_of(parameter: Any) -> list | None:
    """Return where a parameter lies or will lie; None if it is not to be initialized.

    Gluon makes a new list whenever it moves a parameter.
    """
    if parameter._data is not None:
        return parameter._ctx_list
    return parameter._deferred_init[1] if parameter._deferred_init else None


def is_deferred(parameter: Any) -> bool:
    """Whether a parameter waits for its shape to be initialized."""
    return bool(parameter._deferred_init)


def storage_type(parameter: Any) -> str:
    """Return ``'default'``, ``'row_sparse'`` or ``'csr'``."""
    return parameter._stype


def averaged(parameter: Any) -> Any:
    """Return the average of a parameter over its devices."""
    return parameter._reduce()


def mark_gradient_fresh(array: Any) -> None:
    """Let Trainer take the array's gradient as one of this step."""
    array._fresh_grad = True


def trainer_of(parameter: Any) -> Any:
    """Return the Trainer that updates a parameter, or None."""
    return parameter._trainer


def has_stepped(trainer: Any) -> bool:
    """Whether a Trainer has made a step, after which it cannot change its devices."""
    return trainer._kv_initialized


def trainer_contexts(trainer: Any) -> list:
    """Return the devices that a Trainer updates."""
    return trainer._contexts


def move_trainer(trainer: Any, contexts: list) -> None:
    """Give a Trainer that has made no step other devices."""
    trainer._contexts = list(contexts)
    trainer._updaters = [optimizer.get_updater(trainer._optimizer) for _ in contexts]


def has_own_initialization(parameter: Any) -> bool:
    """Whether a program has given a parameter another way to be initialized, as Horovod does."""
    return "_init_impl" in vars(parameter)


def publish_initialized(parameter: Any, ready: Any) -> None:
    """Make a parameter what its initialized copy is; other threads see all of it or nothing."""
    state = vars(ready)
    last = {name: state.pop(name) for name in ("_data", "_deferred_init")}
    vars(parameter).update(state)
    parameter._data = last["_data"]  # from here on it no longer counts as deferred
    parameter._deferred_init = last["_deferred_init"]


# --- blocks


def children(block: Any) -> list:
    """Return the blocks that are registered in a block."""
    return list(block._children.values())


def settings(layer: Any) -> dict:
    """Return what a batch normalization layer passes to its operator, for reading and writing."""
    return layer._kwargs


def is_batch_norm(block: Any) -> bool:
    """Whether a block is batch normalization of any kind."""
    return isinstance(block, nn.basic_layers._BatchNorm)


def forget_parameter(block: Any, name: str) -> None:
    """Take a parameter out of a block, if it has it."""
    parameter = block._reg_params.pop(name, None)
    if parameter is not None:
        block.params._params.pop(parameter.name, None)
        vars(block).pop(name, None)


def has_static_shape(block: Any) -> bool:
    """Whether a block was hybridized with ``static_shape=True``."""
    return bool(dict(block._flags).get("static_shape"))


def is_traced(block: Any) -> bool:
    """Whether a hybridized block has a graph that is ready to run."""
    return block._cached_op is not None


def trace(block: Any, *args: Any) -> None:
    """Trace a hybridized block, for arguments as those of a call."""
    block._build_cache(*args)


def graph_of(block: Any) -> Any:
    """Return the symbol of a traced HybridBlock or of a SymbolBlock, or None."""
    return block._cached_graph[1] if block._cached_graph else None


def set_graph_of(block: Any, sym: Any) -> None:
    """Replace a SymbolBlock's graph."""
    inputs, _ = block._cached_graph
    block._cached_graph = inputs, sym
    block._clear_cached_op()


def forget_trace(block: Any) -> None:
    """Let a hybridized block be traced anew at its next call."""
    block._clear_cached_op()


def kept_trace(block: Any) -> Any:
    """Return what was traced of a hybridized block, for :func:`put_back_trace`."""
    return block._cached_graph


def put_back_trace(block: Any, trace: Any) -> None:
    """Give a block a graph that was traced before, in place of its own."""
    forget_trace(block)
    block._cached_graph = trace


def dropout_rate(layer: Any) -> float:
    """Return the rate of an ``nn.Dropout``."""
    return layer._rate


def set_dropout_rate(layer: Any, rate: float) -> None:
    """Set the rate of an ``nn.Dropout``; graphs that were traced before keep theirs."""
    layer._rate = rate


def is_tracing() -> bool:
    """Whether a block is being traced, or named, in this thread."""
    return getattr(_BlockScope._current, "value", None) is not None


def set_traced_graph(block: Any, sym: Any) -> None:
    """Replace the symbol that a HybridBlock has just been traced to."""
    inputs, _ = block._cached_graph
    block._cached_graph = inputs, sym


# What Gluon does below the call of a block: trace it to a symbol, make a graph of that, run the
# graph, infer the shapes of its deferred parameters, initialize one of them.
GluonSteps = namedtuple("GluonSteps", "get_symbol build_graph run_graph infer_shapes initialize")

_GLUON_STEPS = (
    (HybridBlock, "_get_graph"),
    (HybridBlock, "_build_cache"),
    (HybridBlock, "_call_cached_op"),
    (HybridBlock, "_deferred_infer_shape"),
    (Parameter, "_finish_deferred_init"),
)


def gluon_steps() -> GluonSteps:
    """Return the functions that Gluon uses now."""
    return GluonSteps(*[getattr(owner, name) for owner, name in _GLUON_STEPS])


def set_gluon_steps(steps: GluonSteps) -> None:
    """Make Gluon use other functions."""
    for (owner, name), function in zip(_GLUON_STEPS, steps):
        setattr(owner, name, function)


# --- autograd and random numbers


def watch_backward(before: Callable[[list, bool], Any], after: Callable[[Any], None]) -> None:
    """Call functions around each backward pass.

    Parameters
    ----------
    before : callable
        Called as ``(heads, is_last)``: handles of the arrays that the pass starts from, and whether
        autograd forgets their graph in it.
    after : callable
        Called with what ``before`` returned, when the pass has been queued; not if it failed.
    """
    run = _LIB.MXAutogradBackwardEx

    def watched(*arguments):
        count, heads, _, _, _, retain_graph, *_ = arguments
        heads = [NDArrayHandle(heads[i]) for i in range(count)]
        noted = before(heads, not getattr(retain_graph, "value", retain_graph))
        status = run(*arguments)
        if status == 0:
            after(noted)
        return status

    _LIB.MXAutogradBackwardEx = watched


def recorded_graph(handle: Any) -> Any:
    """Return what autograd has recorded up to an array, as a symbol; None if it knows none.

    The outputs of the symbol's operators have names that no other has in this process.
    """
    found = SymbolHandle()
    if _LIB.MXAutogradGetSymbol(handle, ctypes.byref(found)):
        return None
    return symbol.Symbol(found)


def is_recorded(array: Any) -> bool:
    """Whether autograd knows an array: by an attached gradient, or as a recorded result."""
    return recorded_graph(array.handle) is not None


def watch_seeds(
    all_devices: Callable[[int], None], one_device: Callable[[int, int, int], None]
) -> Callable[[int, int, int], None]:
    """Call functions before ``mx.random.seed`` sets seeds; return what sets one unwatched.

    Parameters
    ----------
    all_devices : callable
        Called as ``(seed)``.
    one_device : callable
        Called as ``(seed, device_typeid, device_id)``, which the returned function takes as well.
    """
    seed_all, seed_one = _LIB.MXRandomSeed, _LIB.MXRandomSeedContext

    def number(value):
        return int(getattr(value, "value", value))

    def watched_all(seed):
        all_devices(number(seed))
        return seed_all(seed)

    def watched_one(seed, device_type, device_id):
        one_device(number(seed), number(device_type), number(device_id))
        return seed_one(seed, device_type, device_id)

    _LIB.MXRandomSeed, _LIB.MXRandomSeedContext = watched_all, watched_one
    return lambda *arguments: check_call(seed_one(*arguments))


# --- automatic mixed precision


def amp_target() -> Any:
    """Return the dtype that ``amp.init`` was called with, or None."""
    if not amp._amp_initialized:
        return None
    # It is kept nowhere but in the functions that amp.init has wrapped.
    return inspect.getclosurevars(ndarray.elemwise_add).nonlocals["target_dtype"]


def wrap_for_amp(target: Any, float32_operators: list) -> None:
    """Do for operators that came after ``amp.init`` what it does for those on its lists."""
    # Those of the widest type come from its list alone, and are wrapped already.
    widest = amp.list_widest_type_cast(target)
    kept = widest[:]
    del widest[:]
    try:
        for module in (symbol, ndarray):
            amp._wrap_symbol_functions(module, target, [], [], float32_operators)
    finally:
        widest[:] = kept
