"""An engine's gradients against the float64 oracle, beside those of the textbook engine: one step of the full model.

    python bench/hopper_oracle.py targets/minicpm5-1b-h200.toml --engine engines/minicpm5-1b-h200/engine.py

Relative RMS error of the clipped gradients, read from the first moments after one step from zero, pooled over layers by
kind of tensor, in bf16 and in fp32; and whether two runs of the step give the same bits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetrain.engine.contract import Batch, make_batch
from forgetrain.engine.plan import Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.numerics.init import initial_weights
from forgetrain.numerics.oracle import OracleStep, oracle_step
from forgetrain.spec.target import Target, load_target

LR = 1e-3


def kind(name: str) -> str:
    """A parameter's name without its layer."""
    return name.split(".", 3)[3] if name.startswith("model.layers.") else name


def moments(
    file: Path, target: Target, weights: dict[str, Tensor], batch: Batch, device: str, precision: str
) -> tuple[dict[str, Tensor], float, float]:
    """First moments, loss and gradient norm after one step from zero."""
    engine = load_engine(file).build(target.plain(), device=device, precision=precision, mesh=None)
    engine.load(weights)
    result = engine.step(batch, LR)
    state = {name: shard.tensor.clone() for name, shard in engine.state().items() if name.startswith("exp_avg/")}
    return state, float(result.loss), float(result.grad_norm)


def errors(state: dict[str, Tensor], truth: OracleStep, beta1: float) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for name, wanted in truth.clipped.items():
        found = state[f"exp_avg/{name}"].to(wanted.device).double() / (1 - beta1)
        pooled = sums.setdefault(kind(name), [0.0, 0.0])
        pooled[0] += float((found - wanted).square().sum())
        pooled[1] += float(wanted.square().sum())
    return {name: (error / size) ** 0.5 for name, (error, size) in sums.items()}


def compare(target: Target, engine: Path, device: str) -> dict[str, Any]:
    weights = {name: tensor.to(device) for name, tensor in initial_weights(target.model, 1).items()}
    shape = (target.recipe.batch_size, target.recipe.sequence_length + 1)
    generator = torch.Generator(device).manual_seed(5)
    tokens = torch.randint(0, target.model.vocab_size, shape, device=device, generator=generator)
    batch = make_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        textbook = Path(folder) / "textbook.py"
        textbook.write_text(write_engine(target, Plan.textbook()), encoding="utf-8")
        for precision in (target.precision.dtype, "fp32"):
            kept = target.precision.kept if precision != "fp32" else "fp32"
            truth = oracle_step(target, weights, batch, LR, precision=kept, device=device)
            torch.cuda.empty_cache()  # of the oracle's float64 activations
            for name, file in (("engine", engine), ("textbook", textbook)):
                state, loss, norm = moments(file, target, weights, batch, device, precision)
                found[f"{name} {precision}"] = {
                    "kinds": errors(state, truth, target.recipe.beta1),
                    "loss": [loss, float(truth.loss)],
                    "norm": [norm, float(truth.grad_norm)],
                }
                if name == "engine":
                    again = moments(file, target, weights, batch, device, precision)[0]
                    same = sum(torch.equal(again[key], tensor) for key, tensor in state.items())
                    found[f"twice {precision}"] = {"bit_equal": same, "of": len(state)}
                torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="changes the target"
    )
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024, help="positions of each of the two rows")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="a JSON file for the errors")
    args = parser.parse_args()
    shape = ["recipe.batch_size=2", "recipe.micro_batch_size=1", f"recipe.sequence_length={args.length}"]
    target = load_target(args.target, [*args.overrides, *shape])
    found, dtype = compare(target, args.engine, args.device), target.precision.dtype
    for name in found[f"engine {dtype}"]["kinds"]:
        columns = []
        for precision in (dtype, "fp32"):
            ours, plain = (found[f"{who} {precision}"]["kinds"][name] for who in ("engine", "textbook"))
            columns.append(f"{precision} {ours:.2e} / {plain:.2e} = {ours / plain:.3f}")
        print(f"{name:36} {'   '.join(columns)}")
    print(f"two runs: {found[f'twice {dtype}']} in {dtype}, {found['twice fp32']} in fp32")
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
