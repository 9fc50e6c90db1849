"""Waits as events next to MXNet's in a file that a browser's trace viewer opens."""

import json

import pytest

import fresh_process
from gluon_syncbn.waiting import BarrierStats, Wait

PROFILED = """
import json
import sys
import mxnet as mx
from mxnet import autograd, gluon
from gluon_syncbn import ModelDataParallel, SyncBatchNorm, barrier_stats, parallel_backward

two = [mx.cpu(0), mx.cpu(1)]
net = gluon.nn.HybridSequential()
net.add(gluon.nn.Dense(3), SyncBatchNorm())
net.initialize(ctx=two)
if sys.argv[1] == "static_shape":
    net.hybridize(static_alloc=True, static_shape=True)
model = ModelDataParallel(net, two)

def step():
    with autograd.record():
        ys = model([mx.nd.ones((2, 4), ctx=c) for c in two])
    parallel_backward(ys)
    mx.nd.waitall()

step()
barrier_stats(reset=True)
mx.profiler.set_config(profile_all=True, filename="profile.json", aggregate_stats=False)
mx.profiler.set_state("run")
step()
mx.profiler.set_state("stop")
mx.profiler.dump()
for _ in range(2):  # the second replaces the first
    barrier_stats().add_to_profile("profile.json")
print(net[1].key)
"""


@pytest.mark.parametrize("how", ["imperative", "static_shape"])
def test_events_are_next_to_those_of_the_operators(how, tmp_path):
    unbulked = {"MXNET_EXEC_BULK_EXEC_TRAIN": "0"}
    key = fresh_process.run(PROFILED, how, cwd=tmp_path, **unbulked).stdout.split()[-1]
    events = json.loads((tmp_path / "profile.json").read_text())["traceEvents"]
    operators = [e for e in events if e.get("cat") == "operator"]
    # In a graph, MXNet runs other operators than exchanges in bulk, as it does its own.
    for name in ("sum",) if how != "imperative" else ("moments", "sum", "normalize"):
        for direction in ("_syncbn_", "_backward__syncbn_"):
            found = {e["pid"] for e in operators if e["name"] == direction + name}
            assert {0, 1} <= found, (direction, name)
    ours = [e for e in events if e.get("cat") == "gluon_syncbn"]
    assert len(ours) == 4 and {e["name"] for e in ours} == {key}
    assert sorted(e["args"]["direction"] for e in ours) == ["backward"] * 2 + ["forward"] * 2
    assert {e["args"]["came last"] for e in ours} <= {"cpu(0)", "cpu(1)"}
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(rows[e["tid"]] for e in ours) == ["cpu(0)"] * 2 + ["cpu(1)"] * 2
    # One clock: the exchange lies within its operator.
    sums = sorted(e["ts"] for e in operators if "_syncbn_sum" in e["name"])
    for event in ours:
        assert sums[0] - 100 <= event["ts"] <= event["ts"] + event["dur"] <= sums[-1] + 100


def wait(device, came, complete):
    return Wait("k", 0, 1, False, True, device, "cpu(9)", came, complete, complete)


def test_waits_that_overlap_get_rows_of_their_own(tmp_path):
    waits = [
        wait("cpu(0)", 1, 4),
        wait("cpu(0)", 2, 3),
        wait("cpu(0)", 3, 5),
        wait("cpu(1)", 1, 2),
        wait("cpu(1)", 2, 3),
    ]
    path = tmp_path / "trace.json"
    BarrierStats({}, waits).add_to_profile(path)
    events = json.loads(path.read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found = [(rows[e["tid"]], round(e["dur"] / 1e6)) for e in events if e["ph"] == "X"]
    assert sorted(found) == [
        ("cpu(0)", 3),
        ("cpu(0) (2)", 1),
        ("cpu(0) (2)", 2),
        ("cpu(1)", 1),
        ("cpu(1)", 1),
    ]


@pytest.mark.parametrize("content", ["", '{"traceEvents": [', "[]", '{"traceEvents": [1]}'])
def test_a_file_that_is_no_profile_stays_as_it_is(content, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"not a finished profile .*mx\.profiler\.dump\(\)"):
        BarrierStats({}, []).add_to_profile(path)
    assert path.read_text() == content and list(tmp_path.iterdir()) == [path]
