"""``forgetrain target``."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forgetrain.cli.main import app
from forgetrain.errors import UserError
from forgetrain.spec.target import load_target, parse_target
from tests.spec.test_hf import write

TARGETS = Path(__file__).parents[2] / "targets"


def run(*arguments: object) -> str:
    return CliRunner().invoke(app, ["target", *map(str, arguments)], catch_exceptions=False).stdout


def test_new_writes_a_target_that_loads(tmp_path):
    folder = write(tmp_path / "Model", architectures=["LlamaForCausalLM"], odd_key=1)
    file = tmp_path / "mine.toml"
    result = json.loads(run("new", "--from-hf", folder, "--name", "mine", "--out", file, "--json"))
    assert load_target(file).plain() == result["target"]
    assert load_target(file).name == "mine"
    assert result["unread"] == ["odd_key"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Model", "mine.toml"]


def test_new_does_not_write_over_a_file(tmp_path):
    folder = write(tmp_path / "Model", architectures=["LlamaForCausalLM"])
    file = tmp_path / "mine.toml"
    file.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        run("new", "--from-hf", folder, "--out", file)
    assert file.read_text() == "mine"
    run("new", "--from-hf", folder, "--out", file, "--force")
    assert load_target(file).name == "model"
    with pytest.raises(UserError, match="folder does not exist"):
        run("new", "--from-hf", folder, "--out", tmp_path / "none" / "x.toml")


def test_show_writes_every_default_out(tmp_path):
    tree = tomllib.loads(run("show", TARGETS / "nano-cpu.toml", "--set", "recipe.steps=500"))
    target = load_target(TARGETS / "nano-cpu.toml", ["recipe.steps=500"])
    assert parse_target(tree) == target
    assert tree["recipe"]["eps"] == 1e-8
    assert (
        json.loads(run("show", TARGETS / "nano-cpu.toml", "--json")) == load_target(TARGETS / "nano-cpu.toml").plain()
    )


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    folder = write(tmp_path / "Model", architectures=["LlamaForCausalLM"], rope_scaling={"rope_type": "yarn"})
    command = [sys.executable, "-m", "forgetrain", "target", "new", "--from-hf", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "rope_scaling" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["Model"]
