"""Each attempt as a commit of the user's git repository, under ``refs/forgetrain/<target>/<candidate>``: never on a
branch, never in the index or the work tree.

    keep_commit(Path("runs"), "nano-cpu", digest, source, "production schedule")
    # git log refs/forgetrain/nano-cpu/5f1c...; git show refs/forgetrain/nano-cpu/5f1c...:engine.py
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_AUTHOR = ("-c", "user.name=forgetrain", "-c", "user.email=forgetrain@localhost")


def keep_commit(folder: Path, target: str, digest: str, source: str, message: str, parent: str | None = None) -> bool:
    """Makes the commit; ``parent`` is the digest of the candidate that it began from. False outside a repository."""
    if shutil.which("git") is None or _git(folder, "rev-parse", "--git-dir") is None:
        return False
    ref = f"refs/forgetrain/{target}/{digest[:16]}"
    if _git(folder, "rev-parse", "--verify", "--quiet", ref) is not None:
        return True
    blob = _git(folder, "hash-object", "-w", "--stdin", text=source)
    tree = blob and _git(folder, "mktree", text=f"100644 blob {blob}\tengine.py\n")
    if not tree:
        return False
    before = parent and _git(folder, "rev-parse", "--verify", "--quiet", f"refs/forgetrain/{target}/{parent[:16]}")
    parents = ("-p", before) if before else ()
    commit = _git(folder, *_AUTHOR, "commit-tree", tree, *parents, text=f"{message}\n\nCandidate {digest}\n")
    return commit is not None and _git(folder, "update-ref", ref, commit) is not None


def _git(folder: Path, *arguments: str, text: str | None = None) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], input=text, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
