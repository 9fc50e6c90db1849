"""The notebook: its code runs from top to bottom, and it is committed with its pictures.

It runs in a process of its own without Jupyter, which is large; `make notebook` runs it in Jupyter.
"""

import json
import re

import pytest

import fresh_process
from paths import ROOT

NOTEBOOK = ROOT / "examples" / "mnist.ipynb"
# Takes the place of Jupyter's display of figures: prints one line for each.
SHOW = """
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

def show():
    for number in plt.get_fignums():
        drawn = [len(axes.lines) + len(axes.images) for axes in plt.figure(number).axes]
        plt.figure(number).canvas.draw()
        print("figure", *drawn)
    plt.close("all")

plt.show = show
"""


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_a_notebook_of_version_4(cells):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    common = {"cell_type", "id", "metadata", "source"}
    keys = {"markdown": common, "code": common | {"execution_count", "outputs"}}
    for cell in cells:
        assert cell.keys() == keys[cell["cell_type"]], cell
        assert re.fullmatch("[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert all(isinstance(line, str) for line in cell["source"])
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_its_code_runs_and_says_what_its_text_says(cells, tmp_path):
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join([SHOW, *sources]), encoding="utf-8")
    done = fresh_process.run(script, cwd=tmp_path)
    printed = done.stdout
    assert "Warning" not in done.stderr, done.stderr
    figures = re.findall(r"^figure (.*)$", printed, re.M)
    assert figures == ["1 1 1 1 1 1 1 1", "3 2", "3 3 3", "50 50", "3 3"], printed

    losses = re.findall(r"two, (\S+) +loss differs from one device by at most (\S+)", printed)
    (plain, far), (synchronized, near) = losses
    assert (plain, synchronized) == ("nn.BatchNorm", "SyncBatchNorm")
    assert float(near) < 1e-9 < 0.05 < float(far)
    equal = re.findall(r"two, (\S+) +moving variances of the two devices: equal: (\w+)", printed)
    assert equal == [("nn.BatchNorm", "False"), ("SyncBatchNorm", "True")]
    accuracy = dict(re.findall(r"^(.*?) +test accuracy (\S+) %$", printed, re.M))
    one, plain, synchronized = map(float, accuracy.values())
    assert list(accuracy) == ["one device", "four, nn.BatchNorm", "four, SyncBatchNorm"]
    assert one > 95 and abs(synchronized - one) < 0.3 and plain < one - 10, accuracy


def test_it_is_committed_as_executed_in_jupyter(cells):
    """`make notebook` does that.  A code cell that was added or changed since has no number."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        kinds = [output["output_type"] for output in cell["outputs"]]
        pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert len(pictures) == "".join(cell["source"]).count("plt.show()"), cell["id"]
        assert set(kinds) <= {"display_data", "stream"}
        assert all(output.get("name") != "stderr" for output in cell["outputs"])
    assert NOTEBOOK.stat().st_size < 300_000
