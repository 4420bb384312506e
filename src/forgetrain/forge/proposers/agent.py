"""A coding agent as a command: ``claude -p``, ``codex exec``, ``aider``, or anything that edits files.

Each attempt is one fresh process in a scratch folder that holds ``BRIEF.md`` and ``engine.py`` (the champion). The
command's last argument is the prompt. What counts is the file that it leaves: no change is a failed attempt whatever
the exit status says, and a folder that the agent deleted is one too.
"""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

from forgetrain.errors import UserError
from forgetrain.forge.proposers.base import Brief, NoProposal, Proposal
from forgetrain.forge.proposers.watchdog import run_watched

PROMPT = (
    "Read BRIEF.md, then edit engine.py so that a training step takes less time while the contract in the brief holds. "
    "Write one line in MESSAGE.txt that says what you changed and why it should be faster."
)
LARGEST = 2 << 20  # bytes of an engine file


class Agent:
    """``command`` is a shell-like line, for example ``claude -p``; limits are seconds."""

    def __init__(self, command: str, *, wall: float = 1800.0, silence: float = 600.0):
        self._argv = shlex.split(command)
        if not self._argv:
            raise UserError("the agent's command is empty", key="--agent", remedy='for example --agent "claude -p"')
        self._wall, self._silence = wall, silence
        self.name = f"agent:{Path(self._argv[0]).name}"

    def propose(self, brief: Brief) -> Proposal | NoProposal:
        with tempfile.TemporaryDirectory(prefix="forgetrain-agent-", ignore_cleanup_errors=True) as scratch:
            folder = Path(scratch)
            (folder / "BRIEF.md").write_text(brief.markdown(), encoding="utf-8")
            (folder / "engine.py").write_text(brief.champion, encoding="utf-8")
            try:
                outcome = run_watched([*self._argv, PROMPT], folder, wall=self._wall, silence=self._silence)
            except (FileNotFoundError, PermissionError) as error:
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
    """The file's text, or None when it is missing, a link, too large or not text."""
    try:
        if path.is_symlink() or path.stat().st_size > LARGEST:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
