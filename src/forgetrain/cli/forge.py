"""``forgetrain forge``: collect, align, then a faster engine, attempt after attempt, until the budget is spent."""

from __future__ import annotations

import importlib.util
import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forgetrain.cli.common import DEFAULT_RUNS, Json, Overrides, RunsFolder, TargetFile, console, emit, read_target, say
from forgetrain.cli.run import Shown
from forgetrain.errors import UserError

if TYPE_CHECKING:
    from forgetrain.forge.proposers.base import Proposer


class Executor(StrEnum):
    LOCAL = "local"
    RAY = "ray"


def command(
    target_file: TargetFile,
    agent: Annotated[
        str | None, typer.Option(metavar="COMMAND", help='A coding agent that writes candidates, as "claude -p".')
    ] = None,
    api: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model behind an OpenAI-compatible API that writes them.")
    ] = None,
    base_url: Annotated[str | None, typer.Option(metavar="URL", help="Where that API is.")] = None,
    prices: Annotated[
        tuple[float, float],
        typer.Option(metavar="IN OUT", help="Dollars for a million tokens in and out, for the budget."),
    ] = (0.0, 0.0),
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Elect a stranger's candidate that no sandbox held.")
    ] = False,
    executor: Annotated[
        Executor, typer.Option(help="Where candidates are judged: this machine, or the nodes of a Ray cluster.")
    ] = Executor.LOCAL,
    overrides: Overrides = None,
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Make the target's engine faster under gates; the budget is in the target's search section. Killed, it goes on."""
    if agent is not None and api is not None:
        raise UserError("cannot go together", key="--agent, --api", remedy="choose one")
    if api is None and (base_url is not None or prices != (0.0, 0.0)):
        raise UserError("is for --api", key="--base-url, --prices", remedy="add --api MODEL")
    if not all(0 <= price < math.inf for price in prices):
        raise UserError("is no price", key="--prices", value=prices, remedy="give dollars for a million tokens")
    target, ray = read_target(target_file, overrides), executor is Executor.RAY
    if api is not None and target.search.dollars > 0 and max(prices) == 0:
        remedy = "add --prices IN OUT, or leave search.dollars out"
        raise UserError("cannot be counted without prices", key="search.dollars", remedy=remedy)
    # these load torch, the references' adapters and the judge, which other commands do without
    from forgetrain.forge.begin import open_loop
    from forgetrain.forge.proposers.agent import Agent
    from forgetrain.forge.proposers.api import Api
    from forgetrain.pipeline import prepare
    from forgetrain.report.forge import write_forge_report

    if ray and importlib.util.find_spec("ray") is None:
        raise UserError("Ray is not installed", key="--executor", remedy="run pip install 'forgetrain[ray]'")
    proposer: Proposer | None = Agent(agent) if agent else Api(api, base_url=base_url, prices=prices) if api else None
    prepared = prepare(target, runs, Shown(console, stages=3))
    if not prepared.passed:
        emit(prepared.as_dict(), as_json)
        raise typer.Exit(1)
    with open_loop(target, runs, proposer, say=say, allow_unsandboxed=allow_unsandboxed, on_cluster=ray) as loop:
        outcome = loop.run()
        report = write_forge_report(target, loop.ledger, runs / target.name / "forge.html")
    say(f"{outcome.ended}. {outcome.attempts} attempts, {outcome.elections} elected")
    if outcome.folder is not None:
        say(f"champion {outcome.champion[:12]}, {outcome.gain:.3f} times the aligned engine: {outcome.folder}")
    say(f"report: {report}")
    emit({**outcome.as_dict(), "report": str(report)}, as_json)
    if outcome.verified is False:
        raise typer.Exit(1)


def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An engine file.")],
    target_file: Annotated[Path, typer.Option("--target", metavar="TARGET", help="The target that it is for.")],
    message: Annotated[str, typer.Option(help="What it changes, and why that should be faster.")] = "submitted",
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Elect it where no sandbox held it.")
    ] = False,
    overrides: Overrides = None,
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Bring an engine of your own: judged as any candidate, and elected if it is right and faster."""
    from forgetrain.forge.begin import open_loop
    from forgetrain.forge.proposers.base import Proposal
    from forgetrain.pipeline import prepare

    target = read_target(target_file, overrides)
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", file=file, remedy="name an engine's .py file") from None
    prepared = prepare(target, runs, Shown(console, stages=3))
    if not prepared.passed:
        emit(prepared.as_dict(), as_json)
        raise typer.Exit(1)
    with open_loop(target, runs, say=say, allow_unsandboxed=allow_unsandboxed) as loop:
        outcome = loop.submit(Proposal(source, message))
    emit(outcome.as_dict(), as_json)
    if not outcome.ended.startswith("elected"):
        raise typer.Exit(1)
