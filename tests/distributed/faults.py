"""What goes wrong in a process as a whole: a program for test_connection.py.

    mpirun -n 3 python faults.py FAULT DEADLINE

Rank 1 has the fault, after a step that works; every other rank prints the error that it gets.
"""

import gc
import os
import signal
import sys
import time

import mxnet as mx
from mpi4py import MPI
from mxnet import autograd

import gluon_syncbn
from gluon_syncbn import SyncBatchNorm, distributed

RANK = MPI.COMM_WORLD.rank
fault = sys.argv[1]


def step(net):
    with autograd.record():
        out = net(mx.nd.ones((2, 3)))
    out.wait_to_read()


gluon_syncbn.set_timeout(float(sys.argv[2]))
layer = SyncBatchNorm(in_channels=3, prefix="layer_")
layer.initialize()
if fault == "never attaches":
    if RANK == 1:
        time.sleep(60)
    for _ in range(2):
        try:
            distributed.attach(layer)
        except RuntimeError as error:
            print(f"rank {RANK} after 2.0 s: 'layer_': {error}", flush=True)
    sys.exit(0)
distributed.attach(layer)
step(layer)
start = time.monotonic()
if RANK == 1:
    if fault == "raises":
        raise ValueError("a broken image")
    if fault == "ends":
        sys.exit(0)
    if fault == "open round":  # ends while its own exchange waits
        with autograd.record():
            layer(mx.nd.ones((2, 3)))
        time.sleep(1)
        sys.exit(0)
    if fault == "finalizes":
        MPI.Finalize()
        time.sleep(1)
        sys.exit(0)
    if fault == "is collected":
        del layer
        gc.collect()
        time.sleep(6)
        sys.exit(0)
    if fault == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "interrupted":  # Ctrl-C while it waits for the others
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        time.sleep(60)
elif fault == "open round":
    time.sleep(4)  # it has ended by then
if fault == "nothing":
    sys.exit(0)
try:
    step(layer)
except mx.MXNetError as error:
    print(f"rank {RANK} after {time.monotonic() - start:.1f} s: {error}", flush=True)
