import pytest

from forgetrain.data import corpus
from forgetrain.data.corpus import Reading, documents, source_files, source_root
from forgetrain.errors import UserError
from forgetrain.spec.target import Source


def read(path, **options):
    reading = Reading()
    return [(d.name, d.text) for d in documents(Source(path=str(path), **options), reading)], reading


def test_a_folder_is_read_in_order_of_names(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b.txt", ".hidden/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found, rejects = read(tmp_path)
    assert [name for name, _ in found] == ["a/b.txt", "a/z.txt", "b.txt"]
    assert not rejects.reasons


def test_what_is_no_text_in_a_folder_is_rejected_counted_and_named(tmp_path):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00\x00")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "nothing.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n")
    found, rejects = read(tmp_path)
    assert found == [("good.txt", "text")]
    assert rejects.reasons == {"not UTF-8 text": 2, "empty": 2}
    assert "image.png: not UTF-8 text" in rejects.names


def test_a_binary_file_is_refused_by_name(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"\x00\x01\x02")
    with pytest.raises(UserError, match=r"model\.bin: is binary"):
        read(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="empty corpus"):
        read(tmp_path)


def test_a_missing_source_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.sources: no such file or folder"):
        read(tmp_path / "absent")


def test_a_large_file_is_cut_at_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 64)
    path = tmp_path / "big.txt"
    text = "".join(f"line {i} of a file é\n" for i in range(20))
    path.write_text(text)
    found, _ = read(path)
    assert "".join(piece for _, piece in found) == text
    assert len(found) > 3
    assert all(piece.endswith("\n") for _, piece in found)
    assert [name for name, _ in found[:2]] == ["big.txt", "big.txt#1"]


def test_the_standard_library_is_source_without_tests_or_packages():
    source = Source(path="python-stdlib", glob="**/*.py")
    files = source_files(source)
    assert files == source_files(source)
    parts = {part for file in files for part in file.relative_to(source_root(source)).parts}
    assert "argparse.py" in parts
    assert not parts & corpus.STDLIB_SKIPPED
    assert sum(file.stat().st_size for file in files) > 8e6


@pytest.mark.parametrize("piece", [60, 61, 62, 63])
def test_a_line_longer_than_a_piece_is_cut_between_characters(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(corpus, "PIECE", piece)
    text = "a𝄞漢é" * 100
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    found, _ = read(tmp_path / "one.txt")
    assert "".join(part for _, part in found) == text
    assert len(found) > 3


def test_a_character_that_the_file_leaves_unfinished_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 60)
    (tmp_path / "one.txt").write_bytes(b"a" * 117 + "漢".encode() + "漢".encode()[:2])
    with pytest.raises(UserError, match=r"one\.txt: is binary"):
        read(tmp_path / "one.txt")


def linked(tmp_path):
    """A folder with a file of its own and a link to a folder elsewhere, in which is a link to a third."""
    for name in ("corpus/own/a.txt", "elsewhere/b.txt", "third/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "on").symlink_to(tmp_path / "third")
    return tmp_path / "corpus"


@pytest.mark.parametrize("glob", ["**/*", "**/*.txt", "**"])
def test_linked_folders_are_followed(tmp_path, glob):
    found, _ = read(linked(tmp_path), glob=glob)
    assert [name for name, _ in found] == ["linked/b.txt", "linked/on/c.txt", "own/a.txt"]


@pytest.mark.parametrize("back", ["corpus", "elsewhere", "."])
def test_a_link_to_a_folder_around_it_is_refused_by_name(tmp_path, back):
    folder = linked(tmp_path)
    (tmp_path / "corpus" / "own" / "also").symlink_to(tmp_path / "third")  # twice, but around nothing
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / back)
    with pytest.raises(UserError, match=r"linked/.*: is, by a link, a folder that it lies in"):
        read(folder)
    assert [name for name, _ in read(folder, glob="own/*/*")[0]] == ["own/also/c.txt"]


def test_two_stars_are_a_whole_part_of_a_pattern(tmp_path):
    with pytest.raises(UserError, match=r"data\.sources\.glob: is no pattern .*\(got '\*\*\.txt'\)"):
        read(linked(tmp_path), glob="**.txt")
