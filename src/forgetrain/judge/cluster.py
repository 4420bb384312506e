"""Judging on a Ray cluster's nodes, several candidates at once.

    with Cluster(target, data=data, roofline_seconds=0.3) as cluster:
        judgements = cluster.judge_all([one, other], champion)

Each worker is a judge of its own (runner.py) in a Ray actor that holds as many cores as the target has threads, or one
GPU.
Candidates travel as bytes, verdicts and samples come back; the ledger, proposers and elections stay with who calls.
Gates that compute run side by side. Races do not: while one is on, every other worker of its node waits.

Only nodes are used whose environment is this process's own, for times of another one are not compared.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetrain.data.folder import MANIFEST
from forgetrain.errors import UserError
from forgetrain.judge.runner import Effort, Judge, Judgement
from forgetrain.numerics.determinism import fingerprint
from forgetrain.spec.target import Target, parse_target

#: The gates in the order in which they run, and whether a node's workers run them side by side.
PHASES = ((("contract", "G4.update", "G4"), True), (("G7", "G8"), False), (("G5", "G6", "G3", "G9"), True))


def environment_of(target: Target) -> dict[str, Any]:
    """What speeds depend on, of the process that asks."""
    threads = target.hardware.threads
    return {**fingerprint(device=target.hardware.device, threads=threads), "cores": len(os.sched_getaffinity(0))}


class Worker:
    """What runs in an actor. ``judge`` says what a candidate's gates said, as a Judgement."""

    def __init__(self, target: Mapping[str, Any], data: str | None, roofline_seconds: float, effort: Effort):
        self.target, self.folder = parse_target(dict(target)), tempfile.TemporaryDirectory()
        self.data = None if data is None else Path(data)
        self.options: dict[str, Any] = {"data": self.data, "roofline_seconds": roofline_seconds, "effort": effort}
        self.judge_here: Judge | None = None

    def about(self) -> tuple[dict[str, Any], bool]:
        """This node's environment, and whether it sees the data that batches are made of."""
        return environment_of(self.target), self.data is None or (self.data / MANIFEST).is_file()

    def judge(self, candidate: bytes, champion: bytes, gates: Sequence[str]) -> Judgement:
        if self.judge_here is None:
            self.judge_here = Judge(self.target, **self.options)
        files = [Path(self.folder.name) / name for name in ("candidate.py", "champion.py")]
        for file, content in zip(files, (candidate, champion), strict=True):
            file.write_bytes(content)
        return self.judge_here.judge(files[0], champion=files[1], gates=gates)

    def close(self) -> None:
        if self.judge_here is not None:
            self.judge_here.close()


@dataclass(frozen=True)
class Place:
    """An actor and the node that it is on."""

    actor: Any
    node: str


class Cluster:
    """Connects to the Ray cluster that RAY_ADDRESS names or that runs on this machine, else starts one here.

    Raises:
        ImportError: Ray is not installed.
        UserError: no node has room, the same environment, and the data.
    """

    def __init__(
        self,
        target: Target,
        *,
        data: Path | None,
        roofline_seconds: float,
        effort: Effort,
        say: Callable[[str], None] = lambda line: None,
    ):
        self._ray: Any = importlib.import_module("ray")
        self._started = not self._ray.is_initialized()
        if self._started:
            self._connect()
        here = None if data is None or not (data / MANIFEST).is_file() else str(data.resolve())
        arguments = (target.plain(), here, roofline_seconds, effort)
        self._places: list[Place] = []
        try:
            self._open(target, arguments, say)
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        """To the cluster that there is; else starts one that is as small as can be: hardly anything travels."""
        quiet = {"log_to_driver": False, "logging_level": "error"}
        try:
            self._ray.init(address="auto", **quiet)
        except ConnectionError:
            self._ray.init(include_dashboard=False, object_store_memory=128 << 20, **quiet)

    def _open(self, target: Target, arguments: tuple[Any, ...], say: Callable[[str], None]) -> None:
        ray, hardware = self._ray, target.hardware
        affinity = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        need = {"CPU": hardware.threads} if hardware.device == "cpu" else {"CPU": 1, "GPU": 1}
        remote = ray.remote(Worker)
        for node in (node for node in ray.nodes() if node["Alive"]):
            room = min(int(node["Resources"].get(kind, 0) // count) for kind, count in need.items())
            for _ in range(room):
                options = {"num_cpus": need["CPU"], "num_gpus": need.get("GPU", 0)}
                strategy = affinity(node["NodeID"], soft=False)
                self._places.append(
                    Place(remote.options(**options, scheduling_strategy=strategy).remote(*arguments), node["NodeID"])
                )
        mine = environment_of(target)
        for place in list(self._places):
            environment, sees = ray.get(place.actor.about.remote())
            differs = next((key for key, value in mine.items() if environment.get(key) != value), None)
            if differs is not None or not sees:
                why = (
                    f"its {differs} is {environment.get(differs)!r}, here {mine[differs]!r}"
                    if differs
                    else "no data there"
                )
                say(f"node {place.node[:8]} is not used: {why}")
                self._drop(place)
        if not self._places:
            raise UserError(
                "no node of the Ray cluster can judge this target",
                key="hardware.threads",
                value=hardware.threads,
                remedy="add nodes like this one that see the runs folder, or judge without --executor ray",
            )
        nodes = len({place.node for place in self._places})
        say(f"{self.slots} candidates at once on {'one node' if nodes == 1 else f'{nodes} nodes'}")

    @property
    def slots(self) -> int:
        """Candidates that are judged at once."""
        return len(self._places)

    def judge_all(self, candidates: Sequence[bytes], champion: bytes) -> list[Judgement]:
        """Every gate on each of at most ``slots`` candidates, up to the first that fails.

        Raises:
            UserError: the reference failed, or a node is gone.
        """
        found: list[Judgement | None] = [None] * len(candidates)
        for gates, together in PHASES:
            alive = [i for i, judgement in enumerate(found) if judgement is None or judgement.passed]
            for group in self._groups(alive, together):
                calls = {i: self._places[i].actor.judge.remote(candidates[i], champion, gates) for i in group}
                for i, call in calls.items():
                    found[i] = _joined(found[i], self._get(call))
        return [judgement for judgement in found if judgement is not None]

    def _groups(self, candidates: Sequence[int], together: bool) -> Iterable[list[int]]:
        """Candidates that run at the same time; apart, no two of a group are on one node."""
        waiting = list(candidates)
        while waiting:
            nodes = [self._places[i].node for i in waiting]
            group = [i for k, i in enumerate(waiting) if together or nodes[k] not in nodes[:k]]
            waiting = [i for i in waiting if i not in group]
            yield group

    def _get(self, call: Any) -> Judgement:
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:  # whatever was raised there, as it was
            raise error.cause if isinstance(error.cause, UserError) else error from None
        except self._ray.exceptions.RayError as error:
            raise UserError(f"a node is gone: {error}", remedy="run forgetrain forge again; it goes on") from None

    def _drop(self, place: Place) -> None:
        self._places.remove(place)
        with suppress(self._ray.exceptions.RayError):
            self._ray.get(place.actor.close.remote(), timeout=30)
        self._ray.kill(place.actor)

    def close(self) -> None:
        for place in list(self._places):
            self._drop(place)
        if self._started:
            self._ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _joined(before: Judgement | None, after: Judgement) -> Judgement:
    """A candidate's judgement after a further phase."""
    if before is None:
        return after
    before.verdicts += after.verdicts
    before.samples += after.samples
    before.speed = after.speed or before.speed
    before.seconds += after.seconds
    return before
