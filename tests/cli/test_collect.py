"""``forgetrain collect``: bad input is one line and exit code 2, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forgetrain.cli.main import main
from tests.tiny import GATES, MODEL, RECIPE

TARGET: dict[str, dict] = {
    "model": MODEL,
    "recipe": RECIPE,
    "gates": {**GATES, "batch_size": 1, "micro_batch_size": 1},
    "reference": {"name": "transformers"},
}


def write(folder: Path, **sections: dict) -> Path:
    lines = ['name = "tiny"']
    for section in dict.fromkeys((*TARGET, *sections)):
        values = {**TARGET.get(section, {}), **sections.get(section, {})}
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path = folder / "tiny.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "forgetrain", "collect", *map(str, arguments)]


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=folder, check=False)


MALFORMED = "name = [\n"
#: What is written to the target file, or what is changed in it, and the words of the line that is printed.
BAD = [
    (MALFORMED, ["tiny.toml: not valid TOML", "Fix the syntax"]),
    ({"model": {"colour": "red"}}, ["tiny.toml: model.colour: unknown key", "Remove it or fix its spelling"]),
    ({"model": {"num_key_value_heads": 3}}, ["num_attention_heads = 4 is not divisible by num_key_value_heads = 3"]),
    ({"recipe": {"micro_batch_size": 3}}, ["batch_size = 4 is not a multiple of micro_batch_size = 3"]),
    ({"reference": {"name": "jax"}}, ["reference.name", "(got 'jax')"]),
    ({"reference": {"name": "capture"}}, ["reference.name: is collected by forgetrain.capture", "docs/capture.md"]),
    (
        {"reference": {"name": "megatron"}, "model": {"scale_emb": 12.0}},
        ["reference.name: megatron-core has no muP", "transformers reference"],
    ),
]


@pytest.mark.parametrize(("content", "words"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(content, words, tmp_path, monkeypatch, capsys):
    path = write(tmp_path, **content) if isinstance(content, dict) else tmp_path / "tiny.toml"
    if not isinstance(content, dict):
        path.write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["forgetrain", "collect", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, error = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert error.startswith("forgetrain: ")
    assert error.count("\n") == 1
    for part in words:
        assert part in error
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.toml"]


def test_a_missing_file_and_a_bad_override(tmp_path):
    done = run(tmp_path, "nowhere.toml")
    assert (done.returncode, done.stderr) == (
        2,
        "forgetrain: nowhere.toml: no such target file. See targets/ for the ones that ship\n",
    )
    done = run(tmp_path, write(tmp_path), "--set", "recipe.clip=none")
    assert done.returncode == 2
    assert "recipe.clip" in done.stderr
    assert "(got 'none')" in done.stderr


def test_a_place_that_cannot_be_written_is_refused_before_the_reference_runs(tmp_path):
    done = run(tmp_path, write(tmp_path), "--runs", "tiny.toml")  # a file
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("not a directory. Name another place: a part of this path is a file")
    assert "first run" not in done.stderr


@pytest.mark.slow
def test_an_interruption_leaves_nothing(tmp_path):
    path = write(tmp_path)
    with subprocess.Popen(command(path), cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not children(process.pid):  # the references are on their way
            assert time.monotonic() < deadline
            time.sleep(0.05)
        started = children(process.pid)
        os.kill(process.pid, signal.SIGINT)
        error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert not any(alive(pid) for pid in started)
    assert list((tmp_path / "runs").glob("**/*.safetensors")) == []


@pytest.mark.slow
def test_what_it_prints(tmp_path):
    done = run(tmp_path, write(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["golden"] == "runs/tiny/golden"
    assert result["verdicts"][0]["gate"] == "G0"
    assert result["verdicts"][0]["pass"]
    assert result["environment"]["threads"] == 2
    assert "G0 passed" in done.stderr
    assert re.search(r"\d s  transformers, second run|\d s  megatron, second run", done.stderr)
    assert (tmp_path / "runs/tiny/golden/manifest.json").is_file()


def children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in path.read_text().split()]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
