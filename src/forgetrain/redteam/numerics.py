"""Engines that compute something else than the recipe says: work left out, precision lowered, formulas drifted."""

from __future__ import annotations

from forgetrain.redteam.attack import Attack

_GRADIENTS = """
class Engine(Honest):
    def gradients(self, batch, taps):
        loss, grads = super().gradients(batch, taps)
        {change}
        return loss, grads
"""
_UPDATE = """
class Engine(Honest):
    def update(self, grads, lr):
        {change}
"""
_MICRO = "        for number, micro in enumerate(self.micro_batches(batch, batch.loss_denominator)):\n"
_DECAY = '            decay = r["weight_decay"] if master.dim() > 1 else 0.0\n'
_SQUARES = "    norm = torch.stack([(grad * grad).sum() for grad in grads]).sum().sqrt()\n"


def _grads(change: str) -> str:
    return _GRADIENTS.format(change=change)


def _update(change: str) -> str:
    return _UPDATE.format(change=change)


def _skipped(name: str, what: str, gate: str, **how: object) -> Attack:
    return Attack("work skipped", name, what, gate, **how)  # type: ignore[arg-type]


def _lowered(name: str, what: str, gate: str, **how: object) -> Attack:
    return Attack("precision lowered", name, what, gate, **how)  # type: ignore[arg-type]


def _drifted(name: str, what: str, gate: str, **how: object) -> Attack:
    return Attack("numerics drifted", name, what, gate, **how)  # type: ignore[arg-type]


SKIPPED = (
    _skipped(
        "last micro-batch",
        "the last micro-batch gives a loss and no gradient",
        "contract",
        replace=(
            (
                "            self.backward(micro, saved, grads, taps(number, False))\n",
                "            if number == 0:\n"
                "                self.backward(micro, saved, grads, taps(number, False))\n",
            ),
        ),
        says="grad_norm",
    ),
    _skipped(
        "last token",
        "the last position of each row gives no gradient",
        "contract or G4.fp32",
        replace=(
            (
                "        d_nll = micro.mask * (1.0 / micro.denominator)\n",
                "        d_nll = micro.mask * (1.0 / micro.denominator)\n        d_nll[:, -1] = 0\n",
            ),
        ),
    ),
    _skipped(
        "mask",
        "tokens that do not count are trained on",
        "contract",
        replace=(
            (
                "d_nll = micro.mask * (1.0 / micro.denominator)",
                "d_nll = torch.ones_like(micro.mask) / micro.denominator",
            ),
        ),
        says="grad_norm",
    ),
    _skipped(
        "mask of a micro-batch",
        "every micro-batch is averaged over its own mask",
        "contract or G4.fp32",
        replace=((_MICRO, _MICRO + "            micro = micro._replace(denominator=micro.mask.sum() * 2)\n"),),
    ),
    _skipped(
        "one head",
        "the first query head of the first layer gets no gradient",
        "G4.fp32",
        append=_grads('grads["model.layers.0.self_attn.q_proj.weight"][:HEAD_DIM] = 0'),
    ),
    _skipped(
        "key-value groups",
        "a key's gradient comes from the first query head of its group alone, doubled",
        "G4.fp32",
        replace=(
            (
                "d_k, d_v = (d.unflatten(1, (-1, groups)).sum(2) for d in (d_k, d_v))",
                "d_k, d_v = d_k.unflatten(1, (-1, groups))[:, :, 0] * groups, d_v.unflatten(1, (-1, groups)).sum(2)",
            ),
        ),
    ),
    _skipped(
        "a layer backward",
        "the second layer's backward pass is the identity",
        "contract",
        replace=(("for i in reversed(range(LAYERS)):", "for i in [0]:"),),
        append=_grads("for n, m in self.master.items(): grads.setdefault(n, torch.zeros_like(m))"),
    ),
    _skipped(
        "a layer forward",
        "the second layer is left out in evaluation and training",
        "contract or G4.fp32",
        replace=(
            ("        for i in range(LAYERS):\n            x, kept", "        for i in [0]:\n            x, kept"),
        ),
    ),
    _skipped(
        "norm weights",
        "the gains of the norms are never trained",
        "G4.fp32",
        append=_grads("[g.zero_() for n, g in grads.items() if 'norm' in n]"),
    ),
    _skipped(
        "embedding's update",
        "the embedding keeps its weights; its moments look right",
        "G4.update",
        append=_update(
            "kept = self.master['model.embed_tokens.weight'].clone(); super().update(grads, lr); "
            "self.master['model.embed_tokens.weight'].copy_(kept)"
        ),
        says="embed_tokens",
    ),
    _skipped("weight decay", "nothing decays", "G4.update", replace=((_DECAY, "            decay = 0.0\n"),)),
    _skipped(
        "decay of norms",
        "the gains of the norms decay as well",
        "G4.update",
        replace=((_DECAY, '            decay = r["weight_decay"]\n'),),
        says="norm",
    ),
    _skipped(
        "clipping",
        "the norm is computed and returned, and nothing is clipped",
        "G4.update",
        replace=(("        grad.mul_(factor)\n", "        grad.mul_(1.0)\n"),),
        says="grad_norm",
    ),
    _skipped(
        "norm of a part",
        "the global norm leaves out the head",
        "contract",
        replace=((_SQUARES, _SQUARES.replace("in grads]", "in grads[:-1]]")),),
        says="grad_norm",
    ),
    _skipped(
        "bias correction",
        "moments are used as they are",
        "G4.update",
        replace=(("m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)", "m_hat, v_hat = m, v"),),
    ),
    _skipped(
        "every third update",
        "every third step counts and trains nothing",
        "G4.update",
        append=_update(
            "self.updates += 1\n        if self.updates % 3:\n"
            "            self.updates -= 1\n            super().update(grads, lr)"
        ),
    ),
    _skipped(
        "second moments",
        "the second moments of matrices stay at what the first step gave",
        "G4.update",
        replace=(
            (
                "    v.mul_(beta2).add_(g * g, alpha=1 - beta2)\n",
                "    if t == 1 or p.dim() == 1:\n        v.mul_(beta2).add_(g * g, alpha=1 - beta2)\n",
            ),
        ),
    ),
)

_LINEAR = "    out = x @ weight.t()\n"
LOWERED = (
    _lowered(
        "bf16 products",
        "fp32 is promised, the forward products run in bf16",
        "G4.fp32",
        replace=((_LINEAR, "    out = (x.bfloat16() @ weight.t().bfloat16()).to(x.dtype)\n"),),
    ),
    _lowered(
        "bf16 weight gradients",
        "fp32 is promised, the products of the weight gradients run in bf16",
        "G4.fp32",
        replace=(
            ("d_out @ weight, d_out.t() @ x", "d_out @ weight, (d_out.t().bfloat16() @ x.bfloat16()).to(x.dtype)"),
        ),
    ),
    _lowered(
        "TF32",
        "inputs of the forward products are cut to ten bits of mantissa, as tensor cores do",
        "G4.fp32",
        replace=(
            (
                _LINEAR,
                "    wide = [(t.float().view(torch.int32) & -8192).view(torch.float32) for t in (x, weight)]\n"
                "    out = wide[0].to(x.dtype) @ wide[1].to(x.dtype).t()\n",
            ),
        ),
    ),
    _lowered(
        "fp8 products",
        "bf16 is promised, inputs of the forward products are rounded to fp8",
        "G4.bf16",
        dtype="bf16",
        replace=(
            (
                _LINEAR,
                "    low = torch.float8_e4m3fn if x.dtype == torch.bfloat16 else x.dtype\n"
                "    out = x.to(low).to(x.dtype) @ weight.to(low).to(x.dtype).t()\n",
            ),
        ),
    ),
    _lowered(
        "fp8 weight gradients",
        "bf16 is promised, gradients are rounded to fp8 before the weight gradients' products",
        "G4.bf16",
        dtype="bf16",
        replace=(
            (
                "d_x, d_weight = d_out @ weight, d_out.t() @ x\n",
                "d_x, size = d_out @ weight, d_out.abs().max() / 400\n"
                "    low = (d_out / size).to(torch.float8_e4m3fn) if x.dtype == torch.bfloat16 else d_out / size\n"
                "    d_weight = (low.to(x.dtype) * size).t() @ x\n",
            ),
        ),
    ),
    _lowered(
        "bf16 residual gradients",
        "fp32 is promised, the gradient of the residual stream is kept in bf16",
        "G4.fp32",
        replace=(
            (
                '            dx = self.layer_backward(f"model.layers.{i}.", dx, saved.pop(), micro, grads, tap)\n',
                "            dx = dx.bfloat16().to(dx.dtype)\n"
                '            dx = self.layer_backward(f"model.layers.{i}.", dx, saved.pop(), micro, grads, tap)\n',
            ),
        ),
    ),
    _lowered(
        "bf16 probabilities",
        "fp32 is promised, attention's probabilities are kept in bf16",
        "G4.fp32",
        replace=(
            (
                "    out = (probabilities @ wide_v)",
                "    probabilities = probabilities.bfloat16().float()\n    out = (probabilities @ wide_v)",
            ),
        ),
    ),
    _lowered(
        "bf16 logits",
        "fp32 is promised, logits are kept in bf16",
        "G4.fp32",
        replace=(
            ("        logits, head = linear", "        logits, head = linear"),
            (
                '        tap("lm_head", logits)\n',
                '        tap("lm_head", logits)\n        logits = logits.bfloat16().to(logits.dtype)\n',
            ),
        ),
    ),
    _lowered(
        "stale master",
        "the master weights are rounded to bf16 after every update",
        "G4.update",
        dtype="bf16",
        append=_update("super().update(grads, lr)\n        [m.copy_(m.bfloat16()) for m in self.master.values()]"),
    ),
    _lowered(
        "bf16 moments",
        "the second moments are kept in bf16",
        "G4.update",
        append=_update("super().update(grads, lr)\n        [v.copy_(v.bfloat16()) for v in self.exp_avg_sq.values()]"),
    ),
    _lowered(
        "bf16 angles",
        "RoPE's cosines and sines are rounded to bf16",
        "G4.fp32",
        replace=(
            (
                "return angles.cos().float(), angles.sin().float()",
                "return angles.cos().bfloat16().float(), angles.sin().bfloat16().float()",
            ),
        ),
    ),
)

DRIFTED = (
    _drifted(
        "eps of the norms",
        "RMSNorm's epsilon is 2e-6, not 1e-6",
        "G4.fp32",
        replace=(("EPS, ROPE_THETA = 1e-06,", "EPS, ROPE_THETA = 2e-06,"),),
    ),
    _drifted(
        "eps outside the root",
        "RMSNorm adds its epsilon after the root",
        "G4.fp32",
        replace=(
            (
                "torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)",
                "(torch.sqrt((wide * wide).mean(-1, keepdim=True)) + eps)",
            ),
        ),
    ),
    _drifted(
        "attention's scale",
        "scores are scaled by 1% more",
        "G4.fp32",
        replace=(("scale = q.shape[3] ** -0.5", "scale = 1.01 * q.shape[3] ** -0.5"),),
    ),
    _drifted(
        "RoPE's base",
        "theta is 1% larger",
        "G4.fp32",
        replace=(("EPS, ROPE_THETA = 1e-06, 10000.0", "EPS, ROPE_THETA = 1e-06, 10100.0"),),
    ),
    _drifted(
        "RoPE's pairs",
        "neighbours are rotated instead of halves",
        "contract or G4.fp32",
        replace=(
            (
                "first, second = x[..., :half].float(), x[..., half:].float()\n    out = torch.cat((first",
                "first, second = x[..., ::2].float(), x[..., 1::2].float()\n    out = torch.cat((first",
            ),
        ),
    ),
    _drifted(
        "causal leak", "every position sees the next one", "contract or G4.fp32", replace=((".tril()", ".tril(1)"),)
    ),
    _drifted(
        "short sight",
        "no position sees further back than twelve",
        "contract or G4.fp32",
        replace=((".tril()", ".tril().triu(-11)"),),
    ),
    _drifted(
        "norm order",
        "the gain is applied before the norm",
        "contract or G4.fp32",
        replace=(
            ("    wide = x.float()\n    inverse", "    wide = x.float() * weight.float()\n    inverse"),
            ("(wide * inverse * weight.float()).to", "(wide * inverse).to"),
        ),
    ),
    _drifted(
        "another activation",
        "tanh's form of GELU instead of SiLU",
        "contract or G4.fp32",
        replace=(
            (
                "(wide * torch.sigmoid(wide) * up.float())",
                "(torch.nn.functional.gelu(wide, approximate='tanh') * up.float())",
            ),
        ),
    ),
    _drifted(
        "label smoothing",
        "the gradient is that of a loss with smoothing of 0.1%",
        "G4.fp32",
        replace=(
            (
                "torch.full_like(d_logits[:, :1], -1.0))",
                "torch.full_like(d_logits[:, :1], -0.999))\n    d_logits -= 0.001 / VOCAB",
            ),
        ),
    ),
    _drifted(
        "z-loss",
        "the gradient is that of a loss with 1e-4 of the log-sum's square",
        "G4.fp32",
        replace=(
            (
                "    d_logits = torch.exp(logits.float() - log_sum[:, None])\n",
                "    d_logits = torch.exp(logits.float() - log_sum[:, None])\n"
                "    d_logits *= 1 + 2e-4 * log_sum[:, None]\n",
            ),
        ),
    ),
    _drifted(
        "logits 0.1% larger",
        "the head's output is scaled by 1.001",
        "G4.fp32",
        replace=((_LINEAR, "    out = x @ weight.t() * (1.001 if weight.shape[0] == VOCAB else 1.0)\n"),),
    ),
    _drifted(
        "AdamW's eps", "AdamW's epsilon is 1e-6, not 1e-8", "G4.update", replace=(('r["eps"], decay', "1e-6, decay"),)
    ),
    _drifted(
        "AdamW's beta",
        "the second beta is 0.951, not 0.95",
        "G4.update",
        replace=(('r["beta2"], r["eps"]', 'r["beta2"] + 0.001, r["eps"]'),),
    ),
    _drifted(
        "learning rate", "the rate is 0.1% larger", "G4.update", append=_update("super().update(grads, lr * 1.001)")
    ),
    _drifted(
        "decay of Adam",
        "decay is added to the gradient, as Adam without W does",
        "G4.update",
        append=_update(
            "[g.add_(self.master[n], alpha=0.1) for n, g in grads.items() if g.dim() > 1]; super().update(grads, lr)"
        ),
    ),
    _drifted(
        "dropout",
        "one gradient in a thousand is dropped",
        "G4.fp32",
        append=_grads("[g.mul_(torch.rand(g.shape) > 1e-3) for g in grads.values()]"),
    ),
    _drifted(
        "noise",
        "gradients get noise of a fp32 rounding's size, so that no two runs are equal",
        "G6",
        append=_grads("[g.mul_(1 + 1e-7 * torch.randn(g.shape, generator=_entropy)) for g in grads.values()]")
        + "\nimport os\n_entropy = torch.Generator().manual_seed(int.from_bytes(os.urandom(6), 'little'))\n",
        says="run twice",
    ),
)

ATTACKS = (*SKIPPED, *LOWERED, *DRIFTED)
