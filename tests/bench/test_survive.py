from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from forgetrain.numerics.init import initial_weights
from forgetrain.spec.toml import to_toml
from tests.corpus import built

BENCH = Path(__file__).parents[2] / "bench" / "survive.py"


def survive(target, folder, *options):
    file = folder / "target.toml"
    file.write_text(to_toml(target))
    command = [sys.executable, BENCH, file, "--runs", folder, "--at", "200", "--steps", "2", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(tmp_path):
    target, _ = built(tmp_path, recipe={"steps": 100_000, "micro_batch_size": 1}, hardware={"threads": 1})
    done = survive(target, tmp_path, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["equal"]
    assert len(result["first"]) == len(result["resumed"]) == 2
    assert result["checkpoint_bytes"] > 12 * sum(tensor.numel() for tensor in initial_weights(target.model, 0).values())


def test_a_run_that_ends_by_itself_says_why(tmp_path):
    target, _ = built(tmp_path, recipe={"steps": 2000})
    done = survive(target, tmp_path, "--set", "recipe.micro_batch_size=3")
    assert done.returncode == 1
    assert done.stderr.startswith("the run ended by itself\nforgetrain: ")
    assert "is not a multiple of micro_batch_size = 3" in done.stderr
