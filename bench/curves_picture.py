"""The picture of bench/curves.py: training losses above, held-out losses beside the seeds' range below; plain SVG."""

from __future__ import annotations

from typing import Any

REFERENCES = ("megatron", "transformers")
COLOURS = {"forged": "#b4531f", "megatron": "#2f6f8f", "transformers": "#6b8e23"}
#: A dash for each, so that curves that lie on one another are all seen.
DASHES = {"forged": "", "megatron": "9 5", "transformers": "2 5"}
INK, GRID = "#1b1f24", "#d9dde2"
WINDOW, LEFT, WIDTH = 25, 70, 760


class Panel:
    """A rectangle with axes that maps data to points."""

    def __init__(self, top: float, height: float, xs: tuple[float, float], ys: tuple[float, float]):
        self.top, self.height, self.xs, self.ys = top, height, xs, ys

    def point(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.xs, self.ys
        return LEFT + (x - x0) / (x1 - x0) * WIDTH, self.top + self.height * (y1 - y) / (y1 - y0)

    def axes(self, marks: list[float], label: str, form: str) -> list[str]:
        parts = []
        for y in marks:
            at = self.point(0, y)[1]
            parts.append(f'<path d="M{LEFT} {at:.1f}h{WIDTH}" stroke="{GRID}" fill="none"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y:{form}}</text>')
        parts.append(f'<text x="{LEFT}" y="{self.top - 10}">{label}</text>')
        return parts

    def curve(self, points: list[tuple[float, float]], who: str) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.point(*point) for point in points))
        return (
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[who]}" stroke-width="2" '
            f'stroke-dasharray="{DASHES[who]}"/>'
        )


def draw(lines: dict[str, list[dict[str, Any]]], title: str) -> str:
    """SVG from the journals of every contestant; the first is the forged engine with the references' seed."""
    first = next(iter(lines))
    shown = {"forged": lines[first], **{name: lines[name] for name in REFERENCES}}
    losses = {who: smoothed(journal) for who, journal in shown.items()}
    steps = max(x for points in losses.values() for x, _ in points)
    values = [y for points in losses.values() for _, y in points]
    above = Panel(50, 260, (0, steps), (min(values) - 0.1, max(values) + 0.1))
    parts = above.axes(
        ticks(above.ys, 1.0), f"{title}: training loss, nats a token, mean of {WINDOW} steps, same tokens", ".0f"
    )
    parts += [above.curve(points, who) for who, points in losses.items()]
    held = {label: {line["step"]: line["held_out_loss"] for line in journal if "held_out_loss" in line}
            for label, journal in lines.items()}  # fmt: skip
    seeds = [label for label in lines if label not in REFERENCES]
    at = [step for step in held[first] if all(step in held[label] for label in lines)]
    middle = {step: sum(held[label][step] for label in seeds) / len(seeds) for step in at}
    apart = {who: [(s, held[label][s] - middle[s]) for s in at]
             for who, label in (("forged", first), *((name, name) for name in REFERENCES))}  # fmt: skip
    band = [[(s, pick(held[label][s] for label in seeds) - middle[s]) for s in at] for pick in (min, max)]
    most = 1.15 * max(abs(y) for points in [*apart.values(), *band] for _, y in points)
    below = Panel(370, 150, (0, steps), (-most, most))
    outline = " ".join("{:.1f},{:.1f}".format(*below.point(*point)) for point in [*band[0], *reversed(band[1])])
    parts.append(f'<polygon points="{outline}" fill="{GRID}"/>')
    label = f"held-out loss minus the mean of the forged engine's {len(seeds)} seeds; grey: their range"
    parts += below.axes([-most / 1.15, 0, most / 1.15], label, ".3f")
    parts += [below.curve(points, who) for who, points in apart.items()]
    for step in ticks((0, steps), steps / 4):
        x = above.point(step, 0)[0]
        parts.append(f'<text x="{x:.1f}" y="545" text-anchor="middle">{step:.0f}</text>')
    for number, who in enumerate(shown):
        x = LEFT + WIDTH - 330 + 115 * number
        parts.append(
            f'<path d="M{x} 70h28" stroke="{COLOURS[who]}" stroke-width="2" stroke-dasharray="{DASHES[who]}"/>'
            f'<text x="{x + 34}" y="74">{who}</text>'
        )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 560" font-family="sans-serif" font-size="12">\n'
        f'<rect width="860" height="560" fill="#ffffff"/>\n<g fill="{INK}">\n' + "\n".join(parts) + "\n</g>\n</svg>\n"
    )


def smoothed(journal: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The mean of each WINDOW steps, at the window's last step."""
    steps = [(line["step"], line["loss"]) for line in journal if "loss" in line]
    chunks = [steps[start : start + WINDOW] for start in range(0, len(steps) - WINDOW + 1, WINDOW)]
    return [(chunk[-1][0], sum(loss for _, loss in chunk) / WINDOW) for chunk in chunks]


def ticks(ends: tuple[float, float], apart: float) -> list[float]:
    first = -(-ends[0] // apart)
    return [(first + i) * apart for i in range(int((ends[1] - first * apart) / apart) + 1)]
