"""``forgetrain data``: building the tokens of a target, and looking at them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forgetrain.cli.common import DEFAULT_RUNS, Json, Overrides, RunsFolder, TargetFile, console, emit, read_target, say
from forgetrain.data.build import build_data
from forgetrain.data.folder import DataFolder, open_data
from forgetrain.data.progress import Display

if TYPE_CHECKING:
    from forgetrain.data.loader import Loader

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
        say(line)
    say(f"{seconds:,} s")
    emit(data.manifest | {"seconds": seconds, "folder": str(data.folder), "sha256": data.sha256}, as_json)


@app.command("inspect")
def inspect(
    target_file: TargetFile,
    step: Annotated[int, typer.Option(min=0, help="The step whose batch is shown, from 0.")] = 0,
    row: Annotated[int, typer.Option(min=0, help="The row of that batch.")] = 0,
    statistics: Annotated[bool, typer.Option("--statistics", help="Show facts of every source instead.")] = False,
    duplicates: Annotated[bool, typer.Option("--duplicates", help="Look for equal documents instead.")] = False,
    overrides: Overrides = None,
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Show what a row of a training step reads as, facts of the sources, or what is there twice."""
    from forgetrain.data import inspect as inspection  # these load torch
    from forgetrain.data.loader import Loader

    target = read_target(target_file, overrides)
    data = open_data(runs / target.name / "data", target)
    loader = Loader(data, target)
    result: dict[str, Any] = {}
    if statistics:
        result |= inspection.statistics(data, loader)
        _show(as_json, _statistics_lines(result))
    if duplicates:
        result["duplicates"] = found = inspection.duplicates(data)
        _show(as_json, _duplicates_lines(found))
    if not result:
        result = _row(data, loader, step, row)
        where = f"{result['stage']}, step {step}" if result["stage"] else f"step {step}"
        say(f"{where}, row {row}: window {result['window']} of {result['source']}, epoch {result['epoch']}")
        _show(as_json, [result["text"]])
    emit(result, as_json)


def _row(data: DataFolder, loader: Loader, step: int, row: int) -> dict[str, Any]:
    last = loader.stages[-1].last
    if step >= last:
        raise typer.BadParameter(f"the run has {last} steps", param_hint="--step")
    stage, places = loader.order.at(step)
    if row >= stage.batch_size:
        raise typer.BadParameter(f"the batch of that step has {stage.batch_size} rows", param_hint="--row")
    tokens = loader.batch_at(step).tokens[row].tolist()
    return {
        "stage": stage.name,
        "step": step,
        "row": row,
        "source": data.sources[int(places.source[row])].name,
        "epoch": int(places.epoch[row]),
        "window": int(places.window[row]),
        "tokens": tokens,
        "text": data.tokenizer.tokenizer.decode(tokens, skip_special_tokens=False),
    }


def _show(as_json: bool, lines: list[str]) -> None:
    """A result for people, on stdout where no JSON object is to be alone there."""
    if not as_json:
        print("\n".join(lines))


def _statistics_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for source in found["sources"]:
        lines.append(
            f"{source['source']}: {source['share']:.1%} of the run's windows, {source['epochs']:.2f} epochs, "
            f"{source['bytes_per_token']:.2f} bytes a token"
        )
        for name in ("train", "held_out"):
            split = source[name]
            common = ", ".join(f"{token['text']!r} {token['share']:.1%}" for token in split["commonest"])
            lines += [
                f"  {name}: {split['documents']:,} documents of {split['shortest']:,} to {split['longest']:,} tokens, "
                f"median {split['median']:,}, mean {split['mean']:,.0f}; {split['longer']:.1%} longer than a sequence",
                f"    {split['tokens']:,} tokens, {split['of_vocabulary']:.1%} of the vocabulary; commonest {common}",
            ]
    return lines


def _duplicates_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['copies']:,} of {found['documents']:,} documents are copies of others: {found['tokens']:,} tokens, "
        f"{found['share']:.2%}; {found['leaked']:,} held-out documents are trained on"
    ]
    for one in found["most"]:
        lines.append(f"  {one['times']:,} times, {one['tokens']:,} tokens, {one['source']}: {one['text']}")
    return lines


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
