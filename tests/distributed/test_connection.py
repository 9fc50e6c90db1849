"""The end of a connection: by a process that ends, dies or stops.  Every other one gets the error.

The programs run at the same time, because they mostly wait.
"""

import pathlib
from concurrent.futures import ThreadPoolExecutor

import mxnet as mx
import pytest

import ranks
from gluon_syncbn import SyncBatchNorm

pytest.importorskip("mpi4py")

FILE = pathlib.Path(__file__).with_name("faults.py")
ENDED = "rank 1 ({host}) has ended, or detached its network"
SILENT = "rank 1 ({host}) does not answer: its process was killed or stopped"
# fault -> (ranks, deadline, options of mpirun, what ranks but 1 read, whether the job ends with 0)
FAULTS = {
    "stops": (3, 2, [], SILENT, False),
    "raises": (3, 30, [], ENDED, False),
    "never attaches": (3, 2, [], "not every process", False),  # said twice by each
    "is collected": (2, 30, [], ENDED, True),
    "is killed": (2, 2, ["--continuous"], SILENT, None),  # mpirun may end with 0 all the same
    "open round": (2, 30, [], "rank 1 ({host}) reports: the program has ended", True),
    "interrupted": (2, 30, [], ENDED, False),
    "finalizes": (2, 30, [], ENDED, True),
    "ends": (2, 30, [], ENDED, True),
    "nothing": (2, 30, [], None, True),
}


@pytest.fixture(scope="module")
def processes():
    def run(fault):
        count, deadline, options, _, _ = FAULTS[fault]
        return ranks.run(count, FILE, fault, deadline, options=options, status=None)

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(FAULTS, pool.map(run, FAULTS)))


@ranks.needed
@pytest.mark.parametrize("fault", FAULTS)
def test_the_others_get_the_error_and_the_job_ends(fault, processes):
    count, deadline, options, wanted, well = FAULTS[fault]
    if options and not ranks.is_open_mpi_5():
        pytest.skip("needs Open MPI 5's --continuous: others end the job when a process is killed")
    process = processes[fault]
    output = process.stdout + process.stderr
    assert well in (None, process.returncode == 0), output
    lines = [line for line in process.stdout.splitlines() if line.startswith("rank ")]
    if wanted is None:
        assert not lines, output
        return
    assert len(lines) == (count - 1) * (2 if fault == "never attaches" else 1), output
    for line in lines:
        assert wanted.format(host=ranks.HOST) in line and "'layer_'" in line, line
        seconds = float(line.split()[3])
        assert deadline == 2 or seconds < 20, line  # not the 30 s, if the rank says that it ends
    if fault != "open round":
        assert "Exception ignored" not in output


@ranks.needed
def test_a_killed_process_ends_the_job():
    done = ranks.run(2, FILE, "is killed", 30, timeout=25, status=None)
    assert done.returncode != 0


def test_without_mpi_a_layer_has_no_connection():
    layer = SyncBatchNorm(num_devices=1)
    assert layer.exchange.local
    layer.initialize()
    layer(mx.nd.ones((2, 3))).wait_to_read()
