"""pip install of a checkout in clean environments, with mxnet and with mxnet-cu112."""

import os
import shutil
import subprocess
import venv

import pytest

from paths import ROOT

pytestmark = pytest.mark.slow

CHECK = """
import mxnet as mx, numpy, gluon_syncbn
from mxnet import autograd
contexts = [mx.cpu(0), mx.cpu(1)]
layer = gluon_syncbn.SyncBatchNorm()
layer.initialize(ctx=contexts)
model = gluon_syncbn.ModelDataParallel(layer, contexts)
with autograd.record():
    outs = model([mx.nd.zeros((1, 1), contexts[0]), mx.nd.ones((1, 1), contexts[1])])
gluon_syncbn.parallel_backward(outs)
print([round(float(o.asscalar()), 2) for o in outs], numpy.__version__)
"""


COMPILER = ("c++", "g++", "cc", "gcc", "as", "ld", "ar", "ranlib", "nm", "uname", "sh")


@pytest.fixture
def install(tmp_path):
    """Installs with nothing on the path but a C++ compiler: no CMake, no Ninja."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in COMPILER:
        if shutil.which(name):
            (tools / name).symlink_to(shutil.which(name))

    def run(environment, *packages):
        python = os.path.join(environment, "bin", "python")
        subprocess.run(
            [python, "-m", "pip", "install", "-q", *packages],
            check=True,
            env={**os.environ, "PATH": str(tools)},
        )

    return run


def check(environment):
    python = os.path.join(environment, "bin", "python")
    done = subprocess.run([python, "-c", CHECK], capture_output=True, text=True)
    assert done.stdout.startswith("[-1.0, 1.0] 1."), done.stderr


def installed(environment):
    python = os.path.join(environment, "bin", "python")
    listed = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True).stdout
    return {line.split("==")[0] for line in listed.splitlines()}


def test_with_mxnet(tmp_path, install):
    venv.create(tmp_path / "env", with_pip=True)
    install(str(tmp_path / "env"), ROOT)
    check(str(tmp_path / "env"))


def test_mxnet_cu112_is_kept(tmp_path, install):
    venv.create(tmp_path / "env", with_pip=True)
    install(str(tmp_path / "env"), "mxnet-cu112==1.9.1", "numpy<1.24")
    install(str(tmp_path / "env"), ROOT)
    assert "mxnet-cu112" in installed(str(tmp_path / "env"))
    assert "mxnet" not in installed(str(tmp_path / "env"))
    # Importing it needs CUDA's libraries; that ours finds the library by name needs only this.
    library = next((tmp_path / "env").glob("lib/*/site-packages/mxnet/libmxnet.so"))
    header = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout
    assert "soname: [libmxnet.so]" in header
