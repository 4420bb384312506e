"""The loop on several ranks, each a forked process: checkpoints in parts, other numbers of ranks."""

import os
import socket
from dataclasses import dataclass
from typing import Any

import pytest
from rich.console import Console

from forgetrain.engine.plan import Plan
from forgetrain.engine.process import EngineProcess
from forgetrain.engine.write import write_engine
from forgetrain.errors import UserError
from forgetrain.spec.parallel import Parallel
from forgetrain.spec.target import parse_target
from forgetrain.train.loop import train
from forgetrain.train.metrics import read_journal
from forgetrain.train.verified import choose_engine
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
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
            return train(target, **options)

        return fork_ranks(ranks, rank_of_it)[0]

    def losses(self):
        journal = read_journal(self.folder / self.target.name / "train" / "metrics.jsonl")
        return [line["loss"] for line in journal if "loss" in line]


def write(target, path, **choices):
    plan = Plan({"schedule": "production", "rope_tables": "fp32", "optimizer_state": "sharded", **choices})
    path.write_text(write_engine(target, plan).replace("@torch.compile(dynamic=False)\n", ""))
    return str(path)


def write_fsdp(target, path):
    path.write_text(write_engine(target, Plan({"schedule": "fsdp"})))
    return str(path)


def split(target, **parallel):
    return target.model_copy(update={"parallel": Parallel(**(parallel or {"tensor": 2}))})


@pytest.fixture
def runs(tmp_path):
    target, _ = built(tmp_path, recipe={"steps": 5, "micro_batch_size": 1}, hardware={"threads": 1})
    return Runs(tmp_path, target, write(target, tmp_path / "engine.py"))


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


@pytest.mark.slow
def test_layers_split_over_ranks_train_as_whole_ones_and_either_resumes_the_other(runs):
    runs.on(1)
    expected, split_engine = runs.losses(), write(split(runs.target), runs.folder / "split.py")
    options = {"target": split(runs.target), "engine": split_engine}
    whole = runs.on(4, restart=True, **options)
    assert runs.losses() == pytest.approx(expected, rel=1e-5)
    runs.on(4, restart=True, stop_after=2, **options)
    again = runs.on(4, resume=True, **options)
    assert again["weight_sha256"] == whole["weight_sha256"]
    runs.on(2, restart=True, stop_after=2, **options)
    runs.on(1, resume=True, stop_after=3)
    last = runs.on(4, resume=True, **options)
    assert runs.losses() == pytest.approx(expected, rel=1e-5)
    assert last["held_out_loss"] == pytest.approx(whole["held_out_loss"], rel=1e-5)


@pytest.mark.slow
def test_rows_shared_by_ranks_train_as_whole_ones_and_either_resumes_the_other(runs):
    whole = runs.on(1)
    expected, shared = runs.losses(), split(runs.target, context=2)
    options = {"target": shared, "engine": write(shared, runs.folder / "shared.py", attention_kernel="blocked")}
    runs.on(2, restart=True, stop_after=2, **options)
    runs.on(1, resume=True, stop_after=3)
    last = runs.on(4, resume=True, **options)
    assert runs.losses() == pytest.approx(expected, rel=1e-5)
    assert last["held_out_loss"] == pytest.approx(whole["held_out_loss"], rel=1e-5)


def test_rows_that_ranks_cannot_share_are_one_line(runs):
    shared = split(runs.target, context=2)
    with pytest.raises(UserError, match=r"parallel.context: does not divide the 1 ranks that were started \(got 2\)"):
        train(shared, runs=runs.folder, console=Console(quiet=True))
    with pytest.raises(UserError, match="splits rows over 1 ranks, the target over 2"):
        choose_engine(shared, runs.folder / "run", runs.engine, unverified=True).build(shared, device="cpu", mesh=None)
    chosen = choose_engine(shared, runs.folder / "run", None, unverified=False)
    assert chosen.status == "production plan, not aligned with a reference"


@pytest.mark.slow
def test_fsdp_goes_on_bit_for_bit_on_other_numbers_of_ranks_and_either_schedule_resumes_the_other(runs):
    runs.on(1)
    expected, fsdp = runs.losses(), write_fsdp(runs.target, runs.folder / "fsdp.py")
    whole = runs.on(2, restart=True, engine=fsdp)
    assert runs.losses() == pytest.approx(expected, rel=1e-5)
    runs.on(2, restart=True, stop_after=1, engine=fsdp)
    again = runs.on(2, resume=True, engine=fsdp)
    assert again["weight_sha256"] == whole["weight_sha256"]
    assert again["held_out_loss"] == whole["held_out_loss"]
    runs.on(2, restart=True, stop_after=1, engine=fsdp)
    for last, ranks, engine in ((2, 1, fsdp), (3, 4, fsdp), (4, 2, runs.engine), (5, 2, fsdp)):
        runs.on(ranks, resume=True, stop_after=last, engine=engine)
    assert runs.losses() == pytest.approx(expected, rel=1e-5)


def test_what_does_not_fit_is_one_line(runs):
    with pytest.raises(UserError, match=r"parallel.tensor: does not divide the 1 ranks that were started \(got 2\)"):
        train(split(runs.target), runs=runs.folder, console=Console(quiet=True))
    engine = write(split(runs.target), runs.folder / "split.py")
    with pytest.raises(UserError, match="splits layers over 2 ranks, the target over 1"):
        train(runs.target, runs=runs.folder, engine=engine, unverified=True, console=Console(quiet=True))
    with pytest.raises(UserError, match=r"parallel.tensor = 4 does not divide model.num_key_value_heads = 2"):
        parse_target(runs.target.plain() | {"parallel": {"tensor": 4}})
    for schedule in ("explicit", "hopper", "fsdp"):
        with pytest.raises(UserError, match=f"the {schedule} schedule computes whole layers"):
            write_engine(split(runs.target), Plan({"schedule": schedule}))
    chosen = choose_engine(split(runs.target), runs.folder / "run", None, unverified=False)
    assert chosen.status == "production plan, not aligned with a reference"
    with pytest.raises(UserError, match="does not divide the engine's ranks, which are 3"):
        EngineProcess(engine, split(runs.target), ranks=3)
