"""Which of cuBLASLt's algorithms each product of the hopper schedule should take, measured on this GPU.

    python bench/hopper_products.py minicpm5-1b-h200 --plan engines/minicpm5-1b-h200/plan.toml

Every product of a micro-batch runs with every algorithm that cuBLASLt proposes, alone and long enough for the GPU to
settle at its power limit, which is where training runs: an algorithm that wins at one clock can lose there, because it
takes more energy. The first proposal is kept unless another is faster by more than ``--margin``. Writes the ranks into
the plan.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from forgetrain.engine.plan import Plan
from forgetrain.ops.cuda.linear import prepared, product_
from forgetrain.spec.model import Model
from forgetrain.spec.target import load_target

ROOT = Path(__file__).resolve().parent.parent


def products(model: Model, tokens: int) -> dict[str, tuple[tuple, bool]]:
    """Plan key → (out, a, b, whether it adds to out), on random data."""
    heads, groups, width = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    hidden, inner = model.hidden_size, model.intermediate_size
    shapes = {
        "qkv": ((heads + 2 * groups) * width, hidden),
        "o": (hidden, heads * width),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "head": (model.vocab_size, hidden),
    }
    found = {}
    for name, (outputs, inputs) in shapes.items():
        x, weight, d_y = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        )
        y, d_x = torch.empty_like(d_y), torch.empty_like(x)
        grad = torch.zeros(outputs, inputs, device="cuda")
        found[f"rank_{name}_forward"] = ((y, x, weight.t()), False)
        found[f"rank_{name}_input_grad"] = ((d_x, d_y, weight), False)
        found[f"rank_{name}_weight_grad"] = ((grad, d_y.t(), x), True)
    return found


def timed(tensors: tuple, adds: bool, rank: int, repeats: int) -> float:
    """Milliseconds of one product, the mean over ``repeats`` in a row."""
    out, a, b = tensors
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        product_(out, a, b, rank, accumulate=adds)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def measure(tensors: tuple, adds: bool, seconds: float) -> list[float]:
    """Milliseconds of each proposal at the power limit; infinite for those far behind in a short trial."""
    out, a, b = tensors
    sizes, strides = (a.shape[0], b.shape[1], a.shape[1]), (a.stride(), b.stride(), out.stride())
    ranks = range(len(prepared(sizes, strides, out.dtype)[2]))
    trial = [min(timed(tensors, adds, rank, 2) for _ in range(4)) for rank in ranks]
    found = [math.inf] * len(trial)
    for rank in ranks:
        if rank == 0 or trial[rank] < 1.12 * min(trial):
            repeats = max(4, int(seconds * 1e3 / trial[rank] / 2))
            timed(tensors, adds, rank, repeats)  # the clock settles
            found[rank] = timed(tensors, adds, rank, repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a file's name in targets/, without .toml")
    parser.add_argument("--plan", type=Path, required=True, help="the plan into which the ranks go")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each algorithm of a product")
    parser.add_argument("--margin", type=float, default=0.01, help="what another than the first must gain")
    parser.add_argument("--out", type=Path, help="a JSON file for the times")
    args = parser.parse_args()
    target, plan, log = load_target(ROOT / "targets" / f"{args.target}.toml"), Plan.read(args.plan), {}
    tokens = args.micro_batch * target.recipe.sequence_length
    for key, (tensors, adds) in products(target.model, tokens).items():
        times = measure(tensors, adds, args.seconds)
        best = min(range(len(times)), key=times.__getitem__)
        best = best if times[best] < times[0] * (1 - args.margin) else 0
        out, a, _ = tensors
        rate = 2 * out.numel() * a.shape[1] / 1e9
        plan = plan.with_choice(key, str(best))
        shown = [round(t, 4) if t < math.inf else None for t in times]
        log[key] = {"rank": best, "ms": shown, "tflops": round(rate / times[best], 1)}
        print(
            f"{key:28} rank {best}: {times[best]:.4f} ms, {rate / times[best]:.0f} TFLOP/s; first {rate / times[0]:.0f}"
        )
    args.plan.write_text(plan.toml(), encoding="utf-8")
    if args.out is not None:
        args.out.write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
