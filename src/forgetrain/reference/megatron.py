"""megatron-core as the reference: its own GPTModel, cross-entropy, DistributedDataParallel and optimizer.

Runs in a process of its own, since on a CPU it needs the shims of ``megatron_shims``:

    with EngineProcess("forgetrain.reference.megatron", target) as reference:
        reference.load(weights)
        reference.step(batch, lr=1e-3)

What this adapter adds to megatron-core is the loop over micro-batches, the loss as the contract has it (masked sum over
the global denominator; gradients are summed over ranks, not averaged), the learning rate, and a step that is left out
when the norm is not finite.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.nn import functional as F

from forgetrain.engine.contract import Batch, Shard, StepResult
from forgetrain.errors import UserError
from forgetrain.reference.megatron_layout import from_megatron, to_megatron
from forgetrain.reference.megatron_shims import apply_shims, compiled_when_called, share_gpu
from forgetrain.reference.megatron_taps import Collector
from forgetrain.spec.taps import forward_taps
from forgetrain.spec.target import Target, parse_target

_KINDS = ("master", "exp_avg", "exp_avg_sq")


class Megatron:
    """One rank of megatron-core's data-parallel training, behind the engine contract."""

    def __init__(self, target: Target, device: str, precision: str):
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        model, recipe = target.model, target.recipe
        self.target, self.device, self.bf16 = target, device, precision == "bf16"
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        config = _config(target, device, dtype)
        gpt = GPTModel(
            config,
            get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization="RMSNorm"),
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=int(model.rope_theta),
            share_embeddings_and_output_weights=model.tie_word_embeddings,
        ).to(device)
        self.gpt: Any = gpt
        self.ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=False,
                use_distributed_optimizer=target.reference.distributed_optimizer,
            ),
            Float16Module(config, gpt) if self.bf16 else gpt,
        )
        self.optimizer: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=recipe.lr,
                bf16=self.bf16,
                params_dtype=dtype,
                clip_grad=recipe.clip,
                adam_beta1=recipe.beta1,
                adam_beta2=recipe.beta2,
                adam_eps=recipe.eps,
                weight_decay=recipe.weight_decay,
                use_distributed_optimizer=target.reference.distributed_optimizer,
            ),
            [self.ddp],
        )
        self.updates = 0

    # One step

    def step(self, batch: Any, lr: float) -> StepResult:
        loss = self._gradients(batch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            # Megatron's scheduler would set this; without it every group would decay
            group["weight_decay"] = self.target.recipe.weight_decay * group["wd_mult"]
        inner = self._inner()
        inner.prepare_grads()
        norm = float(inner.clip_grad_norm(self.target.recipe.clip))  # a number on a CPU, on a GPU a tensor [1]
        applied = math.isfinite(norm)
        if applied:
            inner.step_with_ready_grads()
            self.updates += 1
        return StepResult(loss, torch.tensor(norm, dtype=torch.float32), torch.tensor(applied))

    def _gradients(self, batch: Any) -> Tensor:
        """Forward and backward of every micro-batch, then the reduction; returns the global loss."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        for micro, mask in self._micro_batches(batch):
            share = self._loss(micro, mask)[1]
            share.backward()
            loss = loss + share.detach()
        return self._reduced(loss)

    def _reduced(self, loss: Tensor) -> Tensor:
        self.ddp.finish_grad_sync()
        if dist.get_world_size() > 1:
            dist.all_reduce(loss)
        return loss

    def _loss(self, micro: Batch, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """nll [N, S] in fp32 and the micro-batch's share of the loss, []."""
        n, s = micro.tokens.shape
        position = torch.arange(s, device=self.device).expand(n, s)
        nll = self.ddp(micro.tokens, position, mask, labels=micro.labels).float()
        return nll, (nll * micro.mask).sum() / micro.loss_denominator

    def _micro_batches(self, batch: Any) -> Iterator[tuple[Batch, Tensor | None]]:
        """Micro-batches with Megatron's attention mask, true where a key is hidden; None is plain causal."""
        n, s = batch.tokens.shape
        hidden = None
        if self.target.data.documents == "mask":
            place = torch.arange(n * s, device=self.device)
            document = torch.searchsorted(batch.cu_seqlens, place, right=True).view(n, s)
            future = torch.ones(s, s, dtype=torch.bool, device=self.device).triu(1)
            hidden = ((document[:, :, None] != document[:, None, :]) | future)[:, None]
        for start in range(0, n, self.target.recipe.micro_batch_size):
            row = slice(start, start + self.target.recipe.micro_batch_size)
            micro = Batch(
                batch.tokens[row], batch.labels[row], batch.mask[row], batch.cu_seqlens, batch.loss_denominator
            )
            yield micro, None if hidden is None else hidden[row]

    @torch.no_grad()
    def loss(self, batch: Any) -> Tensor:
        denominator = batch.mask.sum()
        shares = [
            self._loss(m._replace(loss_denominator=denominator), mask)[1] for m, mask in self._micro_batches(batch)
        ]
        return torch.stack(shares).sum()

    def probe(self, batch: Any) -> Iterable[tuple[str, Tensor]]:
        places = [tap.name for tap in forward_taps(self.target.model)]
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        for number, (micro, mask) in enumerate(self._micro_batches(batch)):
            with Collector(self.gpt, self.target.model) as found:
                nll, share = self._loss(micro, mask)
                share.backward()
            found.forward |= {"nll": nll.detach(), "loss": share.detach()}
            for place in places:
                yield f"{place}#fwd@{number}", found.forward.pop(place)
            for place in reversed(places):
                if place in found.grad:
                    yield f"{place}#grad@{number}", found.grad.pop(place)
        self._reduced(torch.zeros((), device=self.device))
        order = list(reversed(self.target.model.parameter_shapes()))
        yield from self._main_grads("grad", order)
        inner = self._inner()
        inner.prepare_grads()
        inner.clip_grad_norm(self.target.recipe.clip)
        yield from self._main_grads("clipped", order)

    def _main_grads(self, kind: str, order: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Gradients as they stand in Megatron's fp32 buffer, of which the optimizer's are views."""
        grads: dict[str, Tensor] = {name: p.main_grad for name, p in self.gpt.named_parameters()}
        canonical = {name: grad.clone() for name, grad in from_megatron(self.target.model, grads).items()}
        for name in order:
            yield f"{name}#{kind}", canonical[name]

    # Weights and state

    def load(self, weights: Mapping[str, Tensor]) -> None:
        theirs = to_megatron(self.target.model, weights)
        with torch.no_grad():
            for name, parameter in self.gpt.named_parameters():
                parameter.copy_(theirs[name])
        self.optimizer.reload_model_params()
        self._inner().optimizer.state.clear()
        self.updates = 0

    def state(self) -> dict[str, Shard]:
        shards = {}
        for kind in _KINDS:
            theirs = {name: self._gathered(p, kind) for name, p in self.gpt.named_parameters()}
            for name, tensor in from_megatron(self.target.model, theirs).items():
                shards[f"{kind}/{name}"] = Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim())
        return {**shards, "step": Shard(torch.tensor(self.updates), (), ())}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["step"].tensor)
        inner = self._inner()
        inner.optimizer.state.clear()
        for kind in _KINDS:
            canonical = {name: state[f"{kind}/{name}"].tensor for name in self.target.model.parameter_shapes()}
            theirs = to_megatron(self.target.model, canonical)
            for name, parameter in self.gpt.named_parameters():
                main, piece = self._main(parameter)
                if kind == "master":
                    with torch.no_grad():
                        parameter.copy_(theirs[name])
                        if main is not None and main is not parameter:
                            main.copy_(theirs[name].flatten()[piece].view_as(main))
                elif main is not None and self.updates:
                    slot = inner.optimizer.state[main]
                    slot[kind] = theirs[name].flatten()[piece].reshape(main.shape).clone()
                    slot["step"] = torch.tensor(float(self.updates))

    def _gathered(self, parameter: Any, kind: str) -> Tensor:
        """The fp32 master or moment of a parameter, whole: with the distributed optimizer each rank holds a piece of
        it, and every element is on one rank alone, so that a sum over ranks is exact."""
        main, piece = self._main(parameter)
        whole = torch.zeros(parameter.numel(), device=self.device)
        if main is not None:
            state = self._inner().optimizer.state.get(main, {})
            source = main.detach() if kind == "master" else state.get(kind, torch.zeros_like(main))
            whole[piece] = source.flatten().float()
        if self.target.reference.distributed_optimizer and dist.get_world_size() > 1:
            dist.all_reduce(whole)
        return whole.view(parameter.shape)

    def _main(self, parameter: Any) -> tuple[Any, slice]:
        """The tensor that the optimizer updates for this parameter, and the piece of it that this rank holds."""
        whole = slice(0, parameter.numel())
        if not self.target.reference.distributed_optimizer:
            return (parameter.main_param if self.bf16 else parameter), whole
        inner = self._inner()
        if parameter not in inner.model_param_gbuf_map:
            return None, whole
        span = inner._get_model_param_range_map(parameter)["param"]
        number, position = inner.model_param_group_index_map[parameter]
        return inner.optimizer.param_groups[number]["params"][position], slice(span.start, span.end)

    def _inner(self) -> Any:
        """The one optimizer inside Megatron's chain of them."""
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])[0]


def preload() -> None:
    """Imports megatron-core, which takes longer than all else that ``build`` does. Raises ImportError."""
    with warnings.catch_warnings(), compiled_when_called():
        warnings.simplefilter("ignore")  # that Transformer Engine and Apex are absent is this reference's point
        for name in ("megatron.core.models.gpt.gpt_model", "megatron.core.optimizer"):
            importlib.import_module(name)
        importlib.import_module("torch._dynamo")  # as the first of torch's optimizers would


def build(target: Mapping[str, Any], *, device: str, precision: str, mesh: Any = None) -> Megatron:
    """The factory. Raises UserError for what megatron-core's local layers cannot compute, naming the key."""
    parsed = parse_target(dict(target))
    refuse_unsupported(parsed)
    try:
        preload()
        from megatron.core import parallel_state
    except ImportError as error:
        raise UserError(
            f"megatron-core is not usable: {error}",
            key="reference.name",
            remedy="run pip install 'forgetrain[megatron]'",
        ) from None
    warnings.filterwarnings("ignore", module="megatron")
    if device == "cpu":
        apply_shims()
    if not dist.is_initialized():
        # Megatron asks for a process group even for one rank; several ranks come with theirs, made by the caller
        dist.init_process_group("gloo" if device == "cpu" else "nccl", store=HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1, 1)
    if device != "cpu":
        if dist.get_backend() == "gloo":
            share_gpu()
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1)
    return Megatron(parsed, device, precision)


def refuse_unsupported(target: Target) -> None:
    """Raises UserError when megatron-core does not have what the target asks for."""
    if target.model.architecture == "minicpm":
        raise UserError(
            "megatron-core has no muP residual scale",
            key="reference.name",
            value="megatron",
            remedy="use the transformers reference for MiniCPM4",
        )
    if target.recipe.optimizer == "muon":
        raise UserError(
            "megatron-core's Muon needs the package emerging_optimizers and a GPU; it is no reference here",
            key="recipe.optimizer",
            value="muon",
            remedy='set reference.name = "transformers", which steps with torch.optim.Muon',
        )
    if target.data.documents == "mask+reset":
        raise UserError(
            "megatron-core's local RoPE takes no positions, so they cannot start again at each document",
            key="data.documents",
            value=target.data.documents,
            remedy='use "mask", or the transformers reference',
        )


def _config(target: Target, device: str, dtype: torch.dtype) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    model = target.model
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.attention_bias,
        qk_layernorm=model.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=device == "cpu",
        calculate_per_token_loss=True,  # gradients are summed over ranks, not averaged
        attention_softmax_in_fp32=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
