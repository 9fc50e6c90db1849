"""What `make upstream` says of tests that pass, fail, hang and end the process."""

import collections

import pytest

from paths import TESTS

MXNETS_TESTS = """
import os, time, unittest
import mxnet as mx

def test_normalizes():
    x = mx.nd.arange(4).reshape((2, 2))
    states = [mx.nd.ones(2) for _ in range(4)]
    mx.nd.BatchNorm(x, *states).wait_to_read()
    sym = mx.sym.BatchNorm(mx.sym.BatchNorm(mx.sym.var("x")))
    executor = sym.simple_bind(mx.cpu(), x=(2, 2))
    for _ in range(3):
        executor.forward()

def test_ends_the_process():
    os._exit(3)

def test_fails():
    assert False, "as it should"

@unittest.skip("why not")
def test_is_skipped():
    pass

def test_hangs():
    time.sleep(1000)

def test_passes():
    pass

def test_is_not_chosen():
    pass
"""


@pytest.fixture
def upstream(monkeypatch):
    """The modules of this folder."""
    monkeypatch.syspath_prepend(str(TESTS / "upstream"))
    import checkout
    import nose_process
    import report

    return collections.namedtuple("Modules", "checkout nose_process report")(
        checkout, nose_process, report
    )


@pytest.mark.parametrize(
    "theirs, ours, explained, wanted",
    [
        ("pass", "pass", False, "same"),
        ("pass", "pass", True, "same"),
        ("fail", "fail", False, "same"),
        ("fail", "pass", False, "better"),
        ("pass", "fail", False, "worse"),
        ("pass", "skip", False, "worse"),
        ("pass", "absent", False, "worse"),
        ("fail", "crash", False, "worse"),
        ("pass", "fail", True, "explained"),
    ],
)
def test_verdict(theirs, ours, explained, wanted, upstream):
    assert upstream.report.verdict(theirs, ours, explained) == wanted


def test_comparison_of_a_file(upstream):
    theirs = {"a": ("pass", None), "b": ("pass", None), "c": ("pass", None)}
    ours = {"a": ("pass", None), "b": ("fail", "why")}
    explained = {"file:a": "because", "file:b": "because", "another:d": "not looked for"}
    compared = upstream.report.compare("file", "way", theirs, ours, explained)
    assert [(c.test, c.verdict) for c in compared] == [
        ("a", "same"),
        ("b", "explained"),
        ("c", "worse"),
    ]
    assert upstream.report.no_longer(compared, explained) == ["file:a"]
    assert "| file | b | pass | fail | explained |" in upstream.report.by_test(compared, ["way"])


@pytest.mark.parametrize(
    "source, message",
    [
        ("", "MXNET_SOURCE is not set.*git clone .* v1.9.1"),
        ("none", "no checkout of apache/mxnet.*git clone"),
        ("old", r"has MXNet 1\.8\.0, but 1\.9 is needed.*git clone"),
        ("part", "lacks unittest/common.py, .*test_viz.py; .*git clone"),
    ],
)
def test_sources_that_cannot_be_used(source, message, upstream, tmp_path):
    for name, version in (("old", "1.8.0"), ("part", "1.9.1")):
        (tmp_path / name / "python" / "mxnet").mkdir(parents=True)
        file = tmp_path / name / "python" / "mxnet" / "libinfo.py"
        file.write_text(f'__version__ = "{version}"\n')
    with pytest.raises(SystemExit) as error:
        upstream.checkout.tests_of(source and tmp_path / source)
    error.match(f"(?s){message}")


@pytest.mark.slow  # six processes, and a test that has to hang
@pytest.mark.parametrize("way, counts", [(None, (0, 6)), ("one operator", (7, 0))])
def test_a_file_of_tests(way, counts, upstream, tmp_path):
    pytest.importorskip("nose")
    (tmp_path / "test_sample.py").write_text(MXNETS_TESTS)
    (tmp_path / "work").mkdir()
    run = upstream.nose_process.run_file(
        *(tmp_path / "test_sample.py", "^(?!.*not_chosen)", way, 8, tmp_path / "work" / "log")
    )
    assert {test: outcome for test, (outcome, _) in run.outcomes.items()} == {
        "test_normalizes": "pass",
        "test_ends_the_process": "crash",
        "test_fails": "fail",
        "test_is_skipped": "skip",
        "test_hangs": "no end",
        "test_passes": "pass",
    }
    assert run.outcomes["test_ends_the_process"][1] == "the process ended with status 3"
    assert "as it should" in run.outcomes["test_fails"][1]
    assert (run.counts["ours"], run.counts["mxnets"]) == counts
