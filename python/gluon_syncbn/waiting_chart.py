"""A chart of who waited for whom: devices over time, and keys."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from .waiting_names import by_number, printable

_KEYS = 15
_NAME = 40  # characters of a key


def draw(waits: list, filename: Any) -> None:
    """Draw waits (:class:`gluon_syncbn.waiting.Wait`); see ``BarrierStats.plot``."""
    if not waits:
        raise ValueError("there is nothing to draw: no round has ended yet")
    try:
        # Not pyplot, which would choose a backend for the whole program.
        from matplotlib.colors import hsv_to_rgb
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plot draws with matplotlib: pip install matplotlib ({error})") from None
    devices = sorted({w.device for w in waits} | {w.last for w in waits}, key=by_number)
    colors = {
        device: f"C{i}" if len(devices) <= 10 else hsv_to_rgb((i / len(devices), 0.8, 0.9))
        for i, device in enumerate(devices)
    }
    keys = _seconds_by_key(waits)
    figure = Figure(figsize=(11, 1.8 + 0.45 * len(devices) + 0.28 * len(keys)), dpi=120)
    over_time, by_key = figure.subplots(
        2, 1, gridspec_kw={"height_ratios": [0.8 + len(devices), 0.8 + 0.6 * len(keys)]}
    )
    _draw_time(over_time, waits, devices, colors)
    _draw_keys(by_key, keys, devices, colors)
    figure.tight_layout()
    figure.savefig(filename)


def _draw_time(axes, waits, devices, colors):
    start = min(w.came for w in waits)
    for row, device in enumerate(devices):
        own = [w for w in waits if w.device == device and w.complete > w.came]
        axes.broken_barh(
            [(w.came - start, w.complete - w.came) for w in own],
            (row - 0.4, 0.8),
            facecolors=["black" if not w.succeeded else colors[w.last] for w in own],
        )
    axes.set_yticks(range(len(devices)), devices)
    axes.set_ylim(len(devices) - 0.4, -0.6)
    axes.set_xlabel("seconds")
    axes.set_title("waiting: the color is that of the device waited for (black: it failed)")


def _draw_keys(axes, keys, devices, colors):
    names = [_shorten(name) for name in keys]
    left = [0.0] * len(keys)
    for device in devices:
        widths = [1e3 * by_last.get(device, 0.0) for by_last in keys.values()]
        axes.barh(range(len(keys)), widths, left=left, color=colors[device], label=device)
        left = [a + b for a, b in zip(left, widths)]
    axes.set_yticks(range(len(keys)), names)
    axes.set_ylim(len(keys) - 0.4, -0.6)
    axes.set_xlabel("milliseconds waited in all, by the device waited for")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _seconds_by_key(waits):
    """Seconds waited by key, the longest first, and in it by the device waited for."""
    found = defaultdict(lambda: defaultdict(float))
    for w in waits:
        if not w.succeeded:
            continue  # nobody knows whom it waited for
        found[w.key][w.last] += w.complete - w.came
    longest = sorted(found, key=lambda key: -sum(found[key].values()))
    return {key: found[key] for key in longest[:_KEYS]}


def _shorten(key):
    # A dollar sign would begin a formula.
    text = printable(key).replace("$", r"\$")
    return text if len(text) <= _NAME else "..." + text[-_NAME:]
