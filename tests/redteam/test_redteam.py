"""The red team: every engine that is wrong or hostile is rejected by the gate that is meant for it, and every honest
one is accepted. The judge itself is what is tested here; nothing of it is replaced."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from forgetrain.cli.main import app
from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.errors import UserError
from forgetrain.judge import sandbox
from forgetrain.redteam.attack import Attack
from forgetrain.redteam.run import ATTACKS, FAMILIES, HONEST, Outcome, RedTeam, red_target
from tests.bubblewrap import needs_bubblewrap

pytestmark = needs_bubblewrap

#: One or two of each family, all caught by the first gate; the whole corpus is in the slow suite.
CHEAP = {
    ("work skipped", "last micro-batch"),
    ("numerics drifted", "causal leak"),
    ("answers cached", "gradients by batch"),
    ("torch patched", "the channel"),
    ("work moved", "answers one step late"),
    ("situation sniffed", "first steps right"),
    ("state not trained", "one step behind"),
    ("inputs mutated", "the caller's weights"),
    ("golden looked for", "in the caller's frames"),
    ("pipe forged", "noise"),
    ("pipe forged", "a pickle"),
    ("escape", "network"),
    ("escape", "fork bomb"),
    ("escape", "100 GB"),
    ("crash", "exit at step 2"),
}


@pytest.fixture(scope="module")
def team():
    with RedTeam() as team:
        yield team


def name_of(attack: Attack) -> str:
    return f"{attack.family}: {attack.name}"


def check(outcome: Outcome) -> None:
    attack, caught = outcome.attack, outcome.caught_by
    assert caught is not None, f"{name_of(attack)} was accepted"
    assert caught.sandboxed
    assert outcome.as_expected, f"wanted {attack.gate} {attack.says!r}, got {caught.gate}: {caught.explanation}"


@pytest.mark.parametrize("attack", [a for a in ATTACKS if (a.family, a.name) in CHEAP], ids=name_of)
def test_cheap_attacks_are_rejected(team, attack):
    check(team.attack(attack))


@pytest.mark.slow
@pytest.mark.parametrize("attack", [a for a in ATTACKS if (a.family, a.name) not in CHEAP], ids=name_of)
def test_attacks_are_rejected(team, attack):
    check(team.attack(attack))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("plan", HONEST)
def test_honest_engines_are_accepted(team, plan, dtype):
    failed, _ = team.honest(plan, dtype)
    assert failed is None, f"{failed.gate}: {failed.explanation}"


def test_the_corpus_is_whole():
    assert len(ATTACKS) >= 60
    assert len({name_of(attack) for attack in ATTACKS}) == len(ATTACKS)
    assert len(CHEAP) == sum((attack.family, attack.name) in CHEAP for attack in ATTACKS)
    assert {family for family, _ in CHEAP} >= set(FAMILIES) - {"precision lowered", "timers patched"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_attack_is_a_small_change_of_the_honest_engine_that_still_parses(dtype):
    honest = write_engine(red_target(dtype), Plan.textbook())
    for attack in ATTACKS:
        source = attack.source(honest)
        compile(source, attack.name, "exec")
        assert source != honest
        assert abs(len(source) - len(honest)) < 2000, attack.name


def test_an_attack_on_source_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="has no 'nowhere'"):
        Attack("family", "name", "what", "G1", replace=(("nowhere", "x"),)).source("source")


def test_the_command_prints_every_engine_and_fails_when_one_slips_through(monkeypatch):
    from forgetrain.redteam import run

    two = [attack for attack in ATTACKS if attack.name in ("no build", "in the project")]
    monkeypatch.setattr(run, "ATTACKS", tuple(two))
    result = CliRunner().invoke(app, ["redteam", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])["attacks"]
    assert [(row["engine"], row["caught_by"]) for row in rows] == [(a.name, "contract") for a in two]
    monkeypatch.setattr(run.RedTeam, "attack", lambda self, attack: Outcome(attack, None, 0.0))
    result = CliRunner().invoke(app, ["redteam", "--json"])
    assert result.exit_code == 1
    assert not json.loads(result.stdout.splitlines()[-1])["passed"]


def test_without_a_sandbox_nothing_hostile_is_run(monkeypatch):
    monkeypatch.setattr(sandbox, "_working_bubblewrap", lambda device: ((), "bubblewrap is not installed"))
    with RedTeam() as team, pytest.raises(UserError, match="in the sandbox only"):
        team.attack(ATTACKS[0])
