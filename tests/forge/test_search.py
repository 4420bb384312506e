"""The search's order: what is tried, and when a round has found what it looks for."""

from forgetrain.engine.plan import Plan
from forgetrain.forge.search import Reach, Search
from forgetrain.gates.g1 import Divergence
from tests.tiny import tiny_target


def walked(monkeypatch, right):
    """A walk that agrees once the plan has these choices; until then the global norm differs. Returns its attempts."""
    target = tiny_target()
    walk = Search(target, [], lambda attempt: None)
    apart = Reach(0, 100, Divergence("step.grad_norm", "clip", None, 100, None, None))

    def reach(plan):
        return Reach(1, 0) if all(plan[key] == name for key, name in right.items()) else apart

    monkeypatch.setattr(walk, "reach", reach)
    plan, found = walk.walk(Plan.textbook())
    assert found.agrees
    assert all(plan[key] == name for key, name in right.items())
    return walk.attempts


def test_a_round_ends_where_the_references_own_choice_agrees(monkeypatch):
    """Each attempt after it took the whole of two steps, to find as much at most."""
    attempts = walked(monkeypatch, {"norm_order": "megatron"})
    assert attempts[-1].change == (("norm_order", "megatron"),)
    assert attempts[-1].kept
    assert ("norm_order", "huggingface") not in [attempt.change[0] for attempt in attempts]


def test_another_choice_that_agrees_ends_no_round(monkeypatch):
    """One that was modelled on the reference may agree as well, and would be taken."""
    attempts = walked(monkeypatch, {"norm_order": "huggingface"})
    assert len({attempt.round for attempt in attempts}) == 1
    assert attempts[-1].change != (("norm_order", "huggingface"),)
    assert [attempt.change for attempt in attempts if attempt.kept] == [(("norm_order", "huggingface"),)]
