"""What is wrong outside the program: one line that names it, exit code 2, and nothing lost."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from forgetrain.cli.main import main
from forgetrain.durable import sha256_file
from forgetrain.train import checkpoint
from tests.corpus import built
from tests.engine.toy import toy
from tests.train.test_command import finish, forgetrain, summary, write_engine_file, write_target
from tests.train.test_loop import run


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process; returns its exit code and what it printed to stderr."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["forgetrain", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    return command


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(err, *parts):
    lines = [line for line in err.splitlines() if line.startswith("forgetrain:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[0]


def test_a_shard_that_cannot_be_read_falls_back_to_the_checkpoint_before(tmp_path, monkeypatch):
    target, _ = built(tmp_path, train={"checkpoint_every": 2, "keep_last": 3})
    whole = run(target, tmp_path)
    readable, broken = checkpoint.sha256_file, tmp_path / target.name / "checkpoints" / "step-00000006"

    def sha256_file(path):
        if path.parent == broken and path.suffix == ".distcp":
            raise OSError(errno.EIO, "Input/output error")
        return readable(path)

    monkeypatch.setattr(checkpoint, "sha256_file", sha256_file)
    warned = []
    assert checkpoint.newest(broken.parent, warned.append).step == 4
    assert "step-00000006/__0_0.distcp: cannot be read: Input/output error" in warned[0]
    monkeypatch.undo()
    assert run(target, tmp_path, resume=True)["weight_sha256"] == whole["weight_sha256"]


def test_when_no_shard_can_be_read_one_line_says_so_and_the_files_stay(tmp_path, monkeypatch, command):
    target = write_target(tmp_path, steps=4)
    assert command("data", "build", target)[0] == 0
    assert command("train", target, "--stop-after", "2")[0] == 0
    kept = files(tmp_path / "runs/tiny/checkpoints")

    def sha256_file(path):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256_file", sha256_file)
        code, err = command("train", "runs/tiny", "--resume")
    assert code == 2
    one_line(err, "checkpoints: every checkpoint is damaged. Restore one, or start again with --restart")
    code, err = command("train", target, "--resume", "recipe.seed=7")
    assert code == 2
    one_line(err, "step-00000002: recipe.seed: is a checkpoint of another target", "or start again with --restart")
    assert files(tmp_path / "runs/tiny/checkpoints") == kept
    assert command("train", "runs/tiny", "--resume")[0] == 0


def test_a_folder_is_resumed_with_its_own_engine_and_not_with_a_changed_one(tmp_path, command):
    target = write_target(tmp_path, steps=4)
    assert command("data", "build", target)[0] == 0
    engine = toy(tmp_path)
    options = ("--engine", "engine.py", "--unverified")
    assert command("train", target, "--stop-after", "2", *options)[0] == 0
    code, err = command("train", "runs/tiny", "--resume", "--stop-after", "3")
    assert code == 0
    assert "engine engine.py (unverified: has no verdict" in err
    engine.write_text(engine.read_text() + "# another")
    code, err = command("train", "runs/tiny", "--resume")
    assert code == 2
    one_line(err, "engine.py: the engine of this run was changed since. Put it back, or name another with --engine")
    assert command("train", "runs/tiny", "--resume", *options)[0] == 0


def test_a_full_disk_in_the_middle_of_a_save_is_one_line_and_the_run_goes_on_later(tmp_path, command):
    target = write_target(tmp_path, steps=10)
    assert command("data", "build", target)[0] == 0
    assert command("train", target)[0] == 0
    whole = summary(tmp_path)["weight_sha256"]
    assert command("train", target, "--restart", "--stop-after", "5")[0] == 0
    kept = files(tmp_path / "runs/tiny/checkpoints")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a limit of a file's size is the full disk that any user can make
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        code, err = command("train", target, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    one_line(err, "step-00000010: cannot be written: file too large", "what was there before is untouched")
    assert files(tmp_path / "runs/tiny/checkpoints") == kept
    assert command("train", target, "--resume")[0] == 0
    assert summary(tmp_path)["weight_sha256"] == whole


@pytest.mark.parametrize(("record", "said"), [([], "is not a JSON object"), ({}, "target: is missing")])
def test_a_run_without_its_record_is_told(tmp_path, command, record, said):
    folder = tmp_path / "runs" / "tiny" / "train"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    code, err = command("train", folder.parent, "--resume")
    assert code == 2
    one_line(err, f"run.json: {said}. Name the target file instead")


def test_a_record_that_holds_no_verdicts_is_told(tmp_path, command):
    target = write_target(tmp_path)
    engine = write_engine_file(target, tmp_path / "fast.py")
    record = {"sha256": sha256_file(engine), "verdicts": [1]}
    (tmp_path / "verdicts.json").write_text(json.dumps(record))
    code, err = command("train", target, "--engine", engine, "--dry-run")
    assert code == 2
    one_line(err, "verdicts.json: verdicts: are no verdicts. Have the engine judged again")


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (None, "its kernels are built by GCC's g++, which is not here"),
        ("case $1 in --version) echo 'g++ 8.5, Free Software Foundation';; *) exit 1; esac", "g++ 8.5, Free Software"),
    ],
    ids=["none", "an old one"],
)
def test_an_engine_that_this_machine_cannot_build_is_told_in_one_line(tmp_path, monkeypatch, command, compiler, said):
    target = write_target(tmp_path)
    assert command("data", "build", target)[0] == 0
    engine = write_engine_file(target, tmp_path / "fast.py")
    if compiler is not None:
        (tmp_path / "g++").write_text(f"#!/bin/sh\n{compiler}\n")
        (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, err = command("train", target, "--engine", engine, "--unverified")
    assert code == 2
    one_line(err, f"{engine}: cannot be built here: {said}")
    assert not list((tmp_path / "runs/tiny/checkpoints").iterdir())


@pytest.mark.slow
def test_a_world_size_that_does_not_divide_the_batch_is_told_once(tmp_path):
    target = write_target(tmp_path)
    finish(forgetrain(tmp_path, "data", "build", target))
    words = ("train", target, "recipe.micro_batch_size=4")
    _, err = finish(forgetrain(tmp_path, *words, ranks=2), code=1)  # torchrun's own code
    said = err.partition("Traceback")[0]  # what follows is torchrun's account of its ranks
    one_line(said, "recipe.batch_size: does not divide into micro-batches of 4 on 2 ranks (got 4)")
    assert "exitcode  : 2" in err
    assert not (tmp_path / "runs/tiny/checkpoints").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: is no whole number (got 'x'). Start the ranks with torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: is not below WORLD_SIZE = 2 (got 2). Number ranks from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: is not set, and WORLD_SIZE = 2 ranks must find each other"),
    ],
)
def test_variables_that_torchrun_would_not_set_are_named(tmp_path, monkeypatch, command, variables, message):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    code, err = command("train", write_target(tmp_path))
    assert code == 2
    one_line(err, message)


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named(tmp_path):
    target = write_target(tmp_path)
    code = "from forgetrain.cli.main import main; from forgetrain.train import world; world.JOIN_SECONDS = 3.0; main()"
    environment = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, "train", str(target)],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    for process in ranks:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        one_line(err, "WORLD_SIZE:", "did not come within 3 s", "Start every rank")


@pytest.mark.parametrize(
    ("variable", "who"), [("TORCHELASTIC_RESTART_COUNT", "torchrun"), ("SLURM_RESTART_COUNT", "Slurm")]
)
def test_restart_given_again_by_a_launcher_goes_on(tmp_path, monkeypatch, command, variable, who):
    target = write_target(tmp_path, steps=4)
    assert command("data", "build", target)[0] == 0
    monkeypatch.setenv(variable, "0")
    for _ in range(2):  # the second throws the first away, as asked for
        code, err = command("train", target, "--restart", "--stop-after", "2")
        assert code == 0
        assert "resuming" not in err
    monkeypatch.setenv(variable, "1")
    code, err = command("train", target, "--restart")
    assert code == 0
    assert f"{who} has started this run again: --restart goes on from the newest checkpoint, as --resume does" in err
    assert "resuming at step 2" in err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--resume", "--restart"])
def test_torchrun_restarts_the_ranks_when_one_dies_and_the_weights_are_those_of_a_whole_run(tmp_path, how):
    target = write_target(tmp_path, steps=12)
    finish(forgetrain(tmp_path, "data", "build", target))
    options = ("train", target, how, "train.checkpoint_every=3")
    finish(forgetrain(tmp_path, *options, ranks=2))
    whole = checkpoint.newest(tmp_path / "runs/tiny/checkpoints", pytest.fail).manifest["files"]
    engine = (tmp_path / "runs/tiny/train/engine.py").read_text()
    # rank 1 dies at step 8, in its first life only
    dies = "        if self.updates == 8 and self.group.rank() == 1 and not __import__('os').path.exists('died'):\n"
    dies += "            open('died', 'w').close()\n            __import__('os').kill(__import__('os').getpid(), 9)\n"
    step = "        loss, grads = self.gradients("
    assert engine.count(step) == 1
    (tmp_path / "dies.py").write_text(engine.replace(step, dies + step))
    (tmp_path / "runs/tiny/checkpoints").rename(tmp_path / "before")
    process = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"),
            *("-m", "forgetrain", *map(str, options), "--engine", "dies.py", "--unverified"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert (tmp_path / "died").exists()
    assert "resuming at step 6" in process.stderr
    again = checkpoint.newest(tmp_path / "runs/tiny/checkpoints", pytest.fail).manifest["files"]
    shards = [{name: f["sha256"] for name, f in files.items() if name.endswith(".distcp")} for files in (whole, again)]
    assert len(shards[0]) == 2
    assert shards[0] == shards[1]
