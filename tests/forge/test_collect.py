"""Collecting: the reference is judged by G0, and a record is used only where it fits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from forgetrain.errors import UserError
from forgetrain.forge import collect as collecting
from forgetrain.forge.collect import (
    RANK_STEPS,
    ReferenceRejected,
    collect,
    environment,
    open_named,
    open_or_collect,
)
from forgetrain.gates.g0 import NEAR
from forgetrain.gates.g1 import evidence_names
from forgetrain.golden.record import EVIDENCE, GoldenRecord
from forgetrain.numerics.init import initial_weights
from forgetrain.reference.megatron_shims import SHIMS
from tests.tiny import tiny_target

ROOT = Path(__file__).parents[2]
#: megatron-core has no muP, so that collecting this one starts transformers alone.
ALONE = tiny_target("minicpm4", reference={"name": "transformers"}, gates={"batch_size": 1, "micro_batch_size": 1})


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    stages = []
    record = collect(ALONE, tmp_path_factory.mktemp("runs") / "golden", lambda *stage: stages.append(stage))
    return record, stages


def test_a_tiny_target_is_collected(collected):
    record, stages = collected
    gates = ALONE.at_gates_shape()
    verdict = record.manifest["verdicts"][0]
    assert verdict["pass"]
    assert verdict["statistic"] < NEAR / 100
    assert verdict["detail"]["skipped"] == ["megatron: megatron-core has no muP residual scale"]
    assert set(verdict["detail"]["errors"]) == {
        "transformers against the oracle, step 0",
        "transformers against the oracle, step 1",
    }
    assert set(record.evidence) == set(evidence_names(gates.model, micro_batches=1))
    assert len(record.trajectory(1)) == len(record.batches) == ALONE.gates.steps
    assert record.trajectory(1)[0]["loss"] == float(record.evidence["step.loss"])
    weights = initial_weights(ALONE.model, ALONE.recipe.seed)
    assert all(torch.equal(weights[name], tensor) for name, tensor in record.weights.items())
    assert record.manifest["reference"] == {"name": "transformers", "shims": {}}
    assert record.manifest["environment"] == environment(ALONE)
    shares = [share for _, share in stages]
    assert shares == sorted(shares)
    assert stages[0] == ("transformers, first run", 0.0)


def test_a_record_that_fits_is_opened_and_not_collected_again(collected, monkeypatch):
    record, _ = collected
    monkeypatch.setattr(collecting, "collect", pytest.fail)
    assert open_or_collect(ALONE, record.folder, say=pytest.fail).manifest == record.manifest
    assert open_named(ALONE, record.folder).manifest == record.manifest


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hardware": {"threads": 1}}, "it is from another environment: threads 2, here 1"),
        (
            {"gates": {"batch_size": 1, "micro_batch_size": 1, "steps": 3}},
            "it has 4 steps, the target's gates ask for 3",
        ),
    ],
)
def test_one_that_does_not_fit_is_refused_when_named_and_collected_again_when_kept(
    collected, changes, reason, monkeypatch
):
    sections = {"reference": {"name": "transformers"}, "gates": {"batch_size": 1, "micro_batch_size": 1}, **changes}
    target, folder = tiny_target("minicpm4", **sections), collected[0].folder
    with pytest.raises(UserError, match=f"does not fit: {re.escape(reason)}") as refused:
        open_named(target, folder)
    assert refused.value.file == folder
    assert "forgetrain collect" in str(refused.value)
    said = []
    monkeypatch.setattr(collecting, "collect", lambda *_: "a new one")
    assert open_or_collect(target, folder, say=said.append) == "a new one"
    assert said == [f"collecting again: {reason}"]


def test_a_record_of_another_version_of_the_reference_does_not_fit(collected, monkeypatch):
    version = collecting.importlib.metadata.version
    monkeypatch.setattr(
        collecting.importlib.metadata, "version", lambda name: "0.1" if name == "transformers" else version(name)
    )
    with pytest.raises(UserError, match=r"another environment: transformers '.*', here '0\.1'"):
        open_named(ALONE, collected[0].folder)


def test_a_damaged_record_is_collected_again(collected, tmp_path, monkeypatch):
    folder = tmp_path / "golden"
    folder.mkdir()
    for path in collected[0].folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / EVIDENCE).write_bytes(b"nothing")
    said = []
    monkeypatch.setattr(collecting, "collect", lambda *_: "a new one")
    assert open_or_collect(ALONE, folder, say=said.append) == "a new one"
    assert "taps.safetensors: was changed" in said[0]
    with pytest.raises(UserError, match="was changed"):
        open_named(ALONE, folder)


def test_a_missing_zero_grad_is_refused(tmp_path, monkeypatch):
    """Both runs are bit-equal, so only the oracle sees it, from the second step on."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setitem(collecting.MODULES, "transformers", "tests.forge.careless")
    with pytest.raises(ReferenceRejected, match="the reference is wrong") as rejected:
        collect(ALONE, tmp_path / "golden")
    verdict = rejected.value.verdict
    assert not verdict.passed
    assert verdict.detail["errors"]["transformers against the oracle, step 0"] < NEAR
    assert verdict.detail["errors"]["transformers against the oracle, step 1"] > 0.1
    assert verdict.first_divergence is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"reference": {"name": "capture"}}, "reference.name: is collected by forgetrain.capture in your own script"),
        ({"data": {"documents": "mask+reset"}}, "data.documents: megatron-core's local RoPE takes no positions"),
    ],
)
def test_what_cannot_be_collected_is_refused_before_anything_starts(sections, words, tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "EngineProcess", pytest.fail)
    with pytest.raises(UserError, match=re.escape(words)):
        collect(tiny_target(**sections), tmp_path / "golden")
    assert list(tmp_path.iterdir()) == []


def test_a_reference_that_is_not_installed_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(collecting._PACKAGES, "transformers", "not-a-package-that-exists")
    with pytest.raises(UserError, match=r"Run pip install 'forgetrain\[transformers\]'"):
        collect(ALONE, tmp_path / "golden")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "steps"), [("megatron", "fp32", 4), ("megatron", "bf16", 4), ("transformers", "bf16", 6)]
)
def test_both_references_at_two_world_sizes(name, dtype, steps, recorded):
    target = tiny_target(reference={"name": name}, precision={"dtype": dtype}, gates={"steps": steps})
    record = recorded(target)
    verdict = record.manifest["verdicts"][0]
    other = {"megatron": "transformers", "transformers": "megatron"}[name]
    assert verdict["pass"]
    assert verdict["detail"]["skipped"] == []
    assert verdict["detail"]["errors"][f"{name} against {other}"] < NEAR / 100
    both = min(steps, RANK_STEPS)
    assert f"{steps} steps at world size 1, {both} steps at world size 2" in verdict["explanation"]
    assert len(record.trajectory(2)) == both
    assert record.manifest["reference"]["shims"] == (SHIMS if name == "megatron" else {})
    assert GoldenRecord.open(record.folder).misfit(target, dtype, environment(target)) is None
