"""A judging by hand in the ledger, gate by gate, so that one which was cut off goes on where it was.

with keeping(runs, target, file, environment(target), {"bitwise": False}, resume=True) as kept:
    judgement = judge.judge(file, done=kept.done, after_gate=kept.add)
    kept.end(judgement)
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import forgetrain
from forgetrain.data.folder import MANIFEST
from forgetrain.durable import sha256_file
from forgetrain.errors import UserError
from forgetrain.gates.verdict import Verdict
from forgetrain.judge.ledger import Ledger, target_key
from forgetrain.judge.runner import Judgement
from forgetrain.spec.target import Target


@dataclass
class Kept:
    """``candidate``: the hash of ``source``. ``judging``: its id, ``done``: what it had reached before it was cut off;
    none and empty of a new one, which begins in the ledger with its first finished gate."""

    ledger: Ledger
    target: Target
    file: Path
    source: bytes
    candidate: str
    asked: Mapping[str, Any]
    judging: str | None = None
    done: list[Verdict] = field(default_factory=list)

    def add(self, judgement: Judgement) -> str:
        """Keeps a finished gate, with all its verdicts or none; returns the judging's id.

        Raises:
            UserError: the file was changed before the judge froze it.
        """
        if judgement.candidate != self.candidate:
            raise UserError("was changed as it was read", file=self.file, remedy="judge it again")
        if self.judging is None:
            key = self.ledger.add_target(self.target)
            self.ledger.add_candidate(key, self.source, message=f"judged by hand: {self.file.name}")
            self.judging = self.ledger.begin_judging(key, self.candidate, **self.asked)
        self.ledger.add_verdicts(self.judging, judgement.verdicts, judgement.samples)
        return self.judging

    def end(self, judgement: Judgement) -> None:
        """After what else is made of it: until then it can be gone on with."""
        self.ledger.end_judging(self.add(judgement), passed=judgement.passed, sandboxed=judgement.sandboxed)


@contextlib.contextmanager
def keeping(
    runs: Path,
    target: Target,
    file: Path,
    environment: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    resume: bool = False,
) -> Iterator[Kept]:
    """A new judging, or with ``resume`` the last one of the same content, target, ``environment`` (of machine and
    reference), options, tokens and ForgeTrain's own files, if it was cut off.

    Raises:
        UserError: the ledger cannot be used, the file cannot be read, or another process judges it for this target.
    """
    tokens = runs / target.name / "data" / MANIFEST
    options = {
        **options,
        "data": sha256_file(tokens) if tokens.is_file() else None,
        "gpus": torch.cuda.device_count() if target.hardware.device == "cuda" else 0,
        "code": _code(),
    }
    asked: dict[str, Any] = {"environment": environment, "purpose": "hand", "options": options}
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", file=file, remedy="name an engine file") from None
    candidate, key = hashlib.sha256(source).hexdigest(), target_key(target)
    with Ledger(runs / "ledger") as ledger, ledger.claim(f"{candidate[:16]}-{key[:16]}", what=str(file)):
        kept = Kept(ledger, target, file, source, candidate, asked)
        found = ledger.unfinished(key, candidate, **asked) if resume else None
        if found and all(verdict.sandboxed for verdict in found[1]):  # others count with a user's word, given then
            kept.judging, kept.done = found
        yield kept


def _code() -> str:
    """The hash of this package's files, templates among them: gates that changed since do not go on with what others
    had found."""
    root, digest = Path(forgetrain.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(root)}:{sha256_file(file)};".encode())
    return digest.hexdigest()
