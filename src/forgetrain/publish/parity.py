"""Whether an exported folder computes what the engine computed: both models' logits on the same tokens.

Both run in fp32 with the exported weights (an engine's fp32 mode is the same source with another dtype), so that what
is compared is the computation, not bf16's rounding. They sum in different orders, which in fp32 moves logits by a few
1e-7 of the largest (measured: 2 layers 5e-7, 24 layers 3e-7); a wrong RMSNorm eps, RoPE base or scale moves them by
5e-5 and more. The tolerance lies between: 2e-5 of the largest logit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetrain.durable import sha256_file
from forgetrain.engine.contract import make_batch
from forgetrain.engine.plan import Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.errors import UserError
from forgetrain.publish.hf import DTYPES, Exported
from forgetrain.spec.parallel import Parallel
from forgetrain.spec.target import Target, parse_target
from forgetrain.train import checkpoint

TOLERANCE = 2e-5
_LENGTH = 64


@dataclass(frozen=True)
class Parity:
    """max_difference: largest absolute difference of two logits; largest: largest absolute logit; engine: which."""

    max_difference: float
    largest: float
    engine: str

    @property
    def passed(self) -> bool:
        return self.max_difference <= TOLERANCE * self.largest


def logits_parity(exported: Exported) -> Parity:
    """Compares an export with the engine that trained its checkpoint, on random tokens.

    When that engine's file is no longer what it was, the textbook engine of the target stands in for it.
    """
    found = checkpoint.verify(exported.checkpoint)
    target = parse_target(found.manifest["target"])
    weights = checkpoint.read_masters(found.path, target.model.parameter_shapes())
    rounded = {name: weight.to(DTYPES[exported.dtype]).float() for name, weight in weights.items()}
    recorded = found.manifest["engine"]
    path = Path(recorded["name"])
    same = recorded["sha256"] is not None and path.is_file() and sha256_file(path) == recorded["sha256"]
    return folder_parity(exported.folder, target, rounded, path if same else None)


def folder_parity(folder: Path, target: Target, weights: Mapping[str, Tensor], engine: Path | None) -> Parity:
    """Compares a Hugging Face folder with an engine that has ``weights`` (canonical name → fp32 tensor).

    engine: its file; None, or one without a probe or of layers split over ranks, is the target's textbook engine.
    """
    length = min(_LENGTH, target.model.max_position_embeddings)
    shape = {"batch_size": 2, "micro_batch_size": 2, "sequence_length": length}
    target = target.model_copy(update={"recipe": target.recipe.model_copy(update=shape), "parallel": Parallel()})
    tokens = torch.randint(target.model.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(0))
    name, built = _engine(target, engine)
    built.load(weights)
    ours = _engine_logits(built, tokens)
    theirs = _exported_logits(folder, tokens[:, :-1])
    return Parity(float((ours - theirs).abs().max()), float(ours.abs().max()), name)


def _engine(target: Target, path: Path | None) -> tuple[str, Any]:
    plain = target.plain()
    module = None if path is None else load_engine(path)
    splits = [getattr(module, f"{key}_PARALLEL", 1) for key in ("TENSOR", "CONTEXT")]
    if module is not None and splits == [1, 1]:
        engine = module.build(plain, device="cpu", precision="fp32", mesh=None)
        if hasattr(engine, "probe"):
            return str(path), engine
    with tempfile.TemporaryDirectory(prefix="forgetrain-") as temporary:
        written = Path(temporary) / "engine.py"
        written.write_text(write_engine(target.for_reference(), Plan.textbook()), encoding="utf-8")
        return "textbook", load_engine(written).build(plain, device="cpu", precision="fp32", mesh=None)


def _engine_logits(engine: Any, tokens: Tensor) -> Tensor:
    batch = make_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    for name, tensor in engine.probe(batch):
        if name == "lm_head#fwd@0":
            return tensor.detach().float()
    raise UserError("the engine's probe yields no lm_head#fwd@0", remedy="see docs/taps.md")


@torch.no_grad()
def _exported_logits(folder: Path, tokens: Tensor) -> Tensor:
    from forgetrain.publish.generate import load_model

    return load_model(folder, torch.float32)(input_ids=tokens).logits.float()
