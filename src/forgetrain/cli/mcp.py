"""``forgetrain mcp``: the room over the Model Context Protocol, for an agent that is already running."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from forgetrain.cli.common import DEFAULT_RUNS, Overrides, RunsFolder, TargetFile, console, read_target, say
from forgetrain.cli.run import Shown
from forgetrain.errors import UserError

INSTRUCTIONS = """Make a pre-training engine faster. Read brief and champion, write a whole engine file, submit it. It
is judged in a sandbox, on batches that do not exist yet, and clocked from outside; a judging takes minutes."""


def command(
    target_file: TargetFile,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Elect candidates that no sandbox held.")
    ] = False,
    overrides: Overrides = None,
    runs: RunsFolder = DEFAULT_RUNS,
) -> None:
    """Serve the room's tools over stdio: brief, champion, submit, verdicts, profile, leaderboard."""
    try:
        from mcp.server.mcpserver import MCPServer
    except ImportError:
        raise UserError("the mcp SDK is not installed", remedy="run pip install 'forgetrain[agents]'") from None
    from forgetrain.forge.begin import open_loop
    from forgetrain.forge.room import Room
    from forgetrain.pipeline import prepare

    target = read_target(target_file, overrides)
    if not prepare(target, runs, Shown(console, stages=3)).passed:
        raise UserError("does not align", file=target_file, remedy="see forgetrain align")
    # the ledger's connection and the engines' processes belong to the thread that opened them
    with ThreadPoolExecutor(max_workers=1) as worker, ExitStack() as opened:
        room = worker.submit(
            lambda: Room(opened.enter_context(open_loop(target, runs, say=say, allow_unsandboxed=allow_unsandboxed)))
        ).result()
        server = MCPServer("forgetrain", instructions=INSTRUCTIONS, log_level="WARNING")
        for tool in (room.brief, room.champion, room.submit, room.verdicts, room.profile, room.leaderboard):
            server.tool()(_on(worker, tool))
        try:
            server.run("stdio")
        finally:
            worker.submit(opened.close).result()


def _on(worker: ThreadPoolExecutor, tool: Callable[..., Any]) -> Callable[..., Any]:
    """The same tool, run by the worker while the server goes on listening."""

    @functools.wraps(tool)
    async def run(**arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(worker, functools.partial(tool, **arguments))

    return run
