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
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import forgetrain
from forgetrain.data.folder import DataFolder, open_data
from forgetrain.data.loader import Loader
from forgetrain.durable import write_json
from forgetrain.engine.contract import Batch, Engine
from forgetrain.errors import UserError
from forgetrain.numerics.device import check_device
from forgetrain.numerics.init import AheadWeights
from forgetrain.spec.schedule import learning_rate
from forgetrain.spec.stages import stage_at
from forgetrain.spec.target import Target
from forgetrain.train import checkpoint
from forgetrain.train.display import Display, say
from forgetrain.train.evaluate import HeldOut, evaluate, past_evaluations
from forgetrain.train.health import Health, check_result, first_bad_tap, save_evidence
from forgetrain.train.initial import CheckInitial, FolderWeights, compared, described, find_initial, recorded
from forgetrain.train.lock import only_run
from forgetrain.train.machine import memory_left, peak_memory
from forgetrain.train.metrics import Clock, Journal, Lagged, Measured
from forgetrain.train.preflight import check_machine, plan_of
from forgetrain.train.profile import Profile, require_within
from forgetrain.train.recheck import Recheck
from forgetrain.train.saving import Saver
from forgetrain.train.speed import Speed
from forgetrain.train.spikes import Spikes, first_grown, sizes_of_taps
from forgetrain.train.stages import comparable, mean_length, require_every_length, tokens_by_length
from forgetrain.train.start import clear, environment_of, find_start
from forgetrain.train.stop import SAVE_FAILED, Stop
from forgetrain.train.tracking import Tracker
from forgetrain.train.verified import ChosenEngine, choose_engine, require_moments, shipped_engine
from forgetrain.train.world import World, start_world, started_again_by


def train(
    target: Target,
    *,
    runs: Path = Path("runs"),
    engine: str | None = None,
    unverified: bool = False,
    resume: bool = False,
    restart: bool = False,
    stop_after: int | None = None,
    dry_run: bool = False,
    profile_steps: tuple[int, int] | None = None,
    init_from: Path | None = None,
    check_initial: CheckInitial | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains a target and returns its summary, which is also ``runs/<target>/train/summary.json``.

    engine: an engine file, ``megatron`` or ``transformers``; None takes the run's aligned engine, or the textbook one.
    unverified: take an engine file that no gate has passed. resume: go on from the newest good checkpoint, or start
    when there is none. restart: throw the run's checkpoints and metrics away first; resume where torchrun or Slurm has
    started the command again. stop_after: stop after so many steps, as an interruption would; the schedule is still the
    target's.
    dry_run: check everything before the first step, and return the plan (``preflight``). profile_steps: the first and
    last step that torch.profiler records. init_from: a Hugging Face folder with the weights of step 0; check_initial
    compares them with transformers' model, and its figures go into run.json.

    Under torchrun every rank calls it. SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and ``train.deadline`` stop the run after a
    step with a checkpoint; the summary's ``interrupted`` then names which.

    Raises:
        UserError: bad input, or a run whose gradients stay non-finite; see the message.
    """
    run = runs / target.name
    console = console or Console(stderr=True)
    check_device(target.hardware)
    with start_world(target.hardware, target.parallel) as world, ExitStack() as held:
        world.first(lambda: held.enter_context(only_run(run)))
        if world.rank != 0:
            console = Console(quiet=True)
        if restart and (who := started_again_by()) is not None:  # or each lost rank would throw the run away
            say(
                console,
                f"{who} has started this run again: --restart goes on from the newest checkpoint, as --resume does",
            )
            resume, restart = True, False
        chosen = world.first(lambda: choose_engine(target, run, engine, unverified=unverified))
        if engine is None and not chosen.verified and (shipped := shipped_engine(target)) is not None:
            say(console, f"{shipped} has passed its gates: --engine {shipped} trains with it")
        world.first(lambda: _check_data(target, run))
        data = open_data(run / "data", target, verify=False)
        found = None
        if not restart:
            here = environment_of(target, world)
            found = world.first(lambda: find_start(target, run, data, chosen, here, console, resume=resume))
        first_step, last = found.step if found else 0, min(stop_after or target.recipe.steps, target.recipe.steps)
        loader = world.each(
            lambda: Loader(data, target, rank=world.data_rank, world=world.data_size, device=world.device)
        )
        if profile_steps is not None:
            require_within(profile_steps, first_step, last)
        checks = check_machine(target, run, world)
        initial = find_initial(target, run, init_from, found, restart=restart)
        if initial is not None and found is None:
            initial.require_tokenizer(data)
        job = Job(target, run, world, console, chosen, data, loader, initial)
        job.prepare(found, check_initial)
        if dry_run:
            plan = plan_of(target, run, loader, chosen, world, first_step)
            return plan | {"checks": [check._asdict() for check in checks]}
        if restart:  # not before every check has passed
            world.first(lambda: clear(run))
        if found is not None:
            world.first(lambda: checkpoint.put_aside_after(run / "checkpoints", found.step))
        if profile_steps is not None and world.rank == 0:
            job.profile = Profile(profile_steps, run / "train" / "profile", console)
        job.start(found)
        settings = target.train
        with (
            Stop(world, settings.deadline_seconds) as stop,
            Saver(job.root, world, settings) as saver,
        ):
            saver.reserve(job.engine)
            return job.run_steps(stop, saver, last)


def _check_data(target: Target, run: Path) -> None:
    open_data(run / "data", target)


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
    initial: FolderWeights | None = None  # None draws them from the recipe's seed
    init_from: dict[str, Any] | None = None
    profile: Profile | None = None
    tracker: Tracker | None = None
    step: int = 0  # steps taken
    came_from: checkpoint.Checkpoint | None = None  # what the engine was brought to last
    seconds: float = 0.0  # of steps, over all resumes
    held_out: dict[int, HeldOut] = field(default_factory=dict)
    last: Measured | None = None
    engine: Engine = field(init=False)
    deterministic: bool = field(init=False)
    health: Health = field(init=False)
    spikes: Spikes = field(init=False)
    recheck: Recheck = field(init=False)
    saved: int = 0  # the step of the last checkpoint that was written or begun; 0 for none
    journal: Journal | None = None

    @property
    def root(self) -> Path:
        return self.run / "checkpoints"

    def prepare(self, found: checkpoint.Checkpoint | None, check_initial: CheckInitial | None) -> None:
        """Builds the engine with initial weights, and refuses one that cannot make this run; writes nothing."""
        target, device, name = self.target, self.world.device, self.chosen.name
        self.engine, self.deterministic = self.chosen.build(
            target, device=device, mesh=self.world.mesh, here=self.world.here
        )
        self.init_from = None if found is None else found.manifest.get("init_from")
        if (initial := self.initial) is not None:
            self.init_from = self.world.first(lambda: compared(target, initial, self.chosen, check_initial))
            say(self.console, described(self.init_from))
        self._load_initial()
        require_moments(self.engine, target, name, self.world)
        require_every_length(self.engine, self.loader.stages, target, device=device, name=name)

    def start(self, found: checkpoint.Checkpoint | None) -> None:
        """Brings the prepared engine to a checkpoint, if there is one, and opens the journal."""
        target = self.target
        self._go_on_from(found)
        past = {} if found is None else found.manifest
        self.seconds = past.get("seconds", 0.0)
        self.health = Health(target.train.skip_limit, past.get("skipped", 0))
        train = target.train
        self.spikes = Spikes(
            z=train.spike_z, window=train.spike_window, repeats=train.spike_repeats, kept=past.get("spikes")
        )
        self.held_out = self.world.first(self._past_losses)
        if self.world.rank == 0:
            self.tracker = None if train.wandb is None else Tracker(target, self.run / "train")
            self.journal = Journal(self.run / "train", self.step, self.tracker)
            write_json(self.run / "train" / "run.json", self._facts() | {"resumed_at": self.step or None})
        say(self.console, self._headline())
        self.recheck = Recheck(
            every=target.train.recheck_every,
            deterministic=self.deterministic,
            world=self.world,
            evidence=self.run / "train",
        )
        if self.recheck.off_because_of_engine:
            say(self.console, "train.recheck_every is off: the engine says that it is not deterministic", "yellow")

    def _load_initial(self) -> None:
        recipe, initial = self.target.recipe, self.initial
        # Both give one tensor at a time, for a rank that keeps parts may have no room for the whole
        if initial is not None:
            self.engine.load(initial)
        else:
            cores = len(os.sched_getaffinity(0))  # a launcher may have given each rank its own
            cores = max(1, min(8, cores if cores != os.cpu_count() else cores // self.world.here))
            with AheadWeights(self.target.model, recipe.seed, cores) as weights:
                self.engine.load(weights)

    def _go_on_from(self, found: checkpoint.Checkpoint | None) -> None:
        """Brings an engine that has initial weights to a checkpoint; None is the beginning."""
        if found is not None:
            checkpoint.load(self.engine, found.path, self.world)
        self.came_from = found
        self.step = self.saved = 0 if found is None else found.step

    def _past_losses(self) -> dict[int, HeldOut]:
        """Those up to the checkpoint: what came after it was of weights that are no more."""
        past = past_evaluations(self.run / "train" / "metrics.jsonl", self.data.sources[0].name)
        return {step: held_out for step, held_out in past.items() if step <= self.step}

    def run_steps(self, stop: Stop, saver: Saver, last: int) -> dict[str, Any]:
        """Steps until ``last``, or until something asks to stop; then the summary."""
        recipe, speed = self.target.recipe, Speed(self.target, self.world, self.loader.stages, self.spikes.offset)
        with Display(self.console, recipe.steps, self.step) as display:
            while isinstance(asked := self._stretch(stop, saver, last, speed, display), Measured):
                self._roll_back(asked, saver, display)
                speed = Speed(self.target, self.world, self.loader.stages, self.spikes.offset)
            finished = self.step >= recipe.steps
            if finished and self.step not in self.held_out:
                self._evaluate(display, None)
        if self.saved != self.step or not self.saved:
            self._save(saver)
        saver.wait()
        if self.profile is not None:
            self.profile.close()
        summary = self._summary(speed, asked if asked and not finished else None)
        if self.journal is not None:
            self.journal.close()
            write_json(self.run / "train" / "summary.json", summary)
        if self.tracker is not None:
            self.tracker.close()
        return summary

    def _stretch(self, stop: Stop, saver: Saver, last: int, speed: Speed, display: Display) -> str | Measured:
        """Steps until ``last``, or what asked to stop (a name, or ""), or the step whose spike asks to go back."""
        settings, recipe = self.target.train, self.target.recipe
        lagged, clock = Lagged(self.world.device, settings.log_every), Clock()
        before, began, asked, offset = self.seconds, self.step, "", self.spikes.offset
        for number, batch in self.loader.batches(began + offset, last + offset):
            step = number - offset
            self._enter(number, began + offset, display)
            lr = learning_rate(recipe, step)
            if self.profile is not None:
                self.profile.before(step + 1)
            result = self.recheck.step(self.engine, batch, lr, step + 1)
            if step == began:
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
                stage = comparable(self.loader.stages, measured.step - 1 + offset)
                if measured.applied and self.spikes.sees(measured.step, measured.loss, stage):
                    self.seconds = before + clock.seconds()
                    return measured
            self.seconds = before + clock.seconds()
            with clock.paused():
                if self.step % settings.eval_every == 0 and not ends:
                    self._evaluate(display, settings.eval_windows)
                if self.step % settings.checkpoint_every == 0 or ends:
                    self._save(saver)
            if ends:
                break
        return asked

    def _enter(self, number: int, began: int, display: Display) -> None:
        """Says where a stage begins, and lets the engine give back what it holds for the length before."""
        stage = stage_at(self.loader.stages, number)
        if not stage.name or number not in (stage.first, began):
            return
        shape = f"{stage.batch_size} x {stage.sequence_length} tokens"
        display.say(f"stage {stage.name} from step {number - self.spikes.offset + 1}, {shape} a step")
        if number != began and hasattr(self.engine, "release"):
            self.engine.release()  # type: ignore[attr-defined]  # engines that capture graphs have it

    def _roll_back(self, spike: Measured, saver: Saver, display: Display) -> None:
        """To the newest good checkpoint, and past the batches taken since; an interruption to stop is heard after the
        next step. Ends the run when going back to that checkpoint has not helped before.
        """
        saver.wait()
        found = self.world.first(lambda: self._newest_good(spike))
        if found is None and (known := self.init_from) is not None:  # before anything is removed
            self.initial = self.world.each(lambda: recorded(known, self.target))
        back_to, kept = (0, None) if found is None else (found.step, found.manifest.get("spikes"))
        gives_up = self.spikes.times_back_to(back_to) >= self.target.train.rollback_limit
        batch = self.loader.batch_at(spike.step - 1 + self.spikes.offset)
        bad = sizes_of_taps(self.engine, batch) if gives_up else {}
        self.world.first(lambda: checkpoint.remove_after(self.root, back_to))
        self._load_initial()
        self._go_on_from(found)
        if gives_up:
            self._give_up(spike, back_to, batch, bad)
        self.spikes.rolled_back(spike.step, back_to, spike.loss, kept)
        self.held_out = {step: loss for step, loss in self.held_out.items() if step <= back_to}
        if self.journal is not None:
            self.journal.close()
            self.journal = Journal(self.run / "train", back_to, self.tracker)
        first, end = self.spikes.rollbacks[-1]["batches_left_out"]
        display.say(
            f"step {spike.step}: loss {spike.loss:.4f}, spike {self.spikes.repeats} in a row; back to step {back_to}, "
            f"batches {first} to {end - 1} are left out"
        )

    def _newest_good(self, spike: Measured) -> checkpoint.Checkpoint | None:
        """The newest regular checkpoint from before the spikes that verifies; None is the beginning."""
        until = self.spikes.newest_good(spike.step)
        for path in checkpoint.regular(self.root, until):
            try:
                return checkpoint.verify(path)
            except UserError as error:
                say(self.console, f"passing over a damaged checkpoint: {error}", "yellow")
        if checkpoint.regular_was_due(self.came_from, self.target.train.checkpoint_every, until):
            raise UserError(
                f"losses spike since step {self.spikes.first} and no good checkpoint from before is left",
                file=self.root,
                remedy="resume from a copy of an older one, or --restart with a lower recipe.lr",
            )
        return None

    def _give_up(self, spike: Measured, back_to: int, batch: Batch, bad: dict[str, float]) -> None:
        good = sizes_of_taps(self.engine, batch)  # the engine is at the good checkpoint again
        tap = first_grown(bad, good)
        folder = self.run / "train" / f"evidence-{spike.step:08d}"
        numbers: dict[str, Any] = {key: str(value) for key, value in spike._asdict().items()}
        numbers |= {"step": spike.step, "first_bad_tap": tap, "good_step": back_to, "rollbacks": self.spikes.rollbacks}
        if tap is not None:
            numbers |= {"tap_rms": str(bad[tap]), "tap_rms_with_good_weights": str(good[tap])}
        self.world.first(lambda: save_evidence(folder, batch, numbers))
        raise UserError(
            f"losses spike again at step {spike.step}, after going back to step {back_to} "
            f"{self.target.train.rollback_limit} times; first bad tap: {tap or 'none found'}",
            file=folder,
            remedy="its batch is saved there; lower recipe.lr, look at the data, or raise train.spike_z, then --resume",
        )

    def _note(self, measured: Measured, rate: float, speed: Speed, display: Display) -> None:
        """Records a step's numbers, and ends the run when too many in a row were not finite."""
        over = self.health.sees(measured, self.chosen.name)
        self.last, shares = measured, speed.shares(rate, speed.length_at(measured.step))
        if self.journal is not None:
            numbers = {"loss": measured.loss, "grad_norm": measured.grad_norm, "lr": measured.lr}
            rates = {"tokens_per_second": round(rate, 1), **shares}
            self.journal.write(measured.step, **numbers, applied=measured.applied, **rates)
        display.show(measured.step, lambda: self._line(measured, speed.text(rate, shares)))
        if over:
            folder = self.run / "train" / f"evidence-{measured.step:08d}"
            batch = self.loader.batch_at(measured.step - 1 + self.spikes.offset)
            tap = first_bad_tap(self.engine, batch)
            if self.world.rank == 0:
                numbers = {key: str(value) for key, value in measured._asdict().items()}
                save_evidence(folder, batch, numbers | {"step": measured.step, "first_bad_tap": tap})
            raise UserError(
                f"no finite gradient norm in {self.health.in_a_row} steps in a row, the last {measured.step}",
                file=folder,
                remedy="its batch is saved there; lower recipe.lr, or ask forgetrain align --engine about the engine",
            )

    def _line(self, measured: Measured, speed: str) -> str:
        numbers = f"loss {measured.loss:.4f}  lr {measured.lr:.2e}  norm {measured.grad_norm:.3f}"
        skipped = f"  skipped {self.health.skipped}" if self.health.skipped else ""
        epoch = self.loader.epoch_at(measured.step + self.spikes.offset)
        return f"{numbers}  {speed}  data {epoch:.2f}{memory_left(self.world.device)}{skipped}"

    def _evaluate(self, display: Display, limit: int | None) -> None:
        held_out = self.held_out[self.step] = evaluate(self.engine, self.loader, self.world, limit)
        if self.journal is not None:
            self.journal.write(self.step, **held_out.line())
        each = "".join(f"  {name} {loss:.4f}" for name, loss in held_out.by_source.items())
        unigram = self.data.manifest["unigram_loss"]["held_out"]
        display.say(
            f"step {self.step}: held-out loss {held_out.loss:.4f}  (a unigram model of the same tokens: {unigram:.4f})"
        )
        if len(held_out.by_source) > 1:
            display.say(f"  of each source:{each}")

    def _save(self, saver: Saver) -> None:
        facts = self._facts() | {"seconds": self.seconds, "skipped": self.health.skipped, "spikes": self.spikes.kept()}
        needed = self.spikes.newest_good(self.step) if self.target.train.spike_z else None
        saver.start(self.engine, self.step, facts, self.data.tokenizer.folder, needed)
        self.saved = self.step

    def _facts(self) -> dict[str, Any]:
        """What a run is a function of; in run.json and in every checkpoint."""
        return ({} if self.init_from is None else {"init_from": self.init_from}) | {
            "forgetrain": forgetrain.__version__,
            "target": self.target.plain(),
            "data": self.data.sha256,
            "engine": self.chosen.facts(),
            "environment": environment_of(self.target, self.world),
        }

    def _headline(self) -> str:
        recipe, tokens = self.target.recipe, sum(len(s.train.tokens) for s in self.data.sources)
        where = f"resuming at step {self.step}" if self.step else f"{recipe.steps} steps"
        stages = self.loader.stages
        shapes = list(dict.fromkeys(f"{stage.batch_size} x {stage.sequence_length}" for stage in stages))
        return (
            f"{self.target.name}: {where} of {', then '.join(shapes)} tokens "
            f"({self.loader.epoch_at(recipe.steps):.2f} passes over {tokens:,} tokens), "
            f"{self.target.precision.dtype} on {self.world.size} x {self.world.device}; "
            f"engine {self.chosen.name} ({self.chosen.status})"
        )

    def _summary(self, speed: Speed, interrupted: str | None) -> dict[str, Any]:
        recipe, left_out = self.target.recipe, [rollback["batches_left_out"] for rollback in self.spikes.rollbacks]
        by_length = tokens_by_length(self.loader.stages, self.step + self.spikes.offset, left_out)
        tokens = sum(by_length.values())
        saved, shapes = checkpoint.folder_of(self.root, self.step), self.target.model.parameter_shapes()
        rate = tokens / self.seconds if self.seconds else math.nan
        held_out = self.held_out.get(self.step)
        return {
            "target": self.target.name,
            "steps": self.step,
            "finished": self.step >= recipe.steps,
            "interrupted": interrupted,
            "loss": self.last.loss if self.last else None,
            "held_out_loss": held_out.loss if held_out else None,
            "held_out_losses": held_out.by_source if held_out else None,
            "unigram_loss": self.data.manifest["unigram_loss"]["held_out"],
            "tokens": tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(rate, 1),
            **speed.shares(rate, mean_length(by_length)),
            "peak_memory_bytes": max(self.world.gather(peak_memory(self.world.device))),
            "skipped_steps": self.health.skipped,
            "spikes": self.spikes.total,
            "rollbacks": self.spikes.rollbacks,
            "ranks": self.world.size,
            "engine": self.chosen.facts(),
            "weight_sha256": checkpoint.hash_of_weights(self.engine, saved, shapes, self.world),
            "checkpoint": str(saved),
            "metrics": str(self.run / "train" / "metrics.jsonl"),
        }
