"""What fp8 costs in loss: small models trained in pairs from the same weights on the same text, by G5's measure.

    PYTHONPATH=. python bench/fp8.py minicpm5 --lr 3e-4 --steps 100 --seeds 5

On a CPU. The reference is the textbook engine in bf16, the band that of a plan which rounds otherwise. Against it train
the hopper schedule's engine of the fp8 target, with formulas in torch in place of its kernels (tests/formulas.py), and
the explicit schedule's, which shares no code with it. The text is a chain in which a token decides the next four times
out of five.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.gates.g5 import g5
from forgetrain.judge.hidden import Stream, derive
from forgetrain.judge.runner import KNOWN_GOOD
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.target import Target
from tests.formulas import in_torch
from tests.tiny import ARCHITECTURES, tiny_target

MODEL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
MODEL |= {"vocab_size": 512, "max_position_embeddings": 128}
SHAPE = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 64}


def losses(target: Target, source: str, steps: int, seeds: int) -> list[list[float]]:
    """Of each step of each seed."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.py"
        path.write_text(source, encoding="utf-8")
        module = load_engine(path)
    for seed in range(11, 11 + seeds):
        engine = module.build(target.plain(), device="cpu", precision=target.precision.dtype, mesh=None)
        engine.load(initial_weights(target.model, derive(seed, "start")))
        stream = Stream(target, seed)
        found.append([float(engine.step(stream.at(step), stream.rate(step)).loss) for step in range(steps)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=[name for name in ARCHITECTURES if not name.startswith("qwen")])
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sections = {"model": MODEL, "recipe": {**SHAPE, "lr": args.lr}, "gates": SHAPE, "precision": {"dtype": "fp8"}}
    target = tiny_target(args.architecture, **sections)
    plain = target.for_reference()
    hopper = in_torch(write_engine(target, Plan({"schedule": "hopper"})))

    def run(target: Target, source: str) -> list[list[float]]:
        return losses(target, source, args.steps, args.seeds)

    reference = run(plain, write_engine(plain, Plan.textbook()))
    known_good = run(plain, write_engine(plain, Plan(KNOWN_GOOD)))
    mean = sum(map(sum, reference)) / args.steps / args.seeds
    print(f"{args.architecture}: loss from {reference[0][0]:.3f} to {reference[0][-1]:.3f}, mean {mean:.3f}")
    for name, source in (("hopper", hopper), ("explicit", write_engine(target, Plan.textbook()))):
        verdict = g5(run(target, source), reference, [known_good], seeds=args.seeds)
        delta, each = verdict.detail["delta"], ", ".join(f"{d:+.1e}" for d in verdict.detail["per_seed"])
        print(
            f"{name}: {delta:+.2e} ({delta / mean:+.2e} of the loss), {verdict.threshold:.2e} allowed, "
            f"{'passed' if verdict.passed else 'FAILED'}; seeds {each}; known good {verdict.detail['band']:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
