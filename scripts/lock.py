"""Writes constraints/run.txt and constraints/dev.txt: every dependency but torch, pinned, with its hashes.

    make lock        # needs uv: pip install uv

uv resolves pyproject.toml for every Python from 3.11 on and every platform at once, from the index that it is set up
for; the files name packages, versions and hashes, and no index. torch is pinned in constraints/torch.txt without a
hash, because the user chooses its CPU or CUDA build; what only a CUDA build needs comes with that build.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints"

#: File → the extras whose dependencies it holds. ``dev`` holds everything that ``run`` does, at the same versions.
LOCKS = {"run": ("megatron", "transformers"), "dev": ("dev",)}

#: The user's choice of torch, and what its CUDA builds bring along.
LEFT_OUT = re.compile(r"^(torch|forgetrain|nvidia-.*|cuda-.*)$")

HEADER = """\
# Written by scripts/lock.py (make lock); do not edit. Everything but torch, with hashes:
#   pip install --require-hashes --no-deps -r constraints/{name}.txt
#   pip install -r constraints/torch.txt
"""


def main() -> int:
    uv = shutil.which("uv")
    if uv is None:
        print("uv is not installed. Install it with: pip install uv", file=sys.stderr)
        return 2
    for name, extras in LOCKS.items():
        command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"]
        command += ["--no-header", "--no-annotate", "--constraint", str(CONSTRAINTS / "torch.txt")]
        if name != "run":
            command += ["--constraint", str(CONSTRAINTS / "run.txt")]
        for extra in extras:
            command += ["--extra", extra]
        command += ["pyproject.toml", "-"]
        # setuptools builds this package itself, without a build environment of its own
        done = subprocess.run(command, cwd=ROOT, input="setuptools>=77\n", capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        blocks = re.split(r"\n(?=[a-zA-Z])", done.stdout.strip())
        kept = [block for block in blocks if not LEFT_OUT.match(re.split(r"[=\[ ]", block, maxsplit=1)[0])]
        (CONSTRAINTS / f"{name}.txt").write_text(HEADER.format(name=name) + "\n".join(kept) + "\n", encoding="utf-8")
        print(f"constraints/{name}.txt: {len(kept)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
