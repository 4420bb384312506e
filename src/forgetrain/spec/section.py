"""What the sections of a target are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forgetrain.errors import UserError

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Strict: without it pydantic takes true for 1, and "false" for false."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def refusal(error: ValidationError, *, file: object, missing: str, wrong: str) -> UserError:
    """The first thing that is wrong. ``missing``, ``wrong``: the remedies for a key that is not there, and for a value
    that cannot be."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return UserError("unknown key", file=file, key=key, remedy="remove it or fix its spelling")
    if first["type"] == "missing":
        return UserError("is missing", file=file, key=key, remedy=missing)
    problem = first["msg"].removeprefix("Value error, ")
    value = first["input"] if not isinstance(first["input"], dict) else None
    return UserError(problem, file=file, key=key, value=value, remedy=wrong)
