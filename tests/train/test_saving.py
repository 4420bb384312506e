import threading

import pytest
import torch

from forgetrain.errors import UserError
from forgetrain.spec.target import Training
from forgetrain.train import checkpoint
from forgetrain.train.loop import Job
from forgetrain.train.saving import Saver
from tests.corpus import built
from tests.engine.toy import toy
from tests.train.test_checkpoint import ALONE, Engine
from tests.train.test_loop import run


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


class Gate:
    """Holds ``checkpoint.save`` until opened."""

    def __init__(self, monkeypatch):
        self.open, self.real = threading.Event(), checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self)

    def __call__(self, *arguments):
        assert self.open.wait(20)
        return self.real(*arguments)


def saver(root, keep_last=2):
    return Saver(root, ALONE, Training(keep_last=keep_last, checkpoint_every=2))


def test_a_checkpoint_holds_the_state_at_its_step_and_not_what_came_while_it_was_written(
    tmp_path, tokenizer, monkeypatch
):
    gate, root = Gate(monkeypatch), tmp_path / "checkpoints"
    weight = torch.ones(3, 2)
    engine = Engine({"master/a": weight})
    engine.state = lambda: {"master/a": checkpoint.Shard(weight, (3, 2), (0, 0))}  # the live tensor, no copy
    with saver(root) as behind:
        behind.start(engine, 1, {"note": "kept"}, tokenizer)  # returns, though nothing can be written yet
        weight.fill_(7.0)
        assert not root.exists()
        gate.open.set()
    found = checkpoint.newest(root, warn=pytest.fail)
    assert (found.step, found.manifest["note"]) == (1, "kept")
    assert torch.equal(checkpoint.read_masters(found.path, {"a": (3, 2)})["a"], torch.ones(3, 2))


def test_the_first_save_finds_its_memory_taken(tmp_path, tokenizer):
    weight = torch.ones(1 << 22)
    with saver(tmp_path / "checkpoints") as behind:
        behind.reserve(Engine({"master/a": weight}))
        held = behind._staged._buffers["master/a"]
        behind.start(Engine({"master/a": weight}), 1, {}, tokenizer)
        behind.wait()
        assert behind._staged._buffers["master/a"] is held
    assert torch.equal(held, weight)


def test_a_run_takes_it_before_its_first_step(tmp_path, monkeypatch):
    target, _ = built(tmp_path)
    reserve, stretch, order = Saver.reserve, Job._stretch, []
    monkeypatch.setattr(Saver, "reserve", lambda *given: (order.append("reserve"), reserve(*given)))
    monkeypatch.setattr(Job, "_stretch", lambda *given: (order.append("steps"), stretch(*given))[1])
    run(target, tmp_path, stop_after=1)
    assert order == ["reserve", "steps"]


def test_the_next_save_waits_for_the_one_before_and_old_ones_are_pruned(tmp_path, tokenizer, monkeypatch):
    gate, root = Gate(monkeypatch), tmp_path / "checkpoints"
    weight = torch.zeros(2)
    with saver(root) as behind:
        for step in (1, 2, 3):
            weight.fill_(step)
            threading.Timer(0.1, gate.open.set).start()
            behind.start(Engine({"master/a": weight}), step, {}, tokenizer)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]
    for step in (2, 3):  # the buffers are used again, but never while a save reads them
        read = checkpoint.read_masters(checkpoint.folder_of(root, step), {"a": (2,)})
        assert read["a"].tolist() == [step, step]


def test_what_a_spike_would_go_back_to_is_kept_though_it_is_not_among_the_last(tmp_path, tokenizer):
    root = tmp_path / "checkpoints"
    with saver(root, keep_last=1) as behind:
        facts = {"target": {"train": {"checkpoint_every": 2}}}
        for step, needed in ((2, 0), (3, 2), (4, 2), (6, 3)):
            behind.start(Engine({"master/a": torch.zeros(2)}), step, facts, tokenizer, needed)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000006"]


def test_a_save_under_way_is_finished_when_the_run_ends_by_an_error(tmp_path, tokenizer, monkeypatch):
    gate, root = Gate(monkeypatch), tmp_path / "checkpoints"
    threading.Timer(0.2, gate.open.set).start()

    def interrupted():
        with saver(root) as behind:
            behind.start(Engine({"master/a": torch.zeros(2)}), 1, {}, tokenizer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert checkpoint.newest(root, warn=pytest.fail).step == 1


def test_a_full_disk_in_the_background_ends_the_run_at_a_later_step_with_the_same_line(tmp_path, monkeypatch):
    target, _ = built(tmp_path, recipe={"steps": 400}, train={"checkpoint_every": 2, "eval_every": 1000})

    def full(*arguments):
        raise UserError("cannot be written: no space left on device", file="step-00000002")

    monkeypatch.setattr(checkpoint, "save", full)
    engine = toy(tmp_path, step=f"open({str(tmp_path / 'steps')!r}, 'a').write('x'); time.sleep(0.02)")
    with pytest.raises(UserError, match="step-00000002: cannot be written: no space left on device"):
        run(target, tmp_path, engine=str(engine), unverified=True)
    assert 2 <= len((tmp_path / "steps").read_text()) <= 4


def test_a_failure_at_the_last_save_is_raised_too(tmp_path, monkeypatch):
    target, _ = built(tmp_path, train={"checkpoint_every": 100})

    def full(*arguments):
        raise UserError("cannot be written: no space left on device", file="step-00000006")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(UserError, match="no space left"):
        run(target, tmp_path)
    assert not (tmp_path / target.name / "train" / "summary.json").exists()
