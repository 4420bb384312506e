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
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from forgetrain.engine.contract import Batch
from forgetrain.engine.process import EngineProcess
from forgetrain.judge.evidence import State
from forgetrain.judge.hidden import Stream


@dataclass
class Lane:
    """One engine's part of a race; times in seconds. steps: [block][step]; fetches: of the state after each block;
    warm_up: of the steps before the first block, compilation included; losses: [block][step]."""

    steps: list[list[float]] = field(default_factory=list)
    fetches: list[float] = field(default_factory=list)
    warm_up: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)

    def blocks(self) -> list[float]:
        return [sum(block) for block in self.steps]


@dataclass(frozen=True)
class Replay:
    """A block to be repeated: its first and last step in the stream, the candidate's states around it, and the
    losses that it returned."""

    first: int
    last: int
    before: State
    after: State
    losses: list[float]


@dataclass(frozen=True)
class Race:
    champion: Lane
    candidate: Lane
    steps_per_block: int
    replays: list[Replay]

    def times(self) -> tuple[list[float], list[float]]:
        """Seconds of the champion's and the candidate's blocks; put-off work is added to the candidate's."""
        put_off = statistics.median(self.candidate.fetches) - statistics.median(self.champion.fetches)
        noise = 3 * _spread(self.champion.fetches)
        surcharge = put_off if put_off > noise else 0.0
        return self.champion.blocks(), [block + surcharge for block in self.candidate.blocks()]

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
    weights: Mapping[str, Tensor],
    stream: Stream,
    *,
    blocks: int,
    steps: int,
    warm_up: int = 2,
) -> Race:
    """Runs ``warm_up`` untimed steps of each, then ``blocks`` pairs of blocks of ``steps`` steps.

    Which of a pair goes first the operating system draws, and one of the blocks that can be replayed; the other is the
    last, in which an engine that is right for some steps only is wrong for certain."""
    lanes = {champion: Lane(), candidate: Lane()}
    chosen = {secrets.randbelow(blocks), blocks - 1}
    replays: list[Replay] = []
    for engine, lane in lanes.items():
        engine.load(weights)
        lane.warm_up = [_timed_step(engine, stream.at(step), stream.rate(step))[0] for step in range(warm_up)]
    before = candidate.state()
    for engine in lanes:
        engine.pause()
    for block in range(blocks):
        first = warm_up + block * steps
        # made while both engines are stopped: between two steps an engine has no time of its own
        batches = [(stream.at(step), stream.rate(step)) for step in range(first, first + steps)]
        pair = [champion, candidate] if secrets.randbelow(2) else [candidate, champion]
        for engine in pair:
            engine.resume()
            timed = [_timed_step(engine, batch, rate) for batch, rate in batches]
            began = time.perf_counter()
            state = engine.state()
            lanes[engine].fetches.append(time.perf_counter() - began)
            engine.pause()
            lanes[engine].steps.append([seconds for seconds, _ in timed])
            lanes[engine].losses.append([loss for _, loss in timed])
            if engine is candidate:
                if block in chosen:
                    replays.append(Replay(first, first + steps, before, state, lanes[engine].losses[block]))
                before = state
    for engine in lanes:
        engine.resume()
    return Race(lanes[champion], lanes[candidate], steps, replays)


def _timed_step(engine: EngineProcess, batch: Batch, rate: float) -> tuple[float, float]:
    """(seconds, loss): from before the batch is sent until the loss is here."""
    began = time.perf_counter()
    result = engine.step(batch, rate)
    return time.perf_counter() - began, float(result.loss)


def _spread(values: list[float]) -> float:
    """A robust standard deviation: 1.48 times the median distance from the median."""
    middle = statistics.median(values)
    return 1.48 * statistics.median(abs(value - middle) for value in values)
