import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from forgetrain.errors import UserError
from forgetrain.publish import hf
from forgetrain.publish.generate import generate, load_model
from forgetrain.publish.hf import export_hf
from forgetrain.publish.parity import TOLERANCE, logits_parity
from forgetrain.train import checkpoint
from forgetrain.train.loop import train
from tests.corpus import built
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


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    _, _, run = trained(tmp_path)
    with pytest.raises(UserError, match="exists and is no earlier export"):
        export_hf(run, tmp_path / "corpus")
    assert list((tmp_path / "corpus").iterdir())


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        export_hf(tmp_path)
