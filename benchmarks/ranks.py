"""The exchange between processes, next to MPI's own collectives of the same size.

    python benchmarks/ranks.py --program build/ranks_bench [--jobs 5]

Figures are medians of a job's rounds, in microseconds, and of those the median and the range over
fresh jobs: where the scheduler puts the ranks differs from job to job.
"""

import argparse
import datetime
import os
import pathlib
import statistics
import subprocess
import sys

from run import processor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from ranks import ENVIRONMENT, MPIRUN  # noqa: E402

RANKS = 2, 4
CHANNELS = 64, 512, 2048


def launch(ranks, *command, **options):
    return subprocess.run(
        [MPIRUN, "-n", str(ranks), *map(str, command)],
        env={name: v for name, v in {**os.environ, **ENVIRONMENT}.items() if v is not None},
        text=True,
        check=True,
        **options,
    )


def run(arguments, ranks, values, pause):
    """Return {way: median microseconds} of one job."""
    done = launch(
        *(ranks, arguments.program, values, arguments.rounds, pause), stdout=subprocess.PIPE
    )
    rows = (line.split("\t") for line in done.stdout.splitlines())
    return {way: float(time) for way, time in rows}


def spread(numbers):
    return f"{statistics.median(numbers):6.1f} [{min(numbers):.1f} - {max(numbers):.1f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", required=True, help="what ranks_bench.cc was compiled to")
    parser.add_argument("--jobs", type=int, default=5, help="fresh jobs of each kind")
    parser.add_argument("--rounds", type=int, default=500, help="in a job")
    arguments = parser.parse_args()
    print(
        f"\nAn exchange between processes, microseconds: median and range over {arguments.jobs} "
        f"jobs.\n{datetime.date.today()}, {processor()}, {os.cpu_count()} cores"
    )
    for pause in (0, 1000):
        for ranks in RANKS:
            for channels in CHANNELS:
                values = 2 * channels + 1
                jobs = [run(arguments, ranks, values, pause) for _ in range(arguments.jobs)]
                after = f", each after a sleep of {pause} us" if pause else ""
                print(f"\n{ranks} ranks, {channels} channels ({values} float64){after}")
                for way in jobs[0]:
                    print(f"  {way:38} {spread([job[way] for job in jobs])}")
                more = [job["exchange"] - job["MPI_Allreduce"] for job in jobs]
                print(f"  {'exchange beyond MPI_Allreduce':38} {spread(more)}")
    print("\nIts share of a training step:")
    network = pathlib.Path(__file__).with_name("ranks_network.py")
    for ranks in (1, *RANKS):
        launch(ranks, sys.executable, network)


if __name__ == "__main__":
    main()
