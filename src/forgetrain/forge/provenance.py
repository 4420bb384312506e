"""The champion as a folder: its engine, its plan where it has one, and its provenance, as ``forgetrain verify`` and
training's admission read it. The aligned engine, which the champion is measured against, lies in it the same way.

    runs/nano-cpu/champion/              engine.py  plan.toml  provenance.json
    runs/nano-cpu/champion/aligned/      engine.py  plan.toml  provenance.json

What ships in ``engines/<target>`` is a copy of this folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetrain.durable import new_folder, read_json, read_object, sha256_file, write_json
from forgetrain.forge.align import ORIGIN
from forgetrain.judge.ledger import Ledger, key_of_plain
from forgetrain.spec.target import Target
from forgetrain.train.verified import find_verdicts


def write_champion(
    run: Path,
    target: Target,
    ledger: Ledger,
    champion: Mapping[str, Any],
    environment: Mapping[str, Any],
    verdicts: Sequence[Mapping[str, Any]],
    speed: Mapping[str, Any],
) -> Path:
    """Writes ``run/champion``, whole or not at all, and returns it. ``champion``: the ledger's row."""
    golden = run / "engine" / ORIGIN
    common = {
        "target": target.plain(),
        "environment": dict(environment),
        "golden": read_json(golden, "align again") if golden.is_file() else None,
    }
    with new_folder(run / "champion") as partial:
        (partial / "engine.py").write_bytes(ledger.files.read(champion["hash"]))
        if "plan.toml" in champion["files"]:
            (partial / "plan.toml").write_bytes(ledger.files.read(champion["files"]["plan.toml"]))
        lineage = [
            {key: line[key] for key in ("hash", "parent", "proposer", "message")}
            for line in ledger.lineage(champion["hash"])
        ]
        provenance = {"sha256": champion["hash"], **common, "verdicts": list(verdicts), "speed": dict(speed)}
        write_json(partial / "provenance.json", {**provenance, "lineage": lineage})
        _write_aligned(run / "engine", partial / "aligned", common)
    return run / "champion"


def holds(folder: Path, digest: str, key: str) -> bool:
    """Whether a champion's folder is there, its engine has this hash, and what it tells is of the target with this
    key: one of the same name may have the same champion, but its verdicts and speed are its own."""
    file, provenance = folder / "engine.py", folder / "provenance.json"
    if not (file.is_file() and provenance.is_file() and sha256_file(file) == digest):
        return False
    return key_of_plain(read_object(provenance, f"remove {folder}").get("target", {})) == key


def _write_aligned(engine: Path, folder: Path, common: Mapping[str, Any]) -> None:
    folder.mkdir()
    for name in ("engine.py", "plan.toml"):
        if (engine / name).is_file():
            shutil.copyfile(engine / name, folder / name)
    verdicts = find_verdicts(engine / "engine.py", []) or []
    write_json(
        folder / "provenance.json", {"sha256": sha256_file(folder / "engine.py"), **common, "verdicts": verdicts}
    )
