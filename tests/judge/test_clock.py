"""The race: who runs when, what is on the clock, and what work that is put off costs."""

from __future__ import annotations

import time

import pytest
import torch

from forgetrain.engine.contract import Shard, StepResult
from forgetrain.judge.clock import Lane, Race, race
from forgetrain.judge.hidden import Stream
from tests.tiny import tiny_target

TARGET = tiny_target()


class Engine:
    """Stands in for a process: notes what is asked of it, and computes its loss from the batch alone."""

    def __init__(self, log: list, name: str, *, step: float = 0.0, fetch: float = 0.0):
        self.log, self.name, self.seconds, self.fetch, self.running, self.steps = log, name, step, fetch, True, 0

    def load(self, weights):
        self.log.append((self.name, "load"))

    def step(self, batch, lr):
        assert self.running
        self.log.append((self.name, "step", int(batch.tokens.sum())))
        time.sleep(self.seconds)
        self.steps += 1
        return StepResult(batch.mask.sum(), torch.tensor(1.0), torch.tensor(True))

    def state(self):
        assert self.running
        self.log.append((self.name, "state"))
        time.sleep(self.fetch)
        weight = Shard(torch.full((4,), float(self.steps)), (4,), (0,))
        return {"step": Shard(torch.tensor(self.steps), (), ()), "master/w": weight}

    def pause(self):
        self.running = False

    def resume(self):
        self.running = True


class Watched(Stream):
    """Batches are made while nobody runs, once the warm-up is over."""

    engines: tuple = ()

    def at(self, step):
        assert step < 2 or not any(engine.running for engine in self.engines)
        return super().at(step)


def run(blocks: int = 4, steps: int = 3, **slow):
    log: list = []
    champion, candidate = Engine(log, "champion"), Engine(log, "candidate", **slow)
    stream = Watched(TARGET, 7)
    stream.engines = (champion, candidate)
    start = {"master/w": Shard(torch.zeros(4), (4,), (0,)), "step": Shard(torch.tensor(0), (), ())}
    return race(champion, candidate, start, stream, blocks=blocks, steps=steps), log  # type: ignore[arg-type]


def test_both_meet_the_same_batches_in_alternating_blocks():
    result, log = run()
    steps = {name: [entry[2] for entry in log if entry[:2] == (name, "step")] for name in ("champion", "candidate")}
    assert steps["champion"] == steps["candidate"]
    assert len(set(steps["champion"])) == 2 + 4 * 3
    order = [entry[0] for entry in log if entry[1] == "state"][2:]  # the first are those after warm-up
    assert all(set(order[i : i + 2]) == {"champion", "candidate"} for i in range(0, 8, 2))
    assert [len(block) for block in result.candidate.steps] == [3] * 4
    assert len(result.candidate.warm_up) == 2
    assert len(result.samples("main")) == 2 * 4 * 3


def test_the_replayed_blocks_are_the_candidate_s_own():
    for replay in [replay for _ in range(5) for replay in run()[0].replays]:
        assert (replay.first - 2) % 3 == 0 if replay.first else replay.last == 2
        assert replay.last == replay.first + 3 or replay.first == 0
        assert int(replay.before["step"].tensor) == replay.first
        assert int(replay.outcome.state["step"].tensor) == replay.last
        stream = Stream(TARGET, 7)
        due = [float(stream.at(step).mask.sum()) for step in range(replay.first, replay.last)]
        assert replay.outcome.losses == due
        assert replay.outcome.norms == [1.0] * len(due)


def test_what_moved_is_told_block_by_block_from_the_weights_that_were_loaded():
    result, _ = run(blocks=2)
    for lane in (result.champion, result.candidate):
        assert [motions["w"] for motions in lane.motions] == [(0, 4, 2.0), (0, 4, 3.0), (0, 4, 3.0)]
        assert [answer.applied for answer in lane.answers] == [True] * 8


def test_every_block_can_be_chosen_and_the_warm_up_and_the_last_one_always_are():
    chosen = [{replay.first for replay in run(blocks=2, steps=1)[0].replays} for _ in range(30)]
    assert all({0, 3} <= blocks for blocks in chosen)
    assert any(2 in blocks for blocks in chosen)


def test_a_step_s_time_is_the_answer_s():
    result, _ = run(step=0.01)
    champion, candidate = result.times()
    assert all(0.03 <= block < 0.2 for block in candidate)
    assert all(block < 0.03 for block in champion)


@pytest.mark.parametrize(("fetch", "charged"), [(0.05, 0.05), (0.0, 0.0)])
def test_work_that_is_put_off_to_the_fetch_is_charged(fetch, charged):
    result, _ = run(fetch=fetch)
    plain = result.candidate.blocks()
    extra = [charge - block for charge, block in zip(result.times()[1], plain, strict=True)]
    assert extra == pytest.approx([charged] * 4, abs=0.01)


def test_a_fetch_within_the_champion_s_noise_is_free():
    champion = Lane([[1.0]] * 5, [0.10, 0.12, 0.14, 0.16, 0.18])
    candidate = Lane([[1.0]] * 5, [0.16] * 5)
    assert Race(champion, candidate, 1, []).times()[1] == [1.0] * 5


def test_work_that_is_put_off_in_some_blocks_is_charged_to_them():
    champion = Lane([[1.0]] * 5, [0.10, 0.12, 0.14, 0.16, 0.18])
    candidate = Lane([[1.0]] * 5, [0.14, 0.54, 0.14, 0.14, 0.54])
    assert Race(champion, candidate, 1, []).times()[1] == pytest.approx([1.0, 1.4, 1.0, 1.0, 1.4])
