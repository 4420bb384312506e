"""``forgetrain forge`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from forgetrain.cli.main import app
from forgetrain.errors import UserError
from forgetrain.judge.ledger import Ledger
from tests.cli.test_run import write_target
from tests.judge.test_cluster import ray_needed


def forge(folder, *arguments, code=0):
    command = [sys.executable, "-m", "forgetrain", "forge", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:] + failures(folder)
    return done


def failures(folder) -> str:
    """What the gates found wrong, for who reads why a test failed."""
    if not (folder / "runs" / "ledger").exists():
        return ""
    with Ledger(folder / "runs" / "ledger") as ledger:
        rows = ledger.query("SELECT gate, explanation FROM verdicts WHERE NOT pass")
    return "".join(f"\n{row['gate']}: {row['explanation']}" for row in rows)


@pytest.mark.slow
def test_the_catalogue_forges_a_tiny_target_and_a_second_call_goes_on(aligned_run, tmp_path):
    target = aligned_run.copied_to(tmp_path)
    quick = ("--set", "search.attempts=1")
    first = forge(tmp_path, target, *quick, "--json")
    outcome = json.loads(first.stdout.splitlines()[-1])
    assert outcome["attempts"] == 1
    assert "the engine is aligned with this record already" in first.stderr
    assert "attempt 1, catalogue: production schedule" in first.stderr
    with Ledger(tmp_path / "runs" / "ledger") as ledger:
        row = ledger.query("SELECT * FROM attempts WHERE proposer = 'catalogue'")[0]
        gates = [verdict["gate"] for verdict in ledger.verdicts(row["candidate"])]
    # right it must be; whether it is faster at this size is the machine's business
    assert {"contract", "G4.update", "G4.fp32"} <= set(gates)
    assert row["reason"].startswith(("elected", "rejected by G7", "not confirmed"))
    assert "Speed by attempt" in (tmp_path / outcome["report"]).read_text()
    again = forge(tmp_path, target, *quick, "--json")
    assert "1 attempts are made" in again.stderr


@pytest.mark.slow
def test_an_agent_that_changes_nothing_is_a_failed_attempt(aligned_run, tmp_path):
    target = aligned_run.copied_to(tmp_path)
    done = forge(tmp_path, target, "--agent", "true", "--set", "search.attempts=2", "--json")
    assert done.stderr.count("the agent changed nothing") == 2
    assert json.loads(done.stdout.splitlines()[-1])["elections"] == 0


def test_bad_options_are_refused_in_one_line(tmp_path):
    target = write_target(tmp_path, "transformers")
    both = forge(tmp_path, target, "--agent", "true", "--api", "model", code=2)
    assert both.stderr.startswith("forgetrain: --agent, --api: cannot go together")
    alone = forge(tmp_path, target, "--base-url", "http://localhost", code=2)
    assert "is for --api" in alone.stderr
    free = forge(tmp_path, target, "--api", "model", "--set", "search.dollars=5", code=2)
    assert free.stderr.startswith("forgetrain: search.dollars: cannot be counted without prices. Add --prices")
    below = forge(tmp_path, target, "--api", "model", "--prices", "-1", "1", code=2)
    assert below.stderr.startswith("forgetrain: --prices: is no price (got (-1.0, 1.0))")
    assert not (tmp_path / "runs").exists()


def test_without_ray_its_executor_is_refused(tmp_path, monkeypatch):
    target = write_target(tmp_path, "transformers")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--executor: Ray is not installed. Run pip install 'forgetrain\[ray\]'"):
        CliRunner().invoke(app, ["forge", str(target), "--executor", "ray"], catch_exceptions=False)


@ray_needed
@pytest.mark.slow
def test_a_cluster_judges_what_an_agent_writes(tmp_path):
    """An engine that fails early: elections from a cluster's verdicts are in tests/forge/test_optimise.py, an engine
    that passes there in tests/judge/test_cluster.py."""
    target, agent = write_target(tmp_path, "transformers"), "sh -c 'sed -i s/1e-06/1e-03/ engine.py'"
    options = ["--agent", agent, "--set", "hardware.threads=1", "--set", "search.attempts=1"]
    done = forge(tmp_path, target, *options, "--executor", "ray", "--json")
    assert "candidates at once on one node" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["attempts"] == 1
    with Ledger(tmp_path / "runs" / "ledger") as ledger:
        (row,) = ledger.query("SELECT * FROM attempts WHERE outcome = 'rejected'")
        gates = [verdict["gate"] for verdict in ledger.verdicts(row["candidate"])]
    assert gates == ["contract"]


def test_a_file_that_cannot_be_submitted_is_refused_before_anything_runs(tmp_path):
    target = write_target(tmp_path, "transformers")
    command = [sys.executable, "-m", "forgetrain", "submit", "none.py", "--target", str(target)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("forgetrain: none.py: cannot be read")
    assert not (tmp_path / "runs").exists()
