import json
import math
import shutil

import pytest
from safetensors.torch import load_file

from forgetrain.data.loader import Loader
from forgetrain.errors import UserError
from forgetrain.train import checkpoint, loop
from forgetrain.train.metrics import read_journal
from forgetrain.train.spikes import Spikes, first_grown
from tests.corpus import built, write_corpus
from tests.engine.toy import toy
from tests.train.test_loop import losses, run

SETTINGS = {"spike_window": 5, "spike_repeats": 2, "checkpoint_every": 4, "eval_every": 1000, "rollback_limit": 2}
RECIPE = {"steps": 30, "lr": 1e-4}
#: A loss that varies a little with the batch, and jumps while the weights are spoiled.
LOSS = """loss = 5 + (batch.tokens.sum() % 7) / 100.0
        if any(float(w.max()) > 50 for w in self.weights.values()): loss = loss + 4
        loss = loss.float()"""


def spoiled_by(token_sum):
    """The statement with which the batch of this sum of tokens spoils the engine's weights."""
    return f"{LOSS}\n        if int(batch.tokens.sum()) == {token_sum}: next(iter(self.weights.values())).fill_(100.0)"


@pytest.fixture
def spoiled(tmp_path):
    """The batch of step 14 spoils the weights: steps 15 and 16 spike."""
    target, data = built(tmp_path, recipe=RECIPE, train=SETTINGS)
    sums = [int(Loader(data, target).batch_at(step).tokens.sum()) for step in range(40)]
    assert sums.count(sums[13]) == 1
    return target, toy(tmp_path, after=spoiled_by(sums[13]))


def test_a_spike_is_a_loss_far_above_a_full_window():
    spikes = Spikes(z=6.0, window=4, repeats=2)
    assert [spikes.sees(step, loss) for step, loss in enumerate([9.0, 1.0, 1.1, 0.9, 1.0], 1)] == [False] * 5
    assert spikes.score(1.3) == pytest.approx((1.3 - 1.0) / math.sqrt(0.005))
    assert not spikes.sees(6, 3.0)
    assert (spikes.first, spikes.total) == (6, 1)
    assert not spikes.sees(7, 1.0)  # one bad batch passes
    assert (spikes.first, spikes.in_a_row) == (None, 0)
    assert not spikes.sees(8, 3.0)
    assert spikes.sees(9, 3.0)
    assert spikes.newest_good(9) == 6


def test_small_changes_among_equal_losses_are_no_spikes():
    spikes = Spikes(z=6.0, window=4, repeats=1)
    for step in range(4):
        spikes.sees(step, 2.0)
    assert not spikes.sees(5, 2.11)
    assert spikes.sees(6, 2.4)


def test_what_is_kept_survives_json_to_the_last_bit():
    spikes = Spikes(z=6.0, window=4, repeats=2)
    for step, loss in enumerate([1 / 3, 0.1 + 0.2, 1.1, 0.9, 7.0], 1):
        spikes.sees(step, loss)
    again = Spikes(z=6.0, window=4, repeats=2, kept=json.loads(json.dumps(spikes.kept())))
    assert again.kept() == spikes.kept()
    assert again.score(1.2) == spikes.score(1.2)
    assert again.sees(6, 7.0)


def test_spikes_in_a_row_send_the_run_back_past_their_batches(tmp_path, spoiled):
    target, engine = spoiled
    summary = run(target, tmp_path, engine=str(engine), unverified=True)
    assert (summary["steps"], summary["finished"], summary["spikes"]) == (30, True, 2)
    (rollback,) = summary["rollbacks"]
    assert (rollback["step"], rollback["back_to"], rollback["batches_left_out"]) == (16, 12, [12, 16])
    seen = losses(tmp_path, target)
    assert list(seen) == list(range(1, 31))
    assert max(seen.values()) < 6
    newest = checkpoint.newest(tmp_path / target.name / "checkpoints", warn=pytest.fail)
    assert newest.manifest["spikes"]["offset"] == 4


@pytest.mark.parametrize("stop", [13, 14, 15, 16, 18, 20])
def test_an_interruption_around_a_rollback_changes_no_bit(tmp_path, spoiled, stop):
    target, engine = spoiled
    options = {"engine": str(engine), "unverified": True}
    whole = run(target, tmp_path, **options)
    expected = losses(tmp_path, target)
    run(target, tmp_path, restart=True, stop_after=stop, **options)
    resumed = run(target, tmp_path, resume=True, **options)
    assert resumed["weight_sha256"] == whole["weight_sha256"]
    assert resumed["rollbacks"] == whole["rollbacks"]
    assert losses(tmp_path, target) == expected


def test_a_kill_right_after_a_rollback_changes_no_bit(tmp_path, spoiled, monkeypatch):
    target, engine = spoiled
    options = {"engine": str(engine), "unverified": True}
    whole = run(target, tmp_path, **options)
    expected = losses(tmp_path, target)
    real = loop.Job._roll_back

    def killed(self, *arguments):
        real(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Job, "_roll_back", killed)
    with pytest.raises(KeyboardInterrupt):
        run(target, tmp_path, restart=True, **options)
    monkeypatch.setattr(loop.Job, "_roll_back", real)
    assert run(target, tmp_path, resume=True, **options)["weight_sha256"] == whole["weight_sha256"]
    assert losses(tmp_path, target) == expected


def test_going_back_in_vain_ends_the_run_with_the_evidence(tmp_path):
    target, data = built(tmp_path, recipe=RECIPE, train=SETTINGS)
    grown = "yield 'model.norm#fwd@0', batch.mask * (9.0 if self.steps > 14 else 1.0)"
    after = "loss = torch.tensor(9.0 if self.steps > 14 else 5.0)"
    engine = toy(tmp_path, after=after, probe=f"yield 'model.embed_tokens#fwd@1', batch.mask\n        {grown}")
    says = (
        r"evidence-00000016: losses spike again at step 16, after going back to step 12 2 times; first bad tap: model"
    )
    with pytest.raises(UserError, match=says):
        run(target, tmp_path, engine=str(engine), unverified=True)
    folder = tmp_path / target.name / "train" / "evidence-00000016"
    report = json.loads((folder / "report.json").read_text())
    assert (report["first_bad_tap"], report["good_step"], len(report["rollbacks"])) == ("model.norm#fwd@0", 12, 2)
    batch = Loader(data, target).batch_at(15 + 2 * 4)  # step 16's, with the cursor moved on by two rollbacks
    assert load_file(folder / "batch.safetensors")["tokens"].equal(batch.tokens)
    assert checkpoint.newest(tmp_path / target.name / "checkpoints", warn=pytest.fail).step == 12


def test_before_the_first_checkpoint_it_goes_back_to_the_beginning(tmp_path):
    target, data = built(tmp_path, recipe=RECIPE, train=SETTINGS | {"checkpoint_every": 20})
    sums = [int(Loader(data, target).batch_at(step).tokens.sum()) for step in range(40)]
    engine = toy(tmp_path, after=spoiled_by(sums[13]))
    engine.write_text(
        engine.read_text().replace("def load(self, weights):", "def load(self, weights):\n        self.steps = 0")
    )
    summary = run(target, tmp_path, engine=str(engine), unverified=True)
    assert [(r["step"], r["back_to"]) for r in summary["rollbacks"]] == [(16, 0)]
    assert [line["step"] for line in read_journal(tmp_path / target.name / "train/metrics.jsonl") if "lr" in line] == [
        *range(1, 31)
    ]


@pytest.mark.parametrize(("every", "kept"), [(50, 12), (7, 14)])
def test_a_checkpoint_of_another_interval_is_gone_back_to_and_kept(tmp_path, spoiled, every, kept):
    target, engine = spoiled
    options = {"engine": str(engine), "unverified": True}
    run(target, tmp_path, stop_after=14, **options)  # saved: 12, and 14 by the interruption, whose batch spoiled it
    root = tmp_path / target.name / "checkpoints"
    seldom = target.model_copy(update={"train": target.train.model_copy(update={"checkpoint_every": every})})
    shutil.copytree(tmp_path / target.name, tmp_path / "damaged")
    summary = run(seldom, tmp_path, resume=True, stop_after=17, **options)
    assert [(r["step"], r["back_to"]) for r in summary["rollbacks"]] == [(16, 12)]
    for stop in (18, 19):
        run(seldom, tmp_path, resume=True, stop_after=stop, **options)
    assert [checkpoint.step_of(path) for path in checkpoint.steps_in(root)] == [19, 18, kept]

    shutil.rmtree(tmp_path / target.name)
    (tmp_path / "damaged").rename(tmp_path / target.name)
    (root / "step-00000012" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match="checkpoints: losses spike since step 15 and no good checkpoint from before"):
        run(seldom, tmp_path, resume=True, **options)
    assert (root / "step-00000014").is_dir()


def test_it_goes_back_to_the_beginning_when_no_interval_had_passed_before(tmp_path, spoiled):
    target, engine = spoiled
    engine.write_text(
        engine.read_text().replace("def load(self, weights):", "def load(self, weights):\n        self.steps = 0")
    )
    options = {"engine": str(engine), "unverified": True}
    seldom = target.model_copy(update={"train": target.train.model_copy(update={"checkpoint_every": 50})})
    run(seldom, tmp_path, stop_after=14, **options)
    often = target.model_copy(update={"train": target.train.model_copy(update={"checkpoint_every": 15})})
    assert [r["back_to"] for r in run(often, tmp_path, resume=True, **options)["rollbacks"]] == [0]


@pytest.fixture
def staged(tmp_path):
    """A target whose stage changes after step 10, and an engine whose loss jumps there for good."""
    other = write_corpus(tmp_path / "other", seed=1)
    sources = [{"path": str(tmp_path / "corpus"), "name": "a"}, {"path": str(other), "name": "b"}]

    def staged(**second):
        stages = [{"name": "one", "steps": 10, "weights": {"a": 1.0}}, {"name": "two", "steps": 20, **second}]
        target, _ = built(tmp_path, recipe=RECIPE, train=SETTINGS, data={"sources": sources, "stages": stages})
        return target, toy(tmp_path, after=f"{LOSS}\n        if self.steps > 10: loss = loss + 4")

    return staged


@pytest.mark.parametrize("second", [{"weights": {"a": 1.0, "b": 1.0}}, {"weights": {"a": 1.0}, "sequence_length": 32}])
def test_a_stage_of_another_mixture_or_length_has_losses_of_its_own(tmp_path, staged, second):
    target, engine = staged(**second)
    options = {"engine": str(engine), "unverified": True}
    whole = run(target, tmp_path, **options)
    assert (whole["finished"], whole["spikes"], whole["rollbacks"]) == (True, 0, [])
    for stop in (10, 12):
        run(target, tmp_path, restart=True, stop_after=stop, **options)
        again = run(target, tmp_path, resume=True, **options)
        assert (again["spikes"], again["weight_sha256"]) == (0, whole["weight_sha256"])


def test_a_stage_of_a_larger_batch_alone_is_compared_with_the_losses_before(tmp_path, staged):
    target, engine = staged(weights={"a": 1.0}, batch_size=8)
    with pytest.raises(UserError, match="losses spike again at step 12, after going back to step 8 2 times"):
        run(target, tmp_path, engine=str(engine), unverified=True)


def test_spikes_in_a_row_end_with_their_stage(tmp_path):
    spikes = Spikes(z=6.0, window=4, repeats=2)
    for step in range(1, 5):
        spikes.sees(step, 2.0, stage=0)
    spikes.sees(5, 9.0, stage=0)
    spikes = Spikes(z=6.0, window=4, repeats=2, kept=json.loads(json.dumps(spikes.kept())))
    assert not spikes.sees(6, 9.0, stage=1)
    assert (spikes.first, spikes.in_a_row, spikes.total) == (None, 0, 1)
    assert [spikes.sees(step, 5.0, stage=1) for step in range(7, 10)] == [False] * 3


def test_zero_looks_for_none(tmp_path, spoiled):
    target, engine = spoiled
    off = target.model_copy(update={"train": target.train.model_copy(update={"spike_z": 0.0})})
    summary = run(off, tmp_path, engine=str(engine), unverified=True)
    assert (summary["spikes"], summary["rollbacks"]) == (0, [])
    assert max(losses(tmp_path, target).values()) > 8


def test_the_first_grown_tap():
    good = {"a": 1.0, "b": 2.0, "c": 0.0}
    assert first_grown({"a": 3.9, "b": 8.1, "c": 1.0}, good) == "b"
    assert first_grown({"a": 1.0, "b": math.nan}, good) == "b"
    assert first_grown({"a": 1.0, "b": 2.0, "c": 0.0}, good) is None
