"""The arithmetic of a target: parameters, FLOPs, bytes, memory and the roofline. Pure; needs no torch and no device.

    estimate = estimate_target(load_target("targets/minicpm5-1b-h200.toml"))
    estimate.parameters.total          # 1_080_632_832
    estimate.flops.causal              # 6.488e9 FLOPs a token, forward and backward
    mfu(85_000, model, 4096, peak=989.4e12)["causal"]

Conventions. A product of a token with a weight matrix of n elements is 2n FLOPs forward and 4n backward. Attention over
S positions is 4·S·(heads·head_dim) FLOPs a token and layer forward, twice that backward; *full* counts all of it, as
torchtitan does, *causal* the half that a causal mask leaves, as Megatron-LM does. Under fp8 the products of the layers
run at the peak of fp8, the head and attention at that of bf16. Norms, activations, RoPE and the
optimizer count as bytes, not as FLOPs. The recomputation inside attention's backward counts as nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from forgetrain.spec.hardware import Device, Dtype, hardware_of, units
from forgetrain.spec.model import Model
from forgetrain.spec.moments import state_shapes
from forgetrain.spec.stages import stages_of
from forgetrain.spec.target import Target

GIB = 2**30


def in_units(count: float) -> str:
    """Bytes for a person: in GiB, or in MiB where that is less than a tenth of one."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class Parameters:
    total: int
    without_embeddings: int  # neither the embedding nor the head
    in_products: int  # elements that every token is multiplied with: 2-D weights, the head also when it is tied


@dataclass(frozen=True)
class Flops:
    """FLOPs a token, forward and backward together unless the name says forward."""

    matmul: int
    attention_causal: int
    attention_full: int
    forward_causal: int
    forward_full: int

    @property
    def causal(self) -> int:
        return self.matmul + self.attention_causal

    @property
    def full(self) -> int:
        return self.matmul + self.attention_full


@dataclass(frozen=True)
class Traffic:
    """The fewest bytes that must move through main memory for what is no matrix product: each op fused into one pass
    that reads its inputs and writes its outputs once. ``forward`` and ``backward`` of the layers and ``cross_entropy``
    are bytes a token; ``optimizer`` is bytes a step."""

    forward: int
    backward: int
    cross_entropy: int
    optimizer: int


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank while one micro-batch is in flight, without recomputation. Shared over ranks: the division of
    gradients, optimizer states and, for FSDP, weights that ``estimate_target`` was asked for."""

    weights: int  # what products read: in the target's dtype; under fp8 besides twice a byte of the layers' matrices
    gradients: int  # fp32 accumulators
    optimizer: int  # two fp32 moments (one of what Muon steps), and under bf16 the fp32 masters
    activations: int  # what backward needs of one micro-batch, each tensor once
    logits: int  # of one micro-batch, in what activations are kept in

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step on the hardware named, all its devices working perfectly."""

    products: float  # matrix products at the peak of their operands' dtype
    attention: float  # causal attention at the peak of what activations are kept in
    traffic: float  # everything else at the memory's bandwidth

    @property
    def serial(self) -> float:
        """When products and memory-bound ops take turns, as they do without fusion."""
        return self.products + self.attention + self.traffic

    @property
    def bound(self) -> float:
        """No run is faster: perfect overlap of products with memory traffic."""
        return max(self.products + self.attention, self.traffic)


@dataclass(frozen=True)
class Estimate:
    parameters: Parameters
    flops: Flops
    traffic: Traffic
    memory: Memory
    roofline: Roofline
    device: Device
    tokens_per_step: int

    @property
    def fits(self) -> bool | None:
        """Whether the memory of one device holds it; None where the table does not know the memory."""
        return None if self.device.memory_gib is None else self.memory.total <= self.device.memory_gib * GIB


def parameters(model: Model) -> Parameters:
    shapes = model.parameter_shapes()
    sizes = {name: shape[0] * (shape[1] if len(shape) == 2 else 1) for name, shape in shapes.items()}
    table = model.vocab_size * model.hidden_size
    outside = table if model.tie_word_embeddings else 2 * table
    layers = sum(size for name, size in sizes.items() if len(shapes[name]) == 2 and name.startswith("model.layers."))
    total = sum(sizes.values())
    return Parameters(total=total, without_embeddings=total - outside, in_products=layers + table)


def flops_per_token(model: Model, sequence_length: int) -> Flops:
    """Of training, at this sequence length, without document boundaries."""
    products = 2 * parameters(model).in_products
    scores = 4 * sequence_length * model.num_attention_heads * model.head_dim * model.num_hidden_layers
    return Flops(
        matmul=3 * products,
        attention_causal=3 * scores // 2,
        attention_full=3 * scores,
        forward_causal=products + scores // 2,
        forward_full=products + scores,
    )


def mfu(tokens_per_second: float, model: Model, sequence_length: int, *, peak: float) -> dict[str, float]:
    """Model FLOPs utilisation in both conventions: shares of ``peak``, the FLOP/s of all devices together."""
    flops = flops_per_token(model, sequence_length)
    return {"causal": tokens_per_second * flops.causal / peak, "full": tokens_per_second * flops.full / peak}


def traffic(model: Model, dtype: Dtype) -> Traffic:
    """Under fp8 it is that of bf16: an operand's two layouts are two bytes, too, and more than that is no floor."""
    size = _size(dtype)
    h, f = model.hidden_size, model.intermediate_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    norms = 2 * 4 * h  # twice a layer, residual add and norm in one pass: two read, two written
    rope = 2 * (q + kv)  # in place
    layer_forward = norms + rope + 3 * f  # SwiGLU reads gate and up and writes one
    layer_backward = norms + rope + 5 * f + 2 * q  # SwiGLU reads three, writes two; attention's delta reads two
    if model.qk_norm:  # one pass with RoPE forward; backward reads q and k once more
        layer_backward += q + kv
    layers = model.num_hidden_layers
    states = 4 * 4 + 3 * 4 + (0 if dtype == "fp32" else 2)  # master, moments, gradient read; three written, and bf16
    return Traffic(
        forward=layers * layer_forward * size,
        backward=layers * layer_backward * size,
        cross_entropy=3 * model.vocab_size * size,  # read for the loss; read again and overwritten by the gradient
        optimizer=parameters(model).total * states,
    )


def parameters_of_rank(model: Model, tensor: int) -> int:
    """Of one of the ``tensor`` ranks that hold each layer together; norms are on every one of them."""
    shapes = model.parameter_shapes()
    sizes = {name: shape[0] * (shape[1] if len(shape) == 2 else 1) for name, shape in shapes.items()}
    return sum(size if "norm." in name else size // tensor for name, size in sizes.items())


def activation_elements(model: Model, tensor: int = 1) -> int:
    """Elements a token that backward needs, each tensor kept once: of a layer the two residual streams, both norms'
    outputs, v, rotated q and k, attention's output, gate, up and their SwiGLU; outside, the last norm's in- and output.
    Attention keeps its row sums in fp32, counted as two elements a head. Of ``tensor`` ranks that hold a layer together
    each keeps the residual streams and norms, and its share of the rest."""
    h, f = model.hidden_size, model.intermediate_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    shared = 2 * q + 2 * kv + 3 * f + 2 * model.num_attention_heads
    if model.qk_norm:
        shared += q + kv  # q and k before the norm
    return model.num_hidden_layers * (4 * h + shared // tensor) + 2 * h


def micro_batch_tokens(target: Target) -> int:
    """Tokens that a rank has of the largest micro-batch: that of the stage of the longest sequences."""
    tokens = target.recipe.micro_batch_size * max(stage.sequence_length for stage in stages_of(target))
    return tokens // target.parallel.context


def memory(target: Target, *, shard: bool = False, shard_optimizer: bool = False) -> Memory:
    """Bytes on each rank, in the stage of the longest sequences; layers and rows are split as ``parallel`` says.

    shard: weights, gradients and optimizer are divided over the data and context ranks, as FSDP does; shard_optimizer:
    the optimizer alone, as ZeRO-1 does, where fp32 weights, which are their own masters, stay whole.
    """
    model, dtype, tensor = target.model, target.precision.dtype, target.parallel.tensor
    count, size = parameters_of_rank(model, tensor), _size(dtype)
    data = max(1, target.hardware.count // tensor)
    ranks, keepers = data if shard else 1, data if shard or shard_optimizer else 1
    tokens, absent = micro_batch_tokens(target), parameters(model).total - _second_moments(target)
    rounded = 2 * _in_layers(model) if dtype == "fp8" else 0
    # what weight gradients read takes a byte less; attention's output is kept as it is, too
    q = model.num_attention_heads * model.head_dim
    less = model.num_hidden_layers * (2 * model.hidden_size + model.intermediate_size - q) if dtype == "fp8" else 0
    if target.precision.scaling == "block":  # and fp32 units, one of 128
        less -= model.num_hidden_layers * (2 * model.hidden_size + model.intermediate_size + q) // 32
    return Memory(
        weights=-(-count * size // ranks) + rounded,
        gradients=-(-count * 4 // ranks),
        optimizer=-(-(count * (8 if dtype == "fp32" else 12) - 4 * absent) // keepers),
        activations=tokens * (activation_elements(model, tensor) * size - less),
        logits=tokens * model.vocab_size // tensor * size,
    )


def _traffic_of(target: Target) -> Traffic:
    """The target's traffic: a second moment that Muon does not keep is neither read nor written."""
    moved, absent = (
        traffic(target.model, target.precision.dtype),
        parameters(target.model).total - _second_moments(target),
    )
    return replace(moved, optimizer=moved.optimizer - 8 * absent)


def _second_moments(target: Target) -> int:
    """Elements of the second moments."""
    return sum(math.prod(shape) for name, shape in state_shapes(target).items() if name.startswith("exp_avg_sq/"))


def roofline(target: Target) -> Roofline:
    """Raises UserError when the hardware is not in the table."""
    model, recipe, dtype = target.model, target.recipe, target.precision.dtype
    device, count = hardware_of(target.hardware), units(target.hardware)
    tokens = recipe.batch_size * recipe.sequence_length
    flops, moved = flops_per_token(model, recipe.sequence_length), _traffic_of(target)
    kept = device.peak(target.precision.kept) * count
    head = 6 * model.vocab_size * model.hidden_size
    moving = tokens * (moved.forward + moved.backward + moved.cross_entropy) + moved.optimizer * target.hardware.count
    return Roofline(
        products=tokens * ((flops.matmul - head) / (device.peak(dtype) * count) + head / kept),
        attention=tokens * flops.attention_causal / kept,
        traffic=moving / (device.bandwidth * count),
    )


def estimate_target(target: Target, *, shard: bool = False, shard_optimizer: bool = False) -> Estimate:
    """Raises UserError when the hardware is not in the table."""
    recipe = target.recipe
    return Estimate(
        parameters=parameters(target.model),
        flops=flops_per_token(target.model, recipe.sequence_length),
        traffic=_traffic_of(target),
        memory=memory(target, shard=shard, shard_optimizer=shard_optimizer),
        roofline=roofline(target),
        device=hardware_of(target.hardware),
        tokens_per_step=recipe.batch_size * recipe.sequence_length,
    )


def _in_layers(model: Model) -> int:
    """Elements of the layers' matrices."""
    return parameters(model).in_products - model.vocab_size * model.hidden_size


def _size(dtype: Dtype) -> int:
    """Bytes of a weight or an activation as it is kept."""
    return 4 if dtype == "fp32" else 2
