"""``forgetrain align`` and ``forgetrain engine write``: results, and bad input in one line."""

from __future__ import annotations

import json
import sys

import pytest

from forgetrain.cli.main import main
from forgetrain.golden.record import sealed


@pytest.fixture(scope="module")
def aligned(aligned_run):
    """A folder with a target and its aligned engine, and the result that the command printed."""
    return aligned_run.folder, aligned_run.target, json.loads(aligned_run.printed.splitlines()[-1])


def call(monkeypatch, capsys, folder, *arguments):
    """The command in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["forgetrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def refused(monkeypatch, capsys, folder, *arguments):
    code, _, err = call(monkeypatch, capsys, folder, *arguments)
    assert code == 2, err
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("forgetrain: ")
    return line


def test_every_verdict_is_in_the_json(aligned):
    _, _, result = aligned
    assert result["passed"]
    assert [verdict["gate"] for verdict in result["verdicts"]] == ["G1", "G2", "G3"]
    for verdict in result["verdicts"]:
        assert {"gate", "pass", "statistic", "threshold", "margin", "first_divergence"} <= set(verdict)


def test_the_written_engine_is_the_aligned_one_but_for_its_header(aligned, monkeypatch, capsys):
    folder, target, _ = aligned
    plan = folder / "runs" / "tiny" / "engine" / "plan.toml"
    code, out, _ = call(monkeypatch, capsys, folder, "engine", "write", target, "--plan", plan)
    assert code == 0
    kept = (folder / "runs" / "tiny" / "engine" / "engine.py").read_text()
    after = "from __future__"
    assert out[out.index(after) :] == kept[kept.index(after) :]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("import no_such_module\n", "no_such_module"),
        ("def build(\n", "SyntaxError"),
        ("x = 1\n", "build"),
    ],
    ids=["does not import", "no Python", "no factory"],
)
def test_a_file_that_is_no_engine_is_refused_by_name(content, words, aligned, tmp_path, monkeypatch, capsys):
    folder, target, _ = aligned
    file = tmp_path / "mine.py"
    file.write_text(content)
    line = refused(monkeypatch, capsys, folder, "align", target, "--engine", file)
    assert str(file) in line
    assert words in line


def test_what_is_not_there_is_refused(aligned, tmp_path, monkeypatch, capsys):
    folder, target, _ = aligned
    assert "none.py" in refused(monkeypatch, capsys, folder, "align", target, "--engine", tmp_path / "none.py")
    assert "nowhere" in refused(monkeypatch, capsys, folder, "align", target, "--golden", tmp_path / "nowhere")
    plan = tmp_path / "plan.toml"
    plan.write_text('attention = "magic"\n')
    line = refused(monkeypatch, capsys, folder, "engine", "write", target, "--plan", plan)
    assert "attention" in line
    assert "magic" in line


def test_a_search_goes_on_from_a_plan_that_was_found_before(aligned, tmp_path, monkeypatch, capsys):
    folder, target, before = aligned
    plan = folder / "runs" / "tiny" / "engine" / "plan.toml"
    runs, golden = tmp_path / "again", folder / "runs" / "tiny" / "golden"
    arguments = ("align", target, "--plan", plan, "--golden", golden, "--runs", runs, "--json")
    code, out, _ = call(monkeypatch, capsys, folder, *arguments)
    assert code == 0, out
    after = json.loads(out.splitlines()[-1])
    assert after["passed"]
    assert after["plan"] == before["plan"]
    assert len(after["attempts"]) == 0 < len(before["attempts"])

    assert "--engine" in refused(monkeypatch, capsys, folder, "align", target, "--plan", plan, "--engine", plan)
    fast = tmp_path / "fast.toml"
    fast.write_text('schedule = "production"\n')
    line = refused(monkeypatch, capsys, folder, "align", target, "--plan", fast)
    assert "schedule" in line
    assert "production" in line


def test_a_record_with_a_flipped_byte_or_of_another_environment_is_refused(aligned, tmp_path, monkeypatch, capsys):
    import shutil

    folder, target, _ = aligned
    golden = tmp_path / "golden"
    shutil.copytree(folder / "runs" / "tiny" / "golden", golden)
    path = golden / "taps.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "taps.safetensors" in refused(monkeypatch, capsys, folder, "align", target, "--golden", golden)

    shutil.rmtree(golden)
    shutil.copytree(folder / "runs" / "tiny" / "golden", golden)
    manifest = json.loads((golden / "manifest.json").read_text())
    manifest["environment"]["threads"] = 64
    (golden / "manifest.json").write_text(json.dumps(sealed(manifest)))
    line = refused(monkeypatch, capsys, folder, "align", target, "--golden", golden)
    assert "threads" in line
    assert "64" in line


def test_a_batch_that_two_ranks_cannot_share_is_refused(aligned, monkeypatch, capsys):
    folder, target, _ = aligned
    one = ("--set", "gates.batch_size=1", "--set", "gates.micro_batch_size=1")
    assert "gates.batch_size" in refused(monkeypatch, capsys, folder, "align", target, *one)
