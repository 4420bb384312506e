"""Runs the red team against the judge, on a model small enough for a process a second.

    for outcome in attack_all(ATTACKS): print(outcome.attack.name, outcome.caught_by, outcome.as_expected)

The reference is a written engine's file, so nothing but torch is needed: the textbook's, with torch's clipping, whose
1e-6 beside the norm Megatron and transformers have as well. The same target serves every attack: the recipe's shape
differs from the gates', so that an engine may tell them apart; it warms up for longer than the gates train, so that
their trainings are as slow as they ever are; and the machine that it may use is small, so that one that exhausts it is
stopped early.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.errors import UserError
from forgetrain.gates.verdict import Verdict
from forgetrain.judge.runner import KNOWN_GOOD, Effort, Judge
from forgetrain.judge.sandbox import sandbox
from forgetrain.redteam import deceit, escape, numerics, race, situation
from forgetrain.redteam.attack import Attack
from forgetrain.spec.target import Target, parse_target

ATTACKS: tuple[Attack, ...] = (
    *numerics.ATTACKS,
    *deceit.ATTACKS,
    *situation.ATTACKS,
    *race.ATTACKS,
    *escape.ATTACKS,
)
FAMILIES = tuple(dict.fromkeys(attack.family for attack in ATTACKS))

#: Plans of honest engines, which must all be accepted in fp32 and in bf16.
HONEST: dict[str, dict[str, str]] = {
    "textbook": {},
    "known good": KNOWN_GOOD,
    "torch's own functions": {
        "rmsnorm": "torch",
        "swiglu": "torch",
        "cross_entropy": "torch",
        "attention": "sdpa",
        "clip": "torch",
        "adamw": "torch",
    },
    "grouped, summed in another order": {"qkv": "grouped", "gate_up": "fused", "norm_order": "huggingface"},
    "production": {"schedule": "production"},
}

REFERENCE = {"clip": "torch"}

EFFORT = Effort(pairs=5, steps=3, warm_up=2, timeout=20.0, keep=True)
#: Seconds for an answer of an honest engine, which may have regions to compile.
COMPILING = 300.0


def red_target(dtype: str) -> Target:
    return parse_target(
        {
            "name": f"redteam-{dtype}",
            "model": {
                "hidden_size": 32,
                "intermediate_size": 80,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "vocab_size": 96,
                "max_position_embeddings": 64,
            },
            "recipe": {
                "batch_size": 4,
                "micro_batch_size": 2,
                "sequence_length": 32,
                "steps": 3000,
                "warmup_steps": 2000,
                "lr": 3e-3,
            },
            "gates": {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 16, "g5_steps": 16},
            "precision": {"dtype": dtype},
            "hardware": {"threads": 1, "memory_gib": 3.0},
        }
    )


@dataclass(frozen=True)
class Outcome:
    """caught_by: the first verdict that failed, or None when the engine was accepted. seconds: of the judging."""

    attack: Attack
    caught_by: Verdict | None
    seconds: float

    @property
    def as_expected(self) -> bool:
        if self.caught_by is None:
            return False
        return self.caught_by.gate in self.attack.gate.split(" or ") and self.attack.says in self.caught_by.explanation


class RedTeam:
    """A judge for each dtype, and the honest engine that attacks are made from.

    Raises UserError where bubblewrap does not work: some attacks would do to this machine what they mean to do."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forgetrain-redteam-")
        self._judges: dict[str, Judge] = {}

    def __enter__(self) -> RedTeam:
        return self

    def __exit__(self, *_: object) -> None:
        for judge in self._judges.values():
            judge.close()
        self._folder.cleanup()

    def attack(self, attack: Attack) -> Outcome:
        judge, honest = self._judge(attack.dtype)
        path = Path(self._folder.name) / "attack.py"
        path.write_text(attack.source(honest.read_text(encoding="utf-8")), encoding="utf-8")
        began = time.monotonic()
        result = judge.judge(path, champion=honest if attack.races else None, gates=attack.gates)
        return Outcome(attack, result.first_failure(), time.monotonic() - began)

    def honest(self, plan: str, dtype: str) -> tuple[Verdict | None, float]:
        """The first verdict that failed, which is none, and seconds."""
        judge, _ = self._judge(dtype)
        path = Path(self._folder.name) / "honest.py"
        path.write_text(write_engine(red_target(dtype), Plan(HONEST[plan])), encoding="utf-8")
        judge.effort = replace(EFFORT, timeout=COMPILING)
        began = time.monotonic()
        failed = judge.judge(path).first_failure()
        judge.effort = EFFORT
        return failed, time.monotonic() - began

    def _judge(self, dtype: str) -> tuple[Judge, Path]:
        honest = Path(self._folder.name) / f"textbook-{dtype}.py"
        if dtype not in self._judges:
            target = red_target(dtype)
            box = sandbox(honest, target)
            if not box.sandboxed:
                raise UserError(f"the red team runs in the sandbox only, {box.description}", remedy="see docs/judge.md")
            reference = honest.with_name(f"reference-{dtype}.py")
            for file, plan in ((honest, Plan.textbook()), (reference, Plan(REFERENCE))):
                file.write_text(write_engine(target, plan), encoding="utf-8")
            self._judges[dtype] = Judge(target, reference=reference, effort=EFFORT)
        return self._judges[dtype], honest


def attack_all(attacks: Iterable[Attack] = ATTACKS) -> Iterator[Outcome]:
    """One after the other: G7 needs the machine for itself."""
    with RedTeam() as team:
        for attack in attacks:
            yield team.attack(attack)
