"""Where a run starts: at an earlier run's checkpoint, if it is one of the same run, or at the beginning.

here = environment_of(target, world)
found = find_start(target, run, data, chosen, here, console, resume=True)     # None is the beginning
clear(run)                                                                    # --restart, once every check has passed
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from forgetrain.data.folder import DataFolder
from forgetrain.errors import UserError
from forgetrain.numerics.determinism import fingerprint
from forgetrain.spec.stages import stages_of
from forgetrain.spec.target import Target
from forgetrain.train import checkpoint
from forgetrain.train.display import say
from forgetrain.train.stages import require_same_past
from forgetrain.train.verified import ChosenEngine
from forgetrain.train.world import World

#: What must be equal for a checkpoint to go on: other values would make another run of it.
FIXED = (
    *("model", "precision", "recipe.optimizer", "recipe.batch_size", "recipe.sequence_length", "recipe.seed"),
    "data.documents",
)


def find_start(
    target: Target,
    run: Path,
    data: DataFolder,
    chosen: ChosenEngine,
    environment: Mapping[str, Any],
    console: Console,
    *,
    resume: bool,
) -> checkpoint.Checkpoint | None:
    """The newest good checkpoint to go on from; None is the beginning. ``environment``: this run's, by
    ``environment_of``; where the checkpoint's was another, that is told.

    Raises:
        UserError: there are checkpoints and ``resume`` was not asked for; or they are of another run.
    """
    root = run / "checkpoints"
    if checkpoint.steps_in(root) and not resume:
        raise UserError(
            "holds checkpoints of an earlier run",
            file=root,
            remedy="add --resume to go on from the newest, or --restart to throw them away",
        )
    found = checkpoint.newest(root, lambda line: say(console, line, "yellow")) if resume else None
    if found is not None:
        _require_same(target, data, found, console)
        require_same_past(found, stages_of(target), target)
        if (before := found.manifest["engine"])["sha256"] != chosen.sha256:
            was = before["status"] if before["name"] == chosen.name else before["name"]
            say(console, f"resuming with the engine {chosen.name} ({chosen.status}), before it was {was}")
        _tell_environment(target, found, environment, console)
    return found


def environment_of(target: Target, world: World) -> dict[str, str | int]:
    """What a run's bits depend on besides the target, the data and the engine."""
    hardware = target.hardware
    return fingerprint(device=hardware.device, threads=hardware.threads_of(world.here), ranks=world.size)


def clear(run: Path) -> None:
    """Removes what an earlier run left; its engine file stays, which this one may have been told to take."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    for path in (run / "train").iterdir() if (run / "train").is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "engine.py":
            path.unlink()


def _require_same(target: Target, data: DataFolder, found: checkpoint.Checkpoint, console: Console) -> None:
    """Refuses a checkpoint of another target or other data, and prints what else differs."""
    before, now = (_flat(tree) for tree in (found.manifest["target"], target.plain()))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key):
            continue
        if any(key == fixed or key.startswith(fixed + ".") for fixed in FIXED):
            raise UserError(
                f"is a checkpoint of another target: {key} was {before.get(key)!r}",
                file=found.path,
                key=key,
                value=now.get(key),
                remedy="resume with the old value, or start again with --restart",
            )
        if key.startswith(("recipe.", "hardware.", "parallel.")):
            say(console, f"resuming with {key} = {now.get(key)!r}, which was {before.get(key)!r}")
    if found.manifest["data"] != data.sha256:
        raise UserError(
            "was trained on other data than the run's data folder holds now",
            file=found.path,
            remedy="restore that data, or start again with --restart",
        )


def _tell_environment(target: Target, found: checkpoint.Checkpoint, now: Mapping[str, Any], console: Console) -> None:
    """Prints where the checkpoint's environment was another; a GPU's bits depend on no threads, and that the target has
    others is told before."""
    before, left_out = found.manifest["environment"], set()
    if target.hardware.device == "cuda":
        left_out = {"threads", "capability"}
    elif found.manifest["target"]["hardware"]["threads"] != target.hardware.threads:
        left_out = {"threads"}
    apart = [key for key in now if key not in left_out and before.get(key, now[key]) != now[key]]
    if apart:
        told = "; ".join(f"{key} {now[key]}, which was {before[key]}" for key in apart)
        say(console, f"resuming in another environment, whose bits may differ: {told}")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
