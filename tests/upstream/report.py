"""What the runs of MXNet's tests say: a verdict for each test, and tables of them."""

from collections import Counter
from typing import NamedTuple

VERDICTS = "same", "better", "explained", "worse"


class Compared(NamedTuple):
    """A test with MXNet's operators and with ours, put in their place in one way."""

    file: str
    test: str
    way: str
    theirs: tuple  # outcome, error or None
    ours: tuple
    verdict: str


def verdict(theirs, ours, explained):
    """Compare the outcomes of a test.

    Returns
    -------
    str
        ``same``; ``better``: ours passes where MXNet's does not; ``explained``; ``worse``.
    """
    if ours == theirs:
        return "same"
    if ours == "pass":
        return "better"
    return "explained" if explained else "worse"


def compare(file, way, theirs, ours, explained):
    """Compare the outcomes of a file's tests, in the order in which MXNet's ran."""
    compared = []
    for test in dict.fromkeys([*theirs, *ours]):
        pair = [outcomes.get(test, ("absent", None)) for outcomes in (theirs, ours)]
        kinds = [kind for kind, error in pair]
        found = verdict(*kinds, f"{file}:{test}" in explained)
        compared.append(Compared(file, test, way, *pair, found))
    return compared


def no_longer(compared, explained):
    """Return the explained differences that were looked for and not found."""
    seen = {f"{c.file}:{c.test}" for c in compared}
    found = {f"{c.file}:{c.test}" for c in compared if c.verdict == "explained"}
    return [name for name in explained if name in seen - found]


def markdown(header, rows):
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def by_test(compared, ways):
    """Return the table of all tests."""
    rows = {}
    for c in compared:
        row = rows.setdefault((c.file, c.test), {"theirs": c.theirs[0]})
        row[c.way] = c.ours[0]
        row["verdict"] = max(row.get("verdict", "same"), c.verdict, key=VERDICTS.index)
    header = ["file", "test", "MXNet's", *(f"ours, {way}" for way in ways), "verdict"]
    return markdown(
        header,
        [
            [*name, row["theirs"], *(row.get(way, "") for way in ways), row["verdict"]]
            for name, row in rows.items()
        ],
    )


def by_file(runs, ways):
    """Return the table of how many tests of each file pass, and how much ours was used.

    ``runs``: {(file, way or None): Run}.
    """
    header = ["file", "tests", "pass with MXNet's", *(f"with ours, {way}" for way in ways)]
    header += [f"uses of ours, {way}" for way in ways]
    rows, totals = [], []
    for file in dict.fromkeys(file for file, way in runs):
        numbers = [len(runs[file, None].outcomes), *(passes(runs[file, w]) for w in (None, *ways))]
        rows.append([file, *numbers, *(_uses(runs[file, way].counts) for way in ways)])
        totals.append(numbers)
    counts = [
        sum((run.counts for (_, w), run in runs.items() if w == way), Counter()) for way in ways
    ]
    rows.append(["all", *map(sum, zip(*totals)), *map(_uses, counts)])
    return markdown(header, rows)


def _uses(counts):
    if counts["ours"]:
        return f"{counts['ours']} run"
    return f"{counts['symbols']} in symbols" if counts["symbols"] else "none"


def passes(run):
    return sum(outcome == "pass" for outcome, _ in run.outcomes.values())


def not_passing(compared):
    """Return a line for each test that does not pass with MXNet's operators, or not with ours."""
    lines = []
    for c in compared:
        if (c.theirs[0], c.ours[0]) == ("pass", "pass"):
            continue
        lines.append(f"{c.verdict}: {c.file}:{c.test} ({c.way})")
        lines.append(f"    MXNet's: {_text(c.theirs)}")
        if _text(c.ours) != _text(c.theirs):
            lines.append(f"    ours:    {_text(c.ours)}")
    return "\n".join(lines)


def _text(outcome):
    kind, error = outcome
    return f"{kind}: {' '.join(error.split())[:300]}" if error else kind
