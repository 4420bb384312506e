"""Where the weights of step 0 come from: the recipe's seed, or a Hugging Face model's folder (continued pre-training).

    initial = FolderWeights(Path("MiniCPM5-1B"), target)     # refuses a folder of another model
    initial["model.norm.weight"]                             # fp32 on the CPU, read when it is asked for

The folder's model must be the target's; what says nothing about the computation may differ: token ids, the most
positions, the spread of random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from forgetrain.data.folder import DataFolder
from forgetrain.durable import read_object, sha256_file
from forgetrain.errors import UserError
from forgetrain.spec.hf import target_from_hf
from forgetrain.spec.model import Model
from forgetrain.spec.target import Target
from forgetrain.train.checkpoint import Checkpoint
from forgetrain.train.verified import ChosenEngine

#: Keys of the target's model section that may differ from the folder's.
FREE = ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
_INDEX = "model.safetensors.index.json"
_AGAIN = "download or export it again"


class FolderWeights(Mapping[str, Tensor]):
    """A Hugging Face folder whose model is the target's, as the target's parameters in their order, each read at every
    access; at first the files are opened alone.

    Raises:
        UserError: another model (by the first key that differs), no safetensors, or a tensor missing, too many, or of
        another shape.
    """

    def __init__(self, folder: Path, target: Target):
        self.folder, self.model = folder, target.model
        _require_same_model(folder, target.model)
        self.files = _files(folder)
        self._place = self._places()

    def facts(self) -> dict[str, Any]:
        """What identifies the weights: the folder and every file's SHA-256."""
        return {"folder": str(self.folder.resolve()), "files": {path.name: sha256_file(path) for path in self.files}}

    def __iter__(self) -> Iterator[str]:
        return iter(self.model.parameter_shapes())

    def __len__(self) -> int:
        return len(self.model.parameter_shapes())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._place[name], framework="pt") as file:
            return file.get_tensor(name).float()

    def require_tokenizer(self, data: DataFolder) -> None:
        """Raises UserError when the folder's tokenizer gives other ids than the one that the data were built with."""
        path = self.folder / "tokenizer.json"
        if path.is_file() and Tokenizer.from_file(str(path)).get_vocab() != data.tokenizer.tokenizer.get_vocab():
            raise UserError(
                "is not the tokenizer that the run's data were built with",
                file=path,
                key="data.tokenizer",
                remedy="set data.tokenizer to this folder and run forgetrain data build TARGET --force",
            )

    def _places(self) -> dict[str, Path]:
        shapes = self.model.parameter_shapes()
        place: dict[str, Path] = {}
        for path in self.files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  # no mapping, it has keys() alone
                        _require_known(name, file, shapes, path)
                        place[name] = path
            except SafetensorError as error:
                raise UserError(f"is damaged: {error}", file=path, remedy=_AGAIN) from None
        missing = next((name for name in shapes if name not in place), None)
        if missing is not None:
            raise UserError("is missing in the folder's weights", file=self.folder, key=missing, remedy=_AGAIN)
        return place


def _require_same_model(folder: Path, model: Model) -> None:
    theirs = target_from_hf(folder).target.model
    for key in Model.model_fields:
        if key not in FREE and getattr(theirs, key) != getattr(model, key):
            raise UserError(
                f"differs from the target, which has {getattr(model, key)!r}",
                file=folder / "config.json",
                key=key,
                value=getattr(theirs, key),
                remedy=f"set model.{key} to it, or draw a target with forgetrain target new",
            )


def _files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        names = sorted(set(read_object(folder / _INDEX, _AGAIN, weight_map=dict)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise UserError("is missing", file=folder / name, remedy="name a folder with safetensors weights")
    return [folder / name for name in names]


def _require_known(name: str, file: Any, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Refuses a tensor of another shape, and one that the model has no place for unless it changes nothing."""
    if name in shapes:
        found = tuple(file.get_slice(name).get_shape())
        if found != shapes[name]:
            raise UserError(
                f"is of another shape, the target's is {list(shapes[name])}",
                file=path,
                key=name,
                value=list(found),
                remedy="name a folder of the target's model",
            )
        return
    harmless = name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")  # a tied head; a table of RoPE
    if not harmless and torch.count_nonzero(file.get_tensor(name)):
        raise UserError(
            "is a tensor that the target's model has no place for",
            file=path,
            key=name,
            remedy="name a folder of the target's model",
        )


CheckInitial = Callable[[Target, FolderWeights, ChosenEngine], dict[str, Any]]


def find_initial(
    target: Target, run: Path, asked: Path | None, found: Checkpoint | None, *, restart: bool = False
) -> FolderWeights | None:
    """The folder whose weights a run begins with: the one asked for; without a checkpoint to go on from, the one that
    an interrupted run had recorded; None is the recipe's seed. A run with a checkpoint does not need it again."""
    if found is not None:
        return None
    record = run / "train" / "run.json"
    known = read_object(record, "start again with --restart").get("init_from") if record.is_file() else None
    if asked is None and known is not None and not restart:
        return recorded(known, target)
    return None if asked is None else FolderWeights(asked, target)


def recorded(known: dict[str, Any], target: Target) -> FolderWeights:
    """The folder that a run began with. Raises UserError when it is gone or holds other files than then."""
    folder, remedy = Path(known["folder"]), "put it back and --resume, or start again with --restart"
    if not folder.is_dir():
        raise UserError("is gone, and the run needs the weights that it began with", file=folder, remedy=remedy)
    initial = FolderWeights(folder, target)
    if initial.facts()["files"] != known["files"]:
        raise UserError("has changed since the run began", file=folder, remedy=remedy)
    return initial


def compared(
    target: Target, initial: FolderWeights, chosen: ChosenEngine, check: CheckInitial | None
) -> dict[str, Any]:
    """What run.json and checkpoints hold of it; ``check`` raises UserError when an engine computes something else."""
    return initial.facts() | {"logits": None if check is None else check(target, initial, chosen)}


def described(record: dict[str, Any]) -> str:
    line, logits = f"weights from {record['folder']}", record["logits"]
    if logits is None:
        return line
    return f"{line}; logits differ from transformers' by {logits['relative']:.1e} of the largest ({logits['engine']})"
