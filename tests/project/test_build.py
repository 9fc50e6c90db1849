"""How the library is configured, for who develops it and for who installs it."""

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


@needs_cmake
def test_warnings_are_errors_only_where_it_is_asked_for(tmp_path):
    """Another compiler warns of other things."""
    for asked, options in ((False, []), (True, ["-DGLUON_SYNCBN_WERROR=ON"])):
        done = configure(tmp_path, *options)
        assert done.returncode == 0, done.stderr
        rules = (tmp_path / "build.ninja").read_text()
        assert "-Wextra" in rules
        assert ("-Werror" in rules) == asked


@needs_cmake
@pytest.mark.skipif(not shutil.which("clang++"), reason="clang is not here")
def test_a_compiler_with_another_openmp_is_refused(tmp_path):
    done = configure(tmp_path, compiler="clang++")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "is built with GCC, not with Clang" in message and "CXX=g++ pip install" in message
