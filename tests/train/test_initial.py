import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetrain.errors import UserError
from forgetrain.publish.hf import export_hf
from forgetrain.publish.initial import check_initial
from forgetrain.train.initial import FolderWeights
from tests.corpus import built
from tests.engine.toy import toy
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


#: An engine's losses of steps 15 and 16 spike in the first life alone; its weights hardly move.
SPIKES = """loss = torch.tensor(5.0)
        if self.steps in (15, 16) and not os.path.exists("spiked"): loss = loss + 4
        if self.steps == 16: open("spiked", "w").close()"""


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run that began with a folder's weights, stopped at step 10, and will go back to the beginning at step 16."""
    monkeypatch.chdir(tmp_path)
    settings = {"spike_window": 5, "spike_repeats": 2, "checkpoint_every": 20, "eval_every": 1000}
    target, _ = built(tmp_path, recipe={"steps": 30, "lr": 1e-4}, train=settings)
    run(target, tmp_path, stop_after=1)
    folder = export_hf(tmp_path / target.name, tmp_path / "hf").folder
    engine = toy(tmp_path, after=SPIKES)
    head = "def load(self, weights):"
    engine.write_text(engine.read_text().replace(head, f"{head}\n        self.steps = 0"))
    options = {"engine": str(engine), "unverified": True}
    whole = run(target, tmp_path, restart=True, init_from=folder, **options)
    assert [rollback["back_to"] for rollback in whole["rollbacks"]] == [0]
    Path("spiked").unlink()
    run(target, tmp_path, restart=True, init_from=folder, stop_after=10, **options)
    return lambda: run(target, tmp_path, resume=True, **options), folder, whole


def test_a_resumed_run_goes_back_to_the_folders_weights(interrupted):
    resume, _, whole = interrupted
    resumed = resume()
    assert resumed["rollbacks"] == whole["rollbacks"]
    assert resumed["weight_sha256"] == whole["weight_sha256"]


@pytest.mark.parametrize("gone", [True, False])
def test_weights_to_go_back_to_that_are_gone_or_changed_are_refused_and_nothing_is_removed(tmp_path, interrupted, gone):
    resume, folder, _ = interrupted
    if gone:
        folder.rename(folder.with_name("away"))
    else:
        weights = load_file(folder / "model.safetensors")
        save_file({name: weight + 1 for name, weight in weights.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"hf: (is gone|has changed since the run began)"):
        resume()
    [kept] = tmp_path.glob("*/checkpoints/step-*")
    assert kept.name == "step-00000010"


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
