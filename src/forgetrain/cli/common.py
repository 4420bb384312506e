"""What the commands share: option types, console output, and the JSON object that ends every ``--json`` run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from forgetrain.spec.target import Target, load_target

#: Progress and prose go to stderr, so that stdout carries results (and with --json one object, last).
#: Square brackets in paths and in what proposers write are text, not markup, and numbers in them are no highlights.
console = Console(stderr=True, markup=False, highlight=False)

TargetFile = Annotated[Path, typer.Argument(metavar="TARGET", help="A target file, for example targets/nano-cpu.toml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, for example recipe.lr=3e-4.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object last.")]
RunsFolder = Annotated[Path, typer.Option("--runs", help="Where runs are kept.")]

DEFAULT_RUNS = Path("runs")


def say(line: str, style: str | None = None) -> None:
    """A line as it is: only a terminal breaks it."""
    console.print(line, style=style, soft_wrap=True)


def read_target(path: Path, overrides: list[str] | None) -> Target:
    return load_target(path, overrides or ())


@contextmanager
def stages() -> Iterator[Callable[[str, float], None]]:
    """Gives a function that is told the stage that begins and the share of the work that is done. A terminal shows both
    as a bar that goes when all is done; a log file gets a line with the time for each stage."""
    if not console.is_terminal:
        began, last = time.monotonic(), ""

        def write(stage: str, share: float) -> None:
            nonlocal last
            if stage != last:
                last = stage
                say(f"{time.monotonic() - began:5.0f} s  {stage}")

        yield write
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # takes a moment, and few need it

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda stage, share: progress.update(task, description=stage, completed=share)


def emit(result: dict[str, Any], as_json: bool) -> None:
    """Prints the result object when ``--json`` was given; commands print their prose themselves."""
    if as_json:
        print(json.dumps(result, default=str))
