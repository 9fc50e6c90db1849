"""Existing networks and symbols: converted, converted back, and exported for plain MXNet."""

from .blocks import convert_symbol, convert_sync_batchnorm, revert_batchnorm
from .inference_export import export_for_inference
from .moving_average import convert_mabn
from .rewriting import ConversionError

__all__ = [
    "ConversionError",
    "convert_mabn",
    "convert_symbol",
    "convert_sync_batchnorm",
    "export_for_inference",
    "revert_batchnorm",
]
