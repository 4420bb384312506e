"""Where the taps lie in transformers' Llama-like models: hooks that collect them in one pass."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from forgetrain.spec.model import Model

Found = dict[str, Tensor]


class Collector:
    """Hooks a causal language model while ``with`` lasts; ``forward`` and ``grad`` hold canonical tensors by place."""

    def __init__(self, network: nn.Module, model: Model):
        self._network, self._model = network, model
        self.forward: Found = {}
        self.grad: Found = {}
        self._handles: list[Any] = []
        self._layer = 0

    def __enter__(self) -> Collector:
        network: Any = self._network
        self._output(network.model.embed_tokens, "model.embed_tokens")
        for i, layer in enumerate(network.model.layers):
            p = f"model.layers.{i}."
            attention, mlp = layer.self_attn, layer.mlp
            self._output(layer.input_layernorm, p + "input_layernorm")
            names = ["q_proj", "k_proj", "v_proj", "o_proj"] + (["q_norm", "k_norm"] if self._model.qk_norm else [])
            for name in names:
                self._output(getattr(attention, name), f"{p}self_attn.{name}")
            self._input(attention.o_proj, p + "self_attn.attention")
            self._input(layer.post_attention_layernorm, p + "attention_residual")
            self._output(layer.post_attention_layernorm, p + "post_attention_layernorm")
            for name in ("gate_proj", "up_proj", "down_proj"):
                self._output(getattr(mlp, name), f"{p}mlp.{name}")
            self._input(mlp.down_proj, p + "mlp.swiglu")
            self._output(layer, p + "mlp_residual")
        self._output(network.model.norm, "model.norm")
        self._output(network.lm_head, "lm_head")
        # turned queries and keys pass through no module: the function that turns them is watched in its own module
        self._modeling: Any = sys.modules[type(network.model.layers[0].self_attn).__module__]
        self._turn = self._modeling.apply_rotary_pos_emb
        self._modeling.apply_rotary_pos_emb = self._turn_and_keep
        return self

    def __exit__(self, *_: object) -> None:
        self._modeling.apply_rotary_pos_emb = self._turn
        for handle in self._handles:
            handle.remove()

    def _turn_and_keep(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = self._turn(*args, **kwargs)
        self._take(q, f"model.layers.{self._layer}.self_attn.q_rope", heads_first=True)
        self._take(k, f"model.layers.{self._layer}.self_attn.k_rope", heads_first=True)
        self._layer += 1
        return q, k

    def _output(self, module: nn.Module, place: str) -> None:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            self._take(out[0] if isinstance(out, tuple) else out, place)

        self._handles.append(module.register_forward_hook(hook))

    def _input(self, module: nn.Module, place: str) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda _, args: self._take(args[0], place)))

    def _take(self, tensor: Tensor, place: str, heads_first: bool = False) -> None:
        """Keeps the tensor, and its whole gradient when it comes."""

        def canonical(x: Tensor) -> Tensor:
            x = x.detach().transpose(1, 2) if heads_first else x.detach()
            return x.flatten(2).clone(memory_format=torch.contiguous_format)

        self.forward[place] = canonical(tensor)
        tensor.register_hook(lambda grad: self.grad.__setitem__(place, canonical(grad)))
