"""``forgetrain verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from forgetrain.cli.common import DEFAULT_RUNS, Json, RunsFolder, emit, say
from forgetrain.cli.judge import as_plain, explain, roofline_seconds
from forgetrain.durable import read_object, sha256_file
from forgetrain.errors import UserError
from forgetrain.gates.verdict import require_verdicts
from forgetrain.spec.target import Target, parse_target

#: What of the environment is told where it differs: bits and speed depend on it.
_TOLD = ("torch", "processor", "threads")


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An engine's folder, with its provenance.json.")],
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Judge an engine that ships again, on this machine, and compare with what its provenance says."""
    engine, provenance, target = read_folder(folder)
    from forgetrain.judge.runner import Judge  # loads torch
    from forgetrain.numerics.determinism import fingerprint

    claimed = {verdict["gate"]: bool(verdict["pass"]) for verdict in provenance["verdicts"]}
    data = runs / target.name / "data"
    with Judge(target, data=data if data.is_dir() else None, roofline_seconds=roofline_seconds(target)) as judge:
        judgement = judge.judge(engine, bitwise="G1" in claimed, all_gates=True, on_verdict=explain)
    here = fingerprint(device=target.hardware.device, threads=target.hardware.threads)
    there = provenance.get("environment", {})
    for key in _TOLD:
        if there.get(key) != here.get(key):
            say(f"{key}: {here.get(key)} here, {there.get(key)} when it was made")
    lost = [v.gate for v in judgement.verdicts if not v.passed and claimed.get(v.gate, True)]
    speeds = [speed.get("tokens_per_second") for speed in (judgement.speed, provenance.get("speed", {}))]
    if all(speeds):
        say(f"{speeds[0]:,.0f} tokens/s here, {speeds[1]:,.0f} when it was made")
    say(f"{folder} does NOT hold here: {', '.join(lost)}" if lost else f"{folder} holds on this machine")
    emit({**as_plain(judgement), "lost": lost, "environment": here, "provenance": provenance}, as_json)
    if lost:
        raise typer.Exit(1)


def read_folder(folder: Path) -> tuple[Path, dict[str, Any], Target]:
    """Raises UserError when something is missing, or the engine is not the one that the provenance is of."""
    engine, path = folder / "engine.py", folder / "provenance.json"
    for file in (engine, path):
        if not file.is_file():
            raise UserError("is missing", file=file, remedy="name the folder of an engine that forgetrain forge made")
    provenance = read_object(path, "restore it", sha256=str, target=dict, verdicts=list)
    if not provenance["verdicts"]:
        remedy = f"ask for some: forgetrain judge {engine} --target TARGET --all-gates"
        raise UserError("has none to compare with", file=path, key="verdicts", remedy=remedy)
    require_verdicts(provenance["verdicts"], path)
    found = sha256_file(engine)
    if found != provenance["sha256"]:
        raise UserError(
            "is not the engine that provenance.json is of", file=engine, value=found[:12], remedy="forgetrain judge it"
        )
    return engine, provenance, parse_target(provenance["target"], file=path)
