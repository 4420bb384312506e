"""Makes .venv, with pinned dependencies; first it says in one line each what the machine must have. Needs only Python.

    python3 scripts/setup.py run          # what the main job needs
    python3 scripts/setup.py dev          # and what tests and checks need
    python3 scripts/setup.py --check      # only look at the machine

--torch cpu takes PyTorch's CPU build from PyTorch's own index; without it torch comes from wherever pip is set up to
look, which for most Linux machines means the CUDA build.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def works(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except OSError:
        return False


def preflight() -> bool:
    """Prints a line for each thing that must be on the machine; false when it cannot go on without one."""
    version = ".".join(map(str, sys.version_info[:3]))
    venv = importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")
    sandbox = works("bwrap", "--ro-bind", "/", "/", "--unshare-all", "true")
    rows = [
        ("python", sys.version_info >= (3, 11), version, f"is {version}; 3.11 or newer is needed: apt install python3"),
        ("python3-venv", bool(venv), "found", "is missing and needed: apt install python3-venv"),
        ("GCC", shutil.which("g++") is not None, "found", "is missing; fast engines stay out: apt install g++"),
        ("bubblewrap", sandbox, "works", _bubblewrap()),
    ]
    for name, good, found, wrong in rows:
        print(f"  {name:<13} {found if good else wrong}", flush=True)
    return rows[0][1] and rows[1][1]


def _bubblewrap() -> str:
    if shutil.which("bwrap") is None:
        return "is missing; engines written by others run unsandboxed: apt install bubblewrap"
    return "cannot make namespaces here; engines written by others run unsandboxed"


def pip(what: str, *arguments: str) -> None:
    began = time.monotonic()
    print(f"  {what} ...", end="", flush=True)
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(f" {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise SystemExit(f"setup: pip could not install {what}; see above. Run the same command again to go on")


def install(kind: str, torch: str) -> None:
    if not works(str(PYTHON), "-m", "pip", "--version"):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    # torch last: its requirements are there by then, from the hashed list; only a CUDA build brings more
    lock = f"constraints/{kind}.txt"
    pip(f"packages of {lock}, hashes checked", "--require-hashes", "--no-deps", "-r", lock)
    index = ["--index-url", CPU_INDEX] if torch == "cpu" else []
    pip("torch", "-r", "constraints/torch.txt", *index)
    pip("forgetrain", "--no-deps", "--no-build-isolation", "--editable", ".")
    done = subprocess.run([str(PYTHON), "-m", "pip", "check"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"setup: the packages do not fit together: {done.stdout.strip()}")
    (VENV / f"{kind}.stamp").touch()
    if kind == "dev":
        (VENV / "run.stamp").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make .venv with pinned dependencies.")
    parser.add_argument("kind", nargs="?", choices=("run", "dev"), default="run")
    parser.add_argument("--torch", choices=("default", "cpu"), default="default", help="which build of torch")
    parser.add_argument("--check", action="store_true", help="only look at the machine")
    options = parser.parse_args()
    print("This machine:", flush=True)
    if not preflight():
        raise SystemExit(2)
    if not options.check:
        print(f"Making {VENV.name}:", flush=True)
        install(options.kind, options.torch)


if __name__ == "__main__":
    main()
