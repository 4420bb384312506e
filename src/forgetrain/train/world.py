"""The processes of a training run: one by default, or as many as torchrun started.

with start_world(target.hardware) as world:
    world.rank, world.size, world.mesh                 # mesh: a DeviceMesh, or None for one process
    manifest = world.first(lambda: read_and_check())   # done on rank 0, the answer or the error on all
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from forgetrain.errors import UserError
from forgetrain.numerics.determinism import set_cuda_environment
from forgetrain.spec.parallel import Parallel
from forgetrain.spec.target import Hardware
from forgetrain.train.peers import Peers

T = TypeVar("T")
_ALONE = Parallel()


@dataclass
class World:
    rank: int
    size: int
    device: str  # "cpu" or "cuda:N"
    mesh: DeviceMesh | None  # its dimensions: see ``make_mesh``
    control: dist.ProcessGroup | None  # a Gloo group of its own, so that control never waits for a GPU's stream
    background: dist.ProcessGroup | None = None  # another, for threads beside the steps
    parallel: Parallel = _ALONE
    here: int = 1  # ranks on this host, this one among them

    @property
    def data_rank(self) -> int:
        """Which part of every batch this rank gets."""
        return self.rank // self.parallel.sharing

    @property
    def data_size(self) -> int:
        return self.size // self.parallel.sharing

    def beside(self) -> World:
        """The same processes, for one thread beside the steps: its exchanges never meet those of the steps."""
        return replace(self, control=self.background)

    def first(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on rank 0 and gives its answer, or raises its UserError, on every rank."""
        if self.control is None:
            return work()
        box: list[Any] = [None]
        if self.rank == 0:
            try:
                box = [work()]
            except UserError as error:
                box = [error]
        dist.broadcast_object_list(box, src=0, group=self.control)
        if isinstance(box[0], UserError):
            box[0].told = self.rank != 0
            raise box[0]
        return box[0]

    def each(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on every rank; a UserError on one is raised on all, and the first such rank prints it."""
        answer, error = None, None
        try:
            answer = work()
        except UserError as found:
            error = found
        errors = self.gather(error)
        first = next((rank for rank, found in enumerate(errors) if found is not None), None)
        if first is not None:
            error = cast(UserError, errors[first])
            error.told = self.rank != first
            raise error
        return cast(T, answer)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, *values: float) -> list[float]:
        """The sums over ranks, in float64, added in the order of ranks."""
        return [sum(column) for column in zip(*self.gather(values), strict=True)]


@contextmanager
def start_world(hardware: Hardware, parallel: Parallel = _ALONE) -> Iterator[World]:
    """Makes the process group that torchrun asks for by RANK and WORLD_SIZE, and takes it down again.

    torch gets the threads that ``hardware`` has for each rank of a host; ``parallel`` says how many ranks hold a layer
    or a row together. When another rank dies, this process ends within seconds (``peers``).

    Raises:
        UserError: there is no GPU, or fewer than ranks on this host; or ranks do not divide as ``parallel`` says; or a
            rank does not come.
    """
    size, rank, local = _asked_for()
    device = hardware.device
    sharing = parallel.sharing
    remedy = f"start {sharing} with torchrun --nproc-per-node {sharing}, or a multiple of that"
    parallel.require_fit(size, f"the {size} ranks that were started", remedy)
    if device == "cuda":
        count = torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"needs {local + 1} GPUs on this host, there are {count}",
                key="hardware.name",
                remedy="start fewer ranks, or --set hardware.name=cpu",
            )
        set_cuda_environment()
        torch.cuda.set_device(local)
    place = f"cuda:{local}" if device == "cuda" else "cpu"
    if size == 1:
        torch.set_num_threads(hardware.threads_of(1))
        yield World(0, 1, place, None, None)
        return
    store = _join(rank, size)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    try:
        with Peers(store, rank, size) as peers:
            torch.set_num_threads(hardware.threads_of(peers.here))
            mesh = make_mesh(device, size, parallel)
            control, background = (
                cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE)) for _ in range(2)
            )
            yield World(rank, size, place, mesh, control, background, parallel, peers.here)
            dist.barrier(control)  # rank 0 may hold the store, so it leaves with the last
    finally:
        dist.destroy_process_group()


def first_rank() -> bool:
    """Whether this process is the one that speaks for all, by what torchrun says of it."""
    return os.environ.get("RANK", "0") == "0"


def started_again_by() -> str | None:
    """The launcher that gave this command anew after a rank or a node was lost, by what it counts itself; or None."""
    counts = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "Slurm": "SLURM_RESTART_COUNT"}
    return next((who for who, key in counts.items() if os.environ.get(key, "0") != "0"), None)


def _asked_for() -> tuple[int, int, int]:
    """WORLD_SIZE, RANK and LOCAL_RANK, as torchrun sets them; without them, one process."""
    found = {}
    for key, default in _TORCHRUN:
        value = os.environ.get(key, default)
        if not value.isdecimal():
            raise UserError("is no whole number", key=key, value=value, remedy="start the ranks with torchrun")
        found[key] = int(value)
    size, rank, local = found.values()
    if rank >= size:
        raise UserError(f"is not below WORLD_SIZE = {size}", key="RANK", value=rank, remedy="number ranks from 0")
    missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if size > 1 and missing:
        raise UserError(
            f"is not set, and WORLD_SIZE = {size} ranks must find each other",
            key=missing[0],
            remedy="start the ranks with torchrun, or unset WORLD_SIZE",
        )
    return size, rank, local


def make_mesh(device: str, size: int, parallel: Parallel) -> DeviceMesh:
    """Of the dimension "data", and of "context" and "tensor" where they are above 1. Tensor ranks are neighbours, for
    they exchange the most. With context ranks "data_context" names the ranks over which gradients are summed."""
    shared = {key: ranks for key, ranks in (("context", parallel.context), ("tensor", parallel.tensor)) if ranks > 1}
    shape = (size // parallel.sharing, *shared.values())
    mesh = init_device_mesh(device, shape, mesh_dim_names=("data", *shared))
    if "context" in shared:
        mesh["data", "context"]._flatten("data_context")
    return mesh


def _join(rank: int, size: int) -> Store:
    """A store of the ranks that are there now, once all of them are.

    After a restart torchrun hands out the store of the ranks that died, with all that these left in it. So each rank
    says who it is this time, rank 0 names the round in which it heard all of them, and keys live under that name.
    """
    until, store = time.monotonic() + JOIN_SECONDS, None
    try:
        store = next(iter(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS))))[0]
        own = uuid.uuid4().hex
        store.set(f"here/{rank}", own)
        while True:
            store.wait([f"here/{other}" for other in range(size)], _left(until))
            if rank == 0:
                store.set("round", ",".join(store.get(f"here/{other}").decode() for other in range(size)))
            store.wait(["round"], _left(until))
            present = store.get("round").decode()
            this_round = PrefixStore(hashlib.sha256(present.encode()).hexdigest(), store)
            if present.split(",")[rank] != own:  # rank 0 has heard of this rank's earlier life
                time.sleep(_ROUND / 10)
            elif _all_answer(this_round, rank, size):
                return this_round
            _left(until)
    except (RuntimeError, ValueError) as error:  # ValueError: MASTER_PORT is no number
        absent = [str(other) for other in range(size) if store is not None and not store.check([f"here/{other}"])]
        who = f"rank {', '.join(absent)} of {size}" if absent else f"another of the {size} ranks"
        raise UserError(
            f"{who} did not come within {JOIN_SECONDS:.0f} s ({str(error).splitlines()[0]})",
            key="WORLD_SIZE",
            remedy="start every rank, with the same MASTER_ADDR and MASTER_PORT; torchrun does",
        ) from None


def _all_answer(store: Store, rank: int, size: int) -> bool:
    """Whether every rank is in this round: rank 0 sees them all and says so, or there will be another round."""
    store.set(f"answer/{rank}", "")
    try:
        if rank == 0:
            store.wait([f"answer/{other}" for other in range(size)], timedelta(seconds=_ROUND))
            store.set("complete", "")
        store.wait(["complete"], timedelta(seconds=2 * _ROUND))
    except RuntimeError:
        return False
    return True


def _left(until: float) -> timedelta:
    """Time until then. Raises RuntimeError when there is none, as a store does."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise RuntimeError("the time is up")
    return timedelta(seconds=max(seconds, 0.1))


#: So long ranks wait for what one does alone, such as hashing the data: as long as it takes. That one has died is
#: ``Peers``' to find; torch's time-out of 30 minutes would end a run whose data are large.
_PATIENCE = timedelta(days=30)
_ROUND = 2.0  # seconds that rank 0 waits for answers before it looks again who is there


#: So long a rank waits for the others before the first step: a cluster starts its containers one by one.
JOIN_SECONDS = 300.0
_TORCHRUN = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
