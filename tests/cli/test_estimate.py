"""``forgetrain estimate``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forgetrain.cli.main import app
from forgetrain.errors import UserError

TARGETS = Path(__file__).parents[2] / "targets"


def run(*arguments: object) -> str:
    return CliRunner().invoke(app, ["estimate", *map(str, arguments)], catch_exceptions=False).stdout


def test_json_is_one_object():
    result = json.loads(run(TARGETS / "minicpm5-1b-h200.toml", "--json"))
    assert result["parameters"]["total"] == 1_080_632_832
    assert result["flops"]["causal"] == 6_488_064_000
    assert result["fits"] is True
    assert result["roofline"]["serial"] > result["roofline"]["bound"]


@pytest.mark.parametrize("file", sorted(TARGETS.glob("*.toml")), ids=lambda file: file.stem)
def test_table(file):
    text = run(file)
    assert "parameters" in text
    assert "FLOPs a token, causal" in text
    assert "step, all overlapped" in text


def test_what_does_not_fit_is_said():
    assert "does NOT fit in 79 GiB" in run(TARGETS / "minicpm4-8b-h100x8.toml")
    assert "over 8 ranks" in run(TARGETS / "minicpm4-8b-h100x8.toml", "--shard")


def test_what_ranks_share_is_said():
    text = run(TARGETS / "minicpm4-8b-h100x8.toml", "--shard-optimizer", "--set", "parallel.tensor=2")
    assert "fp32 moments and master weights, layers over 2 ranks, over 4 ranks" in text
    assert "fp32 accumulators, layers over 2 ranks " in text


def test_ranks_that_share_rows_are_said():
    text = run(TARGETS / "minicpm4-8b-h100x8.toml", "--shard-optimizer", "--set", "parallel.context=4")
    assert "one micro-batch of 4,096 tokens, rows over 4 ranks, nothing recomputed" in text
    assert "fp32 moments and master weights, over 8 ranks" in text


def test_overrides_and_bad_hardware():
    result = json.loads(run(TARGETS / "nano-cpu.toml", "--set", "model.num_hidden_layers=1", "--json"))
    assert result["parameters"]["total"] < 3_000_000
    with pytest.raises(UserError, match=r"hardware\.name"):
        run(TARGETS / "nano-cpu.toml", "--set", "hardware.name=abacus")
