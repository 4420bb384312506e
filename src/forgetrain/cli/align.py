"""``forgetrain align``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forgetrain.cli.common import (
    DEFAULT_RUNS,
    Json,
    Overrides,
    RunsFolder,
    TargetFile,
    emit,
    read_target,
    say,
    stages,
)
from forgetrain.errors import UserError

if TYPE_CHECKING:
    from forgetrain.engine.plan import Plan


def command(
    target_file: TargetFile,
    engine: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Diagnose this engine file, without changing it.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start from this plan, for example one found at fewer layers.")
    ] = None,
    golden: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A golden record. Default: RUNS/<target>/golden, made if needed.")
    ] = None,
    overrides: Overrides = None,
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Build an engine that equals the reference bit for bit, or say where an engine leaves it."""
    # these load torch, the references' adapters and the judge, which other commands do without
    from forgetrain.forge.align import align, alignable, diagnose
    from forgetrain.forge.collect import ReferenceRejected, open_named, open_or_collect

    target = read_target(target_file, overrides)
    start = None if plan is None else _starting_plan(plan, engine)
    if engine is not None and not engine.is_file():
        raise UserError("no such engine file", file=engine, remedy="name an engine's .py file")
    alignable(target)
    folder = runs / target.name

    try:
        with stages() as report:
            if golden is not None:
                record = open_named(target, golden)
            else:
                record = open_or_collect(target, folder / "golden", report, say)
            if engine is None:
                result = align(target, folder / "engine", record, start=start, report=report, say=say)
            else:
                result = diagnose(target, engine, record, report=report)
    except ReferenceRejected as rejected:
        say(f"G0 failed: {rejected}")
        emit({"passed": False, "verdicts": [rejected.verdict.as_dict()]}, as_json)
        raise typer.Exit(1) from None
    for verdict in result.verdicts:
        say(f"{verdict.gate} {'passed' if verdict.passed else 'FAILED'}: {verdict.explanation}")
    if result.plan is not None:
        say(f"{len(result.attempts)} attempts in {result.seconds:.0f} s; {result.engine}")
    emit(result.as_dict(), as_json)
    if engine is not None and result.broken is not None:
        raise UserError(result.broken, file=engine, remedy="see docs/engine-contract.md")
    if not result.passed:
        raise typer.Exit(1)


def _starting_plan(file: Path, engine: Path | None) -> Plan:
    from forgetrain.engine.plan import Plan

    if engine is not None:
        raise UserError("starts a search, and --engine asks for none", key="--plan", remedy="leave one of them out")
    plan = Plan.read(file)
    if plan["schedule"] != "explicit":
        remedy = "name a plan that forgetrain align wrote"
        raise UserError("cannot be aligned", file=file, key="schedule", value=plan["schedule"], remedy=remedy)
    return plan
