"""Engine against peers on one GPU, in alternating blocks of one run: tokens a second, MFU, memory, ratios.

    python bench/hopper.py minicpm5-1b-h200 --peers megatron --rounds 4 --out engines/minicpm5-1b-h200/measurements
    python bench/hopper.py minicpm5-1b-h200-fp8 --choose attention_library=flash4 --peers megatron --apart

Every contestant is a process of its own (bench/hopper_contestants.py) that holds its model and waits. Each round gives
every contestant one block: untimed steps, then ``--steps`` timed ones, in an order that reverses from round to round.
Data are random tokens. A figure is the median over all timed steps; a ratio is taken round by round, so that a drift of
the GPU's clock cancels, and given with the least and the largest. An fp8 engine has no MFU, since its products have two
peaks; the share of its floor is what products and causal attention take at their peaks over what a step takes. With
``--plan`` or ``--choose`` the engine is written first, of the hopper schedule unless the plan says otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hopper_contestants import refusal

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import source_hash, write_engine
from forgetrain.spec.estimate import flops_per_token, roofline
from forgetrain.spec.hardware import hardware_of
from forgetrain.spec.target import Target, load_target

ROOT = Path(__file__).resolve().parent.parent
LABELS = {
    "engine": "ForgeTrain",
    "megatron": "Megatron-core + Transformer Engine",
    "liger": "transformers + Liger, pure bf16",
    "liger-autocast": "transformers + Liger, autocast",
    "compile": "transformers + torch.compile, autocast",
    "torchtitan": "torchtitan, compiled, autocast",
}

PEERS = set(LABELS) - {"engine"}  # whose products are bf16's


class Contestant:
    """A process that measures when told to."""

    def __init__(self, name: str, target: Target, engine: Path, rows: int, micro_batches: int, log: Path):
        self.name = name
        engine = Path(name) if name.endswith(".py") else engine
        kind = "engine" if name.endswith(".py") else name
        command = [sys.executable, str(ROOT / "bench" / "hopper_contestants.py"), kind]
        settings = {"target": target.plain(), "engine": str(engine), "rows": rows, "micro_batches": micro_batches}
        self._log = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [*command, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.facts = self._answer()

    def block(self, steps: int) -> dict:
        return self.ask({"do": "block", "steps": steps})

    def ask(self, request: dict) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended early; see {self._log.name}")


def measure(args: argparse.Namespace) -> dict:
    """Runs the rounds; what is known is written after each of them."""
    target = load_target(ROOT / "targets" / f"{args.target}.toml", args.overrides)
    names = ["engine", *(args.peers.split(",") if args.peers else [])]
    for name in names:
        if not name.endswith(".py") and (line := refusal(name, target.plain())):
            raise SystemExit(f"bench/hopper.py: {line}")
    args.out.mkdir(parents=True, exist_ok=True)
    engine = args.engine or ROOT / "engines" / args.target / "engine.py"
    if args.plan or args.choose:
        engine = args.out / f"{args.target}.py"
        plan = Plan.read(args.plan) if args.plan else Plan({"schedule": "hopper"})
        for choice in args.choose:
            key, _, name = choice.partition("=")
            plan = plan.with_choice(key, name)
        engine.write_text(write_engine(target, plan), encoding="utf-8")
    blocks: dict[str, list[dict]] = {name: [] for name in names}
    held: dict[str, Contestant] = {}

    def contestant(name: str) -> Contestant:
        log = args.out / f"{Path(name).stem}.log"
        return held.get(name) or Contestant(name, target, engine, args.micro_batch, args.micro_batches, log)

    result = {
        "target": target.name,
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "engine_sha256": source_hash(engine.read_text(encoding="utf-8")),
        "micro_batch": args.micro_batch,
        "micro_batches": args.micro_batches,
        "sequence_length": target.recipe.sequence_length,
        "order": "blocks alternate, reversed every round",
        "apart": args.apart,
    }
    facts: dict[str, dict] = {}
    for number in range(args.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            running = contestant(name)
            blocks[name].append(running.block(args.steps))
            facts[name] = running.facts
            if args.apart:
                running.close()
            else:
                held[name] = running
        result["contestants"] = {name: {**facts[name], **summary(name, blocks[name], target, args)} for name in names}
        result["ratios"] = {name: ratio(blocks["engine"], blocks[name]) for name in names[1:]}
        write(result, args)
    if args.profile:
        held["engine"] = contestant("engine")
        result["profile"] = held["engine"].ask({"do": "profile"})
        write(result, args)
    for running in held.values():
        running.close()
    return result


def write(result: dict, args: argparse.Namespace) -> None:
    name = f"{args.target}-{args.micro_batch}x{args.micro_batches}.json"
    (args.out / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def shares(rate: float, target: Target, fp8: bool) -> dict[str, float]:
    """MFU as shares of bf16's peak in both conventions; in fp8 the share of the floor."""
    if fp8:
        roof, recipe = roofline(target), target.recipe
        floor = (roof.products + roof.attention) / (recipe.batch_size * recipe.sequence_length)
        return {"floor_share": round(rate * floor, 4)}
    flops = flops_per_token(target.model, target.recipe.sequence_length)
    peak = hardware_of(target.hardware).peak("bf16")
    return {"mfu_causal": round(rate * flops.causal / peak, 4), "mfu_full": round(rate * flops.full / peak, 4)}


def summary(name: str, blocks: list[dict], target: Target, args: argparse.Namespace) -> dict:
    """Times in milliseconds, a step."""
    times = [t for block in blocks for t in block["ms"]]
    median = statistics.median(times)
    tokens = args.micro_batch * args.micro_batches * target.recipe.sequence_length
    rate = tokens / median * 1e3
    fp8 = target.precision.dtype == "fp8" and name not in PEERS
    return {
        "step_ms": round(median, 2),
        "step_ms_range": [round(min(times), 2), round(max(times), 2)],
        "micro_batch_ms": round(median / args.micro_batches, 2),
        "tokens_per_second": round(rate),
        **shares(rate, target, fp8),
        "peak_gib": max(block["peak_gib"] for block in blocks),
        "megahertz": [block["megahertz"] for block in blocks],
        "watts": [block["watts"] for block in blocks],
        "blocks_ms": [block["ms"] for block in blocks],
        "loss": blocks[-1]["loss"],
        "grad_norm": blocks[-1]["grad_norm"],
    }


def ratio(ours: list[dict], theirs: list[dict]) -> dict:
    """Their time over ours, round by round."""
    pairs = zip(theirs, ours, strict=True)
    found = [statistics.median(t["ms"]) / statistics.median(o["ms"]) for t, o in pairs]
    return {
        "median": round(statistics.median(found), 4),
        "range": [round(min(found), 4), round(max(found), 4)],
        "rounds": len(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a file's name in targets/, without .toml")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="changes the target"
    )
    parser.add_argument("--engine", type=Path, help="default: engines/TARGET/engine.py")
    parser.add_argument("--plan", type=Path, help="write the engine from this plan.toml")
    parser.add_argument("--choose", action="append", default=[], metavar="KEY=NAME", help="a choice of the plan")
    parser.add_argument("--peers", default="", help="peers or engine files, separated by commas")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a block")
    parser.add_argument("--apart", action="store_true", help="a new process for each block: what does not fit together")
    parser.add_argument("--profile", action="store_true", help="list the engine's kernels over one step")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for result.json and the logs")
    args = parser.parse_args()
    result = measure(args)
    for name, found in result["contestants"].items():
        low, high = found["step_ms_range"]
        share = f"{found['floor_share']:.2%} of the floor" if "floor_share" in found else ""
        share = share or f"MFU {found['mfu_causal']:.2%} causal {found['mfu_full']:.2%} full"
        print(
            f"{LABELS.get(name, name):36} {found['micro_batch_ms']:8.2f} ms a micro-batch, "
            f"step {found['step_ms']:.1f} ms ({low:.1f} to {high:.1f}), {found['tokens_per_second']:,} tokens/s, "
            f"{share}, {found['peak_gib']} GiB, "
            f"loss {found['loss']:.4f}"
        )
    for name, found in result["ratios"].items():
        low, high = found["range"]
        print(f"engine against {LABELS.get(name, name)}: {found['median']:.4f}x ({low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
