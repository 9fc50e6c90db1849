"""Training with Horovod: its gradients and our statistics, over the same MPI.

Skipped by default, since Horovod is built in an environment of its own: run `make horovod`.
"""

import os
import pathlib
import re
import sys
import textwrap

import mxnet as mx
import numpy as np
import pytest

import fresh_process
import horovod_training
import ranks
from paths import ROOT

pytest.importorskip("horovod.mxnet")

EXAMPLE = ROOT / "examples" / "mnist_horovod.py"
# The last batch has one image.  The learning rate is so small that rounding errors stay small.
SHORT = ["--epochs", 2, "--lr", 0.02, "--batch-size", 359]

ONE_STEP_MORE = """
import os, signal
import horovod.mxnet as hvd, mxnet as mx
from mxnet import autograd
from gluon_syncbn import SyncBatchNorm, distributed

def step():
    with autograd.record():
        y = net(mx.nd.ones((3, 2)))
    y.backward()
    y.wait_to_read()

hvd.init()
net = SyncBatchNorm(in_channels=2, prefix="norm_")
net.initialize()
distributed.attach(net)
step()
{between}
step()
"""


@pytest.fixture(scope="module")
def trained_alone():
    return horovod_training.train_alone()


@pytest.fixture
def run_program(tmp_path):
    """Run ONE_STEP_MORE on two ranks, with something between its two steps."""

    def run(between, **options):
        path = tmp_path / "program.py"
        path.write_text(ONE_STEP_MORE.format(between=between))
        return ranks.run(2, path, timeout=60, **options)

    return run


@pytest.mark.parametrize(
    "count, first, hybridize",
    [(2, first, False) for first in horovod_training.FIRST]
    + [(3, "hvd.init", False), (2, "hvd.init", True)],
)
def test_training_is_that_of_one_process(count, first, hybridize, trained_alone, tmp_path):
    """In any order of initialization, with a clean end."""
    script = horovod_training.__file__
    done = ranks.run(count, script, tmp_path, first, hybridize, timeout=60)
    assert not re.search("Traceback|Exception ignored|abort", done.stderr), done.stderr
    trained = [np.load(tmp_path / f"{rank}.npz") for rank in range(count)]
    for name, wanted in trained_alone.items():
        arrays = [parameters[name] for parameters in trained]
        np.testing.assert_allclose(arrays[0], wanted, rtol=0, atol=1e-12, err_msg=name)
        assert len({array.tobytes() for array in arrays}) == 1, f"{name} differs between ranks"


def test_mpi_without_threads_is_refused(run_program):
    done = run_program("", status=None, HOROVOD_MPI_THREADS_DISABLE="1")
    assert done.returncode
    assert re.search("without MPI_THREAD_MULTIPLE.*unset HOROVOD_MPI_THREADS_DISABLE", done.stderr)


def test_after_hvd_shutdown(run_program):
    """Horovod then finalizes MPI, if it has initialized it."""
    done = run_program("hvd.shutdown()", status=None)
    assert done.returncode
    assert "'norm_' failed: MPI was finalized" in done.stderr


def test_a_rank_that_fails_ends_the_job(run_program):
    done = run_program("if hvd.rank() == 1: raise ValueError('a mistake')", status=None)
    assert done.returncode
    assert "ValueError: a mistake" in done.stderr
    assert "'norm_' failed" in done.stderr  # on rank 0


def test_a_rank_that_stops(run_program):
    """The job is aborted, since Horovod's end would wait for it."""
    between = "if hvd.rank() == 1: os.kill(os.getpid(), signal.SIGSTOP)"
    done = run_program(between, status=None, GLUON_SYNCBN_TIMEOUT="1")
    assert done.returncode
    assert re.search(r"'norm_' failed: .* rank 1 .* does not answer", done.stderr)
    assert "aborting the job" in done.stderr


def test_horovods_processes_without_mpi_are_refused():
    """`horovodrun --gloo` sets this; for MPI, each of its processes is alone."""
    program = """
        from gluon_syncbn import SyncBatchNorm, distributed
        distributed.attach(SyncBatchNorm())
    """
    done = fresh_process.run(textwrap.dedent(program), status=1, HOROVOD_SIZE="2")
    assert re.search("2 processes .* horovodrun --mpi", done.stderr)
    fresh_process.run(textwrap.dedent(program), HOROVOD_SIZE=None)


def test_horovodrun(tmp_path):
    """Its own way to say how ranks are bound to cores is one that Open MPI 5 does not know."""
    bin_folder = os.path.dirname(sys.executable)
    command = [os.path.join(bin_folder, "horovodrun"), "-np", 2]
    command += ["--binding-args=--bind-to none --map-by slot", sys.executable]
    fresh_process.run(
        pathlib.Path(horovod_training.__file__),
        *(tmp_path, "hvd.init", False),
        command=map(str, command),
        timeout=60,
        **{**ranks.ENVIRONMENT, "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]])},
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npz", "1.npz"]


@pytest.fixture(scope="module")
def example_alone(tmp_path_factory):
    return fresh_process.run(EXAMPLE, *SHORT, "--out", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("count, arguments", [(2, []), (3, ["--hybridize"])])
def test_the_example_gives_the_same_curve(count, arguments, example_alone, tmp_path):
    done = ranks.run(count, EXAMPLE, *SHORT, *arguments, "--out", tmp_path)
    for what, tolerance in (("loss", 2e-4), ("accuracy", 0.3)):  # one image is 0.28 %
        alone, together = (
            np.float64(re.findall(rf"{what} ([\d.]+)", d.stdout)) for d in (example_alone, done)
        )
        assert len(alone) == 2  # of one rank
        np.testing.assert_allclose(together, alone, rtol=0, atol=tolerance)
    for name in ("digits.params", "digits-symbol.json", "digits-0000.params", "digits.png"):
        assert (tmp_path / name).stat().st_size > 1000, name
    net = mx.gluon.SymbolBlock.imports(
        str(tmp_path / "digits-symbol.json"), ["data"], str(tmp_path / "digits-0000.params")
    )
    assert net(mx.nd.zeros((2, 1, 8, 8))).shape == (2, 10)
