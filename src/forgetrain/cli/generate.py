"""``forgetrain generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forgetrain.cli.common import Json, emit, say


def command(
    source: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint, a run's folder, or an exported folder.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    as_json: Json = False,
) -> None:
    """Continue a text with a trained model."""
    from forgetrain.publish.generate import generate  # loads torch

    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    reply = generate(source, prompt, **options, say=lambda line: say(line, "yellow"))
    if not as_json:
        print(reply.prompt + reply.text)
    say(f"{reply.tokens} tokens in {reply.seconds:.1f} s")
    emit(vars(reply), as_json)
