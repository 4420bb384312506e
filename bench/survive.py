"""A run of any size, killed once it has a checkpoint, and resumed: are the steps after it the same, what did it take?

    python bench/survive.py TARGET --engine fsdp.py --ranks 4 --runs DIR --at 4 --steps 3 --set recipe.batch_size=16

The shipped command under torchrun, twice. The first run is killed with SIGKILL, all of its processes, when the
checkpoint of step ``at`` is whole and ``steps`` more steps are in its journal; the second resumes and is killed after
the same steps. Their losses and gradient norms have to be equal bit for bit. TARGET needs a built data folder in DIR.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forgetrain.engine import tree
from forgetrain.spec.target import load_target
from forgetrain.train.checkpoint import folder_of
from forgetrain.train.metrics import read_journal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--engine", default=None, help="an engine file; default: the target's own")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--at", type=int, default=4, help="the step of the checkpoint that is resumed")
    parser.add_argument("--steps", type=int, default=3, help="steps after it that are compared, fewer than AT")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args()
    if not 0 < options.steps < options.at:
        parser.error("--steps must be below --at, or the next checkpoint is due before they are taken")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is killed then, too
    result = survive(options)
    print(json.dumps(result))
    sys.exit(0 if result["equal"] else 1)


def survive(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to each run's first new step and until the checkpoint was whole, bytes of it, and the steps of both."""
    run = options.runs / load_target(options.target).name
    saved, last = folder_of(run / "checkpoints", options.at), options.at + options.steps
    first = Run(options, run, "--restart")
    first.until(lambda: saved.is_dir() and first.last_step() >= last)
    taken = sorted(run.glob("checkpoints/step-*"))
    if taken != [saved]:
        sys.exit(f"there are {[path.name for path in taken]}: steps are too quick, choose a larger --at")
    size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    second = Run(options, run, "--resume")
    second.until(lambda: second.last_step() >= last)
    if (resumed_at := json.loads((run / "train" / "run.json").read_text())["resumed_at"]) != options.at:
        sys.exit(f"it went on from step {resumed_at}, not from {options.at}")
    compared = range(options.at + 1, last + 1)
    before, after = ([(run.steps[n]["loss"], run.steps[n]["grad_norm"]) for n in compared] for run in (first, second))
    return {
        "equal": before == after,
        "first": before,
        "resumed": after,
        "seconds_to_first_step": first.seconds[1],
        "seconds_to_checkpoint": first.seen(saved),
        "seconds_to_resumed_step": second.seconds[options.at + 1],
        "checkpoint_bytes": size,
        "tokens_per_second": [first.steps[n].get("tokens_per_second") for n in sorted(first.steps)],
        "gpu_mib": [first.gpu_mib, second.gpu_mib],
    }


class Run:
    """The command, and what its journal says since it began. ``seconds``: when each step was first seen there."""

    def __init__(self, options: argparse.Namespace, run: Path, how: str):
        self.journal, self.began = run / "train" / "metrics.jsonl", time.time()
        self.steps: dict[int, dict[str, Any]] = {}
        self.seconds: dict[int, float] = {}
        self.gpu_mib = 0
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        given = [f"train.checkpoint_every={options.at}", "train.log_every=1", *options.overrides]
        given = ["--runs", str(options.runs), how, "--unverified", *(word for key in given for word in ("--set", key))]
        engine = [] if options.engine is None else ["--engine", options.engine]
        command = [*(torchrun if options.ranks > 1 else []), "-m", "forgetrain", "train", str(options.target)]
        self.printed = tempfile.TemporaryFile("w+")  # noqa: SIM115
        both = {"stdout": self.printed, "stderr": self.printed}
        self.process = subprocess.Popen([sys.executable, *command, *engine, *given], start_new_session=True, **both)

    def until(self, done: Callable[[], bool]) -> None:
        """Waits, then kills every process of the run."""
        processes: list[int] = []
        try:
            while not done():
                self._look()
                if self.process.poll() is not None:
                    self.printed.seek(0)
                    lines = self.printed.read().splitlines()
                    told = [line for line in lines if line.startswith("forgetrain: ")] or lines[-20:]
                    sys.exit("\n".join(["the run ended by itself", *told]))
                processes = tree.descendants(self.process.pid)
                time.sleep(0.1)
        finally:
            tree.kill(self.process.pid)
            self.process.wait()
            while any(
                tree.usage(pid).resident_bytes for pid in processes
            ):  # what they hold of a GPU is theirs till then
                time.sleep(0.1)

    def last_step(self) -> int:
        return max(self.steps, default=0)

    def seen(self, place: Path) -> float:
        """Seconds until a folder was whole, which gets its name then."""
        return place.stat().st_ctime - self.began

    def _look(self) -> None:
        if self.journal.is_file() and self.journal.stat().st_mtime > self.began:
            for line in read_journal(self.journal):
                if "grad_norm" in line and line["step"] not in self.seconds:
                    self.seconds[line["step"]] = time.time() - self.began
                if "grad_norm" in line:
                    self.steps[line["step"]] = line
        self.gpu_mib = max(self.gpu_mib, gpu_mib())


def gpu_mib() -> int:
    """Of the fullest GPU, by all who use it; 0 where there is none."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return max(map(int, told.split()))


if __name__ == "__main__":
    main()
