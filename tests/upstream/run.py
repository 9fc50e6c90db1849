"""Run MXNet's own tests with our operators in the place of MXNet's, and without (`make upstream`).

    python tests/upstream/run.py SOURCE [--only NAME] [--limit SECONDS] [--output FOLDER]

SOURCE is a checkout of apache/mxnet, whose tests run where they are.  The tests of each file run
under nose three times: with MXNet's operators, and in each way in which `replaced.py` puts ours in
their place.  The status is 1 if a test passes with MXNet's operators but not with ours and
`differences.py` does not explain it, or if ours did not run where they should have.
"""

import argparse
import pathlib
import sys
import tempfile

import report
from checkout import tests_of
from differences import EXPLAINED
from nose_process import run_file
from selection import SELECTED

WAYS = "all-reduce", "one operator"  # those of `replaced.py`, which imports the package


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a checkout of apache/mxnet, v1.9.1")
    parser.add_argument("--only", default="", help="files whose path contains this")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a test")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/upstream"))
    arguments = parser.parse_args()
    tests = tests_of(arguments.source)
    selection = [selected for selected in SELECTED if arguments.only in selected.path]
    if not selection:
        parser.error(f"no file has {arguments.only!r} in its path; selection.py lists them")
    arguments.output.mkdir(parents=True, exist_ok=True)
    runs = {
        (selected.path, way): run(tests, selected, way, arguments)
        for selected in selection
        for way in (None, *WAYS)
    }
    return 1 if tell(selection, runs, arguments.output) else 0


def run(tests, selected, way, arguments):
    """Run a file's tests and keep what they print."""
    name = f"{selected.path.replace('/', '-')}-{(way or 'MXNet').replace(' ', '-')}.log"
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "log"
        try:
            found = run_file(tests / selected.path, selected.match, way, arguments.limit, log)
        finally:
            (arguments.output / name).write_bytes(log.read_bytes())
    uses = ", ".join(f"{kind} {count}" for kind, count in found.counts.items()) or "none"
    print(
        f"{selected.path}, {way or 'MXNet'}: {report.passes(found)} of {len(found.outcomes)} pass; "
        f"batch normalizations: {uses}",
        flush=True,
    )
    return found


def tell(selection, runs, output):
    """Write the tables, print what differs, and return whether any of it must not be."""
    compared, unused = [], []
    for selected in selection:
        theirs = runs[selected.path, None].outcomes
        for way in WAYS:
            ours = runs[selected.path, way]
            compared += report.compare(selected.path, way, theirs, ours.outcomes, EXPLAINED)
            if selected.counted and not ours.counts[selected.counted]:
                unused.append(f"{selected.path} ({way})")
    table = report.by_file(runs, WAYS)
    (output / "by_file.md").write_text(table + "\n")
    (output / "by_test.md").write_text(report.by_test(compared, WAYS) + "\n")
    (output / "not_passing.txt").write_text(report.not_passing(compared) + "\n")
    print(f"\n{table}\n\n{output} has the tables and what the tests printed.")
    for c in compared:
        if c.verdict != "same":
            name = f"{c.file}:{c.test}"
            print(f"{c.verdict}: {name} ({c.way}): MXNet's {c.theirs[0]}, ours {c.ours[0]}")
            print(f"    {EXPLAINED.get(name) or c.ours[1] or c.theirs[1]}")
    for name in report.no_longer(compared, EXPLAINED):
        print(f"differences.py explains a difference that there is not: {name}")
    for name in unused:
        print(f"none of our operators was used in {name}")
    return unused or any(c.verdict == "worse" for c in compared)


if __name__ == "__main__":
    sys.exit(main())
