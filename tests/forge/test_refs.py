from __future__ import annotations

import subprocess

import pytest

from forgetrain.forge.refs import keep_commit
from forgetrain.judge.files import content_hash


def git(folder, *arguments):
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q", "-b", "main")
    return tmp_path


def kept(folder, source, message, parent=None):
    digest = content_hash(source.encode())
    return digest, keep_commit(folder, "tiny", digest, source, message, parent)


def test_attempts_are_commits_with_their_parents_and_no_branch_moves(repository):
    first, done = kept(repository, "x = 1\n", "the first")
    assert done
    second, _ = kept(repository, "x = 2\n", "the second", first)
    log = git(repository, "log", "--format=%s", f"refs/forgetrain/tiny/{second[:16]}").splitlines()
    assert log == ["the second", "the first"]
    assert git(repository, "show", f"refs/forgetrain/tiny/{first[:16]}:engine.py") == "x = 1\n"
    assert git(repository, "for-each-ref", "refs/heads") == ""
    assert git(repository, "status", "--short") == ""


def test_the_same_candidate_is_one_commit(repository):
    digest, _ = kept(repository, "x = 1\n", "the first")
    before = git(repository, "for-each-ref")
    assert kept(repository, "x = 1\n", "again") == (digest, True)
    assert git(repository, "for-each-ref") == before


def test_outside_a_repository_nothing_happens(tmp_path):
    assert kept(tmp_path, "x = 1\n", "the first")[1] is False
    assert list(tmp_path.iterdir()) == []
