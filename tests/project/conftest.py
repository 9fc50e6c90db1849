"""The distributions that tests of them share: built once a session, as `make wheel` builds them."""

import subprocess
import sys

import pytest

from paths import ROOT


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    """A folder with what `make wheel` makes: a source distribution and the wheel built from it."""
    folder = tmp_path_factory.mktemp("distributions")
    # The environment is the one that runs this, as it is: --old-file keeps make from renewing it.
    command = ["make", "wheel", f"VENV={sys.prefix}", f"DIST={folder}"]
    command += [f"--old-file={sys.prefix}/ready"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def wheel(distributions):
    (wheel,) = distributions.glob("*.whl")
    return wheel
