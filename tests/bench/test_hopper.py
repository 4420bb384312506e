"""bench/hopper.py on a machine without a GPU: the peers that can run there do, and what cannot says so at once."""

import importlib.util
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_target

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def contestants(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import hopper_contestants

    return hopper_contestants


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed")
@pytest.mark.parametrize("architecture", ["minicpm5", "tied"])
def test_torchtitan_trains_a_model_whose_head_size_is_not_width_over_heads(contestants, architecture):
    target = tiny_target(architecture).plain()
    model = target["model"]
    assert model["head_dim"] != model["hidden_size"] // model["num_attention_heads"]
    torch.manual_seed(0)
    step, _ = contestants.torchtitan_step({"target": target, "rows": 2, "micro_batches": 2, "device": "cpu"})
    found = [step() for _ in range(4)]
    losses, norms = [float(loss) for loss, _ in found], [float(norm) for _, norm in found]
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses  # the same batch, learnt


def test_a_peer_whose_package_is_missing_says_what_to_install(contestants, monkeypatch):
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: None)
    line = contestants.refusal("torchtitan", tiny_target().plain())
    assert line == "peer 'torchtitan': torchtitan is not installed: pip install 'torchtitan==0.2.2'"


@pytest.mark.parametrize(
    ("target", "peers", "expected"),
    [
        ("minicpm4-0.5b-h200", "torchtitan", "sets scale_emb, scale_depth, dim_model_base: leave it out of --peers"),
        ("minicpm5-1b-h200", "titan", "peer 'titan': there are compile, liger, liger-autocast, megatron, torchtitan"),
    ],
)
def test_the_bench_refuses_a_peer_in_one_line_before_anything_starts(tmp_path, target, peers, expected):
    command = [sys.executable, str(BENCH / "hopper.py"), target, "--peers", peers, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
