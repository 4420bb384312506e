"""Processes that lose one of theirs, with Gloo on this machine."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore

from forgetrain.train.metrics import read_journal
from forgetrain.train.peers import PEER_LOST, Peers
from tests.engine.toy import toy
from tests.train.test_command import finish, forgetrain, wait_for, write_target

#: Rank 0 hangs as in a collective that nobody answers, so that only the watch can end it.
HANGS = "if self.steps == 3 and self.rank == 0: time.sleep(120)"
#: Rank 1 hangs as well, when rank 0 is the one to die.
BOTH_HANG = "if self.steps == 3: time.sleep(120)"
#: Torch's own limit would be 600 s, torchrun's 30 s.
SECONDS = 10


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def two_ranks(*arguments, folder=None):
    """Two ranks of Python as srun starts them, without torchrun's agent; rank 0 holds the store."""
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]


def start_by_hand(folder, *arguments):
    return two_ranks("-m", "forgetrain", *arguments, folder=folder)


def at_step_two(folder):
    wait_for(lambda: len(read_journal(folder / "runs/tiny/train/metrics.jsonl")) >= 2)
    time.sleep(0.5)  # into the step in which the engine hangs


def children_of(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(word) for word in found.stdout.split()]


@pytest.fixture
def ready(tmp_path):
    target = write_target(tmp_path)
    finish(forgetrain(tmp_path, "data", "build", target))
    return target


#: Torch's time-out of 30 minutes as 2 seconds; rank 0 then works for 5.
SLOW_FIRST = """
import time
from datetime import timedelta
import torch.distributed as dist
from forgetrain.spec.target import Hardware
from forgetrain.train.world import start_world

real = dist.new_group
dist.new_group = lambda *ranks, **options: real(*ranks, **{"timeout": timedelta(seconds=2), **options})
with start_world(Hardware(threads=1)) as world:
    for each in (world, world.beside()):
        assert each.first(lambda: time.sleep(5) or "done") == "done"
"""


def both_run(code):
    for process in two_ranks("-c", code):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err


@pytest.mark.slow
def test_the_others_wait_for_what_rank_0_does_alone():
    both_run(SLOW_FIRST)


@pytest.mark.slow
def test_ranks_of_a_host_share_its_threads_whoever_starts_them():
    """srun says how many ranks there are, and not how many of them are here."""
    both_run("""
import torch
from forgetrain.spec.target import Hardware
from forgetrain.train.world import start_world

with start_world(Hardware(threads=4)) as world:
    assert (world.here, torch.get_num_threads()) == (2, 2)
""")


def test_who_leaves_leaves_no_thread_behind_that_python_would_meet_in_the_store_at_its_end():
    store, gone = TCPStore("127.0.0.1", 0, 1, True), []
    PrefixStore("peers", store).set("place/1", json.dumps({"place": "elsewhere", "pid": 1}))
    with Peers(store, 0, 2, end=gone.append):
        assert "forgetrain-peers" in [thread.name for thread in threading.enumerate()]
        began = time.monotonic()
    assert "forgetrain-peers" not in [thread.name for thread in threading.enumerate()]
    assert time.monotonic() - began < 0.9  # it does not wait for the thread's next look
    assert not gone


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_rank_takes_the_other_down_and_is_named(tmp_path, ready, dies):
    engine = toy(tmp_path, step=BOTH_HANG)
    ranks = start_by_hand(tmp_path, "train", ready, "--engine", engine, "--unverified")
    at_step_two(tmp_path)
    began = time.monotonic()
    ranks[dies].send_signal(signal.SIGKILL)
    _, err = ranks[1 - dies].communicate(timeout=60)
    took = time.monotonic() - began
    print(f"both are gone after {took:.2f} s")
    assert took < SECONDS
    assert ranks[1 - dies].returncode == PEER_LOST
    assert f"forgetrain: rank {dies}" in err
    assert "its process ended without a word" in err
    assert "Traceback" not in err
    ranks[dies].communicate()


@pytest.mark.slow
def test_under_torchrun_too(tmp_path, ready):
    engine = toy(tmp_path, step=HANGS)
    options = ("--engine", engine, "--unverified")
    agent = forgetrain(tmp_path, "train", ready, *options, ranks=2)
    at_step_two(tmp_path)
    _, rank1 = sorted(children_of(agent.pid))
    began = time.monotonic()
    os.kill(rank1, signal.SIGKILL)
    _, err = agent.communicate(timeout=60)
    took = time.monotonic() - began
    print(f"both are gone after {took:.2f} s")
    assert took < SECONDS
    assert agent.returncode == 1
    assert f"forgetrain: rank 1 (pid {rank1} on {socket.gethostname()}) is gone: its process ended" in err


@pytest.mark.slow
def test_a_killed_torchrun_takes_its_ranks_down(tmp_path, ready):
    """They run in sessions of their own, so that nothing else would end them."""
    agent = forgetrain(tmp_path, "train", ready, "--engine", toy(tmp_path, step=BOTH_HANG), "--unverified", ranks=2)
    at_step_two(tmp_path)
    watched = [os.pidfd_open(pid) for pid in children_of(agent.pid)]
    assert len(watched) == 2
    began = time.monotonic()
    agent.kill()
    for descriptor in watched:
        assert select.select([descriptor], [], [], SECONDS)[0]
    print(f"all are gone after {time.monotonic() - began:.2f} s")
    assert "forgetrain: the ranks' store is gone" in agent.communicate()[1]


@pytest.mark.slow
def test_a_rank_that_ends_by_an_error_says_which(tmp_path, ready):
    fails = "\n".join(["if self.rank == 1 and self.steps == 3: raise ValueError('no such thing')", f"        {HANGS}"])
    ranks = start_by_hand(tmp_path, "train", ready, "--engine", toy(tmp_path, step=fails), "--unverified")
    _, err = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == PEER_LOST
    assert "is gone: ValueError: no such thing" in err
    ranks[1].communicate()
