"""What candidates are judged on: a pure function of the seed, and of a kind that shows what is left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from forgetrain.judge import trials
from forgetrain.judge.hidden import Stream, derive, draw_seed, hidden_weights
from tests.tiny import ARCHITECTURES, tiny_target

TARGET = tiny_target()


def test_batches_are_a_function_of_seed_and_step():
    one, two, other = Stream(TARGET, 5), Stream(TARGET, 5), Stream(TARGET, 6)
    two.at(0)
    for a, b in zip(one.at(3), two.at(3), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.at(3).tokens, other.at(3).tokens)
    assert not torch.equal(one.at(3).tokens, one.at(4).tokens)


def test_masks_have_uneven_holes_and_labels_are_the_next_tokens():
    for step in range(20):
        batch = Stream(TARGET, 5).at(step)
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
        assert 0 < float(batch.mask.sum()) < batch.mask.numel()
        assert float(batch.loss_denominator) == float(batch.mask.sum())
        halves = batch.mask[:2].sum(), batch.mask[2:].sum()
        assert halves[0] != halves[1] or step > 0
        assert int(batch.cu_seqlens[-1]) == batch.tokens.numel()


def test_there_is_something_to_learn():
    stream = Stream(TARGET, 5)
    batch = stream.at(0)
    follows = stream.following[batch.tokens] == batch.labels
    assert 0.7 < float(follows.float().mean()) < 0.95


def test_documents_are_cut_where_the_target_has_them():
    target = tiny_target(data={"documents": "mask"}, reference={"name": "transformers"})
    cuts = Stream(target, 5).at(0).cu_seqlens
    inside = cuts[(cuts > 0) & (cuts < 64)]
    assert (inside % 16 != 0).any()
    assert (inside.diff() > 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_weight_is_at_its_neutral_value(architecture):
    model = tiny_target(architecture).model
    weights = hidden_weights(model, 1)
    assert set(weights) == set(model.parameter_shapes())
    for name, weight in weights.items():
        neutral = 1.0 if name.endswith("norm.weight") else 0.0
        assert float((weight - neutral).abs().mean()) > 0.01, name
    assert not torch.equal(weights["model.norm.weight"], hidden_weights(model, 2)["model.norm.weight"])


def test_rates_differ_and_stay_within_the_recipe_s():
    rates = [Stream(TARGET, 5).rate(step) for step in range(50)]
    assert len(set(rates)) > 40
    assert TARGET.recipe.lr / 3 <= min(rates) <= max(rates) <= TARGET.recipe.lr


@pytest.mark.parametrize("seed", range(20))
def test_four_steps_have_a_rate_of_every_quarter(seed):
    stream = Stream(TARGET, seed)
    shares = [(stream.rate(step) / TARGET.recipe.lr - 1 / 3) * 3 / 2 for step in range(8)]
    for block in (shares[:4], shares[4:]):
        assert sorted(int(4 * share + 1e-9) for share in block) == [0, 1, 2, 3]


def test_the_order_of_the_quarters_is_the_seeds():
    orders = {tuple(sorted(range(4), key=Stream(TARGET, seed).rate)) for seed in range(40)}
    assert len(orders) > 10


def test_seeds():
    assert draw_seed() != draw_seed()
    assert derive(1, "a") != derive(1, "b") != derive(2, "b")
    assert 0 <= derive(draw_seed(), "x") < 2**61


def test_rates_of_a_training_rise_over_its_warm_up():
    risen, rising = Stream(TARGET, 5), Stream(TARGET, 5, warm_up=4)
    shares = [rising.rate(step) / risen.rate(step) for step in range(6)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_trainings_of_g5_and_g6_are_driven_at_rates_that_rise():
    target = tiny_target(recipe={"warmup_steps": 4, "steps": 20}, gates={"g5_steps": 8}).at_gates_shape()
    rates = []
    engine = SimpleNamespace(
        load=lambda weights: None,
        step=lambda batch, rate: rates.append(rate) or SimpleNamespace(loss=1.0),
        loss=lambda batch: 1.0,
        state=lambda kinds: {},
    )
    trial = SimpleNamespace(judge=SimpleNamespace(gates_target=target, data=None, pool=[7]))
    trials._train(trial, engine, 5)
    assert rates == [Stream(target, 5, warm_up=4).rate(step) for step in range(8)]


@pytest.mark.parametrize("seed", range(20))
def test_updates_meet_a_rate_of_every_decade(seed):
    rates = [rate / TARGET.recipe.lr for rate in Stream(TARGET, seed).all_rates(5)]
    assert [sum(10**-decade <= rate < 10 ** (1 - decade) for rate in rates[1:4]) for decade in (1, 2, 3)] == [1, 1, 1]
    assert min(rates[0], rates[4]) >= 1 / 3


def test_which_decade_comes_when_is_the_seeds():
    orders = {tuple(sorted((1, 2, 3), key=Stream(TARGET, seed).all_rates(4).__getitem__)) for seed in range(40)}
    assert len(orders) == 6
