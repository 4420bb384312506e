"""Initial weights: a pure function of the model and a seed, the same for references, engines and training.

initial_weights(model, seed=0)                              # all of them, whole
InitialWeights(model, seed=0)["model.norm.weight"]          # one at a time, drawn when it is asked for
with AheadWeights(model, seed=0, cores=8) as weights:       # the same, the next ones being drawn meanwhile
    engine.load(weights)
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from forgetrain import memory
from forgetrain.spec.model import Model


class InitialWeights(Mapping[str, Tensor]):
    """Canonical name → fp32 tensor, drawn at every access: who keeps a part of each never holds more than one whole.

    Norms start at one, biases at zero, matrices normal(0, initializer_range); those that end a residual branch are
    scaled by 1 / sqrt(2 * layers), as GPT-2 and Megatron do. Each tensor has its own generator, seeded by (seed, name),
    so that no tensor depends on which others exist.
    """

    def __init__(self, model: Model, seed: int):
        self._model, self._seed, self._shapes = model, seed, model.parameter_shapes()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # without drawing it

    def __getitem__(self, name: str) -> Tensor:
        drawn, std = self._take(name)
        return drawn if std is None else drawn.mul_(std)

    def _take(self, name: str) -> tuple[Tensor, float | None]:
        return self._drawn(name)

    def _drawn(self, name: str) -> tuple[Tensor, float | None]:
        """A tensor, and what it is still to be multiplied by."""
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape), None
        if name.endswith(".bias"):
            return torch.zeros(shape), None
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        std = self._model.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * self._model.num_hidden_layers) ** 0.5
        return memory.empty(shape).normal_(generator=generator), std


class AheadWeights(InitialWeights):
    """For who asks once for each, matrices about in their order: while one is used the next ones are drawn, each on a
    core, so that at most ``cores`` are whole besides it. A core draws some 120 million numbers a second, so that a rank
    of a model of ten billion parameters, which draws them all to keep its part, would wait for a minute and a half.
    They are multiplied where they are asked for: each of the drawing threads would have as many of torch's."""

    def __init__(self, model: Model, seed: int, cores: int):
        super().__init__(model, seed)
        matrices = [name for name, shape in self._shapes.items() if len(shape) > 1]  # the rest takes no time
        self._after = dict(itertools.pairwise(matrices))
        self._cores, self._pool = cores, ThreadPoolExecutor(cores)
        self._coming: dict[str, Future[tuple[Tensor, float | None]]] = {}

    def __enter__(self) -> AheadWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._coming.clear()

    def _take(self, name: str) -> tuple[Tensor, float | None]:
        asked, later = self._coming.pop(name, None), self._after.get(name)
        while later is not None and len(self._coming) < self._cores:
            if later not in self._coming:
                self._coming[later] = self._pool.submit(self._drawn, later)
            later = self._after.get(later)
        return self._drawn(name) if asked is None else asked.result()


def initial_weights(model: Model, seed: int) -> dict[str, Tensor]:
    """All of ``InitialWeights``, whole."""
    with AheadWeights(model, seed, min(16, len(os.sched_getaffinity(0)))) as weights:
        return dict(weights)
