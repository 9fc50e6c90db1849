"""Where the devices of a synchronized network wait: ResNet-18, a training step on two CPU contexts.

    python benchmarks/waiting.py [--size 224] [--steps 6]

Three candidates take turns, step by step: nn.BatchNorm; ours; and ours without waiting, the same
operators with the exchange reduced to one device, which shows what the operators cost.  Then
MXNet's profiler, which records an exchange from its arrival until its result is there, shows how
long each device waited for the other one.
"""

import argparse
import collections
import datetime
import json
import os
import statistics
import tempfile

import mxnet as mx

from gluon_syncbn import passes
from networks import make_step, timed
from run import processor

SUMS = {"_syncbn_sum": "forward", "_backward__syncbn_sum": "backward"}
DEVICES = 0, 1


def without_waiting(step):
    """The step, in which no pass is announced: each device is alone in its exchanges."""

    def run():
        begin, passes.begin = passes.begin, lambda exchanges, context: None
        try:
            step()
        finally:
            passes.begin = begin

    return run


def spans(step, steps):
    """[(device, operator, start, end)] in ms, of some steps under MXNet's profiler."""
    path = os.path.join(tempfile.mkdtemp(), "profile.json")
    kinds = {f"profile_{kind}": False for kind in ("all", "memory", "api")}
    mx.profiler.set_config(profile_symbolic=True, profile_imperative=True, filename=path, **kinds)
    mx.profiler.set_state("run")
    for _ in range(steps):
        step()
    mx.profiler.set_state("stop")
    mx.profiler.dump()
    with open(path) as file:
        events = json.load(file)["traceEvents"]
    found, begun = [], collections.defaultdict(list)
    for event in sorted((e for e in events if e.get("ph") in ("B", "E")), key=lambda e: e["ts"]):
        name = event["pid"], event["name"]
        if event["ph"] == "B":
            begun[name].append(event["ts"])
        elif begun[name] and event["pid"] in DEVICES:
            found.append((*name, begun[name].pop(0) / 1e3, event["ts"] / 1e3))
    return found


def busy(found, device):
    """The time in which the device runs at least one operator that is not an exchange."""
    total, until = 0, float("-inf")
    for _, _, start, end in sorted(
        (one for one in found if one[0] == device and one[1] not in SUMS), key=lambda one: one[2]
    ):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    shape, steps = (3, arguments.size, arguments.size), arguments.steps
    print(
        f"\nResNet-18, a step on two CPU contexts, {arguments.size}×{arguments.size}\n"
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores\n"
    )
    plain, ours = (
        make_step("ResNet-18", shape, 2, True, name) for name in ("nn.BatchNorm", "ours")
    )
    candidates = {"nn.BatchNorm": plain, "ours": ours, "without waiting": without_waiting(ours)}
    for step in candidates.values():
        step(), step()
    times = collections.defaultdict(list)
    for _ in range(2 * steps):
        for name, step in candidates.items():
            times[name].append(timed(step))
    print(f"{'':16} {'wall (ms)':>10} {'ratio':>7} {'CPU (ms)':>10} {'ratio':>7} {'idle':>6}")
    for name, values in times.items():
        wall, cpu = (1e3 * statistics.median(v) for v in zip(*values))
        ratios = [
            statistics.median(a[i] / b[i] for a, b in zip(values, times["nn.BatchNorm"]))
            for i in (0, 1)
        ]
        idle = 1 - cpu / (wall * os.cpu_count())
        print(f"{name:16} {wall:10.1f} {ratios[0]:7.3f} {cpu:10.1f} {ratios[1]:7.3f} {idle:6.1%}")

    # MXNet's profiler writes one file per process.
    found = spans(ours, steps)
    print(f"\n{'waits, a step':16} {'forward':>10} {'backward':>10} {'last to arrive':>22}   busy")
    for device in DEVICES:
        row, last = [], []
        for name in SUMS:
            of_both = [sorted(o[2:] for o in found if o[:2] == (d, name)) for d in DEVICES]
            mine, others = of_both[device], of_both[1 - device]
            row.append(sum(end - start for start, end in mine) / steps)
            later = sum(a[0] > b[0] for a, b in zip(mine, others))
            last.append(f"{later} of {len(mine)}")
        print(
            f"cpu({device}){'':10} {row[0]:7.1f} ms {row[1]:7.1f} ms {', '.join(last):>22} "
            f"{busy(found, device) / steps:4.0f} ms"
        )


if __name__ == "__main__":
    main()
