"""Synchronized batch normalization for Apache MXNet Gluon."""

from .compatibility import check_environment

check_environment()

# What MXNet 1.9.1 is right beside must be checked before these import it.
from . import (  # noqa: E402
    executors,
    gluon_hooks,
    initial_states,
    mixed_precision,
    symbol,
    traced_calls,
)
from .conversion import convert_symbol, convert_sync_batchnorm, revert_batchnorm  # noqa: E402
from .data_parallel_criterion import DataParallelCriterion  # noqa: E402
from .data_parallel_model import DataParallelModel  # noqa: E402
from .graph_conversion import ConversionError  # noqa: E402
from .inference_export import export_for_inference  # noqa: E402
from .key_barrier import get_timeout, set_timeout  # noqa: E402
from .model_data_parallel import ModelDataParallel  # noqa: E402
from .parallel_backward import parallel_backward  # noqa: E402
from .sync_batch_norm import BatchNorm, SyncBatchNorm  # noqa: E402
from .version import __version__  # noqa: E402, F401

traced_calls.install()
gluon_hooks.install()
executors.install()
initial_states.install()
mixed_precision.list_operators()  # amp wants them to exist

__all__ = [
    "BatchNorm",
    "ConversionError",
    "DataParallelCriterion",
    "DataParallelModel",
    "ModelDataParallel",
    "SyncBatchNorm",
    "convert_symbol",
    "convert_sync_batchnorm",
    "export_for_inference",
    "get_timeout",
    "parallel_backward",
    "revert_batchnorm",
    "set_timeout",
    "symbol",
]
