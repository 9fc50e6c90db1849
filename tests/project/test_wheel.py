"""The wheel installs and trains on every supported Python, without a compiler or CMake."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from gluon_syncbn import compatibility

pytestmark = pytest.mark.slow

PYTHONS = [
    f"{compatibility.PYTHON_FROM[0]}.{minor}"
    for minor in range(compatibility.PYTHON_FROM[1], compatibility.PYTHON_TO[1] + 1)
]

TRAIN_A_STEP = """
import mxnet as mx
from mxnet import autograd, gluon
import gluon_syncbn as sbn

contexts = [mx.cpu(0), mx.cpu(1)]
net = gluon.nn.HybridSequential()
net.add(gluon.nn.Dense(4), sbn.SyncBatchNorm(), gluon.nn.Dense(1))
net.initialize(mx.init.Xavier(), ctx=contexts)
model = sbn.ModelDataParallel(net, contexts)
criterion = sbn.DataParallelCriterion(gluon.loss.L2Loss(), contexts)
trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
data, label = mx.nd.random.normal(shape=(5, 3)), mx.nd.ones((5, 1))
xs, ys = (gluon.utils.split_and_load(a, contexts, even_split=False) for a in (data, label))

def step():
    with autograd.record():
        losses = criterion(model(xs), ys)
    sbn.parallel_backward(losses)
    trainer.step(len(data))
    return sum(loss.sum().asscalar() for loss in losses)

first, *_, last = [step() for _ in range(20)]
assert last < first, (first, last)
mean = net[1].running_mean
assert (mean.data(contexts[0]).asnumpy() == mean.data(contexts[1]).asnumpy()).all()
print("trained with", sbn.__file__)
"""


def interpreter(version):
    """A Python of this version: ours, one on the path, or one of pyenv's."""
    if version == "{}.{}".format(*sys.version_info):
        return sys.executable
    candidates = [shutil.which(f"python{version}")]
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    # pyenv's shims are on the path for versions that are not chosen, too; those do not run.
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return str(candidate)
    return None


@pytest.mark.parametrize("version", PYTHONS)
def test_install_and_train(version, wheel, tmp_path):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PATH"] = str(nothing)  # no compiler, no CMake, no nvcc

    def run(*command):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run(python, "-m", "venv", "env")
    python = str(tmp_path / "env" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", f"{wheel}[cpu]")
    assert str(tmp_path / "env") in run(python, "-c", TRAIN_A_STEP)
