"""The compiled library as Python sees it."""

import os
import shutil

import mxnet as mx
import pytest

import fresh_process
import gluon_syncbn
from gluon_syncbn import library


def test_missing_library(tmp_path):
    package = os.path.dirname(gluon_syncbn.__file__)
    shutil.copytree(
        package, tmp_path / "gluon_syncbn", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    script = "import sys; sys.path.insert(0, sys.argv[1]); import gluon_syncbn"
    done = fresh_process.run(script, tmp_path, status=1)
    assert "ImportError" in done.stderr and '"make build"' in done.stderr
    (tmp_path / "gluon_syncbn" / "libgluon_syncbn.so").write_bytes(b"no library")
    done = fresh_process.run(script, tmp_path, status=1)
    assert "does not load" in done.stderr and '"make build"' in done.stderr


def test_a_negative_status_raises_the_librarys_reason(monkeypatch):
    assert library.check(0) == 0 and library.check(3) == 3
    monkeypatch.setattr(library.LIBRARY, "LastError", "grün".encode)
    with pytest.raises(RuntimeError, match="grün"):
        library.check(-1)


def test_a_function_that_is_not_there():
    with pytest.raises(AttributeError, match="no function Nothing, or is not loaded yet"):
        library.LIBRARY.Nothing()


def test_every_operator_is_a_function_of_arrays_and_of_symbols():
    for submodule, name in library.OPERATORS.values():
        for module in (mx.nd, mx.sym):
            function = getattr(getattr(module, submodule), name)
            assert callable(function)
            if submodule == "_internal":
                assert library.operator(module, name) is function
