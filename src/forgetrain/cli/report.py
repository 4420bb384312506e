"""``forgetrain report``: what forging a target came to, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forgetrain.cli.common import DEFAULT_RUNS, Json, Overrides, RunsFolder, TargetFile, emit, read_target, say
from forgetrain.errors import UserError


def command(
    target_file: TargetFile,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it; default: RUNS/<target>/forge.html.")
    ] = None,
    overrides: Overrides = None,
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Write one HTML page of the ledger: speeds, verdicts, where the time goes, the champion's source."""
    from forgetrain.judge.ledger import Ledger  # these load torch
    from forgetrain.report.forge import write_forge_report

    target = read_target(target_file, overrides)
    path = out or runs / target.name / "forge.html"
    if out is not None and not out.resolve().parent.is_dir():
        raise UserError("its folder does not exist", file=out, remedy="make the folder first")
    with Ledger(runs / "ledger", create=False) as ledger:
        write_forge_report(target, ledger, path)
    say(str(path))
    emit({"report": str(path)}, as_json)
