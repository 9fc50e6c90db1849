"""Tests that need a GPU; where there is none they are skipped, and say why.

test_cuda_kernels.py needs PyTorch with CUDA, and no MXNet:

    run="python -m pytest --confcutdir=tests/gpu tests/gpu/test_cuda_kernels.py"
    $run; compute-sanitizer --tool memcheck $run; compute-sanitizer --tool racecheck $run

test_cuda_operators.py needs mxnet-cu112, and works where PyTorch is missing.
"""

import pathlib
import sys

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "python")]
