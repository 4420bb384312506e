"""``forgetrain target``: drawing a target from a Hugging Face model, and showing one with all its defaults."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from forgetrain.cli.common import Json, Overrides, TargetFile, emit, read_target, say
from forgetrain.errors import UserError
from forgetrain.spec.estimate import parameters
from forgetrain.spec.hf import target_from_hf
from forgetrain.spec.toml import to_toml

app = typer.Typer(help="Make a target, and look at one.", no_args_is_help=True)


@app.command("new")
def new(
    from_hf: Annotated[Path, typer.Option("--from-hf", metavar="DIR", help="A folder with a model's config.json.")],
    name: Annotated[str | None, typer.Option(help="The target's name. Default: the folder's.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The file. Default: targets/<name>.toml.")] = None,
    hardware: Annotated[str, typer.Option(help="The hardware it is for.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Draw a target from a Hugging Face model's config.json."""
    drawn = target_from_hf(from_hf, name=name, hardware=hardware)
    target = drawn.target
    file = out or Path("targets") / f"{target.name}.toml"
    if file.exists() and not force:
        raise UserError("already exists", file=file, remedy="add --force to write over it, or name another with --out")
    if not file.resolve().parent.is_dir():
        raise UserError(
            "its folder does not exist", file=file, remedy="make the folder first, or name a file with --out"
        )
    count = parameters(target.model)
    comment = (
        f"{target.model.architecture.capitalize()} architecture, from {from_hf.name or 'a model'}'s config.json: "
        f"{count.total:,} parameters.\nThe recipe is a usual one and no part of that file: make it yours."
    )
    text = to_toml(target, comment=comment, defaults=False)
    temporary = file.with_name(f".{file.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    say(f"{file}: {target.model.architecture}, {count.total:,} parameters")
    if drawn.unread:
        say(f"keys that were not read: {', '.join(drawn.unread)}", style="yellow")
    emit({"file": str(file), "parameters": count.total, "unread": drawn.unread, "target": target.plain()}, as_json)


@app.command("show")
def show(target_file: TargetFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show a target with every default written out."""
    target = read_target(target_file, overrides)
    if not as_json:
        print(to_toml(target), end="")
    emit(target.plain(), as_json)
