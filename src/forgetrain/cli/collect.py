"""``forgetrain collect``: run the reference, judge it, and keep what it did."""

from __future__ import annotations

import typer
from rich.text import Text

from forgetrain.cli.common import (
    DEFAULT_RUNS,
    Json,
    Overrides,
    RunsFolder,
    TargetFile,
    console,
    emit,
    read_target,
    say,
    stages,
)


def command(
    target_file: TargetFile, overrides: Overrides = None, runs: RunsFolder = DEFAULT_RUNS, as_json: Json = False
) -> None:
    """Run the reference twice, check it against the float64 oracle, and write the golden record."""
    from forgetrain.forge.collect import ReferenceRejected, check_reference, collect

    target = read_target(target_file, overrides)
    check_reference(target)  # before the progress bar, so that a refusal is one line
    folder = runs / target.name / "golden"
    try:
        with stages() as report:
            record = collect(target, folder, report)
    except ReferenceRejected as rejected:
        console.print(Text.assemble(("G0 failed", "red"), f" {rejected}"), soft_wrap=True)
        emit({"golden": None, "verdicts": [rejected.verdict.as_dict()]}, as_json)
        raise typer.Exit(1) from None
    verdict = record.manifest["verdicts"][0]
    console.print(Text.assemble(("G0 passed", "green"), f" {verdict['explanation']}"), soft_wrap=True)
    say(f"golden record: {folder}")
    emit({"golden": str(folder), "environment": record.manifest["environment"], "verdicts": [verdict]}, as_json)
