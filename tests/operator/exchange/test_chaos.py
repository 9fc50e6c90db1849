"""The exchange in random order, and with late devices; CHAOS_SEED=7 repeats a run."""

import os
import pathlib
import random
import subprocess

import pytest

from paths import OPERATOR

COMPILE = ["c++", "-O1", "-std=c++17", "-pthread", f"-I{OPERATOR}"]


@pytest.fixture(scope="module")
def exchange(tmp_path_factory):
    """The exchange, compiled."""
    folder = tmp_path_factory.mktemp("exchange")
    sources = sorted((OPERATOR / "exchange").glob("*.cc"))
    subprocess.run([*COMPILE, "-c", *map(str, sources)], check=True, cwd=folder)
    return [str(path) for path in sorted(folder.glob("*.o"))]


def run(name, exchange, folder):
    program = folder / name
    source = pathlib.Path(__file__).with_name(f"{name}.cc")
    subprocess.run([*COMPILE, str(source), *exchange, "-o", str(program)], check=True)
    seed = os.environ.get("CHAOS_SEED") or str(random.randrange(2**31))
    print(f"CHAOS_SEED={seed}")
    done = subprocess.run([program, seed], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_sum_of_100000_rounds_is_right(exchange, tmp_path):
    assert "100000 rounds" in run("chaos", exchange, tmp_path)


def test_a_late_device_never_gets_another_rounds_sum(exchange, tmp_path):
    run("late", exchange, tmp_path)
