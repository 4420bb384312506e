"""Loss curves of a forged engine, megatron-core and transformers, trained on the same tokens by ``forgetrain train``.

    printf 'schedule = "production"\nrope_tables = "fp32"\n' > plan.toml
    forgetrain engine write targets/nano-cpu.toml --plan plan.toml --out engine.py
    python bench/curves.py targets/nano-cpu.toml --engine engine.py --runs DIR recipe.steps=2000 hardware.threads=1

Every contestant is the shipped command in a folder of its own, on a copy of the same data: the forged engine with each
of --seeds, and both references with the first of them. A run that was interrupted goes on; one that is finished is
taken as it is, so the command can be given again. From the journals come one picture (--picture, an SVG) and, with
--out, the held-out losses as JSON: where each ended, the seeds' mean and range, whether the references lie within.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from curves_picture import REFERENCES, draw

from forgetrain.engine.write import source_hash
from forgetrain.spec.target import load_target
from forgetrain.train.metrics import read_journal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("overrides", nargs="*", help="of the target, KEY=VALUE")
    parser.add_argument("--engine", required=True, help="the forged engine's file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--picture", type=Path, help="the SVG to write")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--at", type=int, help="compare at this evaluation, taking the runs as far as they are")
    options = parser.parse_intermixed_args()
    name = load_target(options.target, options.overrides).name
    contestants = [(f"forged-seed-{seed}", options.engine, seed) for seed in options.seeds]
    contestants += [(reference, reference, options.seeds[0]) for reference in REFERENCES]
    if options.at is None:
        make_data(options, name, [label for label, _, _ in contestants])
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda contestant: train(options, name, *contestant), contestants))
    folders = {label: options.runs / label / name / "train" for label, _, _ in contestants}
    lines = {label: read_journal(folder / "metrics.jsonl") for label, folder in folders.items()}
    if options.at is not None:
        lines = {label: [line for line in journal if line["step"] <= options.at] for label, journal in lines.items()}
    result = compare(lines, options)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.write_text(draw(lines, title=name), encoding="utf-8")


def make_data(options: argparse.Namespace, name: str, labels: list[str]) -> None:
    """The same data folder for every contestant: built once, then copied."""
    first = options.runs / labels[0]
    if not (first / name / "data" / "manifest.json").is_file():
        forgetrain("data", "build", options.target, "--runs", first, *(f"--set={o}" for o in options.overrides))
    for label in labels[1:]:
        folder = options.runs / label / name / "data"
        if not folder.exists():
            shutil.copytree(first / name / "data", folder)


def train(options: argparse.Namespace, name: str, label: str, engine: str, seed: int) -> None:
    folder = options.runs / label
    if (folder / name / "train" / "summary.json").is_file():
        return
    forgetrain(
        *("train", options.target, *options.overrides, f"recipe.seed={seed}", "--engine", engine, "--unverified"),
        *("--runs", folder, "--resume"), log=folder / "log.txt",
    )  # fmt: skip


def forgetrain(*words: object, log: Path | None = None) -> None:
    command = [sys.executable, "-m", "forgetrain", *map(str, words)]
    if log is None:
        subprocess.run(command, check=True)
        return
    with log.open("a", encoding="utf-8") as file:
        subprocess.run(command, check=True, stdout=file, stderr=file)


def compare(lines: dict[str, list[dict]], options: argparse.Namespace) -> dict:
    """Held-out losses of the last evaluation, nats a token, and where the references lie in the seeds' spread."""
    last = {label: [line for line in journal if "held_out_loss" in line][-1] for label, journal in lines.items()}
    steps = {line["step"] for line in last.values()}
    if len(steps) > 1:
        raise SystemExit(f"the runs' last evaluations are at different steps: {sorted(steps)}; use --at")
    ends = {label: line["held_out_loss"] for label, line in last.items()}
    seeds = [loss for label, loss in ends.items() if label not in REFERENCES]
    same = ends[next(iter(ends))]
    return {
        "target": options.target,
        "overrides": options.overrides,
        "engine_sha256": source_hash(Path(options.engine).read_text(encoding="utf-8")),
        "step": steps.pop(),
        "held_out_loss": ends,
        "seeds": {
            "mean": statistics.mean(seeds),
            "standard_deviation": statistics.stdev(seeds) if len(seeds) > 1 else None,
            "range": [min(seeds), max(seeds)],
        },
        "difference_from_forged_same_seed": {label: ends[label] - same for label in REFERENCES},
        "within_range_of_seeds": {label: min(seeds) <= ends[label] <= max(seeds) for label in REFERENCES},
    }


if __name__ == "__main__":
    main()
