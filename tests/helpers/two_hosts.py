"""Run a script on two hosts with a cable between them, both on this machine: see two_hosts.sh."""

import os
import pathlib
import subprocess
import sys

import fresh_process
import ranks

_SCRIPT = pathlib.Path(__file__).with_suffix(".sh")
_ADDRESSES = ("192.0.2.1", "192.0.2.2")
_UNSHARE = [
    "unshare",
    *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]),
    *["--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"],
]


def why_not():
    """Return why there can be no such hosts on this machine, or None."""
    steps = "mount -t sysfs none /sys && ip link add name one type veth peer name two"
    try:
        done = subprocess.run(
            [*_UNSHARE, "sh", "-c", steps], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip()


def run(script, *arguments, **keywords):
    """Run a script on one rank a host; arguments as for :func:`fresh_process.run`.

    A rank that raises ends the job.
    """
    hosts = (
        ["-hosts", ",".join(_ADDRESSES)]
        if ranks.is_mpich()
        else ["--host", ",".join(_ADDRESSES), "--map-by", "node"]
    )
    command = [*_UNSHARE, str(_SCRIPT), ranks.MPIRUN, "-n", "2", *hosts]
    return fresh_process.run(
        pathlib.Path(script),
        *arguments,
        command=[*command, sys.executable, "-m", "mpi4py"],
        **{**ranks.ENVIRONMENT, **keywords},
    )
