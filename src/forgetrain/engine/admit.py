"""What answers of an engine's process must look like, checked on their headers before their tensors are read.

Each function here is a ``protocol.Admit``, or makes one: it raises ProtocolError for what must not be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from forgetrain.engine.protocol import ProtocolError, Spec

Admit = Callable[[str, dict[str, Any], list[Spec]], None]
ITEMS = {"loss": torch.float32, "grad_norm": torch.float32, "applied": torch.bool}


def nothing(kind: str, _: dict[str, Any], specs: list[Spec]) -> None:
    if kind != "done" or specs:
        raise ProtocolError(f"expected done, got {kind!r:.100}")


def ready(kind: str, _: dict[str, Any], specs: list[Spec]) -> None:
    if kind != "ready" or specs:
        raise ProtocolError(f"expected ready, got {kind!r:.100}")


def memory(kind: str, fields: dict[str, Any], specs: list[Spec]) -> None:
    peak = fields.get("device_peak_bytes")
    if kind != "memory" or specs or type(peak) is not int or not 0 <= peak < 2**50:
        raise ProtocolError("expected a number of bytes")


def profile(kind: str, fields: dict[str, Any], specs: list[Spec]) -> None:
    rows = fields.get("rows")
    if kind != "profile" or specs or not isinstance(rows, list) or len(rows) > 10_000:
        raise ProtocolError("expected a profile of at most 10,000 rows")
    for row in rows:
        if not (isinstance(row, list) and [type(value) for value in row] == [str, str, float, int]):
            raise ProtocolError("a profile's row is [functions, operator, seconds, calls]")
        if len(row[0]) + len(row[1]) > 5000 or not 0 <= row[2] < 1e6 or not 0 <= row[3] < 2**40:
            raise ProtocolError("a profile's row is out of bounds")


def items(*names: str) -> Callable[[str, dict[str, Any], list[Spec]], None]:
    expected = [Spec(name, ITEMS[name], ()) for name in names]

    def admit(kind: str, _: dict[str, Any], specs: list[Spec]) -> None:
        if kind != "result" or [spec.name for spec in specs] != list(names):
            raise ProtocolError(f"expected {', '.join(names)}, got {kind!r:.100}")
        for spec, wanted in zip(specs, expected, strict=True):
            if spec != wanted:
                raise ProtocolError(f"{spec.name} is {spec.dtype} {list(spec.shape)}, not {wanted.dtype} []")

    return admit


def tap(largest: int) -> Callable[[str, dict[str, Any], list[Spec]], None]:
    def admit(kind: str, fields: dict[str, Any], specs: list[Spec]) -> None:
        if kind == "done":
            return nothing(kind, fields, specs)
        if kind != "tap" or len(specs) != 1 or specs[0].nbytes > largest or len(specs[0].name) > 300:
            raise ProtocolError(f"expected one tap of at most {largest} bytes, got {kind!r:.100}")
        return None

    return admit


def printable(text: str) -> str:
    """Text from a child without lone surrogates and control characters, so that it can be printed and stored."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
