"""What megatron-core did in a process of its own, for tests that compare it: one process for many targets.

    python -m tests.reference.megatron_runs FOLDER

writes for every case of ``CASES`` its taps and trajectory, and ``facts.json`` with what can only be seen from inside.
Importing this module imports no megatron-core.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from forgetrain.engine.contract import Shard, weight_hash
from forgetrain.numerics.compare import difference
from forgetrain.numerics.determinism import make_deterministic
from forgetrain.numerics.init import initial_weights
from forgetrain.reference import megatron
from forgetrain.reference.megatron_layout import from_megatron
from forgetrain.spec.target import Target
from tests.tiny import ARCHITECTURES, random_batch, tiny_target

#: (architecture, dtype, documents); megatron-core has no muP.
CASES = [
    *((name, dtype, "ignore") for name in ARCHITECTURES if name != "minicpm4" for dtype in ("fp32", "bf16")),
    ("minicpm5", "fp32", "mask"),
    ("qwen3", "bf16", "mask"),
]
STEPS = 3


def target_of(
    architecture: str = "minicpm5", dtype: str = "fp32", documents: str = "ignore", **reference: Any
) -> Target:
    return tiny_target(
        architecture,
        precision={"dtype": dtype},
        data={"documents": documents},
        reference={"name": "megatron", **reference},
    )


def reference_of(target: Target) -> megatron.Megatron:
    reference = megatron.build(target.plain(), device="cpu", precision=target.precision.dtype, mesh=None)
    reference.load(initial_weights(target.model, seed=1))
    return reference


def record(target: Target, stem: Path) -> None:
    """``stem``.safetensors: taps, numbered in the order in which they came; ``stem``.json: their names, the steps."""
    reference, batch = reference_of(target), random_batch(target, 3, documents=True)
    taps = [(name, tensor.clone()) for name, tensor in reference.probe(batch)]
    save_file({str(i): tensor.contiguous() for i, (_, tensor) in enumerate(taps)}, stem.with_suffix(".safetensors"))
    steps = []
    for step in range(STEPS):
        result = reference.step(random_batch(target, 10 + step, documents=True), 1e-2)
        steps.append([*(float(value) for value in result), weight_hash(reference.state())])
    found = {"names": [name for name, _ in taps], "steps": steps, "loss": float(reference.loss(batch))}
    stem.with_suffix(".json").write_text(json.dumps(found))


def facts() -> dict[str, Any]:
    """What the contract asks for besides numbers, seen from inside."""
    target = target_of("qwen3", "bf16")
    reference, batch = reference_of(target), random_batch(target, 3)
    taken = from_megatron(target.model, {name: p.detach() for name, p in reference.gpt.named_parameters()})
    weights = initial_weights(target.model, seed=1)
    loaded = all(torch.equal(taken[name], weights[name].bfloat16()) for name in weights)
    reference.step(batch, 1e-2)
    before = copied(reference.state())
    list(reference.probe(batch))
    untouched = same(before, reference.state())
    reference.step(batch, 1e-2)
    after = copied(reference.state())
    refused = reference.step(batch._replace(mask=batch.mask * float("inf")), 1e-2)
    unmoved = same(after, reference.state())
    fresh = megatron.build(target.plain(), device="cpu", precision="bf16", mesh=None)
    fresh.restore(before)
    fresh.step(batch, 1e-2)
    return {
        "shimmed": getattr(torch.cuda.current_device, "is_shim", False),
        "the compiler was imported": "torch._inductor.compile_fx" in sys.modules,
        "loaded": loaded,
        "a probe leaves the state": untouched,
        "an infinite norm was applied": bool(refused.applied),
        "an infinite norm moves nothing": unmoved,
        "a restored run goes on": same(after, fresh.state()),
        "updates": int(after["step"].tensor),
    }


def copied(state: dict[str, Shard]) -> dict[str, Shard]:
    return {name: Shard(s.tensor.clone(), s.global_shape, s.offsets) for name, s in state.items()}


def same(one: dict[str, Shard], other: dict[str, Shard]) -> bool:
    return one.keys() == other.keys() and all(difference(one[k].tensor, other[k].tensor) is None for k in one)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    make_deterministic(threads=2, device="cpu")
    for case in CASES:
        record(target_of(*case), folder / "-".join(case))
    record(target_of(distributed_optimizer=True), folder / "distributed")
    (folder / "facts.json").write_text(json.dumps(facts()))
