"""Records of JSON lines, Parquet files and Hugging Face data sets, and the text that a source makes of each.

    for record in file_records(Path("web/0001.jsonl.zst"), "0001.jsonl.zst", source, reading):
        record.name, record.fields                                  # "0001.jsonl.zst:17", {"text": ...}
    text = text_of(record, source, file)

Readers are other people's: gzip and json of Python, pyarrow, datasets. What they cannot read is refused with the file
and the line or row; a record without a wanted field is refused with the fields that it has.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forgetrain.errors import UserError
from forgetrain.spec.target import Source

#: A path that begins so is a Hugging Face data set: ``hf:org/name``.
HUB = "hf:"
#: Files of records, by the end of their names.
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
RECORD_FILES = (*JSON_LINES, ".parquet")
#: What ``datasets.save_to_disk`` leaves in a folder: of one split, of several.
ON_DISK = ("state.json", "dataset_dict.json")
#: Rejects beyond this many are counted but not named.
NAMED_REJECTS = 20
#: Rows read at a time; bounds the memory of a Parquet file's reader beside its row group.
_ROWS = 256
_DAMAGED = "fetch or make it again"


@dataclass
class Reading:
    """How far a source was read, and what it held that is no document.

    done, total: bytes of the source's files, compressed as they are; a data set on disk counts its Arrow files; total
    is 0 where it is unknown. file, record: the number of the file that is being read, and how many of its records
    (lines, rows, pieces of text) were gone through; reading goes on from there when a reading of before is given.
    reasons: how many rejects for each reason; names: the first of them.
    """

    done: int = 0
    total: int = 0
    file: int = 0
    record: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)

    def reject(self, name: str, reason: str) -> None:
        self.reasons[reason] += 1
        if len(self.names) < NAMED_REJECTS:
            self.names.append(f"{name}: {reason}")

    def as_dict(self) -> dict[str, Any]:
        """A copy of now, as JSON has it; ``Reading.of`` reads it."""
        return asdict(self) | {"reasons": dict(self.reasons)}

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Reading:
        reading = cls(**{name: value for name, value in kept.items() if name != "reasons"})
        reading.reasons.update(kept["reasons"])
        return reading


@dataclass(frozen=True)
class Record:
    name: str
    fields: Mapping[str, Any]


def is_data_set(path: str) -> bool:
    """Whether a source is read with ``datasets``: one of the hub, or a folder that ``save_to_disk`` wrote."""
    return path.startswith(HUB) or any((Path(path) / name).is_file() for name in ON_DISK)


def text_of(record: Record, source: Source, file: object, reading: Reading) -> str | None:
    """The text of a record; None, and counted as a reject, where it has none (null, or blank).

    Raises:
        UserError: a field is not there, or is no text.
    """
    values = {}
    for name in source.fields:
        if name not in record.fields:
            raise UserError(
                f"{record.name} has no field {name!r}; it has {_listed(record.fields)}",
                file=file,
                key="data.sources.template" if source.template else "data.sources.field",
                remedy="name a field that every record has, or a template of such fields",
            )
        value = values[name] = record.fields[name]
        if value is None:
            reading.reject(record.name, f"null under {name!r}")
            return None
        if not isinstance(value, str):
            raise UserError(
                f"{record.name} holds {type(value).__name__} under {name!r}, not text",
                file=file,
                remedy="name a field of text",
            )
    text = source.template.format_map(values) if source.template else values[source.fields[0]]
    if not text.strip():
        reading.reject(record.name, "empty")
        return None
    return _encodable(text)


def _encodable(text: str) -> str:
    """JSON may hold half a surrogate pair, which is no Unicode text; it becomes a question mark."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def _listed(fields: Iterable[str]) -> str:
    return ", ".join(map(repr, fields)) or "none"


def file_records(path: Path, name: str, source: Source, reading: Reading) -> Iterator[Record]:
    """The records of one file in their order, from the one on that ``reading`` has come to.

    Raises:
        UserError: a damaged or truncated file, a line that is no JSON object, a column that is not there.
    """
    if path.stat().st_size == 0:
        reading.reject(name, "empty")
        return
    if name.endswith(JSON_LINES):
        yield from _json_lines(path, name, reading)
    else:
        yield from _parquet(path, name, source, reading)


def _json_lines(path: Path, name: str, reading: Reading) -> Iterator[Record]:
    before, past, number = reading.done, reading.record, 0
    with path.open("rb") as raw:
        try:
            with _unpacked(raw, path) as lines:
                for number, line in enumerate(lines, start=1):
                    if number <= past:
                        continue
                    reading.done, reading.record = before + raw.tell(), number
                    if line.strip():
                        yield Record(f"{name}:{number}", _json_object(line, path, number))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"is damaged after line {number} ({error})", file=path, remedy=_DAMAGED) from None
    reading.done = before + path.stat().st_size


def _unpacked(raw: io.BufferedReader, path: Path) -> Any:
    """The file's bytes as lines; pyarrow tells a truncated zstd file from a whole one, other readers do not."""
    if path.suffix == ".gz":
        return gzip.open(raw, "rb")
    if path.suffix == ".zst":
        pyarrow = _required("pyarrow", path)
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"))
    return raw


def _json_object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deep
        raise UserError(f"line {number} is no JSON ({error})", file=path, remedy="mend or remove that line") from None
    if not isinstance(record, dict):
        raise UserError(
            f"line {number} is JSON, but {type(record).__name__} and no object", file=path, remedy="mend that line"
        )
    return record


def _parquet(path: Path, name: str, source: Source, reading: Reading) -> Iterator[Record]:
    pyarrow = _required("pyarrow", path)
    parquet = importlib.import_module("pyarrow.parquet")
    before, past, size, row = reading.done, reading.record, path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            missing = next((wanted for wanted in source.fields if wanted not in columns), None)
            if missing is not None:
                raise UserError(
                    f"every row has no field {missing!r}; the file has {_listed(columns)}",
                    file=path,
                    key="data.sources.template" if source.template else "data.sources.field",
                    remedy="name a column that the file has",
                )
            row, groups = _row_groups(file.metadata, past)
            for batch in file.iter_batches(batch_size=_ROWS, columns=source.fields, row_groups=groups):
                if row + len(batch) <= past:
                    row += len(batch)
                    continue
                for fields in batch.to_pylist():
                    row += 1
                    if row > past:
                        reading.done, reading.record = before + size * row // file.metadata.num_rows, row
                        yield Record(f"{name}:{row - 1}", fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"is damaged after row {row} ({error})", file=path, remedy=_DAMAGED) from None
    reading.done = before + size


def _row_groups(metadata: Any, past: int) -> tuple[int, list[int]]:
    """The row groups that hold rows from number ``past`` on, and the number of the first row in them."""
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if first + rows > past:
            return first, list(range(group, metadata.num_row_groups))
        first += rows
    return first, []


def data_set_records(source: Source, reading: Reading) -> Iterator[Record]:
    """The records of a Hugging Face data set: streamed from the hub, or mapped from a folder on disk.

    Raises:
        UserError: ``datasets`` is not installed, no such data set, configuration or split, or a stream that breaks.
    """
    datasets = _required("datasets", source.path)
    try:
        found = _from_hub(datasets, source) if source.path.startswith(HUB) else _from_disk(datasets, source)
        reading.total = _size(source, found)
        rows, past = getattr(found, "num_rows", 0), reading.record
        if found.column_names is not None and set(source.fields) <= set(found.column_names):
            found = found.select_columns(source.fields)  # other columns are not read
        if rows and past >= rows:  # which skip refuses
            return
        for row, fields in enumerate(found.skip(past) if past else found, start=past):
            reading.done, reading.record = reading.total * (row + 1) // rows if rows else 0, row + 1
            yield Record(f"row {row}", fields)
        reading.done = reading.total
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # datasets raises exceptions of a dozen libraries
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"datasets cannot read it: {lines[0].rstrip('.')}",
            file=source.path,
            remedy="check path, config, split and revision, and the network if it is on the hub; what was tokenised "
            "is kept",
        ) from None


def _from_hub(datasets: Any, source: Source) -> Any:
    return datasets.load_dataset(
        source.path.removeprefix(HUB),
        name=source.config,
        split=source.split or "train",
        revision=source.revision,
        streaming=True,
    )


def _from_disk(datasets: Any, source: Source) -> Any:
    found = datasets.load_from_disk(source.path)
    if not isinstance(found, Mapping):  # one split alone
        if source.split not in (None, str(found.split)):
            raise UserError(
                f"is no split of it: it has one alone, called {found.split}",
                file=source.path,
                key="data.sources.split",
                value=source.split,
                remedy="leave it out",
            )
        return found
    split = source.split or "train"
    if split not in found:
        raise UserError(
            "is no split of it",
            file=source.path,
            key="data.sources.split",
            value=split,
            remedy=f"it has {_listed(found)}",
        )
    return found[split]


def _size(source: Source, found: Any) -> int:
    """Bytes of the Arrow files that the split lies in; 0 where it is streamed."""
    if source.path.startswith(HUB):
        return 0
    return sum(Path(file["filename"]).stat().st_size for file in found.cache_files)


def _required(module: str, path: object) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UserError(
            f"needs {module}, which is not installed", file=path, remedy="pip install 'forgetrain[data]'"
        ) from None
