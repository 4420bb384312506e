"""The progress line is made only when somebody sees it."""

import io

from rich.console import Console

from forgetrain.train.display import LINES, Display


def asked_for(console: Console, steps: int) -> list[int]:
    asked: list[int] = []
    with Display(console, steps, 0) as display:
        for step in range(1, steps + 1):
            display.show(step, lambda step=step: asked.append(step) or f"at {step}")
    return asked


def test_without_a_terminal_a_run_prints_its_twenty_lines():
    out = io.StringIO()
    assert asked_for(Console(file=out), 10 * LINES) == [10 * line for line in range(1, LINES + 1)]
    assert out.getvalue().splitlines()[0] == "train 10/200  at 10"


def test_on_a_terminal_the_text_changes_as_often_as_it_is_drawn_and_the_last_is_seen():
    out = io.StringIO()
    asked = asked_for(Console(file=out, force_terminal=True, width=120), 500)
    assert (asked[0], asked[-1]) == (1, 500)
    assert len(asked) < 500
    assert "500/500" in out.getvalue()
    assert "at 500" in out.getvalue()
