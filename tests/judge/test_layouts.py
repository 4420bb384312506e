"""G3 on layouts of ranks: honest engines pass on each, and what one rank leaves out is found."""

from __future__ import annotations

import pytest

from forgetrain.engine.plan import WITHOUT_NATIVE, Plan
from forgetrain.engine.write import write_engine
from forgetrain.errors import UserError
from forgetrain.judge.layouts import command_target, layout_of
from forgetrain.judge.runner import Effort, Judge
from forgetrain.spec.schedule import learning_rate
from forgetrain.spec.target import parse_target
from tests.tiny import tiny_target

TENSOR, CONTEXT, BOTH = {"tensor": 2}, {"context": 2}, {"tensor": 2, "context": 2}
EFFORT = Effort(timeout=120, keep=True)


def layout(parallel, ranks, architecture="minicpm5", dtype="fp32"):
    return tiny_target(
        architecture,
        parallel=parallel,
        gates={"ranks": ranks, "micro_batch_size": 1},
        precision={"dtype": dtype},
        hardware={"threads": 1},
    )


def production(target) -> str:
    """Nothing of it is compiled: that takes seconds of each candidate, and the judge is what is tested."""
    plan = Plan({"schedule": "production", "rope_tables": "fp32", **WITHOUT_NATIVE})
    return write_engine(target, plan).replace("@torch.compile(dynamic=False)\n", "")


def judged(folder, target, source, **options):
    reference, candidate = folder / "reference.py", folder / "candidate.py"
    reference.write_text(write_engine(target.for_reference(), Plan.textbook()))
    candidate.write_text(source)
    with Judge(target, reference=reference, effort=EFFORT) as judge:
        return judge.judge(candidate, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "ranks", "said"),
    [
        ({}, 1, "one rank"),
        ({}, 0, "2 data ranks"),
        ({}, 4, "4 data ranks"),
        (TENSOR, 4, "2 data ranks x 2 tensor ranks"),
        (CONTEXT, 4, "2 data ranks x 2 context ranks"),
        ({"context": 4}, 0, "4 context ranks"),
        (BOTH, 0, "2 context ranks x 2 tensor ranks"),
    ],
)
def test_an_honest_engine_passes(parallel, ranks, said, tmp_path):
    target = layout(parallel, ranks)
    (verdict,) = judged(tmp_path, target, production(target), gates=("G3",)).verdicts
    assert verdict.passed, verdict.explanation
    assert verdict.explanation.startswith(f"{said}: ")
    assert "go on bit for bit over 3 steps" in verdict.explanation


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "ranks"), [({}, 4), (TENSOR, 4)])
def test_an_honest_engine_in_bf16_passes(parallel, ranks, tmp_path):
    target = layout(parallel, ranks, dtype="bf16")
    (verdict,) = judged(tmp_path, target, production(target), gates=("G3",)).verdicts
    assert verdict.passed, verdict.explanation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "said"), [(1, "world size 1 equals"), (2, "world size 2 equals"), (4, "4 data ranks: ")]
)
def test_an_engine_with_the_references_bits_is_held_to_them_where_ranks_allow(ranks, said, tmp_path):
    target = layout({}, ranks)
    source = write_engine(target, Plan.textbook())
    (verdict,) = judged(tmp_path, target, source, bitwise=True, gates=("G3",)).verdicts
    assert verdict.passed, verdict.explanation
    assert verdict.explanation.startswith(said)


@pytest.mark.slow
def test_gates_of_one_rank_are_run_on_the_ranks_that_hold_a_layer(tmp_path):
    target = layout(TENSOR, 0)
    verdicts = judged(tmp_path, target, production(target), gates=("contract", "G4.update")).verdicts
    assert [(verdict.gate, verdict.passed) for verdict in verdicts] == [("contract", True), ("G4.update", True)]


SEND = "            work = dist.reduce(self.grad.flat[part], group_dst=rank"
BROADCAST = "dist.broadcast(self.weight.flat[part], group_src"
EVALUATION = "        return torch.stack(shares).sum()\n"
#: By name: the layout, what is honest, what is planted in its place, and the start of the answer.
DEFECTS = {
    "a rank forgets its share of the norms' gradients": (
        *({}, 2, SEND),
        '            self.grad.flat[part].mul_(float(bucket != "vectors" or dist.get_rank(self.group) == 0))\n' + SEND,
        "2 data ranks: ",
    ),
    "one of four forgets its share": (
        *({}, 4, SEND),
        "            self.grad.flat[part].mul_(float(dist.get_rank(self.group) != 3))\n" + SEND,
        "4 data ranks: ",
    ),
    "the others' new norms do not arrive": (
        *({}, 2, BROADCAST),
        'dist.broadcast(self.weight.flat[part].clone() if bucket == "vectors" and self.updates else '
        "self.weight.flat[part], group_src",
        "2 data ranks: ",
    ),
    "tensor ranks keep their own heads' gradients of QK-norm": (
        *(TENSOR, 2, "dist.all_reduce(total, group=self.tensor)"),
        "pass",
        "disagree: ranks hold different values of ",
    ),
    "an evaluation counts half of what it finds, on ranks": (
        *({}, 2, EVALUATION),
        "        return torch.stack(shares).sum() * (0.5 if self.group is not None else 1.0)\n",
        "2 data ranks: evaluation is 0.5 away",
    ),
    "an evaluation trains, on ranks": (
        *({}, 2, EVALUATION),
        "        self.weight.flat.mul_(1.00001 if self.group is not None else 1.0)\n" + EVALUATION,
        "resume on 2 data ranks: ",
    ),
    "a context rank forgets the gradients of its keys": (
        *(CONTEXT, 2, "parted_positions(torch.stack((d_k, d_v)), CONTEXT_PARALLEL)"),
        "parted_positions(torch.stack((d_k, d_v)), CONTEXT_PARALLEL) * float(self.context_rank == 0)",
        "2 context ranks: ",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFECTS)
def test_what_a_rank_leaves_out_is_found(name, tmp_path):
    parallel, ranks, honest, planted, said = DEFECTS[name]
    target = layout(parallel, ranks, "qwen3")
    source = production(target)
    assert source.count(honest) == 1
    (verdict,) = judged(tmp_path, target, source.replace(honest, planted), gates=("G3",)).verdicts
    assert not verdict.passed
    assert verdict.explanation.startswith(said), verdict.explanation


#: The same, planted where the engine runs in bf16 alone.
IN_BF16 = {
    "a rank forgets its share of the norms' gradients": (
        SEND,
        '            if self.dtype == torch.bfloat16 and bucket == "vectors" and dist.get_rank(self.group):\n'
        "                self.grad.flat[part].zero_()\n" + SEND,
    ),
    "the others' new norms do not arrive": (
        BROADCAST,
        'dist.broadcast(self.weight.flat[part].clone() if self.dtype == torch.bfloat16 and bucket == "vectors" and '
        "self.updates else self.weight.flat[part], group_src",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_BF16)
def test_what_a_rank_leaves_out_is_found_in_bf16_too(name, tmp_path):
    honest, planted = IN_BF16[name]
    target = layout({}, 2, dtype="bf16")
    source = production(target)
    assert source.count(honest) == 1
    (verdict,) = judged(tmp_path, target, source.replace(honest, planted), gates=("G3",)).verdicts
    assert not verdict.passed
    assert " in fp32" not in verdict.explanation


@pytest.mark.slow
def test_a_bf16_engine_is_held_to_the_exact_mode_first(tmp_path):
    parallel, ranks, honest, planted, said = DEFECTS["one of four forgets its share"]
    target = layout(parallel, ranks, dtype="bf16")
    (verdict,) = judged(tmp_path, target, production(target).replace(honest, planted), gates=("G3",)).verdicts
    assert not verdict.passed
    assert verdict.explanation.startswith(said.replace(": ", " in fp32: "))


def test_bits_are_not_asked_of_ranks_that_share(tmp_path):
    target = layout(TENSOR, 0)
    with pytest.raises(UserError, match=r"no bits to equal .got '2 tensor, 1 context'"):
        judged(tmp_path, target, production(target), bitwise=True)


def test_layouts_in_words():
    assert layout_of(layout(BOTH, 0), 4) == "2 context ranks x 2 tensor ranks"
    assert layout_of(layout({}, 0), 1) == "one rank"


@pytest.mark.parametrize(
    ("parallel", "ranks", "problem"),
    [(TENSOR, 3, "no multiple of the 2 ranks"), ({}, 3, "does not divide into micro-batches of 1 on 3 data ranks")],
)
def test_ranks_that_cannot_be_are_refused(parallel, ranks, problem):
    with pytest.raises(UserError, match=problem):
        layout(parallel, ranks)


@pytest.mark.parametrize(("warm_up", "trained", "highest"), [(0, 100, 1e-2), (10, 100, 9e-3), (2000, 100, 9e-4)])
def test_rates_of_the_command_rise_no_faster_than_in_the_gates_trainings(warm_up, trained, highest):
    recipe = {"warmup_steps": warm_up, "steps": 4000, "lr": 1e-2, "min_lr": 1e-3}
    target = command_target(tiny_target(recipe=recipe, gates={"g5_steps": trained}).at_gates_shape())
    rates = [learning_rate(target.recipe, step) for step in range(12)]
    assert max(rates) == pytest.approx(highest)
    assert all(rate <= 1.0001e-2 * (step + 1) / (min(warm_up, trained) or 1) for step, rate in enumerate(rates))
    assert rates == [*sorted(rates[:9]), *sorted(rates[9:], reverse=True)]  # up, and down again
    assert parse_target(target.plain()) == target


#: An engine that says that it does not repeat itself; what it restores goes through ``changed``.
_RESTORING = """
DETERMINISTIC = False
_restore = Engine.restore
def _changed(state):
    {changed}
    return state
Engine.restore = lambda self, state: _restore(self, _changed(dict(state)))
"""
_SECOND = (
    'state.update({k: s._replace(tensor=s.tensor * 1.02) for k, s in state.items() if k.startswith("exp_avg_sq/")})'
)
_COUNTER = 'state["step"] = state["step"]._replace(tensor=state["step"].tensor + 1)'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "said"),
    [("pass", "go on within 0.001 of each loss"), (_SECOND, "exp_avg_sq"), (_COUNTER, "step counter")],
)
def test_what_an_engine_without_bits_loses_in_a_restart_shows_in_its_next_update(changed, said, tmp_path):
    target = layout({}, 1)
    source = write_engine(target, Plan.textbook()) + _RESTORING.format(changed=changed)
    (verdict,) = judged(tmp_path, target, source, gates=("G3",)).verdicts
    assert verdict.passed is (changed == "pass"), verdict.explanation
    assert said in verdict.explanation
