"""What a variant is: one implementation of an op, and the table through which plans name them.

A variant is a pair of plain module-level functions, written out word for word into flat engine files, so they use
nothing but torch, each other and module-level functions of this package:

    forward(...) -> (out, saved)          backward(saved, d_out) -> gradients, in the order of the forward's tensors

Shape letters: N rows of a micro-batch, S tokens of a row, T = N * S, D hidden_size, F intermediate_size,
H query heads, G key/value heads, K head_dim, V vocab_size, O any output width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """``note`` says in a few words what sets this implementation apart, or whose bits it has."""

    forward: Callable
    backward: Callable | None
    note: str

    @property
    def name(self) -> str:
        """The stem that the functions' names share: ``rmsnorm_hf`` of ``rmsnorm_hf_forward``."""
        return self.forward.__name__.removesuffix("_forward")

    @property
    def functions(self) -> tuple[Callable, ...]:
        return (self.forward,) if self.backward is None else (self.forward, self.backward)
