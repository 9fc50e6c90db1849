"""Initial values of a symbol's moving statistics, marked as those of MXNet's BatchNorm are.

MXNet's operators mark the variables of their auxiliary states (``__init__``) when they are
composed, so Module's initializer need not guess by their names.  An operator from outside cannot
register for that (``FSetInputVarAttrOnCompose`` is a function that may not cross the ABI, see
docs/architecture.md), so the functions that compose ours do it.
"""

import functools

from mxnet import symbol

from ..mxnet_private import internal, set_attribute

# operator -> what its last inputs, the auxiliary states, begin with; `cumulative_average` adds a
# number of batches, and `renorm` two averages
_STATES = {
    "_syncbn_sum": ("zero",),
    "_syncbn_normalize": ("zero", "one"),
    "_syncbn_batch_norm": ("zero", "one"),
    "_syncbn_mabn_moments": ("zero",),
    "_syncbn_mabn_normalize": ("one", "zero", "zero"),
}


def _marking(compose, states):
    @functools.wraps(compose)
    def composed(*args, **kwargs):
        result = compose(*args, **kwargs)
        inputs = list(result.get_children())
        starts = states + ("zero",) * bool(kwargs.get("cumulative_average"))
        starts += ("zero", "one") * bool(kwargs.get("renorm"))
        for state, value in zip(inputs[-len(starts) :], starts):
            is_variable = state.get_children() is None
            if is_variable and state.attr("__init__") is None:  # the user's own comes first
                set_attribute(state, "__init__", f'["{value}", {{}}]')
        return result

    return composed


def install() -> None:
    """Let ``mx.sym`` mark the auxiliary states of our operators."""
    module = internal(symbol)
    for name, states in _STATES.items():
        setattr(module, name, _marking(getattr(module, name), states))
