from dataclasses import replace

import pytest

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import source_hash, write_engine
from forgetrain.forge.proposers.base import NoProposal, Proposal
from forgetrain.forge.proposers.catalogue import Catalogue
from tests.forge.proposers.briefs import brief
from tests.tiny import tiny_target


def test_each_plan_is_proposed_once_and_then_none():
    catalogue = Catalogue(tiny_target(), Plan.textbook())
    seen = []
    while isinstance(proposal := catalogue.propose(brief()), Proposal):
        assert proposal.plan is not None
        assert proposal.source == write_engine(tiny_target(), proposal.plan)
        seen.append(source_hash(proposal.source))
        catalogue.tell(proposal.source, 1.0 + len(seen) / 100)
    assert isinstance(proposal, NoProposal)
    assert proposal.exhausted
    assert len(seen) == len(set(seen)) == catalogue.size


def test_what_the_ledger_knows_is_not_proposed_again():
    first = Catalogue(tiny_target(), Plan.textbook()).propose(brief())
    assert isinstance(first, Proposal)
    resumed = Catalogue(tiny_target(), Plan.textbook())
    resumed.tell(first.source, 1.5)
    second = resumed.propose(brief())
    assert isinstance(second, Proposal)
    assert second.source != first.source


def test_the_order_is_repeatable():
    orders = []
    for _ in range(2):
        catalogue = Catalogue(tiny_target(), Plan.textbook(), seed=7)
        orders.append([catalogue.propose(brief()).source for _ in range(5)])
    assert orders[0] == orders[1]


@pytest.mark.parametrize(
    ("worst", "keys"),
    [
        ("attention", ["attention_kernel", "attention_block", "attention_block", "attention_block"]),
        ("cross_entropy", ["head_rows"] * 3),
        ("linear", ["products"]),
    ],
)
def test_the_choices_of_the_op_farthest_from_its_roofline_come_first(worst, keys):
    catalogue = Catalogue(tiny_target(), Plan.textbook().with_choice("attention_kernel", "blocked"))
    first = catalogue.propose(brief())
    assert isinstance(first, Proposal)
    catalogue.tell(first.source, 1.5)
    told = replace(brief(), champion=first.source, plan=first.plan, gaps=("rope", worst))
    following = [catalogue.propose(told) for _ in keys]
    changed = [{k for k, name in p.plan.items() if name != first.plan[k]} for p in following]
    assert changed == [{key} for key in keys]
    assert len({p.source for p in following}) == len(keys)
