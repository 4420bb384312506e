"""The report of forging: one HTML page from the ledger that needs no network.

    write_forge_report(target, ledger, Path("runs/nano-cpu/forge.html"))

Speed by attempt, the tree of attempts, every verdict, where the champion's time goes, its source and what it changes in
the aligned engine, the environment, and what it cost. It only reads the ledger; what was not measured is left out.
"""

from __future__ import annotations

import difflib
import json
import statistics
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from forgetrain.durable import write_text
from forgetrain.errors import UserError
from forgetrain.forge.profile import read_profile
from forgetrain.forge.standing import Timed, standing
from forgetrain.judge.ledger import Ledger, target_key
from forgetrain.judge.words import QUESTIONS
from forgetrain.report import plots
from forgetrain.report.page import plot, render
from forgetrain.spec.target import Target


def write_forge_report(target: Target, ledger: Ledger, path: Path) -> Path:
    """Writes the page and returns its path.

    Raises:
        UserError: the ledger has no champion of this target.
    """
    key = target_key(target)
    champion = ledger.champion(key)
    if champion is None:
        raise UserError(
            f"has no champion of {target.name} as it is described now",
            file=ledger.path,
            remedy="run forgetrain forge first",
        )
    evidence = _Evidence(target, ledger, key)
    write_text(path, render("forge.html.j2", **evidence.values(champion["candidate"])))
    return path


class _Evidence:
    """What the ledger says of one target."""

    def __init__(self, target: Target, ledger: Ledger, key: str):
        self.target, self.ledger, self.key = target, ledger, key
        rows = ledger.query("SELECT * FROM judgings WHERE target = ? AND purpose != 'hand' ORDER BY number", (key,))
        self.judgings = rows
        self.environment: dict[str, Any] = json.loads(rows[-1]["environment"])
        self.standing = standing(ledger, key, self.environment)
        self.candidates = {row["hash"]: row for row in ledger.candidates(key)}
        self.attempts = self._attempts()
        aligned = (row["candidate"] for row in reversed(rows) if row["purpose"] == "aligned")
        self.aligned = next(aligned)  # the latest: every new golden record makes another file

    def values(self, champion: str) -> dict[str, Any]:
        """For the template."""
        target, spent = self.target, self.ledger.spent(self.key)
        source, start = (self.ledger.files.read(digest).decode(errors="replace") for digest in (champion, self.aligned))
        profiles = {
            name: read_profile(plain)
            for name, digest in (("aligned engine", self.aligned), ("champion", champion))
            if (plain := self.ledger.profile(self.key, digest, self.environment)) is not None
            and (name == "champion" or digest != champion)
        }
        best = profiles.get("champion")
        raced = next((timed for timed in reversed(self.standing.races) if timed.candidate == champion), None)
        numbers, cells = self._cells()
        gates = [gate for gate in QUESTIONS if any(found == gate for _, found in cells)]
        return {
            "target": target,
            "champion": self.candidates[champion],
            "is_aligned": champion == self.aligned,
            "raced": raced,
            "tokens_per_second": self._tokens_per_second(champion),
            "attempts": self.attempts,
            "elections": sum(attempt["outcome"] == "accepted" for attempt in self.attempts),
            "speed": plot(plots.speed_by_attempt(self.attempts), "speed by attempt") if self.attempts else None,
            "tree": plot(plots.tree(self._nodes()), "tree of attempts") if self.attempts else None,
            "verdicts": plot(plots.verdicts(numbers, gates, cells), "verdicts by attempt and gate") if cells else None,
            "ops": plot(plots.time_by_op(profiles, target), "time by op") if best else None,
            "roofline": plot(plots.roofline(best, target), "roofline") if best else None,
            "profile": best,
            "gaps": best.gaps(target) if best else [],
            "lines": source.count("\n"),
            "source": source,
            "diff": _coloured(start, source) if champion != self.aligned else None,
            "environment": {**self.environment, "sandbox": "yes" if self.judgings[-1]["sandboxed"] else "no"},
            "budget": [
                ("minutes", f"{spent.seconds / 60:.1f}", f"{target.search.minutes:g}"),
                ("attempts", spent.attempts, target.search.attempts),
                (
                    "dollars",
                    f"{spent.dollars:.2f}",
                    f"{target.search.dollars:g}" if target.search.dollars else "no limit",
                ),
                ("tokens", f"{spent.tokens:,}", f"{target.search.tokens:,}" if target.search.tokens else "no limit"),
            ],
        }

    def _attempts(self) -> list[dict[str, Any]]:
        """Numbered from 1 in this target's order, with the race that decided something about their candidate."""
        raced: dict[str, Timed] = {}
        for timed in self.standing.races:
            if timed.purpose in ("gates", "part", "confirmation"):
                raced[timed.candidate] = timed
        rows = self.ledger.query("SELECT * FROM attempts WHERE target = ? ORDER BY number", (self.key,))
        attempts = []
        for number, row in enumerate(rows, 1):
            timed = raced.get(row["candidate"]) if row["outcome"] in ("accepted", "rejected") else None
            candidate = self.candidates.get(row["candidate"], {})
            message = candidate.get("message") or "no candidate"
            attempts.append(
                {
                    **row,
                    "number": number,
                    "outcome": row["outcome"] or "interrupted",
                    "message": message,
                    "label": f"{number}. {row['proposer']}: {escape(message[:80])}",
                    **{name: getattr(timed, name, None) for name in ("gain", "low", "high")},
                }
            )
        return attempts

    def _nodes(self) -> list[dict[str, Any]]:
        """One for the aligned engine and for each candidate, at its first attempt."""
        nodes = [
            {
                "hash": self.aligned,
                "parent": None,
                "number": 0,
                "depth": 0,
                "outcome": "aligned",
                "label": "aligned engine",
            }
        ]
        depths = {self.aligned: 0}
        for attempt in self.attempts:
            digest = attempt["candidate"]
            if digest is None or digest in depths:
                continue
            parent = self.candidates[digest]["parent"]
            depths[digest] = depths.get(parent, -1) + 1
            kept = {name: attempt[name] for name in ("number", "outcome", "label")}
            nodes.append({"hash": digest, "parent": parent, "depth": depths[digest], **kept})
        return nodes

    def _cells(self) -> tuple[list[int], dict[tuple[int, str], tuple[bool, str]]]:
        """Verdicts of each attempt's candidate, those of later judgings over earlier ones; attempt 0 is the aligned
        engine."""
        first = {self.aligned: 0}
        for attempt in self.attempts:
            first.setdefault(attempt["candidate"], attempt["number"])
        rows = self.ledger.query(
            "SELECT j.candidate, v.gate, v.pass, v.explanation FROM verdicts v JOIN judgings j ON j.id = v.judging "
            "WHERE j.target = ? AND j.purpose != 'hand' ORDER BY j.number",
            (self.key,),
        )
        cells = {
            (first[row["candidate"]], row["gate"]): (bool(row["pass"]), str(escape(row["explanation"])))
            for row in rows
            if row["candidate"] in first
        }
        return sorted({number for number, _ in cells}), cells

    def _tokens_per_second(self, champion: str) -> float | None:
        """Of the champion's latest race."""
        rows = self.ledger.query(
            "SELECT s.judging, s.block, sum(s.seconds) AS seconds, count(*) AS steps FROM samples s "
            "JOIN judgings j ON j.id = s.judging WHERE j.target = ? AND j.candidate = ? AND s.engine = 'candidate' "
            "AND j.purpose != 'hand' "
            "GROUP BY s.judging, s.block ORDER BY j.number",
            (self.key, champion),
        )
        last = [row["seconds"] / row["steps"] for row in rows if row["judging"] == rows[-1]["judging"]]
        recipe = self.target.at_race_shape().recipe
        tokens = recipe.batch_size * recipe.sequence_length
        return tokens / statistics.median(last) if last else None


def _coloured(before: str, after: str) -> Markup:
    """A unified diff with its lines marked."""
    kinds = {"+": "added", "-": "removed"}
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "aligned engine", "champion", lineterm="")
    marked = [
        Markup('<span class="{}">{}</span>').format(kinds[line[0]], line) if line[:1] in kinds else escape(line)
        for line in lines
    ]
    return Markup("\n").join(marked)
