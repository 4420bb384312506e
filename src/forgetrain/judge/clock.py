"""The clock: champion and candidate in alternating blocks of one run, timed by the parent.

Both start from the same weights and meet the same batches. While one is on the clock every process of the other is
stopped, so it cannot work ahead or get in the way. Block by block the state is fetched off the clock, always, so that
nothing tells a candidate which block will be replayed on the reference; and work that is put off until then gains
nothing, because what a candidate's fetch takes longer than the champion's is added to its block.
"""

from __future__ import annotations

import secrets
import statistics
import time
from dataclasses import dataclass, field

from torch import Tensor

from forgetrain import memory
from forgetrain.engine.contract import Batch
from forgetrain.engine.process import EngineProcess
from forgetrain.gates.motion import Answer, Motion, motion_of
from forgetrain.gates.replay import Outcome
from forgetrain.judge.evidence import State, masters
from forgetrain.judge.hidden import Stream
from forgetrain.numerics.device import release

#: After the warm-up, before and after two blocks, and the one that is being fetched.
_KEPT_STATES = 6


@dataclass
class Lane:
    """One engine's part of a race; times in seconds. steps: [block][step]; fetches: of the state after each block;
    warm_up: of the steps before the first block, compilation included; answers: step by step, the warm-up's first;
    motions: block by block, the warm-up's first."""

    steps: list[list[float]] = field(default_factory=list)
    fetches: list[float] = field(default_factory=list)
    warm_up: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    motions: list[dict[str, Motion]] = field(default_factory=list)

    def blocks(self) -> list[float]:
        return [sum(block) for block in self.steps]


@dataclass(frozen=True)
class Replay:
    """A block to be repeated: its first and last step in the stream, the candidate's state before it, and what came
    of it."""

    first: int
    last: int
    before: State
    outcome: Outcome


@dataclass(frozen=True)
class Race:
    champion: Lane
    candidate: Lane
    steps_per_block: int
    replays: list[Replay]

    def times(self) -> tuple[list[float], list[float]]:
        """Seconds of the champion's and the candidate's blocks; put-off work is added to the candidate's: to all of
        them, or to those in which it was put off."""
        usual, noise = statistics.median(self.champion.fetches), 3 * _spread(self.champion.fetches)
        put_off = statistics.median(self.candidate.fetches) - usual
        always = put_off if put_off > noise else 0.0
        late = [fetch - usual for fetch in self.candidate.fetches]
        charges = [max(always, seconds if seconds > noise else 0.0) for seconds in late]
        return self.champion.blocks(), [sum(pair) for pair in zip(self.candidate.blocks(), charges, strict=True)]

    def samples(self, run: str) -> list[tuple[str, str, int, int, float]]:
        """Rows for the ledger: (run, engine, block, step, seconds)."""
        lanes = (("champion", self.champion), ("candidate", self.candidate))
        return [
            (run, name, block, step, seconds)
            for name, lane in lanes
            for block, steps in enumerate(lane.steps)
            for step, seconds in enumerate(steps)
        ]


def race(
    champion: EngineProcess,
    candidate: EngineProcess,
    start: State,
    stream: Stream,
    *,
    blocks: int,
    steps: int,
    warm_up: int = 2,
    device: str = "cpu",
) -> Race:
    """Runs ``warm_up`` untimed steps of each, then ``blocks`` pairs of blocks of ``steps`` steps.

    ``start``: the state right after loading the weights, which are its masters. The operating system draws which of a
    pair goes first, and one of the blocks to be replayed; another is the last, in which an engine that is right for
    some steps only is wrong for certain, and the warm-up is one, so that the race begins where it must. ``device``:
    where this process computes what it keeps of a state."""
    lanes = {champion: Lane(), candidate: Lane()}
    chosen = {secrets.randbelow(blocks), blocks - 1}
    replays: list[Replay] = []
    weights = masters(start)
    before: dict[EngineProcess, dict[str, Tensor]] = {}
    kept = start
    # a fetch into memory that nobody has touched takes longer, and the candidate, whose states stay, would be charged
    memory.make_room([shard.tensor.shape for shard in start.values()] * _KEPT_STATES)
    for engine, lane in lanes.items():
        engine.load(weights)
        lane.warm_up = [_timed_step(engine, stream.at(step), stream.rate(step), lane) for step in range(warm_up)]
        state = engine.state()
        before[engine] = masters(state)
        lane.motions.append(motion_of(weights, before[engine], device))
        if engine is candidate:
            replays.append(Replay(0, warm_up, start, _outcome(lane.answers, state)))
            kept = state
    for engine in lanes:
        engine.pause()
    for block in range(blocks):
        first = warm_up + block * steps
        # made while both engines are stopped: between two steps an engine has no time of its own
        batches = [(stream.at(step), stream.rate(step)) for step in range(first, first + steps)]
        pair = [champion, candidate] if secrets.randbelow(2) else [candidate, champion]
        for engine in pair:
            lane = lanes[engine]
            engine.resume()
            lane.steps.append([_timed_step(engine, batch, rate, lane) for batch, rate in batches])
            began = time.perf_counter()
            state = engine.state()
            lane.fetches.append(time.perf_counter() - began)
            engine.pause()
            now = masters(state)
            lane.motions.append(motion_of(before[engine], now, device))
            release(device)
            before[engine] = now
            if engine is candidate:
                if block in chosen:
                    replays.append(Replay(first, first + steps, kept, _outcome(lane.answers[-steps:], state)))
                kept = state
    for engine in lanes:
        engine.resume()
    return Race(lanes[champion], lanes[candidate], steps, replays)


def _outcome(answers: list[Answer], state: State) -> Outcome:
    return Outcome([answer.loss for answer in answers], [answer.norm for answer in answers], state)


def _timed_step(engine: EngineProcess, batch: Batch, rate: float, lane: Lane) -> float:
    """Seconds from before the batch is sent until the answer is here, which the lane keeps."""
    began = time.perf_counter()
    result = engine.step(batch, rate)
    seconds = time.perf_counter() - began
    lane.answers.append(Answer(float(result.loss), float(result.grad_norm), bool(result.applied)))
    return seconds


def _spread(values: list[float]) -> float:
    """A robust standard deviation: 1.48 times the median distance from the median."""
    middle = statistics.median(values)
    return 1.48 * statistics.median(abs(value - middle) for value in values)
