"""What the package needs around it is checked before it is imported."""

import pytest

import fresh_process
from gluon_syncbn import compatibility


@pytest.mark.parametrize("version", [(3, 7, 9), (3, 12, 1), (2, 7, 18)])
def test_unsupported_python(version):
    with pytest.raises(ImportError, match=r"3\.8 to 3\.11"):
        compatibility.check_python(version)


@pytest.mark.parametrize("version", ["1.24.0", "1.26.4", "2.0.1", "2.1.0rc1"])
def test_unsupported_numpy(version):
    with pytest.raises(ImportError, match='pip install "numpy<1.24"'):
        compatibility.check_numpy(version)


@pytest.mark.parametrize("version", ["1.9.0", "1.8.0", "2.0.0"])
def test_unsupported_mxnet(version):
    with pytest.raises(ImportError, match="pip install mxnet==1.9.1"):
        compatibility.check_mxnet(version)


def test_supported_versions():
    for version in ((3, 8, 0), (3, 11, 7)):
        compatibility.check_python(version)
    for version in ("1.19.5", "1.23.5"):
        compatibility.check_numpy(version)
    compatibility.check_mxnet("1.9.1")


@pytest.mark.parametrize(
    "change, message",
    [
        ("import numpy; numpy.__version__ = '1.26.4'", 'pip install "numpy<1.24"'),
        ("import mxnet; mxnet.__version__ = '1.8.0'", "pip install mxnet==1.9.1"),
        ("import sys; sys.version_info = (3, 12, 0)", "3.8 to 3.11"),
        ("import sys; sys.modules['mxnet'] = None", "pip install mxnet==1.9.1"),
        ("import sys; sys.modules['numpy'] = None", 'pip install "numpy<1.24"'),
    ],
)
def test_the_checks_run_at_import(change, message):
    done = fresh_process.run(f"{change}\nimport gluon_syncbn", status=1)
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError"), done.stderr
    assert message in done.stderr
