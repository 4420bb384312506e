"""The contestants of bench/cpu.py, each in a process of its own: builds a trainer, then measures when told to.

    python bench/cpu_contestants.py NAME SETTINGS       # requests as JSON lines on stdin, answers on stdout

Every contestant takes whole optimizer steps: forward, backward, clipping at 1, AdamW, on fresh random tokens each step.
``engine`` and ``megatron`` go through the engine contract; the others are written as people write them, with torch's
fused AdamW and scaled-dot-product attention. In bf16 the peers run pure (bf16 weights and moments, less work than the
engine's fp32 masters) or under autocast over fp32 weights.

Imports forgetrain inside the contestants that need it: litgpt lives in an environment of its own.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[Tensor], Tensor]  # tokens [N, S + 1] -> the loss


def engine(settings: dict) -> Step:
    """A forged engine's file."""
    from forgetrain.engine.write import load_engine

    return through_contract(load_engine(settings["engine"]), settings)


def megatron(settings: dict) -> Step:
    """Megatron-core's model and optimizer, local layer spec, as the reference adapter builds them."""
    from forgetrain.reference import megatron

    return through_contract(megatron, settings)


def through_contract(module: Any, settings: dict) -> Step:
    from forgetrain.engine.contract import make_batch
    from forgetrain.numerics.init import initial_weights
    from forgetrain.spec.target import parse_target

    target = parse_target(settings["target"], file="settings")
    built = module.build(target.plain(), device="cpu", precision=settings["dtype"], mesh=None)
    built.load(initial_weights(target.model, target.recipe.seed))

    def step(tokens: Tensor) -> Tensor:
        return built.step(make_batch(tokens[:, :-1], tokens[:, 1:]), 1e-3).loss

    return step


def transformers(settings: dict) -> Step:
    """transformers' Llama with scaled-dot-product attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    m = settings["target"]["model"]
    config = LlamaConfig(
        vocab_size=m["vocab_size"], hidden_size=m["hidden_size"], intermediate_size=m["intermediate_size"],
        num_hidden_layers=m["num_hidden_layers"], num_attention_heads=m["num_attention_heads"],
        num_key_value_heads=m["num_key_value_heads"], head_dim=m["head_dim"], rms_norm_eps=m["rms_norm_eps"],
        rope_theta=m["rope_theta"], tie_word_embeddings=m["tie_word_embeddings"], attn_implementation="sdpa",
        use_cache=False, max_position_embeddings=m["max_position_embeddings"],
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    return as_people_write_it(network, lambda model, tokens: model(input_ids=tokens).logits, settings)


def litgpt(settings: dict) -> Step:
    """LitGPT's model."""
    from litgpt import GPT, Config

    m = settings["target"]["model"]
    config = Config(
        block_size=m["max_position_embeddings"], n_layer=m["num_hidden_layers"], n_embd=m["hidden_size"],
        vocab_size=m["vocab_size"], padded_vocab_size=m["vocab_size"], n_head=m["num_attention_heads"],
        n_query_groups=m["num_key_value_heads"], head_size=m["head_dim"], intermediate_size=m["intermediate_size"],
        norm_class_name="RMSNorm", norm_eps=m["rms_norm_eps"], mlp_class_name="LLaMAMLP", bias=False,
        parallel_residual=False, rotary_percentage=1.0, rope_base=int(m["rope_theta"]),
    )  # fmt: skip
    network = GPT(config)
    network.max_seq_length = settings["target"]["recipe"]["sequence_length"]
    return as_people_write_it(network, lambda model, tokens: model(tokens), settings)


class TextbookBlock(nn.Module):
    def __init__(self, m: dict):
        super().__init__()
        self.m = m
        heads, groups, size, wide = m["num_attention_heads"], m["num_key_value_heads"], m["head_dim"], m["hidden_size"]
        self.norm1, self.norm2 = nn.RMSNorm(wide, m["rms_norm_eps"]), nn.RMSNorm(wide, m["rms_norm_eps"])
        self.qkv = nn.Linear(wide, (heads + 2 * groups) * size, bias=False)
        self.out = nn.Linear(heads * size, wide, bias=False)
        self.gate_up = nn.Linear(wide, 2 * m["intermediate_size"], bias=False)
        self.down = nn.Linear(m["intermediate_size"], wide, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        (n, s, _), m = x.shape, self.m
        heads, groups, size = m["num_attention_heads"], m["num_key_value_heads"], m["head_dim"]
        qkv = self.qkv(self.norm1(x)).view(n, s, -1, size).transpose(1, 2)
        q, k, v = qkv.split([heads, groups, groups], dim=1)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
        x = x + self.out(attended.transpose(1, 2).reshape(n, s, -1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Textbook(nn.Module):
    """The model as a nanoGPT-style script has it: one file, fused projections, torch's attention."""

    def __init__(self, m: dict, length: int):
        super().__init__()
        self.embed = nn.Embedding(m["vocab_size"], m["hidden_size"])
        self.blocks = nn.ModuleList(TextbookBlock(m) for _ in range(m["num_hidden_layers"]))
        self.norm = nn.RMSNorm(m["hidden_size"], m["rms_norm_eps"])
        self.head = nn.Linear(m["hidden_size"], m["vocab_size"], bias=False)
        if m["tie_word_embeddings"]:
            self.head.weight = self.embed.weight
        inverse = m["rope_theta"] ** (-torch.arange(0, m["head_dim"], 2) / m["head_dim"])
        angle = torch.arange(length)[:, None] * inverse[None]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def textbook(settings: dict) -> Step:
    network = Textbook(settings["target"]["model"], settings["target"]["recipe"]["sequence_length"])
    return as_people_write_it(network, lambda model, tokens: model(tokens), settings)


def as_people_write_it(network: nn.Module, logits_of: Callable[[Any, Tensor], Tensor], settings: dict) -> Step:
    """A training step in plain PyTorch; ``mode`` is eager or compile, ``dtype`` fp32, bf16 or autocast."""
    if settings["dtype"] == "bf16":
        network = network.to(torch.bfloat16)
    network.train()
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    mixed = torch.autocast("cpu", torch.bfloat16) if settings["dtype"] == "autocast" else contextlib.nullcontext()

    def loss_of(tokens: Tensor) -> Tensor:
        logits = logits_of(network, tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    compute = torch.compile(loss_of) if settings["mode"] == "compile" else loss_of

    def step(tokens: Tensor) -> Tensor:
        with mixed:
            loss = compute(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def products(settings: dict) -> Step:
    """No trainer: the matrix products of one step alone, each with operands of its own, attention's by half."""
    m, recipe = settings["target"]["model"], settings["target"]["recipe"]
    dtype = torch.float32 if settings["dtype"] == "fp32" else torch.bfloat16
    tokens, length = recipe["batch_size"] * recipe["sequence_length"], recipe["sequence_length"]
    heads, groups, size, wide = m["num_attention_heads"], m["num_key_value_heads"], m["head_dim"], m["hidden_size"]
    layer = [
        ((heads + 2 * groups) * size, wide), (wide, heads * size), (2 * m["intermediate_size"], wide),
        (wide, m["intermediate_size"]),
    ]  # fmt: skip
    shapes = layer * m["num_hidden_layers"] + [(m["vocab_size"], wide)]
    operands = [
        (torch.randn(tokens, i, dtype=dtype), torch.randn(o, i, dtype=dtype), torch.randn(tokens, o, dtype=dtype))
        for o, i in shapes
    ]
    # Half of the square in each of attention's six products: keys up to S / 2 for every query.
    rows, half = recipe["batch_size"] * groups, length // 2
    q = torch.randn(rows, length * heads // groups, size, dtype=dtype)
    k, p = torch.randn(rows, half, size, dtype=dtype), torch.randn(rows, q.shape[1], half, dtype=dtype)

    def step(_: Tensor) -> Tensor:
        for x, weight, d_out in operands:
            torch.mm(x, weight.t())
            torch.mm(d_out, weight)
            torch.mm(d_out.t(), x)
        for _ in range(m["num_hidden_layers"]):
            for _ in range(2):  # scores and their input's gradient
                torch.bmm(q, k.transpose(1, 2))
            for _ in range(2):  # the output, and the gradient of q
                torch.bmm(p, k)
            for _ in range(2):  # the gradients of k and v
                torch.bmm(p.transpose(1, 2), q)
        return torch.zeros(())

    return step


CONTESTANTS = {f.__name__: f for f in (engine, megatron, transformers, litgpt, textbook, products)}


def main() -> None:
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(settings["target"]["hardware"]["threads"])
    torch.manual_seed(0)
    step, recipe = CONTESTANTS[name](settings), settings["target"]["recipe"]
    shape = (recipe["batch_size"], recipe["sequence_length"] + 1)
    guard = torch.no_grad() if name == "products" else contextlib.nullcontext()
    print(json.dumps({"ready": name, "torch": torch.__version__}), flush=True)
    with guard:
        for line in sys.stdin:
            times, loss = [], torch.zeros(())
            for _ in range(json.loads(line)["steps"]):
                tokens = torch.randint(0, settings["target"]["model"]["vocab_size"], shape)
                began = time.perf_counter()
                loss = step(tokens)
                times.append(round((time.perf_counter() - began) * 1e3, 3))
            print(json.dumps({"ms": times, "loss": float(loss)}), flush=True)


if __name__ == "__main__":
    main()
