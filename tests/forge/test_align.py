"""Aligning from the textbook plan: every architecture, both references, both precisions."""

from __future__ import annotations

import json

import pytest

from forgetrain.durable import sha256_file
from forgetrain.engine.plan import Plan
from forgetrain.forge.align import align, diagnose
from tests.tiny import ARCHITECTURES, tiny_target

REFERENCES = {
    "megatron": [name for name in ARCHITECTURES if name != "minicpm4"],  # megatron-core has no muP
    "transformers": list(ARCHITECTURES),
}
#: All but the first, of which more is said below.
MATRIX = [
    (reference, architecture, dtype)
    for reference, architectures in REFERENCES.items()
    for architecture in architectures
    for dtype in ("fp32", "bf16")
][1:]


def aligned(recorded, tmp_path, reference, architecture, dtype, **sections):
    target = tiny_target(architecture, precision={"dtype": dtype}, reference={"name": reference}, **sections)
    return align(target, tmp_path / "engine", recorded(target))


def passed(result):
    return [(verdict.gate, verdict.passed) for verdict in result.verdicts] == [("G1", True), ("G2", True), ("G3", True)]


def test_the_plain_plan_ends_equal_to_megatron_and_the_file_is_kept_with_its_verdicts(collected, tmp_path):
    given = collected("fp32")
    lines = []
    result = align(given.target, tmp_path / "engine", given.record, say=lines.append)
    assert passed(result), result.as_dict()
    assert result.engine == tmp_path / "engine" / "engine.py"
    kept = json.loads((tmp_path / "engine" / "verdicts.json").read_text())
    assert kept["sha256"] == sha256_file(result.engine) == result.sha256
    assert Plan.read(tmp_path / "engine" / "plan.toml") == result.plan
    assert result.plan != Plan.textbook()
    assert any("kept" in line for line in lines)
    # the walk only ever moves the first difference onward
    reached = [attempt.reach.place for attempt in result.attempts if attempt.kept]
    assert reached == sorted(reached)


def test_a_search_that_nothing_helps_stops_with_its_finding(collected, tmp_path, monkeypatch):
    from forgetrain.forge import search

    given = collected("fp32")
    options = search.choices(given.target)
    monkeypatch.setattr(search, "choices", lambda target: {**options, "attention": ("textbook",)})
    result = align(given.target, tmp_path / "engine", given.record)
    assert not result.passed
    assert result.verdicts[-1].gate == "G1"
    assert ".self_attn." in result.divergence.tap
    assert not (tmp_path / "engine").exists()
    assert (tmp_path / "engine.failed" / "plan.toml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("reference", "architecture", "dtype"), MATRIX)
def test_every_model_aligns_with_every_reference(reference, architecture, dtype, recorded, tmp_path):
    result = aligned(recorded, tmp_path, reference, architecture, dtype)
    assert passed(result), result.as_dict()


@pytest.mark.slow
def test_muon_aligns_with_torchs(recorded, tmp_path):
    result = aligned(recorded, tmp_path, "transformers", "minicpm5", "fp32", recipe={"optimizer": "muon"})
    assert passed(result), result.as_dict()
    assert result.plan["muon"] == "torch"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "documents"), [("megatron", "mask"), ("transformers", "mask"), ("transformers", "mask+reset")]
)
def test_documents_align(reference, documents, recorded, tmp_path):
    result = aligned(recorded, tmp_path, reference, "minicpm5", "fp32", data={"documents": documents})
    assert passed(result), result.as_dict()


@pytest.mark.slow
def test_a_plain_engine_is_diagnosed_without_being_changed(collected, tmp_path):
    from forgetrain.engine.write import write_engine

    given = collected("bf16")
    file = tmp_path / "mine.py"
    file.write_text(write_engine(given.target, Plan.textbook()))
    before = sha256_file(file)
    result = diagnose(given.target, file, given.record)
    assert not result.passed
    assert result.divergence is not None
    assert result.divergence.tap.startswith("model.layers.0.")
    assert sha256_file(file) == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
