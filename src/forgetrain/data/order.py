"""Which window of which source is the g-th of the training run: a pure function, computed without a permutation list.

    order = Order(windows=[1000, 50], weights=[3, 1], seed=0)
    order.at(first=step * batch_size, count=batch_size)      # Places(source, epoch, window)

A run is one global sequence of windows. Step t of batch size B takes windows t·B to (t+1)·B, and rank r of R the r-th
R-th of them; so resuming costs nothing, and another world size meets the same windows in the same order.

Sources are mixed by a fixed cycle in which each appears as often as its weight says, spread evenly. Within a source
each pass (epoch) visits every window once, in an order of its own drawn from (seed, source, epoch): a Feistel network
permutes the numbers below a power of four, and cycle walking (Black and Rogaway 2002) narrows that to the windows.

A run of several stages is one such sequence after another, each with its own batch size, mixture and windows. A stage
goes on in each source where the earlier stages of its sequence length stopped; how far they got is counted from their
cycles, so that any step of any stage is still found at once:

    order = StagedOrder(stages_of(target), windows={4096: [1000, 50], 32768: [125, 6]}, weights=..., seed=0)
    stage, places = order.at(step=900)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forgetrain.spec.stages import Stage, stage_at

_ROUNDS = 6
#: The mixing cycle is at most this long; weights whose exact ratios need a longer one are met as nearly as one can.
LONGEST_CYCLE = 4096


class Places(NamedTuple):
    """int64 [count] each: the source, how often it has been gone through before, and the window in it."""

    source: NDArray[np.int64]
    epoch: NDArray[np.int64]
    window: NDArray[np.int64]


class Order:
    """One stage's sequence. A source of weight 0 is not in it; ``begun``: windows of each source taken before it."""

    def __init__(
        self, windows: Sequence[int], weights: Sequence[float], seed: int, begun: NDArray[np.int64] | None = None
    ):
        self.windows, self.seed = list(windows), seed
        self.begun = np.zeros(len(windows), np.int64) if begun is None else begun
        used = np.flatnonzero(weights)
        self.cycle = used[mixing_cycle([weights[source] for source in used.tolist()])]
        appears = self.cycle[None, :] == np.arange(len(windows))[:, None]
        self._before = np.cumsum(appears, axis=1) - appears  # [sources, cycle]: appearances before that place
        self._each = appears.sum(axis=1)

    def at(self, first: int, count: int) -> Places:
        """The places of windows ``first`` to ``first + count`` of the global sequence."""
        number = np.arange(first, first + count, dtype=np.int64)
        turn, slot = np.divmod(number, len(self.cycle))
        source = self.cycle[slot]
        nth = self.begun[source] + turn * self._each[source] + self._before[source, slot]
        epoch, window = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for s in np.unique(source):
            rows = source == s
            epoch[rows], inside = np.divmod(nth[rows], self.windows[s])
            shuffled = np.zeros_like(inside)
            for e in np.unique(epoch[rows]):
                same = epoch[rows] == e
                shuffled[same] = permute(inside[same], self.windows[s], (self.seed, int(s), int(e)))
            window[rows] = shuffled
        return Places(source, epoch, window)

    def taken(self, count: int) -> NDArray[np.int64]:
        """int64 [sources]: how many of the first ``count`` windows are each source's."""
        turns, slot = divmod(count, len(self.cycle))
        return turns * self._each + np.bincount(self.cycle[:slot], minlength=len(self.windows))


class StagedOrder:
    """A run's stages, each an Order that goes on where those of its sequence length before it stopped."""

    def __init__(
        self,
        stages: Sequence[Stage],
        windows: Mapping[int, Sequence[int]],
        weights: Sequence[Sequence[float]],
        seed: int,
    ):
        """windows: by sequence length, those of each source. weights: of each stage, those of each source."""
        self.stages, self.orders = list(stages), []
        begun = {length: np.zeros(len(counts), np.int64) for length, counts in windows.items()}
        for stage, mixture in zip(stages, weights, strict=True):
            length = stage.sequence_length
            order = Order(windows[length], mixture, seed, begun[length])
            begun[length] = begun[length] + order.taken((stage.last - stage.first) * stage.batch_size)
            self.orders.append(order)

    def at(self, step: int) -> tuple[Stage, Places]:
        """A step's stage, and the places of its global batch's rows."""
        stage = stage_at(self.stages, step)
        order = self.orders[self.stages.index(stage)]
        return stage, order.at((step - stage.first) * stage.batch_size, stage.batch_size)


def mixing_cycle(weights: Sequence[float]) -> NDArray[np.int64]:
    """Source numbers in which each source's share is its weight's, exactly where a cycle of 4096 can hold it.

    Smooth weighted round robin: each place goes to the source that is furthest behind its share.
    """
    shares = _shares(weights)
    credit, cycle = np.zeros(len(shares), np.int64), np.zeros(sum(shares), np.int64)
    for place in range(len(cycle)):
        credit += shares
        cycle[place] = chosen = int(np.argmax(credit))
        credit[chosen] -= len(cycle)
    return cycle


def mixing_version(weights: Sequence[float]) -> int:
    """Which version of the program first made this cycle of these weights; a run of an earlier one had another order.

    Version 1 rounded each weight to a denominator of 1000 at most, before it set them in relation.
    """
    rounded, shares = [Fraction(weight).limit_denominator(1000) for weight in weights], _shares(weights).tolist()
    same = all(share * sum(rounded) == one * sum(shares) for one, share in zip(rounded, shares, strict=True))
    return 1 if min(rounded) > 0 and same else 2


def _shares(weights: Sequence[float]) -> NDArray[np.int64]:
    """How often each source is in the cycle. Of all cycles that are not too long it is the one whose worst share is
    nearest to its weight's, relative to it, and of several the shortest; where one holds the ratios exactly, that one.
    Nine digits count, so that a ratio such as 1/3 is exact."""
    asked = np.array(weights) / math.fsum(weights)
    shares = np.maximum(1, np.rint(np.arange(1, LONGEST_CYCLE + 1)[:, None] * asked)).astype(np.int64)
    length = shares.sum(axis=1, keepdims=True)
    off = np.abs(shares / length / asked - 1).max(axis=1)
    off[length[:, 0] > LONGEST_CYCLE] = np.inf
    return shares[off.round(9).argmin()]


def permute(index: NDArray[np.int64], n: int, key: tuple[Any, ...]) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of the numbers below ``n``, chosen by ``key``, sends each of ``index``."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    digest = hashlib.shake_256(repr(key).encode()).digest(8 * _ROUNDS)
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    out = index.astype(np.uint64)
    outside = np.ones(len(out), bool)
    while outside.any():
        out[outside] = _feistel(out[outside], half, keys)
        outside = out >= n
    return out.astype(np.int64)


def _feistel(value: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    width, low = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> width, value & low
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & low)
    return (left << width) | right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
