"""``forgetrain engine``: engines as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forgetrain.cli.common import Json, Overrides, TargetFile, emit, read_target, say
from forgetrain.durable import write_text
from forgetrain.errors import UserError

app = typer.Typer(help="Engines as files.", no_args_is_help=True)


@app.callback()
def engine() -> None:
    """Engines as files."""


@app.command("write")
def write(
    target_file: TargetFile,
    plan: Annotated[Path, typer.Option("--plan", metavar="PLAN", help="A plan.toml, as forgetrain align writes one.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file to write. Default: standard output.")
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write the engine of a plan as one flat file that needs torch alone."""
    from forgetrain.engine.plan import Plan  # these load torch
    from forgetrain.engine.write import source_hash, write_engine

    target = read_target(target_file, overrides)
    source = write_engine(target, Plan.read(plan))
    if out is None:
        if not as_json:
            print(source, end="")
    else:
        if out.suffix != ".py" or out.is_dir():
            raise UserError("is no name for an engine file", file=out, remedy="name a file that ends in .py")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, source)
        say(f"{out}: {len(source.splitlines())} lines, sha256 {source_hash(source)}")
    result = {"engine": None if out is None else str(out), "sha256": source_hash(source)}
    emit(result | ({"source": source} if out is None else {}), as_json)
