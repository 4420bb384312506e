"""``forgetrain ledger``."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json

import pytest
from typer.testing import CliRunner

from forgetrain.cli.ledger import app
from forgetrain.errors import UserError
from forgetrain.gates.verdict import Verdict
from forgetrain.judge.ledger import Ledger
from tests.tiny import tiny_target


@pytest.fixture
def runs(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        target = ledger.add_target(tiny_target())
        parent = ledger.add_candidate(target, b"a = 1\nb = 2\n", message="first")
        child = ledger.add_candidate(target, b"a = 1\nb = 3\n", message="second", parent=parent)
        judging = ledger.begin_judging(target, child, environment={})
        ledger.add_verdicts(judging, [Verdict("G2", False, explanation="loss differs at step 1")])
        ledger.end_judging(judging, passed=False, sandboxed=False)
    return tmp_path, parent, child


def run(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    return json.loads(result.stdout.splitlines()[-1])


def test_list_show_diff_and_lineage(runs):
    folder, parent, child = runs
    rows = run("list", "--runs", folder)["candidates"]
    assert [(row["hash"], row["failed"]) for row in rows] == [(parent, None), (child, "G2")]
    assert run("list", "--target", "other", "--runs", folder)["candidates"] == []
    shown = run("show", child[:9], "--runs", folder)
    assert shown["verdicts"][0]["explanation"] == "loss differs at step 1"
    assert "-b = 2\n+b = 3\n" in run("diff", child, "--runs", folder)["diff"]
    assert run("diff", child, child, "--runs", folder)["diff"] == ""
    assert [row["message"] for row in run("lineage", child, "--runs", folder)["lineage"]] == ["second", "first"]
    with pytest.raises(UserError, match="has no parent"):
        run("diff", parent, "--runs", folder)
    for command in (["list"], ["show", child], ["diff", child], ["lineage", child]):
        assert CliRunner().invoke(app, [*command, "--runs", str(folder)]).exit_code == 0


def test_square_brackets_of_a_message_are_shown_as_they_are(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        target = ledger.add_target(tiny_target())
        hash_ = ledger.add_candidate(target, b"a = 1\n", message="[wip] q[0] and [/b]")
    for command in (["list"], ["show", hash_], ["lineage", hash_]):
        shown = CliRunner().invoke(app, [*command, "--runs", str(tmp_path)])
        assert shown.exit_code == 0
        assert "[wip] q[0] and [/b]" in shown.output


def test_export(runs, tmp_path):
    folder, _, child = runs
    file = tmp_path / "out.csv"
    assert run("export", file, "--table", "candidates", "--runs", folder)["rows"] == 2
    with open(file, newline="") as text:
        assert [row["hash"] for row in csv.DictReader(text)][1] == child
    with pytest.raises(UserError, match="no such table"):
        run("export", file, "--table", "sqlite_master", "--runs", folder)
    with pytest.raises(UserError, match="neither CSV"):
        run("export", "out.txt", "--runs", folder)
    with pytest.raises(UserError, match="folder does not exist"):
        run("export", tmp_path / "no" / "out.csv", "--runs", folder)
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(UserError, match="needs pyarrow"):
            run("export", tmp_path / "out.parquet", "--runs", folder)
    else:
        parquet = importlib.import_module("pyarrow.parquet")
        run("export", tmp_path / "out.parquet", "--table", "candidates", "--runs", folder)
        assert parquet.read_table(tmp_path / "out.parquet")["hash"].to_pylist()[1] == child


def test_no_ledger_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match="no ledger here"):
        run("list", "--runs", tmp_path)
