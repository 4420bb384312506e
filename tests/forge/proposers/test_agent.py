"""Agents are real processes here: small shell lines that do what agents were seen to do."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from forgetrain.errors import UserError
from forgetrain.forge.proposers.agent import Agent
from forgetrain.forge.proposers.base import NoProposal, Proposal
from tests.forge.proposers.briefs import brief

MARK = f"97.{os.getpid()}"  # seconds of sleep that no other run of these tests has


def marked() -> int:
    """Processes that sleep so long."""
    found = subprocess.run(
        ["pgrep", "-c", "-f", rf"^(setsid )?sleep {MARK}|time\.sleep\({MARK}\)"],
        capture_output=True,
        text=True,
        check=False,
    )
    return int(found.stdout)


def wait_until(holds):
    until = time.monotonic() + 60
    while not holds():  # a machine at work starts a process in seconds
        assert time.monotonic() < until
        time.sleep(0.05)


def agent(tmp_path, body, **limits):
    """An agent whose program is this body, with the prompt as its argument."""
    script = tmp_path / "agent.py"
    script.write_text(body)
    return Agent(f"{sys.executable} {script}", **limits)


def test_an_edit_is_a_proposal(tmp_path):
    body = (
        "import pathlib, sys\n"
        "assert 'BRIEF.md' in sys.argv[1] and 'tiny-minicpm5' in pathlib.Path('BRIEF.md').read_text()\n"
        "assert sys.stdin.read() == ''\n"
        "pathlib.Path('engine.py').write_text('x = 2\\n')\n"
        "pathlib.Path('MESSAGE.txt').write_text('doubled\\n')\n"
    )
    proposal = agent(tmp_path, body).propose(brief())
    assert proposal == Proposal("x = 2\n", "doubled")


def test_an_edit_counts_even_when_the_agent_fails_afterwards(tmp_path):
    body = "open('engine.py', 'w').write('x = 3\\n'); print('gave up'); raise SystemExit(7)"
    assert agent(tmp_path, body).propose(brief()) == Proposal("x = 3\n", "gave up")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('all done')", "changed nothing (exit status 0)"),
        ("import shutil, os; shutil.rmtree(os.getcwd())", "left no readable engine.py"),
        ("open('engine.py', 'wb').write(b'\\xff\\xfe')", "left no readable engine.py"),
        ("import os; os.remove('engine.py'); os.symlink('/etc/passwd', 'engine.py')", "left no readable engine.py"),
        ("import os; os.remove('engine.py'); os.mkfifo('engine.py')", "left no readable engine.py"),
        ("import os; os.kill(os.getpid(), 15)", "changed nothing (exit status -15)"),
    ],
)
def test_no_usable_change_is_a_failed_attempt(tmp_path, body, reason):
    outcome = agent(tmp_path, body).propose(brief())
    assert isinstance(outcome, NoProposal)
    assert reason in outcome.reason


@pytest.mark.parametrize(
    ("limits", "minutes", "reason"),
    [
        ({"wall": 1.0, "silence": 60.0}, 10, "stopped after 1 s"),
        ({"wall": 60.0, "silence": 1.0}, 10, "1 s of silence"),
        ({"wall": 60.0, "silence": 60.0}, 1 / 60, "stopped after 1 s"),
    ],
)
def test_watchdogs_and_the_budget_end_the_agent_and_what_it_started(tmp_path, limits, minutes, reason):
    body = f"import subprocess; subprocess.Popen(['sleep', '{MARK}']); subprocess.run(['sleep', '{MARK}'])"
    started = time.monotonic()
    outcome = agent(tmp_path, body, **limits).propose(brief(minutes=minutes))
    assert isinstance(outcome, NoProposal)
    assert reason in outcome.reason
    assert time.monotonic() - started < 20
    assert not marked()


def test_what_an_agent_leaves_behind_in_sessions_of_its_own_ends_with_it(tmp_path):
    daemon = f"import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep({MARK})"
    body = (
        "import subprocess, sys\n"
        f"subprocess.Popen(['setsid', 'sleep', '{MARK}'])\n"
        f"subprocess.run([sys.executable, '-c', '{daemon}'])\n"
        "open('engine.py', 'w').write('x = 2\\n')\n"
    )
    assert isinstance(agent(tmp_path, body).propose(brief()), Proposal)
    assert not marked()


#: Imports once, and forks three that ask the agent.
LOOPS = """
import os, signal, sys, tempfile
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
tempfile.tempdir = sys.argv[1]
from forgetrain.forge.proposers.agent import Agent
from tests.forge.proposers.briefs import brief
for _ in range(3):
    child = os.fork()
    if child == 0:
        Agent(sys.argv[2]).propose(brief())
        os._exit(0)
    print(child, flush=True)
for _ in range(3):
    os.wait()
"""


def test_an_agent_ends_with_the_loop_however_that_ends_and_the_next_one_tidies_up(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    script = tmp_path / "agent.sh"
    script.write_text(f"trap '' TERM HUP INT; setsid sleep {MARK} & sleep {MARK}")
    command = [sys.executable, "-c", LOOPS, str(scratch), f"sh {script}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as loops:
        assert loops.stdout is not None
        started = [int(loops.stdout.readline()) for _ in range(3)]
        wait_until(lambda: marked() == 6)
        for loop, number, left in zip(started, (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL), (4, 2, 0), strict=True):
            os.kill(loop, number)
            wait_until(lambda left=left: marked() == left)
    assert len(list(scratch.glob("forgetrain-agent-*"))) == 3
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    agent(tmp_path, "").propose(brief())
    assert list(scratch.iterdir()) == []


def test_a_command_that_cannot_be_run_is_bad_input(tmp_path):
    script = tmp_path / "script"
    script.write_text("no interpreter is named\n")
    with pytest.raises(UserError, match="cannot be run: Permission denied"):
        Agent(str(script)).propose(brief())
    script.chmod(0o755)
    with pytest.raises(UserError, match="cannot be run: Exec format error"):
        Agent(str(script)).propose(brief())
    with pytest.raises(UserError, match="cannot be run: No such file"):
        Agent("no-such-agent-anywhere -p").propose(brief())
    with pytest.raises(UserError, match="command is empty"):
        Agent("")
    with pytest.raises(UserError, match="command is not whole: no closing quotation"):
        Agent("claude -p 'faster")
