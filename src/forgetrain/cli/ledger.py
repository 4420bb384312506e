"""``forgetrain ledger``: list, show, diff, lineage, export."""

from __future__ import annotations

import csv
import difflib
import importlib
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from forgetrain.cli.common import DEFAULT_RUNS, Json, RunsFolder, console, emit, say
from forgetrain.errors import UserError
from forgetrain.judge.ledger import Ledger
from forgetrain.judge.schema import TABLES

app = typer.Typer(help="Every attempt, candidate, verdict and election.", no_args_is_help=True)

Candidate = Annotated[str, typer.Argument(metavar="CANDIDATE", help="A candidate's hash, or how it begins.")]


def open_ledger(runs: Path) -> Ledger:
    return Ledger(runs / "ledger", create=False)


@app.command("list")
def list_candidates(
    target: Annotated[str | None, typer.Option(metavar="NAME", help="Only this target's.")] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """List the candidates with the outcome of their last judging."""
    with open_ledger(runs) as ledger:
        rows = ledger.candidates(target)
    table = Table("#", "target", "candidate", "parent", "proposer", "judged", "message")
    for row in rows:
        hash_, parent = row["hash"][:10], (row["parent"] or "")[:10]
        table.add_row(str(row["number"]), row["target"], hash_, parent, row["proposer"], _outcome(row), row["message"])
    if not as_json:
        console.print(table)
    emit({"candidates": rows}, as_json)


def _outcome(row: dict[str, Any]) -> str:
    if row["passed"] is None:
        return "not yet"
    words = "passed" if row["passed"] else f"failed {row['failed'] or 'before a gate'}"
    if row["elected"]:
        words += f", elected at {row['elected_ratio']:.3f}×" if row["elected_ratio"] else ", elected"
    return words if row["sandboxed"] else words + ", unsandboxed"


@app.command()
def show(candidate: Candidate, runs: RunsFolder = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Show a candidate and all its verdicts."""
    with open_ledger(runs) as ledger:
        row = ledger.candidate(candidate)
        verdicts = ledger.verdicts(row["hash"])
        attempts = ledger.query("SELECT * FROM attempts WHERE candidate = ? ORDER BY number", (row["hash"],))
        row["source"] = str(ledger.files.path(row["hash"]))
    if not as_json:
        say(f"candidate {row['hash']}, by {row['proposer']}, {_when(row['added'])}: {row['message']}")
        say(f"source {row['source']}, parent {row['parent'] or 'none'}")
        for verdict in verdicts:
            mark = "passed" if verdict["pass"] else "FAILED"
            box = "" if verdict["sandboxed"] else " (unsandboxed)"
            say(f"{verdict['purpose']} {verdict['gate']} {mark}{box}: {verdict['explanation']}")
    emit({"candidate": row, "verdicts": verdicts, "attempts": attempts}, as_json)


@app.command()
def diff(
    candidate: Candidate,
    other: Annotated[str | None, typer.Argument(metavar="OTHER", help="Against this one; default: its parent.")] = None,
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Show what a candidate changes in its parent, or in another candidate."""
    with open_ledger(runs) as ledger:
        row = ledger.candidate(candidate)
        base = other or row["parent"]
        if base is None:
            raise UserError("has no parent", key=row["hash"][:10], remedy="name a candidate to compare it with")
        base = ledger.candidate(base)["hash"]
        before, after = (ledger.files.read(key).decode(errors="replace") for key in (base, row["hash"]))
    text = "".join(
        difflib.unified_diff(before.splitlines(True), after.splitlines(True), base[:10], row["hash"][:10], n=3)
    )
    if not as_json:
        print(text, end="")
    emit({"from": base, "to": row["hash"], "diff": text}, as_json)


@app.command()
def lineage(candidate: Candidate, runs: RunsFolder = DEFAULT_RUNS, as_json: Json = False) -> None:
    """Show a candidate's ancestors, itself first."""
    with open_ledger(runs) as ledger:
        rows = ledger.lineage(candidate)
    for depth, row in enumerate(rows):
        if not as_json:
            say(f"{'  ' * depth}{row['hash'][:10]} {row['proposer']}: {row['message']}")
    emit({"lineage": rows}, as_json)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that ends in .csv or .parquet.")],
    table: Annotated[str, typer.Option(help=f"One of {', '.join(TABLES)}.")] = "verdicts",
    runs: RunsFolder = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Export one of the ledger's tables to CSV or Parquet."""
    if table not in TABLES:
        raise UserError("no such table", key="--table", value=table, remedy=f"choose from {', '.join(TABLES)}")
    if file.suffix not in (".csv", ".parquet"):
        raise UserError("neither CSV nor Parquet", file=file, remedy="end the name in .csv or .parquet")
    if not file.resolve().parent.is_dir():
        raise UserError("its folder does not exist", file=file, remedy="make the folder first")
    with open_ledger(runs) as ledger:
        columns = [row["name"] for row in ledger.query(f"PRAGMA table_info({table})")]
        rows = ledger.query(f"SELECT * FROM {table}")
    if file.suffix == ".csv":
        with open(file, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, columns)
            writer.writeheader()
            writer.writerows(rows)
    else:
        _write_parquet(file, columns, rows)
    say(f"{len(rows)} rows of {table} written to {file}")
    emit({"file": str(file), "table": table, "rows": len(rows)}, as_json)


def _write_parquet(file: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    try:
        pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(
            "Parquet needs pyarrow, which is not installed",
            file=file,
            remedy="run pip install pyarrow, or export to .csv",
        ) from None
    parquet.write_table(pyarrow.table({name: [row[name] for row in rows] for name in columns}), file)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
