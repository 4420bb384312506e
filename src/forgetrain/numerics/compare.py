"""Comparing tensors bit for bit, and saying in ULPs how far apart two that differ are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


@dataclass(frozen=True)
class Difference:
    """Where and by how much ``actual`` differs from ``expected``; ``max_ulp`` is None where shapes or dtypes differ, or
    a value is not finite."""

    count: int
    total: int
    max_ulp: int | None
    first_index: tuple[int, ...]
    expected: float | str
    actual: float | str
    max_abs: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        ulp = "not comparable" if self.max_ulp is None else f"at most {self.max_ulp} ULP"
        return (
            f"{self.count} of {self.total} elements differ, {ulp}; "
            f"first at {list(self.first_index)}: expected {self.expected!r}, got {self.actual!r}"
        )


def bits(tensor: Tensor) -> Tensor:
    """The raw bits of a floating-point tensor as integers; other tensors unchanged."""
    integer = _INTEGER.get(tensor.dtype)
    return tensor if integer is None else tensor.view(integer)


def exact(tensor: Tensor, device: torch.device | str) -> Tensor:
    """In float64 on a device. Moved first: a conversion on the way is made on the host, and twice the bytes travel."""
    return tensor.to(device).double()


def ordered(tensor: Tensor) -> Tensor:
    """Floats as int64 whose order and distance are those of the floats: distance 1 is one ULP, -0.0 is 0.0."""
    raw = bits(tensor).to(torch.int64)
    width = tensor.element_size() * 8
    lowest = -(2 ** (width - 1)) if width < 64 else torch.iinfo(torch.int64).min
    return torch.where(raw < 0, lowest - raw, raw)


def difference(expected: Tensor, actual: Tensor) -> Difference | None:
    """None when both are equal bit for bit (dtype and shape included; -0.0 is not 0.0), else what differs."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        describe = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (expected, actual)]
        return Difference(expected.numel(), expected.numel(), None, (), describe[0], describe[1], None)
    expected, actual = expected.detach().cpu(), actual.detach().cpu()
    if torch.equal(bits(expected), bits(actual)):
        return None
    unequal = bits(expected) != bits(actual)
    count = int(unequal.sum())
    first = tuple(int(i) for i in unequal.nonzero()[0]) if expected.dim() else ()
    finite = expected.is_floating_point() and bool(torch.isfinite(expected).all() and torch.isfinite(actual).all())
    max_ulp = int((ordered(expected) - ordered(actual)).abs().max()) if finite else None
    max_abs = float((expected.double() - actual.double()).abs().max()) if finite else None
    return Difference(count, expected.numel(), max_ulp, first, expected[first].item(), actual[first].item(), max_abs)
