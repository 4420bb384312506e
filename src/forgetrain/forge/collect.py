"""Collecting: the reference is run, judged (G0), and what it did becomes the golden record.

    record = collect(target, Path("runs/nano-cpu/golden"))

Everything happens at the ``[gates]`` shape, in processes of their own: the reference twice at world size 1 and twice at
world size 2, and once in fp32 against the float64 oracle and the other reference. The batches are random tokens; the
batches of later gates are drawn anew.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetrain.durable import require_writable
from forgetrain.engine.contract import Batch, weight_hash
from forgetrain.engine.launch import prepare
from forgetrain.engine.process import EngineProcess
from forgetrain.errors import UserError
from forgetrain.forge.truth import Start, record_truth
from forgetrain.gates.g0 import g0, relative_errors
from forgetrain.gates.g2 import StepRecord
from forgetrain.gates.verdict import Verdict
from forgetrain.golden.batches import random_batch
from forgetrain.golden.record import GoldenRecord, write_record
from forgetrain.numerics.compare import difference
from forgetrain.numerics.determinism import fingerprint
from forgetrain.numerics.device import check_device, release
from forgetrain.numerics.init import initial_weights
from forgetrain.numerics.oracle import oracle_step
from forgetrain.reference import megatron, megatron_shims
from forgetrain.spec.moments import average_decay
from forgetrain.spec.schedule import learning_rate
from forgetrain.spec.target import Target

MODULES = {"megatron": "forgetrain.reference.megatron", "transformers": "forgetrain.reference.transformers"}
_PACKAGES = {"megatron": "megatron-core", "transformers": "transformers"}
#: Steps on two ranks, of the reference here and of the engine in G3: enough for moments, decay and clipping to matter.
RANK_STEPS = 5
#: The second reference in G0, and the attention that it is given.
_OTHER = {"megatron": "transformers", "transformers": "megatron"}

Report = Callable[[str, float], None]
"""Gets the name of the stage that begins and the share of the work that is done, 0 to 1."""


class ReferenceRejected(Exception):
    """G0 failed: the verdict says why."""

    def __init__(self, verdict: Verdict):
        self.verdict = verdict
        super().__init__(verdict.explanation)


def environment(target: Target) -> dict[str, Any]:
    """What the record's bits depend on besides the target: the fingerprint and the reference's own version, if it is
    not the user's script."""
    name = target.reference.name
    print_of = fingerprint(device=target.hardware.device, threads=target.hardware.threads)
    if name not in _PACKAGES:
        return print_of
    try:
        version = importlib.metadata.version(_PACKAGES[name])
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{_PACKAGES[name]} is not installed",
            key="reference.name",
            value=name,
            remedy=f"run pip install 'forgetrain[{name}]'",
        ) from None
    return {**print_of, _PACKAGES[name]: version}


def check_reference(target: Target) -> None:
    """Raises UserError for a reference that cannot be run for this target, before anything expensive starts."""
    if target.reference.name not in MODULES:
        raise UserError(
            "is collected by forgetrain.capture in your own script, not by this command",
            key="reference.name",
            value=target.reference.name,
            remedy="align with what it wrote: forgetrain align TARGET --golden DIR (docs/capture.md)",
        )
    if target.precision.dtype == "fp8":
        raise UserError(
            "no reference computes in fp8, so there are no bits to collect and align with",
            key="precision.dtype",
            value="fp8",
            remedy="align the target in bf16; write an fp8 engine with forgetrain engine write, and judge it",
        )
    if target.reference.name == "megatron":
        megatron.refuse_unsupported(target)
    check_device(target.hardware)
    environment(target)


def prepare_reference(target: Target) -> None:
    """Lets what ``start_reference`` needs be imported beside what this process does next."""
    prepare(MODULES[target.reference.name], target.hardware.device)


def start_reference(target: Target, **options: Any) -> EngineProcess:
    """The target's reference in a process of its own; ``options`` are EngineProcess's."""
    return EngineProcess(MODULES[target.reference.name], target, **options)


def steps_of(
    engine: EngineProcess, target: Target, batches: list[Batch], weights: dict[str, Tensor]
) -> Iterator[StepRecord]:
    """Drives an engine over batches from ``weights`` with the recipe's learning rates, one record a step."""
    engine.load(weights)
    for step, batch in enumerate(batches):
        result = engine.step(batch, learning_rate(target.recipe, step))
        yield StepRecord(float(result.loss), float(result.grad_norm), bool(result.applied), engine.weight_hash())


def collect(target: Target, folder: Path, report: Report | None = None) -> GoldenRecord:
    """Runs the reference and writes its golden record to ``folder``.

    Raises:
        UserError: the reference is not installed, or does not have what the target asks for.
        ReferenceRejected: gate G0 failed.
        EngineFailure: the reference's process broke.
    """
    check_reference(target)
    require_writable(folder.parent)
    tell = report or (lambda stage, share: None)
    gates = target.at_gates_shape()
    seed, name = target.recipe.seed, target.reference.name
    weights = initial_weights(target.model, seed)
    batches = [random_batch(gates, seed, step) for step in range(target.gates.steps)]
    other, skipped = _other_reference(target)
    names = [which for which in (name, other) if which is not None]
    # importing a reference takes as long as running it on a small model; what is run twice shares no origin
    for which, origin in ((name, 0), (name, 1), *((each, 0) for each in names[1:])):
        prepare(MODULES[which], target.hardware.device, origin)
    tell(f"{name}, first run", 0.0)
    with start_reference(gates) as reference:
        one = _whole_run(reference, gates, weights, batches)
    tell(f"{name}, second run", 0.3)
    with start_reference(gates, origin=1) as reference:
        again = _whole_run(reference, gates, weights, batches)
    runs = {"world size 1": (one.records, again.records)}
    if gates.recipe.batch_size % 2 == 0:
        both = []
        for number, word in enumerate(("first", "second")):
            tell(f"{name} at world size 2, {word} run", 0.5 + 0.2 * number)
            with start_reference(gates, ranks=2, origin=number) as reference:
                both.append(list(steps_of(reference, gates, batches[:RANK_STEPS], weights)))
        runs["world size 2"] = (both[0], both[1])
    tell("the float64 oracle and the other reference", 0.9)
    errors = _judge_numerics(gates, weights, batches, names)
    verdict = g0(runs, _unequal(one.evidence, again.evidence), errors, skipped)
    if not verdict.passed:
        raise ReferenceRejected(verdict)
    tell("writing the record", 0.99)
    trajectories = {int(label.rpartition(" ")[2]): [r.as_dict() for r in first] for label, (first, _) in runs.items()}
    shims = megatron_shims.shims_of(target.hardware.device) if name == "megatron" else {}
    return write_record(
        folder,
        weights=weights,
        batches=batches,
        evidence=one.evidence,
        trajectories=trajectories,
        timing={"seconds_per_step": one.seconds},
        manifest={
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "target": gates.plain(),
            "precision": gates.precision.dtype,
            "reference": {"name": name, "shims": shims},
            "environment": environment(target),
            "seed": seed,
            "learning_rates": [learning_rate(gates.recipe, step) for step in range(len(batches))],
            "verdicts": [verdict.as_dict()],
        },
    )


def open_or_collect(
    target: Target, folder: Path, report: Report | None = None, say: Callable[[str], None] = print
) -> GoldenRecord:
    """The record that this program keeps for a target: collected again, with the reason, when it does not fit."""
    check_reference(target)
    if folder.exists():
        try:
            record = GoldenRecord.open(folder)
            reason = record.misfit(target, target.precision.dtype, environment(target))
        except UserError as error:
            record, reason = None, str(error)
        if record is not None and reason is None:
            return record
        say(f"collecting again: {reason}")
    return collect(target, folder, report)


def open_named(target: Target, folder: Path) -> GoldenRecord:
    """A record that the user named. Raises UserError when it does not fit this target and environment."""
    remedy = f"run forgetrain collect to make one here, in place of {folder}"
    record = GoldenRecord.open(folder, remedy=remedy)
    reason = record.misfit(target, target.precision.dtype, environment(target))
    if reason is not None:
        raise UserError(f"does not fit: {reason}", file=folder, remedy=remedy)
    return record


@dataclass(frozen=True)
class _Run:
    evidence: dict[str, Tensor]
    records: list[StepRecord]
    seconds: list[float]


def _whole_run(reference: EngineProcess, target: Target, weights: dict[str, Tensor], batches: list[Batch]) -> _Run:
    """Taps and state of the first step, then every step."""
    rate = learning_rate(target.recipe, 0)
    truth = record_truth(reference, target, "golden batch", Start(weights=weights), batches[0], rate)
    state = {name: truth.tensors[name] for name in truth.names if name.startswith("master/")}
    loss, norm = (float(truth.tensors[name]) for name in ("step.loss", "step.grad_norm"))
    records, seconds = [StepRecord(loss, norm, True, weight_hash(state))], []
    for step, batch in enumerate(batches[1:], 1):
        began = time.perf_counter()
        result = reference.step(batch, learning_rate(target.recipe, step))
        seconds.append(time.perf_counter() - began)
        digest = reference.weight_hash()
        records.append(StepRecord(float(result.loss), float(result.grad_norm), bool(result.applied), digest))
    return _Run({name: truth.tensors[name] for name in truth.names}, records, seconds)


def _unequal(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, str]:
    """Names whose tensors differ between two runs, with how."""
    found = {}
    for name in first:
        differs = "is missing" if name not in second else difference(first[name], second[name])
        if differs is not None:
            found[name] = str(differs)
    return found


def _other_reference(target: Target) -> tuple[str | None, list[str]]:
    """A second reference that is installed and has the model, or None and why not."""
    other = _OTHER[target.reference.name]
    try:
        if other == "megatron":
            megatron.refuse_unsupported(target)
        importlib.metadata.version(_PACKAGES[other])
    except UserError as error:
        return None, [f"{other}: {error.problem}"]
    except importlib.metadata.PackageNotFoundError:
        return None, [f"{other} is not installed"]
    return other, []


def _judge_numerics(
    target: Target, weights: dict[str, Tensor], batches: list[Batch], names: list[str]
) -> dict[str, dict[str, float]]:
    """Relative errors of the first two updates' clipped gradients in fp32: against the oracle, started each time from
    the reference's own weights, and of the first against the other reference. ``names``: the target's, and the other.

    One after the other: of a model that fills a GPU, its memory holds one float64 step or one reference's."""
    name, *others = names
    with EngineProcess(MODULES[name], target, precision="fp32") as engine:
        clipped, before = _two_updates(engine, target, weights, batches)
    errors = {}
    for step in range(2):
        due = oracle_step(target, before[step], batches[step], 0.0, device=target.hardware.device)
        errors[f"{name} against the oracle, step {step}"] = relative_errors(clipped[step], due.clipped)
        del due
        release(target.hardware.device)
    for other in others:
        with EngineProcess(MODULES[other], target, precision="fp32") as engine:
            theirs, _ = _two_updates(engine, target, weights, batches[:1])
        errors[f"{name} against {other}"] = relative_errors(clipped[0], theirs[0])
    return errors


def _two_updates(
    engine: EngineProcess, target: Target, weights: dict[str, Tensor], batches: list[Batch]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """For at most two steps: clipped gradients, read back from the first moments, and the weights before."""
    decay = {name: average_decay(target.recipe, name, weight.dim()) for name, weight in weights.items()}
    clipped, starts = [], [dict(weights)]
    before = {name: torch.zeros(()) for name in weights}
    engine.load(weights)
    for step, batch in enumerate(batches[:2]):
        engine.step(batch, learning_rate(target.recipe, step))
        state = {key: shard.tensor for key, shard in engine.state().items()}
        moments = {name: state[f"exp_avg/{name}"] for name in weights}
        clipped.append({n: (moments[n].double() - d * before[n].double()) / (1 - d) for n, d in decay.items()})
        starts.append({name: state[f"master/{name}"] for name in weights})
        before = moments
    return clipped, starts
