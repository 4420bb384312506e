"""What a run's journal leaves: JSON lines, and what TensorBoard reads out of its event files."""

import contextlib
import json
import math
import resource
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from forgetrain.errors import UserError
from forgetrain.train import metrics
from forgetrain.train.events import Events
from forgetrain.train.metrics import Journal, read_journal


def scalars(folder):
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_numbers_are_in_both_and_flags_in_the_lines_alone(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.write(1, loss=3.5, lr=0.25, applied=True)
    journal.write(2, loss=math.nan, lr=0.125, applied=False)
    journal.close()
    assert read_journal(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 3.5, "lr": 0.25, "applied": True},
        {"step": 2, "loss": None, "lr": 0.125, "applied": False},
    ]
    found = scalars(tmp_path)
    assert found["lr"] == [(1, 0.25), (2, 0.125)]
    assert found["loss"][0] == (1, 3.5)
    assert math.isnan(found["loss"][1][1])
    assert sorted(found) == ["loss", "lr"]


def test_a_line_is_there_when_write_returns_and_a_step_is_one_event(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.write(1, loss=3.5, grad_norm=1.0, lr=0.25)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 3.5  # nothing was closed or flushed
    journal.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = [event for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]
    assert [len(event.summary.value) for event in events] == [3]


def test_steps_that_are_taken_again_replace_what_was_there(tmp_path):
    for after, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (2, {3: 30.0, 4: 40.0})):
        journal = Journal(tmp_path, after)
        for step, loss in values.items():
            journal.write(step, loss=loss)
        journal.close()
    due = [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert [(line["step"], line["loss"]) for line in read_journal(tmp_path / "metrics.jsonl")] == due
    assert scalars(tmp_path)["loss"] == due


@pytest.mark.parametrize("after", [200, 199])
def test_a_full_disk_when_going_on_leaves_the_lines(tmp_path, after):
    journal = Journal(tmp_path, 0)
    for step in range(1, 201):
        journal.write(step, loss=1.0)
    journal.close()
    path = tmp_path / "metrics.jsonl"
    before = path.read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a limit of a file's size is the full disk that any user can make
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        if after == 200:  # nothing is dropped, so nothing is written
            Journal(tmp_path, after).close()
        else:
            with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: file too large.*untouched"):
                Journal(tmp_path, after)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == before
    Journal(tmp_path, after).close()
    assert [line["step"] for line in read_journal(path)] == [*range(1, after + 1)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_for_tensorboard_is_one_line(tmp_path, capfd):
    events = Events(tmp_path / "tensorboard", 0)
    [file] = (tmp_path / "tensorboard").iterdir()
    file.unlink()
    file.symlink_to("/dev/full")  # TensorBoard opens its file for each flush

    def until_it_fails():
        for step in range(200):
            events.write(step, {"loss": 1.0})
            time.sleep(0.01)

    with pytest.raises(UserError, match="tensorboard: cannot be written: no space left on device"):
        until_it_fails()
    with contextlib.suppress(UserError):
        events.close()
    assert "Traceback" not in capfd.readouterr().err


def test_bf16_is_measured_as_fp32_where_torch_multiplies_it_a_hundred_times_slower(monkeypatch):
    """An engine's own kernel widens it, and a step as fast as fp32's was called impossible."""
    rates = {torch.float32: 80e9, torch.bfloat16: 0.7e9}
    sizes = []

    def rate(dtype, size, seconds):
        sizes.append((dtype, size))
        return rates[dtype]

    monkeypatch.setattr(metrics, "_gemm_rate", rate)
    assert metrics.measured_gemm_rate(torch.bfloat16) == 80e9
    assert (torch.bfloat16, 1024) not in sizes  # three seconds a product
    rates[torch.bfloat16] = 300e9
    assert metrics.measured_gemm_rate(torch.bfloat16) == 300e9
    assert metrics.measured_gemm_rate(torch.float32) == 80e9
