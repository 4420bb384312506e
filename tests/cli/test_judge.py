"""``forgetrain judge``: what it says, what it records, and its exit codes. The judge's own work is tested elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forgetrain.cli.common import read_target
from forgetrain.cli.main import app
from forgetrain.durable import sha256_file
from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.gates.verdict import Verdict
from forgetrain.judge import by_hand, runner
from forgetrain.judge.ledger import Ledger, target_key
from forgetrain.judge.runner import Judgement
from tests.tiny import GATES, MODEL, RECIPE


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ['name = "tiny"']
    for section, values in (("model", MODEL), ("recipe", RECIPE), ("gates", GATES)):
        lines += [f"[{section}]", *(f"{key} = {value}" for key, value in values.items())]
    Path("tiny.toml").write_text("\n".join(lines))
    Path("engine.py").write_text("# an engine")
    return tmp_path


@pytest.fixture
def outcome(monkeypatch):
    """What the judge finds: verdicts, and whether there was a sandbox."""
    found = {"verdicts": [Verdict("contract", True, explanation="fine"), Verdict("G4.fp32", True)], "sandboxed": True}

    def judge(self, file, *, on_verdict, **options):
        for verdict in found["verdicts"]:
            on_verdict(verdict)
        box = "bubblewrap" if found["sandboxed"] else "unsandboxed: bubblewrap is not installed"
        return Judgement(sha256_file(file), found["verdicts"], sandbox=box, sandboxed=found["sandboxed"])

    monkeypatch.setattr(runner.Judge, "judge", judge)
    return found


def run(*arguments: str):
    return CliRunner().invoke(app, ["judge", "engine.py", "--target", "tiny.toml", *arguments], catch_exceptions=False)


def test_a_pass_is_explained_and_recorded(place, outcome):
    result = run("--json")
    assert result.exit_code == 0
    assert "contract passed. Do load, step, loss" in result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["passed"]
    record = json.loads(Path("verdicts.json").read_text())
    assert record["sha256"] == answer["sha256"] == sha256_file(Path("engine.py"))
    assert [(v["gate"], v["pass"]) for v in record["verdicts"]] == [("contract", True), ("G4.fp32", True)]
    with Ledger(Path("runs/ledger")) as ledger:
        assert ledger.candidates()[0]["passed"]


def test_other_gates_verdicts_on_the_same_engine_stay(place, outcome):
    digest = sha256_file(Path("engine.py"))
    before = [{"gate": "G1", "pass": True}, {"gate": "contract", "pass": False}]
    Path("verdicts.json").write_text(json.dumps({"sha256": digest, "verdicts": before}))
    assert run().exit_code == 0
    record = json.loads(Path("verdicts.json").read_text())
    assert [(v["gate"], v["pass"]) for v in record["verdicts"]] == [("G1", True), ("contract", True), ("G4.fp32", True)]


def test_another_engine_s_record_is_left_alone(place, outcome):
    Path("other.py").write_text("# another engine")
    record = {"sha256": sha256_file(Path("other.py")), "verdicts": []}
    Path("verdicts.json").write_text(json.dumps(record))
    result = run()
    assert "verdicts.json is of other.py; judge engine.py in a folder of its own to use it" in result.stderr
    assert json.loads(Path("verdicts.json").read_text()) == record


def test_an_engine_that_was_mended_is_recorded_over_what_it_was(place, outcome):
    outcome["verdicts"] = [Verdict("contract", False), Verdict("G1", False)]
    assert run().exit_code == 1
    Path("engine.py").write_text("# an engine, mended")
    outcome["verdicts"] = [Verdict("contract", True)]
    assert run().exit_code == 0
    record = json.loads(Path("verdicts.json").read_text())
    assert record["sha256"] == sha256_file(Path("engine.py"))
    assert [(v["gate"], v["pass"]) for v in record["verdicts"]] == [("contract", True)]


def test_a_failure_says_where_and_exits_with_1(place, outcome):
    outcome["verdicts"] = [Verdict("G4.fp32", False, first_divergence="lm_head.weight", explanation="errs too much")]
    result = run()
    assert result.exit_code == 1
    assert "G4.fp32 FAILED" in result.stderr
    assert "first seen in lm_head.weight" in result.stderr
    assert "rejected by G4.fp32" in result.stderr


def test_without_a_sandbox_a_pass_counts_only_when_it_was_allowed(place, outcome):
    outcome["sandboxed"] = False
    result = run()
    assert result.exit_code == 1
    assert "--allow-unsandboxed" in result.stderr
    assert not Path("verdicts.json").exists()
    assert run("--allow-unsandboxed").exit_code == 0
    assert Path("verdicts.json").exists()


def test_some_gates_are_no_verdict_on_the_engine(place, outcome):
    assert run("--gates", "contract,G4").exit_code == 0
    assert not Path("verdicts.json").exists()


def cut_off_after_a_gate(monkeypatch):
    """A judge that is killed when it has given the contract's verdict and the first of G4's two."""

    def judge(self, file, *, on_verdict, after_gate, done, **options):
        judgement = Judgement(sha256_file(file), [*done, Verdict("contract", True, sandboxed=True)], sandboxed=True)
        after_gate(judgement)
        judgement.verdicts.append(Verdict("G4.fp32", True, sandboxed=True))
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Judge, "judge", judge)


def ends_with_g4(monkeypatch):
    """A judge that finds G4 after what is done."""

    def judge(self, file, *, after_gate, done, **options):
        return Judgement(sha256_file(file), [*done, Verdict("G4.fp32", True, sandboxed=True)], sandboxed=True)

    monkeypatch.setattr(runner.Judge, "judge", judge)


def test_a_judging_that_was_cut_off_goes_on_where_it_was(place, monkeypatch):
    cut_off_after_a_gate(monkeypatch)
    assert run().exit_code == 130
    assert not Path("verdicts.json").exists()
    ends_with_g4(monkeypatch)
    result = run("--resume")
    assert result.exit_code == 0
    assert "going on after contract" in result.stderr
    record = json.loads(Path("verdicts.json").read_text())
    assert [v["gate"] for v in record["verdicts"]] == ["contract", "G4.fp32"]
    with Ledger(Path("runs/ledger")) as ledger:
        assert ledger.query("SELECT count(*) AS n FROM judgings")[0]["n"] == 1
        assert [v["gate"] for v in ledger.verdicts(record["sha256"])] == ["G4.fp32", "contract"]
        assert ledger.candidates()[0]["passed"]
    again = run("--resume")
    assert "from the beginning" in again.stderr


@pytest.mark.parametrize("other", ["--bitwise", "--champion=champion.py", "--set=recipe.lr=5e-3", "its content"])
def test_what_was_found_for_another_question_is_not_taken_over(place, monkeypatch, other):
    Path("champion.py").write_text("# a champion")
    cut_off_after_a_gate(monkeypatch)
    run()
    ends_with_g4(monkeypatch)
    if other == "its content":
        Path("engine.py").write_text("# an engine, changed")
    result = run("--resume", *([] if other == "its content" else [other]))
    assert "from the beginning" in result.stderr
    assert [v["gate"] for v in json.loads(Path("verdicts.json").read_text())["verdicts"]] == ["G4.fp32"]


def test_a_file_that_changes_before_it_is_frozen_gets_no_verdicts_of_the_old_one(place, monkeypatch):
    def judge(self, file, *, after_gate, done, **options):
        return Judgement("5f1c", [*done, Verdict("G4.fp32", True, sandboxed=True)], sandboxed=True)

    monkeypatch.setattr(runner.Judge, "judge", judge)
    result = CliRunner().invoke(app, ["judge", "engine.py", "--target", "tiny.toml"])
    assert "was changed as it was read" in str(result.exception)
    assert not Path("verdicts.json").exists()


def test_what_was_reached_without_a_sandbox_is_neither_kept_nor_gone_on_with(place, monkeypatch):
    def judge(self, file, *, after_gate, done, **options):
        after_gate(Judgement(sha256_file(file), [*done, Verdict("contract", True)], sandboxed=False))
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Judge, "judge", judge)
    run()
    with Ledger(Path("runs/ledger")) as ledger:
        assert ledger.query("SELECT * FROM judgings") == []
    run("--allow-unsandboxed")
    ends_with_g4(monkeypatch)
    assert "from the beginning" in run("--resume").stderr


def test_gates_or_tokens_that_changed_are_another_question(place, monkeypatch):
    cut_off_after_a_gate(monkeypatch)
    run()
    ends_with_g4(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(by_hand, "_code", lambda: "other")
        assert "from the beginning" in run("--resume").stderr
    Path("runs/tiny/data").mkdir(parents=True)
    Path("runs/tiny/data/manifest.json").write_text("{}")
    assert "from the beginning" in run("--resume").stderr


def test_two_judgings_of_a_file_at_once_are_refused(place, outcome):
    name = f"{sha256_file(Path('engine.py'))[:16]}-{target_key(read_target(Path('tiny.toml'), None))[:16]}"
    with Ledger(Path("runs/ledger")) as ledger, ledger.claim(name):
        result = CliRunner().invoke(app, ["judge", "engine.py", "--target", "tiny.toml"])
    assert "works on engine.py" in str(result.exception)


def test_resuming_a_part_is_refused(place, outcome):
    result = CliRunner().invoke(app, ["judge", "engine.py", "--target", "tiny.toml", "--resume", "--gates", "G4"])
    assert "--resume" in str(result.exception)


@pytest.mark.slow
def test_a_real_judging_that_is_killed_goes_on(place):
    options = ["--set=hardware.threads=1", "--set=gates.g5_steps=8", "--set=reference.name=transformers"]
    Path("engine.py").write_text(write_engine(read_target(Path("tiny.toml"), None), Plan.textbook()))
    argv = [sys.executable, "-m", "forgetrain", "judge", "engine.py", "--target", "tiny.toml", *options]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as killed:
        for line in killed.stderr:
            if line.startswith("G4.update passed"):
                break
        killed.kill()
    result = run("--resume", *options)
    assert "going on after contract" in result.stderr
    assert "contract passed" not in result.stderr
    record = json.loads(Path("verdicts.json").read_text())
    gates = ["contract", "G4.update", "G4.fp32", "G7.replay", "G7", "G8", "G5", "G6", "G3"]
    assert [v["gate"] for v in record["verdicts"]] == gates
    assert result.exit_code == 0, result.stderr


@pytest.mark.slow
def test_a_layout_of_ranks_is_asked_for_with_set(place):
    wanted = ("parallel.tensor=2", "gates.micro_batch_size=1", "recipe.micro_batch_size=1", "hardware.threads=1")
    options = [part for value in wanted for part in ("--set", value)]
    plan = 'schedule = "production"\nrope_tables = "fp32"\nattention_kernel = "blocked"\n'
    Path("plan.toml").write_text(plan)
    written = CliRunner().invoke(app, ["engine", "write", "tiny.toml", "--plan", "plan.toml", *options])
    assert written.exit_code == 0
    # uncompiled: the arithmetic is the same, and compiling takes seconds a region and process
    Path("engine.py").write_text(written.stdout.replace("@torch.compile(dynamic=False)\n", ""))
    result = run("--gates", "G3", *options)
    assert result.exit_code == 0, result.stderr
    assert "G3 passed." in result.stderr
    assert "2 tensor ranks: " in result.stderr
