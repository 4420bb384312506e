"""Durable files: folders that appear whole or not at all, hashes, and a full disk named in one line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from forgetrain.errors import UserError

#: What a full disk, a spent quota and a file-size limit answer.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, remedy: str) -> Any:
    """The JSON in ``path``. Raises UserError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("no such file", file=path, remedy=remedy) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON ({error})", file=path, remedy=remedy) from None


def read_object(path: Path, remedy: str, **kinds: type) -> dict[str, Any]:
    """The JSON object in ``path``, in which these keys have values of these types. Raises UserError for any other."""
    found = read_json(path, remedy)
    if not isinstance(found, dict):
        raise UserError("is not a JSON object", file=path, remedy=remedy)
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind):
            wrong = "is missing" if key not in found else f"is not of type {kind.__name__}"
            raise UserError(wrong, file=path, key=key, remedy=remedy)
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes JSON durably: a reader sees the old content or the new, never a part."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) durably: a reader sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    try:
        with no_space_named(path), partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Makes renames and new names inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(folder: Path) -> None:
    """Makes a folder and a file in it, which vanishes, before work that ends in writing there. Raises the system's
    OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def no_space_named(path: Path) -> Iterator[None]:
    """Turns the errors of a full disk while writing ``path`` into one line that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or _system_error(error)
        if number not in NO_SPACE:
            raise
        raise UserError(
            f"cannot be written: {os.strerror(number).lower()}",
            file=path,
            remedy="free some space and run the command again; what was there before is untouched",
        ) from None


def _system_error(error: Exception) -> int | None:
    """safetensors, and shutil where it copies a folder, keep the system's error number in their text alone."""
    number = re.search(r"(?:\(os error |\[Errno )(\d+)[)\]]", str(error))
    return None if number is None else int(number.group(1))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``folder`` when the block ends and vanishes when it raises.

    Raises:
        UserError: ``folder`` is the one that the command runs in, which would be gone below it; or a full disk.
    """
    folder = folder.resolve()  # "." has no name of its own
    if folder.exists() and folder.samefile("."):
        raise UserError(
            "is the folder that the command runs in, and would be replaced",
            file=folder,
            remedy="name another one, which need not be there",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with no_space_named(folder):
            partial.mkdir()
            yield partial
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Puts a whole folder in the place of another, of which nothing stays."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
