"""From the modules of anybody's model to canonical names: which tensor of theirs is which tap, which parameter which.

A name map has regular expressions that match a whole module name, each with what it is called here, or with several
names in order when the module is fused:

    {
        r"blocks\\.(\\d+)\\.norm1": r"model.layers.\\1.input_layernorm",
        r"blocks\\.(\\d+)\\.mlp\\.w13": (r"model.layers.\\1.mlp.gate_proj", r"model.layers.\\1.mlp.up_proj"),
        r"head": "lm_head",
    }
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forgetrain.errors import UserError
from forgetrain.spec.model import Model
from forgetrain.spec.taps import forward_taps

NameMap = Mapping[str, str | tuple[str, ...]]

_REMEDY = "see docs/capture.md for the name map"


@dataclass(frozen=True)
class Resolved:
    """outputs, inputs: module → places of what comes out of it and goes into it. parameters: each of theirs with the
    canonical ones that it holds, joined along dimension 0. missing: places that no module of the model gives."""

    outputs: dict[nn.Module, tuple[str, ...]]
    inputs: dict[nn.Module, str]
    parameters: list[tuple[nn.Parameter, tuple[str, ...]]]
    missing: list[str]


def resolve(network: nn.Module, model: Model, names: NameMap) -> Resolved:
    """Applies a name map to a model.

    Raises:
        UserError: a name that is no place, a parameter without a canonical name or of another shape, a canonical
            parameter that is not there.
    """
    places = [tap.name for tap in forward_taps(model)]
    outputs: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in network.named_modules():
        found = _canonical(name, names)
        if found:
            outputs[module] = found
            unknown = [place for place in found if place not in places]
            if unknown:
                raise UserError("is no place in the table of taps", key=name, value=unknown[0], remedy=_REMEDY)
    inputs = _inputs(model, outputs)
    given = {place for found in outputs.values() for place in found} | set(inputs.values()) | {"nll", "loss"}
    missing = [place for place in places if place not in given]
    return Resolved(outputs, inputs, _parameters(network, model, names), missing)


def _canonical(name: str, names: NameMap) -> tuple[str, ...]:
    for pattern, replacement in names.items():
        match = re.fullmatch(pattern, name)
        if match is not None:
            several = (replacement,) if isinstance(replacement, str) else replacement
            return tuple(match.expand(one) for one in several)
    return ()


def _inputs(model: Model, outputs: Mapping[nn.Module, tuple[str, ...]]) -> dict[nn.Module, str]:
    """Places that are the input of a mapped module, unless the map names a module whose output they are."""
    last = model.num_hidden_layers - 1
    reads = {"model.norm": f"model.layers.{last}.mlp_residual"}
    for i in range(model.num_hidden_layers):
        layer = f"model.layers.{i}."
        reads[layer + "self_attn.o_proj"] = layer + "self_attn.attention"
        reads[layer + "post_attention_layernorm"] = layer + "attention_residual"
        reads[layer + "mlp.down_proj"] = layer + "mlp.swiglu"
        if i > 0:
            reads[layer + "input_layernorm"] = f"model.layers.{i - 1}.mlp_residual"
    named = {place for found in outputs.values() for place in found}
    found = {module: reads[places[0]] for module, places in outputs.items() if places[0] in reads}
    return {module: place for module, place in found.items() if place not in named}


def _parameters(network: nn.Module, model: Model, names: NameMap) -> list[tuple[nn.Parameter, tuple[str, ...]]]:
    shapes = model.parameter_shapes()
    found: dict[str, nn.Parameter] = {}
    parameters = []
    for module_name, module in network.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            theirs = f"{module_name}.{own}"
            kind = "bias" if own.endswith("bias") else "weight"
            canonical = tuple(f"{place}.{kind}" for place in _canonical(module_name, names))
            if canonical == ("lm_head.weight",) and model.tie_word_embeddings:
                if parameter is not found.get("model.embed_tokens.weight", parameter):
                    raise UserError("is not the embedding", key=theirs, remedy="set model.tie_word_embeddings = false")
                continue
            unknown = [name for name in canonical if name not in shapes]
            if not canonical or unknown:
                value = unknown[0] if unknown else None
                raise UserError("has no canonical name in this target", key=theirs, value=value, remedy=_REMEDY)
            if parameter in _Identity(found.values()):
                raise UserError("is the embedding again", key=theirs, remedy="set model.tie_word_embeddings = true")
            rows = sum(shapes[name][0] for name in canonical)
            due = (rows, *shapes[canonical[0]][1:])
            if tuple(parameter.shape) != due:
                problem = f"has shape {list(parameter.shape)}, the target's {' + '.join(canonical)} {list(due)}"
                raise UserError(problem, key=theirs, remedy="change the target's [model] or the script")
            found |= dict.fromkeys(canonical, parameter)
            parameters.append((parameter, canonical))
    missing = [name for name in shapes if name not in found]
    if missing:
        raise UserError("is in the target's model, but no module is mapped to it", key=missing[0], remedy=_REMEDY)
    return parameters


class _Identity:
    """Membership by identity; tensors compare by value."""

    def __init__(self, items):
        self._ids = {id(item) for item in items}

    def __contains__(self, item: object) -> bool:
        return id(item) in self._ids


def split_rows(tensor: Tensor, names: tuple[str, ...], model: Model) -> dict[str, Tensor]:
    """A parameter of theirs, or its gradient or moment, under the canonical names that it holds; views."""
    shapes = model.parameter_shapes()
    parts = tensor.split([shapes[name][0] for name in names])
    return dict(zip(names, parts, strict=True))


def in_layout(tensor: Tensor, place: str, rows: int, length: int, width: int | None) -> Tensor:
    """A copy in canonical layout, [N, S, width] (``nll`` [N, S], ``loss`` []), of a tensor with heads apart or tokens
    flattened. Raises UserError for a shape that is none of these, or that could be two of them."""
    tensor = tensor.detach()
    if width is None:
        due = (rows, length) if place == "nll" else ()
        if tensor.numel() != torch.Size(due).numel():
            raise UserError(f"has shape {list(tensor.shape)}, not {list(due)}", key=place)
        return tensor.reshape(due).clone()
    found = []
    if tensor.dim() == 4 and tensor.shape[:2] == (rows, length):
        found.append(tensor.flatten(2))
    if tensor.dim() == 4 and (tensor.shape[0], tensor.shape[2]) == (rows, length):
        found.append(tensor.transpose(1, 2).flatten(2))
    if tensor.dim() == 3 and tensor.shape[:2] == (rows, length):
        found.append(tensor)
    if tensor.dim() == 3 and tensor.shape[:2] == (length, rows) and rows != length:
        found.append(tensor.transpose(0, 1))
    if tensor.dim() == 2 and tensor.shape[0] == rows * length:
        found.append(tensor.unflatten(0, (rows, length)))
    found = [x for x in found if x.shape[-1] == width]
    if len(found) != 1:
        what = "could be read in two ways" if found else f"is no layout of [{rows}, {length}, {width}]"
        remedy = "choose another gates.sequence_length" if found else "map the module whose output it is"
        raise UserError(f"its shape {what}", key=place, value=list(tensor.shape), remedy=remedy)
    return found[0].clone(memory_format=torch.contiguous_format)
