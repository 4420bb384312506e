import pytest

from forgetrain.errors import UserError
from forgetrain.spec.schedule import learning_rate
from forgetrain.spec.target import Recipe


def recipe(**changes) -> Recipe:
    shape = {"batch_size": 1, "micro_batch_size": 1, "sequence_length": 8}
    return Recipe(**shape, **({"steps": 100, "lr": 1.0, "min_lr": 0.1, "warmup_steps": 10} | changes))


def test_warm_up_rises_to_the_rate():
    rates = [learning_rate(recipe(), step) for step in range(11)]
    assert rates == [(step + 1) / 10 for step in range(10)] + [1.0]


@pytest.mark.parametrize(
    ("decay", "middle"), [("linear", 0.55), ("exponential", 0.1**0.5), ("1-sqrt", 0.1 + 0.9 * (1 - 0.5**0.5))]
)
def test_wsd_stays_then_falls(decay, middle):
    r = recipe(decay=decay, decay_steps=20)
    assert [learning_rate(r, step) for step in (50, 79, 80)] == [1.0, 1.0, 1.0]
    assert learning_rate(r, 90) == pytest.approx(middle)
    assert learning_rate(r, 99) > learning_rate(r, 100) == pytest.approx(0.1)


def test_cosine_and_constant():
    assert learning_rate(recipe(schedule="cosine"), 55) == pytest.approx(0.55)
    assert learning_rate(recipe(schedule="cosine"), 100) == pytest.approx(0.1)
    assert learning_rate(recipe(schedule="constant"), 99) == 1.0


def test_exponential_decay_to_zero_is_refused():
    with pytest.raises(UserError, match=r"recipe\.min_lr"):
        learning_rate(recipe(decay="exponential", decay_steps=20, min_lr=0.0), 90)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decay": "linear"}, {0: 0.25, 3: 1.0, 11: 1.0, 12: 1.0, 13: 0.8875, 16: 0.55, 19: 0.2125, 20: 0.1}),
        ({"decay": "exponential"}, {12: 1.0, 13: 10**-0.125, 16: 10**-0.5, 19: 10**-0.875, 20: 0.1}),
        ({"decay": "1-sqrt"}, {12: 1.0, 14: 0.55, 20: 0.1, 13: 0.1 + 0.9 * (1 - 8**-0.5)}),
        ({"schedule": "cosine"}, {3: 1.0, 4: 1.0, 8: 0.55 + 0.45 * 0.5**0.5, 12: 0.55, 20: 0.1}),
        ({"schedule": "constant"}, {0: 0.25, 4: 1.0, 20: 1.0}),
    ],
)
def test_closed_form_values(changes, expected):
    r = recipe(steps=20, warmup_steps=4, decay_steps=8, **changes)
    assert {step: learning_rate(r, step) for step in expected} == pytest.approx(expected, rel=1e-12)
