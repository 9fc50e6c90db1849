"""The Python, NumPy and MXNet that this package needs, checked before anything else is imported.

MXNet 1.9.1 is the last MXNet 1.x and fails in obscure ways with a newer NumPy (it uses aliases
that NumPy 1.24 dropped), so the check comes before ``import mxnet``.
"""

import sys

MXNET = "1.9.1"
NUMPY_BELOW = (1, 24)
PYTHON_FROM, PYTHON_TO = (3, 8), (3, 11)


def check_python(version):
    """Raise ImportError unless ``version``, as ``sys.version_info``, is supported."""
    if not PYTHON_FROM <= tuple(version[:2]) <= PYTHON_TO:
        raise ImportError(
            f"gluon_syncbn needs Python {PYTHON_FROM[0]}.{PYTHON_FROM[1]} to "
            f"{PYTHON_TO[0]}.{PYTHON_TO[1]}, which MXNet {MXNET} runs on, but this is Python "
            f"{version[0]}.{version[1]}. Make an environment with a supported Python."
        )


def check_numpy(version):
    """Raise ImportError unless ``version``, as ``numpy.__version__``, is supported."""
    if tuple(int(part) for part in version.split(".")[:2]) >= NUMPY_BELOW:
        raise ImportError(
            f"gluon_syncbn needs NumPy below {NUMPY_BELOW[0]}.{NUMPY_BELOW[1]}, because MXNet "
            f"{MXNET} uses aliases that later ones dropped, but this is NumPy {version}. "
            'Install one that fits: pip install "numpy<1.24"'
        )


def check_mxnet(version):
    """Raise ImportError unless ``version``, as ``mxnet.__version__``, is supported."""
    if version != MXNET:
        raise ImportError(
            f"gluon_syncbn is built for MXNet {MXNET}, but this is MXNet {version}. Install it: "
            f"pip install mxnet=={MXNET} (or mxnet-cu112=={MXNET})"
        )


def check_environment():
    """Raise ImportError, saying what to install, unless everything around us is supported."""
    check_python(sys.version_info)
    try:
        import numpy
    except ImportError as error:
        raise ImportError('gluon_syncbn needs NumPy: pip install "numpy<1.24"') from error
    check_numpy(numpy.__version__)
    try:
        import mxnet
    except ImportError as error:
        raise ImportError(
            f"gluon_syncbn needs MXNet: pip install mxnet=={MXNET} (or, for GPUs, "
            f"mxnet-cu112=={MXNET}). Importing it failed with: {error}"
        ) from error
    check_mxnet(mxnet.__version__)
