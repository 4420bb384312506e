"""A coding agent as a command: ``claude -p``, ``codex exec``, ``aider``, or anything that edits files.

Each attempt is one fresh process in a scratch folder that holds ``BRIEF.md`` and ``engine.py`` (the champion). The
command's last argument is the prompt. What counts is the file that it leaves: no change is a failed attempt whatever
the exit status says, and a folder that the agent deleted is one too. No process of it is left afterwards, and it may
take no longer than the budget has minutes.
"""

from __future__ import annotations

import contextlib
import shlex
import stat
import tempfile
from pathlib import Path

from forgetrain.errors import UserError
from forgetrain.forge.proposers.base import Brief, NoProposal, Proposal
from forgetrain.forge.proposers.watchdog import run_watched
from forgetrain.judge.scratch import Scratch

PROMPT = (
    "Read BRIEF.md, then edit engine.py so that a training step takes less time while the contract in the brief holds. "
    "Write one line in MESSAGE.txt that says what you changed and why it should be faster."
)
LARGEST = 2 << 20  # bytes of an engine file


class Agent:
    """``command`` is a shell-like line, for example ``claude -p``; limits are seconds, if the budget has as many."""

    def __init__(self, command: str, *, wall: float = 1800.0, silence: float = 600.0):
        try:
            self._argv = shlex.split(command)
        except ValueError as error:
            problem = f"the agent's command is not whole: {error}".lower()
            raise UserError(problem, key="--agent", value=command, remedy="close its quotation marks") from None
        if not self._argv:
            raise UserError("the agent's command is empty", key="--agent", remedy='for example --agent "claude -p"')
        self._wall, self._silence = wall, silence
        self.name = f"agent:{Path(self._argv[0]).name}"

    def propose(self, brief: Brief) -> Proposal | NoProposal:
        with (
            contextlib.closing(Scratch("agent")) as scratch,  # removed by the next one after a kill
            tempfile.TemporaryDirectory(dir=scratch.path, ignore_cleanup_errors=True) as work,
        ):
            folder = Path(work)
            (folder / "BRIEF.md").write_text(brief.markdown(), encoding="utf-8")
            (folder / "engine.py").write_text(brief.champion, encoding="utf-8")
            wall = min(self._wall, 60 * brief.budget.minutes)
            try:
                outcome = run_watched([*self._argv, PROMPT], folder, wall=wall, silence=self._silence)
            except OSError as error:
                raise UserError(
                    f"the agent's command cannot be run: {error.strerror}",
                    key="--agent",
                    value=self._argv[0],
                    remedy="install it, or give its path",
                ) from None
            source = _read(folder / "engine.py")
            if source is None:
                return NoProposal(f"the agent left no readable engine.py ({outcome.reason})")
            if source == brief.champion:
                return NoProposal(f"the agent changed nothing ({outcome.reason})")
            message = _read(folder / "MESSAGE.txt") or outcome.output.strip().rpartition("\n")[2] or "no message"
            return Proposal(source, " ".join(message.split())[:500])


def _read(path: Path) -> str | None:
    """The file's text, or None when it is missing, no file of its own, too large or not text."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
