"""What the reports share: pages without a network, and plots that follow the reader's light or dark theme.

    render("run.html.j2", loss=plot(figure))

plotly.js is embedded once in a page. A plot is its data as JSON; a few lines in base.html.j2 draw them all in the
page's own colours, and draw them anew when the theme changes.
"""

from __future__ import annotations

import itertools
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

#: Colours that can be read on white and on near-black alike.
MAIN, OTHER, GOOD, BAD, QUIET = "#c8682f", "#5b86b3", "#3c9a68", "#cc4b4b", "#8b95a1"

_numbers = itertools.count(1)


def render(name: str, **values: Any) -> str:
    """The page of a template in ``report/pages``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("forgetrain.report", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(scripts=Markup(get_plotlyjs()), **values)


def figure(x: str, y: str, height: int = 360) -> go.Figure:
    """An empty plot with these axis titles; ``height`` in pixels."""
    made = go.Figure()
    made.update_layout(
        template="none",
        height=height,
        margin={"l": 64, "r": 16, "t": 28, "b": 52},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={"title": {"text": x}, "zeroline": False, "automargin": True},
        yaxis={"title": {"text": y}, "zeroline": False, "automargin": True},
    )
    return made


def plot(made: go.Figure, label: str) -> Markup:
    """The plot's place in a page. ``label`` says in words what it shows, for who does not see it."""
    data = str(made.to_json()).replace("<", "\\u003c")
    number = next(_numbers)
    return Markup(
        '<div class="plot" role="img" aria-label="{label}" id="plot-{number}" style="min-height:{height}px"></div>'
        '<script type="application/json" data-plot="plot-{number}">{data}</script>'
    ).format(label=label, number=number, height=made.layout.height, data=Markup(data))  # type: ignore[attr-defined]
