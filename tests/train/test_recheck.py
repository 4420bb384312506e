import io
import json

import pytest
from rich.console import Console
from safetensors.torch import load_file

from forgetrain.errors import UserError
from forgetrain.train import checkpoint
from forgetrain.train.loop import train
from tests.corpus import built
from tests.engine.toy import toy
from tests.train.test_loop import losses, run

#: The first time that step 4 is taken, the lowest bit of one weight flips.
FLIP = """if self.steps == 4 and not hasattr(torch, "_flipped_once"):
            torch._flipped_once = True
            next(iter(self.weights.values())).view(torch.int32).reshape(-1)[5] ^= 1"""
#: The same for the loss, whose weights stay as they are.
WRONG_LOSS = """if self.steps == 4 and not hasattr(torch, "_flipped_once"):
            torch._flipped_once = True
            loss.view(torch.int32).bitwise_xor_(1)"""


@pytest.fixture(autouse=True)
def _once():
    import torch

    yield
    if hasattr(torch, "_flipped_once"):
        del torch._flipped_once


@pytest.mark.parametrize(
    ("flip", "name"), [(FLIP, "master/model.embed_tokens.weight"), (WRONG_LOSS, "loss")], ids=["weight", "loss"]
)
def test_a_flipped_bit_ends_the_run_with_the_step_named(tmp_path, flip, name):
    target, _ = built(tmp_path, train={"recheck_every": 2, "checkpoint_every": 1})
    with pytest.raises(UserError, match=rf"evidence-00000004: step 4 taken twice.*rank 0, the first {name}"):
        run(target, tmp_path, engine=str(toy(tmp_path, after=flip)), unverified=True)
    folder = tmp_path / target.name / "train" / "evidence-00000004"
    report = json.loads((folder / "report.json").read_text())
    assert report["step"] == 4
    assert name in report["differs_by_rank"][0]
    assert load_file(folder / "batch.safetensors")["tokens"].shape == (4, 16)
    assert checkpoint.newest(tmp_path / target.name / "checkpoints", warn=pytest.fail).step == 3


def test_unchecked_steps_pass_a_flipped_bit(tmp_path):
    """What the check is for: nothing else sees it."""
    target, _ = built(tmp_path, train={"recheck_every": 3})
    assert run(target, tmp_path, engine=str(toy(tmp_path, after=FLIP)), unverified=True)["finished"]


def test_checking_changes_no_bit(tmp_path):
    target, _ = built(tmp_path)
    whole = run(target, tmp_path)
    expected = losses(tmp_path, target)
    checked = target.model_copy(update={"train": target.train.model_copy(update={"recheck_every": 2})})
    assert run(checked, tmp_path, restart=True)["weight_sha256"] == whole["weight_sha256"]
    assert losses(tmp_path, target) == expected


def test_an_engine_that_is_not_deterministic_is_not_checked_and_that_is_said(tmp_path):
    target, _ = built(tmp_path, train={"recheck_every": 2})
    engine = toy(tmp_path, after=FLIP)
    engine.write_text(engine.read_text() + "\nDETERMINISTIC = False\n")
    console = Console(record=True, file=io.StringIO(), width=200)
    assert train(target, runs=tmp_path, console=console, engine=str(engine), unverified=True)["finished"]
    assert "train.recheck_every is off: the engine says that it is not deterministic" in console.export_text()
