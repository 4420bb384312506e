"""``forgetrain train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from forgetrain.cli.common import DEFAULT_RUNS, Json, Overrides, RunsFolder, console, emit, read_target, say
from forgetrain.cli.plan import plan_table
from forgetrain.durable import read_object, sha256_file
from forgetrain.errors import UserError
from forgetrain.spec.target import Target, parse_target

RECORD = Path("train") / "run.json"


def command(
    target_file: Annotated[
        Path, typer.Argument(metavar="TARGET", help="A target file; with --resume also a run's folder, RUNS/<target>.")
    ],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, the same as --set KEY=VALUE.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="An engine file, or megatron or transformers. Default: the aligned engine."),
    ] = None,
    unverified: Annotated[bool, typer.Option("--unverified", help="Take an engine that no gate has passed.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint, if any.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw the run's checkpoints away and start.")] = False,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Stop after this step, with a checkpoint.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything before the first step and print the plan.")
    ] = False,
    init_from: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Start from the weights of a Hugging Face model's folder.")
    ] = None,
    profile_steps: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Profile these steps: a Chrome trace and a table by op.")
    ] = None,
    overrides: Overrides = None,
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Train a target with its engine; also under torchrun, one process a rank."""
    from forgetrain.publish.initial import check_initial  # these load torch
    from forgetrain.train.loop import train
    from forgetrain.train.profile import parse_steps
    from forgetrain.train.stop import exit_code
    from forgetrain.train.world import first_rank

    if resume and restart:
        raise UserError("cannot go together", key="--resume, --restart", remedy="choose one")
    profiled = None if profile_steps is None else parse_steps(profile_steps)
    target, runs = _target(target_file, [*(overrides or []), *(words or [])], runs, resume)
    if target_file.is_dir() and engine is None:
        engine, unverified = _engine_of(target_file)
    try:
        summary = train(
            target,
            runs=runs,
            engine=engine,
            unverified=unverified,
            resume=resume,
            restart=restart,
            stop_after=stop_after,
            dry_run=dry_run,
            profile_steps=profiled,
            init_from=init_from,
            check_initial=check_initial,
            console=console,
        )
    except KeyboardInterrupt:  # a second Ctrl-C, with which typer ends without a word
        if first_rank():
            say("stopped at once by a second SIGINT, without a checkpoint; go on from the last one with --resume")
        raise typer.Exit(exit_code("SIGINT")) from None
    if first_rank():
        _tell(summary, dry_run)
        emit(summary, as_json)
    if not dry_run and summary["interrupted"]:
        raise typer.Exit(exit_code(summary["interrupted"]))


def _tell(summary: dict[str, Any], dry_run: bool) -> None:
    if dry_run:
        console.print(plan_table(summary))
    elif summary["finished"]:
        say(
            f"trained {summary['steps']} steps in {summary['seconds']:.0f} s; held-out loss "
            f"{summary['held_out_loss']:.4f}, unigram {summary['unigram_loss']:.4f}; {summary['checkpoint']}"
        )
    else:
        why = summary["interrupted"] or "--stop-after"
        say(f"stopped by {why} after step {summary['steps']}, saved in {summary['checkpoint']}; go on with --resume")


def _engine_of(run: Path) -> tuple[str | None, bool]:
    """The engine that a run's folder says it was trained with, as --engine and --unverified name it; None for the
    folder's own, which are found without being named."""
    facts = read_object(run / RECORD, "name the target file instead", engine=dict)["engine"]
    name, sha256 = facts["name"], facts["sha256"]
    if sha256 is None:
        return name.rpartition(".")[2], False
    file = Path(name)
    if file.resolve().is_relative_to(run.resolve()):
        return None, False
    if not file.is_file() or sha256_file(file) != sha256:
        what = "was changed since" if file.is_file() else "is not there"
        raise UserError(
            f"the engine of this run {what}", file=file, remedy="put it back, or name another with --engine"
        )
    return name, facts["status"].startswith("unverified")


def _target(path: Path, overrides: list[str] | None, runs: Path, resume: bool) -> tuple[Target, Path]:
    """The target, from its file, or from the run's folder, which holds it resolved."""
    if not path.is_dir():
        return read_target(path, overrides), runs
    record = path / RECORD
    if not resume:
        raise UserError("is a folder", file=path, remedy="name a target file, or add --resume to go on with that run")
    if overrides:
        raise UserError("a run's folder is resumed as it was", file=path, remedy="name the target file to use --set")
    target = parse_target(read_object(record, "name the target file instead", target=dict)["target"], file=record)
    if target.name != path.resolve().name:
        raise UserError(f"is the run of {target.name}", file=path, remedy=f"rename the folder to {target.name}")
    return target, path.resolve().parent
