"""The judge: a frozen candidate goes through the gates, cheapest first, in the sandbox.

    judge = Judge(target, data=Path("runs/nano-cpu/data"), roofline_seconds=0.3)
    judgement = judge.judge(Path("candidate.py"), champion=Path("champion.py"))
    judgement.passed, judgement.verdicts, judgement.speed

The candidate's file is copied first, and every seed is drawn after that. Its process gets batches one at a time and
emits tensors; references, the oracle, clocks and verdicts stay here. It is always compared with the original
reference, and with the champion only for speed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from forgetrain import memory
from forgetrain.engine.plan import Plan
from forgetrain.engine.process import EngineFailure, EngineProcess
from forgetrain.engine.write import write_engine
from forgetrain.errors import UserError
from forgetrain.gates.verdict import Verdict
from forgetrain.judge import trials
from forgetrain.judge.clock import Race
from forgetrain.judge.hidden import Stream, derive, draw_seed
from forgetrain.judge.sandbox import Sandbox, fill_cache, project_needs, sandbox
from forgetrain.judge.scratch import Scratch, folder_in, remove
from forgetrain.numerics.device import check_device, release
from forgetrain.spec.parallel import Parallel
from forgetrain.spec.target import Target

#: Numeric gates in the order of their cost, and the gates of an engine that claims the reference's very bits.
NUMERIC = ("contract", "G4.update", "G4", "G7", "G8", "G5", "G6", "G3", "G9")
BITWISE = ("contract", "G1", "G2", "G3", "G7", "G8", "G9")

#: Of how many engines compiled code is kept: of the champion and the candidate, which are always the last two that were
#: used, and of two more for a second look.
COMPILED_KEPT = 4

#: What numbers of a candidate can raise in a gate; a full disk, too little memory or a bad target is not its fault.
_BY_NUMBERS = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError)

#: A plan that is right and rounds differently from the textbook one: what honest code may differ by.
KNOWN_GOOD = {"token_order": "sequence", "qkv": "fused", "gate_up": "fused", "adamw": "torch", "clip": "torch"}


@dataclass(frozen=True)
class Effort:
    """How much is run. pairs, steps: blocks of the race and steps of each; timeout: seconds for any answer;
    keep: whether processes of the reference and of the known-good engine stay between gates on a CPU, which is quicker
    for small models and costs their memory."""

    g4_batches: int = 4
    g3_steps: int = 4
    pairs: int = 10
    steps: int = 4
    warm_up: int = 2
    timeout: float = 300.0
    keep: bool = False


@dataclass
class Judgement:
    """What came out. ``speed``: of the race, when there was one (docs/judge.md); ``samples``: its rows for a ledger."""

    candidate: str
    verdicts: list[Verdict] = field(default_factory=list)
    speed: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[str, str, int, int, float]] = field(default_factory=list)
    sandbox: str = ""
    sandboxed: bool = False
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    def first_failure(self) -> Verdict | None:
        return next((verdict for verdict in self.verdicts if not verdict.passed), None)

    def told(self) -> list[dict[str, Any]]:
        """The verdicts as plain values, as JSON and provenance have them."""
        return [verdict.as_dict() for verdict in self.verdicts]


class Judge:
    """Judges candidates of one target. What the reference gives for the seeds of G5 is kept between candidates, who
    never see those seeds.

    Args:
        reference: a module name or an engine file; the target's reference unless given.
        data: a built data folder, for real text.
        roofline_seconds: the least time of one step at the recipe's shape on this hardware.
        device: the target's unless given.
    """

    def __init__(
        self,
        target: Target,
        *,
        reference: str | Path | None = None,
        data: Path | None = None,
        roofline_seconds: float = 0.0,
        device: str | None = None,
        effort: Effort | None = None,
    ):
        if device is None:
            check_device(target.hardware)
        self.target, self.data, self.effort = target, data, effort or Effort()
        self.gates_target, self.race_target = target.at_gates_shape(), target.at_race_shape()
        #: The race's batches for engines that keep whole score matrices: in the gates' micro-batches.
        self.plain_race_target = self.race_target.in_micro_batches_of(target.gates.micro_batch_size)
        self.reference = reference or f"forgetrain.reference.{target.reference.name}"
        self.roofline_seconds, self.device = roofline_seconds, device or target.hardware.device
        self.pool = [draw_seed() for _ in range(target.gates.g5_seeds)]
        self.kept: dict[str, Any] = {}
        self._running: dict[tuple[Any, ...], EngineProcess] = {}
        #: Whose compiled code is there, by hash, the last used at the end: its times a candidate can set.
        self._compiled: list[str] = []
        self._scratch = Scratch("judge")
        self.scratch = self._scratch.path
        self.known_good = self.scratch / "known_good.py"
        self.known_good.write_text(write_engine(target.for_reference(), Plan(KNOWN_GOOD)), encoding="utf-8")
        #: Another, for where one says too little of how far rounding leads.
        self.textbook = self.scratch / "textbook.py"
        self.textbook.write_text(write_engine(target.for_reference(), Plan.textbook()), encoding="utf-8")
        #: An engine known to be right in the target's own dtype, where the reference has none: fp8's errors are far
        #: larger than the reference's, and differ from kind to kind of tensor.
        self.peer = self.known_good
        if target.precision.dtype == "fp8":
            self.peer = self.scratch / "peer.py"
            whole = target.model_copy(update={"parallel": Parallel()})
            self.peer.write_text(write_engine(whole, Plan.textbook()), encoding="utf-8")

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._running:
            self._running.popitem()[1].close()
        self._scratch.close()

    def judge(
        self,
        file: Path,
        *,
        champion: Path | None = None,
        gates: Sequence[str] | None = None,
        bitwise: bool = False,
        all_gates: bool = False,
        on_verdict: Callable[[Verdict], None] = lambda verdict: None,
        done: Sequence[Verdict] = (),
        after_gate: Callable[[Judgement], None] = lambda judgement: None,
    ) -> Judgement:
        """Runs the gates in order and stops at the first that fails, unless ``all_gates``.

        Args:
            champion: whom G7 races against and who must be beaten; without one a known-good engine of the textbook's
                kind, which need not be.
            gates: names of BITWISE or NUMERIC to run instead of all of them.
            bitwise: whether the candidate must equal the reference bit for bit.
            done: verdicts that a judging of the same file, which was cut off, had reached: their gates do not run
                again, and they are the first of this judgement's.
            after_gate: called with what there is so far whenever a gate has given all its verdicts.

        Raises:
            UserError: no such file or gate, bits asked for of fp8 or of ranks that share layers or rows, or the
                reference itself failed.
        """
        began = time.monotonic()
        if bitwise and self.target.parallel.sharing > 1:
            raise UserError(
                "no reference shares layers or rows over ranks, so there are no bits to equal",
                key="parallel",
                value=f"{self.target.parallel.tensor} tensor, {self.target.parallel.context} context",
                remedy="judge without --bitwise",
            )
        if bitwise and self.target.precision.dtype == "fp8":
            raise UserError(
                "the reference has no fp8, so there are no bits to equal",
                key="precision.dtype",
                value="fp8",
                remedy="judge without --bitwise",
            )
        known = BITWISE if bitwise else NUMERIC
        for name in gates or ():
            if name not in known:
                raise UserError("no such gate", key="gates", value=name, remedy=f"choose from {', '.join(known)}")
        if self.data is not None and "G9" in (known if gates is None else gates):
            project_needs()  # asked for at the end, when everything else has been judged
        with self._freeze(file) as (frozen, digest), folder_in(self.scratch) as second:
            box = self._sandbox(frozen, digest)
            trial = Trial(self, frozen, box, draw_seed(), champion, second, bitwise=bitwise)
            sandboxed = box.sandboxed and all(verdict.sandboxed for verdict in done)
            judgement = Judgement(digest, list(done), sandbox=box.description, sandboxed=sandboxed)
            over = {name_of(verdict.gate, known) for verdict in done}
            for name in known:
                if name in over or (gates is not None and name not in gates):
                    continue
                if judgement.verdicts and not judgement.passed and not all_gates:
                    break
                for verdict in trial.run(name):
                    judgement.verdicts.append(verdict)
                    on_verdict(verdict)
                judgement.speed, judgement.samples = trial.speed, trial.samples
                after_gate(judgement)
        memory.give_back()  # a candidate chooses the sizes of what it is asked for
        judgement.seconds = time.monotonic() - began
        return judgement

    @contextlib.contextmanager
    def _freeze(self, file: Path) -> Iterator[tuple[Path, str]]:
        """A private copy of the file's content now, and its hash: nothing that happens to the file later matters."""
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", file=file, remedy="name an engine file") from None
        if not content.strip():
            raise UserError("is empty", file=file, remedy="name an engine file")
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            frozen = Path(folder) / "engine.py"
            frozen.write_bytes(content)
            frozen.chmod(0o444)
            yield frozen, hashlib.sha256(content).hexdigest()

    @contextlib.contextmanager
    def trusted(
        self, module: str | Path, target: Target, *, precision: str | None = None, ranks: int = 1
    ) -> Iterator[EngineProcess]:
        """``ranks`` data-parallel processes of the reference or of the known-good engine, whose failure is not the
        candidate's. ``precision``: what the reference has for the target's unless given."""
        target = target.for_reference()
        precision = precision or target.precision.dtype
        key = (str(module), target.recipe.model_dump_json(), precision, ranks)
        process = self._running.pop(key, None)
        if process is None:
            options: dict[str, Any] = {"precision": precision, "ranks": ranks, "device": self.device}
            with _blaming(module):
                process = EngineProcess(module, target, timeout=self.effort.timeout, **options)
        with contextlib.ExitStack() as stack:
            stack.callback(process.close)
            with _blaming(module, process):
                yield process
            if self.effort.keep and self.device == "cpu":  # a GPU's memory is for the candidate
                stack.pop_all()
                self._running[key] = process

    @contextlib.contextmanager
    def rival(self, champion: Path | None) -> Iterator[EngineProcess]:
        """Whom the candidate races against. A champion was a candidate once, so it runs in a sandbox as well."""
        if champion is None:
            with self.trusted(self.known_good, self.plain_race_target) as process:
                yield process
            return
        with self._freeze(champion) as (frozen, digest):
            with _blaming(champion):
                process = self.process(frozen, self._sandbox(frozen, digest), self.race_target)
            with process, _blaming(champion, process):
                yield process

    def _sandbox(self, frozen: Path, digest: str) -> Sandbox:
        """With a folder for compiled code: some hundred MiB, so only those of the last few candidates are kept."""
        cache = self.scratch / "compiled" / digest
        if digest in self._compiled:
            self._compiled.remove(digest)
        else:
            while len(self._compiled) >= COMPILED_KEPT:
                remove(cache.parent / self._compiled.pop(0))
            cache.mkdir(parents=True, exist_ok=True)
            fill_cache(cache, frozen, self.device)
        self._compiled.append(digest)
        return sandbox(frozen, self.target, device=self.device, cache=cache)

    def process(
        self,
        file: Path,
        box: Sandbox,
        target: Target,
        *,
        precision: str | None = None,
        ranks: int | None = None,
        guard: bool = False,
    ) -> EngineProcess:
        """An engine file that nobody vouches for, in its sandbox; on as few ranks as its target can have, unless more
        are asked for."""
        return EngineProcess(
            file,
            target,
            precision=precision,
            ranks=target.parallel.sharing if ranks is None else ranks,
            device=self.device,
            guard=guard,
            wrap=box.wrap,
            limits=box.limits,
            folder=box.cache,
            timeout=self.effort.timeout,
        )


def name_of(gate: str, known: Sequence[str]) -> str:
    """The gate that gave a verdict: G7.replay's is G7, G4.update has a name of its own."""
    return gate if gate in known else gate.partition(".")[0]


@contextlib.contextmanager
def _blaming(module: str | Path, process: EngineProcess | None = None) -> Iterator[None]:
    """A failure of what is trusted is the user's business: a wrong installation, too little memory. With ``process``
    only that one's; a candidate's failure passes."""
    try:
        yield
    except EngineFailure as failure:
        if process is not None and process.failure is not failure:
            raise
        raise UserError(
            f"{module} failed: {failure}", remedy="see whether that engine runs by itself, on this machine"
        ) from failure


class Trial:
    """One candidate's way through the gates."""

    def __init__(
        self,
        judge: Judge,
        file: Path,
        box: Sandbox,
        seed: int,
        champion: Path | None,
        second: Path,
        *,
        bitwise: bool = False,
    ):
        self.bitwise, self._second = bitwise, second
        self.judge, self.file, self.box, self.seed, self.champion = judge, file, box, seed, champion
        self.speed: dict[str, Any] = {}
        self.samples: list[tuple[str, str, int, int, float]] = []
        self.peak_bytes = 0

    @property
    def sandboxed(self) -> bool:
        return self.box.sandboxed

    def stream(self, target: Target, purpose: str, *, warm_up: int = 1) -> Stream:
        """Batches and rates of this candidate's seed, for one purpose."""
        return Stream(target, derive(self.seed, purpose), self.judge.data, warm_up=warm_up)

    def process(self, target: Target, **options: Any) -> EngineProcess:
        """The candidate at a shape, in its sandbox; ``options`` are ``Judge.process``'s."""
        return self.judge.process(self.file, self.box, target, **options)

    @functools.cached_property
    def elsewhere(self) -> Trial:
        """The candidate with a second folder for compiled code, which begins as the first did, before any of its code
        ran: whether it repeats itself shows in processes that have no memory in common. It compiles once more there,
        for all gates that ask for this."""
        fill_cache(self._second, self.file, self.judge.device)
        return self._in(self.box.with_cache(self._second))

    @contextlib.contextmanager
    def apart(self) -> Iterator[Trial]:
        """The candidate with a copy of what is compiled now: a process here finds nothing of what one of this trial
        writes meanwhile."""
        with self.box.apart() as box:
            yield self._in(box)

    def _in(self, box: Sandbox) -> Trial:
        other = copy.copy(self)
        other.box = box
        return other

    def run(self, gate: str) -> Iterator[Verdict]:
        """The verdicts of a gate; a candidate has failed it whose process fails, or whose answers the gate's own
        arithmetic cannot take: the next candidate must find a judge that lives."""
        try:
            yield from trials.GATES[gate](self)
        except EngineFailure as failure:
            yield self._failed(gate, failure.kind, str(failure), failure.detail)
        except torch.OutOfMemoryError as error:
            text = f"no memory is left on the GPU for the judge beside the engine: {str(error).splitlines()[0]}"
            yield self._failed(gate, "limit", text, "")
        except _BY_NUMBERS as error:
            text = f"no verdict can be had of what the engine answers, {type(error).__name__}: {str(error)[:300]}"
            yield self._failed(gate, "garbage", text, "".join(traceback.format_tb(error.__traceback__)))
        finally:
            release(self.judge.device)

    def _failed(self, gate: str, kind: str, text: str, detail: str) -> Verdict:
        return Verdict(
            gate,
            False,
            detail={"failure": kind, "traceback": detail[-2000:]},
            explanation=f"{kind}: {text}",
            sandboxed=self.sandboxed,
        )

    def keep_speed(self, run: Race, first_answers: Mapping[str, float]) -> None:
        champion, candidate = run.times()
        recipe = self.judge.race_target.recipe
        tokens = recipe.batch_size * recipe.sequence_length * run.steps_per_block
        self.samples = run.samples("main")
        self.speed = {
            "tokens_per_second": tokens / statistics.median(candidate),
            "champion_tokens_per_second": tokens / statistics.median(champion),
            "step_seconds": statistics.median(candidate) / run.steps_per_block,
            "warm_up_seconds": sum(run.candidate.warm_up),
            "build_seconds": first_answers["candidate"],
            "pairs": len(candidate),
            "threads": self.judge.target.hardware.threads_of(self.judge.target.parallel.sharing),
        }
