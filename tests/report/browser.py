"""Headless Chromium, for tests: opens a page and says what came of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt install chromium")

#: Appended to a page: how far it reaches beyond the window, in pixels, once it is drawn.
_MEASURE = (
    """<script>document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth</script></body>"""
)


@dataclass(frozen=True)
class Seen:
    """errors: what the console said. plots: how many were drawn, points: marks in them, overflow: pixels."""

    errors: list[str]
    plots: int
    points: int
    overflow: int


def look(page: Path, folder: Path, width: int) -> Seen:
    """Opens a copy of the page in a window of this width, without a network."""
    copy = folder / f"opened-{width}.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", _MEASURE), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=10000"]
    done = subprocess.run(
        [
            str(CHROMIUM),
            *options,
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},2000",
            "--dump-dom",
            f"file://{copy}",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    errors = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    overflow = re.search(r'data-overflow="(-?\d+)"', done.stdout)
    assert overflow, "the page was not drawn"
    return Seen(
        errors,
        plots=len(re.findall(r'<div class="plot[^>]*>\s*<div class="plot-container', done.stdout)),
        points=len(re.findall(r'class="point"', done.stdout)),
        overflow=int(overflow.group(1)),
    )
