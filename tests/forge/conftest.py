"""A golden record of a tiny target and the reference that made it, shared by a module's tests."""

from __future__ import annotations

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
def collected(tmp_path_factory) -> Iterator[Callable[[str], Collected]]:
    """By dtype; each is collected once for the whole run of the tests."""
    made: dict[str, Collected] = {}
    with ExitStack() as running:

        def of(dtype: str) -> Collected:
            if dtype not in made:
                target = tiny_target(precision={"dtype": dtype}, reference={"name": "megatron"})
                gates = target.at_gates_shape()
                record = collect(target, tmp_path_factory.mktemp(dtype) / "golden")
                reference = running.enter_context(start_reference(gates))
                made[dtype] = Collected(target, gates, record, golden_truth(record, gates), reference)
            return made[dtype]

        yield of
