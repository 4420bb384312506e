"""A file-size limit stands for a full disk: one line, exit code 2, and the loop goes on when there is space again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from forgetrain.judge.ledger import Ledger
from tests.forge.test_optimise import Script, loop, prepared

CHILD = """
import resource, sys
from pathlib import Path
from forgetrain.cli import main as cli
from tests.forge.test_optimise import Script, Verdicts, loop, prepared
runs, largest, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sources = [f"speed = {1 + number / 10}\\n" + "#" * size for number in range(1, 30)]
run = loop(prepared(runs), runs, Script(sources), Verdicts())
resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
cli.app = lambda **_: run.run()
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("largest", "size", "named"),
    # the ledger's journal grows with every transaction and is the first to reach the limit; or a candidate is
    [(400_000, 10, "ledger.sqlite"), (400_000, 500_000, "files/")],
)
def test_a_full_disk_ends_the_loop_in_one_line_and_it_goes_on_later(tmp_path, largest, size, named):
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(largest), str(size)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("forgetrain: ")
    assert named in done.stderr
    assert not list(tmp_path.rglob(".new-*"))
    with Ledger(tmp_path / "ledger") as ledger:
        assert ledger.query("PRAGMA integrity_check") == [{"integrity_check": "ok"}]
        before = ledger.query("SELECT count(*) AS n FROM attempts")[0]["n"]
    outcome = loop(prepared(tmp_path), tmp_path, Script(["speed = 9\n"])).run()
    assert outcome.attempts == before + 2  # its candidate, and that it had nothing more
    assert outcome.folder is not None
    assert (outcome.folder / "engine.py").read_text() == "speed = 9\n"
