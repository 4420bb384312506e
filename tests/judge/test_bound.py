"""What G7 holds against a clocked step: a GPU's roofline, a CPU's own rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forgetrain.judge import bound
from forgetrain.judge.bound import MARGIN, least_step_seconds
from forgetrain.spec.estimate import roofline
from forgetrain.spec.hardware import HARDWARE
from forgetrain.spec.target import load_target
from tests.tiny import tiny_target

NANO = load_target(Path(__file__).parents[2] / "targets" / "nano-cpu.toml")


def test_a_faster_cpu_than_the_tables_refuses_no_honest_engine(monkeypatch):
    """A step took 0.321 s where the table's processor needs 0.334 s, and was called impossible."""
    rate = 4 * HARDWARE["cpu"].peak("fp32") * NANO.hardware.threads
    monkeypatch.setattr(bound, "measured_gemm_rate", lambda dtype: rate)
    least = least_step_seconds(NANO, print)
    assert least == pytest.approx(roofline(NANO).bound / 4 / MARGIN, rel=0.05)


def test_on_this_machine_it_bounds_and_leaves_the_thread_count_alone():
    before = torch.get_num_threads()
    assert 0 < least_step_seconds(tiny_target(hardware={"threads": before + 1}), print) < 1
    assert torch.get_num_threads() == before


def test_a_gpus_is_its_roofline():
    target = tiny_target(hardware={"name": "h200"})
    assert least_step_seconds(target, print) == roofline(target.at_race_shape()).bound


def test_ranks_that_share_a_layer_have_a_devices_rate_each(monkeypatch):
    monkeypatch.setattr(bound, "measured_gemm_rate", lambda dtype: 1e9)
    alone = least_step_seconds(tiny_target(), print)
    assert least_step_seconds(tiny_target(parallel={"tensor": 2}), print) == pytest.approx(alone / 2)
    gpu = tiny_target(hardware={"name": "h200"}, parallel={"context": 2})
    assert least_step_seconds(gpu, print) == roofline(gpu.at_race_shape()).bound / 2


def test_hardware_that_the_table_lacks_bounds_nothing():
    said = []
    target = tiny_target()
    target = target.model_copy(update={"hardware": target.hardware.model_copy(update={"name": "abacus"})})
    assert least_step_seconds(target, said.append) == 0.0
    assert "abacus" in said[0]
