"""Networks on several devices: forward, loss and backward, each device in a thread of its own."""

from .backward import parallel_backward
from .criterion import DataParallelCriterion
from .gluoncv_model import DataParallelModel
from .model import ModelDataParallel
from .recalibration import recalibrate

__all__ = [
    "DataParallelCriterion",
    "DataParallelModel",
    "ModelDataParallel",
    "parallel_backward",
    "recalibrate",
]
