"""A process and all its descendants, read from ``/proc``: counting, measuring, pausing and killing them.

Descendants are found by their parents' ids, so sessions, process groups and PID namespaces hide none of them; one
that detached itself from its parent is out of reach without a sandbox, whose namespace dies as a whole.
Where there is no ``/proc`` only the process group is signalled, and measurements are zero.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
DEEPEST = 100  # folders within each other, each of which is open while it is read


class Usage(NamedTuple):
    """Of a process tree: processes and threads, CPU seconds used by those alive, and resident bytes."""

    processes: int
    threads: int
    cpu_seconds: float
    resident_bytes: int


def descendants(pid: int) -> list[int]:
    """``pid`` and everything below it, parents first."""
    children: dict[int, list[int]] = {}
    for number in _numbers():
        stat = _stat(number)
        if stat is not None:
            children.setdefault(int(stat[1]), []).append(number)
    found = [pid]
    for number in found:  # grows while it is walked
        found += children.get(number, [])
    return found


def usage(pid: int) -> Usage:
    """What the tree below ``pid`` uses now; processes that end meanwhile are left out."""
    stats = [stat for stat in (_stat(number) for number in descendants(pid)) if stat is not None]
    return Usage(
        processes=len(stats),
        threads=sum(int(stat[17]) for stat in stats),
        cpu_seconds=sum(int(stat[11]) + int(stat[12]) for stat in stats) / _TICKS,
        resident_bytes=sum(int(stat[21]) for stat in stats) * _PAGE,
    )


def peak_memory(pid: int) -> int:
    """The sum over the living tree of each process's highest resident size, in bytes."""
    total = 0
    for number in descendants(pid):
        try:
            lines = (_PROC / str(number) / "status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return total


def written(folder: Path) -> int:
    """Bytes that a stranger's folder holds on disk; files come and go while it is read, and links are not followed.

    Folders are opened one within the other: a path ends at 4096 bytes, and what lies deeper would not be counted.
    Raises OSError for what may not be read, or is nested deeper than honest programs nest."""
    total, places = 0, [_entries(folder)]
    try:
        while places:
            number, entries = places[-1]
            if not entries:
                os.close(places.pop()[0])
                continue
            entry = entries.pop()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    if len(places) == DEEPEST:
                        raise OSError(errno.ELOOP, f"folders are nested more than {DEEPEST} deep")
                    places.append(_entries(entry.name, number))
    finally:
        for number, _ in places:
            os.close(number)
    return total


def _entries(folder: Path | str, within: int | None = None) -> tuple[int, list[os.DirEntry[str]]]:
    """A folder's open number, which its entries need, and they."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=within)
    try:
        with os.scandir(number) as entries:
            return number, list(entries)
    except BaseException:
        os.close(number)
        raise


def excess(pid: int, limits: Mapping[str, int], folder: Path | None = None) -> str | None:
    """In words, what the tree below ``pid`` has more of than ``limits`` allow: processes, bytes resident, and bytes
    written to ``folder``, which must let itself be measured; other limits are not looked at, nor is what none names.
    None when it keeps to them."""
    used = usage(pid)
    now = {"processes": used.processes, "resident": used.resident_bytes}
    if folder is not None:
        try:
            now["written"] = written(folder)
        except OSError as error:
            return f"has written what cannot be measured: {error.strerror}"
    over = next((name for name, limit in limits.items() if now.get(name, 0) > limit), None)
    if over is None:
        return None
    have, may = now[over], limits[over]
    if over == "processes":
        return f"has {have} processes, {may} are allowed"
    what = {"resident": "of memory", "written": "on disk"}[over]
    return f"uses {have / 2**30:.1f} GiB {what}, {may / 2**30:.1f} are allowed"


def send_signal(pid: int, number: signal.Signals) -> None:
    """Signals the whole tree, again until no descendant is new: one may fork while the others are being signalled."""
    done: set[int] = set()
    while True:
        new = [p for p in descendants(pid) if p not in done]
        if not new:
            return
        for process in new:
            _kill(process, number)
        done.update(new)


def kill(pid: int) -> None:
    """Kills a process group and everything below its leader. The caller still has to wait for the leader."""
    tree = descendants(pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    for process in tree:
        _kill(process, signal.SIGKILL)


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _numbers() -> list[int]:
    try:
        return [int(name) for name in os.listdir(_PROC) if name.isdigit()]
    except FileNotFoundError:
        return []


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the third on (state, parent, ...); the name before them may hold anything."""
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
