"""The golden record on disk: whole or not there, and no byte of it changes unseen."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from forgetrain.durable import sha256_file
from forgetrain.errors import UserError
from forgetrain.golden.batches import random_batch
from forgetrain.golden.record import (
    BATCHES,
    EVIDENCE,
    MANIFEST,
    TIMING,
    TRAJECTORY,
    WEIGHTS,
    GoldenRecord,
    write_record,
)
from forgetrain.numerics.compare import difference
from forgetrain.numerics.determinism import fingerprint
from forgetrain.numerics.init import initial_weights
from tests.tiny import tiny_target

TARGET = tiny_target()
ENVIRONMENT = {**fingerprint(device="cpu", threads=2), "megatron-core": "0.16.1"}
STEPS = TARGET.gates.steps
EVIDENCE_OF = {"loss#fwd@0": torch.tensor(2.5), "lm_head#fwd@0": torch.randn(4, 3).bfloat16()}


def points(ranks):
    return [{"loss": 4.0 / ranks, "grad_norm": 0.1, "applied": True, "weight_hash": f"{step}"} for step in range(STEPS)]


def write(folder, **changes):
    gates = TARGET.at_gates_shape()
    values = {
        "weights": initial_weights(TARGET.model, 0),
        "batches": [random_batch(gates, 0, step) for step in range(STEPS)],
        "evidence": EVIDENCE_OF,
        "trajectories": {1: points(1), 2: points(2)},
        "timing": {"seconds_per_step": [0.5]},
        "manifest": {
            "target": gates.plain(),
            "precision": "fp32",
            "reference": {"name": "megatron", "shims": {}},
            "environment": ENVIRONMENT,
            "learning_rates": [1e-2] * STEPS,
        },
    }
    return write_record(folder, **{**values, **changes})


def test_what_was_written_is_read_bit_for_bit(tmp_path):
    write(tmp_path / "golden")
    record = GoldenRecord.open(tmp_path / "golden")
    weights = initial_weights(TARGET.model, 0)
    assert record.weights.keys() == weights.keys()
    assert all(difference(weights[name], tensor) is None for name, tensor in record.weights.items())
    for step, batch in enumerate(record.batches):
        due = random_batch(TARGET.at_gates_shape(), 0, step)
        assert all(difference(a, b) is None for a, b in zip(due, batch, strict=True))
    assert len(record.batches) == STEPS
    assert set(record.evidence) == set(EVIDENCE_OF)
    assert len(record.evidence) == 2
    assert all(difference(EVIDENCE_OF[name], record.evidence[name]) is None for name in EVIDENCE_OF)
    with pytest.raises(KeyError):
        record.evidence["model.norm#fwd@0"]
    assert (record.trajectory(1), record.trajectory(2), record.trajectory(3)) == (points(1), points(2), [])
    assert record.learning_rates == [1e-2] * STEPS


def test_the_manifest_hashes_every_file(tmp_path):
    folder = write(tmp_path / "golden").folder
    manifest = json.loads((folder / MANIFEST).read_text())
    present = {path.name for path in folder.iterdir()}
    assert present == {MANIFEST, WEIGHTS, BATCHES, EVIDENCE, TRAJECTORY, TIMING}
    assert set(manifest["files"]) == present - {MANIFEST}
    assert all(sha256_file(folder / name) == digest for name, digest in manifest["files"].items())


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    table = torch.randn(8, 4)
    record = write(tmp_path / "golden", evidence={"whole": table, "transposed": table.t(), "row": table[2]})
    assert torch.equal(record.evidence["transposed"], table.t())
    assert torch.equal(record.evidence["row"], table[2])


@pytest.mark.parametrize("name", [WEIGHTS, BATCHES, EVIDENCE, TRAJECTORY, TIMING])
def test_a_flipped_byte_is_refused_with_the_file_named(name, tmp_path):
    path = write(tmp_path / "golden").folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="was changed") as refused:
        GoldenRecord.open(tmp_path / "golden", remedy="run forgetrain collect")
    assert refused.value.file == path
    assert str(refused.value).endswith("Run forgetrain collect")


@pytest.mark.parametrize("key", ["files", "precision", "environment", "target", "learning_rates"])
def test_a_manifest_without_a_key_is_refused(key, tmp_path):
    path = write(tmp_path / "golden").folder / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: was changed") as refused:
        GoldenRecord.open(tmp_path / "golden", remedy="run forgetrain collect")
    assert str(refused.value).endswith("Run forgetrain collect")


def test_another_learning_rate_in_the_manifest_is_refused(tmp_path):
    path = write(tmp_path / "golden").folder / MANIFEST
    path.write_text(path.read_text().replace("0.01", "0.02", 1))
    with pytest.raises(UserError, match=r"manifest\.json: was changed"):
        GoldenRecord.open(tmp_path / "golden")


def test_a_record_from_before_the_manifest_had_a_hash_is_to_be_collected_again(tmp_path):
    path = write(tmp_path / "golden").folder / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(UserError, match=r"not a golden record of format 2\. Run forgetrain collect again"):
        GoldenRecord.open(tmp_path / "golden")


def test_a_missing_file_and_a_damaged_manifest_are_named(tmp_path):
    folder = write(tmp_path / "golden").folder
    (folder / BATCHES).unlink()
    with pytest.raises(UserError, match="is missing from the golden record") as refused:
        GoldenRecord.open(folder)
    assert refused.value.file == folder / BATCHES
    (folder / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(UserError, match="not a golden record of format 2"):
        GoldenRecord.open(folder)
    (folder / MANIFEST).write_text('{"format": 2')
    with pytest.raises(UserError, match=r"manifest\.json: not valid JSON"):
        GoldenRecord.open(folder)
    with pytest.raises(UserError, match=r"nowhere/manifest\.json: no such file"):
        GoldenRecord.open(tmp_path / "nowhere")


def test_a_record_fits_its_own_target_and_environment(tmp_path):
    assert write(tmp_path / "golden").misfit(TARGET, "fp32", ENVIRONMENT) is None


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"rms_norm_eps": 1e-5}}, "model.rms_norm_eps = 1e-06, this one 1e-05"),
        ({"reference": {"name": "transformers"}}, "reference.name = 'megatron', this one 'transformers'"),
        ({"data": {"documents": "mask"}}, "data.documents = 'ignore', this one 'mask'"),
        ({"recipe": {"clip": 0.5}}, "clip = 1.0 at the gates' shape, this one 0.5"),
        ({"gates": {"micro_batch_size": 4}}, "micro_batch_size = 2 at the gates' shape, this one 4"),
        ({"gates": {"steps": 5}}, "it has 4 steps, the target's gates ask for 5"),
    ],
)
def test_another_target_does_not_fit(sections, words, tmp_path):
    reason = write(tmp_path / "golden").misfit(tiny_target(**sections), "fp32", ENVIRONMENT)
    assert reason is not None
    assert words in reason


def test_what_bits_do_not_depend_on_does_not_matter(tmp_path):
    other = tiny_target(recipe={"steps": 99, "batch_size": 8}, search={"minutes": 1}, data={"held_out": 0.1})
    assert write(tmp_path / "golden").misfit(other, "fp32", ENVIRONMENT) is None


@pytest.mark.parametrize(
    ("key", "value"), [("torch", "0.0"), ("threads", 1), ("processor", "another"), ("megatron-core", "0.19.2")]
)
def test_another_environment_does_not_fit(key, value, tmp_path):
    record = write(tmp_path / "golden")
    reason = record.misfit(TARGET, "fp32", {**ENVIRONMENT, key: value})
    assert reason == f"it is from another environment: {key} {ENVIRONMENT[key]!r}, here {value!r}"
    assert record.misfit(TARGET, "bf16", ENVIRONMENT) == "it was collected in fp32, not bf16"


def test_a_record_takes_the_place_of_an_older_one(tmp_path):
    write(tmp_path / "golden")
    write(tmp_path / "golden", trajectories={1: points(2)})
    assert GoldenRecord.open(tmp_path / "golden").trajectory(1) == points(2)
    assert [path.name for path in tmp_path.iterdir()] == ["golden"]


def test_what_fails_in_the_middle_leaves_the_older_one(tmp_path):
    write(tmp_path / "golden")
    with pytest.raises(AttributeError):
        write(tmp_path / "golden", evidence={"a": "no tensor"})
    assert GoldenRecord.open(tmp_path / "golden").trajectory(1) == points(1)
    assert [path.name for path in tmp_path.iterdir()] == ["golden"]


WRITER = """
import os, signal, sys
from pathlib import Path
from forgetrain.golden import record
from tests.golden.test_record import write
record.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write(Path(sys.argv[1]))
"""


def test_a_writer_that_is_killed_leaves_nothing_that_opens(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "golden")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [".golden.partial"]  # half written, under a name that nothing opens
    for folder in (tmp_path / "golden", tmp_path / left[0]):
        with pytest.raises(UserError, match="no such file"):
            GoldenRecord.open(folder)
    write(tmp_path / "golden")
    assert [path.name for path in tmp_path.iterdir()] == ["golden"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands in for a full disk: the same error reaches the writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(UserError, match="golden: cannot be written: file too large"):
            write(tmp_path / "golden")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
