"""What is recorded of past rounds: totals, waits one by one, the table, the log."""

import re
import time

import mxnet as mx
import pytest
from mxnet import autograd, gluon

import fresh_process
from gluon_syncbn import (
    ModelDataParallel,
    SyncBatchNorm,
    barrier_stats,
    parallel_backward,
    set_timeout,
)
from gluon_syncbn.key_barrier import check_variables
from held import held
from rounds import come

SUM = mx.nd.contrib.KeyBarrierSum


@pytest.fixture
def two():
    barrier_stats(reset=True)
    return [mx.cpu(0), mx.cpu(1)]


def test_totals_say_who_waited_for_whom(two):
    start = time.monotonic()
    for _ in range(3):
        come("slow 1", [0, 1], 0.05)
    come("slow 0", [1, 0], 0.05)
    elapsed = time.monotonic() - start
    stats = barrier_stats()
    assert set(stats.keys) == {"slow 0", "slow 1"}
    key = stats.keys["slow 1"]
    assert (key.rounds, key.failures, key.elsewhere) == (3, 0, 0)
    first, second = key.devices["cpu(0)"], key.devices["cpu(1)"]
    assert (first.rounds, first.last, first.held) == (3, 0, 0)
    assert (second.rounds, second.last, second.waited, second.longest) == (3, 3, 0, 0)
    assert first.waited == pytest.approx(second.held)
    assert 3 * 0.05 <= first.waited <= elapsed
    assert 0.05 <= first.longest <= first.waited - 2 * 0.05
    first, second = stats.devices["cpu(0)"], stats.devices["cpu(1)"]
    assert (first.rounds, first.last, second.rounds, second.last) == (4, 1, 4, 3)


def test_a_call_that_waits_for_an_earlier_one_of_its_device(two):
    set_timeout(0.2)
    with held(mx.nd.ones(1)) as late:
        first = SUM(late, key="ticket", num_devices=2)
        second = SUM(mx.nd.ones(1), key="ticket", num_devices=2)
        with pytest.raises(
            mx.MXNetError,
            match="^MXNetError: An earlier call with this key on cpu.0. has not run yet. Look",
        ):
            second.wait_to_read()
    with pytest.raises(mx.MXNetError):
        first.wait_to_read()
    stats = barrier_stats()
    assert stats.keys["ticket"].failures == 2
    assert all(0 <= wait.ended - wait.came < 30 for wait in stats.waits)


def test_nobody_is_blamed_for_a_round_that_fails(two):
    come("k", [0, 1], 0.05)
    set_timeout(0.5)
    with pytest.raises(mx.MXNetError):
        SUM(mx.nd.ones(1, ctx=two[1]), key="k", num_devices=2).wait_to_read()
    stats = barrier_stats()
    assert (stats.keys["k"].rounds, stats.keys["k"].failures) == (1, 1)
    assert stats.devices["cpu(1)"] == (1, 1, stats.devices["cpu(0)"].waited, 0, 0)


def test_every_wait_is_there(two):
    before = time.monotonic()
    come("k", [0, 1], 0.05)
    after = time.monotonic()
    waits = {wait.device: wait for wait in barrier_stats().waits}
    assert set(waits) == {"cpu(0)", "cpu(1)"}
    for wait in waits.values():
        assert (wait.key, wait.call, wait.backward, wait.succeeded) == ("k", 0, False, True)
        assert wait.last == "cpu(1)" and wait.round == waits["cpu(0)"].round
        assert before <= wait.came <= wait.complete == wait.ended <= after
    assert waits["cpu(0)"].complete - waits["cpu(0)"].came >= 0.05
    assert waits["cpu(1)"].complete == waits["cpu(1)"].came


def test_only_the_last_waits_are_kept_and_the_totals_are_of_all(two):
    rounds = 8200
    for _ in range(rounds // 100):
        mx.nd.waitall()
        for _ in range(100):
            for context in two:
                SUM(mx.nd.ones(1, ctx=context), key="many", num_devices=2)
    mx.nd.waitall()
    stats = barrier_stats()
    assert stats.keys["many"].rounds == rounds and stats.devices["cpu(0)"].rounds == rounds
    assert len(stats.waits) == 16384 < 2 * rounds
    ended = [wait.ended for wait in stats.waits]
    assert ended == sorted(ended)


def test_reset(two):
    come("k", [0, 1], 0.05)
    assert barrier_stats(reset=True).keys["k"].rounds == 1
    assert barrier_stats().keys == {} and barrier_stats().waits == []
    come("k", [0, 1], 0.05)
    stats = barrier_stats()
    assert stats.keys["k"].rounds == 1 and stats.keys["k"].devices["cpu(1)"].last == 1
    assert len(stats.waits) == 2


def test_a_round_that_fails_is_counted(two):
    with held(mx.nd.ones(1, ctx=two[1])) as late:
        y = SUM(mx.nd.ones(1, ctx=two[0]), key="fails", num_devices=2)
        SUM(late, key="fails", num_devices=2)
        time.sleep(0.05)
        with pytest.raises(mx.MXNetError, match="brings 2 values"):
            SUM(mx.nd.ones(2, ctx=mx.cpu(2)), key="fails", num_devices=2).wait_to_read()
        with pytest.raises(mx.MXNetError):
            y.wait_to_read()
    stats = barrier_stats()
    assert (stats.keys["fails"].rounds, stats.keys["fails"].failures) == (0, 1)
    waits = {wait.device: wait for wait in stats.waits}
    assert not waits["cpu(0)"].succeeded
    assert waits["cpu(0)"].complete - waits["cpu(0)"].came >= 0.05
    assert re.search(r"^fails +0 +1 ", str(stats), re.M)
    SUM(mx.nd.ones(1, ctx=two[0]), key="fails", num_devices=2)  # for the one that was held
    mx.nd.waitall()


class Straggles(gluon.nn.Block):
    def forward(self, x):
        if x.context == mx.cpu(1):
            time.sleep(0.1)
        return x


def test_the_table_names_a_straggler(two):
    net = gluon.nn.Sequential(prefix="net_")
    with net.name_scope():
        norm = SyncBatchNorm(in_channels=3)
        net.add(Straggles(), norm)
    net.initialize(ctx=two)
    model = ModelDataParallel(net, two)
    xs = [mx.nd.ones((2, 3), ctx=c) for c in two]
    for x in xs:
        x.attach_grad()  # or there is nothing to exchange in backward
    for _ in range(5):
        with autograd.record():
            ys = model(xs)
        parallel_backward(ys)
    mx.nd.waitall()
    stats = barrier_stats()
    assert stats.keys[norm.key].rounds == 10
    assert stats.devices["cpu(1)"].held > 0.25
    assert {wait.backward for wait in stats.waits} == {False, True}
    table = str(stats)
    assert re.search(r"^cpu\(1\) +10 +\d+ +\d+\.\d{3} ms ", table, re.M), table
    assert re.search(r"^\d+% of all waiting was for cpu\(1\)\.$", table, re.M), table
    assert re.search(rf"^{norm.key} +10 +0 .* ms +cpu\(1\)$", table, re.M), table


def test_inference_and_no_rounds_at_all(two):
    assert str(barrier_stats()) == "No round has ended yet."
    net = SyncBatchNorm(in_channels=3)
    net.initialize(ctx=two)
    ModelDataParallel(net, two)([mx.nd.ones((2, 3), ctx=c) for c in two])
    mx.nd.waitall()
    assert barrier_stats().keys == {}


def test_a_lone_device_waits_for_nobody(two):
    SUM(mx.nd.ones(1), key="alone", num_devices=1).wait_to_read()
    device = barrier_stats().keys["alone"].devices["cpu(0)"]
    assert device == (1, 0, 0, 0, 0)
    assert "waiting was for" not in str(barrier_stats())


def test_keys_of_any_content_have_one_line(two):
    for key in ("quotes \"'", "two\nlines", "ünïcödé ✓", "x" * 1000):
        SUM(mx.nd.ones(1), key=key, num_devices=1).wait_to_read()
    stats = barrier_stats()
    assert set(stats.keys) == {"quotes \"'", "two\nlines", "ünïcödé ✓", "x" * 1000}
    lines = str(stats).splitlines()
    assert len(lines) == 2 + 1 + 1 + 4 and max(map(len, lines)) < 130


LOGGED = """
import mxnet as mx
from gluon_syncbn import set_timeout
SUM = mx.nd.contrib.KeyBarrierSum
x = [mx.nd.ones(1, ctx=mx.cpu(i)) for i in range(2)]
for _ in range(2):
    ys = [SUM(x[i], key="two\\nlines", num_devices=2) for i in range(2)]
    mx.nd.waitall()
set_timeout(0.1)
try:
    SUM(x[0], key="alone", num_devices=2).wait_to_read()
except mx.MXNetError:
    pass
"""
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} gluon_syncbn\[\d+\]: forward '(.*)")


def check_log(text):
    lines = [LINE.fullmatch(line) for line in text.splitlines()]
    assert len(lines) == 3 and all(lines), text
    first, second, failed = (line[1] for line in lines)
    for line in (first, second):
        assert re.fullmatch(
            r"two\?lines' call 0 pass 0 round \d+: "
            r"cpu\(0\) waited \d+\.\d{3} ms, cpu\(1\) waited \d+\.\d{3} ms",
            line,
        )
    assert re.fullmatch(
        r"alone' call 0 pass 0 round \d+ FAILED: cpu\(0\) waited 1\d\d\.\d{3} ms; "
        r".*not every device came within 0\.1 s.*",
        failed,
    )


def test_a_variable_logs_every_round(tmp_path):
    path = tmp_path / "rounds.log"
    fresh_process.run(LOGGED, GLUON_SYNCBN_LOG=str(path))
    check_log(path.read_text())
    process = fresh_process.run(LOGGED, GLUON_SYNCBN_LOG="stderr")
    check_log("\n".join(line for line in process.stderr.splitlines() if "gluon_syncbn[" in line))


def test_a_log_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("GLUON_SYNCBN_LOG", str(tmp_path / "missing" / "rounds.log"))
    with pytest.raises(ValueError, match="GLUON_SYNCBN_LOG .*No such file"):
        check_variables()
    for fine in ("stderr", "", str(tmp_path / "rounds.log")):
        monkeypatch.setenv("GLUON_SYNCBN_LOG", fine)
        check_variables()
