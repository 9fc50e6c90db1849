"""Run tests of one of MXNet's files under nose, in a process of their own (run.py starts it).

    python worker.py FILE REQUEST EVENTS

REQUEST is a JSON file: ``replace``, how to put our operators in the place of MXNet's, or null;
``match``, a regular expression for the names of the test functions; ``done``, those that have run.
EVENTS gets a line of JSON per event, so that nothing is lost if a test ends the process.
"""

import json
import pathlib
import re
import sys
import unittest

import counting
import downloads
import nose
from nose.plugins import Plugin


class Events(Plugin):
    """Chooses the tests, and writes what becomes of each."""

    name = "events"
    enabled = True

    def __init__(self, request, stream):
        super().__init__()
        self.match, self.done = re.compile(request["match"]), set(request["done"])
        self.stream = stream

    def options(self, parser, env):
        pass

    def configure(self, options, config):
        pass

    def wantFunction(self, function):  # noqa: N802: nose's names
        chosen = self.match.search(function.__name__) and function.__name__ not in self.done
        return None if chosen else False

    wantMethod = wantFunction  # noqa: N815

    def startTest(self, test):  # noqa: N802
        self._write("start", test)
        self.event = None

    def addSuccess(self, test):  # noqa: N802
        self._write("pass", test)

    def addFailure(self, test, error):  # noqa: N802
        self._write("fail", test, error)

    def addError(self, test, error):  # noqa: N802
        self._write("skip" if issubclass(error[0], unittest.SkipTest) else "fail", test, error)

    def stopTest(self, test):  # noqa: N802
        if self.event is None:  # nose calls nothing for some
            self._write("skip", test)
        self.count()

    def _write(self, event, test, error=None):
        self.event = event
        line = {"event": event, "function": function_name(test), "test": name_of(test)}
        if error is not None:
            line["error"] = f"{error[0].__name__}: {error[1]}"[:2000]
        self.put(line)

    def count(self):
        """Write how many operators have run since the last time."""
        self.put({"event": "count", "counts": counting.counts})
        counting.counts.clear()

    def put(self, line):
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()


def function_name(test):
    """Return the name of the function that has the test; without one, it is an import."""
    return (test.address() or [None] * 3)[2] or "import"


def name_of(test):
    """Return the test's name without its module's: a function's, with arguments if it has some."""
    function = function_name(test)
    return function + test.id().partition(function)[2]


def main(file, request, events):
    request = json.loads(pathlib.Path(request).read_text())
    downloads.stand_in()
    counting.watch_graphs()
    if request["replace"]:
        import replaced  # and with it our package, which would change MXNet

        replaced.install(request["replace"])
        counting.watch_functions()
    with open(events, "a") as stream:
        plugin = Events(request, stream)
        options = ["-s", "-v", "--logging-level=WARNING"]
        nose.run(argv=["nosetests", *options, file], addplugins=[plugin])
        plugin.count()
        plugin.put({"event": "end"})


if __name__ == "__main__":
    main(*sys.argv[1:])
