"""What the trainer costs around an engine's step: overhead, memory of a rank, bandwidth of checkpoints.

    python bench/train.py overhead                  # an engine whose step takes 100 ms and does nothing
    python bench/train.py memory --ranks 1 2 4      # the shipped command under torchrun, peak memory of a rank
    python bench/train.py checkpoint                # saving and loading, beside torch.save and torch.load

overhead: the engine notes when it is entered and left; what lies between two steps (data, results, journal,
TensorBoard, display, the copy of the state for checkpoints) is the trainer's. It sleeps, so that what the saving thread
takes from a busy engine's cores is not in the figure: bench/saving.py measures that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from forgetrain.engine.contract import Shard
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.target import Target, load_target
from forgetrain.train import checkpoint
from forgetrain.train.world import World

#: An engine that sleeps, with a state of the target's size: {seconds} a step, its times written to {file}.
ENGINE = """
import json, time
from typing import NamedTuple
import torch


class Shard(NamedTuple):
    tensor: torch.Tensor
    global_shape: tuple
    offsets: tuple


class StepResult(NamedTuple):
    loss: torch.Tensor
    grad_norm: torch.Tensor
    applied: torch.Tensor


class Engine:
    def load(self, weights):
        kinds = ("master", "exp_avg", "exp_avg_sq")
        self.kept = {{f"{{kind}}/{{name}}": t.clone() for kind in kinds for name, t in weights.items()}}
        self.updates, self.file = 0, open({file!r}, "w")

    def step(self, batch, lr):
        entered = time.monotonic()
        self.updates += 1
        time.sleep({seconds})
        result = StepResult(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(True))
        self.file.write(json.dumps([entered, time.monotonic()]) + "\\n")
        return result

    def loss(self, batch):
        return torch.tensor(1.0)

    def state(self):
        shards = {{n: Shard(t, tuple(t.shape), (0,) * t.dim()) for n, t in self.kept.items()}}
        return {{**shards, "step": Shard(torch.tensor(self.updates), (), ())}}

    def restore(self, state):
        pass


def build(target, *, device, precision, mesh):
    return Engine()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "memory", "checkpoint"))
    parser.add_argument("--target", default="targets/nano-cpu.toml")
    parser.add_argument("--steps", type=int, default=200, help="overhead: steps that are timed")
    parser.add_argument("--every", type=int, default=100, help="overhead: steps between checkpoints")
    parser.add_argument("--seconds", type=float, default=0.1, help="overhead: of the engine's step")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="memory: world sizes")
    parser.add_argument("--engine", help="memory: an engine file; default the textbook engine")
    parser.add_argument("--rounds", type=int, default=7, help="checkpoint: times each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure = {"overhead": overhead, "memory": memory, "checkpoint": bandwidth}[options.what]
        print(json.dumps(measure(options, Path(folder))))


def overhead(options: argparse.Namespace, folder: Path) -> dict:
    """Milliseconds between two steps, over those of a step, from the second step on."""
    times, engine = folder / "times.jsonl", folder / "engine.py"
    engine.write_text(ENGINE.format(seconds=options.seconds, file=str(times)), encoding="utf-8")
    steps = [f"recipe.steps={options.steps}", f"train.checkpoint_every={options.every}", "train.eval_every=100000"]
    forgetrain("data", "build", options.target, "--runs", folder)
    forgetrain("train", options.target, *steps, "--runs", folder, "--engine", engine, "--unverified")
    entered, left = zip(*map(json.loads, times.read_text(encoding="utf-8").splitlines()), strict=True)
    gaps = [1000 * (after - before) for before, after in zip(left[:-1], entered[1:], strict=True)]
    inside = [1000 * (after - before) for before, after in zip(entered[1:], left[1:], strict=True)]
    return {
        "steps": len(gaps),
        "step_ms": round(statistics.mean(inside), 2),
        "around_ms_mean": round(statistics.mean(gaps), 3),
        "around_ms_median": round(statistics.median(gaps), 3),
        "around_ms_largest": round(max(gaps), 1),
        "overhead_percent": round(100 * sum(gaps) / sum(inside), 2),
    }


def memory(options: argparse.Namespace, folder: Path) -> dict:
    """Peak resident MiB of the largest rank, four steps of micro-batches of one row, at each world size."""
    engine = ["--engine", options.engine, "--unverified"] if options.engine else []
    shape = ["recipe.steps=4", "recipe.warmup_steps=0", "recipe.decay_steps=0", "recipe.micro_batch_size=1"]
    forgetrain("data", "build", options.target, "--runs", folder)
    found = {}
    for ranks in options.ranks:
        words = (options.target, *shape, "hardware.threads=1", "--runs", folder, "--restart", *engine)
        forgetrain("train", *words, ranks=ranks)
        summary = next(folder.glob("*/train/summary.json"))
        found[ranks] = round(json.loads(summary.read_text(encoding="utf-8"))["peak_memory_bytes"] / 2**20)
    return {"peak_mib_of_a_rank": found, "state_mib": round(nbytes(state_of(load_target(options.target))) / 2**20)}


def bandwidth(options: argparse.Namespace, folder: Path) -> dict:
    """MiB/s, medians: everything until durable and verified, and torch's plain file with the same fsync."""
    state, alone = state_of(load_target(options.target)), World(0, 1, "cpu", None, None)
    plain = {name: shard.tensor for name, shard in state.items()}
    (folder / "tokenizer").mkdir()
    file, root = folder / "plain.pt", folder / "checkpoints"

    class Holder:
        state = staticmethod(lambda: state)
        restore = staticmethod(lambda found: None)

    def torch_save() -> None:
        torch.save(plain, file)
        with file.open("rb") as written:
            os.fsync(written.fileno())

    def load() -> None:
        checkpoint.load(Holder, checkpoint.verify(checkpoint.folder_of(root, 1)).path, alone)  # type: ignore[arg-type]

    work: dict[str, Callable[[], object]] = {
        "save": lambda: checkpoint.save(state, root, 1, {}, folder / "tokenizer", alone),
        "torch_save": torch_save,
        "load": load,
        "torch_load": lambda: torch.load(file),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.rounds):
        for name, act in work.items():
            began = time.monotonic()
            act()
            seconds[name].append(time.monotonic() - began)
    mib = nbytes(state) / 2**20
    rates = {name: round(mib / statistics.median(times)) for name, times in seconds.items()}
    return {
        "mib": round(mib, 1),
        "mib_per_second": rates,
        "seconds": {n: [round(t, 3) for t in s] for n, s in seconds.items()},
    }


def state_of(target: Target) -> dict[str, Shard]:
    weights = initial_weights(target.model, 0)
    tensors = {f"{k}/{n}": w.clone() for k in ("master", "exp_avg", "exp_avg_sq") for n, w in weights.items()}
    return {name: Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim()) for name, tensor in tensors.items()}


def nbytes(state: dict[str, Shard]) -> int:
    return sum(shard.tensor.nbytes for shard in state.values())


def forgetrain(*words: object, ranks: int = 1) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "forgetrain", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
