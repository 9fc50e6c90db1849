"""Our operators on the lists of MXNet's automatic mixed precision, ``mxnet.contrib.amp``.

``amp.init`` wraps operators according to these lists; ``amp.convert_symbol`` adds casts to a graph
according to them.  In float16 a layer is left alone: its data are float16 or float32, its
parameters float32, its sums float64.  There are no kernels for bfloat16, so there the data of a
layer are cast to float32, as MXNet does for its own SyncBatchNorm.  What comes after
``_syncbn_moments`` (or ``_syncbn_mabn_moments``) is then float32 and must not be cast: MXNet's
MKL-DNN fails to pass float64 through a cast.  KeyBarrierSum takes no 16-bit data: a sum may
overflow where its parts do not.
"""

from mxnet.contrib.amp import lists
from mxnet.contrib.amp.amp import bfloat16

from ..mxnet_private import amp_target, wrap_for_amp

_FLOAT16 = {
    "FP16_FP32_FUNCS": (
        "_syncbn_moments",
        "_syncbn_sum",
        "_syncbn_normalize",
        "_syncbn_batch_norm",
        "_syncbn_mabn_moments",
        "_syncbn_mabn_normalize",
    ),
    "FP32_FUNCS": ("_contrib_KeyBarrierSum",),
}
_BFLOAT16 = {
    "BF16_FP32_FUNCS": ("_syncbn_sum", "_syncbn_normalize", "_syncbn_mabn_normalize"),
    "FP32_FUNCS": (
        "_contrib_KeyBarrierSum",
        "_syncbn_moments",
        "_syncbn_batch_norm",
        "_syncbn_mabn_moments",
    ),
}


def list_operators() -> None:
    """Put our operators on the lists, also when ``amp.init`` has been called already."""
    for module, ours in ((lists.symbol_fp16, _FLOAT16), (lists.symbol_bf16, _BFLOAT16)):
        for name, operators in ours.items():
            there = getattr(module, name)
            there.extend(operator for operator in operators if operator not in there)
    target = amp_target()
    if target is not None:
        wrap_for_amp(target, list((_BFLOAT16 if target == bfloat16 else _FLOAT16)["FP32_FUNCS"]))
