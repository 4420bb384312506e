"""Checkpoints: torch's distributed checkpoint (DCP), made atomic and verified.

    path = save(engine.state(), root, step, facts, tokenizer, world)   # train/saving.py does it in the background
    found = newest(root, warn=print)                 # verified; a damaged one is passed over with a warning
    load(engine, found.path, world)

A checkpoint is the folder ``step-00000300``: DCP's ``.metadata`` and one ``.distcp`` file a rank, the tokenizer, and
``manifest.json`` with the step, the target, what the run counted, and the SHA-256 of every file. It is written as
``.step-00000300.partial`` and renamed when every byte is on the disk, so a name without a dot is a whole checkpoint.
DCP reads any layout into any other, so another world size may resume it.

``.metadata`` is a pickle, as DCP has it: load no checkpoint from a stranger; take an export instead.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from forgetrain.durable import NO_SPACE, no_space_named, read_json, sha256_file, sync_folder, write_json
from forgetrain.engine.contract import Engine, Shard, weight_hash
from forgetrain.errors import UserError
from forgetrain.train.world import World

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
_OTHER = "name another checkpoint, or train again"


class Piece(Tensor):
    """A part of a tensor at an offset, as DCP's planner asks for it (``torch.distributed._checkpointable``)."""

    local: Tensor
    global_shape: torch.Size
    offsets: torch.Size

    @staticmethod
    def of(shard: Shard) -> Tensor:
        """The shard as DCP takes it: a plain tensor when it is whole, which ranks that all hold it write once."""
        tensor = shard.tensor.detach()
        if tuple(tensor.shape) == tuple(shard.global_shape):
            return tensor
        piece = tensor.as_subclass(Piece)
        piece.local, piece.global_shape = tensor, torch.Size(shard.global_shape)
        piece.offsets = torch.Size(shard.offsets)
        return piece

    def size(self, dim: int | None = None) -> Any:  # type: ignore[override]
        """The global size: DCP compares it with the saved tensor's."""
        return self.global_shape if dim is None else self.global_shape[dim]

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=self.offsets, sizes=self.local.shape)

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        data = TensorWriteData(
            chunk=self._chunk(), properties=TensorProperties.create_from_tensor(self.local), size=self.global_shape
        )
        return [WriteItem(index=MetadataIndex(fqn, self.offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.local


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """How many steps had been taken."""
        return self.manifest["step"]


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def save(
    shards: Mapping[str, Shard], root: Path, step: int, facts: Mapping[str, Any], tokenizer: Path, world: World
) -> Path:
    """Writes an engine's state after ``step`` steps; every rank calls it. ``facts`` go into the manifest.

    Raises:
        UserError: the disk is full. Earlier checkpoints are as they were.
    """
    final = folder_of(root, step)
    partial = root / f".{final.name}.partial"

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        with no_space_named(final):
            partial.mkdir(parents=True)
            shutil.copytree(tokenizer, partial / TOKENIZER)

    state = {name: Piece.of(shard) for name, shard in shards.items()}
    try:
        world.first(begin)
        with no_space_named(final):
            _write(state, partial, world)
        mine = sorted(partial.glob(f"__{world.rank}_*"))
        hashes = world.gather({path.name: _facts(path) for path in mine})
        world.first(lambda: _finish(partial, final, step, facts, hashes))
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _write(state: dict[str, Tensor], folder: Path, world: World) -> None:
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    try:
        with warnings.catch_warnings():  # without a process group DCP says so at every save
            warnings.simplefilter("ignore", UserWarning)
            dcp_save(state, storage_writer=writer, process_group=world.control, no_dist=world.control is None)
    except CheckpointException as failure:
        causes = [cause for cause, _ in failure.failures.values()]
        raise _no_space(causes) or causes[0] from None
    except RuntimeError as error:  # torch's zip writer swallows the OSError behind it into the context
        raise _no_space([error]) or error from None


def _no_space(errors: Iterable[BaseException]) -> OSError | None:
    """The error of a full disk behind these, if that is the cause."""
    for error in errors:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in NO_SPACE:
                return cause
            cause = cause.__cause__ or cause.__context__
    return None


def _facts(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def _finish(partial: Path, final: Path, step: int, facts: Mapping[str, Any], hashes: list[dict[str, Any]]) -> None:
    files = {name: fact for part in hashes for name, fact in part.items()}
    for path in [partial / ".metadata", *(p for p in (partial / TOKENIZER).rglob("*") if p.is_file())]:
        files[path.relative_to(partial).as_posix()] = _facts(path)
    write_json(partial / MANIFEST, {"format": FORMAT, "step": step, **facts, "files": files})
    sync_folder(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(final.parent)


def verify(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, every file compared with its SHA-256. Raises UserError naming what is wrong."""
    manifest = read_json(path / MANIFEST, _OTHER)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError("is of another version of the program", file=path / MANIFEST, remedy=_OTHER)
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError("is missing: the checkpoint is not whole", file=file, remedy=_OTHER)
        if file.stat().st_size != facts["bytes"]:
            raise UserError(f"is truncated: {file.stat().st_size} bytes of {facts['bytes']}", file=file, remedy=_OTHER)
        try:
            digest = sha256_file(file)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", file=file, remedy=_OTHER) from None
        if digest != facts["sha256"]:
            raise UserError("is damaged: its SHA-256 is not the manifest's", file=file, remedy=_OTHER)
    return Checkpoint(path, manifest)


def steps_in(root: Path) -> list[Path]:
    """The checkpoints under ``root``, newest first, unverified. A folder of another name, such as a copy that somebody
    put there, is none: it is neither resumed from nor removed."""
    found = (path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())
    return sorted(found, key=step_of, reverse=True)


def newest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None when there is none at all.

    Raises:
        UserError: there are checkpoints, but all are damaged; starting over unasked would lose them.
    """
    found = steps_in(root)
    for path in found:
        try:
            return verify(path)
        except UserError as error:
            warn(f"passing over a damaged checkpoint: {error}")
    if found:
        raise UserError("every checkpoint is damaged", file=root, remedy="restore one, or start again with --restart")
    return None


def put_aside_after(root: Path, step: int) -> None:
    """Hides the (damaged) checkpoints newer than ``step``, so that they count no more among the kept ones."""
    for path in steps_in(root):
        if step_of(path) > step:
            aside = root / f".{path.name}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def resolve(path: Path, warn: Callable[[str], None]) -> Checkpoint:
    """A checkpoint from its own folder, a folder of checkpoints, or a run's folder (the newest that verifies)."""
    if (path / MANIFEST).is_file() and path.name.startswith("step-"):
        return verify(path)
    for root in (path, path / "checkpoints"):
        if found := newest(root, warn):
            return found
    raise UserError("holds no checkpoint", file=path, remedy="name a step-* folder, or a run's folder")


def load(engine: Engine, path: Path, world: World) -> None:
    """Restores a verified checkpoint into an engine that has weights loaded (their layout says who needs what)."""
    wanted = engine.state()
    held = {
        name: Shard(torch.empty_like(shard.tensor, device="cpu"), shard.global_shape, shard.offsets)
        for name, shard in wanted.items()
    }
    _read({name: Piece.of(shard) for name, shard in held.items()}, path, world.control)
    engine.restore(held)


def read_masters(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The fp32 master weights of a checkpoint under their canonical names, whole, on the CPU."""
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    _read({f"master/{name}": tensor for name, tensor in weights.items()}, path, None)
    return weights


def hash_of_weights(engine: Engine, saved: Path, shapes: Mapping[str, tuple[int, ...]], world: World) -> str:
    """The engine's weight hash, the same on every rank; where ranks keep parts of the masters, from the checkpoint
    ``saved``, which holds the engine's present state. Every rank calls it."""
    state = engine.state()
    kept = {name: state.get(f"master/{name}") for name in shapes}
    whole = all(shard is not None and tuple(shard.tensor.shape) == shapes[name] for name, shard in kept.items())
    if all(world.gather(whole)):
        return weight_hash(state)

    def of_saved() -> str:
        return weight_hash({f"master/{name}": tensor for name, tensor in read_masters(saved, shapes).items()})

    return world.first(of_saved)


def _read(into: dict[str, Tensor], path: Path, group: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            reader = FileSystemReader(path)
            dcp_load(into, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as failure:
        cause = next(iter(failure.failures.values()))[0]
        raise UserError(f"does not fit: {cause}", file=path, remedy="resume with the target it was made with") from None


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def regular(root: Path, at_most: int) -> list[Path]:
    """The checkpoints up to step ``at_most`` that ``checkpoint_every`` asked for, newest first, unverified. What is
    decided by them does not depend on where an interruption fell. The interval is that of each one's own manifest: a
    run may be resumed with another."""
    return [path for path in steps_in(root) if step_of(path) <= at_most and _is_regular(path)]


def _is_regular(path: Path) -> bool:
    try:
        return step_of(path) % _every(read_json(path / MANIFEST, _OTHER)) == 0
    except UserError:  # damaged, and so nothing to go back to
        return False


def _every(manifest: dict[str, Any]) -> int:
    return manifest["target"]["train"]["checkpoint_every"]


def regular_was_due(found: Checkpoint | None, every: int, at_most: int) -> bool:
    """Whether a run that goes on from ``found`` with the interval ``every`` has had a regular checkpoint up to step
    ``at_most``."""
    if found is None:
        return at_most >= every
    return at_most // every * every > found.step or min(at_most, found.step) >= _every(found.manifest)


def prune(root: Path, keep_last: int, keep_every: int, needed: Path | None = None) -> None:
    """Removes all but the newest ``keep_last`` checkpoints, those at multiples of ``keep_every`` (0: none), and
    ``needed``."""
    for path in steps_in(root)[keep_last:]:
        if path != needed and not (keep_every and step_of(path) % keep_every == 0):
            _remove(path)
    for left in [*root.glob(".step-*.partial"), *root.glob(".step-*.removed")]:
        shutil.rmtree(left, ignore_errors=True)


def remove_after(root: Path, step: int) -> None:
    """Removes the checkpoints newer than ``step``, newest first, so that a kill leaves no gap."""
    for path in steps_in(root):
        if step_of(path) > step:
            _remove(path)


def _remove(path: Path) -> None:
    doomed = path.rename(path.with_name(f".{path.name}.removed"))  # a half-removed one must not look whole
    shutil.rmtree(doomed)
