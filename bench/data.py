"""Data: tokenising against megatron-core and datatrove, what the loader gives, and what a build holds in memory.

    python bench/data.py tokenise --rounds 3 --datatrove-python DIR/bin/python
    python bench/data.py loader
    python bench/data.py memory

The text is Python source: the files of the standard library with its tests, one record of a JSONL file each, again
and again until the file is as large as asked for. The tokenizer is one that ``forgetrain data build`` trains on the
standard library. Every contestant (bench/data_contestants.py) is a process of its own with as many workers; rounds
reverse their order. Seconds of all cores that a contestant used are given too: on a busy machine they say more.

datatrove's pins clash with ours: give the interpreter of an environment of its own, made by
``python -m venv DIR && DIR/bin/pip install datatrove==0.10.1 orjson tokenizers``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from forgetrain.data.build import build_data
from forgetrain.data.indexed import TokenWriter
from forgetrain.data.loader import Loader
from forgetrain.spec.target import Target, load_target

HERE = Path(__file__).resolve().parent
#: 20 times what one engine on an H200 eats, about 100,000 tokens a second.
WANTED = 2e6


def write_lines(path: Path, megabytes: float) -> None:
    """Records of Python files until the file has that many MB."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in root.rglob("*.py") if "site-packages" not in file.parts)
    size = 0
    with path.open("w", encoding="utf-8") as out:
        while size < megabytes * 1e6:
            for file in files:
                text = file.read_bytes().decode("utf-8", errors="ignore")
                if text.strip() and size < megabytes * 1e6:
                    size += out.write(json.dumps({"text": text}) + "\n")


def split_lines(path: Path, folder: Path, parts: int) -> None:
    folder.mkdir()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    share = -(-len(lines) // parts)
    for part in range(parts):
        text = "".join(lines[part * share : (part + 1) * share])
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")


def with_data(target: Target, source: Path, tokenizer: Path, documents: str = "ignore") -> Target:
    plain = target.plain()
    plain["data"] = {"sources": [{"path": str(source)}], "tokenizer": str(tokenizer), "documents": documents}
    return Target.model_validate(plain)


def run(name: str, python: str, job: dict) -> dict:
    shutil.rmtree(job["out"], ignore_errors=True)
    Path(job["out"]).mkdir()
    command = [python, str(HERE / "data_contestants.py"), name, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def tokenise(args: argparse.Namespace, folder: Path, target: Target, tokenizer: Path) -> None:
    file = folder / "text.jsonl"
    write_lines(file, args.megabytes)
    split_lines(file, folder / "parts", args.workers)
    job = {
        "file": str(file), "parts": str(folder / "parts"), "tokenizer": str(tokenizer), "workers": args.workers,
        "out": str(folder / "out"), "target": with_data(target, file, tokenizer).plain(),
    }  # fmt: skip
    pythons = {"forgetrain": sys.executable, "megatron": sys.executable, "datatrove": args.datatrove_python}
    found: dict[str, list[dict]] = {name: [] for name, python in pythons.items() if python}
    for number in range(args.rounds):
        for name in list(found) if number % 2 == 0 else reversed(found):
            found[name].append(run(name, pythons[name], job))
    size = file.stat().st_size / 1e6
    table = Table(title=f"{size:.0f} MB of JSONL, {args.workers} workers, {args.rounds} rounds")
    for column in (
        "contestant",
        "seconds (range)",
        "MB/s",
        "core seconds",
        "tokens",
        "time over forgetrain's",
        "cores'",
    ):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for name, rounds in found.items():
        seconds = [one["seconds"] for one in rounds]
        middle, tokens = statistics.median(seconds), rounds[0]["tokens"]
        pairs = list(zip(rounds, found["forgetrain"], strict=True))
        ratio, cores = (
            statistics.median(theirs[key] / ours[key] for theirs, ours in pairs) for key in ("seconds", "core_seconds")
        )
        used = statistics.median(one["core_seconds"] for one in rounds)
        table.add_row(
            name, f"{middle:.1f} ({min(seconds):.1f} to {max(seconds):.1f})", f"{size / middle:.2f}", f"{used:.1f}",
            f"{tokens:,}", f"{ratio:.2f}", f"{cores:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)


def loader(args: argparse.Namespace, folder: Path, target: Target, tokenizer: Path) -> None:
    """Tokens a second, and a second of one core, of ``Loader.batches`` at several shapes; documents of about 700."""
    draw = np.random.default_rng(0)
    with TokenWriter(folder / "tokens", target.model.vocab_size) as writer:
        for _ in range(50):
            lengths = draw.integers(100, 1300, 1400)
            writer.extend(draw.integers(0, target.model.vocab_size, int(lengths.sum())), lengths)
    table = Table(title=f"loader, {writer.tokens:,} tokens on disk, wanted {WANTED:,.0f} a second")
    for column in ("documents", "batch", "sequence", "tokens/s", "tokens per core second", "of what is wanted"):
        table.add_column(column, justify="right")
    for documents in ("ignore", "mask"):
        aimed = with_data(target, folder / "tokens", tokenizer, documents)
        data = build_data(aimed, folder / documents)
        for rows, length in ((4, 256), (64, 4096), (8, 32768)):
            shape = {"batch_size": rows, "micro_batch_size": 1, "sequence_length": length}
            model = {"max_position_embeddings": max(length, target.model.max_position_embeddings)}
            sized = aimed.model_copy(
                update={
                    "recipe": aimed.recipe.model_copy(update=shape), "model": aimed.model.model_copy(update=model)
                }
            )  # fmt: skip
            batches = Loader(data, sized).batches(0, 10**9)
            next(batches)
            steps, began, used = 0, time.monotonic(), time.process_time()
            while time.monotonic() - began < args.seconds:
                next(batches)
                steps += 1
            tokens = steps * rows * length
            rate, core = tokens / (time.monotonic() - began), tokens / (time.process_time() - used)
            batches.close()
            table.add_row(
                documents, f"{rows}", f"{length:,}", f"{rate:,.0f}", f"{core:,.0f}", f"{core / WANTED:.1f}"
            )  # fmt: skip
    Console(width=110).print(table)


def memory(args: argparse.Namespace, folder: Path, target: Target, tokenizer: Path) -> None:
    """Peak memory of a build of a small and of a larger file."""
    table = Table(title=f"peak memory of a build, {args.workers} workers")
    for column in ("JSONL", "tokens", "main process", "largest worker"):
        table.add_column(column, justify="right")
    for megabytes in (8.0, args.megabytes):
        file = folder / f"{megabytes}.jsonl"
        write_lines(file, megabytes)
        job = {
            "workers": args.workers, "out": str(folder / "out"), "target": with_data(target, file, tokenizer).plain()
        }  # fmt: skip
        found = run("forgetrain", sys.executable, job)
        table.add_row(
            f"{megabytes:.0f} MB",
            f"{found['tokens']:,}",
            f"{found['self_mib']} MiB",
            f"{found['largest_child_mib']} MiB",
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tokenise", "loader", "memory"))
    parser.add_argument("--target", default="targets/nano-cpu.toml")
    parser.add_argument("--megabytes", type=float, default=24.0, help="of JSONL; tokenise and memory")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape of the loader")
    parser.add_argument("--datatrove-python", help="the interpreter of an environment that holds datatrove")
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json; trained when left out")
    args = parser.parse_args()
    target = load_target(args.target)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = args.tokenizer or build_data(target, folder / "first").tokenizer.folder
        {"tokenise": tokenise, "loader": loader, "memory": memory}[args.what](args, folder, target, tokenizer)


if __name__ == "__main__":
    main()
