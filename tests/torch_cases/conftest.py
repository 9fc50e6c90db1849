"""What torch computes of the cases: one process a session, since its NumPy is not MXNet's.

The worst errors are written to the file that TORCH_CASES_TABLE names (`make torch_cases`).
"""

import os
import pathlib

import numpy as np
import pytest

import fresh_process
from paths import ROOT, TESTS
from torch_cases import LAYERS, NETWORKS

TORCH = ROOT / ".venv-torch" / "bin" / "python"
_worst = {}  # case -> dtype -> quantity -> error


@pytest.fixture(scope="session")
def expected(tmp_path_factory):
    """A function from a case and a number of devices to its inputs and what torch makes of them."""
    if not TORCH.exists():
        pytest.skip("needs PyTorch in .venv-torch: make torch")
    folder = tmp_path_factory.mktemp("torch")
    inputs = {
        f"{kind} {number} {devices}/{name}": array
        for kind, cases in (("layer", LAYERS), ("network", NETWORKS))
        for number, case in enumerate(cases)
        for devices in case.devices
        for name, array in case.inputs(devices).items()
    }
    np.savez(folder / "inputs.npz", **inputs)
    fresh_process.run(
        *(TESTS / "helpers" / "torch_expected.py", folder / "inputs.npz", folder / "expected.npz"),
        command=[TORCH],
        PYTHONPATH=None,  # this process's packages are not torch's
    )
    with np.load(folder / "expected.npz") as file:
        results = dict(file)

    def of(case, devices):
        kind, cases = ("layer", LAYERS) if case in LAYERS else ("network", NETWORKS)
        prefix = f"{kind} {cases.index(case)} {devices}/"
        return _under(prefix, inputs), _under(prefix, results)

    return of


def _under(prefix, arrays):
    return {name[len(prefix) :]: a for name, a in arrays.items() if name.startswith(prefix)}


@pytest.fixture
def check():
    """A function that compares what a case gave with what torch expects."""

    def compare(case, got, wanted, tolerance):
        """Compare {name: array}; ``tolerance``: by dtype, on the scale of the largest value."""
        assert got.keys() == {name for name in wanted if not name.startswith("terms ")}
        for name, array in got.items():
            assert array.shape == wanted[name].shape, name
            quantity = name.split()[0]
            scale = wanted[name.replace("dx", "terms")]
            difference = np.abs(array - wanted[name]).max(initial=0)
            error = difference / max(np.abs(scale).max(initial=0), np.finfo("float64").tiny)
            errors = _worst.setdefault(case, {}).setdefault(array.dtype.name, {})
            errors[quantity] = max(errors.get(quantity, 0.0), error)
            assert error <= tolerance[array.dtype.name], f"{name}: {error:.2e}"

    return compare


def pytest_sessionfinish():
    path = os.environ.get("TORCH_CASES_TABLE")
    if not path or not _worst:
        return
    lines = ["| case | learned from | worst error, and of what |", "| --- | --- | --- |"]
    for case, by_dtype in _worst.items():
        worst = [
            f"{max(errors.values()):.1e} ({dtype}, {max(errors, key=errors.get)})"
            for dtype, errors in by_dtype.items()
        ]
        lines.append(f"| {case.name} | {case.source} | {', '.join(worst)} |")
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text("\n".join(lines) + "\n")
