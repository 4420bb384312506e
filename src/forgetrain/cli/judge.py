"""``forgetrain judge``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forgetrain.cli.common import DEFAULT_RUNS, Json, Overrides, RunsFolder, emit, read_target, say
from forgetrain.durable import read_object, sha256_file, write_json
from forgetrain.errors import UserError
from forgetrain.gates.verdict import Verdict, require_verdicts

if TYPE_CHECKING:
    from forgetrain.judge.runner import Judgement
    from forgetrain.spec.target import Target

RECORD = "verdicts.json"


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An engine file.")],
    target_file: Annotated[Path, typer.Option("--target", metavar="TARGET", help="The target that it is for.")],
    champion: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An engine file that must be beaten in speed.")
    ] = None,
    bitwise: Annotated[
        bool, typer.Option("--bitwise", help="It must equal the reference bit for bit: G1 to G3 instead of G4 to G6.")
    ] = False,
    gates: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Only these gates, for example G4,G7; nothing is recorded.")
    ] = None,
    all_gates: Annotated[bool, typer.Option("--all-gates", help="Go on after a gate that failed.")] = False,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Let verdicts count that were reached without bubblewrap.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a judging that was cut off: gates that it had finished do not run."),
    ] = False,
    overrides: Overrides = None,
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Judge an engine file: run it in the sandbox, through every gate and against the clock, and say why."""
    from forgetrain.forge.collect import environment  # loads torch
    from forgetrain.judge.by_hand import keeping
    from forgetrain.judge.runner import Judge

    target = read_target(target_file, overrides)
    for engine in (file, champion):
        if engine is not None and not engine.is_file():
            raise UserError("no such engine file", file=engine, remedy="name an engine's .py file")
    data = runs / target.name / "data"
    names = None if gates is None else tuple(name.strip() for name in gates.split(","))
    if resume and names is not None:
        raise UserError(
            "goes on with a judging by all gates", key="--resume", remedy="leave out one of --resume and --gates"
        )
    options: dict[str, Any] = {"bitwise": bitwise, "all_gates": all_gates, "gates": names}
    kept = recorded = None
    with contextlib.ExitStack() as stack:
        judge = stack.enter_context(
            Judge(target, data=data if data.is_dir() else None, roofline_seconds=roofline_seconds(target))
        )
        if names is None:
            asked = {"bitwise": bitwise, "champion": champion and sha256_file(champion)}
            kept = stack.enter_context(keeping(runs, target, file, environment(target), asked, resume=resume))
            _say_done(kept.done, resume)
            options["done"] = kept.done

        def after_gate(judgement: Judgement) -> None:
            if kept is not None and (judgement.sandboxed or allow_unsandboxed):
                kept.add(judgement)

        judgement = judge.judge(file, champion=champion, on_verdict=explain, after_gate=after_gate, **options)
        after_gate(judgement)
        counts = judgement.sandboxed or allow_unsandboxed
        _say(judgement, counts)
        if kept is not None and counts:
            recorded = record(file, judgement)
            kept.end(judgement)
    emit({**as_plain(judgement), "counts": counts, "recorded": recorded and str(recorded)}, as_json)
    if not (judgement.passed and counts):
        raise typer.Exit(1)


def explain(verdict: Verdict) -> None:
    """One verdict for a person: what was asked, the answer, and what led to it."""
    from forgetrain.judge.words import QUESTIONS

    answer = "passed" if verdict.passed else "FAILED"
    say(f"{verdict.gate} {answer}. {QUESTIONS.get(verdict.gate, '')}")
    say(f"    {verdict.explanation}")
    if not verdict.passed and verdict.first_divergence:
        say(f"    first seen in {verdict.first_divergence}")


def _say(judgement: Judgement, counts: bool) -> None:
    failed = [verdict.gate for verdict in judgement.verdicts if not verdict.passed]
    outcome = f"rejected by {', '.join(failed)}" if failed else "accepted"
    lines = [f"{judgement.candidate[:12]} {outcome} in {judgement.seconds:.0f} s; {judgement.sandbox}"]
    if judgement.speed:
        speed = judgement.speed
        lines.append(
            f"{speed['tokens_per_second']:,.0f} tokens/s, {speed['step_seconds']:.4g} s a step; the first steps, with "
            f"compilation, took {speed['warm_up_seconds']:.1f} s"
        )
    if not counts:
        lines.append("nothing kept it from this machine's files and network: it counts with --allow-unsandboxed only")
    for line in lines:
        say(line)


def _say_done(done: list[Verdict], resume: bool) -> None:
    if done:
        line = f"going on after {', '.join(verdict.gate for verdict in done)}"
    elif resume:
        line = "no judging of this very question was cut off; from the beginning"
    else:
        return
    say(line)


def as_plain(judgement: Judgement) -> dict[str, Any]:
    return {
        "passed": judgement.passed,
        "sha256": judgement.candidate,
        "sandbox": judgement.sandbox,
        "sandboxed": judgement.sandboxed,
        "seconds": judgement.seconds,
        "speed": judgement.speed,
        "verdicts": judgement.told(),
    }


def record(file: Path, judgement: Judgement) -> Path | None:
    """Leaves the verdicts beside the file, where training looks for them. Other gates' verdicts on the same content
    stay; a record of another engine that is still in the folder is left alone."""
    path = file.parent / RECORD
    verdicts = {verdict.gate: verdict.as_dict() for verdict in judgement.verdicts}
    if path.is_file():
        before = read_object(path, "move it away")
        owner = before.get("sha256")
        theirs = [other for other in file.parent.glob("*.py") if other != file and sha256_file(other) == owner]
        if owner != judgement.candidate and theirs:
            say(f"not recorded: {path} is of {theirs[0].name}; judge {file.name} in a folder of its own to use it")
            return None
        if owner == judgement.candidate:
            kept = before.get("verdicts", [])
            require_verdicts(kept, path)
            verdicts = {verdict["gate"]: verdict for verdict in kept} | verdicts
    write_json(path, {"sha256": judgement.candidate, "verdicts": list(verdicts.values())})
    return path


def roofline_seconds(target: Target) -> float:
    from forgetrain.judge.bound import least_step_seconds

    return least_step_seconds(target, say)
