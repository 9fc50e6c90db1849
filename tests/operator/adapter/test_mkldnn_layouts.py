"""Feature maps in MKL-DNN's layouts: no reorder more than with nn.BatchNorm, and the same results.

Whether our operators take the layouts is decided once in a process, so everything here runs in
processes of its own.
"""

import re
from collections import Counter

import numpy as np
import pytest

import fresh_process

SWITCH = "GLUON_SYNCBN_MKLDNN_LAYOUTS"


def run(script, *arguments, **environment):
    environment = {SWITCH: "1", "MXNET_MKLDNN_ENABLED": "1", **environment}
    return fresh_process.run(script, *arguments, timeout=300, **environment).stdout


WHY = """
from gluon_syncbn.library import LIBRARY
print(LIBRARY.WhyNoMkldnnLayouts().decode())
"""


def test_they_are_on():
    assert run(WHY).strip() == ""


@pytest.mark.parametrize(
    "variable, value, why",
    [
        (SWITCH, "0", "GLUON_SYNCBN_MKLDNN_LAYOUTS=0"),
        ("MXNET_MKLDNN_ENABLED", "0", "MXNET_MKLDNN_ENABLED=0"),
        ("GLUON_SYNCBN_CORRUPT_EXPECTATION", "version", "its version"),
        ("GLUON_SYNCBN_CORRUPT_EXPECTATION", "bytes", "the size in MKLDNNMemory"),
        ("GLUON_SYNCBN_CORRUPT_EXPECTATION", "descriptor", "the descriptor in MKLDNNMemory"),
        ("GLUON_SYNCBN_CORRUPT_EXPECTATION", "numbers", "reordering to plain"),
    ],
)
def test_they_are_off_where_something_differs(variable, value, why):
    assert why in run(WHY, **{variable: value})


# Prints what MKL-DNN does in one step, after two others.
STEP = """
import os, sys
import layout_cases
import mxnet as mx
from gluon_syncbn import ModelDataParallel, parallel_backward
from mxnet import autograd

name, layer, mode, devices, train = sys.argv[1:]
contexts = [mx.cpu(i) for i in range(int(devices))]
net, x = layout_cases.prepared(name, layer, mode, ctx=contexts)
xs = [x.copyto(context) for context in contexts]
if len(contexts) > 1:
    model = ModelDataParallel(net, contexts)
else:
    model = lambda xs: [net(xs[0])]

def step():
    with autograd.record(train_mode=train == "training"):
        losses = [(y * y).sum() for y in model(xs)]
    if train == "training":
        parallel_backward(losses)
    mx.nd.waitall()

step()
step()
os.write(1, b"-- step --\\n")
step()
os.write(1, b"-- end --\\n")
"""


def reorders(name, layer, mode, devices, train, **environment):
    """Count the reorders of a step, by their layouts and shapes."""
    printed = run(STEP, name, layer, mode, devices, train, DNNL_VERBOSE="1", **environment)
    step = printed.split("-- step --")[1].split("-- end --")[0]
    lines = re.findall(r"verbose,exec,cpu,reorder,[^,]*,[^,]*,([^\n]*),[0-9.e+-]+$", step, re.M)
    assert "verbose,exec,cpu,convolution" in step
    return Counter(lines)


@pytest.mark.parametrize("train", ["training", "inference"])
@pytest.mark.parametrize("mode", ["imperative", "static"])
@pytest.mark.parametrize(
    "name, layer, devices",
    [
        ("convolutions", "lone", 1),
        ("convolutions", "chain", 1),
        ("convolutions", "chain", 2),
        ("residual", "chain", 1),
        ("pooled", "lone", 1),
    ],
)
def test_no_reorder_that_batch_norm_would_not_have(name, layer, devices, mode, train):
    allowed = reorders(name, "nn", mode, devices, train)
    assert not reorders(name, layer, mode, devices, train) - allowed


def test_moving_averages_take_the_layouts():
    case = "static", 1, "training"
    allowed = reorders("convolutions", "nn", *case)
    assert not reorders("convolutions", "averages", *case) - allowed


def test_without_the_layouts_there_are_more_reorders():
    case = "convolutions", "lone", "static", 1, "training"
    with_layouts, without = reorders(*case), reorders(*case, **{SWITCH: "0"})
    assert sum(without.values()) >= sum(with_layouts.values()) + 8


CASES = "import layout_cases, sys; layout_cases.main(sys.argv[1])"


@pytest.mark.parametrize(
    "off, environment",
    [
        ({SWITCH: "0"}, {}),
        ({SWITCH: "0"}, {"DNNL_MAX_CPU_ISA": "AVX2"}),
        ({SWITCH: "0"}, {"DNNL_MAX_CPU_ISA": "SSE41"}),
        ({"GLUON_SYNCBN_CORRUPT_EXPECTATION": "numbers"}, {}),
    ],
    ids=["widest", "AVX2", "SSE4.1", "refused"],
)
def test_results_are_the_same_bit_for_bit(tmp_path, off, environment):
    on_path, off_path = str(tmp_path / "on.npz"), str(tmp_path / "off.npz")
    assert run(CASES, on_path, **environment).strip() == ""
    assert run(CASES, off_path, **environment, **off).strip() != ""
    with np.load(on_path) as ours, np.load(off_path) as plain:
        assert ours.files == plain.files and len(ours.files) > 200
        different = {name: int(np.sum(ours[name] != plain[name])) for name in ours.files}
        assert not {name: count for name, count in different.items() if count > 0}
        assert all(np.all(np.isfinite(ours[name])) for name in ours.files)


# Calls our layers alone on one blocked map: no other operator tidies MKL-DNN's stream.
MEMORY = """
import layout_cases
import mxnet as mx
from mxnet import autograd
from mxnet.gluon import nn

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

convolution = layout_cases.conv()
convolution.initialize()
with autograd.record():
    x = convolution(layout_cases.numbers((2, 16, 4, 4))).detach()
    dy = convolution(layout_cases.numbers((2, 16, 4, 4), 1)).detach()
layers = [layout_cases.LAYERS[name]() for name in ("lone", "chain")]
for layer in layers:
    layer.initialize()
x.attach_grad()

def steps(count):
    for _ in range(count):
        for layer in layers:
            with autograd.record():
                y = layer(x)
            y.backward(dy)
        mx.nd.waitall()

steps(500)
before = resident()
steps(3000)
print((resident() - before) // 1024)
"""


def test_memory_does_not_grow():
    kilobytes = int(run(MEMORY))
    assert kilobytes < 2000, f"{kilobytes} KB in 3000 steps"


# After such an error MXNet's engine outlives the arrays that our library has made for its checks.
ERROR = """
import mxnet as mx
from gluon_syncbn import SyncBatchNorm

sym = SyncBatchNorm(num_devices=2)(mx.sym.var("data"))
try:
    sym.simple_bind(mx.cpu(), data=(3,))
except RuntimeError as error:
    assert "2 or more dimensions" in str(error)
"""


def test_the_process_ends_well_after_an_error():
    run(ERROR)
