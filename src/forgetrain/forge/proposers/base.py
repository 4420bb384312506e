"""What a proposer is asked, and what it answers.

    brief = Brief(target=target, champion=source, ...)
    proposal = proposer.propose(brief)          # Proposal, or NoProposal with the reason

A proposer sees a brief and nothing else: verdicts of hidden gates reach it as pass or fail.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from forgetrain.engine.plan import Plan
from forgetrain.spec.target import Target


@dataclass(frozen=True)
class Cost:
    """What an attempt took of the budget: model tokens and dollars; wall time is the loop's to count."""

    tokens: int = 0
    dollars: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.dollars + other.dollars)


@dataclass(frozen=True)
class Attempt:
    """An earlier attempt as a proposer may know it."""

    number: int
    proposer: str
    message: str
    outcome: str  # "elected", "rejected by g4", "not faster", "no change", ...
    ratio: float | None = None  # speed against the champion of its time, where it was clocked


@dataclass(frozen=True)
class Budget:
    """What is left: wall time, attempts, dollars, tokens."""

    minutes: float
    attempts: int
    dollars: float
    tokens: int


@dataclass(frozen=True)
class Brief:
    """Everything that a proposer is told. ``profile`` holds the costliest ops as (name, share of the step's time),
    ``gaps`` ops by the time that they lose to their roofline, the worst first; ``plan`` is the champion's."""

    target: Target
    champion: str
    plan: Plan | None
    budget: Budget
    profile: tuple[tuple[str, float], ...] = ()
    gaps: tuple[str, ...] = ()
    first_failure: str | None = None
    attempts: tuple[Attempt, ...] = ()
    dead_ends: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The brief as BRIEF.md, for people and agents."""
        model, recipe = self.target.model, self.target.recipe
        lines = [
            f"# Make the engine of {self.target.name} faster",
            "",
            f"`engine.py` is the champion: it trains a {model.architecture} model of {model.num_hidden_layers} layers, "
            f"hidden size {model.hidden_size}, vocabulary {model.vocab_size}, on {self.target.hardware.name}, in "
            f"{self.target.precision.dtype}, {recipe.batch_size} × {recipe.sequence_length} tokens a step in micro-"
            f"batches of {recipe.micro_batch_size}. Change `engine.py` so that a step takes less time.",
            "",
            "## Contract",
            "",
            "One file that imports the standard library, torch (and triton on a GPU) alone. "
            "`build(target, *, device, precision, mesh)` returns an object with `load(weights)`, "
            "`step(batch, lr) -> (loss, grad_norm, applied)`, `loss(batch)`, `state()` and `restore(state)`, as the "
            "champion has them. Both precisions, fp32 and bf16, must work from the same source. A gradient norm that "
            "is not finite must leave weights and moments as they were.",
            "",
            "## How it is judged",
            "",
            "In a sandbox, on batches that do not exist yet: its errors against a float64 computation may not exceed "
            "the reference's own by more than a factor, paired training must give the reference's losses, and its "
            "steps are clocked from outside, alternating with the champion's. What is clocked is what is checked.",
        ]
        if self.profile:
            lines += ["", "## Where the champion's time goes", ""]
            lines += [f"- {name}: {share:.0%}" for name, share in self.profile]
            if self.gaps:
                lines += ["", f"Farthest from what the hardware allows: {self.gaps[0]}."]
        if self.first_failure:
            lines += ["", "## What failed last", "", self.first_failure]
        if self.attempts:
            lines += ["", "## Last attempts", ""]
            lines += [f"- #{a.number} {a.proposer}: {a.message} — {a.outcome}{_ratio(a.ratio)}" for a in self.attempts]
        if self.dead_ends:
            lines += ["", "## Dead ends", "", *(f"- {line}" for line in self.dead_ends)]
        if self.notes:
            lines += ["", "## Notes", "", *(f"- {line}" for line in self.notes)]
        b = self.budget
        lines += ["", "## Budget left", "", f"{b.minutes:.0f} minutes, {b.attempts} attempts."]
        return "\n".join(lines) + "\n"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f", {ratio:.3f}× the champion's speed"


@dataclass(frozen=True)
class Proposal:
    """A candidate's source, and why. ``plan`` is set when it was written from one."""

    source: str
    message: str
    plan: Plan | None = None
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class NoProposal:
    """An attempt that came to nothing. ``exhausted``: this proposer has nothing more to offer for this brief."""

    reason: str
    cost: Cost = field(default_factory=Cost)
    exhausted: bool = False


class Proposer(Protocol):
    @property
    def name(self) -> str: ...

    def propose(self, brief: Brief) -> Proposal | NoProposal: ...
