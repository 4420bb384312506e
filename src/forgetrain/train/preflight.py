"""What must hold before the first step, and the plan of a run: every check looks, none leaves anything behind.

    checks = check_machine(target, run, world)      # raises UserError at the first that fails
    plan = plan_of(target, run, data, loader, chosen, world, first_step=0)

``forgetrain train`` makes the checks at every start; ``--dry-run`` stops after them and prints the plan.
"""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from forgetrain.data.loader import Loader
from forgetrain.durable import read_object, sync_folder
from forgetrain.errors import UserError
from forgetrain.spec.estimate import in_units, memory, parameters
from forgetrain.spec.schedule import learning_rate
from forgetrain.spec.stages import stages_of, tokens_before
from forgetrain.spec.target import Recipe, Target, Training
from forgetrain.train.machine import available_memory, free_device_memory
from forgetrain.train.tracking import require_wandb
from forgetrain.train.verified import RECORDS, ChosenEngine
from forgetrain.train.world import World

#: A checkpoint holds the fp32 master and two fp32 moments of every parameter.
STATE_BYTES = 12


class Check(NamedTuple):
    name: str
    found: str


def check_machine(target: Target, run: Path, world: World) -> list[Check]:
    """Processes, memory, disk, checkpoint folder and what the target asks for besides; every rank calls it.

    Raises:
        UserError: the first check that fails, on every rank.
    """
    learning_rate(target.recipe, target.recipe.steps)  # a schedule that cannot be
    checks = [_processes(world), _memory(target, world)]
    checks += world.first(lambda: [_disk(target, run / "checkpoints"), _writable(run / "checkpoints")])
    if target.train.wandb is not None:
        version = world.first(lambda: str(require_wandb().__version__))
        checks.append(Check("wandb", f"{version}, project {target.train.wandb}"))
    return checks


def _processes(world: World) -> Check:
    """Adds ones over the ranks on their devices, so that a network that cannot be shows before the first step."""
    if world.mesh is None:
        return Check("processes", f"1 on {world.device}")
    ones = torch.ones((), device=world.device)
    dist.all_reduce(ones)
    if int(ones) != world.size:
        raise UserError(f"{world.size} ranks add up to {int(ones)}", key="torchrun", remedy="look at the network")
    tensor, context = world.parallel.tensor, world.parallel.context
    split = (f", {tensor} to a layer" if tensor > 1 else "") + (f", {context} to a row" if context > 1 else "")
    return Check("processes", f"{world.size}{split}, a sum over them agrees")


def _memory(target: Target, world: World) -> Check:
    """A run's states must fit, for no engine does without them; activations it may recompute, so those only warn."""
    need, sharded = memory(target), memory(target, shard=True)
    ranks = 1 if world.device.startswith("cuda") else world.here  # on a CPU the ranks of a host share its memory
    copy = STATE_BYTES * parameters(target.model).total * world.here
    least = (sharded.weights + sharded.optimizer) * ranks
    free, host = free_device_memory(world.device), available_memory()
    if world.device == "cpu":
        least += copy // max(target.hardware.count, 1)
    elif host is not None:
        _require(copy // max(target.hardware.count, 1), host, "host memory for the copy that a checkpoint is made of")
    total = need.total * ranks + (copy if world.device == "cpu" else 0)
    if free is None:
        return Check("memory", f"about {in_units(total)}; the system does not say what is available")
    _require(least, free, "memory for weights, optimizer states and, on a CPU, their copy for checkpoints")
    verdict = "" if total <= free else "; MORE than that: only an engine that recomputes or shards can run"
    return Check("memory", f"about {in_units(total)} of {in_units(free)} available{verdict}")


def _require(need: int, free: int, what: str) -> None:
    if need > free:
        raise UserError(
            f"needs at least {in_units(need)} of {what}, {in_units(free)} are available",
            key="hardware",
            remedy="use a larger machine or more ranks, or a smaller model; forgetrain estimate has the sums",
        )


def checkpoint_bytes(target: Target) -> int:
    return STATE_BYTES * parameters(target.model).total


def most_checkpoints(recipe: Recipe, settings: Training) -> int:
    """The most checkpoints that lie there at once: the kept ones, those kept besides, and the one being written."""
    regular = range(settings.checkpoint_every, recipe.steps + 1, settings.checkpoint_every)
    saves = len(regular) + (recipe.steps % settings.checkpoint_every != 0)
    besides = sum(step % settings.keep_every == 0 for step in regular) if settings.keep_every else 0
    needed_by_spikes = 1 if settings.spike_z else 0
    return min(saves, settings.keep_last + besides + needed_by_spikes + 1)


def _disk(target: Target, root: Path) -> Check:
    there = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    held = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) if root.is_dir() else 0
    count = most_checkpoints(target.recipe, target.train)
    need = count * checkpoint_bytes(target)
    if need > free + held:
        raise UserError(
            f"{count} checkpoints of {in_units(checkpoint_bytes(target))} need {in_units(need)}, "
            f"{in_units(free + held)} are free",
            file=root,
            remedy="free some space, or keep fewer with train.keep_last and train.keep_every",
        )
    return Check("disk", f"{in_units(need)} for {count} checkpoints, {in_units(free + held)} free")


def _writable(root: Path) -> Check:
    probe = root / ".writable"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(root)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot be written: {(error.strerror or str(error)).lower()}",
            file=root,
            remedy="name another place with --runs, or look at its permissions",
        ) from None
    return Check("checkpoint folder", f"{root} takes a synced file")


def plan_of(
    target: Target, run: Path, loader: Loader, chosen: ChosenEngine, world: World, first_step: int
) -> dict[str, Any]:
    """What the run will do from step ``first_step`` (steps taken before it) on; plain values, seconds, bytes."""
    recipe, settings, stages = target.recipe, target.train, stages_of(target)
    tokens = tokens_before(stages, recipe.steps) - tokens_before(stages, first_step)
    rate, measured = measured_speed(target, run, chosen, world.size)
    regular = [s for s in range(first_step + 1, recipe.steps + 1) if s % settings.checkpoint_every == 0]
    evaluations = sum(s % settings.eval_every == 0 for s in range(first_step + 1, recipe.steps))
    return {
        "target": target.name,
        "engine": chosen.facts(),
        "ranks": world.size,
        "device": world.device.partition(":")[0],
        "data": loader.data.sha256,
        "first_step": first_step + 1,
        "steps": recipe.steps,
        "tokens": tokens,
        "passes": round(loader.epoch_at(recipe.steps) - loader.epoch_at(first_step), 4),
        "lr": key_points(recipe),
        "stages": [
            {"name": s.name, "first": s.first + 1, "last": s.last, "shape": [s.batch_size, s.sequence_length]}
            for s in stages
        ],
        "checkpoints": len(regular) + (recipe.steps % settings.checkpoint_every != 0 and first_step < recipe.steps),
        "checkpoint_bytes": checkpoint_bytes(target),
        "most_checkpoints_at_once": most_checkpoints(recipe, settings),
        "evaluations": evaluations + 1,
        "tokens_per_second": rate,
        "seconds": None if rate is None else round(tokens / rate, 1),
        "measured_in": measured,
    }


def key_points(recipe: Recipe) -> list[dict[str, Any]]:
    """The rate at the first step, where the schedule bends, and at the last; steps counted from 1."""
    bends = [0, recipe.warmup_steps - 1, recipe.warmup_steps, recipe.steps - 1]
    if recipe.schedule == "wsd" and recipe.decay_steps:
        begins = recipe.steps - recipe.decay_steps
        bends += [begins, begins + recipe.decay_steps // 2]
    elif recipe.schedule == "cosine":
        bends.append((recipe.warmup_steps + recipe.steps) // 2)
    steps = sorted({step for step in bends if 0 <= step < recipe.steps})
    points = [{"step": step + 1, "lr": learning_rate(recipe, step)} for step in steps]
    inner = [
        now for before, now in pairwise(points[:-1]) if now["lr"] != before["lr"] or now["step"] > before["step"] + 1
    ]
    return [points[0], *inner, points[-1]] if len(points) > 1 else points


def measured_speed(target: Target, run: Path, chosen: ChosenEngine, ranks: int) -> tuple[float | None, str | None]:
    """Tokens a second that this very engine reached before, and the file that says so: this run's last summary, or the
    engine's own provenance for one device; (None, None) when nobody measured it."""
    before = run / "train" / "summary.json"
    if before.is_file():
        last = read_object(before, "remove it")
        same = last.get("engine", {}).get("sha256") == chosen.sha256 and last.get("ranks") == ranks
        if same and chosen.sha256 is not None and last.get("tokens_per_second", 0) > 0:
            return last["tokens_per_second"], str(before)
    for name in RECORDS:
        path = Path(chosen.name).parent / name
        if chosen.sha256 is None or ranks > 1 or not path.is_file():
            continue
        record = read_object(path, "verify the engine again")
        speed = record.get("speed", {}) if record.get("sha256") == chosen.sha256 else {}
        if speed.get("sequence_length") == target.recipe.sequence_length and speed.get("tokens_per_second"):
            return speed["tokens_per_second"], str(path)
    return None, None
