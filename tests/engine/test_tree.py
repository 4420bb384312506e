"""What a stranger's folder holds, however it is made."""

from __future__ import annotations

import os
from pathlib import Path

from forgetrain.engine import tree
from forgetrain.judge.scratch import remove


def nested(top: Path, depth: int, name: str, size: int = 0) -> Path:
    """Folders in folders, with a file in the last: made from within, where no path is too long."""
    top.mkdir()
    number = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=number)
        inner = os.open(name, os.O_RDONLY, dir_fd=number)
        os.close(number)
        number = inner
    file = os.open("file", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=number)
    os.posix_fallocate(file, 0, max(size, 1))
    os.close(file)
    os.close(number)
    return top


def test_what_lies_beyond_the_longest_path_is_counted(tmp_path):
    folder = nested(tmp_path / "long", 18, "x" * 250, 8 << 20)
    assert tree.written(folder) >= 8 << 20
    assert tree.excess(os.getpid(), {"written": 16 << 20}, folder) is None
    assert tree.excess(os.getpid(), {"written": 4 << 20}, folder) is not None
    remove(folder)  # pytest cannot


def test_links_are_not_followed_and_what_goes_meanwhile_is_no_trouble(tmp_path, monkeypatch):
    inside, outside = tmp_path / "inside", nested(tmp_path / "outside", 1, "a", 8 << 20)
    (inside / "short-lived").mkdir(parents=True)
    (inside / "link").symlink_to(outside)
    opened = os.open

    def slow(path, *arguments, **options):
        if path == "short-lived":
            (inside / path).rmdir()
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", slow)
    assert tree.written(inside) < 1 << 20
    assert os.listdir(inside) == ["link"]


def test_folders_nested_without_end_exceed_what_is_allowed(tmp_path):
    folder = nested(tmp_path / "deep", 1200, "a")
    assert "nested" in (tree.excess(os.getpid(), {"written": 1 << 30}, folder) or "")
    remove(folder)
    assert not folder.exists()
