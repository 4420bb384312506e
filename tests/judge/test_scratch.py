from __future__ import annotations

import signal
import subprocess
import sys
import tempfile

from forgetrain.judge.scratch import Scratch

KILLED = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from forgetrain.judge.scratch import Scratch
scratch = Scratch("test")
(scratch.path / "file").write_text("x")
print(scratch.path, flush=True)
sys.stdin.read()
"""


def test_what_a_kill_left_is_removed_and_what_is_in_use_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "forgetrain-test-of-somebody-else").mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        left = tmp_path / child.stdout.readline().strip()
        during = Scratch("test")
        assert (left / "file").is_file()
        child.send_signal(signal.SIGKILL)
    after = Scratch("test")
    assert not left.exists()
    assert during.path.is_dir()
    for scratch in (during, after):
        scratch.close()
    assert [path.name for path in tmp_path.iterdir()] == ["forgetrain-test-of-somebody-else"]
