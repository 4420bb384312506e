"""transformers as the reference: its Llama, Qwen2 and Qwen3 models, and MiniCPM4 by its published formulas.

    with EngineProcess("forgetrain.reference.transformers", target) as reference:
        reference.load(weights)
        reference.step(batch, lr=1e-3)

What trains is torch: AdamW, Muon where the recipe asks for it, clip_grad_norm_, and in fp32 over several ranks
DistributedDataParallel with a hook that sums instead of averaging. transformers has no bf16 policy with fp32 masters:
in bf16 this adapter keeps Megatron's: masters from the rounded weights, each micro-batch's gradients added to fp32
buffers, which are summed over ranks.

MiniCPM4, of which transformers has no model, is in ``reference.minicpm``.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from forgetrain.engine.contract import Batch, Shard, StepResult
from forgetrain.errors import UserError
from forgetrain.reference.transformers_taps import Collector
from forgetrain.spec.model import Model
from forgetrain.spec.moments import by_muon, state_shapes
from forgetrain.spec.taps import forward_taps
from forgetrain.spec.target import Target, parse_target


class Transformers:
    """One rank of training a transformers model, behind the engine contract."""

    def __init__(self, target: Target, device: str, precision: str, group: Any):
        self.target, self.device, self.group = target, device, group
        self.bf16 = precision == "bf16"
        self.network = make_network(target.model, target.reference.attention, precision).to(device)
        named = dict(self.network.named_parameters())
        self.parameters = {name: named[name] for name in named if name in target.model.parameter_shapes()}
        self.masters: dict[str, Tensor] = {
            name: nn.Parameter(p.detach().float().clone()) if self.bf16 else p for name, p in self.parameters.items()
        }
        recipe = target.recipe
        muon = [p for name, p in self.masters.items() if by_muon(recipe, name, p.dim())]
        decayed = [p for name, p in self.masters.items() if p.dim() > 1 and not by_muon(recipe, name, p.dim())]
        others = [p for p in self.masters.values() if p.dim() <= 1]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
        )
        self.optimizers: list[torch.optim.Optimizer] = [self.adamw]
        if muon:
            momentum, decay = recipe.muon_momentum, recipe.weight_decay
            self.optimizers.append(torch.optim.Muon(muon, recipe.lr, decay, momentum, adjust_lr_fn="match_rms_adamw"))
        self.model: Any = self.network
        if group is not None and not self.bf16:
            ddp = DistributedDataParallel(self.network, process_group=group)
            ddp.register_comm_hook(group, _sum_over_ranks)
            self.model = ddp

    # One step

    def step(self, batch: Any, lr: float) -> StepResult:
        loss = self._gradients(batch)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.target.recipe.clip)
        applied = torch.isfinite(norm)
        if applied:
            for optimizer in self.optimizers:
                optimizer.step()
            self._round()
        return StepResult(loss, norm.float(), applied)

    def _gradients(self, batch: Any) -> Tensor:
        """Leaves the step's summed gradients in the masters' ``grad``; returns the global loss."""
        self._forget_gradients()
        loss = torch.zeros((), device=self.device)
        micro_batches = list(self._micro_batches(batch))
        for number, micro in enumerate(micro_batches):
            loss = loss + self._backward(micro, last=number == len(micro_batches) - 1)[1].detach()
        return self._reduced(loss)

    def _backward(self, micro: _Micro, last: bool) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-batch: nll [N, S] in fp32, and its share of the loss, []."""
        together = self.model.no_sync() if self.model is not self.network and not last else contextlib.nullcontext()
        with together:
            nll, share = self._loss(self.model, micro)
            share.backward()
        if self.bf16:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    master = self.masters[name]
                    if master.grad is None:
                        master.grad = torch.zeros_like(master)
                    master.grad.add_(p.grad)  # type: ignore[arg-type]
                    p.grad = None
        return nll, share

    def _loss(self, model: Any, micro: _Micro) -> tuple[Tensor, Tensor]:
        batch = micro.batch
        logits = model(batch.tokens, attention_mask=micro.mask, position_ids=micro.position, use_cache=False).logits
        flat = logits.float().view(-1, self.target.model.vocab_size)
        nll = F.cross_entropy(flat, batch.labels.reshape(-1), reduction="none").view(batch.labels.shape)
        return nll, (nll * batch.mask).sum() / batch.loss_denominator

    def _forget_gradients(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def _reduced(self, loss: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(loss, group=self.group)
            if self.bf16:
                for master in self.masters.values():
                    dist.all_reduce(master.grad, group=self.group)
        return loss

    def _round(self) -> None:
        if self.bf16:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(self.masters[name])

    def _micro_batches(self, batch: Any) -> Iterator[_Micro]:
        """Micro-batches with the attention mask and positions that the target's documents ask for."""
        n, s = batch.tokens.shape
        documents, mask, position = self.target.data.documents, None, None
        if documents != "ignore":
            place = torch.arange(n * s, device=self.device)
            number = torch.searchsorted(batch.cu_seqlens, place, right=True)
            if documents == "mask+reset":
                position = (place - batch.cu_seqlens[number - 1]).view(n, s)
            document = number.view(n, s)
            triangle = torch.ones(s, s, dtype=torch.bool, device=self.device).tril()
            mask = ((document[:, :, None] == document[:, None, :]) & triangle)[:, None]
            if self.target.reference.attention == "eager":
                dtype = torch.bfloat16 if self.bf16 else torch.float32
                mask = torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill(
                    ~mask, torch.finfo(dtype).min
                )
        for start in range(0, n, self.target.recipe.micro_batch_size):
            row = slice(start, start + self.target.recipe.micro_batch_size)
            part = Batch(
                batch.tokens[row], batch.labels[row], batch.mask[row], batch.cu_seqlens, batch.loss_denominator
            )
            yield _Micro(part, None if mask is None else mask[row], None if position is None else position[row])

    @torch.no_grad()
    def loss(self, batch: Any) -> Tensor:
        own = batch._replace(loss_denominator=batch.mask.sum())
        return torch.stack([self._loss(self.network, micro)[1] for micro in self._micro_batches(own)]).sum()

    def probe(self, batch: Any) -> Iterable[tuple[str, Tensor]]:
        places = [tap.name for tap in forward_taps(self.target.model)]
        self._forget_gradients()
        micro_batches = list(self._micro_batches(batch))
        for number, micro in enumerate(micro_batches):
            with Collector(self.network, self.target.model) as found:
                nll, share = self._backward(micro, last=number == len(micro_batches) - 1)
            found.forward |= {"nll": nll.detach(), "loss": share.detach()}
            for place in places:
                yield f"{place}#fwd@{number}", found.forward.pop(place)
            for place in reversed(places):
                if place in found.grad:
                    yield f"{place}#grad@{number}", found.grad.pop(place)
        self._reduced(torch.zeros((), device=self.device))
        order = list(reversed(self.target.model.parameter_shapes()))
        for name in order:
            yield f"{name}#grad", self.masters[name].grad.clone()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.target.recipe.clip)
        for name in order:
            yield f"{name}#clipped", self.masters[name].grad.clone()  # type: ignore[union-attr]
        self._forget_gradients()

    # Weights and state

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(weights[name])
            self.masters[name].copy_(p)
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def state(self) -> dict[str, Shard]:
        slots = {master: slot for optimizer in self.optimizers for master, slot in optimizer.state.items()}
        shards = {}
        for key, shape in state_shapes(self.target).items():
            kind, _, name = key.partition("/")
            if kind == "step":
                continue
            master = self.masters[name]
            slot = {"master": master, **slots.get(master, {})}
            slot["exp_avg"] = slot.pop("momentum_buffer", slot.get("exp_avg"))
            tensor = torch.zeros_like(master) if slot.get(kind) is None else slot[kind].detach()
            shards[key] = Shard(tensor, tuple(shape), (0,) * tensor.dim())
        return {**shards, "step": Shard(torch.tensor(self._updates()), (), ())}

    def _updates(self) -> int:
        """AdamW's count; Muon keeps none."""
        return next((int(slot["step"]) for slot in self.adamw.state.values()), 0)

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        updates = int(state["step"].tensor)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for name, master in self.masters.items():
            master.copy_(state[f"master/{name}"].tensor)
            if not updates:
                continue
            average = state[f"exp_avg/{name}"].tensor.clone()
            if by_muon(self.target.recipe, name, master.dim()):
                self.optimizers[-1].state[master] = {"momentum_buffer": average}
            else:
                square = state[f"exp_avg_sq/{name}"].tensor.clone()
                step = torch.tensor(float(updates))
                self.adamw.state[master] = {"step": step, "exp_avg": average, "exp_avg_sq": square}
        self._round()


class _Micro:
    """A micro-batch with transformers' attention mask [N, 1, S, S] and positions [N, S], or None for the defaults."""

    def __init__(self, batch: Batch, mask: Tensor | None, position: Tensor | None):
        self.batch, self.mask, self.position = batch, mask, position


def _sum_over_ranks(group: Any, bucket):  # DDP refuses annotations that are strings, as all are in this module
    """DDP's averaging replaced by a sum: the loss's denominator is global already."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])  # type: ignore[union-attr]


def make_network(model: Model, attention: str, precision: str) -> Any:
    """The model of transformers that computes this, with random weights. Raises UserError without transformers."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"transformers is not usable: {error}",
            key="reference.name",
            remedy="run pip install 'forgetrain[transformers]'",
        ) from None
    family = {"llama": "Llama", "minicpm": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model.architecture]
    config = getattr(transformers, family + "Config")(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        rms_norm_eps=model.rms_norm_eps,
        tie_word_embeddings=model.tie_word_embeddings,
        max_position_embeddings=model.max_position_embeddings,
        rope_theta=model.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        attention_dropout=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._attn_implementation = attention
    # made in this dtype, not cast to it: a cast would round the table of RoPE's frequencies too
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
    try:
        network = getattr(transformers, family + "ForCausalLM")(config)
        if model.architecture == "minicpm":
            from forgetrain.reference.minicpm import make_minicpm

            make_minicpm(network, model)
    finally:
        torch.set_default_dtype(before)
    return network.train()


def preload() -> None:
    """Imports of transformers what most models need, which takes longer than all else that ``build`` does. Raises
    ImportError."""
    importlib.import_module("transformers.models.llama.modeling_llama")


def build(target: Mapping[str, Any], *, device: str, precision: str, mesh: Any = None) -> Transformers:
    """The factory; ``mesh`` is the caller's data-parallel mesh, or None."""
    return Transformers(parse_target(dict(target)), device, precision, None if mesh is None else mesh.get_group())
