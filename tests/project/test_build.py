"""How the library is configured, for developers and for users."""

import shutil

import pytest

from cmake_build import configure, needs_cmake


@needs_cmake
def test_warnings_are_errors_only_with_werror(tmp_path):
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
