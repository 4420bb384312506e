"""A judging by hand in the ledger, gate by gate, so that one which was cut off goes on where it was.

with keeping(runs, target, file, {"bitwise": False}, resume=True) as kept:
    judgement = judge.judge(file, done=kept.done, after_gate=kept.add)
    kept.end(judgement)
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from forgetrain.errors import UserError
from forgetrain.judge.ledger import Ledger, target_key
from forgetrain.judge.runner import Judgement
from forgetrain.numerics.determinism import fingerprint
from forgetrain.spec.target import Target


class Kept:
    """``done``: what the judging had reached before it was cut off; empty of a new one, which begins in the ledger
    with its first finished gate."""

    def __init__(self, ledger: Ledger, target: Target, file: Path, options: Mapping[str, Any], *, resume: bool):
        try:
            self._source = file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", file=file, remedy="name an engine file") from None
        self._ledger, self._target, self._file = ledger, target, file
        environment = fingerprint(device=target.hardware.device, threads=target.hardware.threads)
        self._asked: dict[str, Any] = {"environment": environment, "purpose": "hand", "options": options}
        self._candidate = hashlib.sha256(self._source).hexdigest()
        found = ledger.unfinished(target_key(target), self._candidate, **self._asked) if resume else None
        self._judging, self.done = found or (None, [])

    def add(self, judgement: Judgement) -> str:
        """Keeps a finished gate, with all its verdicts or none; returns the judging's id.

        Raises:
            UserError: the file was changed before the judge froze it.
        """
        if judgement.candidate != self._candidate:
            raise UserError("was changed as it was read", file=self._file, remedy="judge it again")
        if self._judging is None:
            key = self._ledger.add_target(self._target)
            self._ledger.add_candidate(key, self._source, message=f"judged by hand: {self._file.name}")
            self._judging = self._ledger.begin_judging(key, self._candidate, **self._asked)
        self._ledger.add_verdicts(self._judging, judgement.verdicts)
        self._ledger.add_samples(self._judging, judgement.samples)
        return self._judging

    def end(self, judgement: Judgement) -> None:
        self._ledger.end_judging(self.add(judgement), passed=judgement.passed, sandboxed=judgement.sandboxed)


@contextlib.contextmanager
def keeping(
    runs: Path, target: Target, file: Path, options: Mapping[str, Any], *, resume: bool = False
) -> Iterator[Kept]:
    """A new judging, or with ``resume`` the latest of the same content, target, machine and options that was cut off,
    if there is one.

    Raises:
        UserError: the ledger cannot be used, or the file cannot be read.
    """
    with Ledger(runs / "ledger") as ledger:
        yield Kept(ledger, target, file, options, resume=resume)
