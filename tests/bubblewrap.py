"""Tests of the sandbox are skipped, with the reason, where it cannot be had."""

from __future__ import annotations

import shutil
import subprocess

import pytest

RUNS = shutil.which("bwrap") is not None and not subprocess.run(["bwrap", "--ro-bind", "/", "/", "true"]).returncode
needs_bubblewrap = pytest.mark.skipif(not RUNS, reason="bubblewrap does not run here")
