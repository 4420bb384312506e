import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import processors

from forgetrain.data.tokenizer import train_tokenizer
from forgetrain.errors import UserError
from forgetrain.publish import hf
from forgetrain.publish.generate import generate, load_model
from forgetrain.publish.hf import export_hf
from forgetrain.publish.parity import TOLERANCE, logits_parity
from forgetrain.train import checkpoint
from forgetrain.train.loop import train
from tests.corpus import built, write_corpus
from tests.tiny import ARCHITECTURES

transformers = pytest.importorskip("transformers")

CLASSES = {
    "minicpm5": "LlamaForCausalLM",
    "tied": "LlamaForCausalLM",
    "mha": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "minicpm4": "GraniteForCausalLM",
}


def trained(runs, architecture="minicpm5", **sections):
    """A run of a few steps at a high rate, so that no weight is at its initial value (norms at 1, biases at 0)."""
    recipe = {"steps": 4, "lr": 5e-2, **sections.pop("recipe", {})}
    target, data = built(runs, architecture, recipe=recipe, **sections)
    train(target, runs=runs, console=Console(quiet=True))
    return target, data, runs / target.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_computes_what_the_engine_computed(tmp_path, architecture):
    _, _, run = trained(tmp_path, architecture)
    exported = export_hf(run)
    assert exported.folder == run / "export" / "hf"
    assert exported.architecture == CLASSES[architecture]
    parity = logits_parity(exported)
    assert parity.engine.endswith("train/engine.py")
    assert parity.passed, parity
    assert parity.max_difference < TOLERANCE * parity.largest / 10  # the tolerance has room for depth
    assert parity.largest > 0.1


def test_qwen3_with_biases_gets_zero_output_biases(tmp_path):
    _, _, run = trained(tmp_path, "qwen3", model={"attention_bias": True})
    exported = export_hf(run)
    assert not load_file(exported.folder / "model.safetensors")["model.layers.0.self_attn.o_proj.bias"].any()
    assert logits_parity(exported).passed


def test_a_wrong_export_is_noticed(tmp_path):
    _, _, run = trained(tmp_path)
    exported = export_hf(run)
    path = exported.folder / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_eps"] = 1e-5
    path.write_text(json.dumps(config))
    assert not logits_parity(exported).passed


def test_bf16_weights_are_those_that_the_engine_used(tmp_path):
    target, _, run = trained(tmp_path, precision={"dtype": "bf16"})
    exported = export_hf(run)
    weights = load_file(exported.folder / "model.safetensors")
    found = checkpoint.newest(run / "checkpoints", warn=pytest.fail)
    masters = checkpoint.read_masters(found.path, target.model.parameter_shapes())
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(torch.equal(weights[name], master.bfloat16()) for name, master in masters.items())
    assert logits_parity(exported).passed
    assert export_hf(run, tmp_path / "fp32", dtype="fp32").dtype == "fp32"
    assert torch.equal(load_file(tmp_path / "fp32" / "model.safetensors")["lm_head.weight"], masters["lm_head.weight"])


def test_settings_are_written_for_transformers_4_and_5(tmp_path):
    _, _, run = trained(tmp_path, model={"rope_theta": 5e6})
    folder = export_hf(run).folder
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e6
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert transformers.AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 5e6
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 4]
    assert "auto_map" not in config


def test_the_tokenizer_and_its_chat_template_come_along(tmp_path):
    _, data, run = trained(tmp_path)
    folder = export_hf(run).folder
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), data.tokenizer.tokenizer
    for text in ("the forge 12345 trains\n", "naïve — 世界"):
        assert theirs(text)["input_ids"] == ours.encode(text, add_special_tokens=False).ids
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    talk = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert talk == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_large_models_are_written_in_parts(tmp_path, monkeypatch):
    target, _, run = trained(tmp_path)
    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    folder = export_hf(run).folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(target.model.parameter_shapes())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in load_model(folder).parameters())


def test_greedy_text_is_the_argmax_of_the_engine(tmp_path):
    _, _, run = trained(tmp_path, recipe={"steps": 30, "lr": 2e-2})
    reply = generate(run, "the forge trains", max_new_tokens=8, temperature=0)
    assert generate(export_hf(run).folder, "the forge trains", max_new_tokens=8, temperature=0).text == reply.text
    model, tokenizer = (
        load_model(run / "export" / "hf"),
        transformers.AutoTokenizer.from_pretrained(run / "export" / "hf"),
    )
    ids = tokenizer("the forge trains")["input_ids"]
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.decode(ids) == "the forge trains" + reply.text
    assert reply.tokens == 8


def test_sampling_repeats_with_its_seed_and_starts_from_nothing(tmp_path):
    _, _, run = trained(tmp_path)
    texts = [generate(run, "", max_new_tokens=12, temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_beyond_the_positions_is_refused(tmp_path):
    _, _, run = trained(tmp_path)
    with pytest.raises(UserError, match=r"--prompt: has .* tokens, the model has 64 positions"):
        generate(run, "the forge " * 100)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"qk_norm": True, "scale_emb": 12.0}, r"model\.qk_norm"),
        ({"hidden_size": 30}, r"model\.hidden_size"),
    ],
)
def test_what_no_transformers_family_computes_is_refused(tmp_path, changes, key):
    target, _ = built(tmp_path, model=changes)
    with pytest.raises(UserError, match=key):
        hf.family(target.model)


def test_only_an_earlier_export_that_nobody_changed_is_replaced(tmp_path):
    """A folder's place is taken by the export, so whatever else lies in it would be gone."""
    _, _, run = trained(tmp_path)
    folder = export_hf(run).folder
    assert export_hf(run).folder == folder  # untouched
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"export/hf: holds what no export wrote there: notes\.txt\. Name a new folder"):
        export_hf(run)
    (folder / "notes.txt").unlink()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")  # as fine-tuning in place leaves it
    with pytest.raises(UserError, match=r"holds what no export wrote there: model\.safetensors"):
        export_hf(run)


def test_folders_of_something_else_are_not_overwritten(tmp_path):
    _, _, run = trained(tmp_path)
    model = export_hf(run, tmp_path / "model").folder
    (model / "export.json").unlink()  # a model from anywhere
    (tmp_path / "file").write_text("precious")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "export.json").write_text('["of another program"]')
    for place, what in (("model", "config.json"), ("foreign", "export.json"), ("corpus", "000.txt"), ("file", "file")):
        before = sorted((tmp_path / place).rglob("*"))
        with pytest.raises(UserError, match=rf"{place}: holds what no export wrote there: .*{what}"):
            export_hf(run, tmp_path / place)
        assert sorted((tmp_path / place).rglob("*")) == before
    (tmp_path / "empty").mkdir()
    assert export_hf(run, tmp_path / "empty").folder == tmp_path / "empty"


def test_an_older_checkpoint_is_not_exported_without_a_word(tmp_path):
    _, _, run = trained(tmp_path, train={"checkpoint_every": 2, "keep_last": 3})
    damaged = run / "checkpoints" / "step-00000004" / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    said = []
    assert export_hf(run, say=said.append).step == 2
    assert len(said) == 1
    assert "passing over a damaged checkpoint" in said[0]
    assert "step-00000004" in said[0]
    generate(run, "the", max_new_tokens=1, say=said.append)
    assert said[1] == said[0]


def brought(tmp_path, *, config=None, begins=None, **sections):
    """A run whose data were tokenised by a user's tokenizer: its file, alone or with a config, perhaps with a token
    that it puts before every text."""
    words = train_tokenizer([path.read_text() for path in write_corpus(tmp_path / "corpus").iterdir()], 300)
    if begins:
        whole = processors.TemplateProcessing(single=f"{begins} $A", special_tokens=[(begins, 0)])
        words.post_processor = whole
    folder = tmp_path / "brought"
    folder.mkdir()
    words.save(str(folder / "tokenizer.json"))
    for name, content in (config or {}).items():
        (folder / name).write_text(json.dumps(content))
    _, data, run = trained(tmp_path, data={"tokenizer": str(folder)}, **sections)
    return data, run


def test_a_token_that_training_never_saw_is_not_put_before_a_prompt_and_said_at_export(tmp_path, monkeypatch):
    data, run = brought(tmp_path, begins="<s>")
    said, given = [], []
    folder = export_hf(run, say=said.append).folder
    assert len(said) == 1
    assert "the tokenizer adds <s> to every text, which training did not" in said[0]
    llama = transformers.LlamaForCausalLM
    monkeypatch.setattr(llama, "generate", lambda self, ids, **_: given.append(ids[0].tolist()) or ids)
    generate(folder, "the forge")
    assert given == [data.tokenizer.tokenizer.encode("the forge", add_special_tokens=False).ids]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
            "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        },
    ],
)
def test_a_tokenizer_that_was_brought_ends_documents_as_training_did(tmp_path, config):
    data, run = brought(tmp_path, config=config, model={"eos_token_id": 1})
    said = []
    folder = export_hf(run, say=said.append).folder
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    text = "the forge 12345 trains\n"
    assert theirs(text)["input_ids"] == data.tokenizer.tokenizer.encode(text).ids
    assert not said
    assert generate(folder, "", max_new_tokens=3).tokens > 0


@pytest.mark.parametrize("config", ["{}", '{"model_type": "llama"}', "no json", '{"model_type": "of_nobody"}'])
def test_a_folder_that_transformers_cannot_load_is_refused_in_one_line(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=f"{tmp_path}: transformers cannot load it: ") as caught:
        generate(tmp_path, "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_cannot_be_taken_is_refused(tmp_path, seed):
    with pytest.raises(UserError, match=r"--seed: is not within 0 to 4294967295"):
        generate(tmp_path, "a", seed=seed)


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        export_hf(tmp_path)


def test_the_folder_that_the_command_runs_in_is_not_replaced(tmp_path, monkeypatch):
    _, _, run = trained(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for out in (Path(), Path("../empty")):
        with pytest.raises(UserError, match="empty: is the folder that the command runs in, and would be replaced"):
            export_hf(run, out)
    assert export_hf(run, Path("hf")).folder.is_dir()
    assert [path.name for path in tmp_path.glob(".*")] == []
