"""References that are used wrongly and yet repeat themselves bit for bit, for G0 to refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forgetrain.reference import transformers
from forgetrain.spec.target import parse_target


class WithoutZeroGrad(transformers.Transformers):
    """Gradients of the step before are left where they are, and the next ones are added to them."""

    def _forget_gradients(self) -> None:
        pass


def build(target: Mapping[str, Any], *, device: str, precision: str, mesh: Any = None) -> WithoutZeroGrad:
    group = None if mesh is None else mesh.get_group()
    return WithoutZeroGrad(parse_target(dict(target)), device, precision, group)
