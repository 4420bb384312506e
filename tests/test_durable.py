"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os

import pytest

from forgetrain.durable import write_text
from forgetrain.errors import UserError


def test_where_the_disk_is_full_the_old_text_stays_and_nothing_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_text(file, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"summary\.json"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
