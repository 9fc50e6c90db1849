"""100,000 rounds of the exchange in random order; CHAOS_SEED=7 in the environment repeats a run."""

import os
import pathlib
import random
import subprocess

from paths import OPERATOR

SOURCE = pathlib.Path(__file__).with_name("chaos.cc")


def test_every_sum_is_right(tmp_path):
    program = tmp_path / "chaos"
    sources = [SOURCE, *sorted((OPERATOR / "exchange").glob("*.cc"))]
    options = ["-O2", "-std=c++17", "-pthread", f"-I{OPERATOR}"]
    subprocess.run(["c++", *options, *map(str, sources), "-o", str(program)], check=True)
    seed = os.environ.get("CHAOS_SEED") or str(random.randrange(2**31))
    print(f"CHAOS_SEED={seed}")
    done = subprocess.run([program, seed], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100000 rounds" in done.stdout
