"""Which engine a run uses, and whether gates have passed it.

Aligning and judging leave ``verdicts.json`` (``provenance.json`` for engines that ship) beside an engine file:
``{"sha256": <of the engine file>, "verdicts": [{"gate": "G1", "pass": true, ...}, ...]}``. Training takes an engine
file whose SHA-256 is in one of them with every verdict passed, or any file with ``--unverified``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from forgetrain.durable import read_json, sha256_file
from forgetrain.engine.contract import Engine
from forgetrain.engine.plan import WITHOUT_NATIVE, Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.errors import UserError
from forgetrain.gates.verdict import require_verdicts
from forgetrain.numerics.determinism import make_deterministic
from forgetrain.spec.moments import state_shapes
from forgetrain.spec.target import Target
from forgetrain.train.world import World

RECORDS = ("verdicts.json", "provenance.json")
_REFERENCES = "forgetrain.reference."


@dataclass(frozen=True)
class ChosenEngine:
    """name: a file's path or a reference's module; status: one line that says why it may be used."""

    name: str
    sha256: str | None
    status: str
    verified: bool

    def load(self) -> ModuleType:
        return importlib.import_module(self.name) if self.sha256 is None else load_engine(self.name)

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "status": self.status}

    def build(self, target: Target, *, device: str, mesh: DeviceMesh | None, here: int = 1) -> tuple[Engine, bool]:
        """The engine without weights, and whether it is deterministic; torch is asked to be so for one that is, with
        the threads of a rank where ``here`` are on a host.

        Raises:
            UserError: it was made for another target, or this machine lacks what it needs.
        """
        module = self.load()
        for key, what in (("tensor", "layers"), ("context", "rows")):  # an engine that splits them says so
            split, wanted = getattr(module, f"{key.upper()}_PARALLEL", 1), getattr(target.parallel, key)
            if split != wanted:
                raise UserError(
                    f"splits {what} over {split} ranks, the target over {wanted}",
                    file=self.name,
                    key=f"parallel.{key}",
                    remedy="write the engine of this target with forgetrain engine write, or change the target's value",
                )
        computes, precision = getattr(module, "PRECISIONS", ("fp32", "bf16")), target.precision.dtype
        if precision not in computes:
            raise UserError(
                f"computes in {' and '.join(computes)}, the target in {precision}",
                file=self.name,
                key="precision.dtype",
                remedy="write the engine of this target with forgetrain engine write, or change the target's value",
            )
        deterministic = getattr(module, "DETERMINISTIC", True)  # an engine that cannot be says so
        if deterministic:
            make_deterministic(target.hardware.threads_of(here), target.hardware.device)
        try:
            engine = module.build(target.plain(), device=device, precision=precision, mesh=mesh)
        except ValueError as error:
            raise UserError(f"refuses the target: {error}", file=self.name, remedy="align this target") from error
        except OSError as error:
            remedy = "see to that, or choose another engine with --engine"
            reason = str(error).partition("\n")[0]  # a compiler says more than a line
            raise UserError(f"cannot be built here: {reason}", file=self.name, remedy=remedy) from error
        return engine, deterministic


def require_moments(engine: Engine, target: Target, name: str, world: World) -> None:
    """Refuses an engine with loaded weights that keeps other moments than the recipe's optimizer has: it would step
    with another one."""
    due = set(state_shapes(target))
    found = set().union(*world.gather(set(engine.state())))  # a sharded engine's ranks may each name a part
    if odd := sorted(found ^ due):
        what = f"has no {odd[0]}" if odd[0] in due else f"has {odd[0]}, which no such optimizer keeps"
        raise UserError(
            f"is an engine of another optimizer: its state {what}",
            file=name,
            key="recipe.optimizer",
            value=target.recipe.optimizer,
            remedy="write the engine of this target: forgetrain align, or forgetrain engine write",
        )


def find_verdicts(file: Path, also_in: list[Path]) -> list[dict[str, Any]] | None:
    """The verdicts recorded for exactly this file's content, or None; looked for beside it and in ``also_in``."""
    sha256 = sha256_file(file)
    for folder in [file.parent, *also_in]:
        for name in RECORDS:
            if not (folder / name).is_file():
                continue
            record = read_json(folder / name, "verify the engine again")
            if isinstance(record, dict) and record.get("sha256") == sha256 and record.get("verdicts"):
                require_verdicts(record["verdicts"], folder / name)
                return record["verdicts"]
    return None


def shipped_engine(target: Target) -> Path | None:
    """The engine of ``engines/<target>`` if its provenance says that it passed its gates for what this target computes.
    Nobody asked for it, so whatever is wrong there is not told."""
    file = Path("engines") / target.name / "engine.py"
    try:
        made_for = read_json(file.parent / "provenance.json", "")["target"]
        verdicts = find_verdicts(file, []) if _computed(made_for) == _computed(target.plain()) else None
        return file if verdicts and all(verdict["pass"] for verdict in verdicts) else None
    except (OSError, UserError, LookupError, TypeError):
        return None


def _computed(target: Mapping[str, Any]) -> list[Any]:
    """What of a target's plain values an engine's text is made of."""
    sections = [target[key] for key in ("model", "precision", "parallel")]
    return [*sections, target["recipe"]["optimizer"], target["data"]["documents"]]


def choose_engine(target: Target, run: Path, engine: str | None, *, unverified: bool) -> ChosenEngine:
    """The engine that was asked for: a file, ``megatron`` or ``transformers``; without one the run's aligned engine,
    and before aligning the textbook engine of the target, written to ``run/train/engine.py``; where layers or rows
    are split over ranks, which the textbook has not, the production schedule's.

    Raises:
        UserError: no such file, or one without passed verdicts and not ``unverified``.
    """
    if engine in ("megatron", "transformers"):
        return ChosenEngine(_REFERENCES + engine, None, "the reference itself", True)
    aligned = run / "engine" / "engine.py"
    if engine is None and not aligned.is_file():
        path = run / "train" / "engine.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        name, plan = "textbook", Plan.textbook()
        if target.parallel.sharing > 1:
            kernels = {} if target.hardware.device == "cpu" else WITHOUT_NATIVE
            name, plan = "production", Plan({"schedule": "production", "rope_tables": "fp32", **kernels})
            if target.parallel.context > 1:
                plan = plan.with_choice("attention_kernel", "blocked")
        path.write_text(write_engine(target, plan), encoding="utf-8")
        return ChosenEngine(str(path), sha256_file(path), f"{name} plan, not aligned with a reference", False)
    path = aligned if engine is None else Path(engine)
    if not path.is_file():
        raise UserError("no such engine file", file=path, remedy="forgetrain align TARGET writes one")
    verdicts = find_verdicts(path, [run / "engine", Path("engines") / target.name])
    failed = [str(verdict.get("gate")) for verdict in verdicts or [] if not verdict.get("pass")]
    if verdicts and not failed:
        gates = sorted({str(verdict.get("gate")) for verdict in verdicts})
        return ChosenEngine(str(path), sha256_file(path), f"passed {', '.join(gates)}", True)
    reason = f"failed {', '.join(failed)}" if failed else "has no verdict for this content"
    if not unverified:
        raise UserError(
            f"the engine {reason}",
            file=path,
            remedy=f"have it judged with forgetrain judge {path} --target TARGET, or add --unverified",
        )
    return ChosenEngine(str(path), sha256_file(path), f"unverified: {reason}", False)
