"""A file of MXNet's tests under nose, in processes of its own, with a time limit for each test.

A test that hangs in MXNet's library cannot be interrupted from within, and one that crashes takes
its process along.  So this process watches: it ends the other when a test takes too long, records
what happened, and starts another for the tests that are left.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "python"
SEED = "1"  # of each test: all runs draw the same numbers
OUTSIDE = "(import, set-up or exit)"  # what a process does when it runs no test


class Run(NamedTuple):
    """What became of a file's tests.

    ``outcomes``: for each test, ``pass``, ``fail``, ``skip``, ``crash`` or ``no end``, and the
    error or None.  ``counts``: see `counting.counts`.
    """

    outcomes: dict
    counts: Counter


def run_file(file, match, replace, limit, log):
    """Run the tests of a file whose functions' names match.

    Parameters
    ----------
    file : pathlib.Path
    match : str
        A regular expression; an empty one for all.
    replace : str or None
        See `replaced.install`; None for MXNet's own operators.
    limit : float
        Seconds that a test may take, or a process when it runs no test.
    log : pathlib.Path
        What the tests print is added to it; its folder is where they run.
    """
    outcomes, done, counts = {}, [], Counter()
    while True:
        process = _Process(file, {"replace": replace, "match": match, "done": done}, log)
        ended, running = process.watch(outcomes, counts, limit)
        if running is None:
            if ended != "end":
                outcomes[OUTSIDE] = ended
            return Run(outcomes, counts)
        function, test = running
        outcomes[test] = ended
        done.append(function)
        done.extend(process.functions)


class _Process:
    def __init__(self, file, request, log):
        self.folder = log.parent
        self.events = self.folder / "events"
        self.events.write_text("")
        self.functions = set()  # that have run
        (self.folder / "request.json").write_text(json.dumps(request))
        environment = {
            **os.environ,
            "PYTHONPATH": str(PACKAGE),
            "PYTHONDONTWRITEBYTECODE": "1",  # the checkout stays as it is
            "PYTHONFAULTHANDLER": "1",
            "MXNET_TEST_SEED": SEED,
            "MXNET_MODULE_SEED": SEED,
            "MXNET_HOME": str(self.folder / "home"),  # downloads
        }
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, HERE / "worker.py", file, "request.json", "events"],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # its process group has what the tests start
            )

    def watch(self, outcomes, counts, limit):
        """Record events until the process has ended.

        Returns
        -------
        ended : str or tuple
            "end", or an outcome.
        running : tuple or None
            The function and the test that were running then.
        """
        running, ended, since = None, None, time.monotonic()
        with open(self.events) as events:
            while True:
                status = self.process.poll()  # before reading: what it wrote last is read then
                for line in events:
                    since = time.monotonic()
                    event = json.loads(line)
                    kind = event["event"]
                    if kind == "start":
                        running = event["function"], event["test"]
                    elif kind == "count":
                        running = None
                        counts.update(event["counts"])
                    elif kind == "end":
                        ended = "end"
                    else:
                        outcomes[event["test"]] = kind, event.get("error")
                        self.functions.add(event["function"])
                if status is not None:
                    break
                if time.monotonic() - since > limit:
                    self._kill()
                    return ("no end", f"ended after {limit:g} s"), running
                time.sleep(0.05)
        self._kill()  # what the tests have started and left
        if status == 0 and ended:
            return ended, None
        return ("crash", f"the process ended with status {status}"), running

    def _kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
