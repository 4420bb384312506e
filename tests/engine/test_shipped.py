"""Engines of nano-cpu that ship: each is the file that its provenance is of, and its verdicts are passed."""

from __future__ import annotations

from pathlib import Path

import pytest

from forgetrain.cli.verify import read_folder

ENGINES = Path(__file__).parents[2] / "engines"
FOLDERS = sorted(path.parent for path in (ENGINES / "nano-cpu").rglob("provenance.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=[str(folder.relative_to(ENGINES)) for folder in FOLDERS])
def test_an_engine_is_what_its_provenance_says(folder):
    _, provenance, target = read_folder(folder)
    assert target.name == folder.relative_to(ENGINES).parts[0]
    assert all(verdict["pass"] for verdict in provenance["verdicts"])


def test_the_engines_are_found():
    assert ENGINES / "nano-cpu" / "aligned" in FOLDERS
