"""``forgetrain redteam``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from forgetrain.cli.common import Json, console, emit, say
from forgetrain.errors import UserError


def command(
    family: Annotated[
        list[str] | None, typer.Option("--family", metavar="NAME", help="Only this family; may be given again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Attack the judge of this machine with engines that are wrong or hostile, and show which gate caught each."""
    from forgetrain.redteam.run import ATTACKS, FAMILIES, RedTeam  # loads torch

    for name in family or ():
        if name not in FAMILIES:
            raise UserError(
                "no such family", key="--family", value=name, remedy=f"choose from {', '.join(sorted(FAMILIES))}"
            )
    chosen = [attack for attack in ATTACKS if not family or attack.family in family]
    rows: list[dict[str, Any]] = []
    with RedTeam() as team:
        for number, attack in enumerate(chosen, 1):
            say(f"{number}/{len(chosen)} {attack.family}: {attack.name}")
            outcome = team.attack(attack)
            caught = outcome.caught_by
            rows.append(
                {
                    "family": attack.family,
                    "engine": attack.name,
                    "what": attack.what,
                    "caught_by": caught and caught.gate,
                    "expected": attack.gate,
                    "as_expected": outcome.as_expected,
                    "explanation": caught and caught.explanation,
                    "sandboxed": bool(caught and caught.sandboxed),
                    "seconds": round(outcome.seconds, 1),
                }
            )
    if not as_json:
        console.print(table(rows))
    slipped = [row["engine"] for row in rows if row["caught_by"] is None]
    surprising = [row["engine"] for row in rows if row["caught_by"] and not row["as_expected"]]
    caught_number = len(rows) - len(slipped)
    say(f"{caught_number} of {len(rows)} rejected, {len(surprising)} of them by another gate than expected")
    emit({"passed": not slipped and not surprising, "attacks": rows}, as_json)
    if slipped or surprising:
        raise typer.Exit(1)


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table("family", "engine", "what it does", "caught by", "seconds")
    last = ""
    for row in rows:
        gate = row["caught_by"] or "NOTHING"
        if row["caught_by"] and not row["as_expected"]:
            gate += f", not {row['expected']} as expected"
        family = "" if row["family"] == last else row["family"]
        out.add_row(family, row["engine"], row["what"], gate, f"{row['seconds']:.1f}")
        last = row["family"]
    return out
