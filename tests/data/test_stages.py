"""Stages: mixtures and shapes that change on the way, and batches that any step, rank and resume finds at once."""

import numpy as np
import pytest
import torch

from forgetrain.data.build import build_data
from forgetrain.data.loader import Loader
from forgetrain.data.order import StagedOrder
from forgetrain.errors import UserError
from forgetrain.spec.stages import Stage
from tests.corpus import corpus_target, write_corpus

STABLE = {"name": "stable", "steps": 3, "weights": {"plain": 3.0, "zebra": 1.0}}
RAMP = {"name": "ramp", "steps": 2, "batch_size": 8}
LONG = {"name": "long", "steps": 2, "sequence_length": 32, "batch_size": 4, "weights": {"zebra": 1.0}}


def staged(tmp_path, *stages, **sections):
    """A built target with two sources, ``plain`` and ``zebra``, whose tokens tell them apart."""
    write_corpus(tmp_path / "plain")
    other = write_corpus(tmp_path / "zebra", documents=30, seed=9)
    for path in other.iterdir():
        path.write_text("zebra quagga " * 40)
    sources = [{"path": str(tmp_path / name), "name": name} for name in ("plain", "zebra")]
    data = {"sources": sources, "stages": list(stages), **sections.pop("data", {})}
    recipe = {"steps": sum(stage["steps"] for stage in stages) or 6, **sections.pop("recipe", {})}
    target = corpus_target(tmp_path, recipe=recipe, data=data, **sections)
    return target, build_data(target, tmp_path / target.name / "data")


def test_each_step_has_its_stages_shape(tmp_path):
    target, data = staged(tmp_path, STABLE, RAMP, LONG)
    loader = Loader(data, target)
    shapes = [tuple(loader.batch_at(step).tokens.shape) for step in range(8)]
    assert shapes == [(4, 16)] * 3 + [(8, 16)] * 2 + [(4, 32)] * 3  # the last stage holds what comes after it
    assert loader.batch_at(6).loss_denominator == 4 * 32


def test_weights_are_exact_and_by_name(tmp_path):
    target, data = staged(tmp_path, {**STABLE, "steps": 100}, {**RAMP, "steps": 10}, {**LONG, "steps": 10})
    loader = Loader(data, target)

    def count(first, last):
        return np.bincount(np.concatenate([loader.places(s).source for s in range(first, last)]), minlength=2).tolist()

    assert count(0, 100) == [300, 100]
    assert count(100, 110) == [40, 40]  # no weights: the sources' own
    assert count(110, 120) == [0, 40]
    zebra = set(data.sources[1].train.tokens.tolist())
    assert set(loader.batch_at(112).tokens.flatten().tolist()) <= zebra


def test_no_window_returns_before_its_source_was_gone_through():
    """Over the stages of one length, whatever their weights and whatever stage of another length lies between."""
    stages = [Stage("a", 0, 7, 64, 3, {}), Stage("b", 7, 9, 128, 5, {}), Stage("c", 9, 50, 64, 4, {})]
    order = StagedOrder(stages, {64: [41, 23], 128: [20, 11]}, [[2, 1], [1, 1], [0, 1]], seed=3)
    seen = {}
    for step in range(50):
        stage, places = order.at(step)
        for source, epoch, window in zip(*(column.tolist() for column in places), strict=True):
            seen.setdefault((stage.sequence_length, source, epoch), []).append(window)
    assert all(len(set(windows)) == len(windows) for windows in seen.values())
    assert [len(seen[64, 1, epoch]) for epoch in range(7)] == [23] * 7  # 7 + 164 windows: seven times, and ten more
    assert len(seen[64, 1, 7]) == 10
    assert len(seen[64, 0, 0]) == 14


def test_a_stage_that_changes_nothing_changes_no_order():
    """Cut where a cycle of the mixture ends, a run in two stages is the run in one."""
    whole = StagedOrder([Stage("", 0, 40, 64, 4, {})], {64: [41, 23]}, [[3, 1]], seed=0)
    halves = [Stage("a", 0, 20, 64, 4, {}), Stage("b", 20, 40, 64, 4, {})]
    cut = StagedOrder(halves, {64: [41, 23]}, [[3, 1], [3, 1]], seed=0)
    for step in range(45):
        assert all((a == b).all() for a, b in zip(whole.at(step)[1], cut.at(step)[1], strict=True))


def test_a_far_stage_is_found_at_once():
    stages = [Stage("a", 0, 10**9, 64, 1024, {}), Stage("b", 10**9, 2 * 10**9, 64, 1024, {})]
    order = StagedOrder(stages, {64: [97, 13]}, [[1, 2], [5, 1]], seed=0)
    stage, places = order.at(10**9 + 1)
    assert stage.name == "b"
    assert (places.window < np.array([97, 13])[places.source]).all()
    begun = 10**9 * 1024 // 3 + 1024 * 5 // 6  # a third of stage a, and five sixths of b's first step
    assert places.epoch[places.source == 0].min() == begun // 97


def test_every_world_size_meets_the_same_rows(tmp_path):
    target, data = staged(tmp_path, STABLE, RAMP, LONG, data={"documents": "mask+reset"})
    for step in range(7):
        whole = Loader(data, target).batch_at(step)
        parts = [Loader(data, target, rank=rank, world=2).batch_at(step) for rank in range(2)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.mask for part in parts]), whole.mask)
        assert all(part.loss_denominator == whole.loss_denominator == whole.mask.sum() for part in parts)


def test_batches_read_ahead_across_a_stages_end(tmp_path):
    target, data = staged(tmp_path, STABLE, RAMP, LONG)
    loader = Loader(data, target)
    for step, batch in loader.batches(2, 7):
        assert all(torch.equal(x, y) for x, y in zip(batch, Loader(data, target).batch_at(step), strict=True))


def test_held_out_batches_keep_the_recipes_shape(tmp_path):
    target, data = staged(tmp_path, LONG)
    plain = target.without_stages()
    for (batch, weight), (other, expected) in zip(
        Loader(data, target).held_out(), Loader(data, plain).held_out(), strict=True
    ):
        assert batch.tokens.shape == (4, 16)
        assert torch.equal(batch.tokens, other.tokens)
        assert weight == expected


def test_epochs_are_counted_over_stages(tmp_path):
    target, data = staged(tmp_path, STABLE, RAMP, LONG)
    loader = Loader(data, target)
    short, long = loader.windows[16], loader.windows[32]
    assert loader.epoch_at(4) == pytest.approx((3 * 4 + 8) / short)
    assert loader.epoch_at(7) == pytest.approx((3 * 4 + 2 * 8) / short + 2 * 4 / long)


def test_stages_change_nothing_of_what_was_built(tmp_path):
    target, data = staged(tmp_path, STABLE, RAMP)
    before = (data.folder / "manifest.json").stat().st_mtime_ns
    again = build_data(target.without_stages(), data.folder)
    assert (again.folder / "manifest.json").stat().st_mtime_ns == before


def test_what_cannot_be_is_refused_before_anything_starts(tmp_path):
    target, data = staged(tmp_path, STABLE, RAMP, LONG)
    with pytest.raises(UserError, match=r"recipe\.batch_size: does not divide into micro-batches of 2 on 4 ranks"):
        Loader(data, target, world=4)
    odd = target.model_copy(update={"recipe": target.recipe.model_copy(update={"batch_size": 8})})
    with pytest.raises(UserError, match=r"data\.stages\.long\.batch_size: does not divide .* on 4 ranks"):
        Loader(data, odd, world=4)
    stages = [stage.model_copy(update={"sequence_length": 10**6}) for stage in target.data.stages]
    long = target.model_copy(update={"data": target.data.model_copy(update={"stages": stages})})
    with pytest.raises(UserError, match=r"data\.stages\.stable\.sequence_length: holds .* less than one window"):
        Loader(data, long)
    sources = list(reversed(target.data.sources))
    turned = target.model_copy(update={"data": target.data.model_copy(update={"sources": sources})})
    with pytest.raises(UserError, match="was built from other sources"):
        Loader(data, turned)


def test_weights_that_no_cycle_is_near_to_are_refused_with_those_of_the_nearest(tmp_path):
    far = {"name": "far", "steps": 6, "weights": {"plain": 1.0, "zebra": 0.0001}}
    target, data = staged(tmp_path, far)
    near = r"write the weights of that cycle: plain = 4095, zebra = 1; else"
    with pytest.raises(
        UserError, match=rf"zebra: data\.stages\.far\.weights: asks for 0\.0001 of .* 0\.000244 .*{near}"
    ):
        Loader(data, target)
    target, data = staged(tmp_path, {**far, "weights": {"plain": 4095, "zebra": 1}})
    assert Loader(data, target).taken()["windows"].sum() == 6 * 4


def test_a_weight_of_a_source_that_no_cycle_is_near_to_is_refused(tmp_path):
    paths = [str(write_corpus(tmp_path / name)) for name in ("plain", "zebra")]
    sources = [{"path": path, "weight": weight} for path, weight in zip(paths, (1e-6, 1.0), strict=True)]
    target = corpus_target(tmp_path, data={"sources": sources})
    with pytest.raises(UserError, match=r"plain: data\.sources\.weight: asks for 1e-06 of .* \(got 1e-06\)"):
        Loader(build_data(target, tmp_path / "data"), target)
