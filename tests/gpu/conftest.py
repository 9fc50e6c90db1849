"""Tests that need a GPU; without one they are skipped with a reason.

test_cuda_kernels.py needs PyTorch with CUDA, and no MXNet:

    run="python -m pytest --confcutdir=tests/gpu tests/gpu/test_cuda_kernels.py"
    $run; compute-sanitizer --tool memcheck $run; compute-sanitizer --tool racecheck $run

The others need mxnet-cu112, and work where PyTorch is missing; `make emulated` runs them on GPUs
that are emulated.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
TESTS = HERE.parent
# At the end: a package that is on the path already comes first.
sys.path += [str(HERE), str(TESTS / "helpers"), str(TESTS.parent / "python")]


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
