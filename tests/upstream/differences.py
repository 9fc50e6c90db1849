"""Tests of MXNet's that pass with its operators and do not with ours, and why."""

_BFLOAT16 = "there are no kernels for bfloat16 (docs/limits.md): a clear error"

#: {"FILE:TEST": reason}
EXPLAINED = {
    "mkl/test_bf16_operator.py:test_bf16_bn": _BFLOAT16,
    "mkl/test_bf16_operator.py:test_bf16_fallback": _BFLOAT16,
    "mkl/test_contrib_amp.py:test_module_backward_compatibility": (
        "the dense layer after the normalization should be in bfloat16; ours gives it float32, as "
        "MXNet's own SyncBatchNorm does"
    ),
    "unittest/test_sparse_operator.py:test_batchnorm_fallback": (
        "an error is expected for sparse data with fix_gamma, which MXNet's operator refuses; ours "
        "takes it, and its gradient is right"
    ),
}
