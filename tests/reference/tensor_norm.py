"""megatron-core as it is on a GPU, where the norm of the gradients is a tensor of one number."""

from __future__ import annotations

from typing import Any

import torch

from forgetrain.reference import megatron


def build(*args: Any, **options: Any) -> Any:
    engine = megatron.build(*args, **options)
    inner = engine._inner()
    clip = inner.clip_grad_norm
    inner.clip_grad_norm = lambda limit: torch.tensor([clip(limit)])
    return engine
