"""Writing a target as TOML; the standard library only reads it.

load_target(file) == parse_target(tomllib.loads(to_toml(load_target(file))))
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from forgetrain.spec.target import Target


def to_toml(target: Target, *, comment: str = "", defaults: bool = True) -> str:
    """The target as text. Keys without a value are left out, and with ``defaults=False`` those at their default too.

    ``comment``: lines for the top of the file, without their ``#``.
    """
    tree = target.plain(exclude_none=True, exclude_defaults=not defaults)
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += ["", f"name = {_value(tree.pop('name'))}"] if lines else [f"name = {_value(tree.pop('name'))}"]
    for section, values in tree.items():
        lines += ["", f"[{section}]", *(f"{key} = {_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's as well
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)  # repr writes 1e-06, which TOML reads
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
    return str(value)
