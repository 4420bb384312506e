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
from typing import NamedTuple

import torch
from torch import Tensor

from forgetrain.engine.plan import Plan
from forgetrain.ops.cuda.fp8 import Fp8
from forgetrain.ops.cuda.fp8_block import empty_squares, quantise_spans, quantise_squares_
from forgetrain.ops.cuda.fp8_tensor import find_largest_, quantise
from forgetrain.ops.cuda.largest import SLOTS
from forgetrain.ops.cuda.linear import prepared, product_
from forgetrain.spec.model import Model
from forgetrain.spec.target import Precision, load_target

ROOT = Path(__file__).resolve().parent.parent


class Product(NamedTuple):
    """What ``product_`` takes, but the rank."""

    out: Tensor
    a: Tensor
    b: Tensor
    adds: bool
    units: tuple[Tensor, Tensor] | None = None
    fast: bool = False
    modes: tuple[int, int] = (0, 0)


def products(model: Model, tokens: int, precision: Precision) -> dict[str, Product]:
    """Plan key → product, on random data; all but the head's in fp8 if asked for."""
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
        if precision.dtype == "fp8" and name != "head":
            x8, w8, d8 = by_blocks(x, weight, d_y) if precision.scaling == "block" else by_tensors(x, weight, d_y)
            modes, fast = (x8.mode, w8.mode), precision.scaling == "tensor"
            turned = d8.turned_unit, x8.turned_unit
            found |= {
                f"rank_{name}_forward": Product(y, x8.rows, w8.rows.t(), False, (x8.unit, w8.unit), fast, modes),
                f"rank_{name}_input_grad": Product(
                    d_x, d8.rows, w8.turned.t(), False, (d8.unit, w8.turned_unit), False, modes
                ),
                f"rank_{name}_weight_grad": Product(
                    grad, d8.turned, x8.turned.t(), True, turned, False, (d8.mode, x8.mode)
                ),
            }
        else:
            found[f"rank_{name}_forward"] = Product(y, x, weight.t(), False)
            found[f"rank_{name}_input_grad"] = Product(d_x, d_y, weight, False)
            found[f"rank_{name}_weight_grad"] = Product(grad, d_y.t(), x, True)
    return found


def by_tensors(x: Tensor, weight: Tensor, d_y: Tensor) -> tuple[Fp8, ...]:
    largest = (torch.zeros(SLOTS, dtype=torch.int32, device="cuda") for _ in range(3))
    return tuple(quantise(y, find_largest_(y, next(largest)), gradient=y is d_y) for y in (x, weight, d_y))


def by_blocks(x: Tensor, weight: Tensor, d_y: Tensor) -> tuple[Fp8, ...]:
    squares = quantise_squares_(weight[None], empty_squares((1, *weight.shape), "cuda"))
    return quantise_spans(x), squares.part(0), quantise_spans(d_y)


def timed(product: Product, rank: int, repeats: int) -> float:
    """Milliseconds of one product, the mean over ``repeats`` in a row."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        product_(product.out, product.a, product.b, rank, 1.0, *product[3:])
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def measure(product: Product, seconds: float) -> list[float]:
    """Milliseconds of each proposal at the power limit; infinite for those far behind in a short trial."""
    out, a, b = product[:3]
    sizes, strides = (a.shape[0], b.shape[1], a.shape[1]), (a.stride(), b.stride(), out.stride())
    ranks = range(len(prepared(sizes, strides, (a.dtype, b.dtype, out.dtype), product.fast, product.modes)[2]))
    trial = [min(timed(product, rank, 2) for _ in range(4)) for rank in ranks]
    found = [math.inf] * len(trial)
    for rank in ranks:
        if rank == 0 or trial[rank] < 1.12 * min(trial):
            repeats = max(4, int(seconds * 1e3 / trial[rank] / 2))
            timed(product, rank, repeats)  # the clock settles
            found[rank] = timed(product, rank, repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a file's name in targets/, without .toml")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="changes the target"
    )
    parser.add_argument("--plan", type=Path, required=True, help="the plan into which the ranks go")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each algorithm of a product")
    parser.add_argument("--margin", type=float, default=0.01, help="what another than the first must gain")
    parser.add_argument("--out", type=Path, help="a JSON file for the times")
    args = parser.parse_args()
    target = load_target(ROOT / "targets" / f"{args.target}.toml", args.overrides)
    plan, log = Plan.read(args.plan), {}
    tokens = args.micro_batch * target.recipe.sequence_length
    for key, product in products(target.model, tokens, target.precision).items():
        times = measure(product, args.seconds)
        best = min(range(len(times)), key=times.__getitem__)
        best = best if times[best] < times[0] * (1 - args.margin) else 0
        rate = 2 * product.out.numel() * product.a.shape[1] / 1e9
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
