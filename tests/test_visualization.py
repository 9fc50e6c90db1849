"""mx.viz on our symbols: it makes assumptions about the names and shapes of outputs."""

import mxnet as mx
import pytest

from gluon_syncbn import convert_symbol
from module_training import EXPORTED, exported

SHAPE = {"data": (2, 3, 8, 8)}


def converted(num_devices):
    x = mx.sym.Convolution(mx.sym.var("data"), num_filter=4, kernel=(3, 3), name="conv")
    x = mx.sym.BatchNorm(x, name="bn")
    return convert_symbol(mx.sym.Activation(x, act_type="relu"), num_devices)


SYMBOLS = {
    "network": exported,
    "alone": lambda: exported(1),
    "converted": lambda: converted(2),
    "converted-alone": lambda: converted(1),
    "exported": lambda: mx.sym.load(str(EXPORTED)),
}


@pytest.mark.parametrize("name", SYMBOLS)
def test_print_summary(name, capsys):
    """It takes NAME_output of every node, drops the first dimension, and looks at the next."""
    mx.viz.print_summary(SYMBOLS[name](), SHAPE)
    lines = [line for line in capsys.readouterr().out.splitlines() if "_syncbn_" in line]
    assert any("4x6x6" in line for line in lines)


@pytest.mark.parametrize("name", SYMBOLS)
def test_plot_network(name):
    """It needs NAME_output of every node that another reads."""
    pytest.importorskip("graphviz")
    sym = SYMBOLS[name]()
    plot = mx.viz.plot_network(sym, shape=SHAPE, dtype={"data": "float32"})
    for node in sym.get_internals().list_outputs():
        if "fwd" in node or "sum_" in node:
            assert node.replace("_output", "") in plot.source
