"""The tokenizer: byte-level BPE in MiniCPM5's conventions, trained here or brought by the user.

MiniCPM5's pre-tokenizer cuts numbers into groups of one to three digits, then splits as Qwen2 and Llama 3 do;
llama.cpp knows it as ``tokenizer.ggml.pre = minicpm5``, so a model trained with this tokenizer converts to GGUF.

A tokenizer is a folder: ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers`` reads as they are.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from forgetrain.durable import read_json, write_json
from forgetrain.errors import UserError
from forgetrain.spec.model import Model

BOS, EOS, PAD, IM_START, IM_END = "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"
#: Their ids are 0, 1, 2, 3, 4 in a tokenizer trained here.
SPECIALS = (BOS, EOS, PAD, IM_START, IM_END)
SMALLEST_VOCAB = 256 + len(SPECIALS)

DIGITS = r"\p{N}{1,3}"
WORDS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: ChatML, as MiniCPM5 and Qwen write it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class TokenizerFolder:
    """A tokenizer in a folder, and the ids that data and models need. ``pad`` falls back to ``eos``."""

    folder: Path
    tokenizer: Tokenizer
    eos: int
    bos: int | None
    pad: int
    im_end: int | None
    sha256: str

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` tokens (fewer when the text yields fewer merges); the same texts give
    the same tokenizer, byte for byte.

    Raises:
        UserError: ``vocab_size`` leaves no room for the 256 bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(
            "is too small for a byte-level tokenizer",
            key="model.vocab_size",
            value=vocab_size,
            remedy=f"use at least {SMALLEST_VOCAB}: 256 bytes and {len(SPECIALS)} special tokens",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(DIGITS), behavior="isolated"),
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model.ignore_merges = True  # a whole word of the vocabulary is one token, as MiniCPM5 has it
    return tokenizer


def save_trained(tokenizer: Tokenizer, folder: Path, model: Model) -> None:
    """Writes a tokenizer trained here as a folder that ``transformers`` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", config)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a user's tokenizer folder (or lone tokenizer.json) as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    root = source.parent if source.is_file() else source
    if not (root / "tokenizer.json").is_file():
        raise UserError("holds no tokenizer.json", file=source, key="data.tokenizer", remedy="name a folder with one")
    for name in _COPIED:
        if (root / name).is_file():
            shutil.copyfile(root / name, folder / name)


def open_tokenizer(folder: Path, model: Model) -> TokenizerFolder:
    """Opens a tokenizer folder for a model.

    Raises:
        UserError: a damaged file, no end-of-document token, or ids that the model's vocabulary does not hold.
    """
    file = folder / "tokenizer.json"
    try:
        raw = file.read_bytes()
        tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
    except FileNotFoundError:
        raise UserError("no such file", file=file, remedy="run forgetrain data build again") from None
    except Exception as error:  # the Rust side raises bare Exception for a file it cannot parse
        raise UserError(
            f"is no tokenizer ({error})", file=file, remedy="name a tokenizer.json of `tokenizers`"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    named = _named_specials(folder)
    eos = _special(tokenizer, named.get("eos_token"), _first(model.eos_token_id), (EOS, "<|endoftext|>"))
    if eos is None:
        raise UserError(
            "names no end-of-document token", file=folder, remedy="set model.eos_token_id, or eos_token in its config"
        )
    opened = TokenizerFolder(
        folder=folder,
        tokenizer=tokenizer,
        eos=eos,
        bos=_special(tokenizer, named.get("bos_token"), model.bos_token_id, (BOS,)),
        pad=pad
        if (pad := _special(tokenizer, named.get("pad_token"), model.pad_token_id, (PAD,))) is not None
        else eos,
        im_end=tokenizer.token_to_id(IM_END),
        sha256=hashlib.sha256(raw).hexdigest(),
    )
    if opened.vocab_size > model.vocab_size:
        raise UserError(
            f"is smaller than the tokenizer's {opened.vocab_size} tokens ({file})",
            key="model.vocab_size",
            value=model.vocab_size,
            remedy=f"set model.vocab_size to at least {opened.vocab_size}, or use a smaller tokenizer",
        )
    return opened


def _named_specials(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(file, "name a folder that transformers can read") if file.is_file() else {}


def _first(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


def _special(tokenizer: Tokenizer, named: Any, wanted: int | None, usual: tuple[str, ...]) -> int | None:
    """The id that the model names, or that of the token which the tokenizer's config names, or of a usual token."""
    if wanted is not None:
        if tokenizer.id_to_token(wanted) is None:
            raise UserError(
                "a token id of [model] is not in the tokenizer",
                value=wanted,
                remedy="leave it out, or use the tokenizer's",
            )
        return wanted
    text = named.get("content") if isinstance(named, dict) else named
    for token in (text, *usual):
        if isinstance(token, str) and (found := tokenizer.token_to_id(token)) is not None:
            return found
    return None
