"""The loop on several ranks, each a forked process: checkpoints in parts, other numbers of ranks."""

import os
import socket
from dataclasses import dataclass
from typing import Any

import pytest
from rich.console import Console

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.train.loop import train
from forgetrain.train.metrics import read_journal
from tests.corpus import built
from tests.engine.ranks import fork_ranks


@dataclass
class Runs:
    """Runs of one target in one folder."""

    folder: Any
    target: Any
    engine: str

    def on(self, ranks, target=None, **options):
        """The summary of ``train`` on so many ranks, whose processes are started as torchrun would."""
        target = target or self.target
        options = {
            "runs": self.folder,
            "engine": self.engine,
            "unverified": True,
            "console": Console(quiet=True),
        } | options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def rank_of_it(rank):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
            return train(target, **options)

        return fork_ranks(ranks, rank_of_it)[0]

    def losses(self):
        journal = read_journal(self.folder / self.target.name / "train" / "metrics.jsonl")
        return [line["loss"] for line in journal if "loss" in line]


@pytest.fixture
def runs(tmp_path):
    target, _ = built(tmp_path, recipe={"steps": 5, "micro_batch_size": 1}, hardware={"threads": 1})
    plan = Plan({"schedule": "production", "rope_tables": "fp32", "optimizer_state": "sharded"})
    (tmp_path / "engine.py").write_text(write_engine(target, plan).replace("@torch.compile(dynamic=False)\n", ""))
    return Runs(tmp_path, target, str(tmp_path / "engine.py"))


@pytest.mark.slow
def test_sharded_states_go_on_bit_for_bit_and_on_other_numbers_of_ranks(runs):
    alone = runs.on(1)
    expected = runs.losses()
    whole = runs.on(2, restart=True)
    assert runs.losses() == pytest.approx(expected, rel=1e-5)
    runs.on(2, restart=True, stop_after=2)
    saved = runs.folder / runs.target.name / "checkpoints" / "step-00000002"
    sizes = [(saved / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 1.2 * min(sizes)  # each rank writes its half
    again = runs.on(2, resume=True)
    assert again["weight_sha256"] == whole["weight_sha256"] != alone["weight_sha256"]
    assert again["held_out_loss"] == whole["held_out_loss"]
    runs.on(1, restart=True, stop_after=1)
    for last, ranks in ((2, 2), (3, 1), (5, 4)):
        runs.on(ranks, resume=True, stop_after=last)
    assert runs.losses() == pytest.approx(expected, rel=1e-5)
