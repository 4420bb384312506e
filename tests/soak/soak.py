"""Kills a training run with SIGKILL again and again; it must end with the weights of a run that was left alone.

    python -m tests.soak.soak --kills 100 --ranks 1 --seed 0        # make soak: one rank, then two

A kill falls at a random moment after the start, after the first steps, or while a checkpoint is being written. With two
ranks it takes all processes, one rank, or torchrun. After each kill the newest checkpoint must be whole and not older
than the one before.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from forgetrain.train import checkpoint
from forgetrain.train.metrics import read_journal
from tests.train.test_command import finish, forgetrain, summary, write_target

#: Until all processes of a run that lost one are gone.
GONE_SECONDS = 30.0


def soak(folder: Path, *, kills: int, ranks: int, seed: int) -> dict[str, int]:
    """How often which kind of kill hit a running process. Raises AssertionError when anything was lost."""
    draw = random.Random(seed)
    target = write_target(folder, steps=60 * kills + 10)  # so many that a kill always finds some left
    finish(forgetrain(folder, "data", "build", target))
    command = ("train", target, "--resume", "--set", "train.checkpoint_every=1", "--set", "train.eval_every=1000")
    finish(forgetrain(folder, *command, ranks=ranks))
    whole = summary(folder)
    for name in ("checkpoints", "train"):
        shutil.rmtree(folder / "runs" / "tiny" / name)
    counts: dict[str, int] = {}
    newest = 0
    for _ in range(kills):
        process = forgetrain(folder, *command, ranks=ranks, start_new_session=True)
        moment = draw.choice(["any moment", "after steps", "in a save", "in a save"])
        wait(moment, process, folder, draw)
        assert process.poll() is None, f"the run ended by itself: {process.communicate()[1][-2000:]}"
        who = kill(process, ranks, draw)
        key = f"{moment}, {who}"
        counts[key] = counts.get(key, 0) + 1
        root = folder / "runs" / "tiny" / "checkpoints"
        found = checkpoint.newest(root, warn=refuse)
        step = 0 if found is None else found.step
        assert step >= newest, f"step {newest} was durable, now it is {step}"
        newest = step
    finish(forgetrain(folder, *command, ranks=ranks))
    assert summary(folder)["weight_sha256"] == whole["weight_sha256"]
    assert [line["step"] for line in read_journal(folder / "runs/tiny/train/metrics.jsonl") if "lr" in line] == list(
        range(1, whole["steps"] + 1)
    )
    return counts


def refuse(warning: str) -> None:
    raise AssertionError(warning)


def wait(moment: str, process: subprocess.Popen[str], folder: Path, draw: random.Random) -> None:
    """Until the moment of the kill."""
    root, journal = folder / "runs/tiny/checkpoints", folder / "runs/tiny/train/metrics.jsonl"
    if moment == "any moment":
        time.sleep(draw.uniform(0.5, 8.0 if root.exists() else 4.0))
        return
    before = {path.name for path in root.glob("*")}
    begun = journal.stat().st_mtime_ns if journal.is_file() else 0
    while process.poll() is None:
        if moment == "after steps" and journal.is_file() and journal.stat().st_mtime_ns > begun:
            break
        if moment == "in a save" and any(p.name not in before for p in root.glob(".step-*.partial")):
            break
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, 0.3 if moment == "after steps" else 0.03))


def kill(process: subprocess.Popen[str], ranks: int, draw: random.Random) -> str:
    """Kills all processes of the run, one rank, or torchrun, and returns which when none is left."""
    children = children_of(process.pid) if ranks > 1 else []
    watched = [os.pidfd_open(pid) for pid in children]
    who = draw.choice(["all", "a rank", "torchrun"]) if len(children) == ranks else "all"
    if who == "a rank":
        send(draw.choice(children))
    else:
        send(process.pid)
        for pid in children if who == "all" else []:
            send(pid)
    began = time.monotonic()
    process.communicate(timeout=GONE_SECONDS)
    for descriptor in watched:
        left = max(0.0, GONE_SECONDS - (time.monotonic() - began))
        assert select.select([descriptor], [], [], left)[0], f"a rank lives {GONE_SECONDS} s after {who} was killed"
        os.close(descriptor)
    return who


def send(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it was faster
        return


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = soak(Path(folder), kills=options.kills, ranks=options.ranks, seed=options.seed)
    print(f"{options.kills} kills on {options.ranks} rank(s) in {time.monotonic() - began:.0f} s, the same weights")
    for key, count in sorted(counts.items()):
        print(f"  {count:4} {key}")


if __name__ == "__main__":
    main()
