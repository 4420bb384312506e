"""``forgetrain mcp``: a real client of the official SDK speaks with it over stdio."""

from __future__ import annotations

import asyncio
import sys

import pytest
from mcp import ClientSession, StdioServerParameters, stdio_client

from tests.cli.test_run import write_target


def text_of(result):
    return "".join(block.text for block in result.content)


async def talk(folder, target):
    quick = ["--set", "gates.g5_steps=20"]
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "forgetrain", "mcp", str(target), *quick], cwd=str(folder)
    )
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        tools = {tool.name for tool in (await session.list_tools()).tools}
        brief = text_of(await session.call_tool("brief", {}))
        champion = text_of(await session.call_tool("champion", {}))
        broken = champion.replace("EPS, ROPE_THETA = 1e-06", "EPS, ROPE_THETA = 1e-05")
        answer = text_of(await session.call_tool("submit", {"source": broken, "message": "a larger\nepsilon"}))
        board = text_of(await session.call_tool("leaderboard", {}))
    return tools, brief, champion, answer, board


@pytest.mark.slow
def test_an_agent_reads_the_brief_and_submits(tmp_path):
    target = write_target(tmp_path, "transformers")
    tools, brief, champion, answer, board = asyncio.run(talk(tmp_path, target))
    assert tools == {"brief", "champion", "submit", "verdicts", "leaderboard"}
    assert "# Make the engine of tiny faster" in brief
    assert "def build(" in champion
    assert "rejected by G4" in answer
    assert "oracle" not in answer  # a hidden gate says pass or fail alone
    assert "a larger epsilon" in board
