"""What fp8 costs, with units of whole tensors and of blocks: small models, by the gates' measures. On a CPU.

    PYTHONPATH=. python bench/fp8.py minicpm5 --lr 3e-4 --steps 100 --seeds 5
    PYTHONPATH=. python bench/fp8.py minicpm5 --errors

Loss, by G5: models are trained in pairs from the same weights on the same text, a chain in which a token decides the
next four times out of five. The reference is the textbook engine in bf16, the band that of a plan which rounds
otherwise. Against it train the hopper schedule's engine of the fp8 target, with formulas in torch in place of its
kernels (tests/formulas.py), and the explicit schedule's, which shares no code with it.

--errors, by G4: the hopper schedule's engine, honest and with defects planted (tests/engine/test_fp8.py), as multiples
of what the explicit schedule's errs in fp8, and of what it errs in bf16; the best and the worst kind of tensor.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path

import torch

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.gates.g4 import ErrorPool
from forgetrain.gates.g5 import g5
from forgetrain.judge.hidden import Stream, derive
from forgetrain.judge.runner import KNOWN_GOOD
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.target import Precision, Target
from tests.engine.test_fp8 import PLANTED, built, planted, pool
from tests.formulas import in_torch
from tests.tiny import ARCHITECTURES, tiny_target

MODEL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
MODEL |= {"vocab_size": 512, "max_position_embeddings": 128}
SHAPE = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 64}
SCALINGS = ("tensor", "block")


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


def scaled(target: Target, scaling: str) -> Target:
    return target.model_copy(update={"precision": Precision.model_validate({"dtype": "fp8", "scaling": scaling})})


def compare_losses(target: Target, steps: int, seeds: int) -> None:
    plain = target.for_reference()

    def run(target: Target, source: str) -> list[list[float]]:
        return losses(target, source, steps, seeds)

    reference = run(plain, write_engine(plain, Plan.textbook()))
    known_good = run(plain, write_engine(plain, Plan(KNOWN_GOOD)))
    mean = sum(map(sum, reference)) / steps / seeds
    print(f"{target.name}: loss from {reference[0][0]:.3f} to {reference[0][-1]:.3f}, mean {mean:.3f}", flush=True)
    for scaling in SCALINGS:
        fp8 = scaled(target, scaling)
        hopper = in_torch(write_engine(fp8, Plan({"schedule": "hopper"})))
        for name, source in (("hopper", hopper), ("explicit", write_engine(fp8, Plan.textbook()))):
            verdict = g5(run(fp8, source), reference, [known_good], seeds=seeds)
            delta, each = verdict.detail["delta"], ", ".join(f"{d:+.1e}" for d in verdict.detail["per_seed"])
            print(
                f"{scaling}, {name}: {delta:+.2e} ({delta / mean:+.2e} of the loss), {verdict.threshold:.2e} allowed, "
                f"{'passed' if verdict.passed else 'FAILED'}; seeds {each}; known good {verdict.detail['band']:.1e}",
                flush=True,
            )


def ratios(mine: ErrorPool, theirs: ErrorPool) -> list[float]:
    """Of every kind of tensor, in order."""
    return sorted(kind.rms / theirs.kinds[name].rms for name, kind in mine.kinds.items())


def compare_errors(target: Target) -> None:
    with tempfile.TemporaryDirectory() as folder:

        def errors(target: Target, plan: Plan, change=lambda source: source) -> ErrorPool:
            path = Path(folder) / f"{len(list(Path(folder).iterdir()))}.py"
            return pool(built(target, path, plan, target.precision.dtype, change), target)

        in_bf16 = errors(target.for_reference(), Plan.textbook())
        for scaling in SCALINGS:
            fp8 = scaled(target, scaling)
            theirs, hopper = errors(fp8, Plan.textbook()), Plan({"schedule": "hopper"})
            for defect in (None, *(defect for which, defect in PLANTED if which == scaling)):
                mine = errors(fp8, hopper, functools.partial(planted, defect) if defect else in_torch)
                (low, *_, high), (least, *_, most) = ratios(mine, theirs), ratios(mine, in_bf16)
                text = f"{low:.2f} to {high:.2f} against fp8, {least:.1f} to {most:.1f} against bf16"
                print(f"{target.name}, {scaling}, {defect or 'honest'}: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=[name for name in ARCHITECTURES if not name.startswith("qwen")])
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--width", type=int, default=128, help="hidden; what lies between is twice that")
    parser.add_argument("--errors", action="store_true", help="G4's measure, not G5's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = {**MODEL, "hidden_size": args.width, "intermediate_size": 2 * args.width}
    sections = {"recipe": {**SHAPE, "lr": args.lr}, "gates": SHAPE, "precision": {"dtype": "fp8"}}
    target = tiny_target(args.architecture, model=model, **sections)
    if args.errors:
        compare_errors(target)
    else:
        compare_losses(target, args.steps, args.seeds)


if __name__ == "__main__":
    main()
