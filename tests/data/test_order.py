import hashlib

import numpy as np
import pytest

from forgetrain.data.order import Order, mixing_cycle, mixing_version, permute


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_a_permutation_visits_each_number_once(n):
    assert sorted(permute(np.arange(n), n, (0, 0, 0)).tolist()) == list(range(n))


def test_it_is_the_same_everywhere_and_differs_with_its_key():
    index = np.arange(1000)
    assert permute(index, 1000, (7, 0, 0))[:6].tolist() == [715, 272, 938, 740, 370, 924]
    assert (permute(index, 1000, (7, 0, 0)) != permute(index, 1000, (7, 0, 1))).mean() > 0.99


def test_it_looks_random():
    n = 100_000
    order = permute(np.arange(n), n, (1, 2, 3))
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


def test_each_epoch_takes_every_window_once_in_another_order():
    order = Order([10], [1.0], seed=3)
    first, second = order.at(0, 10), order.at(10, 10)
    assert sorted(first.window) == sorted(second.window) == list(range(10))
    assert first.window.tolist() != second.window.tolist()
    assert first.epoch.tolist() == [0] * 10
    assert second.epoch.tolist() == [1] * 10


def test_any_place_is_found_without_those_before_it():
    order = Order([97, 13], [3, 1], seed=0)
    whole = order.at(0, 500)
    for first in (0, 1, 137, 490):
        piece = order.at(first, 10)
        assert all((a[first : first + 10] == b).all() for a, b in zip(whole, piece, strict=True))
    far = order.at(10**12, 4)  # a trillion windows in, as quickly
    assert (far.window < 97).all()


def test_sources_are_mixed_by_their_weights_exactly():
    order = Order([50, 50, 50], [5, 3, 2], seed=0)
    source = order.at(0, 1000).source
    assert np.bincount(source).tolist() == [500, 300, 200]
    assert np.bincount(source[:10]).tolist() == [5, 3, 2]  # and evenly: in every stretch of a cycle


def test_each_source_is_gone_through_without_gaps():
    places = Order([7, 5], [2, 1], seed=1).at(0, 300)
    for source, windows in ((0, 7), (1, 5)):
        rows = places.source == source
        for epoch in range(3):
            assert sorted(places.window[rows & (places.epoch == epoch)]) == list(range(windows))


@pytest.mark.parametrize("weights", [[1.0], [0.1, 0.2, 0.7], [1e-6, 1.0], [1 / 3, 2 / 3], [0.123456789, 0.876543211]])
def test_cycles_are_short_and_hold_every_source(weights):
    cycle = mixing_cycle(weights)
    shares = np.bincount(cycle, minlength=len(weights)) / len(cycle)
    assert len(cycle) <= 4097
    assert (shares > 0).all()
    assert shares == pytest.approx(np.array(weights) / sum(weights), abs=1 / 4096)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.0014, 0.0006], [7, 3]),
        ([0.05, 0.0007], [500, 7]),
        ([0.999, 0.0005, 0.0005], [1998, 1, 1]),
        ([0.0001, 0.0002], [1, 2]),
        ([1 / 6, 5 / 6], [1, 5]),
    ],
)
def test_ratios_that_a_cycle_holds_are_exact_however_small_a_weight_is(weights, shares):
    assert np.bincount(mixing_cycle(weights)).tolist() == shares


@pytest.mark.parametrize(
    "weights",
    [
        [0.04, 0.07, 0.11, 99.78],
        [3.14159, 1],
        [18.11, 12.07, 14.4, 10.01, 7.6, 6.12, 6.45, 4.59, 1.56, 0.38, 0.3, 0.14],
    ],
)
def test_the_cycle_that_comes_nearest_is_taken_where_none_is_exact(weights):
    shares = np.bincount(mixing_cycle(weights))
    asked = np.array(weights) / sum(weights)
    assert shares.sum() <= 4096
    assert shares / shares.sum() == pytest.approx(asked, rel=0.07)


#: Weights whose cycles the first version made exactly, and the SHA-256 of all those cycles as it made them.
ALWAYS_EXACT = [
    *([1.0], [3, 1], [5, 3, 2], [0.1, 0.2, 0.7], [1 / 3, 2 / 3], [1 / 6, 5 / 6], [0.123, 0.877], [0.001, 0.999]),
    *([2.5, 0.05, 1.45, 1.0], [1.001, 2.003, 0.996], [0.015, 0.985], [7, 7, 7, 1], [0.5] * 9 + [0.25]),
]
THEIR_CYCLES = "0d06bda383b478bc4c66d992b9da732b0e0682c01e425951650f93c84ed7ad7f"


def test_weights_that_were_exact_in_the_first_version_keep_their_order():
    cycles = b"".join(mixing_cycle(weights).astype("<i8").tobytes() for weights in ALWAYS_EXACT)
    assert hashlib.sha256(cycles).hexdigest() == THEIR_CYCLES
    assert {mixing_version(weights) for weights in ALWAYS_EXACT} == {1}


@pytest.mark.parametrize(
    "weights", [[0.0014, 0.0006], [0.05, 0.0007], [0.999, 0.0005, 0.0005], [0.0001, 0.0002], [1e-6, 1.0]]
)
def test_weights_that_the_first_version_rounded_have_an_order_of_another_version(weights):
    assert mixing_version(weights) == 2
