"""Writing an engine: the chosen variants' source and the decoder's step as one flat, formatted Python file.

    source = write_engine(target, plan)
    engine = load_engine(path).build(target.plain(), device="cpu", precision="fp32", mesh=None)

There is no other assembled form: what aligning probes, what the judge clocks and what training runs is this file.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.resources
import importlib.util
import inspect
import math
import subprocess
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2
import ruff

from forgetrain.engine.plan import SCALE, SCHEDULE, STRUCTURE, WITHOUT_NATIVE, Plan
from forgetrain.errors import UserError
from forgetrain.ops import blocked, context, fp8, native, native_regions, products, regions, rope
from forgetrain.ops.table import OPS
from forgetrain.spec.stages import stages_of
from forgetrain.spec.target import Target

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("forgetrain.engine", "."),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
    autoescape=False,
)

#: Fields of [model] that do not change what an engine computes.
_NOT_COMPUTED = {"max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"}

#: The ops of which the production schedule still takes a variant; the others are its regions and blocks.
_PRODUCTION_OPS = ("rope_tables", "muon")

#: What each of the production schedule's kernels of attention needs.
_ATTENTION = {
    "native": [native.compiled_attention, native.attention_native_forward, native.attention_native_backward],
    "blocked": [blocked.attention_blocked_forward, blocked.attention_blocked_backward],
}

#: What each of its choices of products needs.
_PRODUCTS = {
    "native": [native.compiled_products, native.product_native, native.weight_gradient_native],
    "onednn": [products.product_onednn, products.weight_gradient_onednn],
    "torch": [products.product_torch, products.weight_gradient_torch],
}

#: What it needs where ranks share the positions of a row.
_CONTEXT_ATTENTION = [
    context.own_positions,
    context.joined_positions,
    context.parted_positions,
    context.attention_context_forward,
    context.attention_context_backward,
]

#: What the sizes of fp8 products are multiples of: cuBLASLt takes rows of so many bytes.
_FP8_SIZES = 16

#: The modules of ops.cuda that the hopper schedule is made of, and those that a choice adds.
_HOPPER_MODULES = ("largest", "linear", "embedding", "rmsnorm", "rope", "attention", "swiglu", "cross_entropy", "adamw")
_HOPPER_LIBRARIES = {"flash4": "flash_attention", "quack": "gated"}


def write_engine(target: Target, plan: Plan, facts: Iterable[str] = ()) -> str:
    """The engine's source. ``facts`` are lines for its header: golden record, verdicts, measured speed."""
    require_schedule(target, plan)
    if plan["schedule"] == "hopper":
        return write_hopper(target, plan, facts)
    if plan["schedule"] == "fsdp":
        return write_fsdp(target, plan, facts)
    model = target.model
    production = plan["schedule"] == "production"
    if production and target.hardware.device != "cpu":
        for key, other in WITHOUT_NATIVE.items():
            if plan[key] == "native":
                remedy = f'choose {key} = "{other}"'
                raise UserError("that kernel is for CPUs", key=key, value="native", remedy=remedy)
    used = _PRODUCTION_OPS if production else tuple(OPS)
    if not model.qk_norm:
        used = tuple(key for key in used if key != "qk_norm")
    if model.logit_divisor is None:
        used = tuple(key for key in used if key != "mup")
    if target.recipe.optimizer != "muon":
        used = tuple(key for key in used if key != "muon")
    variants = {key: OPS[key][plan[key]] for key in used}
    functions = [function for variant in variants.values() for function in variant.functions]
    low = "fp8" if target.precision.dtype == "fp8" else "bf16"
    layer_linear = f"linear_{plan['linear']}"
    if low == "fp8":
        layer_linear = "linear_fp8_block" if target.precision.scaling == "block" else "linear_fp8"
        functions += [getattr(fp8, f"{layer_linear}_{way}") for way in ("forward", "backward")]
    muon = target.recipe.optimizer == "muon"  # whose states are replicated: it needs whole matrices
    compiled = []
    if production:
        needed = [
            f for f in vars(regions).values() if inspect.isfunction(f) and _needs_region(f.__name__, target, plan)
        ]
        by_kernel = vars(native_regions) if plan["regions"] == "native" else {}
        taken = [by_kernel.get(f.__name__.replace("_region", "_native"), f) for f in needed]
        compiled = [f for f in taken if f in needed]
        functions += [*taken, blocked.norm_blocked]
        if by_kernel:
            functions.append(native.compiled)
        functions += _CONTEXT_ATTENTION if target.parallel.context > 1 else _ATTENTION[plan["attention_kernel"]]
        functions += _PRODUCTS[plan["products"]]
    decided = [*used, *((*SCHEDULE, *(() if muon else SCALE)) if production else STRUCTURE)]
    if production and plan["attention_kernel"] == "native":
        decided.remove("attention_block")
    return _rendered(
        "production.py.j2" if production else "decoder.py.j2",
        target,
        plan,
        facts,
        [(key, name) for key, name in plan.items() if key in decided],
        muon=muon,
        sources=_sources(functions, compiled),
        kernel_source=native.kernel_source,
        tensor=target.parallel.tensor,
        context=target.parallel.context,
        sharded=plan["optimizer_state"] == "sharded" and not muon,
        v={key: variant.name for key, variant in variants.items()},
        low=low,
        layer_linear=layer_linear,
        head="model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight",
        residual_scale="None" if model.residual_scale is None else "RESIDUAL_SCALE",
        **_layer_names(target, plan),
    )


def _rendered(
    template: str, target: Target, plan: Plan, facts: Iterable[str], decided: list[tuple[str, str]], **values: Any
) -> str:
    """A template with what every one asks for. decided: the plan's choices that the engine's header names."""
    header = [*facts, "", "Plan:", *(f"    {key} = {name}" for key, name in decided)]
    text = _TEMPLATES.get_template(template).render(
        target=target.name,
        header="\n".join(header).strip(),
        m=target.model,
        model=target.model.model_dump(mode="json", exclude=_NOT_COMPUTED),
        documents=target.data.documents,
        plan=dict(plan.items()),
        **values,
    )
    return format_source(text)


def require_schedule(target: Target, plan: Plan) -> None:
    """Raises UserError for ranks and kernels that the plan's schedule does not have, before anything is written."""
    require_ranks(target, plan)
    if target.precision.dtype == "fp8":
        require_fp8(target, plan)
    if plan["schedule"] == "hopper":
        require_hopper_kernels(target, plan)


def require_ranks(target: Target, plan: Plan) -> None:
    """Raises UserError when the target wants ranks to share layers or rows, and the plan's schedule or kernel, or Muon,
    cannot."""
    parallel, schedule = target.parallel, plan["schedule"]
    if parallel.tensor > 1 and target.recipe.optimizer == "muon":
        raise UserError(
            "splits matrices that Muon needs whole", key="parallel.tensor", value=parallel.tensor, remedy="set it to 1"
        )
    for key, value, what in (("tensor", parallel.tensor, "layers"), ("context", parallel.context, "rows")):
        if value > 1 and schedule != "production":
            raise UserError(
                f"the {schedule} schedule computes whole {what} on every rank",
                key=f"parallel.{key}",
                value=value,
                remedy="set it to 1, or choose the production schedule in the plan",
            )
    if parallel.context > 1 and plan["attention_kernel"] == "native":
        raise UserError(
            "the native kernel of attention has the queries of whole rows",
            key="parallel.context",
            value=parallel.context,
            remedy='set it to 1, or choose attention_kernel = "blocked" in the plan',
        )


def require_hopper_kernels(target: Target, plan: Plan) -> None:
    """Raises UserError for what the kernels of the hopper schedule do not have."""
    model, documents = target.model, target.data.documents
    if documents != "ignore" and plan["attention_library"] != "flash4":
        raise UserError(
            "the hopper schedule parts documents with FlashAttention-4 alone",
            key="data.documents",
            value=documents,
            remedy="choose attention_library = \"flash4\" in the plan, or set it to 'ignore'",
        )
    for key, given, needed in (
        ("model.attention_bias", model.attention_bias, False),
        ("model.qk_norm", model.qk_norm, False),
        ("recipe.optimizer", target.recipe.optimizer, "adamw"),
    ):
        if given != needed:
            remedy = f"set it to {needed!r}, or choose another schedule in the plan"
            raise UserError("the hopper schedule has no kernel for it", key=key, value=given, remedy=remedy)


def require_fp8(target: Target, plan: Plan) -> None:
    """Raises UserError for a schedule, a library or sizes that have no fp8 products."""
    if plan["schedule"] not in ("explicit", "hopper"):
        raise UserError(
            f"the {plan['schedule']} schedule has no fp8 products",
            key="precision.dtype",
            value="fp8",
            remedy="set it to 'bf16', or choose the hopper schedule in the plan",
        )
    if plan["schedule"] == "explicit":
        return
    if plan["swiglu_library"] == "quack":
        raise UserError(
            "its product is one of bf16, the target's is fp8",
            key="swiglu_library",
            value="quack",
            remedy='choose "triton" in the plan',
        )
    model, recipe, gates = target.model, target.recipe, target.gates
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    lengths = [stage.sequence_length for stage in stages_of(target)]
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.intermediate_size": model.intermediate_size,
        "model.num_attention_heads * head_dim": model.num_attention_heads * model.head_dim,
        "(model.num_attention_heads + 2 * num_key_value_heads) * head_dim": heads * model.head_dim,
        "recipe.micro_batch_size * sequence_length": recipe.micro_batch_size * math.gcd(*lengths),
        "gates.micro_batch_size * sequence_length": gates.micro_batch_size * gates.sequence_length,
    }
    for key, size in sizes.items():
        if size % _FP8_SIZES:
            remedy = "change it, or set precision.dtype to 'bf16'"
            raise UserError(f"fp8 products need multiples of {_FP8_SIZES}", key=key, value=size, remedy=remedy)


def write_hopper(target: Target, plan: Plan, facts: Iterable[str]) -> str:
    """The engine of the hopper schedule, of which ``require_schedule`` has asked nothing that its kernels lack."""
    model = target.model
    sharded, eight = plan["optimizer_state"] == "sharded", target.precision.dtype == "fp8"
    scaling = target.precision.scaling
    chosen = {name: name in (plan["attention_library"], plan["swiglu_library"]) for name in _HOPPER_LIBRARIES}
    modules = [
        *_HOPPER_MODULES,
        *["fp8", f"fp8_{scaling}"] * eight,
        *(module for name, module in _HOPPER_LIBRARIES.items() if chosen[name]),
    ]
    return _rendered(
        "hopper.py.j2",
        target,
        plan,
        facts,
        [(key, name) for key, name in plan.items() if not (chosen["quack"] and key == "rank_gate_up_forward")],
        sources="\n\n".join(map(_module_source, modules)),
        **chosen,
        fp8=eight,
        blocks=scaling == "block",  # or else, of fp8, largest magnitudes are noted
        noted=eight and scaling == "tensor",
        dtype="fp8" if eight else "bf16",
        linear="fp8" if eight else "linear",
        matrix="self.matrix(" if eight else "w[",
        close=")" if eight else "]",
        operand="Fp8 | Tensor" if eight else "Tensor",
        d_o="d_o" if eight else "dx",
        masked=target.data.documents != "ignore",
        first=", micro.first" if target.data.documents == "mask+reset" else "",
        sharded=sharded,
        tensor=1,
        flat="weight" if sharded else "master",
        head="model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight",
    )


def write_fsdp(target: Target, plan: Plan, facts: Iterable[str]) -> str:
    """The engine of the fsdp schedule. Raises UserError for Muon."""
    if target.recipe.optimizer == "muon":
        raise UserError(
            "the fsdp schedule shards the matrices that Muon needs whole",
            key="recipe.optimizer",
            value=target.recipe.optimizer,
            remedy="set it to 'adamw', or choose another schedule in the plan",
        )
    sources = _sources([rope.rope_tables_textbook_forward, rope.rope_textbook_forward], [])
    return _rendered("fsdp.py.j2", target, plan, facts, plan.items(), sources=sources)


def _module_source(name: str) -> str:
    """A module's docstring as a comment, and all that follows its imports. Read, not imported: Triton may be absent."""
    text = importlib.resources.files("forgetrain.ops.cuda").joinpath(f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    last = max(node.end_lineno or 0 for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    comment = "\n".join(f"# {line}".rstrip() for line in (ast.get_docstring(tree) or "").splitlines())
    return comment + "\n\n" + "\n".join(text.splitlines()[last:]).strip() + "\n"


def _needs_region(name: str, target: Target, plan: Plan) -> bool:
    if name == "transposed_region":
        return plan["products"] == "onednn"
    if name.startswith("rope_"):
        return name.endswith("_region") and plan["attention_kernel"] == "blocked"
    unused = "entropy_region" if target.parallel.tensor > 1 else "vocabulary_"
    return name.endswith("_region") and (
        (target.model.qk_norm or not name.startswith("head_norm")) and not name.startswith(unused)
    )


def format_source(text: str) -> str:
    """Formatted as this project's own code is, with unused imports taken out."""
    options = ["--line-length", "120", "--isolated", "--quiet"]
    for command in (
        ["check", "--fix", "--exit-zero", "--select", "F401,I001", *options, "-"],
        ["format", *options, "-"],
    ):
        done = subprocess.run([ruff.find_ruff_bin(), *command], input=text, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the written engine is not valid Python: {done.stderr.strip()}")
        text = done.stdout
    return text


def source_hash(source: str) -> str:
    """SHA-256 of an engine's source, the identity under which verdicts are kept."""
    return hashlib.sha256(source.encode()).hexdigest()


def load_engine(path: str | Path) -> types.ModuleType:
    """Imports an engine file. Raises UserError when it is missing, does not import, or has no ``build``."""
    path = Path(path)
    if not path.is_file():
        raise UserError("no such engine file", file=path, remedy="forgetrain align writes one")
    name = f"forgetrain_engine_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError("is not a Python file", file=path, remedy="an engine's name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a stranger's file raises, it is that file's fault
        del sys.modules[name]
        raise UserError(
            f"the engine does not import: {type(error).__name__}: {error}",
            file=path,
            remedy="run it with python to see where",
        ) from error
    if not callable(getattr(module, "build", None)):
        raise UserError("the engine has no build function", file=path, remedy="see docs/engine-contract.md")
    return module


def _layer_names(target: Target, plan: Plan) -> dict[str, list[str]]:
    """The per-layer tensor lists that the template writes out: as stored, canonical, and in the references' orders."""
    model = target.model
    prefix = "model.layers.0."
    canonical = [n.removeprefix(prefix) for n in model.parameter_shapes() if n.startswith(prefix)]
    kinds = ["weight", "bias"] if model.attention_bias else ["weight"]
    qkv = [f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in kinds]
    if plan["qkv"] != "split":
        qkv = [f"self_attn.qkv_proj.{kind}" for kind in kinds]
    qk_norm = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] if model.qk_norm else []
    gate_up = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    if plan["gate_up"] == "fused":
        gate_up = ["mlp.gate_up_proj.weight"]
    out, down = ["self_attn.o_proj.weight"], ["mlp.down_proj.weight"]
    norm1, norm2 = ["input_layernorm.weight"], ["post_attention_layernorm.weight"]
    matrices = [name for name in qkv if name.endswith("weight")]
    biases = [name for name in qkv if name.endswith("bias")]
    return {
        "layer_names": [*norm1, *qkv, *qk_norm, *out, *norm2, *gate_up, *down],
        "canonical_layer_names": canonical,
        "hf_layer_names": [*qkv, *out, *qk_norm, *gate_up, *down, *norm1, *norm2],
        # Megatron's optimizer groups what decays before what does not, each in the order of its modules
        "megatron_matrices": [*out, *matrices, *gate_up, *down],
        "megatron_vectors": [*norm1, *biases, *qk_norm, *norm2],
        "qkv_kinds": kinds,
    }


def _sources(functions: Iterable[Callable], compiled: list[Callable]) -> str:
    """The functions' source with whatever module-level functions of the ops they call, each once, callees first;
    those in ``compiled`` are handed to torch.compile."""
    done: dict[str, str] = {}

    def visit(function: Callable) -> None:
        if function.__name__ in done:
            return
        done[function.__name__] = ""  # before its callees, so that recursion ends
        for name in _names(function.__code__):
            callee = function.__globals__.get(name)
            if inspect.isfunction(callee) and callee.__module__.startswith("forgetrain.ops"):
                visit(callee)
        done[function.__name__] = done.pop(function.__name__) or (
            "@torch.compile(dynamic=False)\n" * (function in compiled) + _source(function)
        )

    for function in functions:
        visit(function)
    return "\n\n".join(done.values())


@functools.cache
def _source(function: Callable) -> str:
    """Read once: a search writes dozens of engines of the same functions."""
    return inspect.getsource(function)


def _names(code: types.CodeType) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names(constant)
    return names
