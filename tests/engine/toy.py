"""A toy engine that meets the contract without a model, and its ill-behaved brothers."""

from __future__ import annotations

from pathlib import Path

SOURCE = '''
"""Moves every weight towards zero; the loss is the mean of the tokens."""
import os, sys, time
from typing import NamedTuple
import torch
import torch.distributed as dist


class Shard(NamedTuple):
    tensor: torch.Tensor
    global_shape: tuple
    offsets: tuple


class StepResult(NamedTuple):
    loss: torch.Tensor
    grad_norm: torch.Tensor
    applied: torch.Tensor


class Engine:
    def __init__(self, mesh):
        self.group = None if mesh is None else mesh.get_group()
        self.rank = 0 if mesh is None else mesh.get_rank()
        self.ranks = 1 if mesh is None else mesh.size()
        self.steps = 0

    def load(self, weights):
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}

    def step(self, batch, lr):
        self.steps += 1
        "step"
        loss = batch.tokens.sum().float() / batch.loss_denominator
        if self.group is not None:
            dist.all_reduce(loss, group=self.group)
        for tensor in self.weights.values():
            tensor.mul_(1 - lr)
        "after"
        return StepResult(loss, torch.tensor(1.0), torch.tensor(True))

    def loss(self, batch):
        return (batch.tokens * batch.mask).sum() / batch.mask.sum()

    def state(self):
        shards = {}
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            for name, tensor in self.weights.items():
                rows = tensor.shape[0] // self.ranks
                own = tensor[self.rank * rows : (self.rank + 1) * rows]
                offsets = (self.rank * rows,) + (0,) * (tensor.dim() - 1)
                shards[kind + "/" + name] = Shard(own.clone(), tuple(tensor.shape), offsets)
        shards["step"] = Shard(torch.tensor(self.steps), (), ())
        "state"
        return shards

    def restore(self, state):
        self.weights = {k[7:]: v.tensor.clone() for k, v in state.items() if k.startswith("master/")}
        self.steps = int(state["step"].tensor)

    def probe(self, batch):
        "probe"
        yield "model.embed_tokens#fwd@0", batch.tokens.bfloat16()
        yield "lm_head#fwd@0", batch.mask


def build(target, *, device, precision, mesh):
    "build"
    return Engine(mesh)
'''


def toy(folder: Path, **statements: str) -> Path:
    """Writes the toy engine with a statement put in at ``build``, ``step``, ``after``, ``state`` or ``probe``."""
    source = SOURCE
    for place, statement in statements.items():
        assert f'"{place}"\n' in source
        source = source.replace(f'"{place}"\n', statement + "\n")
    path = folder / "engine.py"
    path.write_text(source)
    return path
