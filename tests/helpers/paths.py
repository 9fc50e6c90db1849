"""Where things are in a checkout."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
DATA = TESTS / "data"
OPERATOR = ROOT / "src" / "operator"
PACKAGE = ROOT / "python" / "gluon_syncbn"
