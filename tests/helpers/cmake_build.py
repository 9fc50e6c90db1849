"""Configure the library with CMake, as `make build` does, in a folder of the test's own."""

import os
import shutil
import subprocess
import sys

import mxnet as mx
import pytest

from paths import ROOT

# Where `make` puts the tools.
PATH = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
needs_cmake = pytest.mark.skipif(
    not shutil.which("cmake", path=PATH) or not shutil.which("ninja", path=PATH),
    reason="CMake and Ninja are not here",
)


def configure(folder, *options, compiler="g++"):
    command = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DGLUON_SYNCBN_CUDA=OFF"]
    mxnet = f"-DMXNET_DIR={os.path.dirname(mx.__file__)}"
    library = f"-DGLUON_SYNCBN_LIBRARY_DIR={folder}"
    return subprocess.run(
        [*map(str, command), mxnet, library, *options],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PATH": PATH, "CXX": compiler},
    )
