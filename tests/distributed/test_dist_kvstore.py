"""Attached networks whose gradients go through MXNet's parameter servers."""

import os
import pathlib
import socket
import subprocess
import sys

import mxnet as mx
import pytest

import ranks

pytest.importorskip("mpi4py")

FILE = pathlib.Path(__file__).with_name("dist_kvstore.py")
WORKERS = 2


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@ranks.needed
@pytest.mark.skipif(
    not mx.runtime.Features().is_enabled("DIST_KVSTORE"), reason="MXNet was built without"
)
@pytest.mark.parametrize("update_on_kvstore", [0, 1])
def test_training_equals_one_process(update_on_kvstore):
    job = {
        "DMLC_PS_ROOT_URI": "127.0.0.1",
        "DMLC_PS_ROOT_PORT": str(free_port()),
        "DMLC_NUM_WORKER": str(WORKERS),
        "DMLC_NUM_SERVER": "1",
    }
    # Importing MXNet is all that these do.
    others = [
        subprocess.Popen(
            [sys.executable, "-c", "import mxnet"], env={**os.environ, **job, "DMLC_ROLE": role}
        )
        for role in ("scheduler", "server")
    ]
    try:
        ranks.run(WORKERS, FILE, update_on_kvstore, timeout=60, **job, DMLC_ROLE="worker")
        assert [process.wait(30) for process in others] == [0, 0]
    finally:
        for process in others:
            process.kill()
            process.wait()
