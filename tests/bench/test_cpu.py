from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_unknown_peer_is_refused_in_one_line():
    engine = "engines/nano-cpu/engine.py"
    command = [sys.executable, "bench/cpu.py", "targets/nano-cpu.toml", "--engine", engine, "--peers", "nobody"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "nobody" in done.stderr.splitlines()[-1]
