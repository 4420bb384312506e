"""``forgetrain mcp``: a real client of the official SDK speaks with it over stdio."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest
from mcp import ClientSession, StdioServerParameters, stdio_client


def text_of(result):
    return "".join(block.text for block in result.content)


async def talk(folder, target):
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "forgetrain", "mcp", str(target)], cwd=str(folder)
    )
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        tools = {tool.name for tool in (await session.list_tools()).tools}
        brief = text_of(await session.call_tool("brief", {}))
        champion = text_of(await session.call_tool("champion", {}))
        broken = champion.replace("EPS, ROPE_THETA = 1e-06", "EPS, ROPE_THETA = 1e-05")
        answer = text_of(await session.call_tool("submit", {"source": broken, "message": "a larger\nepsilon"}))
        board = text_of(await session.call_tool("leaderboard", {}))
        profile = json.loads(text_of(await session.call_tool("profile", {})))
    return tools, brief, champion, answer, board, profile


@pytest.mark.slow
def test_an_agent_reads_the_brief_and_submits(aligned_run, tmp_path):
    target = aligned_run.copied_to(tmp_path)
    tools, brief, champion, answer, board, profile = asyncio.run(talk(tmp_path, target))
    assert tools == {"brief", "champion", "submit", "verdicts", "profile", "leaderboard"}
    assert "# Make the engine of tiny faster" in brief
    assert "def build(" in champion
    assert "rejected by G4" in answer
    assert "oracle" not in answer  # a hidden gate says pass or fail alone
    assert "a larger epsilon" in board
    assert "Where the champion's time goes" in brief
    assert {"linear", "attention", "rmsnorm"} <= {op["op"] for op in profile["ops"]}
    assert 0.5 < sum(op["share"] for op in profile["ops"]) <= 1.0
