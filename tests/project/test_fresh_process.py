"""helpers/fresh_process.py: what a script gets, and the report of one that fails."""

import os
import signal
import time

import pytest

import fresh_process


def test_what_the_script_gets(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_REMOVED", "1")
    script = """
import os, sys, fresh_process, gluon_syncbn
print(sys.argv[1:], "TEST_REMOVED" in os.environ, os.environ["TEST_ADDED"], os.getcwd())
print(gluon_syncbn.__file__)
print("a warning", file=sys.stderr)
"""
    done = fresh_process.run(script, "x", 2, cwd=tmp_path, TEST_REMOVED=None, TEST_ADDED="2")
    import gluon_syncbn

    assert done.stdout.splitlines() == [f"['x', '2'] False 2 {tmp_path}", gluon_syncbn.__file__]
    assert done.returncode == 0 and "a warning" in done.stderr


def test_a_script_in_a_file(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv, __name__)")
    done = fresh_process.run(script, "x")
    assert done.stdout.strip() == f"['{script}', 'x'] __main__"


def test_a_failure_shows_what_was_printed():
    script = "print('so far'); raise ValueError('the reason')"
    with pytest.raises(AssertionError, match="(?s)status 1, not 0.*so far.*the reason"):
        fresh_process.run(script)
    with pytest.raises(AssertionError, match="status 0, not 1"):
        fresh_process.run("", status=1)
    assert "the reason" in fresh_process.run(script, status=1).stderr
    assert fresh_process.run(script, status=None).returncode == 1
    kill = "import os; os.kill(os.getpid(), 9)"
    assert fresh_process.run(kill, status=-signal.SIGKILL).returncode == -9


def test_a_script_that_hangs_shows_where(tmp_path):
    """It is killed together with its children, which hold the pipes open."""
    script = """
import os, sys, time
child = os.fork()
if child:
    open(sys.argv[1], "w").write(str(child))
    print("forked", flush=True)

def waits_for_ever():
    time.sleep(600)

waits_for_ever()
"""
    start = time.monotonic()
    with pytest.raises(AssertionError, match="(?s)within 3 s.*forked.*in waits_for_ever"):
        fresh_process.run(script, tmp_path / "child", timeout=3)
    assert time.monotonic() - start < 40
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{child}/stat") as stat:  # a zombie, until its parent waits for it
            if stat.read().split()[2] == "Z":
                return
        time.sleep(0.1)
    raise AssertionError("the child is still there")
