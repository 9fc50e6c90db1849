"""Synchronized batch normalization for Apache MXNet Gluon."""

from .compatibility import check_environment

check_environment()

# Only now: with another NumPy these fail in obscure ways, inside MXNet.
from . import distributed, symbol  # noqa: E402
from .centered_convolution import CenConv2d  # noqa: E402
from .conversion import (  # noqa: E402
    ConversionError,
    convert_mabn,
    convert_symbol,
    convert_sync_batchnorm,
    export_for_inference,
    revert_batchnorm,
)
from .data_parallel import (  # noqa: E402
    DataParallelCriterion,
    DataParallelModel,
    ModelDataParallel,
    parallel_backward,
    recalibrate,
)
from .dimensions import BatchNorm1d, BatchNorm2d, BatchNorm3d  # noqa: E402
from .key_barrier import get_timeout, set_timeout  # noqa: E402
from .key_barrier_sum import KeyBarrierSum  # noqa: E402
from .moving_average import MABN2d  # noqa: E402
from .startup import start  # noqa: E402
from .sync_batch_norm import BatchNorm, SyncBatchNorm  # noqa: E402
from .tensorflow import sync_batch_norm  # noqa: E402
from .version import __version__  # noqa: E402, F401
from .waiting import barrier_stats  # noqa: E402

start()
del start

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CenConv2d",
    "ConversionError",
    "DataParallelCriterion",
    "DataParallelModel",
    "KeyBarrierSum",
    "MABN2d",
    "ModelDataParallel",
    "SyncBatchNorm",
    "barrier_stats",
    "convert_mabn",
    "convert_symbol",
    "convert_sync_batchnorm",
    "distributed",
    "export_for_inference",
    "get_timeout",
    "parallel_backward",
    "recalibrate",
    "revert_batchnorm",
    "set_timeout",
    "sync_batch_norm",
    "symbol",
]
