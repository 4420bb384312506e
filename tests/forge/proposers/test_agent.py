"""Agents are real processes here: small shell lines that do what agents were seen to do."""

import os
import subprocess
import sys
import time

import pytest

from forgetrain.errors import UserError
from forgetrain.forge.proposers.agent import Agent
from forgetrain.forge.proposers.base import NoProposal, Proposal
from tests.forge.proposers.briefs import brief


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
    ],
)
def test_no_usable_change_is_a_failed_attempt(tmp_path, body, reason):
    outcome = agent(tmp_path, body).propose(brief())
    assert isinstance(outcome, NoProposal)
    assert reason in outcome.reason


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"wall": 1.0, "silence": 60.0}, "stopped after 1 s"), ({"wall": 60.0, "silence": 1.0}, "1 s of silence")],
)
def test_watchdogs_end_the_agent_and_what_it_started(tmp_path, limits, reason):
    mark = f"97.{os.getpid()}"  # no other run of these tests has it
    body = f"import subprocess; subprocess.Popen(['sleep', '{mark}']); subprocess.run(['sleep', '{mark}'])"
    started = time.monotonic()
    outcome = agent(tmp_path, body, **limits).propose(brief())
    assert isinstance(outcome, NoProposal)
    assert reason in outcome.reason
    assert time.monotonic() - started < 20
    assert subprocess.run(["pgrep", "-f", f"sleep {mark}"], check=False, capture_output=True).returncode == 1


def test_a_command_that_is_not_there_is_bad_input():
    with pytest.raises(UserError, match="cannot be run"):
        Agent("no-such-agent-anywhere -p").propose(brief())
    with pytest.raises(UserError, match="command is empty"):
        Agent("")
