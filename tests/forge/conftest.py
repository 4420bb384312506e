"""Golden records of tiny targets, and the references that made them, shared by tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from forgetrain.engine.plan import Plan
from forgetrain.engine.process import EngineProcess
from forgetrain.engine.write import write_engine
from forgetrain.forge.align import golden_truth
from forgetrain.forge.collect import collect, start_reference
from forgetrain.forge.truth import Truth
from forgetrain.golden.record import GoldenRecord
from forgetrain.spec.target import Target
from tests.shared import shared
from tests.tiny import tiny_target

#: The plan that equals megatron-core 0.16.1 bit for bit.
MEGATRON = Plan(
    {
        "token_order": "sequence",
        "qkv": "grouped",
        "gate_up": "fused",
        "norm_order": "megatron",
        "rmsnorm": "torch",
        "qk_norm": "torch",
        "rope_tables": "fp32",
        "rope": "megatron",
        "attention": "megatron",
        "swiglu": "torch",
        "cross_entropy": "megatron",
        "accumulate": "zeros",
        "clip": "megatron",
        "adamw": "torch",
        "embedding": "torch",
        "residual": "scaled",
    }
)


@dataclass(frozen=True)
class Collected:
    """gates: the target at the gates' shape. reference: running."""

    target: Target
    gates: Target
    record: GoldenRecord
    truth: Truth
    reference: EngineProcess

    def engine(self, folder: Path, *changes: tuple[str, str]) -> Path:
        """An engine that equals the reference, with passages of its source replaced."""
        source = write_engine(self.target, MEGATRON)
        for old, new in changes:
            assert source.count(old) >= 1, f"the engine does not say {old!r}"
            source = source.replace(old, new)
        path = folder / "engine.py"
        path.write_text(source, encoding="utf-8")
        return path


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> Callable[[Target], GoldenRecord]:
    """A target's golden record, collected once for the whole run of the tests: by the first worker that asks, while
    others that ask for the same one wait."""

    def of(target: Target) -> GoldenRecord:
        name = f"record-{hashlib.sha256(target.model_dump_json().encode()).hexdigest()[:16]}"
        with shared(tmp_path_factory, name) as folder:
            return GoldenRecord.open(folder) if folder.is_dir() else collect(target, folder)

    return of


@pytest.fixture(scope="session")
def collected(recorded) -> Iterator[Callable[[str], Collected]]:
    """By dtype."""
    made: dict[str, Collected] = {}
    with ExitStack() as running:

        def of(dtype: str) -> Collected:
            if dtype not in made:
                target = tiny_target(precision={"dtype": dtype}, reference={"name": "megatron"})
                gates = target.at_gates_shape()
                record = recorded(target)
                reference = running.enter_context(start_reference(gates))
                made[dtype] = Collected(target, gates, record, golden_truth(record, gates), reference)
            return made[dtype]

        yield of
