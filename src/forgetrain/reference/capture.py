"""Capture: a training script of your own as the reference. Five lines of it write a golden record.

    from forgetrain.capture import Capture

    with Capture("golden", "my_own.toml", model, optimizer, names) as golden:
        for tokens, labels, mask in batches:
            golden.begin(tokens, labels, mask)
            ...                                     # forward, backward, clipping, optimizer.step(), as ever
            golden.end(loss, grad_norm)

Module hooks see the taps, a hook of the optimizer the clipped gradients; nothing is changed on the way. The first and
the last of ``[gates] steps`` steps are kept tensor by tensor, the others as loss, norm and hash of the weights. The
record is written when the block ends, or not at all.
"""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forgetrain.engine.contract import Batch, make_batch, weight_hash
from forgetrain.errors import UserError
from forgetrain.golden.record import write_record
from forgetrain.numerics.determinism import fingerprint
from forgetrain.reference.capture_names import NameMap, in_layout, resolve, split_rows
from forgetrain.spec.taps import forward_taps
from forgetrain.spec.target import Target, load_target

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Capture:
    """Watches ``gates.steps`` steps of a script on one process in fp32, and writes what it saw to ``folder``.

    Args:
        folder: where the golden record goes; an older one there is replaced.
        target: a target, or its file, whose ``[gates]`` shape is the script's batch and micro-batch, whose
            ``reference.name`` is ``capture``.
        model: called once for each micro-batch with gradients enabled; other calls are not looked at.
        optimizer: updates the model's own parameters, all with one learning rate.
        names: from the model's modules to canonical names (capture_names.py).

    Raises:
        UserError: the script is not of this target: a parameter, shape, thread count or number of steps is another's.
    """

    def __init__(
        self,
        folder: str | Path,
        target: Target | str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        names: NameMap,
    ):
        target = target if isinstance(target, Target) else load_target(target)
        _refuse_unsupported(target)
        self.folder, self.target, self._model, self._optimizer = Path(folder), target.at_gates_shape(), model, optimizer
        self._resolved = resolve(model, target.model, names)
        _refuse_optimizer(optimizer, [parameter for parameter, _ in self._resolved.parameters])
        self._widths = {tap.name: tap.width for tap in forward_taps(target.model)}
        self._device = next(model.parameters()).device.type
        self._handles: list[Any] = []
        self._weights = self._masters()
        self._batches: list[Batch] = []
        self._rates: list[float] = []
        self._points: list[dict[str, Any]] = []
        self._seconds: list[float] = []
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._open: _Step | None = None

    @property
    def missing(self) -> list[str]:
        """Places that no mapped module gives, so that a difference there shows at the next tap."""
        return self._resolved.missing

    @property
    def done(self) -> bool:
        """Whether every step was seen; after that nothing is looked at."""
        return len(self._points) == self.target.gates.steps

    def __enter__(self) -> Capture:
        self._handles.append(self._model.register_forward_pre_hook(self._on_call))
        for module, places in self._resolved.outputs.items():
            self._handles.append(module.register_forward_hook(self._output_hook(places)))
        for module, place in self._resolved.inputs.items():
            self._handles.append(module.register_forward_pre_hook(self._input_hook(place), with_kwargs=True))
        for parameter, names in self._resolved.parameters:
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._gradient_hook(names)))
        self._handles.append(self._optimizer.register_step_pre_hook(self._before_update))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is not None:
            return
        if not self.done:
            raise UserError(
                f"the script ended after {len(self._points)} steps",
                key="gates.steps",
                value=self.target.gates.steps,
                remedy="let it run as many steps as the target asks for",
            )
        self._write()

    # What the script calls

    def begin(
        self, tokens: Tensor, labels: Tensor, mask: Tensor | None = None, boundaries: Tensor | None = None
    ) -> None:
        """A step begins: the whole batch, all micro-batches of it. tokens and labels int64 [N, S], labels shifted;
        mask float32 [N, S], ones unless given; boundaries: flattened positions at which documents begin."""
        if self.done:
            return
        if self._open is not None:
            raise UserError("a step begins before the last one ended", remedy="call end(loss, grad_norm) once a step")
        recipe = self.target.recipe
        due = (recipe.batch_size, recipe.sequence_length)
        for name, tensor in (("tokens", tokens), ("labels", labels), ("mask", mask)):
            if tensor is not None and tuple(tensor.shape) != due:
                problem = f"the batch has {name} of shape {list(tensor.shape)}, the target's [gates] say {list(due)}"
                raise UserError(problem, key="gates", remedy="change the one or the other")
        whole = mask if mask is None else mask.float()
        self._batches.append(Batch(*(t.cpu().clone() for t in make_batch(tokens, labels, whole, boundaries))))
        number = len(self._points)
        last = self.target.gates.steps - 1
        self._open = _Step(keeps=number in (0, last))
        if number == last and number > 0:
            self._open.seen |= {f"start/{name}": tensor for name, tensor in self._state().items()}
        self._open.began = time.perf_counter()

    def end(self, loss: Tensor | float, grad_norm: Tensor | float) -> None:
        """The step is over: its loss (masked sum over the batch's denominator) and the norm before clipping."""
        if self.done:
            return
        step = self._open
        if step is None:
            raise UserError("a step ends that did not begin", remedy="call begin(tokens, labels) before its forward")
        if step.rate is None:
            raise UserError("no optimizer.step() was seen", remedy="call it on the optimizer that capture was given")
        self._check_calls(step)
        self._seconds.append(time.perf_counter() - step.began)
        loss, norm = (torch.as_tensor(value).detach().float().cpu().reshape(()) for value in (loss, grad_norm))
        digest = weight_hash({f"master/{name}": tensor for name, tensor in self._masters().items()})
        point = {"loss": float(loss), "grad_norm": float(norm), "applied": True, "weight_hash": digest}
        self._rates.append(step.rate)
        if step.keeps:
            seen = {**step.seen, **self._state(), "step.loss": loss.clone(), "step.grad_norm": norm.clone()}
            if step.calls == 1:
                seen.setdefault("loss#fwd@0", loss.clone())
            self._kept[len(self._points)] = seen
        self._points.append(point)
        self._open = None

    def see(self, place: str, tensor: Tensor) -> None:
        """A tap that no module gives, of the present micro-batch: ``nll`` or ``loss`` of the training loop, say."""
        if place not in self._widths:
            raise UserError("is no place in the table of taps", key=place, remedy="see docs/taps.md")
        self._take(tensor, (place,))

    # What hooks see

    def _on_call(self, _: nn.Module, args: tuple) -> None:
        if self._open is None or not torch.is_grad_enabled():
            return
        self._open.calls += 1
        recipe = self.target.recipe
        due = [recipe.micro_batch_size, recipe.sequence_length]
        tokens = [list(x.shape) for x in args[:1] if isinstance(x, Tensor) and x.dtype == torch.int64]
        if tokens not in ([], [due]):
            raise UserError(
                f"the model is called with tokens of shape {tokens[0]}, a micro-batch of the target's [gates] is {due}",
                key="gates.micro_batch_size",
                value=recipe.micro_batch_size,
                remedy="change the target or the script",
            )

    def _output_hook(self, places: tuple[str, ...]) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, tuple) and len(places) > 1:
                for place, tensor in zip(places, out, strict=True):
                    self._take(tensor, (place,))
            else:
                self._take(out[0] if isinstance(out, tuple) else out, places)

        return hook

    def _input_hook(self, place: str) -> Any:
        return lambda _, args, kwargs: self._take([*args, *kwargs.values()][0], (place,))

    def _gradient_hook(self, names: tuple[str, ...]) -> Any:
        """Fires after each micro-batch's backward has been added; the last sum stays."""

        def hook(parameter: Tensor) -> None:
            if self._open is not None and self._open.keeps and parameter.grad is not None:
                self._open.seen |= self._split(parameter.grad, names, "{}#grad")

        return hook

    def _before_update(self, *_: Any) -> None:
        step = self._open
        if step is None:
            return
        rates = {float(group["lr"]) for group in self._optimizer.param_groups}
        if len(rates) > 1:
            raise UserError("parameter groups have different learning rates", value=sorted(rates), remedy="use one")
        step.rate = rates.pop()
        for parameter, names in self._resolved.parameters:
            if step.keeps and parameter.grad is not None:
                step.seen |= self._split(parameter.grad, names, "{}#clipped")

    def _take(self, tensor: Tensor, places: tuple[str, ...]) -> None:
        """Keeps a tensor, and its whole gradient when it comes, under its place; a fused one under several."""
        step = self._open
        if step is None or not step.keeps or not torch.is_grad_enabled():
            return
        number = step.calls - 1

        def keep(kind: str, value: Tensor) -> None:
            for place, part in self._parts(value, places):
                step.seen[f"{place}#{kind}@{number}"] = part

        keep("fwd", tensor)
        if tensor.requires_grad and places[0] not in ("nll", "loss"):
            tensor.register_hook(lambda gradient: keep("grad", gradient))

    def _parts(self, tensor: Tensor, places: tuple[str, ...]) -> list[tuple[str, Tensor]]:
        recipe = self.target.recipe
        widths = [self._widths[place] for place in places]
        whole = widths[0] if len(widths) == 1 else sum(width or 0 for width in widths)
        value = in_layout(tensor, places[0], recipe.micro_batch_size, recipe.sequence_length, whole).cpu()
        if len(places) == 1:
            return [(places[0], value)]
        return list(zip(places, value.split([width or 0 for width in widths], dim=-1), strict=True))

    # State

    def _masters(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for parameter, names in self._resolved.parameters:
            found |= self._split(parameter, names, "{}")
        return {name: found[name] for name in self.target.model.parameter_shapes()}

    def _state(self) -> dict[str, Tensor]:
        """Master weights, moments as far as the optimizer has them, and the number of updates."""
        found = {f"master/{name}": tensor for name, tensor in self._masters().items()}
        updates = 0
        for parameter, names in self._resolved.parameters:
            slot = self._optimizer.state.get(parameter, {})
            updates = int(slot.get("step", 0))
            for kind in _MOMENTS:
                if kind in slot:
                    found |= self._split(slot[kind], names, kind + "/{}")
        return {**found, "step": torch.tensor(updates)}

    def _split(self, tensor: Tensor, names: tuple[str, ...], form: str) -> dict[str, Tensor]:
        parts = split_rows(tensor.detach(), names, self.target.model)
        return {form.format(name): part.cpu().clone() for name, part in parts.items()}

    def _check_calls(self, step: _Step) -> None:
        due = self.target.recipe.batch_size // self.target.recipe.micro_batch_size
        if step.calls != due:
            raise UserError(
                f"the model was called {step.calls} times in a step, the target's [gates] have {due} micro-batches",
                key="gates.micro_batch_size",
                value=self.target.recipe.micro_batch_size,
                remedy="change the target or the script",
            )

    def _write(self) -> None:
        last = self.target.gates.steps - 1
        write_record(
            self.folder,
            weights=self._weights,
            batches=self._batches,
            evidence=self._kept[0],
            later=self._kept[last] if last > 0 else None,
            trajectories={1: self._points},
            timing={"seconds_per_step": self._seconds},
            manifest={
                "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "target": self.target.plain(),
                "precision": self.target.precision.dtype,
                "reference": {
                    "name": "capture",
                    "model": type(self._model).__qualname__,
                    "optimizer": type(self._optimizer).__qualname__,
                    "missing_taps": self.missing,
                },
                "environment": fingerprint(device=self._device, threads=torch.get_num_threads()),
                "seed": self.target.recipe.seed,
                "learning_rates": self._rates,
                "verdicts": [],
            },
        )


class _Step:
    """The step that is being watched. keeps: whether tensor by tensor."""

    def __init__(self, keeps: bool):
        self.keeps, self.calls, self.began = keeps, 0, 0.0
        self.rate: float | None = None
        self.seen: dict[str, Tensor] = {}


def _refuse_unsupported(target: Target) -> None:
    if target.reference.name != "capture":
        raise UserError(
            "the target names another reference",
            key="reference.name",
            value=target.reference.name,
            remedy='set it to "capture"',
        )
    if target.precision.dtype != "fp32":
        raise UserError(
            "capture records training in fp32",
            key="precision.dtype",
            value=target.precision.dtype,
            remedy="run the script in fp32, or use the megatron or transformers reference",
        )
    if target.recipe.optimizer != "adamw":
        raise UserError(
            "capture watches one optimizer, and Muon needs a second beside it",
            key="recipe.optimizer",
            value=target.recipe.optimizer,
            remedy='set it to "adamw", or use the transformers reference',
        )
    if torch.get_num_threads() != target.hardware.threads:
        raise UserError(
            f"the script runs with {torch.get_num_threads()} threads, on which bits depend",
            key="hardware.threads",
            value=target.hardware.threads,
            remedy=f"call torch.set_num_threads({target.hardware.threads}) first",
        )


def _refuse_optimizer(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) not in theirs for parameter in parameters):
        raise UserError(
            "the optimizer does not update every parameter of the model",
            remedy="give capture the optimizer that was made from this model's parameters",
        )
