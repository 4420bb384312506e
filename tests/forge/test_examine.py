"""Planted defects: each is rejected, with the first tap at which it shows or the gate that sees it."""

from __future__ import annotations

import pytest

from forgetrain.forge.examine import examine

FIRST = "model.layers.0."
CLIP = 'clip_megatron_forward([grads[name] for name in norm_order()], self.recipe["clip"])'
UPDATE = "            self.update(grads, lr)\n"

#: name → dtype, what is replaced, the gate that fails, and the first tap, or a part of the explanation for G2 and G3.
DEFECTS = {
    "eps": ("fp32", [("EPS, ROPE_THETA = 1e-06", "EPS, ROPE_THETA = 1e-05")], "G1", FIRST + "input_layernorm#fwd@0"),
    "rotation pairing": (
        "fp32",
        [
            ("first, second = x.chunk(2, dim=-1)", "first, second = x[..., ::2], x[..., 1::2]"),
            ("torch.cat((-second, first), dim=-1)", "torch.stack((-second, first), dim=-1).flatten(-2)"),
        ],
        "G1",
        FIRST + "self_attn.q_rope#fwd@0",
    ),
    "scale of attention": (
        "fp32",
        [("alpha=d**-0.5", "alpha=(d + 1) ** -0.5")],
        "G1",
        FIRST + "self_attn.attention#fwd@0",
    ),
    "causal leak": ("fp32", [(".tril()", ".tril(1)")], "G1", FIRST + "self_attn.attention#fwd@0"),
    "positions off by one": (
        "fp32",
        [("position = torch.arange(s,", "position = torch.arange(1, s + 1,")],
        "G1",
        FIRST + "self_attn.q_rope#fwd@0",
    ),
    "a dropped token in the loss": (
        "fp32",
        [("loss = (nll * micro.mask).sum()", "loss = (nll * micro.mask)[:, 1:].sum()")],
        "G1",
        "loss#fwd@0",
    ),
    "a gradient scaled for one head": (
        "fp32",
        [
            (
                "dq, dk, dv = attention_megatron_backward(attention, d_context)\n",
                "dq, dk, dv = attention_megatron_backward(attention, d_context)\n        dq[:, :, 1] *= 1.0009765625\n",
            )
        ],
        "G1",
        "model.layers.1.self_attn.q_rope#grad@0",
    ),
    "a path past the norm without gradient": (
        "fp32",
        [("rmsnorm_torch_backward(norm2, d_out, dx)", "rmsnorm_torch_backward(norm2, d_out)")],
        "G1",
        "model.layers.1.attention_residual#grad@0",
    ),
    "embedding gradient missing": (
        "fp32",
        [
            (
                "d_embedding = embedding_torch_backward(saved.pop(), dx)",
                "d_embedding = 0 * embedding_torch_backward(saved.pop(), dx)",
            )
        ],
        "G1",
        "model.embed_tokens.weight#grad",
    ),
    "gradients clipped one by one": (
        "fp32",
        [
            (
                "norms = torch.stack([torch.norm(grad) for grad in grads])",
                "norms = torch.stack([torch.norm(grad) for grad in grads[:-1]])",
            )
        ],
        "G1",
        "lm_head.weight#clipped",
    ),
    "clipped after the update": (
        "fp32",
        [(f"norm = {CLIP}", "norm = torch.ones(())"), (UPDATE, f"{UPDATE}        norm = {CLIP}\n")],
        "G1",
        "exp_avg/model.embed_tokens.weight",
    ),
    "weight decay of norms": (
        "fp32",
        [("if master.dim() > 1 else 0.0", "if True else 0.0")],
        "G1",
        "master/" + FIRST + "input_layernorm.weight",
    ),
    "a stale moment": (
        "fp32",
        [("addcdiv_(m, denominator", "addcdiv_(m - (1 - beta1) * (g - m), denominator")],
        "G1",
        "master/model.embed_tokens.weight",
    ),
    "bias correction": (
        "fp32",
        [("1 - beta1**t, 1 - beta2**t", "1 - beta1 ** (t + 1), 1 - beta2**t")],
        "G1",
        "master/model.embed_tokens.weight",
    ),
    "master weights not rounded": (
        "bf16",
        [("tensor.to(self.device, self.dtype) for name", "tensor.to(self.device) for name")],
        "G1",
        "master/model.embed_tokens.weight",
    ),
    "gradients accumulated in bf16": (
        "bf16",
        [("dtype=torch.float32) if total is None", "dtype=torch.bfloat16) if total is None")],
        "G1",
        "lm_head.weight#grad",
    ),
    "right for two steps": (
        "fp32",
        [("self.updates += 1\n", "self.updates += 1\n        lr *= 1.01 if self.updates > 2 else 1\n")],
        "G2",
        "step 2",
    ),
    "the step's number lost in restore": (
        "fp32",
        [('int(state["step"].tensor)', "0")],
        "G3",
        "resume: step 0: weight_hash",
    ),
    "gradients not summed over ranks": (
        "fp32",
        [("                dist.all_reduce(grad, group=self.group)\n", "                pass\n")],
        "G3",
        "ranks return different values of grad_norm",
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if DEFECTS[name][2] == "G3" else ()) for name in DEFECTS]
)
def test_a_planted_defect_is_rejected_where_it_shows(name, collected, tmp_path):
    dtype, changes, gate, where = DEFECTS[name]
    given = collected(dtype)
    found = examine(given.engine(tmp_path, *changes), given.gates, given.truth, lambda: given.reference)
    last = found.verdicts[-1]
    assert (last.gate, last.passed) == (gate, False)
    assert all(verdict.passed for verdict in found.verdicts[:-1])
    if gate == "G1":
        assert last.first_divergence == where
    else:
        assert where in last.explanation


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_an_engine_that_equals_the_reference_passes(dtype, collected, tmp_path):
    given = collected(dtype)
    found = examine(given.engine(tmp_path), given.gates, given.truth, lambda: given.reference)
    assert [(verdict.gate, verdict.passed) for verdict in found.verdicts] == [("G1", True), ("G2", True), ("G3", True)]
    assert found.divergence is None
    assert found.broken is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([("loss = (nll * micro.mask).sum()", "loss = torch.nan * (nll * micro.mask).sum()")], "finite"),
        ([('tap("nll", nll)', 'tap("nll", nll[:1])')], "shape"),
        ([("def build(", "import no_such_module\n\n\ndef build(")], "no_such_module"),
        ([("def build(", "def built(")], "build"),
    ],
    ids=["NaN", "wrong shape", "does not import", "no factory"],
)
def test_what_is_no_engine_is_said_to_be_broken(changes, said, collected, tmp_path):
    given = collected("fp32")
    found = examine(given.engine(tmp_path, *changes), given.gates, given.truth, lambda: given.reference)
    assert not found.verdicts[-1].passed
    assert found.broken is not None
    assert said in found.broken
