"""The arithmetic, against parameters and FLOPs counted on real modules and against published numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from forgetrain.errors import UserError
from forgetrain.spec.estimate import (
    GIB,
    activation_elements,
    estimate_target,
    flops_per_token,
    memory,
    mfu,
    parameters,
    roofline,
    traffic,
)
from forgetrain.spec.hardware import HARDWARE
from forgetrain.spec.parallel import Parallel
from forgetrain.spec.target import load_target
from tests.tiny import tiny_target

TARGETS = Path(__file__).parents[2] / "targets"


@pytest.mark.parametrize(
    ("name", "total", "without", "causal", "full"),
    [
        ("minicpm5-1b-h200", 1_080_632_832, 679_552_512, 6.488, 7.696),
        ("minicpm4-0.5b-h200", 509_084_672, 358_663_168, 3.207, 3.811),
    ],
)
def test_published_counts(name, total, without, causal, full):
    model = load_target(TARGETS / f"{name}.toml").model
    assert parameters(model).total == total
    assert parameters(model).without_embeddings == without
    flops = flops_per_token(model, 4096)
    assert round(flops.causal / 1e9, 3) == causal
    assert round(flops.full / 1e9, 3) == full


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"qk_norm": True}])
def test_parameters_are_those_of_the_transformers_module(changes):
    model = tiny_target(model=changes).model
    config, module = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[model.architecture]
    keys = {key: value for key, value in model.model_dump().items() if value is not None and key != "attention_bias"}
    with torch.device("meta"):
        built = module(config(**keys))
    assert parameters(model).total == sum(p.numel() for p in built.parameters())
    outside = {id(built.get_input_embeddings().weight), id(built.get_output_embeddings().weight)}
    assert parameters(model).without_embeddings == sum(p.numel() for p in built.parameters() if id(p) not in outside)


def test_flops_are_those_torch_counts():
    model, s = tiny_target().model, 64
    keys = {key: value for key, value in model.model_dump().items() if value is not None}
    # torch's counter sees both of attention's products whole, as the full convention does
    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys, attn_implementation="eager"))
        tokens = torch.zeros(1, s, dtype=torch.int64)
    flops = flops_per_token(model, s)
    with FlopCounterMode(display=False) as counter:
        logits = module(tokens).logits
    assert counter.get_total_flops() == flops.forward_full * s
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == (flops.full - flops.forward_full) * s


def test_causal_halves_attention_alone():
    flops = flops_per_token(tiny_target().model, 128)
    assert flops.full - flops.causal == flops.attention_full // 2
    assert flops.causal == 3 * flops.forward_causal


def test_bytes_of_minicpm5():
    """Counted by hand for one layer in bf16: two add+norm 24,576, RoPE 9,216, SwiGLU 27,648; backward 24,576, 9,216,
    46,080 and attention's delta 8,192. Cross-entropy moves 6 bytes a logit, AdamW 30 a parameter."""
    model = load_target(TARGETS / "minicpm5-1b-h200.toml").model
    moved = traffic(model, "bf16")
    assert moved.forward == 24 * 61_440
    assert moved.backward == 24 * 88_064
    assert moved.cross_entropy == 6 * 130_560
    assert moved.optimizer == 30 * 1_080_632_832
    assert traffic(model, "fp32").optimizer == 28 * 1_080_632_832


def test_memory_by_kind():
    target = load_target(TARGETS / "minicpm5-1b-h200.toml")
    used = memory(target)
    assert (used.weights, used.gradients, used.optimizer) == tuple(n * 1_080_632_832 for n in (2, 4, 12))
    assert used.logits == 8 * 4096 * 130_560 * 2
    assert used.total == sum(vars(used).values())
    fp32 = memory(target.model_copy(update={"precision": target.precision.model_copy(update={"dtype": "fp32"})}))
    assert (fp32.weights, fp32.optimizer) == (4 * 1_080_632_832, 8 * 1_080_632_832)


def test_activations_of_minicpm5():
    layer = 4 * 1536 + 2 * 2048 + 2 * 256 + 3 * 4608 + 2 * 16
    assert activation_elements(load_target(TARGETS / "minicpm5-1b-h200.toml").model) == 24 * layer + 2 * 1536


def test_sharding_divides_the_states_alone():
    target = load_target(TARGETS / "minicpm4-8b-h100x8.toml")
    whole, part = memory(target), memory(target, shard=True)
    assert part.optimizer == -(-whole.optimizer // 8)
    assert (part.activations, part.logits) == (whole.activations, whole.logits)
    assert estimate_target(target).fits is False
    assert estimate_target(target, shard=True).fits is True


def test_roofline():
    target = load_target(TARGETS / "minicpm5-1b-h200.toml")
    roof, tokens = roofline(target), 128 * 4096
    assert roof.products + roof.attention == pytest.approx(tokens * 6.488064e9 / 989.4e12)
    assert roof.serial > roof.bound == roof.products + roof.attention
    assert mfu(tokens / roof.bound, target.model, 4096, peak=989.4e12)["causal"] == pytest.approx(1.0)


def test_under_fp8_the_layers_products_have_a_peak_of_their_own():
    target = load_target(TARGETS / "minicpm5-1b-h200-fp8.toml")
    roof, tokens = roofline(target), 128 * 4096
    layers, head = 6 * (679_552_512 - 49 * 1536), 6 * 130_560 * 1536  # 49 norms are in no product
    assert roof.products == pytest.approx(tokens * (layers / 1978.9e12 + head / 989.4e12))
    in_bf16 = roofline(target.for_reference())
    assert (roof.attention, roof.traffic) == (in_bf16.attention, in_bf16.traffic)
    mine, plain = memory(target), memory(target.for_reference())
    assert mine.weights - plain.weights == 2 * (679_552_512 - 49 * 1536)
    # bytes of normed1, normed2 and SwiGLU's output that fp8 saves, less those of attention's output, kept twice
    assert plain.activations - mine.activations == 8 * 4096 * 24 * (1536 + 1536 + 4608 - 2048)
    blocks = memory(load_target(TARGETS / "minicpm5-1b-h200-fp8.toml", ["precision.scaling=block"]))
    # a unit of four bytes for 128 numbers of what is kept in fp8
    assert blocks.activations - mine.activations == 8 * 4096 * 24 * (1536 + 1536 + 4608 + 2048) * 4 // 128
    with pytest.raises(UserError, match="no fp8") as refused:
        roofline(load_target(TARGETS / "minicpm5-1b-h200-fp8.toml", ["hardware.name=a100"]))
    assert refused.value.key == "precision.dtype"


def test_mfu_in_both_conventions():
    model = load_target(TARGETS / "minicpm5-1b-h200.toml").model
    shares = mfu(77_000, model, 4096, peak=HARDWARE["h200"].peak("bf16"))
    assert (round(shares["causal"], 3), round(shares["full"], 3)) == (0.505, 0.599)


def test_own_memory_and_unknown_hardware():
    target = load_target(TARGETS / "minicpm5-1b-h200.toml", ["hardware.memory_gib=40.0"])
    assert estimate_target(target).device.memory_gib == 40.0
    assert estimate_target(target).memory.total > 40 * GIB
    assert estimate_target(target).fits is False
    with pytest.raises(UserError, match=r"hardware\.name: no such hardware \(got 'h300'\)"):
        estimate_target(load_target(TARGETS / "minicpm5-1b-h200.toml", ["hardware.name=h300"]))


def test_what_each_rank_of_a_split_layer_holds():
    target = load_target(TARGETS / "minicpm4-8b-h100x8.toml")
    split = target.model_copy(update={"parallel": Parallel(tensor=2)})
    whole, part = memory(target), memory(split)
    norms = (2 * target.model.num_hidden_layers + 1) * target.model.hidden_size
    assert part.weights == (whole.weights + 2 * norms) // 2  # bf16; norms are on both
    assert part.logits * 2 == whole.logits
    assert whole.activations / 2 < part.activations < whole.activations
    zero = memory(split, shard_optimizer=True)
    assert (zero.weights, zero.gradients) == (part.weights, part.gradients)
    assert zero.optimizer == -(-part.optimizer // 4)  # 8 GPUs, 4 data ranks


def test_what_each_rank_of_a_split_row_holds():
    target = load_target(TARGETS / "minicpm4-8b-h100x8.toml")
    split = target.model_copy(update={"parallel": Parallel(context=4)})
    whole, part = memory(target, shard_optimizer=True), memory(split, shard_optimizer=True)
    assert (part.activations * 4, part.logits * 4) == (whole.activations, whole.logits)
    assert part.optimizer == whole.optimizer  # context ranks divide the states as data ranks do
    assert (part.weights, part.gradients) == (whole.weights, whole.gradients)


def test_muon_keeps_one_moment_of_the_layers_matrices():
    adamw, muon = (tiny_target(recipe={"optimizer": name}) for name in ("adamw", "muon"))
    matrices = sum(
        math.prod(shape)
        for name, shape in muon.model.parameter_shapes().items()
        if name.startswith("model.layers.") and len(shape) == 2
    )
    assert memory(adamw).optimizer - memory(muon).optimizer == 4 * matrices
    assert roofline(adamw).traffic > roofline(muon).traffic
