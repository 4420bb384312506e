"""SIGKILL at twenty seeded moments each: of the loop, of an agent; and some of a real judge and its candidate."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from forgetrain.forge import optimise
from forgetrain.forge.proposers.agent import Agent
from forgetrain.forge.stuck import Rung
from forgetrain.judge.ledger import Ledger
from forgetrain.judge.runner import Judge
from tests.forge.test_optimise import Script, Verdicts, loop, prepared
from tests.judge.test_runner import make_judge, textbook

#: Imports once, and forks a loop for each line that it reads; a killed one is reaped before the next.
NURSERY = """
import os, sys
from pathlib import Path
from tests.forge.test_optimise import Script, Verdicts, loop, prepared
runs = Path(sys.argv[1])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        first = int(line)
        numbers = [*range(first - 100, first - 97), *range(first, first + 100)]  # some that were judged, and new ones
        sources = [f"speed = {1.02**number}\\n" for number in numbers]
        loop(prepared(runs, verify_every=3, attempts=10_000), runs, Script(sources), Verdicts(seconds=0.01)).run()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_loop_that_is_killed_loses_nothing_and_counts_nothing_twice(tmp_path):
    generator, target = random.Random(5), prepared(tmp_path)
    kills, killed, elections, spent = 0, 0, 0, None
    command = [sys.executable, "-c", NURSERY, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        while kills < 20 or (elections <= 5 and kills < 100):
            longest = 0.4 * (1 + kills // 20)  # where others want the cores, a loop needs longer to get as far
            print(101 + 100 * kills, file=nursery.stdin, flush=True)
            kills += 1
            child = int(nursery.stdout.readline())
            time.sleep(0.02 + longest * generator.random())
            os.kill(child, signal.SIGKILL)
            killed += int(nursery.stdout.readline()) == -signal.SIGKILL
            with Ledger(tmp_path / "ledger") as ledger:
                assert ledger.query("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
                now = ledger.spent(ledger.add_target(target))
                elections = ledger.query("SELECT count(*) AS n FROM elections")[0]["n"]
            if spent is not None:
                assert (now.attempts, now.seconds) >= (spent.attempts, spent.seconds)
            spent = now
    assert killed == kills
    run = loop(prepared(tmp_path, attempts=10_000), tmp_path, Script(["speed = 1e30\n"]))
    outcome = run.run()
    ledger = run.ledger
    assert ledger.query("SELECT * FROM attempts WHERE outcome IS NULL") == []
    assert ledger.query("SELECT * FROM judgings WHERE ended IS NULL") == []
    outcomes = [row["outcome"] for row in ledger.query("SELECT outcome FROM attempts")]
    assert spent is not None
    assert len(outcomes) == outcome.attempts == spent.attempts + 2
    assert outcomes.count("interrupted") <= kills
    elected = [row["candidate"] for row in ledger.query("SELECT candidate FROM elections ORDER BY number")]
    assert len(set(elected)) == len(elected)
    assert len(elected) > 5
    assert ledger.query("SELECT * FROM depositions") == []
    for row in ledger.candidates(run.key):
        ledger.files.read(row["hash"])
    again = ledger.query(
        "SELECT count(*) - count(DISTINCT candidate) AS n FROM judgings WHERE purpose = 'gates' AND sandboxed NOT NULL"
    )
    assert again[0]["n"] <= outcomes.count("interrupted")
    assert outcome.gain == pytest.approx(1e30)
    left = {path.name for path in tmp_path.rglob("*") if path.name.startswith(".")}
    assert left <= {".lock"}
    assert not list((tmp_path / target.name).glob("*.partial"))


AGENT = """
echo $$ > "$1"
i=0
while [ $i -lt 400 ]; do echo "speed = 1.$i" > engine.py; i=$((i + 1)); sleep 0.001; done
sleep 30
"""


@pytest.mark.slow
def test_an_agent_that_is_killed_is_one_attempt_and_leaves_nothing(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    (tmp_path / "agent.sh").write_text(AGENT)
    target, generator, killed = prepared(tmp_path, attempts=20), random.Random(6), []
    number = tmp_path / "number"

    def kill_each() -> None:
        for _ in range(20):
            while not (number.exists() and number.read_text().strip()):
                time.sleep(0.002)
            process = int(number.read_text())
            number.unlink()
            time.sleep(0.2 * generator.random())
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    killer = threading.Thread(target=kill_each, daemon=True)
    killer.start()
    run = loop(target, tmp_path, Agent(f"sh {tmp_path / 'agent.sh'} {number}"), Verdicts())
    # the ladder asks the catalogue after ten failures and stops after twenty; here every attempt is the agent's
    monkeypatch.setattr(optimise, "rung", lambda *_: Rung())
    outcome = run.run()
    killer.join(10)
    assert outcome.attempts == len(killed) == 20
    assert run.ledger.query("SELECT * FROM attempts WHERE outcome IS NULL") == []
    assert not any(Path(f"/proc/{process}").exists() for process in killed)
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
def test_a_candidate_s_process_that_is_killed_fails_its_gate_and_leaves_nothing(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    generator, killed, start = random.Random(7), [], Judge.process

    def process(self, *arguments, **options):
        started = start(self, *arguments, **options)
        requests, send = iter(range(generator.randrange(12), -1, -1)), started._send

        def send_then_kill(*message):
            send(*message)
            if next(requests, -1) == 0:
                time.sleep(0.01 * generator.random())
                killed.append(started._process.pid)
                os.kill(killed[-1], signal.SIGKILL)

        started._send = send_then_kill
        return started

    monkeypatch.setattr(Judge, "process", process)
    with make_judge(tmp_path) as judge:
        for _ in range(6):
            failed = judge.judge(textbook(tmp_path), gates=("G4",)).first_failure()
            assert failed is not None
            assert failed.detail["failure"] == "crashed"
            assert "SIGKILL" in failed.explanation
    assert len(killed) == 6
    assert not any(Path(f"/proc/{process}").exists() for process in killed)
    assert list(scratch.iterdir()) == []


JUDGE = """
import sys, tempfile
from pathlib import Path
tempfile.tempdir = sys.argv[2]
from tests.judge.test_runner import make_judge, textbook
with make_judge(Path(sys.argv[1])) as judge:
    print("ready", flush=True)
    judge.judge(textbook(Path(sys.argv[1])), all_gates=True)
"""


@pytest.mark.slow
def test_a_judge_that_is_killed_takes_its_processes_along_and_the_next_one_tidies_up(tmp_path, monkeypatch):
    scratch, generator = tmp_path / "scratch", random.Random(8)
    scratch.mkdir()
    for _ in range(3):
        command = [sys.executable, "-c", JUDGE, str(tmp_path), str(scratch)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as judge:
            assert judge.stdout is not None
            assert judge.stdout.readline() == "ready\n"
            while not (started := descendants(judge.pid)):
                time.sleep(0.01)
            time.sleep(2 * generator.random())
            started |= descendants(judge.pid)
            judge.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(runs(process) for process in started) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [process for process in started if runs(process)]
    assert list(scratch.glob("forgetrain-judge-*"))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    make_judge(tmp_path).close()
    assert not list(scratch.glob("forgetrain-judge-*"))


def descendants(process: int) -> set[int]:
    found: set[int] = set()
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found |= {child, *descendants(child)}
    return found


def runs(process: int) -> bool:
    """Whether it is there and no zombie, which is for its new parent to reap."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
