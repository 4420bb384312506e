"""Builds that are killed, go on, and end with the bytes of one that was not; and that no number of workers changes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from forgetrain.data import tokenise, unfinished, worker
from forgetrain.data.build import build_data
from forgetrain.data.folder import open_data
from forgetrain.data.tokenise import training_texts
from forgetrain.errors import UserError
from forgetrain.spec.target import Source, parse_target
from tests.corpus import corpus_target, write_corpus

#: A build that saves after every batch of about 2 kB and is slow enough to be killed in between.
SLOWLY = """
import json, sys, time
from pathlib import Path
from forgetrain.data import tokenise, unfinished
from forgetrain.data.build import build_data
from forgetrain.spec.target import parse_target
tokenise.BATCH, tokenise.SMALL, unfinished.SAVE_EVERY = 2000, 1, 0.0
def report(what, done, total):
    if "tokenising" in what:
        print(what, done, total, flush=True)
        time.sleep(0.02)
build_data(parse_target(json.load(open(sys.argv[1]))), Path(sys.argv[2]), workers=int(sys.argv[3]), report=report)
"""


def content(folder):
    """Relative name → SHA-256 of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def two_sources(folder):
    """A target of a folder of text and a file of records with rejects, in a file that the slow build reads."""
    write_corpus(folder / "corpus", documents=60)
    lines = [json.dumps({"text": f"record {number} of some words" if number % 7 else None}) for number in range(900)]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    sources = [{"path": str(folder / "corpus")}, {"path": str(folder / "records.jsonl"), "weight": 2.0}]
    target = corpus_target(folder / "corpus", data={"sources": sources})
    (folder / "target.json").write_text(json.dumps(target.plain()))
    return parse_target(target.plain())


def start(folder, out, workers=1):
    command = [sys.executable, "-c", SLOWLY, str(folder / "target.json"), str(out), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_builds_go_on_and_give_the_same_bytes(tmp_path):
    target = two_sources(tmp_path)
    build_data(target, tmp_path / "whole")
    out, begun = tmp_path / "data", []
    for lines in (2, 3, 6, 3):  # killed after so many reports
        process = start(tmp_path, out, workers=1 + lines % 2)
        seen = [process.stdout.readline() for _ in range(lines)]
        assert seen[0].startswith("going on tokenising" if begun else "tokenising")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists()
        begun.append(json.loads((tmp_path / ".data.building" / "state.json").read_text())["state"])
        assert begun.count(begun[-1]) == 1, "nothing was gained since the last kill"
    process = start(tmp_path, out)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert printed.startswith("going on tokenising")
    assert content(out) == content(tmp_path / "whole")
    assert open_data(out, target).manifest["sources"][1]["rejects"] == {"null under 'text'": 129}
    assert not (tmp_path / ".data.building").exists()


def test_a_kill_while_a_source_is_ended_is_mended(tmp_path, monkeypatch):
    """After the save that ends a source, its indices are yet to be written."""
    target = two_sources(tmp_path)
    build_data(target, tmp_path / "whole")
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0.0)

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("forgetrain.data.indexed.TokenWriter._write_index", killed)
        with pytest.raises(KeyboardInterrupt):
            build_data(target, tmp_path / "data")
    assert build_data(target, tmp_path / "data").sha256 == open_data(tmp_path / "whole", target).sha256
    assert content(tmp_path / "data") == content(tmp_path / "whole")


def test_neither_workers_nor_batches_change_a_byte(tmp_path, monkeypatch):
    target = two_sources(tmp_path)
    build_data(target, tmp_path / "here")
    monkeypatch.setattr(tokenise, "SMALL", 1)
    for workers, batch in ((1, 10**6), (3, 500)):
        monkeypatch.setattr(tokenise, "BATCH", batch)
        build_data(target, tmp_path / f"{workers}", workers=workers)
        assert content(tmp_path / f"{workers}") == content(tmp_path / "here")


def test_other_settings_begin_anew(tmp_path, monkeypatch):
    target = two_sources(tmp_path)
    process = start(tmp_path, tmp_path / "data")
    for _ in range(6):
        process.stdout.readline()
    process.kill()
    process.communicate()
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    reports = []
    data = build_data(target, tmp_path / "data", report=lambda what, done, total: reports.append(what))
    assert not any(what.startswith("going on") for what in reports)
    assert data.manifest["sources"][1]["documents"] == 900 - 129 + 1


def test_force_begins_anew(tmp_path):
    target = two_sources(tmp_path)
    process = start(tmp_path, tmp_path / "data")
    for _ in range(6):
        process.stdout.readline()
    process.kill()
    process.communicate()
    reports = []
    build_data(target, tmp_path / "data", force=True, report=lambda what, done, total: reports.append(what))
    assert reports[0] == "reading for the tokenizer"


def test_two_builds_of_one_folder_are_refused(tmp_path):
    target = two_sources(tmp_path)
    process = start(tmp_path, tmp_path / "data")
    process.stdout.readline()
    try:
        with pytest.raises(UserError, match=r"data: another process builds it\. Wait for it, or stop it"):
            build_data(target, tmp_path / "data")
    finally:
        process.kill()
        process.communicate()


def test_workers_end_with_their_parent(tmp_path):
    two_sources(tmp_path)
    process = start(tmp_path, tmp_path / "data", workers=2)
    process.stdout.readline()
    children = [int(pid) for pid in _children(process.pid)]
    assert len(children) == 2
    process.kill()
    process.communicate()
    until = time.monotonic() + 20
    while any(_alive(pid) for pid in children):
        assert time.monotonic() < until, "a worker outlives its parent"
        time.sleep(0.05)


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("when", ["at once", "some time"])
def test_a_worker_that_dies_is_one_line(when, tmp_path, monkeypatch):
    target, send = two_sources(tmp_path), worker._send
    if when == "at once":  # before it was sent anything
        monkeypatch.setattr(worker, "_send", lambda process, what: process.wait() and send(process, what))
    monkeypatch.setattr(tokenise, "SMALL", 1)
    monkeypatch.setattr(
        worker, "_COMMAND", [sys.executable, "-c", f"import os; os.kill(os.getpid(), {signal.SIGKILL})"]
    )
    with pytest.raises(
        UserError, match=r"a tokenising process ended early \(exit code -9\)\. See whether memory ran out"
    ):
        build_data(target, tmp_path / "data", workers=2)
    assert not (tmp_path / "data").exists()


def test_a_source_that_cannot_be_read_is_refused_before_others_are_tokenised(tmp_path):
    write_corpus(tmp_path / "corpus")
    (tmp_path / "b.jsonl").write_text('{"content": "x"}\n')
    sources = [{"path": str(tmp_path / "corpus")}, {"path": str(tmp_path / "b.jsonl")}]
    reports = []
    with pytest.raises(UserError, match=r"b\.jsonl:1 has no field 'text'"):
        build_data(
            corpus_target(tmp_path, data={"sources": sources}),
            tmp_path / "data",
            report=lambda what, done, total: reports.append(what),
        )
    assert reports == []


@pytest.mark.parametrize("fraction", [1e-12, 0.1, 0.4999])
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_the_tokenizer_is_trained_on_what_is_trained_on(tmp_path, monkeypatch, fraction, count):
    write_corpus(tmp_path / "corpus", documents=count)
    target = corpus_target(tmp_path / "corpus", data={"held_out": fraction})
    data = build_data(target, tmp_path / "data")
    split, decode = data.sources[0].train, data.tokenizer.tokenizer.decode
    bounds = zip(split.document_starts, split.document_starts[1:], strict=False)
    trained = [decode(split.tokens[first : last - 1].tolist()) for first, last in bounds]
    assert sorted(trained) == sorted(training_texts(Source(path=str(tmp_path / "corpus")), fraction))
    assert len(data.sources[0].held_out.document_starts) > 1


def test_progress_reaches_the_end_over_all_sources(tmp_path):
    target = two_sources(tmp_path)
    reports = []
    build_data(target, tmp_path / "data", report=lambda *report: reports.append(report))
    tokenising = [(done, total) for what, done, total in reports if what.startswith("tokenising")]
    size = sum(path.stat().st_size for path in [*(tmp_path / "corpus").iterdir(), tmp_path / "records.jsonl"])
    assert tokenising[-1] == (size, size)
    assert tokenising == sorted(tokenising)
    assert os.path.getsize(tmp_path / "records.jsonl") < size
