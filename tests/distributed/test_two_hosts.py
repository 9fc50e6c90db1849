"""Processes on two hosts, simulated by network namespaces."""

import pathlib

import pytest

import ranks
import two_hosts

pytest.importorskip("mpi4py")


@ranks.needed
def test_training_and_a_cable_that_is_pulled_out(tmp_path):
    reason = two_hosts.why_not()
    if reason:
        pytest.skip(f"no network namespaces here: {reason}")
    two_hosts.run(pathlib.Path(__file__).with_name("on_two_hosts.py"), tmp_path / "told")
