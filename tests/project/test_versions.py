"""Each version number has one source; the files that have to repeat one agree with it.

That of the package is in python/gluon_syncbn/version.py.  Those of MXNet, NumPy and Python, which
it works with, are in python/gluon_syncbn/compatibility.py.
"""

import pathlib
import re
import subprocess

import pytest

import gluon_syncbn
from gluon_syncbn import compatibility, version
from paths import ROOT

VERSION = version.__version__
MXNET = compatibility.MXNET
NUMPY = "{}.{}".format(*compatibility.NUMPY_BELOW)
FIRST = "{}.{}".format(*compatibility.PYTHON_FROM)
LAST = "{}.{}".format(*compatibility.PYTHON_TO)
AFTER_LAST = "{}.{}".format(compatibility.PYTHON_TO[0], compatibility.PYTHON_TO[1] + 1)

# How the files write them; a group is the number.
NUMBER = r"(\d+(?:\.\d+)+)"
PATTERNS = {
    rf"mxnet(?:-cu112)?=={NUMBER}": MXNET,
    rf"MXNet {NUMBER}": MXNET,
    rf"(?i)numpy ?< ?{NUMBER}": NUMPY,
    rf"NumPy below {NUMBER}": NUMPY,
    rf"Python {NUMBER} to \d": FIRST,
    rf"Python \d\.\d+ to {NUMBER}": LAST,
}
# Of environments without MXNet.
OTHERS = [("Makefile", "numpy<2.3")]  # .venv-torch
# What must be there: a pattern that matches nothing any more would compare nothing.
REPEATED = [
    ("pyproject.toml", rf'"mxnet=={NUMBER}"', MXNET),
    ("pyproject.toml", r'target-version = "py(3\d+)"', FIRST.replace(".", "")),
    ("pyproject.toml", rf'python_version = "{NUMBER}"', FIRST),
    ("requirements.txt", rf"^numpy<{NUMBER}", NUMPY),
    ("CMakeLists.txt", rf"pip install mxnet=={NUMBER}", MXNET),
    ("README.md", rf"NumPy below {NUMBER}", NUMPY),
    ("CITATION.cff", r"^version: (\S+)$", VERSION),
    ("CHANGELOG.md", rf"^## \[{NUMBER}\]", VERSION),  # its first: the latest release
]


def text_files():
    """Everything that git tracks, or that is new and not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for path in (ROOT / name for name in listed.splitlines()):
        try:
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            pass  # deleted, or no text


@pytest.mark.parametrize("file, pattern, source", REPEATED)
def test_what_has_to_be_repeated(file, pattern, source):
    found = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.M)
    assert found, f"{file} has nothing like {pattern}"
    assert found.group(1) == source


def test_every_mention_agrees():
    this = pathlib.Path(__file__).name
    wrong = [
        f"{name}: {match.group(0)!r}, but the source says {source}"
        for name, text in text_files()
        if pathlib.Path(name).name != this
        for pattern, source in PATTERNS.items()
        for match in re.finditer(pattern, text)
        if match.group(1) != source and (name, match.group(0)) not in OTHERS
    ]
    assert not wrong, "\n".join(wrong)


def test_the_makefile_reads_the_source():
    command = ["make", "--dry-run", "--always-make", "VENV=nowhere", "nowhere/ready"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert f"mxnet=={MXNET}" in printed


def test_the_package_has_the_version():
    assert gluon_syncbn.__version__ == VERSION
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", VERSION)
