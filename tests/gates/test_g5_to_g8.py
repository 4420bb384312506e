"""G5 to G8 on made-up evidence: what passes, what fails, and how near it was."""

from __future__ import annotations

import math
import random

import pytest
import torch

from forgetrain.gates.g5 import g5, students
from forgetrain.gates.g6 import Repeat, by_rounding, g6, of_seeds, weight_distance
from forgetrain.gates.g7 import g7
from forgetrain.gates.g8 import g8

REFERENCE = [[4.0, 3.0, 2.0]] * 3


def shifted(by: float) -> list[list[float]]:
    return [[loss + by for loss in run] for run in REFERENCE]


@pytest.mark.parametrize(
    ("delta", "band", "passed"),
    [(0.0014, 0.0, True), (0.0016, 0.0, False), (-0.0016, 0.0, False), (0.0016, 0.001, True), (math.nan, 0.0, False)],
)
def test_g5_is_two_sided_and_as_wide_as_known_good_variants(delta, band, passed):
    assert g5(shifted(delta), REFERENCE, [shifted(band)]).passed is passed  # 5e-4 of a mean loss of 3 is 0.0015


def test_g5s_band_is_no_narrower_when_known_goods_seeds_cancel():
    """Seen on nano-cpu, where a training is chaotic: an honest engine was 0.0104 off, over seeds that are 0.0031,
    0.0066 and 0.0214 off, where the known-good engine's three had a mean of 0.0031 and 0.0092 was allowed."""

    def apart(*by):
        return [[loss + each for loss in run] for run, each in zip(REFERENCE, by, strict=True)]

    honest, known_good = apart(0.0031, 0.0066, 0.0214), apart(0.0171, -0.0130, 0.0051)
    verdict = g5(honest, REFERENCE, [known_good])
    assert verdict.passed
    assert verdict.detail["samples"] == 3
    # a variant that equals the reference says nothing of rounding, one more that does not narrows what is allowed
    assert g5(honest, REFERENCE, [known_good, REFERENCE]).threshold == verdict.threshold
    assert g5(honest, REFERENCE, [known_good, apart(0.0130, -0.0171, 0.0051)]).threshold < 0.6 * verdict.threshold
    assert not g5(honest, REFERENCE, [apart(0.002, 0.002, 0.002), apart(0.002, -0.002, 0.002)]).passed


@pytest.mark.parametrize(("samples", "exact"), [(3, 9.2187), (6, 4.9045), (9, 4.0939), (30, 3.2704)])
def test_students_t_is_that_of_tables(samples, exact):
    assert students(3.0, samples) == pytest.approx(exact, rel=0.025)


def test_g5_rejects_rarely_what_is_chaos_alone():
    """Candidate, reference and known-good engines are all right, and a seed's loss is off by chance."""
    chance = random.Random(1)

    def run():
        return [[3.0 + chance.gauss(0, 0.01)] * 3 for _ in range(3)]

    reference = [[3.0] * 3] * 3
    rejected = sum(not g5(run(), reference, [run(), run()]).passed for _ in range(2000))
    assert rejected < 20  # one in a hundred


def test_g5_needs_every_seed():
    assert not g5(REFERENCE[:2], REFERENCE, []).passed
    assert not g5(REFERENCE[:2], REFERENCE[:2], []).passed
    with pytest.raises(ValueError, match="zip"):
        g5([run[:2] for run in REFERENCE], REFERENCE, [])


SAME = Repeat("a", "a", 0.0)


@pytest.mark.parametrize(
    ("held_out", "distance", "repeat", "failed"),
    [
        (3.0, 0.1, SAME, None),
        (3.09, 0.1, SAME, None),
        (3.11, 0.1, SAME, "held-out loss"),
        (2.89, 0.1, SAME, "held-out loss"),
        (math.nan, 0.1, SAME, "held-out loss"),
        (3.0, 0.3, SAME, "weights"),
        (3.0, math.nan, SAME, "weights"),
        (3.0, 0.1, Repeat("a", "b", 0.01), "repeat"),
        (3.0, 0.1, Repeat("a", "b", 0.01, 0.02), None),
        (3.0, 0.1, Repeat("a", "b", 0.03, 0.02), "repeat"),
    ],
)
def test_g6(held_out, distance, repeat, failed):
    verdict = g6(held_out, [3.0, 2.95, 3.05], distance, repeat, distance_budget=0.2)
    assert verdict.passed is (failed is None)
    assert verdict.first_divergence == failed


DECLARED = Repeat("a", "b", 0.03, 0.02)
FAR, BITS, HELD_OUT = (3.0, 0.3, SAME), (3.0, 0.1, Repeat("a", "b", 0.01)), (9.0, 0.1, SAME)


def seeds(*evidence):
    return [g6(held, [3.0, 2.95, 3.05], distance, repeat, distance_budget=0.2) for held, distance, repeat in evidence]


@pytest.mark.parametrize(
    ("evidence", "again"),
    [
        ((3.0, 0.1, SAME), False),
        (FAR, True),
        ((3.0, 0.1, DECLARED), True),
        ((3.0, 0.3, DECLARED), True),
        ((3.0, 1.9, SAME), True),
        ((3.0, 2.1, SAME), False),  # more than ten times the budget is nobody's rounding
        ((3.0, math.inf, SAME), False),
        ((3.0, math.nan, SAME), False),
        ((3.0, 0.1, Repeat("a", "b", 0.21, 0.02)), False),
        ((3.0, 0.1, Repeat("a", "b", math.nan, 0.02)), False),
        (BITS, False),
        (HELD_OUT, False),
        ((9.0, 0.3, SAME), False),
    ],
)
def test_a_distance_alone_may_be_a_seeds_fault(evidence, again):
    assert by_rounding(*seeds(evidence)) is again


@pytest.mark.parametrize(
    ("others", "failed"),
    [
        ([(3.0, 0.1, SAME), (3.0, 0.12, SAME)], None),
        ([(3.0, 0.1, SAME), FAR], "weights"),
        ([(3.0, 0.1, SAME), (3.0, 0.1, DECLARED)], "repeat"),
        ([FAR, FAR], "weights"),
        ([(3.0, 0.1, SAME), BITS], "repeat"),
        ([HELD_OUT, (3.0, 0.1, SAME)], "held-out loss"),
    ],
)
def test_whom_one_seed_led_astray_must_pass_with_all_others(others, failed):
    verdict = of_seeds(seeds(FAR, *others))
    assert verdict.passed is (failed is None)
    assert verdict.first_divergence == failed
    assert verdict.explanation.count("weights 0.3 of training's way") >= 1
    assert verdict.detail["seeds"][0]["weights"]["pass"] is False


def test_one_seed_speaks_for_itself():
    (verdict,) = seeds((3.0, 0.1, SAME))
    assert of_seeds([verdict]) == verdict


def test_g6_needs_a_band():
    assert not g6(3.0, [3.0], 0.0, SAME, distance_budget=1.0).passed


def test_weight_distance():
    start, there = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    assert weight_distance(there, there, start) == 0.0
    assert weight_distance(start, there, start) == pytest.approx(1.0)
    assert weight_distance({"w": torch.full((4,), 1.1)}, there, start) == pytest.approx(0.1, rel=1e-5)
    assert weight_distance(there, start, start) == math.inf


def times(mean: float, spread: float = 0.0, count: int = 10) -> list[float]:
    return [mean * (1 + spread * (-1) ** i) for i in range(count)]


@pytest.mark.parametrize(
    ("champion", "candidate", "passed"),
    [
        (times(1.0), times(0.98), True),
        (times(1.0), times(1.0), False),
        (times(1.0), times(0.995), False),  # faster, by less than 1%
        (times(1.0, 0.2), times(0.95), False),  # 5%, in a champion's noise of 20%
        (times(1.0, 0.01), times(0.9, 0.01), True),
        (times(1.0), times(0.01), False),  # above the roofline
        (times(1.0), [0.9] * 9 + [0.01], False),  # one block above the roofline is enough
        (times(1.0, count=4), times(0.5, count=4), False),
        (times(1.0), times(0.9)[:-1], False),
        (times(1.0), [0.9] * 9 + [math.nan], False),
    ],
)
def test_g7(champion, candidate, passed):
    verdict = g7(champion, candidate, roofline_seconds=0.01, steps_per_block=4)
    assert verdict.passed is passed
    assert verdict == g7(champion, candidate, roofline_seconds=0.01, steps_per_block=4)  # no randomness of its own


def test_g7_without_a_champion_refuses_the_impossible_alone():
    assert g7(times(1.0), times(2.0), roofline_seconds=0.01, steps_per_block=4, beat=False).passed
    assert not g7(times(1.0), times(0.01), roofline_seconds=0.01, steps_per_block=4, beat=False).passed


def test_g8():
    assert g8(2**30, 1.0).passed
    assert not g8(2**30 + 1, 1.0).passed
    assert not g8(0, 1.0).passed
