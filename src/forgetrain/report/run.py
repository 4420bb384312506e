"""The report of a run: one HTML page that needs no network.

    write_report(outcome.as_dict(), Path("runs/nano-cpu"))      # → runs/nano-cpu/report.html

What was proved, the loss curve, where the time went, how the engine was aligned, and its source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from forgetrain.durable import write_text
from forgetrain.train.metrics import read_journal

_INK, _GRID, _MAIN, _OTHER = "#1b1f24", "#e3e6ea", "#b4531f", "#4a6785"


def write_report(outcome: dict[str, Any], folder: Path) -> Path:
    """Writes ``report.html`` to the run's folder from its outcome (``run.json``) and its journal; returns its path.

    Sections without evidence, because the run stopped before them, are left out.
    """
    page = _template().render(
        outcome=outcome,
        scripts=get_plotlyjs(),
        loss=_loss_curve(folder / "train" / "metrics.jsonl", outcome.get("train")),
        minutes=_where_time_went(outcome["stages"]),
        align=outcome.get("align"),
        source=_source(folder / "engine" / "engine.py"),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("forgetrain.report", "pages")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "run.html.j2"
    )


def _loss_curve(journal: Path, summary: dict[str, Any] | None) -> str | None:
    if summary is None or not journal.is_file():
        return None
    lines = read_journal(journal)
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "held_out_loss" in line]
    figure = _figure("step", "loss, nats a token")
    figure.add_scatter(
        x=[line["step"] for line in steps], y=[line["loss"] for line in steps], name="training", line_color=_OTHER
    )
    figure.add_scatter(
        x=[line["step"] for line in held_out],
        y=[line["held_out_loss"] for line in held_out],
        name="held out",
        mode="lines+markers",
        line_color=_MAIN,
    )
    figure.add_hline(y=summary["unigram_loss"], line_dash="dot", line_color=_INK, annotation_text="unigram model")
    return _html(figure)


def _where_time_went(stages: dict[str, float]) -> str:
    figure = _figure("seconds", "")
    names = list(stages)
    figure.add_bar(
        x=[stages[name] for name in names],
        y=names,
        orientation="h",
        marker_color=_OTHER,
        text=[f"{stages[name]:.0f} s" for name in names],
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(height=60 + 32 * len(names))
    return _html(figure)


def _figure(x: str, y: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        height=360,
        margin={"l": 70, "r": 20, "t": 20, "b": 50},
        plot_bgcolor="white",
        paper_bgcolor="white",
        font={"color": _INK, "family": "system-ui, sans-serif"},
        legend={"orientation": "h", "y": 1.08},
        xaxis={"title": x, "gridcolor": _GRID, "zeroline": False},
        yaxis={"title": y, "gridcolor": _GRID, "zeroline": False},
    )
    return figure


def _html(figure: go.Figure) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})


def _source(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
