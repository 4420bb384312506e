"""Several ranks in forked processes: nothing is imported anew, so that a test of four takes a second.

states = run_ranks(2, lambda mesh: steps_of(engine(mesh)))      # each rank's answer, in their order
"""

from __future__ import annotations

import datetime
import math
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from forgetrain.spec.parallel import Parallel
from forgetrain.train.world import make_mesh

SECONDS = 120.0


def run_ranks(shape: int | Sequence[int], work: Callable[[DeviceMesh], Any]) -> list[Any]:
    """What ``work`` gives on each rank of a mesh over Gloo: of that many ranks, or of (data, tensor) ranks, or of
    (data, tensor, context) ranks."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    ranks = math.prod(sizes)
    parallel = Parallel(**dict(zip(("tensor", "context"), sizes[1:], strict=False)))
    with tempfile.TemporaryDirectory() as folder:

        def in_a_mesh(rank: int) -> Any:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=ranks,
                timeout=datetime.timedelta(seconds=SECONDS),
            )
            answer = work(make_mesh("cpu", ranks, parallel))
            dist.barrier()
            return answer

        return fork_ranks(ranks, in_a_mesh)


def fork_ranks(ranks: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` gives for each rank, in a process of its own."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [fork.Process(target=_rank, args=(rank, work, Path(folder))) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            process.kill()
        failed = sorted(path.read_text() for path in Path(folder).glob("*.error"))
        assert not failed, failed[0]
        assert not alive, f"{len(alive)} ranks hang"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    try:
        torch.set_num_threads(1)  # the parent's pool of threads did not come along
        torch.save(work(rank), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    sys.stdout.flush()
    os._exit(0)
