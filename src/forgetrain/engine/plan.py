"""The plan: which variant each op uses, how weights are packed, and the order in which sums are formed.

    plan = Plan.textbook()
    plan = plan.with_choice("rmsnorm", "torch")
    choices(target)["attention"]        # ("textbook", "eager", "megatron", "sdpa", "sdpa_gqa")

A plan is stored as TOML (``plan.toml``) beside every engine that was written from it.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from forgetrain.errors import UserError
from forgetrain.ops.table import OPS
from forgetrain.spec.target import Target

#: What a plan decides besides variants: the key, its options (the plain one first), and why they differ in bits.
STRUCTURE: dict[str, tuple[tuple[str, ...], str]] = {
    "token_order": (
        ("batch", "sequence"),
        "tokens of a micro-batch flattened row by row, or position by position as Megatron; sums over tokens follow it",
    ),
    "qkv": (
        ("split", "fused", "grouped"),
        "three products; one over [Q; K; V]; one over Megatron's interleaving by query group. The input gradient's sum "
        "runs in that order",
    ),
    "gate_up": (("split", "fused"), "two products, or one over [gate; up]"),
    "qkv_sum": (
        ("q+k+v", "v+k+q", "q+v+k"),
        "the order in which the input gradients of split projections are added, left to right",
    ),
    "norm_order": (
        ("canonical", "huggingface", "megatron"),
        "the order of parameters in the sum of the global gradient norm",
    ),
}

#: What the optimiser decides: the step's schedule, and the sizes of the production schedule's blocks.
SCHEDULE: dict[str, tuple[tuple[str, ...], str]] = {
    "schedule": (
        ("explicit", "production", "hopper", "fsdp"),
        "every op forward and backward by itself, for aligning; or fused regions, blocks and flat buffers, for speed; "
        "or Triton kernels, cuBLAS, cuDNN and CUDA graphs, for speed on a Hopper GPU; or torch's modules, autograd and "
        "FSDP2, for models that a rank cannot hold",
    ),
    "products": (
        ("native", "onednn", "torch"),
        "products of two matrices by a C++ kernel, for CPUs alone, but in bf16 where the processor multiplies that; or "
        "in fp32 by oneDNN; or by whatever torch.mm takes: MKL for fp32 on x86, oneDNN for bf16",
    ),
    "regions": (
        ("native", "compiled"),
        "what is not a product: by a C++ kernel, for CPUs alone; or by torch's compiler, in a loop or kernel each. It "
        "makes RoPE beside blocked attention in either case",
    ),
    "attention_kernel": (
        ("native", "blocked"),
        "a C++ kernel that keeps scores in the caches, for CPUs alone; or torch's products, block by block",
    ),
    "attention_block": (("32", "16", "64", "128"), "query positions whose scores exist at a time; for blocked"),
    "head_rows": (("512", "256", "1024", "2048"), "tokens whose logits exist at a time"),
}
#: What takes the place of the C++ kernels, which are for CPUs alone.
WITHOUT_NATIVE = {"attention_kernel": "blocked", "products": "torch", "regions": "compiled"}
#: What the production and hopper schedules decide for a run on several ranks; on one all choices give the same bits.
#: Sharded comes first for the memory that it was measured to save (docs/scale.md has its time too).
SCALE: dict[str, tuple[tuple[str, ...], str]] = {
    "optimizer_state": (
        ("sharded", "replicated"),
        "masters and moments: on each rank its part of them alone, to which gradients are reduced and from which new "
        "weights are sent around (ZeRO-1); or whole on every rank",
    ),
}

#: What only the hopper schedule decides. A rank names an algorithm of cuBLASLt, counted from its own best guess.
PRODUCTS = tuple(
    f"rank_{weight}_{product}"
    for weight in ("qkv", "o", "gate_up", "down", "head")
    for product in ("forward", "input_grad", "weight_grad")
)
HOPPER: dict[str, tuple[tuple[str, ...], str]] = {
    "attention_library": (
        ("cudnn", "flash4"),
        "torch's cuDNN; or FlashAttention-4, a package of its own, whose backward pass leaves nothing to pack",
    ),
    "swiglu_library": (
        ("triton", "quack"),
        "SwiGLU in a kernel of its own; or in the epilogue of the product before it, which is then quack's, with gates "
        "and ups alternating in memory",
    ),
    "weight_gradients": (
        ("inline", "beside"),
        "where weight gradients run: in their turn, or on a second stream, filling what the others leave idle",
    ),
    **{key: (tuple("01234567"), "cuBLASLt's algorithm for this product") for key in PRODUCTS},
}

#: The op whose time each of those choices decides; products in the order of their size.
SIZED = {
    "products": "linear",
    "attention_kernel": "attention",
    "attention_block": "attention",
    "head_rows": "cross_entropy",
    "attention_library": "attention",
    "swiglu_library": "swiglu",
    **{key: "linear" for weight in ("gate_up", "down", "head", "qkv", "o") for key in PRODUCTS if f"_{weight}_" in key},
}

#: What only the fsdp schedule decides.
FSDP: dict[str, tuple[tuple[str, ...], str]] = {
    "recompute": (
        ("layers", "none"),
        "of a layer its input alone is kept, and its backward pass computes the rest again; or all that backward reads "
        "is kept",
    ),
    "gradients": (
        ("sharded", "whole"),
        "reduced after each micro-batch, so that a rank adds up those of its rows alone; or kept whole, in fp32, on "
        "every rank and reduced after the last",
    ),
}
#: The choices of schedules that are made of other ops than the rest.
_APART = {"hopper": (*SCALE, *HOPPER), "fsdp": (*FSDP,)}


class Plan:
    """An immutable mapping from plan keys (ops and structure) to the names chosen."""

    def __init__(self, choices: dict[str, str]):
        self._choices = dict(choices)
        for key, name in self._choices.items():
            options = _options(key)
            if options is None:
                raise UserError("no such plan key", key=key, remedy=f"the keys are {', '.join(_KEYS)}")
            if name not in options:
                raise UserError("no such choice", key=key, value=name, remedy=f"the choices are {', '.join(options)}")
        for key in _KEYS:
            self._choices.setdefault(key, _options(key)[0])  # type: ignore[index]

    @classmethod
    def textbook(cls) -> Plan:
        """The deliberately plain plan from which aligning starts."""
        return cls({})

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Reads ``plan.toml``. Raises UserError when it is missing, malformed or names what does not exist."""
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError("no such plan", file=path, remedy="forgetrain align writes one") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"not valid TOML: {error}", file=path, remedy="fix the syntax at that place") from None
        try:
            return cls({str(key): str(value) for key, value in tree.items()})
        except UserError as error:
            error.file = path
            raise

    def __getitem__(self, key: str) -> str:
        return self._choices[key]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._choices == other._choices

    def __hash__(self) -> int:
        return hash(tuple(sorted(self._choices.items())))

    def items(self) -> list[tuple[str, str]]:
        """Keys and choices of this plan's schedule: hopper and fsdp have their own."""
        keys = _APART.get(self._choices["schedule"])
        keys = [key for key in _KEYS if key not in HOPPER and key not in FSDP] if keys is None else ("schedule", *keys)
        return [(key, self._choices[key]) for key in keys]

    def with_choice(self, key: str, name: str) -> Plan:
        return Plan({**self._choices, key: name})

    def toml(self) -> str:
        return "".join(f'{key} = "{name}"\n' for key, name in self.items())


def choices(target: Target) -> dict[str, tuple[str, ...]]:
    """Every plan key that decides bits and that this target's model makes use of, with its options, for aligning."""
    unused = set()
    if not target.model.qk_norm:
        unused.add("qk_norm")
    if target.model.logit_divisor is None:
        unused.add("mup")
    if target.recipe.optimizer != "muon":
        unused.add("muon")
    return {key: _options(key) for key in [*OPS, *STRUCTURE] if key not in unused}  # type: ignore[misc]


def _options(key: str) -> tuple[str, ...] | None:
    if key in OPS:
        return tuple(OPS[key])
    return {**STRUCTURE, **SCHEDULE, **SCALE, **HOPPER, **FSDP}[key][0] if key in _KEYS else None


_KEYS = (*SCHEDULE, *SCALE, *HOPPER, *FSDP, *STRUCTURE, *OPS)
