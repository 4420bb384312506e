"""``forgetrain run``: the whole way on a tiny model, as a user runs it, and run again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.tiny import GATES, MODEL

SENTENCE = "the forge trains one small model on plain text and then it talks about the weather in short words. "


def write_target(folder, reference):
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number:02d}.txt").write_text(SENTENCE * (3 + number % 3))
    sections = {
        "model": {**MODEL, "vocab_size": 300},
        "recipe": {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 16, "steps": 60, "lr": 2e-2},
        "gates": GATES,
        "data": {"held_out": 0.1},
        "reference": {"name": reference},
        "train": {"checkpoint_every": 30, "eval_every": 30},
    }
    lines = ['name = "tiny"']
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        if section == "data":
            lines.append(f'sources = [{{ path = "{corpus}" }}]')
    path = folder / "tiny.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def command(*arguments):
    return [sys.executable, "-m", "forgetrain", "run", *map(str, arguments)]


def run(folder, *arguments, code=0):
    done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def whole_way(folder, reference, search=0):
    target = write_target(folder, reference)
    first = run(folder, target, "--json", "--prompt", "the forge", "--search", search)
    outcome = json.loads(first.stdout.splitlines()[-1])
    assert outcome["passed"], outcome["proofs"]
    gates = [proof["what"].partition(":")[0] for proof in outcome["proofs"]]
    assert gates[:4] == ["G0", "G1", "G2", "G3"]
    stages = ["collect", "align", "data", *["forge"][: int(search > 0)], "train", "compare", "export", "generate"]
    assert list(outcome["stages"]) == stages
    assert outcome["compared"]["difference"] is None
    assert outcome["train"]["held_out_loss"] < outcome["train"]["unigram_loss"] - 0.5
    assert outcome["reply"]["prompt"] == "the forge"
    for where in outcome["places"].values():
        assert (folder / where).exists()
    assert json.loads((folder / "runs" / "tiny" / "run.json").read_text())["proofs"] == outcome["proofs"]
    page = (folder / "runs" / "tiny" / "report.html").read_text()
    assert "Every gate passed." in page
    assert "<script src" not in page
    assert "<link" not in page
    return target, outcome


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *whole_way(folder, "transformers")


def test_the_whole_way_with_transformers(done):
    _, _, outcome = done
    assert outcome["reference"]["name"] == "transformers"


@pytest.mark.slow
def test_the_whole_way_with_megatron(tmp_path):
    _, outcome = whole_way(tmp_path, "megatron")
    assert "current_device" in str(outcome["reference"]["shims"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no GCC for the fast engine's kernels")
def test_the_whole_way_with_a_faster_engine(tmp_path):
    _, outcome = whole_way(tmp_path, "transformers", search=1)
    claims = {proof["what"]: proof["evidence"] for proof in outcome["proofs"]}
    assert "a faster engine passes the gates here" in claims
    if outcome["forge"]["elections"]:
        assert "G4.fp32" in claims["a faster engine passes the gates here"]
        assert outcome["train"]["engine"]["sha256"] == outcome["forge"]["champion"]
        assert (
            "of the engine that trained losses differ"
            in claims["the aligned engine does what transformers does on the same text"]
        )


def test_run_again_takes_what_fits(done):
    folder, target, before = done
    began = time.monotonic()
    after = json.loads(run(folder, target, "--json", "--search", 0).stdout.splitlines()[-1])
    assert after["passed"]
    assert after["train"]["weight_sha256"] == before["train"]["weight_sha256"]
    assert after["stages"]["collect"] + after["stages"]["align"] < 5
    assert time.monotonic() - began < sum(before["stages"].values())


def test_bad_input_is_one_line(done, tmp_path):
    folder, target, _ = done
    refused = run(folder, target, "--set", "model.num_key_value_heads=3", code=2)
    assert refused.stderr.count("\n") == 1
    assert "num_key_value_heads" in refused.stderr
    absent = run(folder, tmp_path / "none.toml", code=2)
    assert absent.stderr.count("\n") == 1


def test_interrupted_it_leaves_nothing_half_done(aligned_run, tmp_path):
    target = aligned_run.copied_to(tmp_path)
    shutil.rmtree(tmp_path / "runs" / "tiny" / "engine")
    process = subprocess.Popen(command(target), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "align" in line:
            time.sleep(1.0)
            process.send_signal(signal.SIGINT)
            break
    assert process.wait(timeout=60) == 130, lines
    rest = process.stderr.read()
    assert "Traceback" not in rest
    assert rest.rstrip().endswith("forgetrain: interrupted")
    assert (tmp_path / "runs" / "tiny" / "golden" / "manifest.json").is_file()
    assert not (tmp_path / "runs" / "tiny" / "engine").exists()
