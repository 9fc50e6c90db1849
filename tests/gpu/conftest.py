"""Tests that need a GPU; where there is none they are skipped, and say why.

test_cuda_kernels.py needs PyTorch with CUDA, and no MXNet:

    python -m pytest --confcutdir=tests/gpu tests/gpu/test_cuda_kernels.py
    compute-sanitizer --tool memcheck python -m pytest --confcutdir=tests/gpu tests/gpu -k kernels
    compute-sanitizer --tool racecheck python -m pytest --confcutdir=tests/gpu tests/gpu -k kernels

test_cuda_operators.py needs mxnet-cu112.
"""

import pathlib
import sys

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "python")]
