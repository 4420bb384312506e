"""A forged engine against its peers on a CPU, in alternating blocks of one run: tokens a second, ratios, spread.

    python bench/cpu.py targets/nano-cpu.toml --engine engines/nano-cpu/engine.py --dtype fp32 --rounds 10
    python bench/cpu.py targets/nano-cpu.toml --engine FILE --dtype bf16 --litgpt-python PATH/bin/python --out FILE

Every contestant is a process of its own (bench/cpu_contestants.py) that holds its model and sleeps while another is on
the clock. Each round gives every contestant one block of steps, in an order that reverses from round to round. A
figure is the median over all timed steps; a ratio is taken round by round, so that a drift of the machine cancels, and
given with its quartiles. ``products`` is no trainer: the step's own matrix products alone, the floor of any.

The engine's process is set up as forgetrain sets up its own (forgetrain.numerics.runtime), the peers' as Python starts
them; with --same-runtime the peers get the engine's settings too, most of all its kept memory.

LitGPT's pins clash with those of the references: give the interpreter of an environment of its own, made by
``python -m venv DIR && DIR/bin/pip install torch==2.13.0 litgpt==0.5.13``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from forgetrain.engine.write import source_hash
from forgetrain.numerics.runtime import runtime
from forgetrain.spec.estimate import flops_per_token
from forgetrain.spec.target import Target, load_target

HERE = Path(__file__).resolve().parent
#: Contestant → (kind, mode). In bf16 all but megatron run pure and under autocast.
PEERS = {
    "megatron": ("megatron", "eager"),
    "transformers": ("transformers", "eager"),
    "transformers compiled": ("transformers", "compile"),
    "litgpt": ("litgpt", "eager"),
    "litgpt compiled": ("litgpt", "compile"),
    "textbook compiled": ("textbook", "compile"),
}


class Contestant:
    """A process that measures when told to."""

    def __init__(self, kind: str, python: str, settings: dict, runtime: dict[str, str], log: Path):
        command = [python, str(HERE / "cpu_contestants.py"), kind, json.dumps(settings)]
        self._log = log.open("a", encoding="utf-8")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, **runtime},
        )  # fmt: skip
        self.blocks: list[list[float]] = []
        self.facts = self._answer()

    def block(self, steps: int, *, timed: bool) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self._process.stdin.flush()
        times = self._answer()["ms"]
        if timed:
            self.blocks.append(times)

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
        raise SystemExit(f"a contestant ended early; see {self._log.name}")


def contestants(args: argparse.Namespace, target: Target) -> dict[str, Contestant]:
    """Name → process; peers in the engine's dtype, in bf16 also under autocast."""
    plain = target.plain()
    wanted = {"engine": ("engine", "eager", args.dtype, sys.executable)}
    for name in args.peers.split(","):
        kind, mode = PEERS[name]
        python = args.litgpt_python if kind == "litgpt" else sys.executable
        if python is None:
            continue
        wanted[name] = (kind, mode, args.dtype, python)
        if args.dtype == "bf16" and kind != "megatron":
            wanted[f"{name}, autocast"] = (kind, mode, "autocast", python)
    wanted["products"] = ("products", "eager", args.dtype, sys.executable)
    log = Path(args.log)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    held = {}
    for name, (kind, mode, dtype, python) in wanted.items():
        settings = {"target": plain, "engine": str(args.engine), "mode": mode, "dtype": dtype}
        ours = args.same_runtime or kind in ("engine", "products")
        held[name] = Contestant(kind, python, settings, runtime() if ours else {}, log)
    return held


def measure(args: argparse.Namespace) -> dict:
    target = load_target(args.target)
    held = contestants(args, target)
    for contestant in held.values():
        contestant.block(args.warm_up, timed=False)
    for number in range(args.rounds):
        for name in list(held) if number % 2 == 0 else reversed(held):
            held[name].block(1, timed=False)  # the caches are another's
            held[name].block(args.steps, timed=True)
    for contestant in held.values():
        contestant.close()
    return {
        "target": target.name,
        "dtype": args.dtype,
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "engine_sha256": source_hash(Path(args.engine).read_text(encoding="utf-8")),
        "threads": target.hardware.threads,
        "same_runtime": args.same_runtime,
        "rounds": args.rounds,
        "steps_a_block": args.steps,
        "contestants": {name: summary(held[name], held["engine"], target) for name in held},
    }


def summary(contestant: Contestant, ours: Contestant, target: Target) -> dict:
    """Medians in ms a step; ratio: its time over the engine's, round by round, with quartiles."""
    recipe, times = target.recipe, [t for block in contestant.blocks for t in block]
    step = statistics.median(times)
    rate = recipe.batch_size * recipe.sequence_length / step * 1e3
    pairs = zip(contestant.blocks, ours.blocks, strict=True)
    ratios = [statistics.median(theirs) / statistics.median(mine) for theirs, mine in pairs]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "step_ms": round(step, 1),
        "tokens_per_second": round(rate),
        "gflops_causal": round(rate * flops_per_token(target.model, recipe.sequence_length).causal / 1e9, 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)],
        "torch": contestant.facts["torch"],
        "blocks_ms": contestant.blocks,
    }


def show(result: dict) -> None:
    table = Table(
        title=f"{result['target']}, {result['dtype']}, {result['threads']} threads, {result['rounds']} rounds"
    )
    for column in ("contestant", "ms a step", "tokens/s", "GFLOP/s", "time over the engine's", "quartiles"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for name, found in sorted(result["contestants"].items(), key=lambda item: item[1]["step_ms"]):
        low, high = found["ratio_quartiles"]
        table.add_row(
            name, f"{found['step_ms']:.1f}", f"{found['tokens_per_second']:,}", f"{found['gflops_causal']:.0f}",
            f"{found['ratio']:.2f}", f"{low:.2f} to {high:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--peers", default=",".join(PEERS), help="separated by commas")
    parser.add_argument("--litgpt-python", help="the interpreter of an environment that holds litgpt")
    parser.add_argument("--same-runtime", action="store_true", help="the peers' processes set up as the engine's")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="timed steps a block")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before the first round; compilation is in them")
    parser.add_argument("--log", default="runs/bench-cpu.log")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    unknown = [name for name in args.peers.split(",") if name not in PEERS]
    if unknown:
        parser.error(f"--peers: no such peer: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    result = measure(args)
    show(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
