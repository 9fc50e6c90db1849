"""Networks that are attached to others: the cases of cases.py, in jobs of 2, 3 and 4 ranks."""

import pathlib

import pytest

import ranks

pytest.importorskip("mpi4py")

FILE = pathlib.Path(__file__).with_name("cases.py")
# The cases import MXNet, so their names are read, not imported.
CASES = ranks.cases_of(FILE)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Return a function that gives a job's process and folder; it runs when first asked for."""
    jobs = {}

    def of(size):
        if size not in jobs:
            folder = tmp_path_factory.mktemp(f"ranks{size}")
            jobs[size] = ranks.run(size, FILE, folder, timeout=200, status=None), folder
        return jobs[size]

    return of


@ranks.needed
@pytest.mark.parametrize(("name", "size"), [(n, s) for s in (2, 3, 4) for n in CASES[s]])
def test_on_ranks(name, size, job):
    process, folder = job(size)
    files = [folder / f"{name}.{rank}" for rank in range(size)]
    problems = [file.read_text() for file in files if file.exists()]
    assert not any(problems), "\n".join(problems)
    assert len(problems) == size, f"the job ended before:\n{process.stderr}"


@ranks.needed
@pytest.mark.parametrize("size", CASES)
def test_jobs_end_well(size, job):
    process, _ = job(size)
    assert process.returncode == 0, process.stderr
