"""The ledger: nothing is lost, nothing counts twice, and trouble with the file is told in words."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forgetrain.errors import UserError
from forgetrain.gates.verdict import Verdict
from forgetrain.judge.ledger import Ledger, Spent
from tests.tiny import tiny_target


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger", busy=0.2) as ledger:
        yield ledger


def judged(ledger: Ledger, target: str, source: bytes, passed: bool, parent: str | None = None) -> tuple[str, str]:
    candidate = ledger.add_candidate(target, source, parent=parent, proposer="test", message="m", diff="-a\n+b\n")
    judging = ledger.begin_judging(target, candidate, environment={"torch": "2"})
    ledger.add_verdicts(judging, [Verdict("G2", passed, 1.0, 2.0, 1.0, "lm_head#fwd@0", {"a": [1]}, "words", True)])
    ledger.end_judging(judging, passed=passed, sandboxed=True)
    return candidate, judging


def test_what_goes_in_comes_out(ledger):
    target = ledger.add_target(tiny_target())
    assert ledger.add_target(tiny_target()) == target
    first, judging = judged(ledger, target, b"one", passed=True)
    second, _ = judged(ledger, target, b"two", passed=False, parent=first)
    ledger.add_samples(judging, [("main", "candidate", 0, i, 0.1 * i) for i in range(3)])
    ledger.elect(judging, ratio=1.2, low=1.1, high=1.3)
    rows = ledger.candidates(target)
    assert [(row["hash"], row["passed"], row["failed"], row["elected"]) for row in rows] == [
        (first, 1, None, 1),
        (second, 0, "G2", 0),
    ]
    assert ledger.champion(target)["candidate"] == first
    assert ledger.candidate(second[:8])["parent"] == first
    assert ledger.files.read(second) == b"two"
    assert ledger.files.read(ledger.candidate(second)["diff"]) == b"-a\n+b\n"
    verdict = ledger.verdicts(first)[0]
    assert (verdict["gate"], verdict["pass"], verdict["detail"], verdict["sandboxed"]) == ("G2", 1, {"a": [1]}, 1)
    assert [row["hash"] for row in ledger.lineage(second)] == [second, first]


def test_verdicts_are_told_of_one_target_where_it_is_named(ledger):
    targets = [ledger.add_target(tiny_target(name)) for name in ("minicpm5", "tied")]
    same = [judged(ledger, target, b"same", passed=target == targets[0])[0] for target in targets]
    assert len(ledger.verdicts(same[0])) == 2
    for target in targets:
        assert [verdict["pass"] for verdict in ledger.verdicts(same[0], target)] == [target == targets[0]]


def test_repeating_every_call_counts_nothing_twice(ledger):
    target = ledger.add_target(tiny_target())
    for _ in range(2):
        attempt = ledger.begin_attempt(target, proposer="catalogue", id="a1")
        candidate = ledger.add_candidate(target, b"x", attempt=attempt)
        ledger.spend(attempt, seconds=2.0, tokens=10, dollars=0.5)
        judging = ledger.begin_judging(target, candidate, environment={}, id="j1")
        ledger.add_verdicts(judging, [Verdict("G2", True)])
        ledger.add_samples(judging, [("main", "champion", 0, 0, 1.0)])
        ledger.end_judging(judging, passed=True, sandboxed=True)
        ledger.elect(judging)
        ledger.end_attempt(attempt, "accepted", seconds=3.0)
    ledger.end_attempt("a1", "failed")
    assert ledger.spent(target) == Spent(1, 3.0, 10, 0.5)
    for table in ("attempts", "candidates", "judgings", "verdicts", "samples", "elections"):
        assert len(ledger.query(f"SELECT * FROM {table}")) == 1
    assert ledger.query("SELECT outcome FROM attempts")[0]["outcome"] == "accepted"


def test_what_failed_cannot_be_elected(ledger):
    target = ledger.add_target(tiny_target())
    _, judging = judged(ledger, target, b"x", passed=False)
    with pytest.raises(ValueError, match="did not pass"):
        ledger.elect(judging)
    assert ledger.champion(target) is None


def test_a_champion_that_failed_is_deposed_once(ledger):
    target = ledger.add_target(tiny_target())
    for name in (b"first", b"second"):
        judging = ledger.begin_judging(target, ledger.add_candidate(target, name), environment={})
        ledger.end_judging(judging, passed=True, sandboxed=True)
        ledger.elect(judging)
    with pytest.raises(ValueError, match="did not fail"):
        ledger.depose(judging)
    first, second = (ledger.files.add(name) for name in (b"first", b"second"))
    lost = ledger.begin_judging(target, second, environment={}, purpose="verification")
    with pytest.raises(ValueError, match="did not fail"):
        ledger.depose(lost)
    ledger.end_judging(lost, passed=False, sandboxed=True)
    assert ledger.champion(target)["candidate"] == second
    for _ in range(2):
        ledger.depose(lost)
        assert ledger.champion(target)["candidate"] == first
    other = ledger.begin_judging(target, second, environment={}, purpose="verification")
    ledger.end_judging(other, passed=False, sandboxed=True)
    with pytest.raises(ValueError, match="not the champion's"):
        ledger.depose(other)


def test_a_ledger_of_the_first_version_goes_on(tmp_path):
    with Ledger(tmp_path) as ledger:
        target = ledger.add_target(tiny_target())
        ledger._connection.execute("DROP TABLE depositions")
        ledger._connection.execute("DROP TABLE profiles")
        ledger._connection.execute("ALTER TABLE judgings DROP COLUMN options")
        ledger._connection.execute("PRAGMA user_version = 1")
    with Ledger(tmp_path) as ledger:
        assert ledger.champion(target) is None
        assert ledger.query("SELECT * FROM depositions") == []


def test_interrupted_work_is_counted_and_closed(ledger):
    target = ledger.add_target(tiny_target())
    attempt = ledger.begin_attempt(target, proposer="agent")
    ledger.spend(attempt, seconds=5.0, dollars=0.25)
    candidate = ledger.add_candidate(target, b"x", attempt=attempt)
    ledger.begin_judging(target, candidate, environment={})
    assert ledger.end_interrupted(target) == [attempt]
    assert ledger.end_interrupted(target) == []
    assert ledger.spent(target) == Spent(1, 5.0, 0, 0.25)
    assert ledger.candidates(target)[0]["passed"] == 0


def test_a_judging_by_hand_is_not_the_loops_to_end(ledger):
    target = ledger.add_target(tiny_target())
    candidate = ledger.add_candidate(target, b"x")
    asked = {"environment": {"torch": "2"}, "purpose": "hand", "options": {"champion": None}}
    judging = ledger.begin_judging(target, candidate, **asked)
    verdicts = [Verdict("G4.fp32", True, 1.0, 2.0, 1.0, None, {"a": [1]}, "words", True), Verdict("G4.bf16", False)]
    ledger.add_verdicts(judging, verdicts)
    ledger.end_interrupted(target)
    assert ledger.unfinished(target, candidate, **asked) == (judging, verdicts)
    for other in ({"environment": {"torch": "3"}}, {"purpose": "gates"}, {"options": {"champion": "5f"}}):
        assert ledger.unfinished(target, candidate, **{**asked, **other}) is None
    later = ledger.begin_judging(target, candidate, **asked)
    ledger.add_verdicts(later, [Verdict("G4.fp32", False)])
    ledger.end_judging(later, passed=False, sandboxed=True)
    assert ledger.unfinished(target, candidate, **asked) is None  # what had passed before has failed since
    ledger.begin_judging(target, candidate, **asked)
    assert ledger.candidates(target)[0]["passed"] == 0  # until that one has ended, too


def test_order_is_kept_when_the_clock_steps_back(ledger, monkeypatch):
    target = ledger.add_target(tiny_target())
    for i, now in enumerate((1000.0, 900.0, 800.0)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        judged(ledger, target, str(i).encode(), passed=True)
    assert [ledger.files.read(row["hash"]) for row in ledger.candidates()] == [b"0", b"1", b"2"]


def test_a_locked_ledger_is_named(tmp_path, ledger):
    target = ledger.add_target(tiny_target())
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match=r"locked by another process for more than 0\.2 s"):
        ledger.begin_attempt(target, proposer="x")
    with pytest.raises(UserError, match="locked"):
        Ledger(tmp_path / "ledger", busy=0.1)
    assert ledger.spent(target).attempts == 0  # readers do not wait
    other.execute("ROLLBACK")
    other.close()
    ledger.begin_attempt(target, proposer="x")


def test_a_ledger_that_another_process_holds_for_itself_is_waited_for_then_named(tmp_path, ledger):
    hold = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN EXCLUSIVE')"
    command = [sys.executable, "-c", f"{hold}; print('held', flush=True); sys.stdin.read()", str(ledger.path)]
    target = ledger.add_target(tiny_target())
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        began = time.monotonic()
        with pytest.raises(UserError) as refused:
            ledger.begin_attempt(target, proposer="x")
        waited = time.monotonic() - began
        other.communicate("")
    assert str(ledger.path) in str(refused.value)
    assert "locked by another process" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert 0.15 <= waited < 5
    ledger.begin_attempt(target, proposer="x")
    assert ledger.spent(target).attempts == 1


def test_what_is_no_ledger_is_refused(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "ledger.sqlite").write_text("not a database at all, but long enough to have a header" * 100)
    with pytest.raises(UserError, match="is no ledger"):
        Ledger(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be opened"):
        Ledger(tmp_path / "file")
    with pytest.raises(UserError, match="no ledger here"):
        Ledger(tmp_path / "nowhere", create=False)
    with Ledger(tmp_path / "b") as ledger:
        ledger._connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="newer version"):
        Ledger(tmp_path / "b")
    other = sqlite3.connect(tmp_path / "ledger.sqlite")
    other.execute("CREATE TABLE mine (x)")
    other.close()
    with pytest.raises(UserError, match="something else"):
        Ledger(tmp_path)


def test_a_full_disk_is_an_os_error_and_loses_nothing(ledger):
    target = ledger.add_target(tiny_target())
    ledger._connection.execute(f"PRAGMA max_page_count = {ledger.query('PRAGMA page_count')[0]['page_count']}")
    kept: list[str] = []
    with pytest.raises(OSError, match="No space left") as error:
        kept.extend(ledger.begin_attempt(target, proposer="x" * 1000, id=str(i)) for i in range(10_000))
    assert str(error.value.filename) == str(ledger.path)
    ledger._connection.execute("PRAGMA max_page_count = 1000000")
    assert ledger.spent(target).attempts == len(kept)


def test_a_changed_or_missing_file_is_noticed(ledger):
    digest = ledger.files.add(b"content")
    assert ledger.files.add(b"content") == digest
    path = ledger.files.path(digest)
    path.chmod(0o644)
    path.write_bytes(b"CONTENT")
    with pytest.raises(UserError, match="was changed"):
        ledger.files.read(digest)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        ledger.files.read(digest)


def test_candidates_are_found_by_how_they_begin(ledger):
    target = ledger.add_target(tiny_target())
    for i in range(40):
        ledger.add_candidate(target, str(i).encode())
    with pytest.raises(UserError, match="no such candidate"):
        ledger.candidate("xyz")
    with pytest.raises(UserError, match="several"):
        ledger.candidate(
            next(h[0] for h in "0123456789abcdef" if sum(r["hash"][0] == h for r in ledger.candidates()) > 1)
        )


def test_one_loop_a_target(tmp_path, ledger):
    with ledger.claim("nano"), Ledger(tmp_path / "ledger") as other:
        with other.claim("micro"):
            pass
        with pytest.raises(UserError, match="works on nano"), other.claim("nano"):
            pass
    with ledger.claim("nano"):
        pass


WORK = """
import sys
from pathlib import Path
from forgetrain.gates.verdict import Verdict
from forgetrain.judge.ledger import Ledger
from tests.tiny import tiny_target

with Ledger(Path(sys.argv[1])) as ledger:
    target = ledger.add_target(tiny_target())
    ledger.end_interrupted(target)
    done = ledger.spent(target).attempts
    print("ready", flush=True)
    for i in range(done, int(sys.argv[2])):
        attempt = ledger.begin_attempt(target, proposer="p", id=f"attempt-{i}")
        candidate = ledger.add_candidate(target, b"source %d" % i, attempt=attempt)
        judging = ledger.begin_judging(target, candidate, environment={}, id=f"judging-{i}")
        ledger.add_verdicts(judging, [Verdict("G2", True)])
        ledger.end_judging(judging, passed=True, sandboxed=True)
        ledger.elect(judging)
        ledger.spend(attempt, seconds=1.0)
        ledger.end_attempt(attempt, "accepted")
"""


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_count_nothing_twice(tmp_path):
    total, generator = 300, random.Random(1)
    command = [sys.executable, "-c", WORK, str(tmp_path), str(total)]
    for _ in range(20):
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(generator.random() * 0.1)
            process.send_signal(signal.SIGKILL)
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    with Ledger(tmp_path) as ledger:
        target = ledger.add_target(tiny_target())
        ids = [row["id"] for row in ledger.query("SELECT id FROM attempts ORDER BY number")]
        assert ids == [f"attempt-{i}" for i in range(total)]
        outcomes = ledger.query("SELECT outcome, count(*) AS n FROM attempts GROUP BY outcome")
        counts = {row["outcome"]: row["n"] for row in outcomes}
        assert counts.get("interrupted", 0) <= 20
        assert counts["accepted"] + counts.get("interrupted", 0) == total
        assert ledger.query("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
        for row in ledger.candidates(target):
            ledger.files.read(row["hash"])
        champions = ledger.query("SELECT candidate FROM elections")
        assert len(champions) >= counts["accepted"]
        json.dumps(ledger.candidates())
