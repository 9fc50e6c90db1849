"""A checkout of MXNet: is it one, of the right version, with the tests that are selected?"""

import pathlib
import re
import sys

from selection import SELECTED

HOW = (
    "get one with\n"
    "    git clone --depth 1 --branch v1.9.1 https://github.com/apache/mxnet.git\n"
    "    make upstream MXNET_SOURCE=mxnet"
)
# What the tests need besides.
HELPERS = (
    "unittest/common.py",
    "common/models.py",
    "mkl/data/test_mkldnn_test_mkldnn_model_model1.json",
)


def tests_of(source):
    """Return the folder of the tests in a checkout.

    Raises
    ------
    SystemExit
        If ``source`` is empty, is no checkout of version 1.9, or lacks one of the files.
    """
    if not source:
        raise SystemExit(f"MXNET_SOURCE is not set: a checkout of apache/mxnet, v1.9.1; {HOW}")
    source = pathlib.Path(source).expanduser().resolve()
    version = source / "python" / "mxnet" / "libinfo.py"
    if not version.is_file():
        raise SystemExit(f"{source} is no checkout of apache/mxnet: it has no {version}; {HOW}")
    number = re.search(r'^__version__ = "(.*)"', version.read_text(encoding="utf-8"), re.M)
    if number is None or not number[1].startswith("1.9."):
        found = number[1] if number else "unknown"
        raise SystemExit(f"{source} has MXNet {found}, but 1.9 is needed; {HOW}")
    tests = source / "tests" / "python"
    paths = [*HELPERS, *(selected.path for selected in SELECTED)]
    missing = [path for path in paths if not (tests / path).is_file()]
    if missing:
        raise SystemExit(f"{tests} lacks {', '.join(missing)}; {HOW}")
    return tests


if __name__ == "__main__":
    tests_of(sys.argv[1])
