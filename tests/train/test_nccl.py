"""The shipped command on GPUs over NCCL: each layout of ranks against one GPU, and a run that was stopped and resumed
against one that was not."""

import json

import pytest
import torch

from forgetrain.engine.plan import WITHOUT_NATIVE, Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.numerics.device import this_gpu
from forgetrain.spec.parallel import Parallel
from forgetrain.spec.toml import to_toml
from forgetrain.train.metrics import read_journal
from tests.corpus import built
from tests.train.test_command import finish, forgetrain

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")]

#: Wide enough for the tensor cores' layouts, and for two ranks to share every dimension.
MODEL = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 128}
RECIPE = {"batch_size": 8, "micro_batch_size": 2, "sequence_length": 128, "lr": 1e-3, "warmup_steps": 2}
LAYOUTS = {
    "production, sharded": (2, {"schedule": "production"}, {}),
    "production, replicated": (2, {"schedule": "production", "optimizer_state": "replicated"}, {}),
    "production, tensor": (2, {"schedule": "production"}, {"tensor": 2}),
    "production, context": (2, {"schedule": "production"}, {"context": 2}),
    "production, data and tensor": (4, {"schedule": "production"}, {"tensor": 2}),
    "fsdp": (2, {"schedule": "fsdp"}, {}),
    "fsdp, reduced once a step": (2, {"schedule": "fsdp", "gradients": "whole"}, {}),
    "hopper, sharded": (2, {"schedule": "hopper"}, {}),
    "hopper, replicated": (2, {"schedule": "hopper", "optimizer_state": "replicated"}, {}),
}


class Runs:
    """Runs of one target in one folder, each layout by its own engine."""

    def __init__(self, folder, dtype, device):
        self.folder = folder
        self.target, _ = built(folder, model=MODEL, recipe=RECIPE, precision={"dtype": dtype}, hardware=device)

    def on(self, ranks, choices, parallel, *options):
        """(the summary, losses) of ``forgetrain train``."""
        target = self.target.model_copy(update={"parallel": Parallel(**parallel)})
        file, engine = self.folder / "target.toml", self.folder / "engine.py"
        file.write_text(to_toml(target))
        engine.write_text(write_engine(target, Plan({**WITHOUT_NATIVE, **choices})))
        given = ["train", file, "--engine", engine, "--unverified", "--runs", self.folder, "--json", *options]
        out, _ = finish(forgetrain(self.folder, *given, ranks=ranks), seconds=300)
        journal = read_journal(self.folder / target.name / "train" / "metrics.jsonl")
        return json.loads(out.splitlines()[-1]), [line["loss"] for line in journal if "loss" in line]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_train_as_one_does_and_go_on_where_they_stopped(layout, dtype, tmp_path):
    ranks, choices, parallel = LAYOUTS[layout]
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} GPUs")
    runs = Runs(tmp_path, dtype, {"name": this_gpu(), "count": ranks})
    _, alone = runs.on(1, choices, {})
    deterministic = getattr(load_engine(tmp_path / "engine.py"), "DETERMINISTIC", True)
    whole, losses = runs.on(ranks, choices, parallel, "--restart")
    assert len(losses) == len(alone) == runs.target.recipe.steps
    assert losses == pytest.approx(alone, rel=1e-5 if dtype == "fp32" else 5e-3)
    runs.on(ranks, choices, parallel, "--restart", "--stop-after", 3)
    again, resumed = runs.on(ranks, choices, parallel, "--resume")
    assert resumed == pytest.approx(losses, rel=0 if deterministic else 1e-3)
    if deterministic:
        assert again["weight_sha256"] == whole["weight_sha256"]
