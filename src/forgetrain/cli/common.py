"""What the commands share: option types, console output, and the JSON object that ends every ``--json`` run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from forgetrain.spec.target import Target, load_target

#: Progress and prose go to stderr, so that stdout carries results (and with --json one object, last).
console = Console(stderr=True)

TargetFile = Annotated[Path, typer.Argument(metavar="TARGET", help="A target file, for example targets/nano-cpu.toml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, for example recipe.lr=3e-4.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object last.")]
RunsFolder = Annotated[Path, typer.Option("--runs", help="Where runs are kept.")]

DEFAULT_RUNS = Path("runs")


def read_target(path: Path, overrides: list[str] | None) -> Target:
    return load_target(path, overrides or ())


def emit(result: dict[str, Any], as_json: bool) -> None:
    """Prints the result object when ``--json`` was given; commands print their prose themselves."""
    if as_json:
        print(json.dumps(result, default=str))
