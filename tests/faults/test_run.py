"""A few faults of each kind; `make faults` injects a thousand."""

import pathlib

import fresh_process

RUN = pathlib.Path(__file__).with_name("run.py")


def test_faults_of_each_kind():
    done = fresh_process.run(RUN, "--count", 19, timeout=600)
    assert "19 faults in" in done.stdout, done.stdout
