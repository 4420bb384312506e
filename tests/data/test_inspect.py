"""``forgetrain data``: what the commands print and answer."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from forgetrain.cli.main import app
from forgetrain.data import progress
from forgetrain.data.build import build_data
from forgetrain.data.inspect import duplicates, statistics
from forgetrain.data.loader import Loader
from forgetrain.data.progress import Display
from tests.corpus import corpus_target, write_corpus


@pytest.fixture
def data(tmp_path):
    """Two sources that hold a document in common, which is in the second one three times."""
    write_corpus(tmp_path / "corpus", documents=30)
    shared = (tmp_path / "corpus" / "007.txt").read_text()
    texts = [shared, *(f"a record about number {number}" for number in range(40)), shared, shared]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = [{"path": str(tmp_path / "corpus"), "weight": 3.0}, {"path": str(tmp_path / "records.jsonl")}]
    target = corpus_target(tmp_path / "corpus", data={"sources": sources}, recipe={"steps": 10})
    return target, build_data(target, tmp_path / "runs" / target.name / "data")


def test_statistics_are_those_of_the_documents(data):
    target, built = data
    found = statistics(built, Loader(built, target))
    first, second = found["sources"]
    assert first["share"] == pytest.approx(0.75, abs=0.05)
    assert first["share"] + second["share"] == pytest.approx(1)
    windows = (len(built.sources[0].train.tokens) - 1) // target.recipe.sequence_length
    assert first["epochs"] * windows == pytest.approx(first["share"] * 10 * target.recipe.batch_size)
    lengths = np.diff(built.sources[0].train.document_starts)
    train = first["train"]
    assert (train["shortest"], train["longest"]) == (lengths.min(), lengths.max())
    assert train["median"] == int(np.median(lengths))
    assert train["mean"] == pytest.approx(lengths.mean())
    assert train["longer"] == pytest.approx((lengths > target.recipe.sequence_length).mean())
    assert train["of_vocabulary"] == pytest.approx(len(np.unique(built.sources[0].train.tokens)) / 320)
    values, counts = np.unique(built.sources[0].train.tokens, return_counts=True)
    assert train["commonest"][0]["share"] == pytest.approx(counts.max() / counts.sum())
    assert counts[values == train["commonest"][0]["token"]] == counts.max()
    assert first["bytes_per_token"] == pytest.approx(
        sum(path.stat().st_size for path in target_folder(target).iterdir()) / built.manifest["sources"][0]["tokens"]
    )


def target_folder(target):
    return Path(target.data.sources[0].path)


def test_equal_documents_are_counted_and_shown(data):
    _, built = data
    found = duplicates(built)
    assert found["documents"] == 30 + 43
    assert found["copies"] == 3
    (most,) = found["most"]
    assert most["times"] == 4
    assert found["tokens"] == 3 * most["tokens"]
    assert found["leaked"] == 0
    assert found["share"] == pytest.approx(found["tokens"] / sum(e["tokens"] for e in built.manifest["sources"]))
    text = (target_folder(data[0]) / "007.txt").read_text()
    assert text.startswith(most["text"])
    assert len(most["text"]) > 20


def test_a_held_out_document_that_is_trained_on_is_counted(tmp_path):
    """Two documents alone, the same: one must be held out."""
    (tmp_path / "a.jsonl").write_text('{"text": "the same text"}\n' * 2)
    target = corpus_target(tmp_path / "a.jsonl")
    assert duplicates(build_data(target, tmp_path / "data"))["leaked"] == 1


def target_file(tmp_path, target):
    """The target as a file for the command line: TOML is written by hand, so only what differs from the defaults."""
    path, lines = tmp_path / "tiny.toml", [f'name = "{target.name}"']
    for section in ("model", "recipe", "gates", "data"):
        lines.append(f"[{section}]")
        for key, value in target.plain()[section].items():
            if key == "sources":
                value = [{k: v for k, v in source.items() if v is not None} for source in value]
                tables = [
                    "{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in source.items()) + "}" for source in value
                ]
                lines.append(f"sources = [{', '.join(tables)}]")
            elif isinstance(value, str | int | float) and value is not None:
                lines.append(f"{key} = {json.dumps(value)}")
    path.write_text("\n".join(lines) + "\n")
    return path


def forgetrain(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands_show_rows_statistics_and_duplicates(data, tmp_path):
    target, built = data
    file, runs = target_file(tmp_path, target), ["--runs", tmp_path / "runs"]
    done = forgetrain("data", "inspect", file, *runs, "--step", 7, "--row", 1)
    assert done.exit_code == 0, done.output
    text = built.tokenizer.tokenizer.decode(
        Loader(built, target).batch_at(7).tokens[1].tolist(), skip_special_tokens=False
    )
    assert text.strip() in done.stdout
    assert "step 7, row 1: window" in done.stderr
    answer = json.loads(forgetrain("data", "inspect", file, *runs, "--statistics", "--duplicates", "--json").stdout)
    assert answer["duplicates"]["copies"] == 3
    assert len(answer["sources"]) == 2
    done = forgetrain("data", "inspect", file, *runs, "--statistics", "--duplicates")
    assert "documents of" in done.stdout
    assert "3 of 73 documents are copies of others" in done.stdout
    for wrong, message in ((["--step", 10], "the run has 10 steps"), (["--row", 99], "the batch of that step has")):
        done = forgetrain("data", "inspect", file, *runs, *wrong)
        assert done.exit_code == 2
        assert message in done.stderr


def test_build_says_documents_tokens_bytes_and_rejects(data, tmp_path):
    target, _ = data
    (tmp_path / "records.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": null}\n{"text": " "}\n')
    done = forgetrain("data", "build", target_file(tmp_path, target), "--runs", tmp_path / "new", "--workers", 2)
    assert done.exit_code == 0, done.output
    assert "records.jsonl: 2 documents, 6 bytes, " in done.stderr
    assert "rejected: 1 null under 'text', 1 empty" in done.stderr


def lines(monkeypatch, reports, terminal=False):
    """What a display prints of reports, each of (seconds since the last, what, done, total)."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = Console(file=sys.stdout, force_terminal=terminal, width=200, record=True)
    with Display(console) as display:
        for seconds, *report in reports:
            clock[0] += seconds
            display.show(*report)
    return console.export_text().splitlines()


def test_without_a_terminal_a_few_lines_say_how_far_it_is(monkeypatch):
    reports = [(1, "tokenising", step * 10, 10_000) for step in range(1000)]
    found = lines(monkeypatch, reports)
    assert len(found) == 9
    assert found[0] == "tokenising: 10%, ETA 0:15:00"
    assert lines(monkeypatch, [(0, "tokenising", 0, 100), (9, "tokenising", 90, 100)]) == []


def test_the_eta_counts_what_is_done_here_alone(monkeypatch):
    """Half was done by a build before; a tenth in ten seconds leaves four tenths for forty."""
    found = lines(monkeypatch, [(0, "going on", 500, 1000), (10, "going on", 600, 1000)])
    assert found == ["going on: 60%, ETA 0:00:40"]


def test_a_total_that_is_not_known_gives_no_eta(monkeypatch):
    found = lines(monkeypatch, [(0, "tokenising hf:a/b", 0, 0), (11, "tokenising hf:a/b", 0, 0)])
    assert found == ["tokenising hf:a/b: running"]
