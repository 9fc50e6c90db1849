"""The exchange in random order, and with late devices; CHAOS_SEED=7 repeats a run."""

import os
import pathlib
import random
import subprocess

from paths import OPERATOR


def run(name, tmp_path):
    program = tmp_path / name
    source = pathlib.Path(__file__).with_name(f"{name}.cc")
    sources = [source, OPERATOR / "exchange" / "key_barrier.cc"]
    options = ["-O2", "-std=c++17", "-pthread", f"-I{OPERATOR}"]
    subprocess.run(["c++", *options, *map(str, sources), "-o", str(program)], check=True)
    seed = os.environ.get("CHAOS_SEED") or str(random.randrange(2**31))
    print(f"CHAOS_SEED={seed}")
    done = subprocess.run([program, seed], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_sum_of_100000_rounds_is_right(tmp_path):
    assert "100000 rounds" in run("chaos", tmp_path)


def test_a_late_device_never_gets_another_rounds_sum(tmp_path):
    run("late", tmp_path)
