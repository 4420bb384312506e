"""The search for a plan whose bits are the reference's: from one first difference to the next.

In each round the choices that can explain the first difference are tried, alone, then in pairs, then all other
choices, those that were modelled on the reference before others; the one that moves the first difference furthest
onward is kept. Candidates are plans of our own, so they run in this process, with the reference's thread count and
deterministic algorithms, and stop at their first difference. What comes out is judged again in a process of its own.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from forgetrain.engine.plan import Plan, choices
from forgetrain.engine.serve import deterministic_algorithms
from forgetrain.engine.write import load_engine, source_hash, write_engine
from forgetrain.forge.suspects import familiar, suspects
from forgetrain.forge.truth import Truth, show
from forgetrain.gates.g1 import Comparison, Divergence
from forgetrain.numerics.determinism import make_deterministic
from forgetrain.spec.target import Hardware, Target

Change = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Reach:
    """How far a plan agrees: through ``truths`` whole steps, then ``equal`` tensors of the next, up to ``divergence``
    (None when there is no next). failure: what the candidate raised instead."""

    truths: int
    equal: int
    divergence: Divergence | None = None
    failure: str | None = None

    @property
    def place(self) -> tuple[int, int]:
        return (self.truths, self.equal) if self.failure is None else (-1, -1)

    @property
    def agrees(self) -> bool:
        return self.divergence is None and self.failure is None

    def __str__(self) -> str:
        if self.failure is not None:
            return f"raises {self.failure}"
        return "no difference" if self.divergence is None else self.divergence.tap


@dataclass(frozen=True)
class Attempt:
    """One line of the search's protocol. tap: the first difference before the change; reach: after it."""

    round: int
    tap: str
    change: Change
    before: tuple[str, ...]
    reach: Reach
    kept: bool

    def __str__(self) -> str:
        change = ", ".join(f"{key}: {old} → {new}" for (key, new), old in zip(self.change, self.before, strict=True))
        return f"round {self.round}: {change}: {'kept, ' if self.kept else ''}first difference at {self.reach}"

    def as_dict(self) -> dict[str, object]:
        return {
            "round": self.round,
            "tap": self.tap,
            "change": dict(self.change),
            "reached": str(self.reach),
            "kept": self.kept,
        }


class Search:
    """``truths`` may grow between walks: a plan must agree with every one of them, in their order.

    report: gets every attempt as it is made, and the one that a round keeps once more."""

    def __init__(self, target: Target, truths: list[Truth], report: Callable[[Attempt], None]):
        self.target, self.truths, self.report = target, truths, report
        self.attempts: list[Attempt] = []
        self._reaches: dict[tuple[str, int], Reach] = {}
        self._rounds = 0

    def walk(self, plan: Plan) -> tuple[Plan, Reach]:
        """Goes on from ``plan`` until it agrees with every truth or nothing helps; returns where it ended."""
        with tempfile.TemporaryDirectory() as folder, pinned(self.target.hardware):
            self._folder = Path(folder)
            reach = self.reach(plan)
            while not reach.agrees:
                better = self._round(plan, reach)
                if better is None:
                    break
                plan, reach = better
        return plan, reach

    def settle(self, plan: Plan) -> Plan:
        """Where the truths leave a choice open, takes the one that was written after the reference: the last bits that
        it decides may part on the next batch. ``plan`` agrees with every truth, and so does what is returned."""
        with tempfile.TemporaryDirectory() as folder, pinned(self.target.hardware):
            self._folder = Path(folder)
            for key, options in choices(self.target).items():
                known = [name for name in options if familiar(key, name, self.target.reference.name)]
                if len(known) != 1 or plan[key] == known[0]:
                    continue
                candidate = plan.with_choice(key, known[0])
                found = self.reach(candidate)
                change, before = ((key, known[0]),), (plan[key],)
                self.attempts.append(Attempt(self._rounds, "", change, before, found, found.agrees))
                self.report(self.attempts[-1])
                plan = candidate if found.agrees else plan
        return plan

    def reach(self, plan: Plan) -> Reach:
        source = write_engine(self.target, plan)
        key = source_hash(source), len(self.truths)
        if key not in self._reaches:
            path = self._folder / f"engine_{key[0][:16]}.py"  # a name of its own: Python caches bytecode by name
            path.write_text(source, encoding="utf-8")
            self._reaches[key] = self._run(path)
        return self._reaches[key]

    def _run(self, path: Path) -> Reach:
        try:
            engine = load_engine(path).build(
                self.target.plain(),
                device=self.target.hardware.device,
                precision=self.target.precision.dtype,
                mesh=None,
            )
            for number, truth in enumerate(self.truths):
                comparison = Comparison(truth.stream(), self.target.model)
                divergence = _compare(engine, truth.on(self.target.hardware.device), comparison)
                if divergence is not None:
                    return Reach(number, comparison.equal, divergence)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            # combinations of variants that do not fit together are no answer, and no reason to stop
            return Reach(0, 0, failure=f"{type(error).__name__}: {error}"[:200])
        return Reach(len(self.truths), 0)

    def _round(self, plan: Plan, reach: Reach) -> tuple[Plan, Reach] | None:
        """The best change of the first group of changes in which one moves the first difference onward."""
        self._rounds += 1
        tap = "" if reach.divergence is None else reach.divergence.tap
        for changes in self._groups(plan, tap):
            best: tuple[Plan, Reach, Attempt] | None = None
            for change in changes:
                candidate = plan
                for key, name in change:
                    candidate = candidate.with_choice(key, name)
                found = self.reach(candidate)
                attempt = Attempt(self._rounds, tap, change, tuple(plan[key] for key, _ in change), found, False)
                self.attempts.append(attempt)
                self.report(attempt)
                if found.place > reach.place and (best is None or self._better(attempt, best[2])):
                    best = candidate, found, attempt
                    if found.agrees and self._known(attempt) == len(change):
                        break  # nothing can be further, or know the reference better
            if best is not None:
                kept = replace(best[2], kept=True)
                self.attempts[self.attempts.index(best[2])] = kept
                self.report(kept)
                return best[0], best[1]
        return None

    def _better(self, one: Attempt, other: Attempt) -> bool:
        """Further, or as far with more of what is known to be the reference's."""
        return (one.reach.place, self._known(one)) > (other.reach.place, self._known(other))

    def _known(self, attempt: Attempt) -> int:
        """How many of its choices were modelled on the reference."""
        return sum(familiar(key, name, self.target.reference.name) for key, name in attempt.change)

    def _groups(self, plan: Plan, tap: str) -> Iterator[Iterator[Change]]:
        usable, reference = choices(self.target), self.target.reference.name
        likely = suspects(tap, self.target)
        others = [key for key in usable if key not in likely]

        def options(key: str) -> list[tuple[str, str]]:
            names = [name for name in usable[key] if name != plan[key]]
            return [(key, name) for name in sorted(names, key=lambda name: not familiar(key, name, reference))]

        def pairs(combinations: Iterator[tuple[str, str]]) -> Iterator[Change]:
            for one, two in combinations:
                yield from itertools.product(options(one), options(two))

        yield ((option,) for key in likely for option in options(key))
        yield pairs(itertools.combinations(likely, 2))
        yield ((option,) for key in others for option in options(key))
        yield pairs(itertools.product(likely, others))


class _Parted(Exception):
    def __init__(self, divergence: Divergence):
        self.divergence = divergence


def _compare(engine: object, truth: Truth, comparison: Comparison) -> Divergence | None:
    def see(name: str, tensor: Tensor) -> None:
        divergence = comparison.see(name, tensor)
        if divergence is not None:
            raise _Parted(divergence)

    try:
        show(engine, truth, see)
    except _Parted as parted:
        return parted.divergence
    return comparison.end()


@contextmanager
def pinned(hardware: Hardware) -> Iterator[None]:
    """The process as an engine's own process is set up, for the length of a block."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    make_deterministic(hardware.threads, hardware.device)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        deterministic_algorithms(before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        if hardware.device == "cuda":  # the last candidate is gone; processes that share the GPU need its memory
            torch.cuda.empty_cache()
