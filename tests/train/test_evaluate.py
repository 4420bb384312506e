"""The held-out loss of each source, under the name that the target gives it."""

from forgetrain.data.build import build_data
from tests.corpus import corpus_target
from tests.train.test_loop import run


def two_globs_of_one_folder(tmp_path, *names):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for kind, text in (("en", "abcdefgh "), ("de", "xyz ")):
        for number in range(30):
            (folder / f"{kind}-{number}.txt").write_text(text * (20 + number) + "\n")
    globs = ("en-*.txt", "de-*.txt")
    sources = [{"path": str(folder), "glob": glob, "name": name} for glob, name in zip(globs, names, strict=True)]
    target = corpus_target(folder, data={"sources": sources})
    build_data(target, tmp_path / target.name / "data")
    return target


def test_two_sources_of_one_folder_have_a_loss_each(tmp_path):
    target = two_globs_of_one_folder(tmp_path, "en", "de")
    summary = run(target, tmp_path)
    each = summary["held_out_losses"]
    assert list(each) == ["en", "de"]
    assert min(each.values()) < summary["held_out_loss"] < max(each.values())
    assert run(target, tmp_path, resume=True)["held_out_losses"] == each
