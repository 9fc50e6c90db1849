"""What the ranks on two hosts run: a training run, and a cable that is pulled out for a while.

    mpirun -n 2 --host HOST-A,HOST-B python -m mpi4py on_two_hosts.py FILE

Rank 1 pulls it, at its end, until rank 0 has written the file.
"""

import pathlib
import socket
import subprocess
import sys
import time

import mxnet as mx
from cases import RANK, WORLD, attached, check_training, error_of, same_everywhere, step_of, timeout
from mxnet import autograd

from gluon_syncbn import SyncBatchNorm, distributed, set_timeout
from networks import convolutional

CABLE = pathlib.Path("/sys/class/net/eth0")
STATISTICS = 1000 * 8 * 2  # the bytes of an exchange of 1000 channels


def sent():
    return int((CABLE / "statistics" / "tx_bytes").read_text())


def the_ranks_are_on_two_hosts():
    assert WORLD.allgather(socket.gethostname()) == ["host-a", "host-b"]
    layer = SyncBatchNorm(in_channels=1000)
    layer.initialize()
    with attached(layer):
        before = sent()
        x = mx.nd.ones((3, 1000))
        x.attach_grad()
        with autograd.record():
            out = layer(x)
        out.backward()
        mx.nd.waitall()
        assert sent() - before > 2 * STATISTICS, sent() - before


def training_equals_one_process():
    check_training(lambda: convolutional(prefix=None), {"static_alloc": True})


def a_cable_that_was_pulled_out():
    layer = SyncBatchNorm(in_channels=3, prefix="far_")
    layer.initialize()
    distributed.attach(layer)
    step_of(layer)
    WORLD.Barrier()
    file = pathlib.Path(sys.argv[1])
    with timeout(1):
        if RANK == 1:
            subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
        start = time.monotonic()
        message = error_of(lambda: step_of(layer))
        took = time.monotonic() - start
        if RANK == 1:
            while not file.exists():  # the other rank is to find out by itself, not from this one
                time.sleep(0.01)
            subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)
        else:
            file.touch()
    assert took < 10, took
    other = ["rank 1 (host-b)", "rank 0 (host-a)"][RANK]
    for words in ("far_", f"{other} does not answer", "cannot be reached"):
        assert words in message, message
    # The exchange may have been complete on one of them, which then has moved its average.
    layer.running_mean.set_data(mx.nd.zeros(3))
    distributed.attach(layer)
    assert same_everywhere(step_of(layer))
    WORLD.Barrier()
    distributed.detach(layer)


def main():
    set_timeout(20)
    for case in (
        the_ranks_are_on_two_hosts,
        training_equals_one_process,
        a_cable_that_was_pulled_out,
    ):
        start = time.monotonic()
        case()
        mx.nd.waitall()
        if RANK == 0:
            print(f"{case.__name__}: {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
