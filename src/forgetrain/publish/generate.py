"""Text from a trained model, through ``transformers`` on its export: the same path that users of the model take.

reply = generate(Path("runs/nano-cpu"), "def main(", max_new_tokens=40, temperature=0.0)
reply.text
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from forgetrain.errors import UserError
from forgetrain.publish.hf import export_hf

#: What transformers, through numpy, takes as a seed.
_SEEDS = range(2**32)


@dataclass(frozen=True)
class Reply:
    prompt: str
    text: str  # what was generated, without the prompt
    tokens: int
    seconds: float


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """An exported folder as a transformers model, offline; ``dtype`` None takes the one it was saved in."""
    transformers = _transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return (model if dtype is None else model.to(dtype)).eval()


def generate(
    source: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Reply:
    """Continues ``prompt``. source: a checkpoint, a run's folder, or an exported folder. temperature 0 is greedy. say:
    is told what a person should know of the checkpoint.

    The prompt is tokenised as training's documents were, without the tokens that a tokenizer may put around a text. An
    empty one begins a new document, as training saw it: after an end-of-document token.

    Raises:
        UserError: nothing to load, a seed that cannot be taken, or a prompt longer than the model's positions.
    """
    if seed not in _SEEDS:
        raise UserError(
            f"is not within 0 to {_SEEDS[-1]}", key="--seed", value=seed, remedy="any number there gives other text"
        )
    if (source / "config.json").is_file():
        return _generate(source, prompt, max_new_tokens, temperature, top_p, seed)
    with tempfile.TemporaryDirectory(prefix="forgetrain-") as temporary:
        exported = export_hf(source, Path(temporary) / "hf", say=say)
        return _generate(exported.folder, prompt, max_new_tokens, temperature, top_p, seed)


def _generate(folder: Path, prompt: str, new: int, temperature: float, top_p: float, seed: int) -> Reply:
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = load_model(folder)
    except Exception as error:  # of a folder from anywhere transformers raises whatever its parts do
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"transformers cannot load it: {lines[0].rstrip('.: ')}",
            file=folder,
            remedy="name a checkpoint, a run's folder, or an exported folder",
        ) from None
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    if ids == [None]:
        raise UserError(
            "is empty, and the tokenizer names no end-of-document token to begin after",
            key="--prompt",
            remedy="give some text",
        )
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise UserError(
            f"has {len(ids)} tokens, the model has {model.config.max_position_embeddings} positions",
            key="--prompt",
            remedy="shorten it",
        )
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    if temperature <= 0:  # the defaults for sampling would only bring a warning
        model.generation_config.temperature = model.generation_config.top_p = None
    transformers.set_seed(seed)
    given = torch.tensor([ids])
    began = time.monotonic()
    with torch.inference_mode():
        out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=min(new, room), **sampling)[
            0, len(ids) :
        ]
    text = tokenizer.decode(out, skip_special_tokens=True)
    return Reply(prompt, text, len(out), time.monotonic() - began)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed", remedy="run pip install 'forgetrain[transformers]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
