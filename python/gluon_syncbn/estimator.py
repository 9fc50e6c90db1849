"""MXNet's Estimator on several devices; see ``data_parallel/estimator.py``."""

from .data_parallel.estimator import DataParallelBatchProcessor

__all__ = ["DataParallelBatchProcessor"]
