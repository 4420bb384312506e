"""``forgetrain train``: drives an engine through a target's steps, and loses nothing on the way.

    summary = train(load_target("targets/nano-cpu.toml"), runs=Path("runs"))
    summary["held_out_loss"], summary["unigram_loss"], summary["checkpoint"]

A run lives in ``runs/<target>``: ``data/``, ``engine/`` (aligned), ``checkpoints/``, and ``train/`` with run.json (the
resolved target), metrics.jsonl, tensorboard/ and summary.json. Everything that a step depends on is a function of the
target, the data and the step's number, and the engine's state is in the checkpoint; so a resumed run equals one that
was never interrupted, bit for bit.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import forgetrain
from forgetrain.data.folder import DataFolder, open_data
from forgetrain.data.loader import Loader
from forgetrain.durable import write_json
from forgetrain.engine.contract import Engine, weight_hash
from forgetrain.errors import UserError
from forgetrain.numerics.determinism import fingerprint, make_deterministic
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.schedule import learning_rate
from forgetrain.spec.target import Target
from forgetrain.train import checkpoint
from forgetrain.train.display import Display, say
from forgetrain.train.health import Health, check_result, first_bad_tap, save_evidence
from forgetrain.train.metrics import Clock, Journal, Lagged, Measured, read_journal
from forgetrain.train.recheck import Recheck
from forgetrain.train.saving import Saver
from forgetrain.train.speed import Speed
from forgetrain.train.stop import SAVE_FAILED, Stop
from forgetrain.train.verified import ChosenEngine, choose_engine
from forgetrain.train.world import World, start_world

#: What must be equal for a checkpoint to go on: other values would make another run of it.
FIXED = (
    *("model", "precision", "recipe.optimizer", "recipe.batch_size", "recipe.sequence_length", "recipe.seed"),
    "data.documents",
)


def train(
    target: Target,
    *,
    runs: Path = Path("runs"),
    engine: str | None = None,
    unverified: bool = False,
    resume: bool = False,
    restart: bool = False,
    stop_after: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains a target and returns its summary, which is also ``runs/<target>/train/summary.json``.

    engine: an engine file, ``megatron`` or ``transformers``; None takes the run's aligned engine, or the textbook one.
    unverified: take an engine file that no gate has passed. resume: go on from the newest good checkpoint, or start
    when there is none. restart: throw the run's checkpoints and metrics away first. stop_after: stop after so many
    steps, as an interruption would; the schedule is still the target's.

    Under torchrun every rank calls it. SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and ``train.deadline`` stop the run after a
    step with a checkpoint; the summary's ``interrupted`` then names which.

    Raises:
        UserError: bad input, or a run whose gradients stay non-finite; see the message.
    """
    run = runs / target.name
    console = console or Console(stderr=True)
    threads, device = target.hardware.threads, target.hardware.device
    with start_world(device=device, threads=threads) as world:
        if world.rank != 0:
            console = Console(quiet=True)
        if restart:
            world.first(lambda: _clear(run))
        chosen = world.first(lambda: choose_engine(target, run, engine, unverified=unverified))
        world.first(lambda: _check_data(target, run))
        data = open_data(run / "data", target, verify=False)
        found = world.first(lambda: _find_start(target, run, data, chosen, console, resume=resume))
        loader = Loader(data, target, rank=world.rank, world=world.size, device=world.device)
        job = Job(target, run, world, console, chosen, data, loader)
        job.start(found)
        settings = target.train
        with (
            Stop(world, settings.deadline_seconds) as stop,
            Saver(job.root, world, keep_last=settings.keep_last, keep_every=settings.keep_every) as saver,
        ):
            return job.run_steps(stop, saver, min(stop_after or target.recipe.steps, target.recipe.steps))


def _clear(run: Path) -> None:
    for folder in (run / "checkpoints", run / "train"):
        shutil.rmtree(folder, ignore_errors=True)


def _check_data(target: Target, run: Path) -> None:
    open_data(run / "data", target)


def _find_start(
    target: Target, run: Path, data: DataFolder, chosen: ChosenEngine, console: Console, *, resume: bool
) -> checkpoint.Checkpoint | None:
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
        if (before := found.manifest["engine"])["sha256"] != chosen.sha256:
            say(console, f"resuming with the engine {chosen.name}, before it was {before['name']}")
        checkpoint.put_aside_after(root, found.step)
    return found


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
        if key.startswith(("recipe.", "hardware.")):
            say(console, f"resuming with {key} = {now.get(key)!r}, which was {before.get(key)!r}")
    if found.manifest["data"] != data.sha256:
        raise UserError(
            "was trained on other data than the run's data folder holds now",
            file=found.path,
            remedy="restore that data, or start again with --restart",
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@dataclass
class Job:
    """One run in this process: what ``train`` set up, and the loop over steps."""

    target: Target
    run: Path
    world: World
    console: Console
    chosen: ChosenEngine
    data: DataFolder
    loader: Loader
    step: int = 0  # steps taken
    seconds: float = 0.0  # of steps, over all resumes
    held_out: dict[int, float] = field(default_factory=dict)
    last: Measured | None = None
    engine: Engine = field(init=False)
    health: Health = field(init=False)
    recheck: Recheck = field(init=False)
    journal: Journal | None = None

    @property
    def root(self) -> Path:
        return self.run / "checkpoints"

    def start(self, found: checkpoint.Checkpoint | None) -> None:
        """Builds the engine, with initial weights or those of a checkpoint, and opens the journal."""
        target = self.target
        learning_rate(target.recipe, target.recipe.steps)  # a schedule that cannot be is refused before the first step
        module = self.chosen.load()
        deterministic = getattr(module, "DETERMINISTIC", True)  # an engine that cannot be says so
        if deterministic:
            make_deterministic(target.hardware.threads)
        try:
            self.engine = module.build(
                target.plain(), device=self.world.device, precision=target.precision.dtype, mesh=self.world.mesh
            )
        except ValueError as error:
            raise UserError(
                f"refuses the target: {error}", file=self.chosen.name, remedy="align this target"
            ) from error
        self.engine.load(initial_weights(target.model, target.recipe.seed))
        skipped = 0
        if found is not None:
            checkpoint.load(self.engine, found.path, self.world)
            self.step, self.seconds = found.step, found.manifest["seconds"]
            skipped = found.manifest["skipped"]
        self.health = Health(target.train.skip_limit, skipped)
        self.held_out = self.world.first(self._past_losses)
        if self.world.rank == 0:
            self.journal = Journal(self.run / "train", self.step)
            write_json(self.run / "train" / "run.json", self._facts() | {"resumed_at": self.step or None})
        say(self.console, self._headline())
        self.recheck = Recheck(
            every=target.train.recheck_every, deterministic=deterministic, world=self.world, evidence=self.run / "train"
        )
        if self.recheck.off_because_of_engine:
            say(self.console, "train.recheck_every is off: the engine says that it is not deterministic", "yellow")

    def _past_losses(self) -> dict[int, float]:
        lines = read_journal(self.run / "train" / "metrics.jsonl")
        return {line["step"]: line["held_out_loss"] for line in lines if line.get("held_out_loss") is not None}

    def run_steps(self, stop: Stop, saver: Saver, last: int) -> dict[str, Any]:
        settings, recipe = self.target.train, self.target.recipe
        lagged, clock = Lagged(self.world.device, settings.log_every), Clock()
        speed = Speed(self.target, self.world)
        before, asked = self.seconds, ""
        saved = self.step if checkpoint.folder_of(self.root, self.step).is_dir() else None
        with Display(self.console, recipe.steps, self.step) as display:
            for step, batch in self.loader.batches(self.step, last):
                lr = learning_rate(recipe, step)
                result = self.recheck.step(self.engine, batch, lr, step + 1)
                if step == self.step:
                    check_result(result, self.chosen.name)
                self.step = step + 1
                lagged.push(self.step, lr, result)
                asked = stop.agreed(save_failed=saver.failed)
                if asked == SAVE_FAILED:
                    saver.wait()
                ends = bool(asked) or self.step == last
                pauses = self.step % settings.eval_every == 0 or self.step % settings.checkpoint_every == 0 or ends
                for measured in lagged.ready(all=pauses):
                    self._note(measured, speed.tokens_per_second(measured.step, clock.seconds()), speed, display)
                self.seconds = before + clock.seconds()
                with clock.paused():
                    if self.step % settings.eval_every == 0 and not ends:
                        self._evaluate(display, settings.eval_windows)
                    if self.step % settings.checkpoint_every == 0 or ends:
                        saved = self._save(saver)
                if ends:
                    break
            finished = self.step >= recipe.steps
            if finished and self.step not in self.held_out:
                self._evaluate(display, None)
        if saved != self.step:
            self._save(saver)
        saver.wait()
        summary = self._summary(speed, asked if asked and not finished else None)
        if self.journal is not None:
            self.journal.close()
            write_json(self.run / "train" / "summary.json", summary)
        return summary

    def _note(self, measured: Measured, rate: float, speed: Speed, display: Display) -> None:
        """Records a step's numbers, and ends the run when too many in a row were not finite."""
        over = self.health.sees(measured, self.chosen.name)
        self.last = measured
        if self.journal is not None:
            self.journal.write(
                measured.step,
                loss=measured.loss,
                grad_norm=measured.grad_norm,
                lr=measured.lr,
                applied=measured.applied,
                tokens_per_second=round(rate, 1),
                **speed.shares(rate),
            )
        numbers = f"loss {measured.loss:.4f}  lr {measured.lr:.2e}  norm {measured.grad_norm:.3f}"
        skipped = f"  skipped {self.health.skipped}" if self.health.skipped else ""
        display.show(measured.step, f"{numbers}  {speed.text(rate)}{skipped}")
        if over:
            folder = self.run / "train" / f"evidence-{measured.step:08d}"
            batch = self.loader.batch_at(measured.step - 1)
            tap = first_bad_tap(self.engine, batch)
            if self.world.rank == 0:
                numbers = {key: str(value) for key, value in measured._asdict().items()}
                save_evidence(folder, batch, numbers | {"step": measured.step, "first_bad_tap": tap})
            raise UserError(
                f"no finite gradient norm in {self.health.in_a_row} steps in a row, the last {measured.step}",
                file=folder,
                remedy="its batch is saved there; lower recipe.lr, or ask forgetrain align --engine about the engine",
            )

    def _evaluate(self, display: Display, limit: int | None) -> None:
        total = counted = 0.0
        for batch, weight in self.loader.held_out(limit):
            loss = float(self.engine.loss(batch))  # every rank calls it: an engine may speak with the others in it
            total, counted = total + (loss * weight if weight else 0.0), counted + weight
        total, counted = self.world.sum(total, counted)
        loss = total / counted
        self.held_out[self.step] = loss
        if self.journal is not None:
            self.journal.write(self.step, held_out_loss=loss)
        unigram = self.data.manifest["unigram_loss"]["held_out"]
        display.say(f"step {self.step}: held-out loss {loss:.4f}  (a unigram model of the same tokens: {unigram:.4f})")

    def _save(self, saver: Saver) -> int:
        facts = self._facts() | {"seconds": self.seconds, "skipped": self.health.skipped}
        saver.start(self.engine, self.step, facts, self.data.tokenizer.folder)
        return self.step

    def _facts(self) -> dict[str, Any]:
        """What a run is a function of; in run.json and in every checkpoint."""
        device = self.target.hardware.device
        return {
            "forgetrain": forgetrain.__version__,
            "target": self.target.plain(),
            "data": self.data.sha256,
            "engine": {"name": self.chosen.name, "sha256": self.chosen.sha256, "status": self.chosen.status},
            "environment": fingerprint(device=device, threads=self.target.hardware.threads, ranks=self.world.size),
        }

    def _headline(self) -> str:
        recipe, tokens = self.target.recipe, sum(len(s.train.tokens) for s in self.data.sources)
        where = f"resuming at step {self.step}" if self.step else f"{recipe.steps} steps"
        return (
            f"{self.target.name}: {where} of {recipe.batch_size} x {recipe.sequence_length} tokens "
            f"({self.loader.epoch_at(recipe.steps):.2f} passes over {tokens:,} tokens), "
            f"{self.target.precision.dtype} on {self.world.size} x {self.world.device}; "
            f"engine {self.chosen.name} ({self.chosen.status})"
        )

    def _summary(self, speed: Speed, interrupted: str | None) -> dict[str, Any]:
        recipe = self.target.recipe
        state = self.engine.state()
        whole = all(tuple(s.tensor.shape) == tuple(s.global_shape) for s in state.values())
        rate = self.step * recipe.batch_size * recipe.sequence_length / self.seconds if self.seconds else math.nan
        return {
            "target": self.target.name,
            "steps": self.step,
            "finished": self.step >= recipe.steps,
            "interrupted": interrupted,
            "loss": self.last.loss if self.last else None,
            "held_out_loss": self.held_out.get(self.step),
            "unigram_loss": self.data.manifest["unigram_loss"]["held_out"],
            "tokens": self.step * recipe.batch_size * recipe.sequence_length,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(rate, 1),
            **speed.shares(rate),
            "skipped_steps": self.health.skipped,
            "ranks": self.world.size,
            "engine": {"name": self.chosen.name, "sha256": self.chosen.sha256, "status": self.chosen.status},
            "weight_sha256": weight_hash(state) if whole else None,
            "checkpoint": str(checkpoint.folder_of(self.root, self.step)),
            "metrics": str(self.run / "train" / "metrics.jsonl"),
        }
