"""Run a script on several MPI ranks of this machine, by the mpirun beside this Python."""

import ast
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

import fresh_process
from paths import PACKAGE

HOST = socket.gethostname()
MPIRUN = shutil.which("mpirun", path=os.path.dirname(sys.executable)) or shutil.which("mpirun")

# What the launchers want of a test: as root in a container, more ranks than cores.
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # Open MPI 5
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # Open MPI 4
    "OMPI_MCA_btl": "^ofi",  # Open MPI 5 takes a second longer to start with it
    "OMP_NUM_THREADS": "1",
}


def run(count, script, *arguments, options=(), **keywords):
    """Run a script on ``count`` ranks; arguments as for :func:`fresh_process.run`.

    ``options``: further ones of mpirun.
    """
    command = [MPIRUN, "-n", str(count), *options, sys.executable]
    return fresh_process.run(
        pathlib.Path(script), *arguments, command=command, **{**ENVIRONMENT, **keywords}
    )


def cases_of(path):
    """Return the names of the cases in a file like distributed/cases.py, by size of the job."""
    found = {}
    for node in ast.parse(pathlib.Path(path).read_text(encoding="utf-8")).body:
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", None) == "case":
                for size in decorator.args:
                    found.setdefault(size.value, []).append(node.name)
    return found


needed = pytest.mark.skipif(
    MPIRUN is None or not (PACKAGE / "libgluon_syncbn_mpi.so").exists(),
    reason="needs an MPI, and this package built with it",
)


def is_open_mpi_5():
    """Whether mpirun is Open MPI 5's."""
    done = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True)
    return "Open MPI" in done.stdout and " 5." in done.stdout
