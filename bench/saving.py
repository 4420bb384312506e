"""What saving costs a training step: blocks of steps with and without a checkpoint, in turn.

    python bench/saving.py --every 20 --pairs 4        # nano-cpu, the textbook engine

A block with a checkpoint begins with it and is timed until it is durable, so all that saving takes from the steps is
counted: the copy of the state, and the cores and the memory that writing and hashing use beside the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from forgetrain.engine.contract import Batch, make_batch
from forgetrain.engine.plan import Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.target import Target, load_target
from forgetrain.train.saving import Saver
from forgetrain.train.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="targets/nano-cpu.toml")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--pairs", type=int, default=4, help="blocks of each kind")
    options = parser.parse_args()
    target = load_target(options.target)
    torch.set_num_threads(target.hardware.threads)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(target, Path(folder), options.every, options.pairs)))


def measure(target: Target, folder: Path, every: int, pairs: int) -> dict[str, float | list[float]]:
    """Seconds a step without and with a checkpoint each ``every`` steps, medians over blocks, and the step's cost."""
    (folder / "engine.py").write_text(write_engine(target, Plan.textbook()), encoding="utf-8")
    (folder / "tokenizer").mkdir()
    module = load_engine(str(folder / "engine.py"))
    engine = module.build(target.plain(), device="cpu", precision=target.precision.dtype, mesh=None)
    engine.load(initial_weights(target.model, target.recipe.seed))
    batch = random_batch(target)
    without, saving, staging = [], [], []
    with Saver(folder / "checkpoints", World(0, 1, "cpu", None, None), target.train) as saver:

        def block(step: int, *, saves: bool) -> float:
            began = time.monotonic()
            if saves:  # at the beginning, so that all of the writing falls into this block
                saver.start(engine, step, {}, folder / "tokenizer")
                staging.append(time.monotonic() - began)
            for _ in range(every):
                engine.step(batch, 1e-4)
            if saves:
                saver.wait()
            return (time.monotonic() - began) / every

        block(0, saves=True)  # buffers are made and imports done
        staging.clear()
        for pair in range(pairs):
            saves_first = pair % 2 == 0
            for saves in (saves_first, not saves_first):
                (saving if saves else without).append(block(pair + 1, saves=saves))
    return {
        "every": every,
        "step_seconds": round(statistics.median(without), 4),
        "step_seconds_saving": round(statistics.median(saving), 4),
        "cost_percent": round(100 * (statistics.median(s / w for s, w in zip(saving, without, strict=True)) - 1), 2),
        "blocks_without": [round(seconds, 4) for seconds in without],
        "blocks_saving": [round(seconds, 4) for seconds in saving],
        "staging_seconds": round(statistics.median(staging), 4),
        "checkpoint_mib": round(sum(s.tensor.nbytes for s in engine.state().values()) / 2**20, 1),
    }


def random_batch(target: Target) -> Batch:
    recipe = target.recipe
    generator = torch.Generator().manual_seed(0)
    shape = (recipe.batch_size, recipe.sequence_length + 1)
    tokens = torch.randint(0, target.model.vocab_size, shape, generator=generator)
    return make_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


if __name__ == "__main__":
    main()
