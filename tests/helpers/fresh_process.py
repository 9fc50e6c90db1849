"""Run a script in a Python process of its own.

For what a process decides once (environment variables, imports, threads, forks), and for what may
end it.
"""

import os
import pathlib
import signal
import subprocess
import sys


def run(script, *arguments, timeout=120, status=0, cwd=None, command=None, **environment):
    """Run ``script`` in a fresh interpreter that finds the same modules as this one.

    Parameters
    ----------
    script : str or pathlib.Path
        Python code, or the file that has it.
    *arguments : str
        Its ``sys.argv[1:]``.
    timeout : float, default 120
        In seconds.  A script that takes longer is aborted and fails.
    status : int or None, default 0
        The exit status to expect; minus the signal's number for one that ends by a signal, None for
        any.
    cwd : path, optional
        The working directory.
    command : list of str, optional
        What runs the script; this interpreter by default.
    **environment : str or None
        Environment variables to set; None removes one.

    Returns
    -------
    subprocess.CompletedProcess
        With ``returncode``, ``stdout`` and ``stderr``, the latter two as text.

    Raises
    ------
    AssertionError
        If the script times out or exits with another status.  The message has what it printed and,
        after a timeout, the stack of each of its Python threads.
    """
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONFAULTHANDLER": "1",
        **environment,
    }
    source = [script] if isinstance(script, pathlib.Path) else ["-c", script]
    process = subprocess.Popen(
        [*(command or [sys.executable]), *map(str, [*source, *arguments])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={name: value for name, value in variables.items() if value is not None},
        start_new_session=True,  # its process group has what the script forks
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        stdout, stderr = _abort(process)
        raise AssertionError(
            _report(f"the script did not end within {timeout} s", stdout, stderr)
        ) from None
    except BaseException:  # such as the test's own deadline
        _signal(process, signal.SIGKILL)
        process.communicate()
        raise
    if status is not None and process.returncode != status:
        what = f"the script ended with status {process.returncode}, not {status}"
        raise AssertionError(_report(what, stdout, stderr))
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _abort(process):
    """End ``process`` and all that it has started; return what they printed."""
    _signal(process, signal.SIGABRT)  # on which Python prints the stack of each thread
    try:
        return process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        return process.communicate()


def _signal(process, number):
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def _report(what, stdout, stderr):
    return f"{what}\n--- stdout ---\n{stdout}\n--- stderr ---\n{stderr}"
