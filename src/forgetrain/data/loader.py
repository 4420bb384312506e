"""Batches of a training run, as the engine contract has them: any step's batch, on any rank, at once.

    loader = Loader(data, target, rank=0, world=1, device="cpu")
    batch = loader.batch_at(step=17)
    for step, batch in loader.batches(first=17, last=100): ...        # the same, read ahead in the background
    for batch, weight in loader.held_out(): ...                       # mean loss = sum(weight * loss) / sum(weight)

Batches change their shape where a stage of the run says so; those of the held-out documents never do.

A window is S + 1 tokens of a source's training split; consecutive windows share one token, so that every token is
predicted once an epoch. Windows cross documents. With ``data.documents = "ignore"`` the model sees a window as one
text, as Megatron's GPT does by default; otherwise ``cu_seqlens`` is cut at every document too, and no loss is taken
where the label is the first token of another document.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from forgetrain.data.folder import DataFolder, Split
from forgetrain.data.order import LONGEST_CYCLE, Order, Places, StagedOrder
from forgetrain.engine.contract import Batch, make_batch
from forgetrain.errors import UserError
from forgetrain.spec.stages import Stage, stages_of, steps_before
from forgetrain.spec.target import Target

#: Batches that lie ready before they are asked for.
AHEAD = 4
#: A source's share of the windows may be this far from its weight's, relative to it, where no cycle holds it exactly.
FURTHEST = 0.05


class Loader:
    """Rank ``rank`` of ``world`` gets rows [rank·B/world, (rank+1)·B/world) of each global batch of B rows."""

    def __init__(self, data: DataFolder, target: Target, *, rank: int = 0, world: int = 1, device: str = "cpu"):
        """Raises UserError when a stage's B is no multiple of ``world``, when a source holds less than one window of a
        stage that reads it, when stages weigh sources that the data was not built from, or when weights are so far
        apart that no mixing cycle is near them."""
        self.data, self.rank, self.world, self.device = data, rank, world, device
        self.stages = stages_of(target)
        self.length, self.batch_size = target.recipe.sequence_length, target.recipe.batch_size
        _require_divisible(target, self.stages, world)
        self.rows = self.batch_size // world  # of held-out batches, which have the recipe's shape in every stage
        self.masked = target.data.documents != "ignore"
        self.splits = [source.train for source in data.sources]
        lengths = {stage.sequence_length for stage in self.stages}
        windows = {length: [(len(split.tokens) - 1) // length for split in self.splits] for length in lengths}
        weights = [_weights(stage, data, target) for stage in self.stages]
        for stage, mixture in zip(self.stages, weights, strict=True):
            _require_windows(stage, mixture, data, windows[stage.sequence_length])
        self.windows = {length: sum(counts) for length, counts in windows.items()}
        self.order = StagedOrder(self.stages, windows, weights, target.recipe.seed)
        for stage, mixture, order in zip(self.stages, weights, self.order.orders, strict=True):
            _require_shares(stage, mixture, data, order)
        self.pad = data.tokenizer.pad

    def epoch_at(self, step: int) -> float:
        """How often the training windows have been gone through before ``step``, over all sources."""
        return sum(
            steps * stage.batch_size / self.windows[stage.sequence_length]
            for steps, stage in zip(steps_before(self.stages, step), self.stages, strict=True)
        )

    def taken(self) -> dict[str, NDArray[Any]]:
        """Of each source: the windows that the whole run takes of it, and how often it goes through them."""
        windows, epochs = np.zeros(len(self.splits), np.int64), np.zeros(len(self.splits))
        for stage, order in zip(self.stages, self.order.orders, strict=True):
            taken = order.taken((stage.last - stage.first) * stage.batch_size)
            windows += taken
            epochs += taken / np.maximum(order.windows, 1)
        return {"windows": windows, "epochs": epochs}

    def places(self, step: int) -> Places:
        """Where the rows of a step's global batch come from."""
        return self.order.at(step)[1]

    def batch_at(self, step: int) -> Batch:
        """This rank's rows of a step's batch; a pure function of the target's seed, the data, and its arguments."""
        stage, places = self.order.at(step)
        length, rows = stage.sequence_length, stage.batch_size // self.world
        starts = places.window * length
        mine = slice(self.rank * rows, (self.rank + 1) * rows)
        tokens, labels = (np.empty((rows, length), np.int64) for _ in range(2))
        for row, (source, start) in enumerate(zip(places.source[mine], starts[mine], strict=True)):
            piece = self.splits[source].tokens[start : start + length + 1]
            tokens[row], labels[row] = piece[:-1], piece[1:]  # cast while they are copied, once
        denominator = stage.tokens_per_step
        boundaries, mask = None, None
        if self.masked:
            boundaries, mask = self._documents(places.source[mine], starts[mine], length)
            denominator -= self._boundaries_within(places.source, starts, length)
        return self._batch(tokens, labels, mask, boundaries, denominator)

    def batches(self, first: int, last: int) -> Iterator[tuple[int, Batch]]:
        """(step, batch) for steps ``first`` to ``last`` - 1, prepared by a thread ahead of time."""
        ready: queue.Queue[Any] = queue.Queue(AHEAD)
        stop = threading.Event()

        def offer(item: Any) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            try:
                for step in range(first, last):
                    if not offer((step, self.batch_at(step))):
                        return
                offer(None)
            except BaseException as error:  # carried to the thread that waits for the batch
                offer(error)

        thread = threading.Thread(target=work, name="forgetrain-loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def held_out(self, limit: int | None = None, source: int | None = None) -> Iterator[tuple[Batch, float]]:
        """Batches over the held-out documents in order, and the tokens each counts on this rank; every rank gets
        equally many, of which the last may count none. ``limit`` bounds the windows, spread over each source;
        ``source`` is the number of the only one to read."""
        places = self._held_out_places(limit, source)
        for first in range(0, len(places), self.batch_size):
            rows = places[first : first + self.batch_size][self.rank :: self.world]
            tokens = np.full((self.rows, self.length + 1), self.pad, np.int64)
            mask = np.zeros((self.rows, self.length), np.float32)
            cuts = []
            for row, (split, start) in enumerate(rows):
                piece = split.tokens[start : start + self.length + 1]
                tokens[row, : len(piece)] = piece
                mask[row, : len(piece) - 1] = 1
                if self.masked:
                    inside = _starts_within(split, start, self.length)
                    mask[row, inside - 1] = 0
                    cuts.append(row * self.length + inside[inside < self.length])
            counted = float(mask.sum())
            boundaries = np.concatenate(cuts) if cuts else None
            windows = tokens[:, :-1].copy(), tokens[:, 1:].copy()
            yield self._batch(*windows, mask, boundaries, max(counted, 1.0)), counted

    def _held_out_places(self, limit: int | None, only: int | None) -> list[tuple[Split, int]]:
        places = []
        for number, source in enumerate(self.data.sources):
            if only not in (None, number):
                continue
            split = source.held_out
            starts = range(0, len(split.tokens) - 1, self.length)
            if limit is not None and len(starts) > (share := max(1, limit // len(self.data.sources))):
                starts = [starts[i * len(starts) // share] for i in range(share)]
            places += [(split, start) for start in starts]
        return places

    def _documents(self, sources: Any, starts: Any, length: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        mask = np.ones((len(starts), length), np.float32)
        cuts = [np.zeros(0, np.int64)]
        for row, (source, start) in enumerate(zip(sources, starts, strict=True)):
            inside = _starts_within(self.splits[source], start, length)
            mask[row, inside - 1] = 0
            cuts.append(row * length + inside[inside < length])
        return np.concatenate(cuts), mask

    def _boundaries_within(self, sources: NDArray[np.int64], starts: NDArray[np.int64], length: int) -> int:
        total = 0
        for source in np.unique(sources):
            first, bounds = starts[sources == source], self.splits[source].document_starts
            ends = np.searchsorted(bounds, first + length, side="right")
            total += int((ends - np.searchsorted(bounds, first, side="right")).sum())
        return total

    def _batch(
        self,
        tokens: NDArray[np.int64],
        labels: NDArray[np.int64],
        mask: NDArray[np.float32] | None,
        boundaries: NDArray[np.int64] | None,
        denominator: float,
    ) -> Batch:
        batch = make_batch(
            torch.from_numpy(tokens),
            torch.from_numpy(labels),
            torch.from_numpy(np.ones(tokens.shape, np.float32) if mask is None else mask),
            None if boundaries is None else torch.from_numpy(boundaries),
        )._replace(loss_denominator=torch.tensor(float(denominator)))
        if self.device == "cpu":
            return batch
        return Batch(*(tensor.pin_memory().to(self.device, non_blocking=True) for tensor in batch))


def _require_divisible(target: Target, stages: Sequence[Stage], world: int) -> None:
    micro = target.recipe.micro_batch_size
    sizes = [("recipe.batch_size", target.recipe.batch_size)]
    sizes += [(f"data.stages.{stage.name}.batch_size", stage.batch_size) for stage in stages]
    for key, size in sizes:
        if size % (micro * world):
            raise UserError(
                f"does not divide into micro-batches of {micro} on {world} ranks",
                key=key,
                value=size,
                remedy=f"use a multiple of {micro * world}, or another number of ranks",
            )


def _weights(stage: Stage, data: DataFolder, target: Target) -> list[float]:
    """The stage's weight of each source of the data folder; 0 where it does not read it."""
    if not stage.weights:
        return [source.weight for source in data.sources]
    built = [entry["path"] for entry in data.manifest["sources"]]
    named = [source.path for source in target.data.sources]
    if built != named:
        raise UserError(
            f"was built from other sources ({', '.join(built)}) than those the target's stages weigh",
            file=data.folder,
            remedy="run forgetrain data build TARGET",
        )
    return [stage.weights.get(source.label, 0.0) for source in target.data.sources]


def _require_windows(stage: Stage, weights: Sequence[float], data: DataFolder, windows: Sequence[int]) -> None:
    for source, weight, count in zip(data.sources, weights, windows, strict=True):
        if weight and count < 1:
            raise UserError(
                f"holds {len(source.train.tokens)} tokens to train on, less than one window",
                file=source.name,
                key=f"data.stages.{stage.name}.sequence_length" if stage.name else "recipe.sequence_length",
                value=stage.sequence_length,
                remedy="give more text or a shorter sequence",
            )


def _require_shares(stage: Stage, weights: Sequence[float], data: DataFolder, order: Order) -> None:
    counts, length = order.taken(len(order.cycle)).tolist(), len(order.cycle)
    for source, weight, count in zip(data.sources, weights, counts, strict=True):
        asked, given = weight / sum(weights), count / length
        if abs(given - asked) > FURTHEST * asked:
            near = ", ".join(f"{one.name} = {of_it}" for one, of_it in zip(data.sources, counts, strict=True) if of_it)
            raise UserError(
                f"asks for {asked:.3g} of the windows, and the nearest cycle of at most {LONGEST_CYCLE} windows that "
                f"holds every source has {given:.3g}",
                file=source.name,
                key=f"data.stages.{stage.name}.weights" if stage.weights else "data.sources.weight",
                value=weight,
                remedy=f"if that will do, write the weights of that cycle: {near}; else leave the source out",
            )


def _starts_within(split: Split, start: int, length: int) -> NDArray[np.int64]:
    """Where documents begin in the ``length`` tokens after ``start``, relative to it: 1 to ``length``.

    The label at position p - 1 is the first token of a document that begins at p.
    """
    first, last = np.searchsorted(split.document_starts, [start, start + length], side="right")
    return split.document_starts[first:last] - start
