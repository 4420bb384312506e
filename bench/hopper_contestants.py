"""The contestants of bench/hopper.py, each in a process of its own: builds a model, then measures when told to.

Requests come as JSON lines on stdin, answers go as JSON lines to stdout. Each contestant does whole optimizer steps:
the engine in its target's precision, Megatron in bf16, both with bf16 weights and fp32 masters, moments and accumulated
gradients, clipping at 1; transformers, as people run it, with bf16 weights alone or under autocast over fp32 weights;
torchtitan as its trainer runs on one GPU, under autocast.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], tuple[torch.Tensor, torch.Tensor]]  # one optimizer step; loss and gradient norm
Release = Callable[[], None]  # gives memory back between blocks


def engine_step(settings: dict) -> tuple[Step, Release]:
    from forgetrain.engine.contract import make_batch
    from forgetrain.engine.write import load_engine

    target, tokens = settings["target"], random_tokens(settings)
    target["recipe"]["micro_batch_size"] = settings["rows"]
    engine = load_engine(settings["engine"]).build(
        target, device="cuda", precision=target["precision"]["dtype"], mesh=None
    )
    views = {name.removeprefix("master/"): s.tensor for name, s in engine.state().items() if name.startswith("master/")}
    engine.load({name: initial(tensor) for name, tensor in views.items()})
    batch = make_batch(tokens, tokens.roll(-1, 1))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        result = engine.step(batch, 3e-4)
        return result.loss, result.grad_norm

    return step, engine.release


def initial(like: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(like) if like.dim() == 1 else torch.randn_like(like) * 0.02


def random_tokens(settings: dict) -> torch.Tensor:
    target = settings["target"]
    shape = (settings["rows"] * settings["micro_batches"], target["recipe"]["sequence_length"])
    return torch.randint(0, target["model"]["vocab_size"], shape, device=settings.get("device", "cuda"))


def megatron_step(settings: dict) -> tuple[Step, Release]:
    """Megatron-core's own model, DDP and distributed optimizer with Transformer Engine's layers and everything fused:
    cuDNN attention, SwiGLU, RoPE, cross-entropy, weight gradients accumulated in fp32 inside the product. muP scales,
    which it has in part only, are left out: that spares it work."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    sys.modules["fused_weight_gradient_mlp_cuda"] = weight_gradient_module()
    import torch.distributed as dist
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    m, recipe = settings["target"]["model"], settings["target"]["recipe"]
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    parallel_state.initialize_model_parallel(1, 1)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        attention_backend=AttnBackend.fused, num_layers=m["num_hidden_layers"], hidden_size=m["hidden_size"],
        ffn_hidden_size=m["intermediate_size"], num_attention_heads=m["num_attention_heads"],
        num_query_groups=m["num_key_value_heads"], kv_channels=m["head_dim"], normalization="RMSNorm",
        layernorm_epsilon=m["rms_norm_eps"], gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        bias_activation_fusion=True, bias_dropout_fusion=True, attention_dropout=0.0, hidden_dropout=0.0, bf16=True,
        params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, apply_rope_fusion=True,
        gradient_accumulation_fusion=True, masked_softmax_fusion=True, persist_layer_norm=True,
        cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te",
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_with_transformer_engine_spec(), vocab_size=m["vocab_size"],
        max_sequence_length=recipe["sequence_length"], position_embedding_type="rope", rotary_base=m["rope_theta"],
        share_embeddings_and_output_weights=m["tie_word_embeddings"],
    ).cuda()  # fmt: skip
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        Float16Module(config, model),
    )  # fmt: skip
    options = OptimizerConfig(
        optimizer="adam", lr=3e-4, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True,
        clip_grad=recipe["clip"], adam_beta1=recipe["beta1"], adam_beta2=recipe["beta2"],
        weight_decay=recipe["weight_decay"],
    )  # fmt: skip
    optimizer = get_megatron_optimizer(options, [ddp])
    tokens, count = random_tokens(settings), settings["micro_batches"]
    positions = torch.arange(tokens.shape[1], device="cuda")[None].expand(settings["rows"], -1)
    parts = list(zip(tokens.chunk(count), tokens.roll(-1, 1).chunk(count), strict=True))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        total = torch.zeros((), device="cuda")
        for number, (part, labels) in enumerate(parts):
            with contextlib.nullcontext() if number == count - 1 else ddp.no_sync():
                loss = ddp(part, positions, None, labels=labels).float().mean() / count
                loss.backward()
                total += loss.detach()
        ddp.finish_grad_sync()
        _, norm, _ = optimizer.step()
        return total, torch.as_tensor(norm)

    return step, torch.cuda.empty_cache


def weight_gradient_module() -> types.ModuleType:
    """Apex's extension, which Megatron's output layer asks for, with the same arithmetic by cuBLAS."""

    def accumulate(x: torch.Tensor, d_y: torch.Tensor, grad: torch.Tensor) -> None:
        x, d_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
        torch.addmm(grad, d_y.t(), x, out_dtype=torch.float32, out=grad)

    module = types.ModuleType("fused_weight_gradient_mlp_cuda")
    module.wgrad_gemm_accum_fp32 = accumulate  # type: ignore[attr-defined]
    return module


def transformers_step(settings: dict, *, liger: bool, compiled: bool, pure: bool) -> tuple[Step, Release]:
    """transformers' Llama with cuDNN attention and AdamW fused: with Liger's kernels or compiled; in pure bf16 (no fp32
    masters) or under autocast over fp32 weights."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import LlamaConfig, LlamaForCausalLM

    m, recipe = settings["target"]["model"], settings["target"]["recipe"]
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, cross_entropy=True)
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    keys += ("head_dim", "vocab_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    config = LlamaConfig(**{key: m[key] for key in keys}, rope_theta=m["rope_theta"], use_cache=False)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16 if pure else torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(recipe["beta1"], recipe["beta2"]), weight_decay=0.1, fused=True
    )
    tokens, count = random_tokens(settings), settings["micro_batches"]
    mixed = contextlib.nullcontext() if pure else torch.autocast("cuda", torch.bfloat16)

    def loss_of(part: torch.Tensor) -> torch.Tensor:
        return model(input_ids=part, labels=part).loss

    compute = torch.compile(loss_of) if compiled else loss_of

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.zeros((), device="cuda")
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for part in tokens.chunk(count):
                with mixed:
                    loss = compute(part) / count
                loss.backward()
                total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
        optimizer.step()
        optimizer.zero_grad()
        return total, norm

    return step, torch.cuda.empty_cache


def torchtitan_step(settings: dict) -> tuple[Step, Release]:
    """torchtitan 0.2.2, the release for torch 2.11, as its own trainer runs on one GPU: each layer and the loss
    compiled, bf16 by autocast over fp32 weights (its FSDP2 with bf16 weights begins at two GPUs), cuDNN attention
    first, AdamW fused, no recomputation. The model is its Qwen3 class, which without norms of queries and keys is a
    Llama: its Llama3 class can have neither a head size of its own nor a tied head. ``settings["device"]`` is ``cuda``
    unless given."""
    from torchtitan.components.optimizer import build_optimizers
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.utils import clip_grad_norm_, maybe_enable_amp
    from torchtitan.models.qwen3 import Qwen3Model, Qwen3ModelArgs, build_cross_entropy_loss, parallelize_qwen3

    m, recipe, device = settings["target"]["model"], settings["target"]["recipe"], settings.get("device", "cuda")
    arguments = Qwen3ModelArgs(
        dim=m["hidden_size"], n_layers=m["num_hidden_layers"], n_heads=m["num_attention_heads"],
        n_kv_heads=m["num_key_value_heads"], head_dim=m["head_dim"], hidden_dim=m["intermediate_size"],
        vocab_size=m["vocab_size"], norm_eps=m["rms_norm_eps"], rope_theta=m["rope_theta"], qk_norm=m["qk_norm"],
        max_seq_len=recipe["sequence_length"], enable_weight_tying=m["tie_word_embeddings"],
    )  # fmt: skip
    job = JobConfig()
    job.training.seq_len = recipe["sequence_length"]
    job.compile.enable, job.activation_checkpoint.mode = True, "none"
    job.optimizer.lr, job.optimizer.weight_decay = 3e-4, recipe["weight_decay"]
    job.optimizer.beta1, job.optimizer.beta2, job.optimizer.implementation = recipe["beta1"], recipe["beta2"], "fused"
    one = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    with torch.device(device), torch.no_grad():
        model = Qwen3Model(arguments)
        model.init_weights()
    model = parallelize_qwen3(model, one, job)
    optimizer, loss_of = build_optimizers([model], job.optimizer, one), build_cross_entropy_loss(job)
    mixed = maybe_enable_amp(one, job.training.mixed_precision_param, device)
    tokens, count = random_tokens(settings), settings["micro_batches"]
    parts = list(zip(tokens.chunk(count), tokens.roll(-1, 1).chunk(count), strict=True))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for part, labels in parts:
            with mixed:
                loss = loss_of(model(part), labels) / tokens.numel()
            loss.backward()
            total += loss.detach()
        norm = clip_grad_norm_(list(model.parameters()), recipe["clip"], foreach=True)
        optimizer.step()
        return total, norm

    return step, torch.cuda.empty_cache


CONTESTANTS: dict[str, Callable[[dict], tuple[Step, Release]]] = {
    "engine": engine_step,
    "megatron": megatron_step,
    "liger": functools.partial(transformers_step, liger=True, compiled=False, pure=True),
    "liger-autocast": functools.partial(transformers_step, liger=True, compiled=False, pure=False),
    "compile": functools.partial(transformers_step, liger=False, compiled=True, pure=False),
    "torchtitan": torchtitan_step,
}
NEEDS = {  # of a peer: what is imported, and what to install beside torch
    "megatron": {"megatron": "megatron-core", "transformer_engine": "transformer-engine[pytorch]"},
    "liger": {"transformers": "transformers", "liger_kernel": "liger-kernel"},
    "liger-autocast": {"transformers": "transformers", "liger_kernel": "liger-kernel"},
    "compile": {"transformers": "transformers"},
    "torchtitan": {"torchtitan": "torchtitan==0.2.2"},
}
SETTLING = 2.5  # seconds of work after which an H200 has reached its power limit
PACKAGES = (
    *("torch", "triton", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl"),
    *("megatron-core", "transformer-engine", "transformers", "liger-kernel", "torchtitan"),
)


def refusal(name: str, target: dict) -> str | None:
    """Why a peer cannot run here or has no such model: one line with the remedy, or None. Imports nothing."""
    if name not in CONTESTANTS:
        return f"peer {name!r}: there are {', '.join(sorted(NEEDS))}, and paths of engine files"
    scales = [key for key in ("scale_emb", "scale_depth", "dim_model_base") if target["model"].get(key) is not None]
    if name == "torchtitan" and scales:
        return f"peer 'torchtitan' has no muP, and {target['name']} sets {', '.join(scales)}: leave it out of --peers"
    for module, package in NEEDS.get(name, {}).items():
        if importlib.util.find_spec(module) is None:
            return f"peer {name!r}: {package.partition('=')[0]} is not installed: pip install '{package}'"
    return None


def facts() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "versions": versions,
    }


def block(step: Step, steps: int) -> dict[str, Any]:
    """Untimed steps until the GPU's clock has settled, then ``steps`` timed ones, each awaited; milliseconds."""
    begin, watts, megahertz = time.perf_counter(), 0.0, 0
    while time.perf_counter() - begin < SETTLING:
        step()
        watts, megahertz = torch.cuda.power_draw() / 1e3, torch.cuda.clock_rate()  # while the step runs
        torch.cuda.synchronize()
    times, loss, norm = [], torch.zeros(()), torch.zeros(())
    torch.cuda.synchronize()
    for _ in range(steps):
        begin = time.perf_counter()
        loss, norm = step()
        torch.cuda.synchronize()
        times.append(round((time.perf_counter() - begin) * 1e3, 3))
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    reserved = round(torch.cuda.max_memory_reserved() / 2**30, 1)
    state = {"watts": round(watts), "megahertz": megahertz, "peak_gib": peak, "reserved_gib": reserved}
    return {"ms": times, "loss": float(loss), "grad_norm": float(norm), **state}


def profile(step: Step) -> dict[str, Any]:
    """The kernels of one step by time, and from the first one's start to the last one's end; milliseconds."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    rows = [(e.key, e.count, e.self_device_time_total / 1e3) for e in profiler.key_averages()]
    kernels = [[k, n, round(ms, 3)] for k, n, ms in sorted(rows, key=lambda row: -row[2]) if ms > 0]
    spans = [e.time_range for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    whole = (max(span.end for span in spans) - min(span.start for span in spans)) / 1e3
    return {"whole_ms": round(whole, 3), "sum_ms": round(sum(row[2] for row in kernels), 3), "kernels": kernels}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    torch.cuda.set_device(0)
    torch.manual_seed(0)
    step, release = CONTESTANTS[name](settings)
    gc.disable()

    def answer(value: dict) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    step()
    torch.cuda.synchronize()
    release()
    answer(facts())
    for line in sys.stdin:
        request = json.loads(line)
        answer(block(step, request["steps"]) if request["do"] == "block" else profile(step))
        release()


if __name__ == "__main__":
    main()
