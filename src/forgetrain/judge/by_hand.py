"""A judging by hand in the ledger, gate by gate, so that one which was cut off goes on where it was.

with keeping(runs, target, file, {"bitwise": False}, resume=True) as kept:
    judgement = judge.judge(file, done=kept.done, after_gate=kept.add)
    kept.end(judgement)
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import forgetrain
from forgetrain.data.folder import MANIFEST
from forgetrain.durable import sha256_file
from forgetrain.errors import UserError
from forgetrain.judge.ledger import Ledger, target_key
from forgetrain.judge.runner import Judgement
from forgetrain.numerics.determinism import fingerprint
from forgetrain.spec.target import Target


class Kept:
    """``done``: what the judging had reached before it was cut off; empty of a new one, which begins in the ledger
    with its first finished gate."""

    def __init__(
        self, ledger: Ledger, target: Target, file: Path, source: bytes, options: Mapping[str, Any], *, resume: bool
    ):
        self._ledger, self._target, self._file, self._source = ledger, target, file, source
        environment = fingerprint(device=target.hardware.device, threads=target.hardware.threads)
        self._asked: dict[str, Any] = {"environment": environment, "purpose": "hand", "options": options}
        self._candidate = hashlib.sha256(self._source).hexdigest()
        found = ledger.unfinished(target_key(target), self._candidate, **self._asked) if resume else None
        self._judging, self.done = found or (None, [])
        if not all(verdict.sandboxed for verdict in self.done):  # they count with a user's word alone, given then
            self._judging, self.done = None, []

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
        self._ledger.add_verdicts(self._judging, judgement.verdicts, judgement.samples)
        return self._judging

    def end(self, judgement: Judgement) -> None:
        """After what else is made of it: until then it can be gone on with."""
        self._ledger.end_judging(self.add(judgement), passed=judgement.passed, sandboxed=judgement.sandboxed)


@contextlib.contextmanager
def keeping(
    runs: Path, target: Target, file: Path, options: Mapping[str, Any], *, resume: bool = False
) -> Iterator[Kept]:
    """A new judging, or with ``resume`` the last one of the same content, target, machine, options, tokens and version
    of what judges, if it was cut off.

    Raises:
        UserError: the ledger cannot be used, the file cannot be read, or another process judges it for this target.
    """
    tokens = runs / target.name / "data" / MANIFEST
    asked = {
        **options,
        "data": sha256_file(tokens) if tokens.is_file() else None,
        "gpus": torch.cuda.device_count() if target.hardware.device == "cuda" else 0,
        "versions": {name: _version(name) for name in ("megatron-core", "transformers")},
        "code": _code(),
    }
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", file=file, remedy="name an engine file") from None
    name = f"{hashlib.sha256(source).hexdigest()[:16]}-{target_key(target)[:16]}"
    with Ledger(runs / "ledger") as ledger, ledger.claim(name, what=str(file)):
        yield Kept(ledger, target, file, source, asked, resume=resume)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code() -> str:
    """The hash of this package's files, templates among them: gates that changed since do not go on with what others
    had found."""
    root, digest = Path(forgetrain.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(root)}:{sha256_file(file)};".encode())
    return digest.hexdigest()
