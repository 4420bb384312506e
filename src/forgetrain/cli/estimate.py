"""``forgetrain estimate``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from forgetrain.cli.common import Json, Overrides, TargetFile, emit, read_target
from forgetrain.spec.estimate import Estimate, estimate_target, in_units, micro_batch_tokens
from forgetrain.spec.target import Target


def command(
    target_file: TargetFile,
    overrides: Overrides = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Weights, gradients, optimizer over the ranks (FSDP).")
    ] = False,
    shard_optimizer: Annotated[
        bool, typer.Option("--shard-optimizer", help="The optimizer's states over the ranks (ZeRO-1).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Count a target's parameters, FLOPs, bytes and memory, and the step time its hardware allows."""
    target = read_target(target_file, overrides)
    estimate = estimate_target(target, shard=shard, shard_optimizer=shard_optimizer)
    if as_json:
        emit(as_plain(target, estimate), as_json)
    else:
        Console().print(table(target, estimate, shard, shard_optimizer))


def as_plain(target: Target, estimate: Estimate) -> dict[str, object]:
    """FLOPs a token, bytes, seconds."""
    plain = asdict(estimate)
    plain["flops"] |= {"causal": estimate.flops.causal, "full": estimate.flops.full}
    plain["memory"]["total"] = estimate.memory.total
    plain["roofline"] |= {"serial": estimate.roofline.serial, "bound": estimate.roofline.bound}
    return {"target": target.name, **plain, "fits": estimate.fits}


def table(target: Target, estimate: Estimate, shard: bool, shard_optimizer: bool) -> Table:
    flops, memory, roof, device = estimate.flops, estimate.memory, estimate.roofline, estimate.device
    recipe, hardware = target.recipe, target.hardware
    many = f"{hardware.count} × " if hardware.count > 1 else ""
    out = Table(title=f"{target.name}: {target.precision.dtype} on {many}{hardware.name}", show_header=False)
    out.add_column("what")
    out.add_column("value", justify="right")
    out.add_column("how counted", style="dim")

    def rows(*lines: tuple[str, str, str]) -> None:
        for line in lines:
            out.add_row(*line)
        out.add_section()

    rows(
        ("parameters", f"{estimate.parameters.total:,}", "all"),
        ("without embeddings", f"{estimate.parameters.without_embeddings:,}", "neither the embedding nor the head"),
    )
    s = f"sequence length {recipe.sequence_length}, forward and backward"
    rows(
        ("FLOPs a token, causal", _flops(flops.causal), f"{s}; attention halved (Megatron's MFU)"),
        ("FLOPs a token, full", _flops(flops.full), "all of attention (torchtitan's MFU)"),
        ("  of matrix products", _flops(flops.matmul), "6 per element of the matrices and the head"),
        ("  of attention, causal", _flops(flops.attention_causal), "6 · S · heads · head_dim · layers"),
        ("  of attention, full", _flops(flops.attention_full), "12 · S · heads · head_dim · layers"),
        ("  forward only, causal", _flops(flops.forward_causal), "a third"),
    )
    tokens = micro_batch_tokens(target)
    tensor = target.parallel.tensor
    data = max(1, hardware.count // tensor)
    context = target.parallel.context
    micro = f"one micro-batch of {tokens * context:,} tokens" + (f", rows over {context} ranks" if context > 1 else "")
    layers = f", layers over {tensor} ranks" if tensor > 1 else ""
    over = layers + (f", over {data} ranks" if shard and data > 1 else "")
    over_optimizer = layers + (f", over {data} ranks" if (shard or shard_optimizer) and data > 1 else "")
    rounded = ", the layers' in fp8 besides, two bytes" if target.precision.dtype == "fp8" else ""
    full = {True: "fits", False: "does NOT fit", None: "of the machine's"}[estimate.fits]
    size = "" if device.memory_gib is None else f" in {device.memory_gib:g} GiB"
    rows(
        ("weights", in_units(memory.weights), f"{target.precision.kept}{rounded}{over}"),
        ("gradients", in_units(memory.gradients), f"fp32 accumulators{over}"),
        ("optimizer", in_units(memory.optimizer), f"fp32 moments{_masters(target)}{over_optimizer}"),
        ("activations", in_units(memory.activations), f"{micro}, nothing recomputed"),
        ("logits", in_units(memory.logits), f"one micro-batch × {target.model.vocab_size:,}"),
        ("memory of a rank", in_units(memory.total), f"{full}{size}"),
    )
    moved = estimate.traffic
    rows(
        ("bytes a token, forward", f"{moved.forward:,}", "norms, RoPE, SwiGLU, each one fused pass"),
        ("bytes a token, backward", f"{moved.backward:,}", "the same, and attention's delta"),
        ("bytes a token, loss", f"{moved.cross_entropy:,}", "cross-entropy in place on the logits"),
        ("bytes a step, optimizer", f"{moved.optimizer:,}", _passes(target)),
    )
    each = " a thread" if hardware.device == "cpu" else ""
    rate, kept = _rate(device.peak(target.precision.dtype)), _rate(device.peak(target.precision.kept))
    rates = rate + each + (f", the head's at {kept}{each}" if rate != kept else "")
    speed = f"{device.terabytes:g} TB/s" if device.terabytes >= 1 else f"{device.terabytes * 1e3:g} GB/s"
    bound = "; no run is faster" if device.is_bound else ""
    rows(
        ("products", _seconds(roof.products), f"a step of {estimate.tokens_per_step:,} tokens at {rates}"),
        ("attention", _seconds(roof.attention), f"causal, at {kept}{each}"),
        ("memory traffic", _seconds(roof.traffic), f"everything else, at {speed}{each}"),
        ("step, one after the other", _seconds(roof.serial), _tokens(estimate, roof.serial)),
        (
            "step, all overlapped",
            _seconds(roof.bound),
            _tokens(estimate, roof.bound) + bound,
        ),
    )
    out.caption = f"{hardware.name}: {device.source}"
    return out


def _masters(target: Target) -> str:
    return " and master weights" if target.precision.kept == "bf16" else "; fp32 weights are their own masters"


def _passes(target: Target) -> str:
    muon = target.recipe.optimizer == "muon"
    return "AdamW in one pass; Muon's too, without its products" if muon else "AdamW in one pass"


def _flops(count: int) -> str:
    return f"{count / 1e9:,.3f} GFLOP"


def _rate(peak: float) -> str:
    return f"{peak / 1e12:,.1f} TFLOP/s" if peak >= 1e12 else f"{peak / 1e9:,.0f} GFLOP/s"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


def _tokens(estimate: Estimate, seconds: float) -> str:
    return f"{estimate.tokens_per_step / seconds:,.0f} tokens/s"
