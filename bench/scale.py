"""Memory and time of a rank of the production and the fsdp engine, by the number of ranks and what they share.

    python bench/scale.py --rounds 3           # 69M parameters in fp32, over Gloo on this machine
    python bench/scale.py --ranks 4 --tensor 1 --context 4 --set recipe.sequence_length=4096    # a long row

Every rank is a process of this machine with one thread. It takes one row whatever their number, or its part of a row
that it shares; so times compare what is exchanged at one number of ranks, and are no scaling curve. Of the compiled
regions AdamW alone is: it would need five more buffers of the states' size otherwise, and compiling the others takes
longer than all that is measured.
What is freed goes back to the system at once; else the peak is of what glibc keeps for later, not of what is held.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from forgetrain.engine.contract import make_batch
from forgetrain.engine.plan import FSDP, Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.spec.target import Target, load_target
from forgetrain.train.machine import peak_memory
from forgetrain.train.world import make_mesh

MODEL = ["hidden_size=1024", "intermediate_size=2048", "vocab_size=8192"]
RECIPE = ["batch_size=1", "micro_batch_size=1", "sequence_length=16"]
MIB = 2**20
M_MMAP_THRESHOLD = -3  # malloc.h


class Layout(NamedTuple):
    ranks: int
    tensor: int
    context: int
    schedule: str
    state: str  # the choice of optimizer_state, or of the fsdp schedule's gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="targets/nano-cpu.toml")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 2], help="ranks that hold a layer together")
    parser.add_argument("--context", type=int, nargs="+", default=[1], help="ranks that hold a row together")
    parser.add_argument("--schedule", nargs="+", default=["production", "fsdp"])
    parser.add_argument("--rounds", type=int, default=1, help="times that all layouts are run, in turn")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, after one that is not")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of the target")
    options = parser.parse_args()
    overrides = [*(f"model.{key}" for key in MODEL), *(f"recipe.{key}" for key in RECIPE), *options.set]
    layouts = [
        Layout(ranks, tensor, context, "production", state)
        for ranks in options.ranks
        for tensor in options.tensor
        for context in options.context
        for state in ("replicated", "sharded")
        if ranks % (tensor * context) == 0 and (state == "replicated" or ranks > tensor)
    ]
    recipe = load_target(options.target, overrides).recipe
    several = recipe.batch_size > recipe.micro_batch_size  # of one micro-batch gradients are reduced after the last
    layouts += [
        Layout(ranks, 1, 1, "fsdp", state)
        for ranks in options.ranks
        for state in FSDP["gradients"][0][: 2 if several else 1]
    ]
    layouts = [layout for layout in layouts if layout.schedule in options.schedule]
    found: dict[Layout, list[dict[str, Any]]] = {layout: [] for layout in layouts}
    for _ in range(options.rounds):
        for layout in layouts:
            shared = [f"parallel.tensor={layout.tensor}", f"parallel.context={layout.context}"]
            target = load_target(options.target, [*overrides, *shared])
            found[layout].append(measure(target, layout, options.steps))
            print(*layout, found[layout][-1], file=sys.stderr, flush=True)
    for layout, rounds in found.items():
        print(json.dumps({**layout._asdict(), **summary(rounds)}))


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """MiB of the fullest rank, and seconds a step: median, least and most over rounds."""
    seconds = [step["seconds"] for step in rounds]
    return {
        "state_mib": rounds[0]["state_mib"],
        "peak_mib": statistics.median(step["peak_mib"] for step in rounds),
        "step_seconds": [round(value, 3) for value in (statistics.median(seconds), min(seconds), max(seconds))],
    }


def measure(target: Target, layout: Layout, steps: int) -> dict[str, Any]:
    kernel = "native" if layout.context == 1 else "blocked"
    state = "gradients" if layout.schedule == "fsdp" else "optimizer_state"
    choices = {"rope_tables": "fp32", "attention_kernel": kernel, state: layout.state}
    plan = Plan({"schedule": layout.schedule, **choices})
    with tempfile.TemporaryDirectory() as folder:
        decorator = "@torch.compile(dynamic=False)\n"
        source = write_engine(target, plan).replace(decorator, "")
        source = source.replace("def adamw_region(", f"{decorator}def adamw_region(")
        (Path(folder) / "engine.py").write_text(source, encoding="utf-8")
        fork = multiprocessing.get_context("fork")  # torch is imported once
        processes = [fork.Process(target=_rank, args=(r, target, layout, steps, folder)) for r in range(layout.ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(layout.ranks)]
    return {key: max(rank[key] for rank in ranks) for key in ranks[0]}


def _rank(rank: int, target: Target, layout: Layout, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    mesh = None
    if layout.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=layout.ranks)
        mesh = make_mesh("cpu", layout.ranks, target.parallel)
    module = load_engine(Path(folder) / "engine.py")
    engine = module.build(target.plain(), device="cpu", precision=target.precision.dtype, mesh=mesh)
    value = torch.tensor(0.02)  # one value in all weights: they take no memory beside the engine's, and no time
    engine.load({name: value.expand(shape) for name, shape in target.model.parameter_shapes().items()})
    recipe, generator = target.recipe, torch.Generator().manual_seed(rank // target.parallel.sharing)
    shape = (recipe.batch_size, recipe.sequence_length + 1)
    tokens = torch.randint(0, target.model.vocab_size, shape, generator=generator)
    batch = make_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    engine.step(batch, 1e-4)  # memory is taken for the first time
    times = []
    for _ in range(steps):
        if mesh is not None:
            dist.barrier()
        began = time.monotonic()
        engine.step(batch, 1e-4)
        engine.state()  # what is still on its way has come
        times.append(time.monotonic() - began)
    state = sum(shard.tensor.nbytes for shard in engine.state().values())
    report = {
        "state_mib": round(state / MIB, 1),
        "peak_mib": round(peak_memory("cpu") / MIB),
        "seconds": statistics.median(times),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(report))
    if mesh is not None:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
