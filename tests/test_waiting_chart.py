"""The chart of who waited for whom."""

import struct
import sys
import xml.etree.ElementTree

import pytest

from gluon_syncbn import barrier_stats
from rounds import come


@pytest.fixture
def some_waits():
    barrier_stats(reset=True)
    for key in ("first", 'of "any" $content$ ✓' * 10):
        come(key, [0, 1])


def test_the_suffix_says_in_which_format(some_waits, tmp_path):
    stats = barrier_stats()
    stats.plot(tmp_path / "waiting.png")
    image = (tmp_path / "waiting.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", image[16:24])
    assert width > 1000 and height > 200
    stats.plot(str(tmp_path / "waiting.svg"))
    xml.etree.ElementTree.parse(tmp_path / "waiting.svg")


def test_it_has_a_row_per_device_and_a_bar_per_key(some_waits, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, _: drawn.append(self))
    barrier_stats().plot(tmp_path / "waiting.png")
    over_time, by_key = drawn[0].axes
    assert [label.get_text() for label in over_time.get_yticklabels()] == ["cpu(0)", "cpu(1)"]
    waits = [len(bars.get_paths()) for bars in over_time.collections]
    assert waits == [2, 0]  # cpu(1) came last
    names = [label.get_text() for label in by_key.get_yticklabels()]
    assert len(names) == 2 and "first" in names and all(len(name) < 60 for name in names)


def test_nothing_to_draw(tmp_path):
    barrier_stats(reset=True)
    with pytest.raises(ValueError, match="no round has ended yet"):
        barrier_stats().plot(tmp_path / "waiting.png")


def test_without_matplotlib(some_waits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        barrier_stats().plot(tmp_path / "waiting.png")
