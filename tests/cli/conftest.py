"""A tiny target with its aligned engine, as ``forgetrain align`` leaves it, shared by tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.test_run import write_target
from tests.shared import shared


@dataclass(frozen=True)
class AlignedRun:
    """folder: with runs/tiny in it, which no test may change. target: its file. printed: by the command."""

    folder: Path
    target: Path
    printed: str

    def copied_to(self, folder: Path) -> Path:
        """The same in a folder of the test's own; returns the target's file."""
        shutil.copytree(self.folder / "runs", folder / "runs")
        return self.target


@pytest.fixture(scope="session")
def aligned_run(tmp_path_factory) -> AlignedRun:
    """Made once for the whole run of the tests, by the first worker that asks."""
    with shared(tmp_path_factory, "aligned-run") as folder:
        target, printed = folder / "tiny.toml", folder / "printed.json"
        if not printed.is_file():
            folder.mkdir()
            write_target(folder, "transformers")
            # so that judging it is short; these belong to what is aligned, so a test that changes them aligns anew
            target.write_text(target.read_text().replace("[gates]", "[gates]\ng5_steps = 20\nranks = 1"))
            command = [sys.executable, "-m", "forgetrain", "align", str(target), "--json"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            printed.write_text(done.stdout)
    return AlignedRun(folder, target, printed.read_text())
