"""Where the taps lie in megatron-core's GPTModel (local layer spec): module hooks that collect them in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from forgetrain.reference.megatron_layout import split_qkv
from forgetrain.spec.model import Model

Found = dict[str, Tensor]


class Collector:
    """Hooks a GPTModel while ``with`` lasts; ``forward`` and ``grad`` then hold canonical tensors by place."""

    def __init__(self, gpt: nn.Module, model: Model):
        self._gpt, self._model = gpt, model
        self.forward: Found = {}
        self.grad: Found = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Collector:
        gpt: Any = self._gpt
        self._output(gpt.embedding, "model.embed_tokens")
        for i, layer in enumerate(gpt.decoder.layers):
            p = f"model.layers.{i}."
            attention, mlp = layer.self_attention, layer.mlp
            self._output(layer.input_layernorm, p + "input_layernorm")
            qkv = [f"{p}self_attn.{name}_proj" for name in "qkv"]
            self._output(attention.linear_qkv, *qkv, split=lambda x: split_qkv(self._model, x, dim=-1))
            if self._model.qk_norm:
                self._output(attention.q_layernorm, p + "self_attn.q_norm")
                self._output(attention.k_layernorm, p + "self_attn.k_norm")
            self._input(attention.core_attention, p + "self_attn.q_rope", p + "self_attn.k_rope")
            self._output(attention.core_attention, p + "self_attn.attention")
            self._output(attention.linear_proj, p + "self_attn.o_proj")
            self._input(layer.pre_mlp_layernorm, p + "attention_residual")
            self._output(layer.pre_mlp_layernorm, p + "post_attention_layernorm")
            gate_up = [p + "mlp.gate_proj", p + "mlp.up_proj"]
            self._output(mlp.linear_fc1, *gate_up, split=lambda x: x.chunk(2, dim=-1))
            self._input(mlp.linear_fc2, p + "mlp.swiglu")
            self._output(mlp.linear_fc2, p + "mlp.down_proj")
            self._output(layer, p + "mlp_residual")
        self._output(gpt.decoder.final_layernorm, "model.norm")
        self._output(gpt.output_layer, "lm_head")
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _output(self, module: nn.Module, *places: str, split: Callable | None = None) -> None:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            self._take(out[0] if isinstance(out, tuple) else out, places, split)

        self._handles.append(module.register_forward_hook(hook))

    def _input(self, module: nn.Module, *places: str) -> None:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            tensors = [*args, *kwargs.values()]
            for place, tensor in zip(places, tensors[: len(places)], strict=True):
                self._take(tensor, (place,), None)

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _take(self, tensor: Tensor, places: tuple[str, ...], split: Callable | None) -> None:
        """Keeps the tensor, and its whole gradient when it comes, under its place; a fused one under several."""

        def keep(found: Found, value: Tensor) -> None:
            parts = (value,) if split is None else split(value)
            for place, part in zip(places, parts, strict=True):
                found[place] = canonical(part.detach())

        keep(self.forward, tensor)
        tensor.register_hook(lambda grad: keep(self.grad, grad))


def canonical(x: Tensor) -> Tensor:
    """[S, N, ...] to [N, S, width], a copy."""
    return x.transpose(0, 1).flatten(2).clone(memory_format=torch.contiguous_format)
