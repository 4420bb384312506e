from __future__ import annotations

import signal
import subprocess
import sys
import tempfile

from forgetrain.judge.scratch import Scratch, keep_newest
from tests.engine.test_tree import nested

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


def test_what_a_stranger_nested_without_end_is_removed_like_anything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned, kept = tmp_path / "forgetrain-test-abandoned", tmp_path / "kept"
    nested(abandoned, 1200, "a")
    (abandoned / ".lock").touch()
    kept.mkdir()
    (nested(kept / "old", 18, "x" * 250) / "closed").mkdir(mode=0o000)
    (kept / "old").chmod(0o000)
    (kept / "link").symlink_to(tmp_path / "forgetrain-test-abandoned")
    keep_newest(kept, 0)
    assert [path.name for path in kept.iterdir()] == ["link"]  # what is no folder was not made here
    Scratch("test").close()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
