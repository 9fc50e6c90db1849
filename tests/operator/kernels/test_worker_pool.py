"""The threads that help the CPU kernels: how many, what they compute, and that they sleep."""

import json

import pytest

import fresh_process

STEP = """
import glob, hashlib, json, os, time
import mxnet as mx
from gluon_syncbn import SyncBatchNorm

def workers():
    \"\"\"The states of the pool's threads.\"\"\"
    found = []
    for task in glob.glob("/proc/self/task/*/stat"):
        with open(task) as file:
            name, state = file.read().rsplit(")", 1)
        if name.endswith("(syncbn-worker"):
            found.append(state.split()[0])
    return found

mx.random.seed(0)
layer = SyncBatchNorm(num_devices=1)
layer.initialize()
x = mx.nd.random.normal(shape=(8, 32, 40, 40))
x.attach_grad()

def step():
    with mx.autograd.record():
        y = layer(x)
    y.backward(x)
    return hashlib.sha256(y.asnumpy().tobytes() + x.grad.asnumpy().tobytes()).hexdigest()
"""


@pytest.fixture(scope="module")
def alone():
    """What a single thread computes."""
    return fresh_process.run(STEP + "print(step(), workers())", OMP_NUM_THREADS="1").stdout.split()


def test_one_thread_has_no_workers(alone):
    assert alone[1] == "[]"


@pytest.mark.parametrize("threads", [2, 5])
def test_several_threads_compute_the_same_bits_and_sleep_then(threads, alone):
    script = (
        STEP
        + """
got = [step() for _ in range(20)]
end = time.monotonic() + 20
while workers() != ["S"] * HELPERS and time.monotonic() < end:
    time.sleep(0.01)
print(json.dumps([got, workers()]))
"""
    )
    script = script.replace("HELPERS", str(threads - 1))
    done = fresh_process.run(script, OMP_NUM_THREADS=str(threads))
    got, workers = json.loads(done.stdout)
    assert set(got) == {alone[0]}
    assert workers == ["S"] * (threads - 1)


@pytest.mark.parametrize("layouts", ["0", "1"])
def test_maps_in_mkl_dnns_layouts_get_helpers(layouts):
    """A map in blocks of channels is as much work as a plain one."""
    script = """
net = mx.gluon.nn.HybridSequential()
net.add(mx.gluon.nn.Conv2D(32, 3, in_channels=3), SyncBatchNorm(num_devices=1))
net.initialize()
net.hybridize()
with mx.autograd.record():
    y = net(mx.nd.ones((8, 3, 42, 42)))
y.backward()
mx.nd.waitall()
end = time.monotonic() + 20
while not workers() and time.monotonic() < end:
    time.sleep(0.01)  # a thread that was made has no name until it runs
print(len(workers()))
"""
    done = fresh_process.run(
        STEP + script, OMP_NUM_THREADS="2", GLUON_SYNCBN_MKLDNN_LAYOUTS=layouts
    )
    assert done.stdout.split() == ["1"]


def test_a_forked_child_has_workers_of_its_own(alone):
    script = (
        STEP
        + """
assert step() == "WANTED"
child = os.fork()
if child == 0:
    assert workers() == [] and step() == "WANTED" and len(workers()) == 1
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert step() == "WANTED"
"""
    )
    fresh_process.run(script.replace("WANTED", alone[0]), OMP_NUM_THREADS="2")
