"""The ``forgetrain`` command: registers the commands and turns bad input, and a reference that dies, into one line
and exit code 2."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading

import typer

from forgetrain.cli import (
    align,
    collect,
    data,
    engine,
    estimate,
    export,
    forge,
    generate,
    judge,
    ledger,
    mcp,
    redteam,
    report,
    run,
    target,
    train,
    verify,
)
from forgetrain.errors import UserError

app = typer.Typer(
    name="forgetrain",
    help="Forge a pre-training engine for one model and one machine, under gates, and train the model with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run.command)
app.add_typer(target.app, name="target")
app.command("estimate")(estimate.command)
app.command("collect")(collect.command)
app.command("align")(align.command)
app.command("forge")(forge.command)
app.command("submit")(forge.submit)
app.command("mcp")(mcp.command)
app.add_typer(engine.app, name="engine")
app.add_typer(data.app, name="data")
app.command("judge")(judge.command)
app.command("verify")(verify.command)
app.command("redteam")(redteam.command)
app.add_typer(ledger.app, name="ledger")
app.command("report")(report.command)
app.command("train")(train.command)
app.command("export")(export.command)
app.command("generate")(generate.command)


#: What the system says of a path that a user gave, and what to do about it.
REFUSED = {
    errno.EACCES: "Change its permissions, or name another place",
    errno.EPERM: "Change its permissions, or name another place",
    errno.EROFS: "Name a place that can be written, for example with --runs",
    errno.EEXIST: "Move what is there away, or name another place",
    errno.ENOTDIR: "Name another place: a part of this path is a file",
    errno.EISDIR: "Name a file",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "Mend the link that points to itself",
    errno.EIO: "Look at the device's log, then run the command again",
}


class Interrupted(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which typer ends without a word."""


def _interrupt(*_: object) -> None:
    raise Interrupted


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 a gate failed, 2 bad input or a reference that died, 130
    interrupted."""
    if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app(standalone_mode=True)
    except UserError as error:
        if error.told:
            sys.exit(2)
        fail(str(error))
    except OSError as error:
        if error.errno in REFUSED and error.filename:
            fail(f"{error.filename}: {os.strerror(error.errno).lower()}. {REFUSED[error.errno]}")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"{error.filename or 'the disk'}: no space left on the device. Free some space and run the command again")
    except Exception as error:
        if not _process_died(error):
            raise
        fail(str(UserError(str(error), remedy="see whether forgetrain collect runs")))
    except Interrupted:
        print("forgetrain: interrupted", file=sys.stderr)
        sys.exit(130)


def _process_died(error: Exception) -> bool:
    """Whether it is of a reference's process, which says nothing about any gate."""
    # these load torch, which commands that do without must not wait for
    from forgetrain.engine.process import EngineFailure
    from forgetrain.forge.examine import ReferenceFailure

    return isinstance(error, EngineFailure | ReferenceFailure)


def fail(line: str) -> None:
    print(f"forgetrain: {line}", file=sys.stderr)
    sys.exit(2)
