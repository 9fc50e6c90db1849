"""How much the time of a layer differs between fresh processes.

    python benchmarks/processes.py [--processes 12] [--package FOLDER ...]

Where the scheduler puts the threads of a process can double a layer's time, for as long as the
process lives, so one process says little.  Candidates take turns.  --package adds the layer of
another checkout (its python folder), to compare before and after.
"""

import argparse
import datetime
import os
import statistics

from run import Candidate, named, processor

SHAPES = [(16, 64, 56, 56), (32, 256, 14, 14)]


def median_of(candidate, shape):
    case = {"shape": shape, "axis": 1, "dtype": "float32"}
    return statistics.median(candidate.ask(case=case, seconds=0.5)["times"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=12, help="of each candidate")
    parser.add_argument("--package", action="append", default=[], help="another python folder")
    arguments = parser.parse_args()
    candidates = {
        "ours": {"name": "ours"},
        **{folder: {"name": "ours", "package": folder} for folder in arguments.package},
        "mxnet BatchNorm": {"name": "mxnet BatchNorm"},
    }
    print(
        f"\nForward and backward in {arguments.processes} fresh processes, two threads, float32: "
        f"medians in ms.\n{datetime.date.today()}, {processor()}, {os.cpu_count()} cores"
    )
    times = {label: {shape: [] for shape in SHAPES} for label in candidates}
    for _ in range(arguments.processes):
        for label, options in candidates.items():
            candidate = Candidate(label, **options)
            for shape in SHAPES:
                times[label][shape].append(median_of(candidate, shape))
            candidate.process.stdin.close()
            candidate.process.wait()
    for shape in SHAPES:
        print(
            f"\n{named(shape):24} {'best':>8} {'median':>8} {'worst but one':>14} {'over best':>10}"
        )
        for label in candidates:
            found = sorted(times[label][shape])
            bad = found[-2] if len(found) > 1 else found[-1]
            print(
                f"{label:24} {found[0]:8.2f} {statistics.median(found):8.2f} {bad:14.2f} "
                f"{bad / found[0]:10.2f}"
            )


if __name__ == "__main__":
    main()
