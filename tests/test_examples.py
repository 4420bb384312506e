"""The launch examples: they parse, and what they call exists with its options."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import yaml
from torch.distributed.run import parse_args

from forgetrain.spec.target import load_target
from tests.test_docs import ROOT, check

LAUNCH = ROOT / "examples" / "launch"
#: What the launchers put in.
VARIABLES = {"$SLURM_NNODES": "2", "$SLURM_JOB_ID": "7", "$SLURMD_NODENAME": "a", "$SKYPILOT_NUM_GPUS_PER_NODE": "8"}
TARGET = "targets/nano-cpu.toml"


def script(name):
    text = (LAUNCH / name).read_text(encoding="utf-8")
    return yaml.safe_load(text)["run"] if name.endswith(".yaml") else text


def torchrun_words(name):
    """The words after torchrun, as the shell would give them."""
    if name == "pytorchjob.yaml":
        pod = yaml.safe_load((LAUNCH / name).read_text())["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
        return pod["containers"][0]["command"][1:]
    line = next(re.finditer(r"^(?!#).*torchrun (.*)$", script(name).replace("\\\n", " "), flags=re.M)).group(1)
    for variable, value in VARIABLES.items():
        line = line.replace(variable, value)
    return shlex.split(line.replace("$target", TARGET))


@pytest.mark.parametrize("name", ["slurm.sbatch", "pytorchjob.yaml", "skypilot.yaml"])
def test_what_is_launched_is_a_command_of_ours(name):
    parsed = parse_args(torchrun_words(name))  # torchrun's own parser: exits on what it does not know
    assert (parsed.module, parsed.training_script) == (True, "forgetrain")
    words = parsed.training_script_args
    check(words)
    assert "--resume" in words
    assert load_target(ROOT / words[1]).name


@pytest.mark.parametrize("name", ["slurm.sbatch", "skypilot.yaml"])
def test_the_shell_takes_the_script(name):
    subprocess.run(["bash", "-n"], input=script(name), text=True, check=True)


def test_slurm_signals_before_the_limit_and_requeues_what_it_interrupted():
    text = script("slurm.sbatch")
    number = re.search(r"#SBATCH --signal=(\w+)@\d+", text).group(1)
    assert f"SIG{number}" in next(word for word in torchrun_words("slurm.sbatch") if "signals" in word)
    assert f'"interrupted": "SIG{number}"' in text
