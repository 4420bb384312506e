import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from forgetrain.data.tokenizer import (
    SPECIALS,
    copy_tokenizer,
    open_tokenizer,
    save_trained,
    train_tokenizer,
)
from forgetrain.errors import UserError
from tests.tiny import tiny_target

TEXTS = ["def main(): return 12345\n\n    x = 'it''s'", "naïve café — 世界, don't\r\n"] * 5


def test_any_text_survives(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 320)
    for text in [*TEXTS, "\x00\x7f emoji 🎉 \t\n\n  trailing  ", "</s> is text here"]:
        tokenizer.encode_special_tokens = True
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_specials_have_the_first_ids():
    tokenizer = train_tokenizer(TEXTS, 300)
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == [0, 1, 2, 3, 4]
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids[0] == 3


def test_minicpm5s_pre_tokenizer_cuts_digits_in_threes():
    pre = train_tokenizer(["x"], 261).pre_tokenizer
    pieces = [piece.replace("Ġ", " ") for piece, _ in pre.pre_tokenize_str("x = 1234567 don't\n")]
    assert pieces == ["x", " =", " ", "123", "456", "7", " don", "'t", "Ċ"]


def test_the_same_texts_give_the_same_tokenizer_in_another_process(tmp_path):
    path = tmp_path / "t.json"
    code = (
        "import sys; from forgetrain.data.tokenizer import train_tokenizer; "
        f"train_tokenizer({TEXTS!r}, 320).save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    train_tokenizer(TEXTS, 320).save(str(tmp_path / "u.json"))
    assert path.read_bytes() == (tmp_path / "u.json").read_bytes()


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(UserError, match=r"model\.vocab_size: is too small .*\(got 260\)"):
        train_tokenizer(TEXTS, 260)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    target = tiny_target(model={"vocab_size": 300})
    save_trained(train_tokenizer(TEXTS, 320), tmp_path, target.model)
    with pytest.raises(UserError, match=r"model\.vocab_size: is smaller than the tokenizer's 310 tokens"):
        open_tokenizer(tmp_path, target.model)


def test_a_users_tokenizer_is_copied_with_its_own_tokens(tmp_path):
    tokenizer = Tokenizer.from_str(train_tokenizer(TEXTS, 300).to_str().replace("</s>", "<|end|>"))
    (tmp_path / "mine").mkdir()
    tokenizer.save(str(tmp_path / "mine" / "tokenizer.json"))
    (tmp_path / "mine" / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    copy_tokenizer(tmp_path / "mine", tmp_path / "copy")
    opened = open_tokenizer(tmp_path / "copy", tiny_target(model={"vocab_size": 320}).model)
    assert (opened.eos, opened.bos, opened.pad) == (1, 0, 2)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    save_trained(train_tokenizer(TEXTS, 300), tmp_path, tiny_target().model)
    text = (tmp_path / "tokenizer.json").read_text().replace("</s>", "<|stop|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="end-of-document"):
        open_tokenizer(tmp_path, tiny_target(model={"vocab_size": 300}).model)


def test_a_damaged_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: is no tokenizer"):
        open_tokenizer(tmp_path, tiny_target().model)
    with pytest.raises(UserError, match="holds no tokenizer"):
        copy_tokenizer(tmp_path / "absent", tmp_path / "copy")


def test_an_id_that_the_tokenizer_lacks_is_refused(tmp_path):
    save_trained(train_tokenizer(TEXTS, 300), tmp_path, tiny_target().model)
    with pytest.raises(UserError, match=r"not in the tokenizer .*9000"):
        open_tokenizer(tmp_path, tiny_target(model={"vocab_size": 10_000, "eos_token_id": 9000}).model)
