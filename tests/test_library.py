"""The compiled library as Python sees it."""

import os
import shutil

import fresh_process
import gluon_syncbn


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
