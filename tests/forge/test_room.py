"""The room's doors."""

from __future__ import annotations

from forgetrain.forge.room import Room
from tests.forge.test_optimise import Script, loop, prepared


def test_the_champion_is_there_before_anything_was_asked(tmp_path):
    target = prepared(tmp_path)
    engine = (tmp_path / target.name / "engine" / "engine.py").read_text()
    assert Room(loop(target, tmp_path, Script([]))).champion() == engine
    assert "error" in Room(loop(prepared(tmp_path / "other"), tmp_path / "other", Script([]))).profile()
