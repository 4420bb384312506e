"""A pre-training engine for nano-cpu, written by ForgeTrain: forward, loss, backward, update.

Aligned with megatron in fp32: torch 2.13.0, device cpu, processor AMD EPYC, capability AVX2, threads 2, ranks 1, megatron-core 0.16.1.
Golden record 83a0c2e9e29395c3459d163b1e9792cd17f6743e0f71072383cbe6b4ebdf6fe7.
Its verdicts are kept under this file's SHA-256, in verdicts.json beside it.

Plan:
    token_order = sequence
    qkv = grouped
    gate_up = fused
    qkv_sum = q+k+v
    norm_order = megatron
    embedding = textbook
    rmsnorm = torch
    linear = textbook
    rope_tables = fp32
    rope = megatron
    attention = megatron
    residual = textbook
    swiglu = torch
    cross_entropy = megatron
    accumulate = zeros
    clip = megatron
    adamw = torch
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

MODEL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 4096,
    "rope_theta": 5000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "qk_norm": False,
    "scale_emb": None,
    "scale_depth": None,
    "dim_model_base": None,
}
DOCUMENTS = "ignore"
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 7, 16, 2, 32
HIDDEN, INTERMEDIATE, VOCAB = 256, 768, 4096
Q_WIDTH, KV_WIDTH = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
EPS, ROPE_THETA = 1e-06, 5000000.0

# ---------------------------------------------------------------------------------------------------------------------
# Ops. Each forward returns what its backward needs; shapes: N rows, S positions, T = N * S tokens.


def embedding_textbook_forward(tokens: Tensor, weight: Tensor) -> tuple[Tensor, tuple]:
    return weight[tokens], (tokens, weight.shape)


def embedding_textbook_backward(saved: tuple, d_out: Tensor) -> Tensor:
    tokens, shape = saved
    d_weight = torch.zeros(shape, dtype=torch.float32, device=d_out.device)
    d_weight.index_add_(0, tokens.reshape(-1), d_out.reshape(-1, shape[1]).float())
    return d_weight.to(d_out.dtype)


def record_beside_residual(norm: Callable, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple]:
    """Records the norm and, after it, the path past it, so that the backward pass adds their gradients as autograd."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        out = norm(x, weight)
        residual = x.view_as(x)
    return out.detach(), (out, residual, x, weight)


def rmsnorm_torch_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, tuple]:
    return record_beside_residual(lambda x, w: F.rms_norm(x, w.shape, w, eps), x, weight)


def pull_beside_residual(saved: tuple, d_out: Tensor, d_residual: Tensor | None) -> tuple[Tensor, ...]:
    out, residual, x, weight = saved
    if d_residual is None:
        return torch.autograd.grad(out, (x, weight), d_out)
    return torch.autograd.grad((out, residual), (x, weight), (d_out, d_residual))


def rmsnorm_torch_backward(saved: tuple, d_out: Tensor, d_residual: Tensor | None = None) -> tuple[Tensor, ...]:
    return pull_beside_residual(saved, d_out, d_residual)


def linear_textbook_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple]:
    out = x @ weight.t()
    return out if bias is None else out + bias, (x, weight, bias)


def linear_textbook_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    x, weight, bias = saved
    d_x, d_weight = d_out @ weight, d_out.t() @ x
    return (d_x, d_weight) if bias is None else (d_x, d_weight, d_out.sum(0))


def rope_tables_fp32_forward(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Angles in fp32 from 1 / theta^(2i/K), formed where the positions are."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / (theta**exponents))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def record(function: Callable, *inputs: Tensor) -> tuple[Tensor, tuple]:
    """Runs ``function`` on leaves that share the inputs' memory. Returns its output, detached, and what pull needs."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    with torch.enable_grad():
        out = function(*leaves)
    return out.detach(), (out, leaves)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rope_megatron(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Megatron's, with the (empty) part of a head that is not turned: its gradient's zeros are added to the others."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)


def rope_megatron_forward(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, tuple]:
    cos, sin = cos[:, :, None, :].to(x.dtype), sin[:, :, None, :].to(x.dtype)
    return record(lambda x: rope_megatron(x, cos, sin), x)


def pull(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the recorded inputs, in their order."""
    out, leaves = saved
    return torch.autograd.grad(out, leaves, d_out)


def rope_megatron_backward(saved: tuple, d_out: Tensor) -> Tensor:
    return pull(saved, d_out)[0]


def causal(q: Tensor) -> Tensor:
    """bool [1, S, S], true on and below the diagonal."""
    s = q.shape[1]
    return torch.ones(1, s, s, dtype=torch.bool, device=q.device).tril()


def attention_megatron(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Megatron's local attention: sequence first, scaled inside the product, masked with -10000, softmax in fp32."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    s, n, h, d = q.shape
    groups = h // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    q, k, v = (x.reshape(s, n * h, d) for x in (q, k, v))
    scores = torch.baddbmm(
        torch.empty(n * h, s, s, dtype=q.dtype, device=q.device),
        q.transpose(0, 1),
        k.transpose(0, 1).transpose(1, 2),
        beta=0.0,
        alpha=d**-0.5,
    )
    scores = scores.view(n, h, s, s)
    if q.dtype != torch.float32:
        scores = scores.float()
    probabilities = torch.softmax(scores.masked_fill(~allowed[:, None], -10000.0), dim=-1).to(q.dtype)
    out = torch.bmm(probabilities.view(n * h, s, s), v.transpose(0, 1))
    return out.view(n, h, s, d).permute(2, 0, 1, 3).contiguous().transpose(0, 1)


def attention_megatron_forward(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> tuple[Tensor, tuple]:
    allowed = causal(q) if allowed is None else allowed
    return record(lambda q, k, v: attention_megatron(q, k, v, allowed), q, k, v)


def attention_megatron_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    return pull(saved, d_out)


def residual_textbook_forward(x: Tensor, branch: Tensor, scale: float | None) -> tuple[Tensor, float | None]:
    return torch.add(x, branch, alpha=1.0 if scale is None else scale), scale


def residual_textbook_backward(saved: float | None, d_out: Tensor) -> Tensor:
    return d_out if saved is None else d_out * saved


def swiglu_torch_forward(gate: Tensor, up: Tensor) -> tuple[Tensor, tuple]:
    return record(lambda gate, up: F.silu(gate) * up, gate, up)


def swiglu_torch_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    return pull(saved, d_out)


def cross_entropy_megatron_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, tuple]:
    """Megatron's vocabulary-parallel form on one rank: log(sum(exp(logits - max))) - (logits[label] - max)."""
    wide = logits.float()
    wide = wide - wide.max(dim=-1)[0][:, None]
    predicted = wide[torch.arange(labels.shape[0], device=labels.device), labels]
    exponentials = torch.exp(wide)
    total = exponentials.sum(dim=-1)
    return torch.log(total) - predicted, (exponentials.div_(total[:, None]), labels, logits.dtype)


def cross_entropy_megatron_backward(saved: tuple, d_nll: Tensor) -> Tensor:
    softmax, labels, dtype = saved
    softmax[torch.arange(labels.shape[0], device=labels.device), labels] -= 1.0
    return softmax.mul_(d_nll[:, None]).to(dtype)


def accumulate_zeros_forward(total: Tensor | None, grad: Tensor) -> Tensor:
    total = torch.zeros_like(grad, dtype=torch.float32) if total is None else total
    return total.add_(grad)


def clip_megatron_forward(grads: list[Tensor], clip: float) -> Tensor:
    """Megatron without Apex or Transformer Engine: the norm of the norms on the host, squared in fp32, its root and the
    factor in double."""
    norms = torch.stack([torch.norm(grad) for grad in grads]).cpu()
    norm = (torch.norm(norms) ** 2.0).double() ** 0.5
    factor = clip / (norm + 1.0e-6)
    if factor < 1.0:
        for grad in grads:
            grad.copy_(grad * float(factor))
    return norm.float().to(grads[0].device)


def adamw_torch_forward(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, beta1: float, beta2: float, eps: float, decay: float
) -> None:
    """torch.optim.AdamW's order of operations, which Megatron uses too where Apex and Transformer Engine are absent."""
    p.mul_(1 - lr * decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    denominator = (v.sqrt() / correction2**0.5).add_(eps)
    p.addcdiv_(m, denominator, value=-(lr / correction1))


# ---------------------------------------------------------------------------------------------------------------------
# Weights: names of the tensors as stored here, and how they map to canonical (Hugging Face) names.


def stored_names() -> list[str]:
    """The tensors that this engine keeps, in forward order."""
    names = ["model.embed_tokens.weight"]
    for i in range(LAYERS):
        names += [
            f"model.layers.{i}.{name}"
            for name in [
                "input_layernorm.weight",
                "self_attn.qkv_proj.weight",
                "self_attn.o_proj.weight",
                "post_attention_layernorm.weight",
                "mlp.gate_up_proj.weight",
                "mlp.down_proj.weight",
            ]
        ]
    return [*names, "model.norm.weight", "lm_head.weight"]


def canonical_names() -> list[str]:
    """The parameters under their canonical names, in forward order."""
    names = ["model.embed_tokens.weight"]
    for i in range(LAYERS):
        names += [
            f"model.layers.{i}.{name}"
            for name in [
                "input_layernorm.weight",
                "self_attn.q_proj.weight",
                "self_attn.k_proj.weight",
                "self_attn.v_proj.weight",
                "self_attn.o_proj.weight",
                "post_attention_layernorm.weight",
                "mlp.gate_proj.weight",
                "mlp.up_proj.weight",
                "mlp.down_proj.weight",
            ]
        ]
    return [*names, "model.norm.weight", "lm_head.weight"]


def norm_order() -> list[str]:
    """The order in which tensors enter the sum of the global gradient norm."""
    matrices, vectors = (
        ["self_attn.o_proj.weight", "self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"],
        ["input_layernorm.weight", "post_attention_layernorm.weight"],
    )
    decayed = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in matrices]
    others = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in vectors]
    return ["model.embed_tokens.weight", *decayed, "lm_head.weight", *others, "model.norm.weight"]


def pack(canonical: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical tensors as this engine stores them."""
    stored = dict(canonical)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for kind in ["weight"]:
            parts = [stored.pop(f"{layer}self_attn.{name}_proj.{kind}") for name in "qkv"]
            # Megatron's interleaving: for each group its query heads, then its key, then its value
            parts = [part.unflatten(0, (KV_HEADS, -1)) for part in parts]
            stored[f"{layer}self_attn.qkv_proj.{kind}"] = torch.cat(parts, dim=1).flatten(0, 1)
        gate_up = [stored.pop(f"{layer}mlp.{name}_proj.weight") for name in ("gate", "up")]
        stored[f"{layer}mlp.gate_up_proj.weight"] = torch.cat(gate_up)
    return stored


def unpack(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of pack."""
    canonical = dict(stored)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for kind in ["weight"]:
            qkv = canonical.pop(f"{layer}self_attn.qkv_proj.{kind}")
            rows = [HEADS // KV_HEADS * HEAD_DIM, HEAD_DIM, HEAD_DIM]
            parts = [part.flatten(0, 1) for part in qkv.unflatten(0, (KV_HEADS, -1)).split(rows, dim=1)]
            for name, part in zip("qkv", parts, strict=True):
                canonical[f"{layer}self_attn.{name}_proj.{kind}"] = part
        gate, up = canonical.pop(f"{layer}mlp.gate_up_proj.weight").split(INTERMEDIATE)
        canonical[f"{layer}mlp.gate_proj.weight"], canonical[f"{layer}mlp.up_proj.weight"] = gate, up
    return canonical


# ---------------------------------------------------------------------------------------------------------------------
# The engine.


class StepResult(NamedTuple):
    loss: Tensor
    grad_norm: Tensor
    applied: Tensor


class Shard(NamedTuple):
    tensor: Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]


class MicroBatch(NamedTuple):
    tokens: Tensor  # int64 [N, S]
    labels: Tensor  # int64 [N, S]
    mask: Tensor  # float32 [N, S]
    cos: Tensor  # float32 [N, S, K], in this engine's order of tokens
    sin: Tensor
    allowed: Tensor | None  # bool [N, S, S], or None for plain causal attention
    denominator: Tensor  # float32 []


Tap = Callable[[str, Tensor], None]


def no_tap(name: str, tensor: Tensor) -> None:
    """Where taps go in a step that nobody watches."""


def in_token_order(x: Tensor) -> Tensor:
    """[N, S, ...] to this engine's order, [S, N, ...]; the same function leads back."""
    return x.transpose(0, 1)


class Engine:
    def __init__(self, recipe: Mapping[str, Any], device: str, dtype: torch.dtype, group: Any) -> None:
        self.recipe, self.device, self.dtype, self.group = recipe, device, dtype, group
        self.master: dict[str, Tensor] = {}  # fp32, the weights that are trained
        self.weight: dict[str, Tensor] = {}  # the same in the compute dtype; in fp32 the very same tensors
        self.exp_avg: dict[str, Tensor] = {}
        self.exp_avg_sq: dict[str, Tensor] = {}
        self.updates = 0

    # Forward and backward of one micro-batch.

    def forward(self, micro: MicroBatch, tap: Tap = no_tap) -> tuple[Tensor, list]:
        """The micro-batch's share of the loss, float32 [], and what the backward pass needs."""
        w, saved = self.weight, []
        n, s = micro.tokens.shape
        x, kept = embedding_textbook_forward(micro.tokens, w["model.embed_tokens.weight"])
        saved.append(kept)
        x = in_token_order(x).reshape(n * s, HIDDEN)
        tap("model.embed_tokens", x)
        for i in range(LAYERS):
            x, kept = self.layer_forward(f"model.layers.{i}.", x, micro, tap)
            saved.append(kept)
        x, norm = rmsnorm_torch_forward(x, w["model.norm.weight"], EPS)
        tap("model.norm", x)
        logits, head = linear_textbook_forward(x, w["lm_head.weight"], None)
        tap("lm_head", logits)
        labels = in_token_order(micro.labels).reshape(n * s)
        nll, entropy = cross_entropy_megatron_forward(logits, labels)
        nll = in_token_order(nll.view(s, n)).contiguous()
        loss = (nll * micro.mask).sum() / micro.denominator
        tap("nll", nll)
        tap("loss", loss)
        saved.append((norm, head, entropy))
        return loss, saved

    def layer_forward(self, layer: str, x: Tensor, micro: MicroBatch, tap: Tap) -> tuple[Tensor, tuple]:
        w = self.weight
        attn, mlp = layer + "self_attn.", layer + "mlp."
        h, norm1 = rmsnorm_torch_forward(x, w[layer + "input_layernorm.weight"], EPS)
        tap(layer + "input_layernorm", h)
        qkv, qkv_proj = linear_textbook_forward(h, w[attn + "qkv_proj.weight"], None)
        q, k, v = self.split_heads(qkv, micro)
        tap(attn + "q_proj", q)
        tap(attn + "k_proj", k)
        tap(attn + "v_proj", v)
        q, q_rope = rope_megatron_forward(q, micro.cos, micro.sin)
        k, k_rope = rope_megatron_forward(k, micro.cos, micro.sin)
        tap(attn + "q_rope", q)
        tap(attn + "k_rope", k)
        q, k, v = in_token_order(q), in_token_order(k), in_token_order(v)
        context, attention = attention_megatron_forward(q, k, v, micro.allowed)
        context = in_token_order(context).reshape(-1, Q_WIDTH)
        tap(attn + "attention", context)
        branch, o_proj = linear_textbook_forward(context, w[attn + "o_proj.weight"], None)
        tap(attn + "o_proj", branch)
        x, residual1 = residual_textbook_forward(x, branch, None)
        tap(layer + "attention_residual", x)
        h, norm2 = rmsnorm_torch_forward(x, w[layer + "post_attention_layernorm.weight"], EPS)
        tap(layer + "post_attention_layernorm", h)
        gate_up, gate_up_proj = linear_textbook_forward(h, w[mlp + "gate_up_proj.weight"], None)
        gate, up = gate_up.split(INTERMEDIATE, dim=-1)
        tap(mlp + "gate_proj", gate)
        tap(mlp + "up_proj", up)
        h, swiglu = swiglu_torch_forward(gate, up)
        tap(mlp + "swiglu", h)
        branch, down_proj = linear_textbook_forward(h, w[mlp + "down_proj.weight"], None)
        tap(mlp + "down_proj", branch)
        x, residual2 = residual_textbook_forward(x, branch, None)
        tap(layer + "mlp_residual", x)
        attention_part = (norm1, qkv_proj, q_rope, k_rope, attention, o_proj, residual1)
        return x, (attention_part, (norm2, gate_up_proj, swiglu, down_proj, residual2))

    def backward(self, micro: MicroBatch, saved: list, grads: dict[str, Tensor], tap: Tap = no_tap) -> None:
        """Adds the micro-batch's gradients to ``grads``."""
        n, s = micro.tokens.shape
        norm, head, entropy = saved.pop()
        d_nll = micro.mask * (1.0 / micro.denominator)
        d_logits = cross_entropy_megatron_backward(entropy, in_token_order(d_nll).reshape(n * s))
        tap("lm_head", d_logits)
        dx, d_head = linear_textbook_backward(head, d_logits)
        tap("model.norm", dx)
        dx, d_weight = rmsnorm_torch_backward(norm, dx)
        add(grads, "model.norm.weight", d_weight)
        for i in reversed(range(LAYERS)):
            dx = self.layer_backward(f"model.layers.{i}.", dx, saved.pop(), micro, grads, tap)
        tap("model.embed_tokens", dx)
        dx = in_token_order(dx.view(s, n, HIDDEN))
        d_embedding = embedding_textbook_backward(saved.pop(), dx)
        add(grads, "lm_head.weight", d_head)
        add(grads, "model.embed_tokens.weight", d_embedding)

    def layer_backward(
        self, layer: str, dx: Tensor, saved: tuple, micro: MicroBatch, grads: dict[str, Tensor], tap: Tap
    ) -> Tensor:
        attn, mlp = layer + "self_attn.", layer + "mlp."
        attention_part, (norm2, gate_up_proj, swiglu, down_proj, residual2) = saved
        norm1, qkv_proj, q_rope, k_rope, attention, o_proj, residual1 = attention_part
        tap(layer + "mlp_residual", dx)
        d_branch = residual_textbook_backward(residual2, dx)
        tap(mlp + "down_proj", d_branch)
        d_out, d_weight = linear_textbook_backward(down_proj, d_branch)
        add(grads, mlp + "down_proj.weight", d_weight)
        tap(mlp + "swiglu", d_out)
        d_gate, d_up = swiglu_torch_backward(swiglu, d_out)
        tap(mlp + "up_proj", d_up)
        tap(mlp + "gate_proj", d_gate)
        d_out, d_weight = linear_textbook_backward(gate_up_proj, torch.cat((d_gate, d_up), dim=-1))
        add(grads, mlp + "gate_up_proj.weight", d_weight)
        tap(layer + "post_attention_layernorm", d_out)
        dx, d_weight = rmsnorm_torch_backward(norm2, d_out, dx)
        add(grads, layer + "post_attention_layernorm.weight", d_weight)
        tap(layer + "attention_residual", dx)
        d_branch = residual_textbook_backward(residual1, dx)
        tap(attn + "o_proj", d_branch)
        d_context, d_weight = linear_textbook_backward(o_proj, d_branch)
        add(grads, attn + "o_proj.weight", d_weight)
        tap(attn + "attention", d_context)
        d_context = in_token_order(self.heads(d_context, micro))
        dq, dk, dv = attention_megatron_backward(attention, d_context)
        dq, dk, dv = in_token_order(dq), in_token_order(dk), in_token_order(dv)
        tap(attn + "k_rope", dk)
        tap(attn + "q_rope", dq)
        dk = rope_megatron_backward(k_rope, dk)
        dq = rope_megatron_backward(q_rope, dq)
        tap(attn + "v_proj", dv)
        tap(attn + "k_proj", dk)
        tap(attn + "q_proj", dq)
        d_out, d_weight = linear_textbook_backward(qkv_proj, self.join_heads(dq, dk, dv))
        add(grads, attn + "qkv_proj.weight", d_weight)
        tap(layer + "input_layernorm", d_out)
        dx, d_weight = rmsnorm_torch_backward(norm1, d_out, dx)
        add(grads, layer + "input_layernorm.weight", d_weight)
        return dx

    def heads(self, x: Tensor, micro: MicroBatch) -> Tensor:
        """[T, width] as heads in this engine's order of tokens: [S, N, heads, K]."""
        n, s = micro.tokens.shape
        return x.view(s, n, -1, HEAD_DIM)

    def split_heads(self, qkv: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The product's columns, query heads, key and value of each group in turn, as heads."""
        n, s = micro.tokens.shape
        rows = [HEADS // KV_HEADS * HEAD_DIM, HEAD_DIM, HEAD_DIM]
        q, k, v = qkv.view(s, n, KV_HEADS, -1).split(rows, dim=-1)
        return q.reshape(*q.shape[:2], HEADS, HEAD_DIM), k, v

    def join_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [part.reshape(*part.shape[:2], KV_HEADS, -1) for part in (q, k, v)]
        return torch.cat(parts, dim=-1).flatten(0, 1).flatten(1)

    # One step: micro-batches, reduction, clipping, update.

    def micro_batches(self, batch: Any, denominator: Tensor) -> Iterable[MicroBatch]:
        """The batch's rows in micro-batches, each with its positions and mask."""
        rows, (n, s) = self.recipe["micro_batch_size"], batch.tokens.shape
        position = torch.arange(s, device=self.device).expand(n, s)
        for start in range(0, n, rows):
            row = slice(start, start + rows)
            cos, sin = rope_tables_fp32_forward(in_token_order(position[row]), HEAD_DIM, ROPE_THETA)
            allowed = None
            yield MicroBatch(batch.tokens[row], batch.labels[row], batch.mask[row], cos, sin, allowed, denominator)

    def gradients(self, batch: Any, taps: Callable[[int, bool], Tap]) -> tuple[Tensor, dict[str, Tensor]]:
        """The step's loss and summed fp32 gradients, over micro-batches and ranks."""
        loss = torch.zeros((), device=self.device)
        grads: dict[str, Tensor] = {}
        for number, micro in enumerate(self.micro_batches(batch, batch.loss_denominator)):
            share, saved = self.forward(micro, taps(number, True))
            self.backward(micro, saved, grads, taps(number, False))
            loss = loss + share
        if self.group is not None:
            for grad in grads.values():
                dist.all_reduce(grad, group=self.group)
            dist.all_reduce(loss, group=self.group)
        return loss, grads

    @torch.no_grad()
    def step(self, batch: Any, lr: float) -> StepResult:
        loss, grads = self.gradients(batch, lambda number, forward: no_tap)
        norm = clip_megatron_forward([grads[name] for name in norm_order()], self.recipe["clip"])
        applied = torch.isfinite(norm)
        if applied:
            self.update(grads, lr)
        return StepResult(loss, norm, applied)

    def update(self, grads: dict[str, Tensor], lr: float) -> None:
        r = self.recipe
        self.updates += 1
        for name, master in self.master.items():
            decay = r["weight_decay"] if master.dim() > 1 else 0.0
            moments = self.exp_avg[name], self.exp_avg_sq[name]
            adamw_torch_forward(
                master, grads[name], *moments, self.updates, lr, r["beta1"], r["beta2"], r["eps"], decay
            )
            if self.weight[name] is not master:
                self.weight[name].copy_(master)

    @torch.no_grad()
    def loss(self, batch: Any) -> Tensor:
        """The mean loss of this rank's rows over their mask."""
        shares = [self.forward(micro)[0] for micro in self.micro_batches(batch, batch.mask.sum())]
        return torch.stack(shares).sum()

    @torch.no_grad()
    def watch(self, batch: Any, see: Callable[[str, Tensor], None]) -> None:
        """Every tap of a step whose update is left out, shown to ``see`` as it is computed; ``see`` may raise."""
        rows, s = self.recipe["micro_batch_size"], batch.tokens.shape[1]

        def taps(number: int, forward: bool) -> Tap:
            def tap(place: str, tensor: Tensor) -> None:
                if place not in ("nll", "loss"):
                    tensor = in_token_order(tensor.reshape(s, rows, -1))
                see(f"{place}#{'fwd' if forward else 'grad'}@{number}", tensor)

            return tap

        _, grads = self.gradients(batch, taps)
        for kind in ("grad", "clipped"):
            if kind == "clipped":
                clip_megatron_forward([grads[name] for name in norm_order()], self.recipe["clip"])
            canonical = unpack(grads)
            for name in reversed(canonical_names()):
                see(f"{name}#{kind}", canonical[name])

    def probe(self, batch: Any) -> Iterable[tuple[str, Tensor]]:
        """Every tap of a step whose update is left out."""
        seen: list[tuple[str, Tensor]] = []
        self.watch(batch, lambda name, tensor: seen.append((name, tensor.contiguous().clone())))
        return seen

    # Weights and state.

    def load(self, weights: Mapping[str, Tensor]) -> None:
        stored = pack({name: tensor.to(self.device, self.dtype) for name, tensor in weights.items()})
        if set(stored) != set(stored_names()):
            raise ValueError(f"weights do not fit this engine: {sorted(set(stored) ^ set(stored_names()))[:3]}")
        self._set_master({name: stored[name].float() for name in stored_names()})
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.master.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.master.items()}
        self.updates = 0

    def _set_master(self, master: dict[str, Tensor]) -> None:
        self.master = {name: tensor.contiguous().clone() for name, tensor in master.items()}
        self.weight = {name: p if self.dtype == torch.float32 else p.to(self.dtype) for name, p in self.master.items()}

    def state(self) -> dict[str, Shard]:
        kinds = {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        shards = {}
        for kind, stored in kinds.items():
            canonical = unpack(stored)
            for name in canonical_names():
                tensor = canonical[name]
                shards[f"{kind}/{name}"] = Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim())
        return {**shards, "step": Shard(torch.tensor(self.updates), (), ())}

    def restore(self, state: Mapping[str, Any]) -> None:
        def of(kind: str) -> dict[str, Tensor]:
            prefix = kind + "/"
            found = {k.removeprefix(prefix): v.tensor for k, v in state.items() if k.startswith(prefix)}
            stored = pack({name: tensor.to(self.device, torch.float32) for name, tensor in found.items()})
            return {name: stored[name].contiguous().clone() for name in stored_names()}

        self._set_master(of("master"))
        self.exp_avg, self.exp_avg_sq = of("exp_avg"), of("exp_avg_sq")
        self.updates = int(state["step"].tensor)


def add(grads: dict[str, Tensor], name: str, grad: Tensor) -> None:
    grads[name] = accumulate_zeros_forward(grads.get(name), grad)


def build(target: Mapping[str, Any], *, device: str, precision: str, mesh: Any = None) -> Engine:
    """The one factory; ``target`` is a target's plain values and must be of the model this file was written for."""
    for key, value in MODEL.items():
        if target["model"][key] != value:
            raise ValueError(f"this engine is for model.{key} = {value!r}, the target has {target['model'][key]!r}")
    if target["data"]["documents"] != DOCUMENTS:
        raise ValueError(f"this engine is for data.documents = {DOCUMENTS!r}, got {target['data']['documents']!r}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return Engine(target["recipe"], device, dtype, None if mesh is None else mesh.get_group())
