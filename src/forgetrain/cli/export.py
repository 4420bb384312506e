"""``forgetrain export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forgetrain.cli.common import Json, emit, say
from forgetrain.errors import UserError


def command(
    source: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run's folder for its newest.")],
    to: Annotated[str, typer.Option("--to", help="The format: hf.")] = "hf",
    out: Annotated[Path | None, typer.Option(help="The folder to write. Default: RUN/export/hf.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16. Default: what the target keeps weights in.")] = None,
    check: Annotated[bool, typer.Option(help="Compare the export's logits with the engine's.")] = True,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, and check that it computes what the engine computed."""
    from forgetrain.publish.hf import DTYPES, export_hf  # these load torch
    from forgetrain.publish.parity import TOLERANCE, logits_parity

    if to != "hf":
        raise UserError("no such format", key="--to", value=to, remedy="the format is hf")
    if dtype is not None and dtype not in DTYPES:
        raise UserError("no such dtype", key="--dtype", value=dtype, remedy=f"one of {', '.join(DTYPES)}")
    exported = export_hf(source, out, dtype=dtype, say=lambda line: say(line, "yellow"))
    size = f"{exported.parameters:,} parameters, {exported.dtype}"
    say(f"{exported.folder}: {exported.architecture} of step {exported.step}, {size}")
    result = {key: str(value) if isinstance(value, Path) else value for key, value in vars(exported).items()}
    passed = True
    if check:
        parity = logits_parity(exported)
        passed = parity.passed
        say(
            f"logits {'equal' if passed else 'DIFFER FROM'} the engine's ({parity.engine}): largest difference "
            f"{parity.max_difference:.1e} of logits up to {parity.largest:.1f}, tolerance {TOLERANCE:g} of the largest"
        )
        result |= {"logits": vars(parity) | {"pass": passed, "tolerance": TOLERANCE}}
    emit(result, as_json)
    if not passed:
        raise typer.Exit(1)
