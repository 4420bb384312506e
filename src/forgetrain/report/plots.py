"""The plots of the forging report, each from plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from forgetrain.forge.profile import Profile
from forgetrain.report.page import BAD, GOOD, MAIN, OTHER, QUIET, figure
from forgetrain.spec.op_costs import op_costs
from forgetrain.spec.target import Target

_COLOURS = {"accepted": GOOD, "rejected": BAD, "failed": QUIET, "interrupted": QUIET, "aligned": OTHER}
_WORDS = {"accepted": "elected", "rejected": "rejected", "failed": "no candidate", "interrupted": "cut off"}


def speed_by_attempt(attempts: Sequence[Mapping[str, Any]]) -> go.Figure:
    """``attempts`` with number, outcome, label, and gain, low, high where one was raced: speed against the aligned
    engine. The step line is the champion's."""
    made = figure("attempt", "speed, aligned engine = 1")
    champion, line = 1.0, [(0, 1.0)]
    for attempt in attempts:
        if attempt["outcome"] == "accepted" and attempt["gain"] is not None:
            champion = attempt["gain"]
        line.append((attempt["number"], champion))
    made.add_scatter(
        x=[x for x, _ in line],
        y=[y for _, y in line],
        name="champion",
        mode="lines",
        line={"color": MAIN, "shape": "hv"},
    )
    for outcome in ("accepted", "rejected"):
        raced = [a for a in attempts if a["outcome"] == outcome and a["gain"] is not None]
        if not raced:
            continue
        made.add_scatter(
            x=[a["number"] for a in raced],
            y=[a["gain"] for a in raced],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [a["high"] - a["gain"] for a in raced],
                "arrayminus": [a["gain"] - a["low"] for a in raced],
                "thickness": 1.2,
            },
            name=_WORDS[outcome],
            mode="markers",
            marker={"color": _COLOURS[outcome], "size": 9, "symbol": "star" if outcome == "accepted" else "circle"},
            text=[a["label"] for a in raced],
            hovertemplate="%{text}<br>%{y:.3f} times the aligned engine<extra></extra>",
        )
    _whole_numbers(made, len(attempts))
    return made


def tree(nodes: Sequence[Mapping[str, Any]]) -> go.Figure:
    """``nodes`` with hash, parent, number (0: the aligned engine), depth, outcome, label."""
    made = figure("attempt", "generation", height=max(220, 120 + 60 * max(node["depth"] for node in nodes)))
    places = {node["hash"]: (node["number"], node["depth"]) for node in nodes}
    x: list[float | None] = []
    y: list[float | None] = []
    for node in nodes:
        if node["parent"] in places:
            (x0, y0), (x1, y1) = places[node["parent"]], places[node["hash"]]
            x += [x0, x1, None]
            y += [y0, y1, None]
    made.add_scatter(x=x, y=y, mode="lines", line={"color": QUIET, "width": 1}, hoverinfo="skip", showlegend=False)
    for outcome, colour in _COLOURS.items():
        mine = [node for node in nodes if node["outcome"] == outcome]
        if mine:
            made.add_scatter(
                x=[node["number"] for node in mine],
                y=[node["depth"] for node in mine],
                name=_WORDS.get(outcome, "aligned engine"),
                mode="markers",
                marker={"color": colour, "size": 11},
                text=[node["label"] for node in mine],
                hovertemplate="%{text}<extra></extra>",
            )
    made.update_yaxes(dtick=1, rangemode="tozero")
    _whole_numbers(made, max(node["number"] for node in nodes))
    return made


def verdicts(
    numbers: Sequence[int], gates: Sequence[str], cells: Mapping[tuple[int, str], tuple[bool, str]]
) -> go.Figure:
    """attempt × gate: passed, failed, or not run. ``cells``: (attempt, gate) → (passed, explanation)."""
    made = figure("attempt", "", height=110 + 30 * len(gates))
    found = [[cells.get((number, gate)) for number in numbers] for gate in gates]
    made.add_heatmap(
        x=[str(number) for number in numbers],
        y=list(gates),
        z=[[None if cell is None else int(cell[0]) for cell in row] for row in found],
        text=[["not run" if cell is None else _folded(cell[1]) for cell in row] for row in found],
        colorscale=[[0, BAD], [1, GOOD]],
        zmin=0,
        zmax=1,
        showscale=False,
        xgap=2,
        ygap=2,
        hoverongaps=False,
        hovertemplate="attempt %{x}, %{y}<br>%{text}<extra></extra>",
    )
    made.update_yaxes(autorange="reversed", showgrid=False)
    made.update_xaxes(type="category", showgrid=False, nticks=20)
    return made


def time_by_op(profiles: Mapping[str, Profile], target: Target) -> go.Figure:
    """Milliseconds of a step; the last of ``profiles`` decides the order of the ops and where the roofline stands."""
    last = list(profiles.values())[-1]
    ops = [op for op, _ in last.top(len(last.ops))]
    ops += [op for profile in profiles.values() for op in profile.ops if op not in ops]
    made = figure("milliseconds of a step", "", height=110 + 26 * len(ops) * len(profiles))
    for (name, profile), colour in zip(profiles.items(), (OTHER, MAIN)[-len(profiles) :], strict=True):
        made.add_bar(
            y=ops,
            x=[1e3 * profile.ops.get(op, 0.0) for op in ops],
            orientation="h",
            name=name,
            marker_color=colour,
            hovertemplate="%{y}: %{x:.2f} ms<extra>" + name + "</extra>",
        )
    costs = op_costs(target.at_race_shape())
    known = [op for op in ops if op in costs]
    made.add_scatter(
        y=known,
        x=[1e3 * costs[op].seconds(last.product_rate, last.bandwidth) for op in known],
        mode="markers",
        name="roofline",
        marker={"symbol": "line-ns-open", "size": 16, "color": QUIET, "line": {"width": 3}},
        hovertemplate="%{y}: at least %{x:.2f} ms<extra>roofline</extra>",
    )
    made.update_yaxes(autorange="reversed", showgrid=False)
    made.update_layout(barmode="group", bargap=0.3)
    return made


def roofline(profile: Profile, target: Target) -> go.Figure:
    """Each op of a profile by its intensity and the rate that it reached, under the machine's roofs."""
    costs = op_costs(target.at_race_shape())
    ops = [op for op in costs if profile.ops.get(op)]
    intensities = [costs[op].intensity for op in ops]
    rates = [costs[op].flops / profile.ops[op] / 1e9 for op in ops]
    made = figure("FLOPs a byte", "GFLOP/s", height=420)
    peak, bandwidth = profile.product_rate / 1e9, profile.bandwidth / 1e9
    left, ridge = min([*intensities, 0.1]) / 2, peak / bandwidth
    right = 2 * max([*intensities, ridge])
    made.add_scatter(
        x=[left, ridge, right],
        y=[left * bandwidth, peak, peak],
        mode="lines",
        name=f"roof: {bandwidth:,.0f} GB/s, {peak:,.0f} GFLOP/s",
        line={"color": QUIET, "dash": "dash"},
        hoverinfo="skip",
    )
    shares = [profile.ops[op] / profile.step_seconds for op in ops]
    made.add_scatter(
        x=intensities,
        y=rates,
        mode="markers+text",
        name="op, by its share of the step",
        text=ops,
        textposition=_beside(intensities, rates),
        cliponaxis=False,
        marker={"color": MAIN, "size": [10 + 40 * share for share in shares], "opacity": 0.85},
        customdata=[100 * share for share in shares],
        hovertemplate="%{text}: %{y:,.1f} GFLOP/s at %{x:.2f} FLOPs a byte<br>%{customdata:.1f}% of the step"
        "<extra></extra>",
    )
    made.update_xaxes(type="log", dtick=1)
    made.update_yaxes(type="log", dtick=1)
    return made


def _beside(x: Sequence[float], y: Sequence[float]) -> list[str]:
    """Where each point's name goes, so that those of neighbours do not lie on each other: in the order of their height,
    one to the left and the next to the right."""
    places = ["top center"] * len(x)
    ranked = sorted(range(len(x)), key=lambda i: y[i])
    for turn, i in enumerate(ranked):
        near = any(j != i and 1 / 4 < x[i] / x[j] < 4 and 1 / 8 < y[i] / y[j] < 8 for j in range(len(x)))
        if near:
            places[i] = ("middle left", "middle right")[turn % 2]
    return places


def _whole_numbers(made: go.Figure, last: int) -> None:
    made.update_xaxes(range=[-0.6, last + 0.6], tickformat="d", dtick=1 if last <= 12 else None)


def _folded(text: str, width: int = 70) -> str:
    """In lines, because a hover label does not fold."""
    lines, line = [], ""
    for word in text.split():
        if len(line) + len(word) > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "<br>".join([*lines, line])
