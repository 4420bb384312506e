"""The command itself, whatever it is asked for."""

import inspect
import subprocess
import sys
from typing import get_type_hints

import pytest
from rich.text import Text
from typer.models import OptionInfo

from forgetrain.cli.main import app, main
from forgetrain.engine.process import EngineFailure
from forgetrain.errors import UserError
from forgetrain.forge.examine import ReferenceFailure

TARGET = "targets/nano-cpu.toml"
DIED = EngineFailure("crashed", "the engine's process was killed by SIGKILL")
BROKE = ReferenceFailure("the reference broke: the engine's process was killed by SIGKILL")


def test_its_help_and_its_errors_do_not_wait_for_torch():
    code = "import sys, forgetrain.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_help_of_every_command_is_whole():
    for line in (command.callback.__doc__ for command in app.registered_commands):
        assert Text.from_markup(line).plain == line


def callbacks(typer):
    """Every command's function, of commands below others too."""
    groups = [group.typer_instance for group in typer.registered_groups]
    return [command.callback for command in typer.registered_commands] + [c for g in groups for c in callbacks(g)]


def test_what_must_be_given_has_a_name_of_its_own():
    """typer 0.27 takes what a required option's value is called in its help for the option's name: --PLAN."""
    for command in callbacks(app):
        kinds = get_type_hints(command, include_extras=True)
        for name, given in inspect.signature(command).parameters.items():
            options = [item for item in getattr(kinds[name], "__metadata__", ()) if isinstance(item, OptionInfo)]
            if given.default is inspect.Parameter.empty:
                unnamed = [option for option in options if option.metavar and option.default is ...]  # else its name
                assert not unnamed, (command.__module__, name)


def test_a_command_in_a_remedy_can_be_copied():
    assert str(UserError("x", remedy="forgetrain align TARGET writes one")) == "x. forgetrain align TARGET writes one"
    assert str(UserError("x", remedy="run forgetrain align TARGET")) == "x. Run forgetrain align TARGET"


@pytest.mark.parametrize(
    ("command", "where", "failure"),
    [
        (["collect", TARGET], "forge.collect.collect", DIED),
        (["align", TARGET], "forge.collect.open_or_collect", DIED),
        (["align", TARGET], "forge.collect.open_or_collect", BROKE),
        (["run", TARGET], "pipeline.run_target", DIED),
        (["run", TARGET], "pipeline.run_target", BROKE),
        (["forge", TARGET], "pipeline.prepare", DIED),
        (["submit", TARGET, "--target", TARGET], "pipeline.prepare", DIED),
        (["mcp", TARGET], "pipeline.prepare", DIED),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_reference_that_dies_is_one_line_and_no_failed_gate(command, where, failure, tmp_path, monkeypatch, capsys):
    if command[0] == "mcp":
        pytest.importorskip("mcp.server.mcpserver")

    def dies(*_, **__):
        raise failure

    monkeypatch.setattr(f"forgetrain.{where}", dies)
    monkeypatch.setattr(sys, "argv", ["forgetrain", *command, "--runs", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"forgetrain: {failure}. See whether forgetrain collect runs\n")


def test_what_is_nobodys_fault_but_the_programs_keeps_its_traceback(monkeypatch):
    def breaks(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("forgetrain.forge.collect.collect", breaks)
    monkeypatch.setattr(sys, "argv", ["forgetrain", "collect", TARGET])
    with pytest.raises(ZeroDivisionError):
        main()
