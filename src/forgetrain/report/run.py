"""The report of a run: one HTML page that needs no network.

    write_report(outcome.as_dict(), Path("runs/nano-cpu"))      # → runs/nano-cpu/report.html

What was proved, the loss curve, where the time went, how the engine was aligned, and its source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from forgetrain.durable import write_text
from forgetrain.report.page import MAIN, OTHER, QUIET, figure, plot, render
from forgetrain.train.metrics import read_journal


def write_report(outcome: dict[str, Any], folder: Path) -> Path:
    """Writes ``report.html`` to the run's folder from its outcome (``run.json``) and its journal; returns its path.

    Sections without evidence, because the run stopped before them, are left out.
    """
    page = render(
        "run.html.j2",
        outcome=outcome,
        loss=_loss_curve(folder / "train" / "metrics.jsonl", outcome.get("train")),
        minutes=_where_time_went(outcome["stages"]),
        align=outcome.get("align"),
        source=_source(folder / "engine" / "engine.py"),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _loss_curve(journal: Path, summary: dict[str, Any] | None) -> Markup | None:
    if summary is None or not journal.is_file():
        return None
    lines = read_journal(journal)
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "held_out_loss" in line]
    made = figure("step", "loss, nats a token")
    made.add_scatter(
        x=[line["step"] for line in steps], y=[line["loss"] for line in steps], name="training", line_color=OTHER
    )
    made.add_scatter(
        x=[line["step"] for line in held_out],
        y=[line["held_out_loss"] for line in held_out],
        name="held out",
        mode="lines+markers",
        line_color=MAIN,
    )
    made.add_hline(y=summary["unigram_loss"], line_dash="dot", line_color=QUIET, annotation_text="unigram model")
    return plot(made, "loss by step")


def _where_time_went(stages: dict[str, float]) -> Markup:
    made = figure("seconds", "")
    names = list(stages)
    made.add_bar(
        x=[stages[name] for name in names],
        y=names,
        orientation="h",
        marker_color=OTHER,
        text=[f"{stages[name]:.0f} s" for name in names],
    )
    made.update_yaxes(autorange="reversed")
    made.update_layout(height=60 + 32 * len(names))
    return plot(made, "seconds by stage")


def _source(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
