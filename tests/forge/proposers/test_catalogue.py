import importlib.util
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


def test_what_others_wrote_is_none_of_its_plans():
    catalogue = Catalogue(on_a_gpu(model={"qk_norm": True}), Plan.textbook())  # few plans
    for number in range(catalogue.size):
        catalogue.tell(f"agent = {number}\n", None)
    seen = 0
    while isinstance(proposal := catalogue.propose(brief()), Proposal):
        seen += 1
        catalogue.tell(proposal.source, 1.0)
    assert isinstance(proposal, NoProposal)
    assert (seen, proposal.reason) == (catalogue.size, "every plan of the catalogue was proposed")


def test_a_resumed_search_builds_on_what_the_ledger_has_plans_of():
    first = Catalogue(tiny_target(), Plan.textbook())
    told = []
    for number in range(6):
        proposal = first.propose(brief())
        assert isinstance(proposal, Proposal)
        told.append((proposal.source, None if number == 3 else 1 + number / 10, proposal.plan))
        first.tell(*told[-1])
    resumed = Catalogue(tiny_target(), Plan.textbook())
    for _ in range(2):  # what it knows already teaches it nothing
        for known in told:
            resumed.tell(*known)
    done = [trial for trial in resumed._study.trials if trial.state.is_finished()]
    assert [trial.value for trial in done] == [1.0, 1.1, 1.2, None, 1.4, 1.5]
    assert [trial.params for trial in done] == [{key: plan[key] for key in done[0].params} for _, _, plan in told]
    following = resumed.propose(brief())
    assert isinstance(following, Proposal)
    assert following.source not in {source for source, _, _ in told}


def test_a_plan_of_another_schedule_teaches_it_nothing():
    catalogue = Catalogue(tiny_target(), Plan.textbook())
    catalogue.tell("aligned = 1\n", 1.0, Plan.textbook())
    assert not [trial for trial in catalogue._study.trials if trial.state.is_finished()]


def test_the_order_is_repeatable():
    orders = []
    for _ in range(2):
        catalogue = Catalogue(tiny_target(), Plan.textbook(), seed=7)
        orders.append([catalogue.propose(brief()).source for _ in range(5)])
    assert orders[0] == orders[1]


def test_a_seed_may_be_longer_than_those_of_optuna():
    assert isinstance(Catalogue(tiny_target(), Plan.textbook(), seed=2**63 - 1).propose(brief()), Proposal)


@pytest.mark.parametrize(
    ("worst", "keys"),
    [
        ("attention", ["attention_kernel", "attention_block", "attention_block", "attention_block"]),
        ("cross_entropy", ["head_rows"] * 3),
        ("linear", ["products"] * 2),
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


def on_a_gpu(**sections):
    return tiny_target(hardware={"name": "h200"}, precision={"dtype": "bf16"}, **sections)


@pytest.mark.parametrize(
    ("installed", "libraries"),
    [
        ((), ("cudnn", "triton")),
        (("flash_attn",), ("flash4", "triton")),
        (("flash_attn", "quack"), ("flash4", "quack")),
    ],
)
def test_a_hopper_gpu_gets_its_schedule_with_the_libraries_that_are_installed(installed, libraries, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    catalogue = Catalogue(on_a_gpu(), Plan.textbook())
    first = catalogue.propose(brief())
    assert isinstance(first, Proposal)
    assert first.plan is not None
    assert first.plan["schedule"] == "hopper"
    assert (first.plan["attention_library"], first.plan["swiglu_library"]) == libraries
    assert first.message.startswith(f"hopper schedule: attention_library {libraries[0]}, swiglu_library {libraries[1]}")
    catalogue.tell(first.source, 5.0)
    told = replace(brief(), champion=first.source, plan=first.plan, gaps=("linear", "attention"))
    following = [catalogue.propose(told) for _ in range(9)]
    changed = [{k: name for k, name in p.plan.items() if name != first.plan[k]} for p in following]
    rank = "rank_gate_up_input_grad" if "quack" in installed else "rank_gate_up_forward"
    assert changed[:7] == [{rank: str(number)} for number in range(1, 8)]


def test_a_model_without_hopper_kernels_gets_the_production_schedule_there():
    first = Catalogue(on_a_gpu(model={"qk_norm": True}), Plan.textbook()).propose(brief())
    assert isinstance(first, Proposal)
    assert first.plan is not None
    assert first.plan["schedule"] == "production"
    assert first.plan["attention_kernel"] == "blocked"
