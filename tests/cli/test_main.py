"""The command itself, whatever it is asked for."""

import subprocess
import sys

from rich.text import Text

from forgetrain.cli.main import app
from forgetrain.errors import UserError


def test_its_help_and_its_errors_do_not_wait_for_torch():
    code = "import sys, forgetrain.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_help_of_every_command_is_whole():
    for line in (command.callback.__doc__ for command in app.registered_commands):
        assert Text.from_markup(line).plain == line


def test_a_command_in_a_remedy_can_be_copied():
    assert str(UserError("x", remedy="forgetrain align TARGET writes one")) == "x. forgetrain align TARGET writes one"
    assert str(UserError("x", remedy="run forgetrain align TARGET")) == "x. Run forgetrain align TARGET"
