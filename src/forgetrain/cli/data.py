"""``forgetrain data``: building the tokens of a target, and looking at them."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from forgetrain.cli.common import DEFAULT_RUNS, Json, Overrides, RunsFolder, TargetFile, console, emit, read_target
from forgetrain.data.build import build_data
from forgetrain.data.folder import DataFolder, open_data
from forgetrain.data.loader import Loader
from forgetrain.data.progress import Display
from forgetrain.train.display import say

app = typer.Typer(help="Build a target's tokens, and look at them.", no_args_is_help=True)


@app.command("build")
def build(
    target_file: TargetFile,
    overrides: Overrides = None,
    runs: RunsFolder = DEFAULT_RUNS,
    force: Annotated[bool, typer.Option("--force", help="Build again, even when nothing changed.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that tokenise; as many as there are cores when left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn the target's sources into tokens, under RUNS/<target>/data."""
    target = read_target(target_file, overrides)
    began = time.monotonic()
    with Display(console) as display:
        data = build_data(target, runs / target.name / "data", force=force, workers=workers, report=display.show)
    seconds = round(time.monotonic() - began, 2)
    for line in _lines(data):
        say(console, line)
    say(console, f"{seconds:,} s")
    emit(data.manifest | {"seconds": seconds, "folder": str(data.folder), "sha256": data.sha256}, as_json)


@app.command("inspect")
def inspect(
    target_file: TargetFile,
    step: Annotated[int, typer.Option(min=0, help="The step whose batch is shown, from 0.")] = 0,
    row: Annotated[int, typer.Option(min=0, help="The row of that batch.")] = 0,
    overrides: Overrides = None,
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Show what a row of a training step reads as."""
    target = read_target(target_file, overrides)
    data = open_data(runs / target.name / "data", target)
    loader = Loader(data, target)
    stage, places = loader.order.at(step)
    if row >= stage.batch_size:
        raise typer.BadParameter(f"the batch of that step has {stage.batch_size} rows", param_hint="--row")
    epoch, window = int(places.epoch[row]), int(places.window[row])
    tokens = loader.batch_at(step).tokens[row].tolist()
    source = data.sources[int(places.source[row])]
    text = data.tokenizer.tokenizer.decode(tokens, skip_special_tokens=False)
    where = f"{stage.name}, step {step}" if stage.name else f"step {step}"
    say(console, f"{where}, row {row}: window {window} of {source.name}, epoch {epoch}")
    if not as_json:
        print(text)
    place = {"source": source.name, "epoch": epoch, "window": window}
    emit({"stage": stage.name, "step": step, "row": row, **place, "tokens": tokens, "text": text}, as_json)


def _lines(data: DataFolder) -> list[str]:
    lines = []
    for entry in data.manifest["sources"]:
        rejects = ", ".join(f"{count} {reason}" for reason, count in entry["rejects"].items()) or "none"
        lines.append(
            f"{entry['path']}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, {entry['tokens']:,} tokens, "
            f"of which {entry['held_out']['tokens']:,} held out; rejected: {rejects}"
        )
    unigram = data.manifest["unigram_loss"]["held_out"]
    lines.append(f"unigram loss of the held-out tokens {unigram:.4f}; in {data.folder}")
    return lines
