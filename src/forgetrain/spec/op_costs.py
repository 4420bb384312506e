"""What each op of a step has to do: FLOPs and the fewest bytes, for rooflines by op. Pure.

    costs = op_costs(load_target("targets/nano-cpu.toml"))
    costs["attention"].flops / costs["attention"].bytes       # FLOPs a byte

Products count as in ``estimate`` and sum to its FLOPs. The element-wise ops, which count there as bytes alone, get the
operations of their formulas here, one for each addition, product, quotient, root or exponential, so that they have a
place on a roofline. Bytes: each op one fused pass forward and one backward, which reads its inputs and writes its
outputs once; a product reads its weight once a micro-batch, and its weight gradient is accumulated in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from forgetrain.spec.estimate import flops_per_token, parameters
from forgetrain.spec.model import Model
from forgetrain.spec.target import Target

#: In the order of a step. ``rmsnorm`` holds the residual sums beside the norms, ``linear`` the head's products,
#: ``clip`` the global norm of the gradients.
OPS = ("embedding", "rmsnorm", "linear", "rope", "attention", "swiglu", "cross_entropy", "clip", "adamw")


@dataclass(frozen=True)
class OpCost:
    """Of one step on one rank: FLOPs and bytes."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    def seconds(self, product_rate: float, bandwidth: float) -> float:
        """The roofline: FLOP/s and bytes/s of one rank, whichever binds."""
        return max(self.flops / product_rate, self.bytes / bandwidth)


def op_costs(target: Target) -> dict[str, OpCost]:
    """By op, of one step at the recipe's shape; ranks share the rows, and each makes the whole update."""
    model, recipe = target.model, target.recipe
    size = 4 if target.precision.kept == "fp32" else 2
    tokens = recipe.batch_size * recipe.sequence_length / target.hardware.count
    count = parameters(model).total
    flops = flops_per_token(model, recipe.sequence_length)
    h, f, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    rounded = 2 if size == 2 else 0

    def elementwise(operations: float, elements: float) -> OpCost:
        return OpCost(tokens * operations, tokens * elements * size)

    return {
        "embedding": elementwise(h, 5 * h),
        # forward: sum, square, mean, scale, weight; backward: two dot products and their sums. 4 h read or written each
        "rmsnorm": elementwise(layers * 2 * (5 + 9) * h, layers * 2 * (4 + 4) * h + (q + kv) * layers * model.qk_norm),
        "linear": OpCost(tokens * flops.matmul, _product_bytes(model, target, tokens, size)),
        "rope": elementwise(layers * (3 + 3) * (q + kv), layers * (2 + 2) * (q + kv)),
        "attention": OpCost(tokens * flops.attention_causal, tokens * layers * 6 * (q + kv) * size),
        "swiglu": elementwise(layers * (5 + 9) * f, layers * (3 + 5) * f),
        "cross_entropy": elementwise(6 * model.vocab_size, 3 * model.vocab_size),
        "clip": OpCost(2 * count, 4 * count),
        "adamw": OpCost(16 * count, count * (7 * 4 + rounded)),
    }


def _product_bytes(model: Model, target: Target, tokens: float, size: int) -> float:
    """Forward, input gradient and weight gradient of every matrix; q, k, v are one product, as are gate and up."""
    h, f, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    micro_batches = target.recipe.batch_size / target.recipe.micro_batch_size / target.hardware.count
    matrices = [(h, q + 2 * kv), (q, h), (h, 2 * f), (f, h)] * layers + [(h, model.vocab_size)]
    moved = 0.0
    for n_in, n_out in matrices:
        weight = n_in * n_out
        # two reads of the weight a micro-batch; its gradient written, and read again after the first micro-batch
        moved += micro_batches * 2 * weight * size + (2 * micro_batches - 1) * weight * 4
        moved += 3 * tokens * (n_in + n_out) * size
    return moved
