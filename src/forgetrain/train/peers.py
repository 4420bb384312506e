"""A rank that dies takes the others down within seconds, with its name and what is known of the cause.

A collective whose peer has died may wait for its time-out, ten minutes by default. So a thread of every rank watches
the others: those on the same host through pidfds, which tell the end of a process at once, and all of them through a
sign of life that each leaves in the ranks' common store every second. What one host sees, the others read there.

    with Peers(store, rank, size) as peers:    # ends this process, exit code 75, when another rank is gone
        ...
        peers.leave("")                        # this rank is done; a text says that it ends by an error
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from torch.distributed.distributed_c10d import PrefixStore, Store

#: The exit code of a rank that another took down: EX_TEMPFAIL of sysexits.h, "try again".
PEER_LOST = 75
SECONDS_BETWEEN_LOOKS = 1.0
#: Without a sign of life for so long a rank counts as gone. Long, for a process that swaps is alive.
SILENCE_SECONDS = 60.0
#: A rank that ends by an error says so; so long may this one take to end by the same error itself.
SAME_ERROR_SECONDS = 5.0


def _place() -> str:
    """Names what shares process ids: the host, and on Linux its boot and the namespace of pids."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = f"{boot.read_text().strip()} {namespace.readlink()}" if boot.is_file() else ""
    return f"{socket.gethostname()} {known}"


def _end_process(line: str) -> None:
    """Ends this process at once: its main thread may wait in a collective that nothing can interrupt."""
    print(f"forgetrain: {line}", file=sys.stderr, flush=True)
    os._exit(PEER_LOST)


class Peers:
    """Watches the other ranks from a thread. ``end`` is called with the line that says who is gone."""

    def __init__(self, store: Store, rank: int, size: int, end: Callable[[str], None] = _end_process):
        """Every rank calls it; returns when all have."""
        self.rank, self._end = rank, end
        self._others = [other for other in range(size) if other != rank]
        self._store = PrefixStore("peers", store)
        own = _place()
        self._store.set(f"place/{rank}", json.dumps({"place": own, "pid": os.getpid()}))
        names = [f"place/{other}" for other in self._others]
        self._peers = dict(zip(self._others, map(json.loads, self._store.multi_get(names)), strict=True))
        #: Ranks on this host, this one among them: not every launcher says how many it starts there.
        self.here = 1 + sum(peer["place"] == own for peer in self._peers.values())
        self._stopping = threading.Event()
        self._woken, self._wake = os.pipe()  # for the thread, which sleeps in poll
        self._thread = threading.Thread(target=self._watch, name="forgetrain-peers", daemon=True)

    def __enter__(self) -> Peers:
        self._own: Store = cast(Any, self._store).clone()  # a connection of the thread's own; torch's stubs lack it
        self._own.set_timeout(timedelta(seconds=10))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError):  # perhaps a collective whose peer is gone: then the thread knows by now
            self._thread.join(2 * SECONDS_BETWEEN_LOOKS)
        self.leave("" if error is None else f"{type(error).__name__}: {error}".partition("\n")[0])

    def leave(self, error: str) -> None:
        """Says that this rank leaves, and by which error if any; the watch ends.

        The thread has ended when this returns: in a call of the store while Python ends, it would abort the process."""
        self._stopping.set()
        with suppress(RuntimeError):  # the store is on the first rank's host, which may be the one that is gone
            self._store.set(f"left/{self.rank}", error)
        os.close(self._wake)
        self._thread.join(2 * SECONDS_BETWEEN_LOOKS)

    def _watch(self) -> None:
        descriptors = self._descriptors()
        poll = select.poll()
        for descriptor in (*descriptors, self._woken):
            poll.register(descriptor, select.POLLIN)
        seen = {other: (b"", time.monotonic()) for other in self._others}
        number = 0
        while not self._stopping.is_set():
            ended = poll.poll(1000 * SECONDS_BETWEEN_LOOKS)
            if self._stopping.is_set():
                break
            for descriptor, _ in ended:
                poll.unregister(descriptor)
                self._gone(descriptors[descriptor], "its process ended without a word: killed, or out of memory")
            number += 1
            try:
                self._look(number, seen)
            except RuntimeError as error:
                self._store_lost(error)
                break
        for descriptor in (*descriptors, self._woken):
            os.close(descriptor)

    def _descriptors(self) -> dict[int, int]:
        """pidfd → rank, of the other ranks on this host."""
        found: dict[int, int] = {}
        if not hasattr(os, "pidfd_open"):
            return found
        for other, peer in self._peers.items():
            if peer["place"] == _place():
                try:
                    found[os.pidfd_open(peer["pid"])] = other
                except ProcessLookupError:
                    self._gone(other, "its process ended before the first step")
        return found

    def _look(self, number: int, seen: dict[int, tuple[bytes, float]]) -> None:
        """Leaves this rank's sign of life and reads what the others left."""
        self._own.set(f"alive/{self.rank}", str(number))
        if self._own.check(["gone"]):
            self._finish(self._own.get("gone").decode())
        now = time.monotonic()
        for other, (last, when) in seen.items():
            name = f"alive/{other}"
            sign = self._own.get(name) if self._own.check([name]) else b""
            if sign != last:
                seen[other] = (sign, now)
            elif now - when > SILENCE_SECONDS:
                self._gone(other, f"no sign of life for {SILENCE_SECONDS:.0f} s")

    def _gone(self, other: int, cause: str) -> None:
        """Ends this process unless that rank left in good order; tells hosts that cannot see it."""
        name = f"left/{other}"
        try:
            if self._own.check([name]):
                error = self._own.get(name).decode()
                if not error:
                    return
                cause = error
                self._stopping.wait(SAME_ERROR_SECONDS)
            peer = self._peers[other]
            host = peer["place"].split()[0]
            line = f"rank {other} (pid {peer['pid']} on {host}) is gone: {cause}. Go on with --resume"
            self._own.set("gone", line)
        except RuntimeError:  # that rank held the store
            line = f"rank {other} is gone, and the ranks' store with it: {cause}. Go on with --resume"
        self._finish(line)

    def _store_lost(self, error: RuntimeError) -> None:
        self._stopping.wait(SECONDS_BETWEEN_LOOKS)  # the end of the run takes the store away too
        self._finish(f"the ranks' store is gone ({str(error).splitlines()[0]}): the host of rank 0 may be down")

    def _finish(self, line: str) -> None:
        if not self._stopping.is_set():
            self._end(line)
