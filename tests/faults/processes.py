"""Faults of whole processes: each script runs in one of its own, which must end as it should.

Its exit status and its errors are given.  A process that hangs is ended after a time limit.
"""

import re

import fresh_process

TIME_LIMIT = 120  # seconds, of which importing MXNet takes the most on a busy machine

# {hybridize}: how the network is hybridized.  The deadline is far longer than the time limit, and a
# child that is spawned runs this without the last lines.
PRELUDE = """
import multiprocessing, os, signal, sys, threading, time
import mxnet as mx
from mxnet import autograd
import gluon_syncbn
from gluon_syncbn import KeyBarrierSum, ModelDataParallel, SyncBatchNorm, parallel_backward

contexts = [mx.cpu(0), mx.cpu(1)]
signal.signal(signal.SIGINT, signal.default_int_handler)

class Net(mx.gluon.nn.HybridSequential):
    slow = None
    def forward(self, x):
        x = super().forward(x)
        if x.context == self.slow:
            time.sleep(1)
        return x

def make():
    net = Net()
    net.add(SyncBatchNorm(in_channels=1), SyncBatchNorm(in_channels=1))
    net.initialize(ctx=contexts)
    hybridize = {hybridize}
    if hybridize is not None:
        for child in net:
            child.hybridize(**hybridize)
    return net, ModelDataParallel(net, contexts)

def run():
    with autograd.record():
        return model([mx.nd.full((1, 1), i, ctx=c) for i, c in enumerate(contexts)])

def step():
    outs = run()
    parallel_backward(outs)
    assert [round(float(out.asscalar()), 1) for out in outs] == [-1.0, 1.0]

def lonely():
    return KeyBarrierSum(mx.nd.ones(2, ctx=contexts[0]), key="lonely", num_devices=2)

def in_child(n):
    global net, model
    net, model = make()
    step()

if __name__ == "__main__":
    net, model = make()
    step()
"""

# name -> (script, exit status or None for any, a pattern of its errors; "": none; None: any)
SCRIPTS = {
    "ends with rounds open": ("kept = lonely(), run()", 0, ""),
    "exits with rounds open": ("kept = lonely(); run(); sys.exit(3)", 3, ""),
    "raises with rounds open": ("kept = lonely(); raise KeyError('told to')", 1, "KeyError"),
    "ends while a thread waits": (
        "threading.Thread(target=lambda: lonely().asnumpy(), daemon=True).start()\n"
        "    time.sleep(0.2)",
        0,
        None,
    ),
    "ends at once": ("kept = lonely(); os._exit(5)", 5, ""),
    "is terminated": (
        "kept = lonely(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
        -15,
        "",
    ),
    "is interrupted and does not handle it": (
        "net.slow = contexts[1]\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    run()",
        -2,
        "KeyboardInterrupt",
    ),
    "is interrupted while it reads": (
        "gluon_syncbn.set_timeout(1)\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    lonely().asnumpy()",
        None,  # by the interruption or by the error, whichever Python raises first
        "KeyboardInterrupt|not every device came",
    ),
    "forks while a step is under way": (
        "outs = run()\n"
        "    process = multiprocessing.get_context('fork').Process(target=step)\n"
        "    process.start(); process.join()\n"
        "    parallel_backward(outs)\n"
        "    step()\n"
        "    sys.exit(process.exitcode)",
        0,
        "",
    ),
    "spawns while a round is open": (
        "kept = lonely()\n"
        "    process = multiprocessing.get_context('spawn').Process(target=in_child, args=(1,))\n"
        "    process.start(); process.join()\n"
        "    step()\n"
        "    sys.exit(process.exitcode)",
        0,
        "",
    ),
    "has children that fork, train and exit": (
        "outs = run()\n"
        "    with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "        pool.map(in_child, range(2))\n"
        "    step()",
        0,
        "",
    ),
    "has a child that ends in the middle": (
        "child = os.fork()\n"
        "    if child == 0:\n"
        "        kept = lonely(); run(); sys.exit(4)\n"
        "    status = os.waitpid(child, 0)[1]\n"
        "    step()\n"
        "    sys.exit(os.WEXITSTATUS(status))",
        4,
        "",
    ),
    # MXNet waits for everything pending before a fork, and an error that nobody has read ends the
    # process there (docs/limits.md).
    "forks with a round open that fails": (
        "gluon_syncbn.set_timeout(1); kept = lonely(); os.fork()",
        -6,
        "forward exchange of key 'lonely' failed: not every device came within 1 s",
    ),
}
MODES = ["None", "{}", "{'static_alloc': True}", "{'static_alloc': True, 'static_shape': True}"]


def strike(name, mode, folder):
    """Run one of the scripts, and assert how its process ends.

    Parameters
    ----------
    name : str
        In SCRIPTS.
    mode : int
        How the network is hybridized: a place in MODES.
    folder : pathlib.Path
        For the script's file: a child that is spawned imports it.
    """
    script, status, errors = SCRIPTS[name]
    file = folder / "script.py"
    text = PRELUDE.replace("{hybridize}", MODES[mode]) + "    " + script + "\n"
    file.write_text(text, encoding="utf-8")
    done = fresh_process.run(
        file,
        timeout=TIME_LIMIT,
        status=status,
        GLUON_SYNCBN_TIMEOUT="100000",
        PYTHONFAULTHANDLER=None,
    )
    if errors is not None:
        right = re.search(errors, done.stderr) if errors else not done.stderr
        assert right, f"{name}: its errors are:\n{done.stderr}"
