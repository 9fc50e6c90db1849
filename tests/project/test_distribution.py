"""The source distribution is the checkout; the wheel is what it takes to run, and no more."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

from gluon_syncbn import compatibility, version
from paths import PACKAGE, ROOT

pytestmark = pytest.mark.slow

NAME = f"gluon_syncbn-{version.__version__}"
# Of git's, what is of use in a checkout only.
LEFT_OUT = {".ci/run", ".gitignore"}
# The build's own files.
GENERATED = {"PKG-INFO", "setup.cfg"}
METADATA = f"{NAME}.dist-info"


def unpacked(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_the_source_distribution_is_the_checkout(distributions):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    with tarfile.open(distributions / f"{NAME}.tar.gz") as archive:
        packed = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    packed = {name for name in packed if ".egg-info/" not in name} - GENERATED
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    kept = {name for name in listed.splitlines() if (ROOT / name).exists()} - LEFT_OUT
    assert packed == kept, f"packed only: {packed - kept}; in the checkout only: {kept - packed}"


def test_the_wheel_has_the_package_alone(wheel, tmp_path):
    """Both libraries where nvcc is; no sources of theirs, and no other library.

    The MPI side has to be built for the MPI that it runs with.
    """
    names = unpacked(wheel, tmp_path)
    wanted = {f"gluon_syncbn/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    wanted |= {"gluon_syncbn/py.typed", "gluon_syncbn/libgluon_syncbn.so"}
    if shutil.which("nvcc"):
        wanted.add("gluon_syncbn/libgluon_syncbn_cuda.so")
    assert {name for name in names if not name.startswith(METADATA)} == wanted


def test_the_wheel_serves_every_python_and_any_mxnet(wheel, tmp_path):
    assert re.fullmatch(rf"{NAME}-py3-none-manylinux_2_\d+_x86_64\.whl", wheel.name)
    unpacked(wheel, tmp_path)
    metadata = email.message_from_string((tmp_path / METADATA / "METADATA").read_text())
    mxnet, numpy = compatibility.MXNET, "{}.{}".format(*compatibility.NUMPY_BELOW)
    required = metadata.get_all("Requires-Dist")
    assert [line for line in required if "extra ==" not in line] == [f"numpy<{numpy}"]
    for extra, package in (("cpu", "mxnet"), ("cu112", "mxnet-cu112")):
        chosen = [line.split(";")[0].strip() for line in required if f'"{extra}"' in line]
        assert chosen == [f"{package}=={mxnet}"]
    first, last = compatibility.PYTHON_FROM, compatibility.PYTHON_TO
    assert set(metadata["Requires-Python"].split(",")) == {
        f">={first[0]}.{first[1]}",
        f"<{last[0]}.{last[1] + 1}",
    }


def test_openmp_and_mxnet_are_those_of_the_process(wheel, tmp_path):
    """A second libgomp would have as many threads again on the same cores."""
    unpacked(wheel, tmp_path)
    library = tmp_path / "gluon_syncbn" / "libgluon_syncbn.so"
    command = ["readelf", "--dynamic", "--wide", str(library)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", printed))
    assert {"libmxnet.so", "libgomp.so.1", "libstdc++.so.6"} <= needed
    assert not re.search(r"\(R(UN)?PATH\)", printed)


def test_pip_builds_it_without_what_an_earlier_build_left(distributions, tmp_path):
    with tarfile.open(distributions / f"{NAME}.tar.gz") as archive:
        archive.extractall(tmp_path)
    # Where setuptools builds unless it is told otherwise, and packs all that it finds.
    left = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/gluon_syncbn"
    (tmp_path / NAME / left).mkdir(parents=True)
    (tmp_path / NAME / left / "stale.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"./{NAME}"]
    environment = {**os.environ, "GLUON_SYNCBN_CUDA": "OFF"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    names = unpacked(wheel, tmp_path / "unpacked")
    assert "gluon_syncbn/libgluon_syncbn.so" in names
    assert not {"gluon_syncbn/stale.py", "gluon_syncbn/libgluon_syncbn_cuda.so"} & names
