"""The oracle: one training step of the target's model in float64, from the formulas, with autograd.

It shares no code with ops, references or engines. Formulas: RMSNorm arXiv 1910.07467, RoPE arXiv 2104.09864 (halves
rotated, as Hugging Face stores heads), GQA arXiv 2305.13245, SwiGLU arXiv 2002.05202, AdamW arXiv 1711.05101, Muon
arXiv 2502.16982, muP scales as in MiniCPM (arXiv 2404.06395).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from forgetrain.numerics.compare import exact
from forgetrain.spec.model import Model
from forgetrain.spec.moments import by_muon
from forgetrain.spec.taps import forward_taps
from forgetrain.spec.target import Recipe, Target


@dataclass(frozen=True)
class OracleStep:
    """What one step gives, all float64. loss, grad_norm: []. start: the weights before it. grads: before clipping;
    clipped: after it; master: the weights after the update; these lie where they were computed, for of a billion
    parameters each takes 8 GB and seconds to move. taps: (full name, tensor) of every micro-batch in the order of
    ``spec.taps``, forward and gradient, in canonical layout; empty unless asked for."""

    loss: Tensor
    grad_norm: Tensor
    start: dict[str, Tensor]
    grads: dict[str, Tensor]
    lr: float
    recipe: Recipe
    taps: list[tuple[str, Tensor]] = field(default_factory=list)

    @functools.cached_property
    def clipped(self) -> dict[str, Tensor]:
        factor = min(1.0, self.recipe.clip / float(self.grad_norm))
        return {name: grad * factor for name, grad in self.grads.items()}

    @functools.cached_property
    def master(self) -> dict[str, Tensor]:
        return {name: self._updated(name) for name in self.start}

    def _updated(self, name: str) -> Tensor:
        weight = self.start[name]
        first = muon_first if by_muon(self.recipe, name, weight.dim()) else adamw_first
        return first(weight, self.clipped[name], self.lr, self.recipe)


def oracle_step(
    target: Target,
    weights: Mapping[str, Tensor],
    batch: Any,
    lr: float,
    *,
    precision: str = "fp32",
    taps: bool = False,
    device: str = "cpu",
) -> OracleStep:
    """The first optimizer step from ``weights`` (canonical names) and zero moments on ``batch``, on ``device``.

    With ``precision`` bf16 the weights are rounded to bf16 first, as the recipe's masters are; nothing else is. A GPU's
    memory is in use while what is returned is, and this process's until ``numerics.device.release``.
    """
    recipe = target.recipe
    start = {n: exact(w.to(device).bfloat16() if precision == "bf16" else w, device) for n, w in weights.items()}
    leaves = {name: weight.detach().requires_grad_() for name, weight in start.items()}
    batch = type(batch)(*(tensor.to(device) for tensor in batch))
    loss, seen = torch.zeros((), dtype=torch.float64), []
    positions, allowed = _documents(target, batch)
    rows = recipe.micro_batch_size
    for number, first in enumerate(range(0, batch.tokens.shape[0], rows)):
        part = slice(first, first + rows)
        places = _forward(target.model, leaves, batch.tokens[part], positions[part], allowed[part])
        nll = -torch.log_softmax(places["lm_head"], -1).gather(-1, batch.labels[part, :, None]).squeeze(-1)
        share = (nll * batch.mask[part].double()).sum() / batch.loss_denominator.double()
        places |= {"nll": nll, "loss": share}
        for tensor in places.values():
            tensor.retain_grad()
        share.backward()
        loss = loss + share.detach().cpu()
        if taps:
            names = [tap.name for tap in forward_taps(target.model)]
            seen += [(f"{name}#fwd@{number}", places[name].detach().cpu()) for name in names]
            seen += [
                (f"{name}#grad@{number}", _of(places[name]).cpu())
                for name in reversed(names)
                if name not in ("nll", "loss")
            ]
    grads = {name: _of(leaf) for name, leaf in leaves.items()}
    norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt().cpu()
    return OracleStep(loss, norm, start, grads, lr, recipe, seen)


def adamw_first(weight: Tensor, grad: Tensor, lr: float, recipe: Any) -> Tensor:
    """AdamW's first step from zero moments, whose corrected moments are the gradient and its square."""
    decay = recipe.weight_decay if weight.dim() >= 2 else 0.0
    return weight - lr * (grad / (grad.abs() + recipe.eps) + decay * weight)


def muon_first(weight: Tensor, grad: Tensor, lr: float, recipe: Any) -> Tensor:
    """Muon's first step from zero momentum, whose direction is the gradient's."""
    return weight - lr * (0.2 * max(weight.shape) ** 0.5 * orthogonal(grad) + recipe.weight_decay * weight)


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz as Muon iterates it (kellerjordan.github.io/posts/muon): five quintics in the dtype of x [A, B]."""
    wide = x.t() if x.shape[0] > x.shape[1] else x
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.t()
        wide = 3.4445 * wide - 4.7750 * gram @ wide + 2.0315 * gram @ gram @ wide
    return wide.t() if x.shape[0] > x.shape[1] else wide


def _of(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor).detach() if tensor.grad is None else tensor.grad


def _documents(target: Target, batch: Any) -> tuple[Tensor, Tensor]:
    """Positions [N, S] and which key each query may see [N, S, S], from the boundaries of documents."""
    n, s = batch.tokens.shape
    device = batch.tokens.device
    triangle = torch.ones(s, s, dtype=torch.bool, device=device).tril().expand(n, s, s)
    positions = torch.arange(s, device=device).expand(n, s)
    if target.data.documents == "ignore":
        return positions, triangle
    starts = torch.zeros(n * s, dtype=torch.bool, device=device)
    places = batch.cu_seqlens[batch.cu_seqlens < n * s].long()
    starts[places] = True
    document = starts.cumsum(0).view(n, s)
    if target.data.documents == "mask+reset":
        last = torch.where(starts, torch.arange(n * s, device=device), 0).cummax(0).values
        positions = (torch.arange(n * s, device=device) - last).view(n, s)
    return positions, triangle & (document[:, :, None] == document[:, None, :])


def _forward(
    model: Model, w: Mapping[str, Tensor], tokens: Tensor, position: Tensor, allowed: Tensor
) -> dict[str, Tensor]:
    """Every place of ``spec.taps.forward_taps`` up to the logits, [N, S, width]."""
    n, s = tokens.shape
    heads, groups, width = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    scale = 1.0 if model.residual_scale is None else model.residual_scale
    exponent = torch.arange(0, width, 2, dtype=torch.float64, device=tokens.device) / width
    angle = position[..., None].double() * model.rope_theta**-exponent
    cos, sin = angle.cos()[:, :, None, :], angle.sin()[:, :, None, :]
    out: dict[str, Tensor] = {}

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + model.rms_norm_eps).rsqrt() * w[name + ".weight"]

    def project(x: Tensor, name: str) -> Tensor:
        y = x @ w[name + ".weight"].t()
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def rotate(x: Tensor) -> Tensor:
        first, second = x.unflatten(-1, (-1, width)).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).flatten(2)

    x = w["model.embed_tokens.weight"][tokens] * (1.0 if model.scale_emb is None else model.scale_emb)
    out["model.embed_tokens"] = x
    for i in range(model.num_hidden_layers):
        layer = f"model.layers.{i}."
        attn, mlp = layer + "self_attn.", layer + "mlp."
        h = out[layer + "input_layernorm"] = norm(x, layer + "input_layernorm")
        for part in "qkv":
            out[f"{attn}{part}_proj"] = project(h, f"{attn}{part}_proj")
        q, k, v = (out[f"{attn}{part}_proj"] for part in "qkv")
        if model.qk_norm:
            q = out[attn + "q_norm"] = norm(q.unflatten(-1, (-1, width)), attn + "q_norm").flatten(2)
            k = out[attn + "k_norm"] = norm(k.unflatten(-1, (-1, width)), attn + "k_norm").flatten(2)
        q = out[attn + "q_rope"] = rotate(q)
        k = out[attn + "k_rope"] = rotate(k)
        scores = torch.einsum(
            "nqgrk,nsgk->ngrqs", q.view(n, s, groups, heads // groups, width), k.view(n, s, groups, width)
        )
        weights = (scores / math.sqrt(width)).masked_fill(~allowed[:, None, None], -math.inf).softmax(-1)
        context = torch.einsum("ngrqs,nsgk->nqgrk", weights, v.view(n, s, groups, width))
        out[attn + "attention"] = context.reshape(n, s, heads * width)
        out[attn + "o_proj"] = project(out[attn + "attention"], attn + "o_proj")
        x = out[layer + "attention_residual"] = x + out[attn + "o_proj"] * scale
        h = out[layer + "post_attention_layernorm"] = norm(x, layer + "post_attention_layernorm")
        gate = out[mlp + "gate_proj"] = project(h, mlp + "gate_proj")
        up = out[mlp + "up_proj"] = project(h, mlp + "up_proj")
        out[mlp + "swiglu"] = gate * torch.sigmoid(gate) * up
        out[mlp + "down_proj"] = project(out[mlp + "swiglu"], mlp + "down_proj")
        x = out[layer + "mlp_residual"] = x + out[mlp + "down_proj"] * scale
    h = out["model.norm"] = norm(x, "model.norm")
    h = h if model.logit_divisor is None else h / model.logit_divisor
    head = w["model.embed_tokens.weight"] if model.tie_word_embeddings else w["lm_head.weight"]
    out["lm_head"] = h @ head.t()
    return out
