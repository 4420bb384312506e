"""Sources of records, each written by the library that people write them with, and everything wrong with them."""

import gzip
import importlib
import json
import sys

import pytest

from forgetrain.data import corpus
from forgetrain.data.corpus import Reading, documents
from forgetrain.errors import UserError
from forgetrain.spec.target import Source

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = importlib.import_module("pyarrow.parquet")

TEXTS = ["the first text", "a second one, with é and 漢", "third\nof two lines"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def read(path, **options):
    reading = Reading()
    return [(d.name, d.text) for d in documents(Source(path=str(path), **options), reading)], reading


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def packed(raw, suffix):
    if suffix == ".gz":
        return gzip.compress(raw, mtime=0)
    return pyarrow.compress(raw, "zstd", asbytes=True) if suffix == ".zst" else raw


def write_json_lines(path, records):
    path.write_bytes(packed(lines_of(records), path.suffix))
    return path


def write_parquet(path, columns, rows=None):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)
    return path


def refused(path, message, **options):
    with pytest.raises(UserError, match=message) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_each_line_is_a_document_named_by_its_line(tmp_path, suffix):
    path = write_json_lines(tmp_path / f"some{suffix}", [{"text": text, "id": 1} for text in TEXTS])
    found, reading = read(path)
    assert found == [(f"some{suffix}:{number}", text) for number, text in enumerate(TEXTS, start=1)]
    assert reading.done == reading.total == path.stat().st_size


def test_blank_lines_are_no_records_but_count_as_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n \n{"text": "two"}')
    assert read(tmp_path / "a.jsonl")[0] == [("a.jsonl:2", "one"), ("a.jsonl:4", "two")]


def test_files_of_every_kind_lie_in_one_folder_in_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    write_json_lines(tmp_path / "b" / "1.jsonl.zst", [{"text": "from zst"}])
    write_json_lines(tmp_path / "c.jsonl.gz", [{"text": "from gz"}])
    write_parquet(tmp_path / "a.parquet", {"text": ["from parquet"]})
    (tmp_path / "d.txt").write_text("from a file of text")
    found, reading = read(tmp_path)
    assert [text for _, text in found] == ["from parquet", "from zst", "from gz", "from a file of text"]
    assert reading.done == reading.total > 0


def test_several_frames_of_zstd_or_members_of_gzip_are_one_file(tmp_path):
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"".join(packed(lines_of([{"text": text}]), suffix) for text in TEXTS))
        assert [text for _, text in read(path)[0]] == TEXTS


def test_progress_counts_bytes_as_they_lie_on_disk(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl.gz", [{"text": f"text {number} " * 50} for number in range(9000)])
    reading, seen = Reading(), []
    for _ in documents(Source(path=str(path)), reading):
        seen.append(reading.done)
    assert seen == sorted(seen)
    assert len(set(seen)) > 2
    assert 0 < seen[0] <= seen[-1] <= reading.total == path.stat().st_size


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_file_is_refused_with_the_last_good_line(tmp_path, suffix):
    path = write_json_lines(tmp_path / f"cut{suffix}", [{"text": str(number) * 99} for number in range(20000)])
    path.write_bytes(path.read_bytes()[:-20])
    refused(path, rf"cut{suffix}: is damaged after line \d+ \(.*\)\. Fetch or make it again")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_what_is_no_compressed_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"fake{suffix}"
    path.write_bytes(b"this was never compressed")
    refused(path, rf"fake{suffix}: is damaged after line 0")


def test_a_byte_changed_on_disk_is_refused(tmp_path):
    """gzip carries a checksum; zstd's is optional, and pyarrow writes none."""
    path = write_json_lines(tmp_path / "bad.jsonl.gz", [{"text": f"{number} words"} for number in range(5000)])
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    refused(path, r"bad\.jsonl\.gz: (is damaged after line \d+|line \d+ is no JSON)")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut of', r"line 2 is no JSON \(.*\)\. Mend or remove that line"),
        (b'{"text": "caf\xe9"}', r"line 2 is no JSON \('utf-8' codec.*"),
        (b'["text"]', "line 2 is JSON, but list and no object"),
        (b'"text"', "line 2 is JSON, but str and no object"),
        (b"\0\1\2", "line 2 is no JSON"),
    ],
)
def test_a_line_that_is_no_json_object_is_refused_by_its_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    refused(path, rf"a\.jsonl: {message}")


def test_nesting_deeper_than_python_reads_is_refused(tmp_path):
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    refused(tmp_path / "deep.jsonl", r"deep\.jsonl: line 1 is no JSON")


def test_a_missing_field_is_refused_with_the_fields_there_are(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "fine"}, {"content": "x", "id": 3}])
    refused(path, r"a\.jsonl: data\.sources\.field: a\.jsonl:2 has no field 'text'; it has 'content', 'id'\. Name")
    refused(path, r"data\.sources\.template: a\.jsonl:1 has no field 'title'", template="{title} {text}")
    (tmp_path / "b.jsonl").write_text("{}\n")
    refused(tmp_path / "b.jsonl", r"has no field 'text'; it has none")


def test_a_field_that_is_no_text_is_refused(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": ["a", "list"]}])
    refused(path, r"a\.jsonl:1 holds list under 'text', not text\. Name a field of text")
    path = write_parquet(tmp_path / "a.parquet", {"text": [1, 2]})
    refused(path, r"a\.parquet:0 holds int under 'text', not text")


def test_null_and_blank_texts_are_rejects_counted_and_named(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": text} for text in ("one", None, " \n", "two")])
    found, reading = read(path)
    assert [text for _, text in found] == ["one", "two"]
    assert reading.reasons == {"null under 'text'": 1, "empty": 1}
    assert reading.names == ["a.jsonl:2: null under 'text'", "a.jsonl:3: empty"]


def test_twenty_rejects_are_named_and_all_counted(tmp_path):
    _, reading = read(write_json_lines(tmp_path / "a.jsonl", [{"text": None}] * 50))
    assert reading.reasons == {"null under 'text'": 50}
    assert len(reading.names) == 20


def test_an_empty_file_of_records_is_a_reject(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.parquet").write_text("")
    found, reading = read(tmp_path)
    assert found == []
    assert reading.names == ["a.jsonl: empty", "b.parquet: empty"]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d emoji"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert [text for _, text in read(tmp_path / "a.jsonl")[0]] == ["cut ? emoji", "whole 😀"]


def test_a_template_makes_the_text_of_several_fields(tmp_path):
    records = [{"title": "A", "text": "b {not a field}", "id": 1}, {"title": None, "text": "c"}]
    path = write_json_lines(tmp_path / "a.jsonl", records)
    found, reading = read(path, template="# {title}\n{{{text}}}\n")
    assert found == [("a.jsonl:1", "# A\n{b {not a field}}\n")]
    assert reading.names == ["a.jsonl:2: null under 'title'"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", "names no field"),
        ("{}", "a field is written as"),
        ("{text.__class__}", "a field is written as"),
        ("{text[0]}", "a field is written as"),
        ("{text!r}", "a field is written as"),
        ("{text:>9}", "a field is written as"),
        ("{text", "write a brace of the text twice"),
    ],
)
def test_a_template_that_says_more_than_names_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        Source(path="a.jsonl", template=template)


def test_field_and_template_exclude_each_other():
    with pytest.raises(ValueError, match="keep exactly one"):
        Source(path="a.jsonl", field="text", template="{text}")


def test_rows_of_parquet_across_row_groups(tmp_path):
    texts = [f"text {number}" for number in range(1000)]
    path = write_parquet(tmp_path / "a.parquet", {"id": range(1000), "content": texts}, rows=300)
    found, reading = read(path, field="content")
    assert found == [(f"a.parquet:{row}", text) for row, text in enumerate(texts)]
    assert reading.done == reading.total == path.stat().st_size


def test_parquet_reads_no_column_that_is_not_wanted(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS, "title": ["x", "y", "z"], "big": [b"\0" * 9] * 3})
    assert [text for _, text in read(path, template="{title}: {text}")[0]] == [
        f"{title}: {text}" for title, text in zip("xyz", TEXTS, strict=True)
    ]


def test_a_missing_column_is_refused_before_any_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"content": TEXTS, "id": [1, 2, 3]})
    refused(path, r"a\.parquet: data\.sources\.field: every row has no field 'text'; the file has 'content', 'id'")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-40], lambda raw: raw[:9], lambda raw: b"PAR1" + b"\0" * 99])
def test_a_damaged_parquet_file_is_refused(tmp_path, damage):
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS * 99})
    path.write_bytes(damage(path.read_bytes()))
    refused(path, r"a\.parquet: is damaged after row 0 \(.*\)\. Fetch or make it again")


def test_a_parquet_page_damaged_in_the_middle_is_refused(tmp_path):
    texts = [f"{number} some text of a row, quite long" for number in range(3000)]
    path = write_parquet(tmp_path / "a.parquet", {"text": texts}, rows=1000)
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 400] = b"\xff" * 400
    path.write_bytes(raw)
    refused(path, r"a\.parquet: is damaged after row \d+")


def test_a_data_set_saved_on_disk(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]}).save_to_disk(tmp_path / "one")
    found, reading = read(tmp_path / "one")
    assert found == [(f"row {row}", text) for row, text in enumerate(TEXTS)]
    assert reading.done == reading.total > 0


def test_a_split_of_a_data_set_on_disk(tmp_path):
    splits = {name: datasets.Dataset.from_dict({"text": [f"{name} text"]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both")[0] == [("row 0", "train text")]
    assert read(tmp_path / "both", split="test")[0] == [("row 0", "test text")]
    message = r"both: data\.sources\.split: is no split of it \(got 'dev'\)\. It has 'train', 'test'"
    refused(tmp_path / "both", message, split="dev")


def test_a_split_of_a_data_set_that_has_one_alone_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "one")
    refused(tmp_path / "one", r"one: data\.sources\.split: .*\(got 'test'\)\. Leave it out", split="test")


def test_a_data_set_without_the_field_is_refused(tmp_path):
    datasets.Dataset.from_dict({"content": TEXTS}).save_to_disk(tmp_path / "one")
    refused(tmp_path / "one", r"one: data\.sources\.field: row 0 has no field 'text'; it has 'content'")


def test_a_data_set_whose_arrow_file_is_cut_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS * 99}).save_to_disk(tmp_path / "one")
    arrow = next((tmp_path / "one").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    refused(tmp_path / "one", "one: datasets cannot read it: ")


def test_a_data_set_is_streamed_by_name(tmp_path):
    (tmp_path / "org").mkdir()
    write_parquet(tmp_path / "org" / "train.parquet", {"text": TEXTS[:2], "id": [1, 2]})
    write_parquet(tmp_path / "org" / "test.parquet", {"text": TEXTS[2:], "id": [3]})
    found, reading = read(f"hf:{tmp_path / 'org'}")
    assert [text for _, text in found] == TEXTS[:2]
    assert reading.total == 0
    assert [text for _, text in read(f"hf:{tmp_path / 'org'}", split="test")[0]] == TEXTS[2:]
    refused(f"hf:{tmp_path / 'org'}", "datasets cannot read it: .*dev.*Check path, config, split", split="dev")
    refused(f"hf:{tmp_path / 'org'}", r"data\.sources\.field: row 0 has no field 'body'; it has", field="body")


def test_a_data_set_that_is_not_there_is_refused():
    refused("hf:org/absent", "hf:org/absent: datasets cannot read it: .*Check path, config, split and revision")


def test_reading_goes_on_where_it_was(tmp_path):
    """After any document of any kind of source, what is left is what a reading that was kept there gives."""
    folder = tmp_path / "all"
    folder.mkdir()
    records = [{"text": text} for text in ("one", None, "two", " ", "three")]
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        write_json_lines(folder / name, records)
    write_parquet(folder / "d.parquet", {"text": [f"row {row}" if row % 3 else None for row in range(9)]}, rows=4)
    (folder / "e.txt").write_text("text of a file")
    (folder / "f.txt").write_text("")
    (folder / "g.txt").write_bytes(b"\0")
    (folder / "h.txt").write_text("the last")
    datasets.Dataset.from_dict({"text": ["one", None, "two", "three", None]}).save_to_disk(tmp_path / "set")
    (tmp_path / "hub").mkdir()
    write_parquet(tmp_path / "hub" / "train.parquet", {"text": ["one", None, "two", "three"]})
    for path in (folder, tmp_path / "set", f"hf:{tmp_path / 'hub'}"):
        source, reading, kept, found = Source(path=str(path)), Reading(), [Reading().as_dict()], []
        for document in documents(source, reading):
            found.append(document)
            kept.append(json.loads(json.dumps(reading.as_dict())))
        assert len(found) > 2
        for taken, state in enumerate(kept):
            again = Reading.of(state)
            assert list(documents(source, again)) == found[taken:]
            assert again == reading
        assert list(documents(source, Reading.of(reading.as_dict()))) == []


def test_a_large_file_of_text_goes_on_at_its_next_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 64)
    (tmp_path / "big.txt").write_text("".join(f"line {number} of a file\n" for number in range(20)))
    source, reading = Source(path=str(tmp_path / "big.txt")), Reading()
    stream = documents(source, reading)
    next(stream), next(stream)
    kept = reading.as_dict()
    assert kept["record"] == 2
    assert list(documents(source, Reading.of(kept))) == list(stream)


@pytest.mark.parametrize(
    ("module", "name"), [("pyarrow", "a.jsonl.zst"), ("pyarrow", "a.parquet"), ("datasets", "hf:org/name")]
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ModuleNotFoundError
    path = name if name.startswith("hf:") else tmp_path / name
    if not name.startswith("hf:"):
        path.write_bytes(b"something")
    refused(path, rf"{name}: needs {module}, which is not installed\. pip install 'forgetrain\[data\]'")
