"""All ops and their variants, under the names by which plans choose them."""

from __future__ import annotations

from forgetrain.ops import (
    accumulate,
    adamw,
    attention,
    clip,
    cross_entropy,
    embedding,
    linear,
    muon,
    mup,
    residual,
    rmsnorm,
    rope,
    swiglu,
)
from forgetrain.ops.variant import Variant

OPS: dict[str, dict[str, Variant]] = {
    "embedding": embedding.VARIANTS,
    "rmsnorm": rmsnorm.VARIANTS,
    "linear": linear.VARIANTS,
    "qk_norm": rmsnorm.VARIANTS,
    "rope_tables": rope.TABLES,
    "rope": rope.VARIANTS,
    "attention": attention.VARIANTS,
    "residual": residual.VARIANTS,
    "swiglu": swiglu.VARIANTS,
    "mup": mup.VARIANTS,
    "cross_entropy": cross_entropy.VARIANTS,
    "accumulate": accumulate.VARIANTS,
    "clip": clip.VARIANTS,
    "adamw": adamw.VARIANTS,
    "muon": muon.VARIANTS,
}
