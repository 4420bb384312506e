"""Profiles, Weights & Biases, and the held-out loss of each source."""

import json
import sys
import types

import pytest

from forgetrain.data.build import build_data
from forgetrain.errors import UserError
from forgetrain.train.metrics import read_journal
from forgetrain.train.profile import parse_steps, require_within
from tests.corpus import built, corpus_target, write_corpus
from tests.train.test_loop import run


def test_profiled_steps_give_a_trace_and_a_table(tmp_path):
    target, _ = built(tmp_path)
    whole = run(target, tmp_path)
    assert run(target, tmp_path, restart=True, profile_steps=(2, 3))["weight_sha256"] == whole["weight_sha256"]
    folder = tmp_path / target.name / "train" / "profile"
    names = {event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert "aten::mm" in names
    heading, *rows = (folder / "operators.txt").read_text().splitlines()
    assert heading.split() == ["operator", "calls", "CPU", "ms", "share", "MiB"]
    times = [float(row.split()[2]) for row in rows]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("text", ["10", "3:2", "0:4", "a:b", "1:2:3"])
def test_what_is_no_range_of_steps_is_refused(text):
    with pytest.raises(UserError, match="--profile-steps: is no range of steps"):
        parse_steps(text)


@pytest.mark.parametrize("steps", [(5, 6), (19, 21)])
def test_a_range_outside_the_run_is_refused(steps):
    require_within((6, 20), taken=5, last=20)
    with pytest.raises(UserError, match="is outside of this run, which takes the steps 6 to 20"):
        require_within(steps, taken=5, last=20)


class FakeRun:
    def __init__(self, options):
        self.options, self.lines, self.finished = options, [], False
        self.id = options["id"] or "made-up"

    def define_metric(self, *names, **options):
        self.metric = (names, options)

    def log(self, values):
        self.lines.append(values)

    def finish(self):
        self.finished = True


def test_wandb_gets_the_journal_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    begun = []

    def init(**options):
        begun.append(FakeRun(options))
        return begun[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __version__="0"))
    target, _ = built(tmp_path, train={"wandb": "demo"})
    run(target, tmp_path, stop_after=3)
    run(target, tmp_path, resume=True)
    first, second = begun
    assert (first.options["project"], first.options["id"], second.options["id"]) == ("demo", None, "made-up")
    assert [line["step"] for line in first.lines if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in second.lines if "loss" in line] == [4, 5, 6]
    assert "held_out_loss" in second.lines[-1]
    assert second.finished


def test_a_missing_wandb_names_the_command_and_one_not_asked_for_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    target, _ = built(tmp_path)
    run(target, tmp_path, stop_after=1)
    asked = target.model_copy(update={"train": target.train.model_copy(update={"wandb": "demo"})})
    with pytest.raises(UserError, match=r"train\.wandb: wandb is not installed.*pip install 'forgetrain\[wandb\]'"):
        run(asked, tmp_path, restart=True)


def test_each_source_has_its_held_out_loss(tmp_path):
    folders = [write_corpus(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    target = corpus_target(folders[0], data={"sources": [{"path": str(folder)} for folder in folders]})
    build_data(target, tmp_path / target.name / "data")
    summary = run(target, tmp_path)
    by_source = summary["held_out_losses"]
    assert list(by_source) == [str(folder) for folder in folders]
    assert min(by_source.values()) < summary["held_out_loss"] < max(by_source.values())
    line = read_journal(tmp_path / target.name / "train" / "metrics.jsonl")[-1]
    assert line[f"held_out_loss/{folders[1]}"] == by_source[str(folders[1])]
    assert run(target, tmp_path, resume=True)["held_out_losses"] == by_source


def test_the_summary_has_the_peak_memory(tmp_path):
    target, _ = built(tmp_path)
    assert 2**26 < run(target, tmp_path, stop_after=1)["peak_memory_bytes"] < 2**36
