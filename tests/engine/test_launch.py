"""Engines that are forked from a process that waits with torch imported: what they share with it, and its death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forgetrain.engine import launch
from forgetrain.engine.process import EngineFailure, EngineProcess
from tests.engine.test_process import BATCH, TARGET, WEIGHTS, gone
from tests.engine.toy import toy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every process is started")

MODULE = """
import os, sys
READY = False

def preload():
    global READY
    READY = os.getpid()

def build(target, *, device, precision, mesh):
    assert READY == os.getppid(), "preload() ran elsewhere"
    assert os.getcwd() == {folder!r}
    print("last words", file=sys.stderr)
    os._exit(7)
"""


def servers(module=""):
    mine = os.getpid(), module, 0
    return [server for key, server in launch._fork_servers.items() if key[:3] == mine and server.alive]


def ran(script):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)


def test_a_module_is_imported_before_its_engines_are_forked(tmp_path, monkeypatch):
    (tmp_path / "ready_made.py").write_text(MODULE.format(folder=str(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with pytest.raises(EngineFailure, match="ended with exit code 7; its last line on stderr: last words"):
            EngineProcess("ready_made", TARGET)
    assert len(servers("ready_made")) == 1


def test_engines_share_nothing_but_what_was_imported(tmp_path):
    path = toy(tmp_path, build="import builtins; assert not hasattr(builtins, 'left'); builtins.left = True")
    with EngineProcess(path, TARGET) as one, EngineProcess(path, TARGET) as other:
        assert one._process.pid != other._process.pid
        one.load(WEIGHTS)
        other.load(WEIGHTS)
        one.step(BATCH, 0.1)
        assert one.weight_hash() != other.weight_hash()


def test_engines_of_different_origins_do_not_even_have_a_hash_seed_in_common(tmp_path):
    seeds = tmp_path / "seeds"
    path = toy(tmp_path, build=f"print(hash('a'), file=open({str(seeds)!r}, 'a'))")
    for origin in (0, 0, 1):
        with EngineProcess(path, TARGET, origin=origin):
            pass
    first, again, other = seeds.read_text().split()
    assert first == again != other


def test_a_fork_servers_death_is_its_engines_and_the_next_engine_gets_another(tmp_path):
    path = toy(tmp_path)
    with EngineProcess(path, TARGET) as engine:
        engine.load(WEIGHTS)
        (server,) = servers()
        os.kill(server._process.pid, signal.SIGKILL)
        assert gone(engine._process.pid)
        with pytest.raises(EngineFailure, match="killed by SIGKILL"):
            engine.step(BATCH, 0.1)
    with EngineProcess(path, TARGET) as engine:
        engine.load(WEIGHTS)
        engine.step(BATCH, 0.1)
    assert servers() != [server]


def test_an_interrupted_request_is_not_answered_to_the_next_one(tmp_path, monkeypatch):
    path = toy(tmp_path)
    with EngineProcess(path, TARGET):
        (server,) = servers()

    class Interrupted:
        """The server's socket, up to where an answer is waited for."""

        def __getattr__(self, name):
            return getattr(real, name)

        def recv(self, _):
            raise KeyboardInterrupt

    real = server._socket
    monkeypatch.setattr(server, "_socket", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        EngineProcess(path, TARGET)
    assert not server.alive
    with EngineProcess(path, TARGET) as engine:
        engine.load(WEIGHTS)


def test_the_environment_is_that_of_now_and_servers_of_others_end(tmp_path, monkeypatch):
    for value in ("1", "2"):
        monkeypatch.setenv("LANG", value)
        with EngineProcess(toy(tmp_path, build=f"assert os.environ['LANG'] == {value!r}"), TARGET):
            assert len(servers()) == 1


def test_a_server_ends_with_its_parent():
    script = (
        "import os, signal\n"
        "from forgetrain.engine.launch import _fork_server, strangers_environment\n"
        "print(_fork_server('', 0, strangers_environment('cpu'))._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = ran(script)
    assert gone(int(done.stdout), seconds=20)  # it imports torch first


def test_an_interruption_while_a_server_starts_leaves_none():
    script = (
        "import os, signal, subprocess\n"
        "from forgetrain.engine.launch import _fork_server, strangers_environment\n"
        "class Interrupted(subprocess.Popen):\n"
        "    def __init__(self, *args, **keys):\n"
        "        super().__init__(*args, **keys)\n"
        "        print(self.pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "subprocess.Popen = Interrupted\n"
        "_fork_server('', 0, strangers_environment('cpu'))\n"
    )
    done = ran(script)
    assert done.returncode == -signal.SIGINT
    assert gone(int(done.stdout), seconds=0.5)  # much less than it takes to import torch


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["megatron", "transformers"])
def test_a_reference_imports_nothing_large_after_its_fork(reference):
    """What ``preload`` leaves out is paid for by every process."""
    script = (
        "import importlib, sys\n"
        f"module = importlib.import_module('forgetrain.reference.{reference}')\n"
        "module.preload()\n"
        "before = set(sys.modules)\n"
        "from tests.tiny import tiny_target\n"
        f"target = tiny_target(reference={{'name': {reference!r}}})\n"
        "module.build(target.plain(), device='cpu', precision='fp32')\n"
        "print(len(set(sys.modules) - before))\n"
    )
    done = ran(script)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 60
