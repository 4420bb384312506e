"""``forgetrain verify``: an engine's folder against what its provenance says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forgetrain.cli.main import app
from forgetrain.durable import sha256_file
from forgetrain.errors import UserError
from forgetrain.gates.verdict import Verdict
from forgetrain.judge import runner
from forgetrain.judge.runner import Judgement
from tests.tiny import tiny_target


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engine.py").write_text("# an engine")
    provenance = {
        "sha256": sha256_file(tmp_path / "engine.py"),
        "target": tiny_target().plain(),
        "environment": {"torch": "0.0"},
        "verdicts": [{"gate": "G4.fp32", "pass": True}, {"gate": "G7", "pass": False}],
        "speed": {"tokens_per_second": 1000.0},
    }
    (tmp_path / "provenance.json").write_text(json.dumps(provenance))
    return tmp_path


@pytest.fixture
def outcome(monkeypatch):
    found = {"passed": {"G4.fp32": True, "G7": True}, "bitwise": None}

    def judge(self, file, *, bitwise, on_verdict, **options):
        found["bitwise"] = bitwise
        verdicts = [Verdict(gate, passed) for gate, passed in found["passed"].items()]
        return Judgement(sha256_file(file), verdicts, speed={"tokens_per_second": 2000.0})

    monkeypatch.setattr(runner.Judge, "judge", judge)
    return found


def run(folder: Path, *arguments: str):
    return CliRunner().invoke(app, ["verify", str(folder), *arguments], catch_exceptions=False)


def test_an_engine_that_holds(folder, outcome):
    result = run(folder, "--json")
    assert result.exit_code == 0
    assert "2,000 tokens/s here, 1,000 when it was made" in result.stderr
    assert "0.0 when it was made" in result.stderr
    assert outcome["bitwise"] is False
    assert json.loads(result.stdout.splitlines()[-1])["lost"] == []


def test_a_gate_that_held_and_does_not_is_lost(folder, outcome):
    outcome["passed"] = {"G4.fp32": False, "G7": False}
    result = run(folder)
    assert result.exit_code == 1
    assert "does NOT hold here: G4.fp32" in result.stderr  # G7 did not hold before either


def test_bitwise_claims_are_judged_bitwise(folder, outcome):
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["verdicts"].append({"gate": "G1", "pass": True})
    (folder / "provenance.json").write_text(json.dumps(provenance))
    run(folder)
    assert outcome["bitwise"] is True


def test_a_changed_engine_and_a_missing_provenance_are_refused(folder):
    (folder / "engine.py").write_text("# another")
    with pytest.raises(UserError, match=r"is not the engine that provenance\.json is of"):
        run(folder)
    (folder / "provenance.json").unlink()
    with pytest.raises(UserError, match="is missing"):
        run(folder)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([], r"provenance\.json: is not a JSON object"),
        (None, r"provenance\.json: is not a JSON object"),
        ({"sha256": "x", "target": {}}, "verdicts: is missing"),
        ({"sha256": "x", "target": [], "verdicts": []}, "target: is not of type dict"),
        ({"sha256": "x", "target": {}, "verdicts": []}, r"verdicts: has none to compare with. .*forgetrain judge"),
        ({"sha256": "x", "target": {}, "verdicts": [1]}, "verdicts: are no verdicts"),
    ],
)
def test_what_is_no_provenance_is_told(folder, record, said):
    (folder / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=said):
        run(folder)
