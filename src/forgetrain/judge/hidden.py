"""What a candidate meets for the first time when it is judged: batches, weights and learning rates from a seed that
the operating system draws after the candidate was frozen.

Every mask has holes, and more of them in some micro-batches than in others, so that ignoring the mask, averaging over
micro-batches or dropping the last one changes the loss. Weights are spread wide enough for attention to differ from
an average, and norms and biases lie away from one and zero, so that leaving any of them out changes it too.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

import torch
from torch import Tensor

from forgetrain.data.folder import MANIFEST, open_data
from forgetrain.data.loader import Loader
from forgetrain.engine.contract import Batch, make_batch
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.model import Model
from forgetrain.spec.target import Target


def draw_seed() -> int:
    """61 bits from the operating system."""
    return secrets.randbits(61)


def derive(seed: int, *parts: object) -> int:
    """A seed of its own for each use of a seed."""
    text = ":".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 3


def hidden_weights(model: Model, seed: int) -> dict[str, Tensor]:
    """fp32 weights for gates that look at single steps: matrices three times their initial spread."""
    generator = torch.Generator().manual_seed(derive(seed, "weights"))
    weights = initial_weights(model, derive(seed, "matrices"))
    for name, weight in weights.items():
        if weight.dim() > 1:
            weight.mul_(3)
        else:
            weights[name] = weight + 0.1 * torch.randn(weight.shape, generator=generator)
    return weights


class Stream:
    """Batches of a target's shape, each a pure function of (seed, step), and their learning rates.

    ``data``: a built data folder, for real text in an order that the seed decides; else made-up text: a chain in which
    a token decides the next one four times out of five, so that there is something to learn. ``warm_up``: steps over
    which the rates rise, where these are the steps of a training from initial weights.
    """

    def __init__(self, target: Target, seed: int, data: Path | None = None, *, warm_up: int = 1):
        self.target, self.seed, self.warm_up = target, seed, warm_up
        self.loader: Loader | None = None
        if data is not None and (data / MANIFEST).is_file():
            recipe = target.recipe.model_copy(update={"seed": seed})
            seeded = target.without_stages().model_copy(update={"recipe": recipe})
            self.loader = Loader(open_data(data, target, verify=False), seeded)
        generator = torch.Generator().manual_seed(derive(seed, "chain"))
        self.following = torch.randperm(target.model.vocab_size, generator=generator)

    def at(self, step: int) -> Batch:
        """The batch of a step: N rows of S tokens, with a mask of its own."""
        recipe = self.target.recipe
        n, s = recipe.batch_size, recipe.sequence_length
        generator = torch.Generator().manual_seed(derive(self.seed, "batch", step))
        made = self._real(step) if self.loader is not None else self._chain(n, s, generator)
        mask = made.mask * (torch.rand(n, s, generator=generator) > 0.1)
        row, cut = (int(torch.randint(0, size, (), generator=generator)) for size in (n, s))
        mask[row, cut:] = 0.0
        mask[(row + 1) % n, 0] = 1.0  # never empty
        return made._replace(mask=mask, loss_denominator=mask.sum())

    def rate(self, step: int) -> float:
        """Learning rates between a third of the recipe's and all of it, no two alike, once they have risen; each four
        steps of a block have one of every quarter, so that no few steps lie all on one side of a rate that a candidate
        waits for."""
        block, place = divmod(step, 4)
        quarters = sorted(range(4), key=lambda quarter: derive(self.seed, "quarter", block, quarter))
        share = (quarters[place] + derive(self.seed, "rate", step) % 1000 / 1000) / 4
        rise = min(1.0, (step + 1) / self.warm_up)
        return rise * self.target.recipe.lr * (1 + 2 * share) / 3

    def all_rates(self, steps: int) -> list[float]:
        """Rates of so many steps: the first as ``rate`` has it, then one of each of the three decades below the
        recipe's, which warm-ups and decays pass through, in an order of the seed's; further ones as the first."""
        rates = [self.rate(step) for step in range(steps)]
        decades = sorted(range(1, min(steps, 4)), key=lambda decade: derive(self.seed, "decade", decade))
        for step, decade in enumerate(decades, 1):
            share = derive(self.seed, "low", step) % 1000 / 1000
            rates[step] = self.target.recipe.lr * 10 ** (share - decade)
        return rates

    def _real(self, step: int) -> Batch:
        assert self.loader is not None
        return self.loader.batch_at(step)

    def _chain(self, n: int, s: int, generator: torch.Generator) -> Batch:
        vocab = self.following.numel()
        # squaring a uniform number makes low tokens frequent, as in text
        fresh = (torch.rand(n, s + 1, generator=generator).square() * vocab).long()
        keep = torch.rand(n, s + 1, generator=generator) < 0.8
        tokens = fresh.clone()
        for position in range(1, s + 1):
            tokens[:, position] = torch.where(
                keep[:, position], self.following[tokens[:, position - 1]], fresh[:, position]
            )
        boundaries = None
        if self.target.data.documents != "ignore":
            boundaries = torch.randint(1, n * s, (2 * n,), generator=generator)
        return make_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, boundaries)
