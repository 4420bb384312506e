"""The command itself, whatever it is asked for."""

import subprocess
import sys


def test_its_help_and_its_errors_do_not_wait_for_torch():
    code = "import sys, forgetrain.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
