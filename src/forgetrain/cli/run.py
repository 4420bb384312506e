"""``forgetrain run``: the main job, from the reference to a reply of the trained model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from forgetrain.cli.common import DEFAULT_RUNS, Json, Overrides, RunsFolder, TargetFile, console, emit, read_target, say


def command(
    target_file: TargetFile,
    prompt: Annotated[str | None, typer.Option(help="What the trained model goes on with.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Take nothing from earlier runs of this target.")] = False,
    search: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="How long to look for a faster engine, at most; 0: not at all."),
    ] = 60.0,
    overrides: Overrides = None,
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Collect, align, forge, train, export, and a reply: the whole way, with a table of what was proved."""
    # these load torch and the references' adapters, which other commands do without
    from forgetrain.pipeline import PROMPT, STAGES, run_target
    from forgetrain.report.run import write_report

    target = read_target(target_file, overrides)
    shown = Shown(console, stages=len(STAGES) - (search == 0))
    outcome = run_target(
        target, runs, shown, prompt=PROMPT if prompt is None else prompt, restart=restart, search=search
    )
    outcome.places["report"] = str(write_report(outcome.as_dict(), outcome.folder))
    _summary(outcome)
    emit(outcome.as_dict(), as_json)
    if not outcome.passed:
        raise typer.Exit(1)


class Shown:
    """A watcher for a terminal: one bar a stage, with its name, what it does, and how long it still takes. Without a
    terminal, one line when a stage begins and one when it ends."""

    def __init__(self, console: Console, stages: int):
        self.console, self._stages = console, stages
        self._number = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[_Bar]:
        from forgetrain.pipeline import STAGES

        self._number += 1
        heading = Text.assemble((f"{self._number}/{self._stages} {name}", "bold"), f"  {STAGES[name]}")
        self.console.print(heading, soft_wrap=True)
        columns = (TextColumn("  {task.description}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn())
        with Progress(
            *columns,
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as progress:
            yield _Bar(progress, progress.add_task("", total=1.0))

    def say(self, line: str) -> None:
        self.console.print(f"  {line}", soft_wrap=True)


class _Bar:
    def __init__(self, progress: Progress, task: TaskID):
        self._progress, self._task = progress, task

    def __call__(self, what: str, share: float) -> None:
        self._progress.update(self._task, description=what, completed=share)

    def own_display(self) -> None:
        self._progress.stop()


def _summary(outcome) -> None:
    proofs = Table(box=box.SIMPLE_HEAD, title="What was proved", title_justify="left", title_style="bold")
    proofs.add_column("", width=4)
    proofs.add_column("claim", ratio=2)
    proofs.add_column("evidence", ratio=3)
    for proof in outcome.proofs:
        proofs.add_row(Text("yes", "green") if proof.passed else Text("NO", "red"), proof.what, proof.evidence)
    console.print(proofs)
    places = Table(box=box.SIMPLE_HEAD, title="Where things are", title_justify="left", title_style="bold")
    places.add_column("what")
    places.add_column("where", overflow="fold")
    for what, where in outcome.places.items():
        places.add_row(what, where)
    console.print(places)
    whole = {name: math.ceil(seconds) for name, seconds in outcome.stages.items()}
    parts = " + ".join(f"{name} {seconds} s" for name, seconds in whole.items())
    say(f"{parts} = {sum(whole.values())} s")
    if outcome.stopped:
        say(f"stopped after {outcome.stopped}", style="red")
    reply = outcome.findings.get("reply")
    if reply:
        say("\nThe model goes on:", style="bold")
        say(reply["prompt"] + reply["text"])
