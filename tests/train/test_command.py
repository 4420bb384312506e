"""The shipped commands, in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.spec.target import load_target
from forgetrain.train.metrics import read_journal
from tests.corpus import write_corpus
from tests.engine.toy import toy
from tests.tiny import MODEL, RECIPE

TARGET = """
name = "tiny"
[model]
{model}
[recipe]
{recipe}
[data]
sources = [{{ path = "{corpus}" }}]
held_out = 0.1
[gates]
sequence_length = 16
[train]
checkpoint_every = 5
eval_every = 10
"""


def write_target(folder, **recipe):
    def lines(values):
        return "\n".join(f"{key} = {value}" for key, value in values.items())

    model, recipe = {**MODEL, "vocab_size": 320}, {**RECIPE, "steps": 20, **recipe}
    path = folder / "tiny.toml"
    corpus = write_corpus(folder / "corpus")
    path.write_text(TARGET.format(model=lines(model), recipe=lines(recipe), corpus=corpus))
    return path


def forgetrain(folder, *arguments, ranks=1, **options):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "forgetrain", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def finish(process, code=0, seconds=120):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err[-3000:]
    return out, err


def summary(folder):
    return json.loads((folder / "runs" / "tiny" / "train" / "summary.json").read_text())


def test_build_train_export_generate(tmp_path):
    target = write_target(tmp_path)
    out, err = finish(forgetrain(tmp_path, "data", "build", target, "--json"))
    assert json.loads(out.splitlines()[-1])["sources"][0]["documents"] == 60
    assert "60 documents" in err
    out, err = finish(forgetrain(tmp_path, "train", target, "--json"))
    result = json.loads(out.splitlines()[-1])
    assert result == summary(tmp_path)
    assert "held-out loss" in err
    assert "unigram" in err
    out, err = finish(forgetrain(tmp_path, "export", "runs/tiny", "--to", "hf", "--json"))
    assert json.loads(out.splitlines()[-1])["logits"]["pass"]
    out, _ = finish(forgetrain(tmp_path, "generate", "runs/tiny", "--prompt", "the forge", "--max-new-tokens", "4"))
    assert out.startswith("the forge")
    out, _ = finish(forgetrain(tmp_path, "data", "inspect", target, "--step", "3", "--json"))
    assert len(json.loads(out)["tokens"]) == RECIPE["sequence_length"]


def test_bad_input_is_one_line_and_code_2(tmp_path):
    target = write_target(tmp_path)
    (tmp_path / "corpus" / "zero.bin").write_bytes(b"\0")
    cases = {
        ("train", target): "manifest.json: no such file. Run forgetrain data build TARGET first",
        ("train", tmp_path): "is a folder. Name a target file, or add --resume",
        ("export", tmp_path, "--to", "onnx"): "--to: no such format (got 'onnx'). The format is hf",
        ("data", "build", target, "--set", f"data.sources=[{{path='{tmp_path}/corpus/zero.bin'}}]"): "is binary",
    }
    started = {line: forgetrain(tmp_path, *arguments) for arguments, line in cases.items()}
    for line, process in started.items():
        out, err = finish(process, code=2)
        assert out == ""
        assert line in err
        assert len(err.strip().splitlines()) == 1
        assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_saves_and_resume_needs_the_run_alone(tmp_path, number, code):
    target = write_target(tmp_path)
    finish(forgetrain(tmp_path, "data", "build", target))
    finish(forgetrain(tmp_path, "train", target))
    whole = summary(tmp_path)
    engine = tmp_path / "runs" / "tiny" / "train" / "engine.py"
    source, step = engine.read_text(), "        loss, grads = self.gradients("
    assert source.count(step) == 1
    slowed = source.replace(step, f"        __import__('time').sleep(0.2)\n{step}")
    (tmp_path / "slow.py").write_text(slowed)
    shutil.rmtree(engine.parent)
    process = forgetrain(tmp_path, "train", target, "--restart", "--engine", "slow.py", "--unverified")
    wait_for(lambda: len(read_journal(tmp_path / "runs/tiny/train/metrics.jsonl")) > 2)
    process.send_signal(number)
    _, err = finish(process, code=code)
    assert f"stopped by {number.name} after step" in err
    assert 3 <= summary(tmp_path)["steps"] < 20
    finish(forgetrain(tmp_path, "train", "runs/tiny", "--resume"))
    assert summary(tmp_path)["weight_sha256"] == whole["weight_sha256"]


@pytest.mark.slow
def test_a_second_ctrl_c_to_the_command_is_said(tmp_path):
    target = write_target(tmp_path)
    finish(forgetrain(tmp_path, "data", "build", target))
    finish(forgetrain(tmp_path, "train", target))
    source = (tmp_path / "runs" / "tiny" / "train" / "engine.py").read_text()
    step = "        loss, grads = self.gradients("
    twice = "[__import__('os').kill(__import__('os').getpid(), 2) for _ in '12']"
    (tmp_path / "impatient.py").write_text(source.replace(step, f"        {twice}\n{step}"))
    process = forgetrain(tmp_path, "train", target, "--restart", "--engine", "impatient.py", "--unverified")
    _, err = finish(process, code=130)
    assert err.splitlines()[-1].startswith("stopped at once by a second SIGINT, without a checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_at_any_moment_end_with_the_same_weights(tmp_path, ranks):
    target = write_target(tmp_path, steps=12)
    finish(forgetrain(tmp_path, "data", "build", target))
    command = ("train", target, "--resume", "--set", "train.checkpoint_every=1")
    finish(forgetrain(tmp_path, *command, ranks=ranks))
    whole = summary(tmp_path)
    assert (whole["steps"], whole["ranks"]) == (12, ranks)
    for folder in ("checkpoints", "train"):
        (tmp_path / "runs" / "tiny" / folder).rename(tmp_path / folder)
    for taken in (3, 8):
        process = forgetrain(tmp_path, *command, ranks=ranks, start_new_session=True)
        wait_for(lambda at=taken: len(list((tmp_path / "runs/tiny").glob(f"checkpoints/*{at:08d}*"))) > 0)
        os.killpg(process.pid, signal.SIGKILL)  # while that checkpoint is being written
        process.wait()
    finish(forgetrain(tmp_path, *command, ranks=ranks))
    assert summary(tmp_path)["weight_sha256"] == whole["weight_sha256"]


@pytest.mark.slow
def test_two_ranks_take_the_same_batches_as_one_and_either_resumes_the_other(tmp_path):
    target = write_target(tmp_path, steps=8)
    finish(forgetrain(tmp_path, "data", "build", target))
    finish(forgetrain(tmp_path, "train", target))
    alone = {
        line["step"]: line["loss"]
        for line in read_journal(tmp_path / "runs/tiny/train/metrics.jsonl")
        if "loss" in line
    }
    finish(forgetrain(tmp_path, "train", target, "--restart", "--stop-after", "2"))
    words = ("train", target, "--resume", "--stop-after", "5", "--json")
    out, err = finish(forgetrain(tmp_path, *words, ranks=2))
    assert json.loads(out)["steps"] == 5  # one object, and one line for a person, not one a rank
    assert err.count("stopped by --stop-after after step 5") == 1
    finish(forgetrain(tmp_path, "train", target, "--resume"))
    mixed = {
        line["step"]: line["loss"]
        for line in read_journal(tmp_path / "runs/tiny/train/metrics.jsonl")
        if "loss" in line
    }
    assert mixed == pytest.approx(alone, rel=1e-5)  # sums over ranks round otherwise than sums over micro-batches
    assert list(mixed) == list(range(1, 9))


@pytest.mark.slow
def test_a_sharded_state_is_saved_by_all_ranks_and_read_by_one(tmp_path):
    target = write_target(tmp_path, steps=4)
    finish(forgetrain(tmp_path, "data", "build", target))
    engine = toy(tmp_path)  # each rank answers its half of every tensor
    options = ("--engine", engine, "--unverified")
    finish(forgetrain(tmp_path, "train", target, "--stop-after", "2", *options, ranks=2))
    files = {path.name for path in (tmp_path / "runs/tiny/checkpoints/step-00000002").iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp"} <= files
    finish(forgetrain(tmp_path, "train", target, "--resume", *options))
    assert summary(tmp_path)["steps"] == 4


def write_engine_file(target, path, tensor=1, **choices):
    plan = Plan({"schedule": "production", "rope_tables": "fp32", **choices})
    target = load_target(target, [f"parallel.tensor={tensor}"])
    path.write_text(write_engine(target, plan))
    return path


@pytest.mark.slow
def test_sharded_states_resume_bit_for_bit(tmp_path):
    target = write_target(tmp_path, steps=6, micro_batch_size=1)
    finish(forgetrain(tmp_path, "data", "build", target))
    engine = write_engine_file(target, tmp_path / "sharded.py", optimizer_state="sharded")
    command = ("train", target, "--engine", engine, "--unverified")
    finish(forgetrain(tmp_path, *command, ranks=2))
    whole = summary(tmp_path)
    finish(forgetrain(tmp_path, *command, "--restart", "--stop-after", "3", ranks=2))
    finish(forgetrain(tmp_path, *command, "--resume", ranks=2))
    assert summary(tmp_path)["weight_sha256"] == whole["weight_sha256"]
    assert summary(tmp_path)["held_out_loss"] == whole["held_out_loss"]


@pytest.mark.slow
def test_layers_split_over_ranks_by_the_targets_key(tmp_path):
    target = write_target(tmp_path, steps=2, micro_batch_size=1)
    finish(forgetrain(tmp_path, "data", "build", target))
    finish(forgetrain(tmp_path, "train", target))
    alone = summary(tmp_path)
    engine = write_engine_file(target, tmp_path / "split.py", tensor=2)
    command = ("train", target, "--restart", "--engine", engine, "--unverified", "parallel.tensor=2")
    _, err = finish(forgetrain(tmp_path, *command), code=2)
    assert "parallel.tensor: does not divide the 1 ranks that were started (got 2). Start 2 with torchrun" in err
    assert len(err.strip().splitlines()) == 1
    finish(forgetrain(tmp_path, *command, ranks=2))
    split = summary(tmp_path)
    assert split["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert split["held_out_loss"] == pytest.approx(alone["held_out_loss"], rel=1e-5)


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
