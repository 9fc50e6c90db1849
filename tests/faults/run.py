"""Inject faults into training runs, one after the other, and look whether all is well after each.

    python tests/faults/run.py [--count 1000] [--seed 7]      (make faults COUNT=1000 SEED=7)

Each strikes a step of a run, and raises what it should.  After it no error is left, the weights are
those of before, and the moving statistics are the same on all devices.  They may have moved, so
they are set back; the next step then gives parameters, gradients and moving statistics equal to the
last bit to those of a run without any fault.  For 20 of these faults there is one of a whole
process (processes.py).
"""

import argparse
import faulthandler
import pathlib
import random
import re
import sys
import tempfile
import time
from collections import Counter

import mxnet as mx

import gluon_syncbn
import processes
from gluon_syncbn.key_barrier import BARRIER
from kinds import FAULTS
from training import LONG, Training, differences, is_weight, settle

HANG = 180  # seconds until a fault counts as a hang: the stacks are printed, the process ends
MODES = [None, {}, {"static_alloc": True}, {"static_alloc": True, "static_shape": True}]


def plan(count, generator):
    """The faults, and the run (devices, mode) that each strikes."""
    functions, weights = zip(*FAULTS)
    chosen = generator.choices(functions, weights, k=count)
    chosen[: len(functions)] = functions[:count]  # each at least once
    generator.shuffle(chosen)
    settings = [(devices, mode) for devices in (2, 3) for mode in range(len(MODES))]
    if count < 100:
        settings = generator.sample(settings, 2)  # each is traced, and has a reference
    return [(function, generator.choice(settings)) for function in chosen]


def plan_processes(count, generator):
    """The names and modes of faults of whole processes, each name equally often."""
    names = list(processes.SCRIPTS)
    generator.shuffle(names)
    modes = range(len(processes.MODES))
    return [(names[i % len(names)], generator.choice(modes)) for i in range(count)]


def train(setting, steps):
    devices, mode = setting
    run = Training([mx.cpu(i) for i in range(devices)], MODES[mode], seed=10 * devices + mode)
    for _ in range(steps):
        run.step()
    return run


def inject(function, run, generator):
    """Let a fault strike, restore the run, and train the step that it struck.

    Returns whether the fault had moved statistics.
    """
    statistics = run.before = run.statistics()
    run.failures = BARRIER.failures
    unread = function(run, generator)
    run.heal()
    error = settle()
    assert not error or (unread and re.search(unread, error, re.DOTALL)), f"left unread: {error}"
    state = run.state()
    changed = differences(state, run.states[-1], is_weight)
    assert not changed, f"the fault changed {changed}"
    apart = [n for n in statistics if len({a.tobytes() for a in state[n]}) > 1]
    assert not apart, f"not the same on all devices: {apart}"
    moved = bool(differences(state, statistics))
    run.restore(statistics)
    run.step()
    wrong = differences(run.states[-1], run.reference[len(run.states) - 1])
    assert not wrong, f"the step after it gave other bits: {wrong}"
    return moved


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    arguments = parser.parse_args()
    print(f"{arguments.count} faults, seed {arguments.seed}", flush=True)
    generator = random.Random(arguments.seed)
    gluon_syncbn.set_timeout(LONG)
    start = time.monotonic()
    faults = plan(arguments.count, generator)
    runs = {}
    for setting, strikes in sorted(Counter(setting for _, setting in faults).items()):
        reference = train(setting, strikes + 1).states
        runs[setting] = train(setting, 1)
        runs[setting].reference = reference
    done, moved = Counter(), 0
    for number, (function, setting) in enumerate(faults):
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            moved += inject(function, runs[setting], generator)
        except BaseException:
            what = f"{function.__name__} on {setting[0]} devices, hybridize({MODES[setting[1]]})"
            print(f"fault {number}, {what}:", file=sys.stderr, flush=True)
            raise
        done[function.__name__] += 1
    faulthandler.cancel_dump_traceback_later()
    for name, mode in plan_processes(arguments.count // 20, generator):
        with tempfile.TemporaryDirectory() as folder:
            processes.strike(name, mode, pathlib.Path(folder))
        done[f"a process {name}"] += 1
    for name, times in sorted(done.items()):
        print(f"  {times:4d} {name}")
    print(
        f"{sum(done.values())} faults in {time.monotonic() - start:.0f} s: no hang, the right "
        f"errors, and {len(faults)} next steps right to the last bit ({moved} of the faults had "
        "moved statistics before)"
    )


if __name__ == "__main__":
    main()
