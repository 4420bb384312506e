"""The shipped command with a candidate's engine, its whole process tree in the sandbox: what G9 looks at.

    command = ShippedCommand(judge, frozen_file, target, ranks=2, folder=scratch)
    command.run("train")                       # once through
    command.run("train", kill_at=2)            # killed with SIGKILL once the checkpoint of step 2 is there
    command.run("train", "--resume")

The tree sees this project and what it needs, the tokens, and one folder of its own to write; no reference, no golden
record, no ledger. What it leaves is read as JSON, nothing of it is unpickled.
"""

from __future__ import annotations

import json
import stat
import subprocess
import time
from pathlib import Path

from forgetrain.engine import tree
from forgetrain.engine.admit import printable
from forgetrain.engine.launch import strangers_environment
from forgetrain.engine.printed import Tail
from forgetrain.errors import UserError
from forgetrain.gates.g9 import TrainingRun
from forgetrain.judge.sandbox import SCRATCH, Sandbox, state_bytes, training_sandbox
from forgetrain.spec.target import Target
from forgetrain.spec.toml import to_toml
from forgetrain.train.checkpoint import folder_of
from forgetrain.train.metrics import read_journal

_LARGEST = 16 << 20  # bytes of a file that is read
_LOOK = 0.02  # seconds between looks at what the run has written
_WATCH = 0.5  # seconds between looks at memory and processes, which read all of /proc
_CHECKPOINTS = 4  # that may lie in a run's folder: two that are kept, one that is being written, one to be removed
#: Resource limits are set inside: NPROC counts the processes of a user namespace.
_LIMITED = """
import json, os, sys
from forgetrain.engine.supervise import set_limits
set_limits(json.loads(sys.argv[1]))
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ShippedCommand:
    """``folder`` must be empty; ``data`` is a built data folder. ``timeout``: seconds for one run. ``cache``: a folder
    of this candidate's alone, for compiled code; runs that share it need not all compile. ``largest``: bytes that the
    folder may hold."""

    def __init__(
        self,
        engine: Path,
        target: Target,
        data: Path,
        folder: Path,
        *,
        ranks: int,
        timeout: float,
        cache: Path | None = None,
    ):
        self.target, self.ranks, self.timeout = target, ranks, timeout
        self.folder, self.run_folder = folder, folder / target.name
        self.largest = SCRATCH + _CHECKPOINTS * state_bytes(target)
        self.run_folder.mkdir(parents=True)
        self.target_file = folder / "target.toml"
        self.target_file.write_text(to_toml(target), encoding="utf-8")
        self.box: Sandbox = training_sandbox(engine, target, self.target_file, data, folder, cache)

    def run(self, *options: str, kill_at: int | None = None) -> str | None:
        """Runs ``forgetrain train`` to its end; None when it ended well, else what was wrong, in words.

        kill_at: a step; once its checkpoint is there the whole tree is killed, and None says that it was.
        """
        inner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks), "-m", "forgetrain"]
        argv = ["python", "-P", *(inner if self.ranks > 1 else inner[-2:])]
        argv += ["train", "target.toml", "--engine", "engine.py", "--runs", "runs", "--unverified", "--json", *options]
        limits = {name: limit for name, limit in self.box.limits.items() if name.isupper()}
        process = subprocess.Popen(
            self.box.wrap(["python", "-P", "-c", _LIMITED, json.dumps(limits), *argv]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=strangers_environment(self.target.hardware.device),
        )
        printed = Tail(process.stdout), Tail(process.stderr)
        try:
            return self._wait(process, printed[1], kill_at)
        finally:
            tree.kill(process.pid)
            process.wait()
            for tail in printed:
                tail.close()

    def _wait(self, process: subprocess.Popen[bytes], printed: Tail, kill_at: int | None) -> str | None:
        deadline, watch = time.monotonic() + self.timeout, 0.0
        while process.poll() is None:
            if kill_at is not None and folder_of(self.run_folder / "checkpoints", kill_at).is_dir():
                return None
            if time.monotonic() > deadline:
                return f"did not end within {self.timeout:.0f} s"
            if time.monotonic() > watch:
                watch = time.monotonic() + _WATCH
                over = tree.excess(process.pid, self.box.limits, self.box.cache)
                over = over or tree.excess(process.pid, {"written": self.largest}, self.folder)
                if over is not None:
                    return over
            time.sleep(_LOOK)
        if process.returncode == 0:
            return None if kill_at is None else "ended before it could be killed"
        # torchrun ends its report of a rank that failed by a line of signs; the one before tells a signal
        lines = [line.strip() for line in printed.text().splitlines() if any(map(str.isalnum, line))]
        told = [line for line in lines if line.startswith("forgetrain: ") or "Error: " in line] or lines
        return f"exit code {process.returncode}; {told[-1][:300] if told else 'it printed nothing'}"

    def found(self, problem: str | None) -> TrainingRun:
        """What the last run left. Its files are a stranger's: neither links nor pipes nor large ones are read."""
        try:
            metrics, summary = (self.run_folder / "train" / name for name in ("metrics.jsonl", "summary.json"))
            for file in (metrics, summary):
                status = file.lstat()
                if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                    return TrainingRun({}, None, f"{file.name} is no file of a run")
            losses = {int(line["step"]): float(line["loss"]) for line in read_journal(metrics) if "loss" in line}
            return TrainingRun(losses, json.loads(summary.read_text(encoding="utf-8"))["weight_sha256"], problem)
        except (OSError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError, UserError) as error:
            told = printable(f"{type(error).__name__}: {error}"[:300])  # it may quote the whole file
            return TrainingRun({}, None, problem or f"left nothing that can be read: {told}")
