"""``forgetrain collect``: run the reference, judge it, and keep what it did."""

from __future__ import annotations

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from forgetrain.cli.common import DEFAULT_RUNS, Json, Overrides, RunsFolder, TargetFile, console, emit, read_target


def command(
    target_file: TargetFile, overrides: Overrides = None, runs: RunsFolder = DEFAULT_RUNS, as_json: Json = False
) -> None:
    """Run the reference twice, check it against the float64 oracle, and write the golden record."""
    from forgetrain.forge.collect import ReferenceRejected, check_reference, collect

    target = read_target(target_file, overrides)
    check_reference(target)  # before the progress bar, so that a refusal is one line
    folder = runs / target.name / "golden"
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("starting", total=1.0)
            record = collect(
                target, folder, lambda stage, done: progress.update(task, description=stage, completed=done)
            )
    except ReferenceRejected as rejected:
        console.print(f"[red]G0 failed[/red] {rejected}")
        emit({"golden": None, "verdicts": [rejected.verdict.as_dict()]}, as_json)
        raise typer.Exit(1) from None
    verdict = record.manifest["verdicts"][0]
    console.print(f"[green]G0 passed[/green] {verdict['explanation']}")
    console.print(f"golden record: {folder}")
    emit({"golden": str(folder), "environment": record.manifest["environment"], "verdicts": [verdict]}, as_json)
