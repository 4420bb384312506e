import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetrain.errors import UserError
from forgetrain.publish.hf import export_hf
from forgetrain.publish.initial import check_initial
from forgetrain.train.initial import FolderWeights
from tests.corpus import built
from tests.train.test_loop import losses, run


@pytest.fixture
def origin(tmp_path):
    """A target, and the folder of a model that was trained and exported."""
    target, _ = built(tmp_path)
    run(target, tmp_path)
    folder = export_hf(tmp_path / target.name, tmp_path / "hf").folder
    return target, folder, run_record(tmp_path, target)


def run_record(runs, target):
    return json.loads((runs / target.name / "train" / "run.json").read_text())


def test_a_run_begins_with_the_folders_weights_and_resumes_without_it(tmp_path, origin):
    target, folder, _ = origin
    first = losses(tmp_path, target)[1]
    options = {"init_from": folder, "check_initial": check_initial}
    whole = run(target, tmp_path, restart=True, **options)
    logits = run_record(tmp_path, target)["init_from"]["logits"]
    assert 0 <= logits["relative"] <= logits["tolerance"]
    assert losses(tmp_path, target)[1] < first - 0.1
    run(target, tmp_path, restart=True, stop_after=3, **options)
    folder.rename(folder.with_name("gone"))
    assert run(target, tmp_path, resume=True)["weight_sha256"] == whole["weight_sha256"]
    assert run_record(tmp_path, target)["init_from"]["logits"] == logits


def test_a_run_killed_before_its_first_checkpoint_begins_with_the_same_weights(tmp_path, origin):
    target, folder, _ = origin
    whole = run(target, tmp_path, restart=True, init_from=folder)
    for path in (tmp_path / target.name / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    assert run(target, tmp_path, resume=True)["weight_sha256"] == whole["weight_sha256"]
    assert "init_from" in run_record(tmp_path, target)
    run(target, tmp_path, restart=True)
    assert "init_from" not in run_record(tmp_path, target)


def test_sharded_weights_are_read(origin):
    target, folder, _ = origin
    whole = dict(FolderWeights(folder, target))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(weights)}
    for file in set(place.values()):
        save_file({name: weights[name] for name in weights if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    sharded = FolderWeights(folder, target)
    assert list(sharded) == list(target.model.parameter_shapes())
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_another_model_is_refused_by_its_first_key(origin):
    target, folder, _ = origin
    changed = {"rope_theta": 5e5, "rms_norm_eps": 1e-3}
    other = target.model_copy(update={"model": target.model.model_copy(update=changed)})
    with pytest.raises(UserError, match=r"config\.json: rope_theta: differs from the target, which has 500000"):
        FolderWeights(folder, other)


def test_missing_and_foreign_tensors_are_refused(origin):
    target, folder, _ = origin
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.extra.bias": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.extra\.bias: is a tensor that the target's model has no place for"):
        FolderWeights(folder, target)
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight: is missing"):
        FolderWeights(folder, target)


def test_a_folder_whose_model_computes_something_else_is_refused(tmp_path, origin):
    target, folder, _ = origin
    initial = FolderWeights(folder, target)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))

    class Chosen:
        name, sha256 = "engine", None

    with pytest.raises(UserError, match="logits of transformers and of the engine"):
        check_initial(target, initial, Chosen())


def test_another_tokenizer_is_refused(tmp_path, origin):
    target, folder, _ = origin
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"data\.tokenizer: is not the tokenizer"):
        run(target, tmp_path, restart=True, init_from=folder)
