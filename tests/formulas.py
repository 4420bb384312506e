"""The hopper schedule's kernels as formulas in torch, to be written at the end of an engine's file: so that the same
engine, in fp8 too, runs on a CPU a hundred times as fast as under Triton's interpreter, and without it.

    path.write_text(in_torch(write_engine(target, plan)))

Of Triton nothing is left there. Arithmetic is fp32 and rounds once, as the kernels' is.
"""

# ruff: noqa: F821
# pyright: reportUndefinedVariable=false, reportOptionalSubscript=false
# TOP, E4M3, Fp8 and SPANS are the engine's.

from __future__ import annotations

import ast
import inspect
import sys

import torch


def in_torch(source: str) -> str:
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        kernel = isinstance(node, ast.FunctionDef) and [
            d for d in node.decorator_list if ast.unparse(d) == "triton.jit"
        ]
        if kernel or (isinstance(node, ast.Import) and node.names[0].name.startswith("triton")):
            del lines[(kernel[0].lineno if kernel else node.lineno) - 1 : node.end_lineno]
    functions = vars(sys.modules[__name__]).values()
    own = [f for f in functions if inspect.isfunction(f) and f.__module__ == __name__ and f is not in_torch]
    return "\n".join(lines) + "\n\n\n" + "\n\n".join(map(inspect.getsource, own))


def check_device(device, precision):
    pass


def note_(largest, *tensors):
    for x in tensors if largest is not None else ():
        bits = (x.float().contiguous().view(torch.int32) & 0x7FFFFFFF).max()
        largest[0] = torch.maximum(largest[0], bits)


def embedding_forward(tokens, table, scale):
    return (table[tokens].float() * scale).to(table.dtype)


def embedding_backward_(tokens, d_x, grad, scale):
    grad.index_add_(0, tokens, d_x.float() * scale)


def add_norm_forward(x, branch, weight, eps, branch_scale=1.0, out_scale=1.0, largest=None):
    total = x if branch is None else (x.float() + branch.float() * branch_scale).to(x.dtype)
    wide = total.float()
    rstd = 1.0 / (wide.square().mean(-1) + eps).sqrt()
    y = (wide * rstd[:, None] * weight.float() * out_scale).to(x.dtype)
    note_(largest, y)
    return total, y, rstd


def add_norm_backward(saved, d_y, d_residual, partial, out_scale=1.0, largest=None):
    total, rstd, weight = saved
    normed, d_y = total.float() * rstd[:, None], d_y.float() * out_scale
    partial.zero_()
    partial[0] = (d_y * normed).sum(0)
    d_normed = d_y * weight.float()
    d_x = rstd[:, None] * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    d_x = (d_x if d_residual is None else d_x + d_residual.float()).to(total.dtype)
    note_(largest, d_x)
    return d_x


def norm_weight_grad_(partial, grad):
    grad += partial.sum(1)


def turned_(x, cos, sin, first, sign):
    """x [T, heads, K]."""
    position = torch.arange(x.shape[0]) % cos.shape[0]
    position = position if first is None else position - first
    cos, sin = cos[position][:, None], sign * sin[position][:, None]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rope_forward_(qkv, cos, sin, heads, groups, head_dim, first=None):
    x = qkv.view(len(qkv), -1, head_dim)[:, : heads + groups]
    x.copy_(turned_(x, cos, sin, first, 1.0))


def rope_backward(dq, dk, dv, cos, sin, groups, head_dim, first=None):
    dq, dk, dv = (x.reshape(len(x), -1, head_dim) for x in (dq, dk, dv))
    parts = (turned_(dq, cos, sin, first, -1.0), turned_(dk, cos, sin, first, -1.0), dv)
    return torch.cat(parts, dim=1).flatten(1)


def swiglu_forward(gate_up, alternating=False, largest=None):
    gate, up = gate_up.float().chunk(2, dim=1)
    act = (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)
    note_(largest, act)
    return act


def swiglu_backward_(gate_up, d_act, alternating=False, largest=None):
    (gate, up), d_act = gate_up.float().chunk(2, dim=1), d_act.float()
    sigmoid = torch.sigmoid(gate)
    d_gate = d_act * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    gate_up.copy_(torch.cat((d_gate, d_act * gate * sigmoid), dim=1))
    note_(largest, gate_up)
    return gate_up


def cross_entropy_(logits, labels, mask, denominator, gradient):
    wide, weight = logits.float(), mask / denominator
    log_sum, rows = wide.logsumexp(-1), torch.arange(len(labels))
    losses = weight * (log_sum - wide[rows, labels])
    if gradient:
        d = wide.softmax(-1)
        d[rows, labels] -= 1.0
        logits.copy_(d * weight[:, None])
    return losses


def grad_norm(grad):
    return grad.double().square().sum().sqrt().float()


def adamw_(flat, decayed, step, lr, norm, clip, betas, eps, weight_decay):
    grad, master, m, v, weight = flat
    applied = torch.isfinite(norm)
    step += applied
    if applied:
        t, grad = step.double(), grad * (clip / (norm.double() + 1e-6)).clamp(max=1.0).float()
        m += (grad - m) * (1.0 - betas[0])
        v.mul_(betas[1]).add_(grad * grad * (1.0 - betas[1]))
        master[:decayed] *= (1.0 - lr * weight_decay).float()
        rate, root = (lr / (1.0 - betas[0] ** t)).float(), (1.0 - betas[1] ** t).sqrt().float()
        master -= rate * (m / (v.sqrt() / root + eps))
        weight.copy_(master)
    return applied


def find_largest_(x, largest):
    largest.copy_(torch.maximum(largest, (x.float().abs().amax((-2, -1)).view(torch.int32)[..., None])))
    return largest


def powers(most, top):
    """Of two, by which numbers are scaled whose largest magnitude has these bits; the units that undo it."""
    power = (top - ((most >> 23) - 127) - ((most & 0x7FFFFF) > 0x600000).int()).clamp(max=126).float()
    return torch.exp2(power), torch.where(most >= 0x7F800000, torch.nan, torch.exp2(-power))


def nearest(x, dtype):
    return x.to(dtype)


def quantise_(x, largest, out):
    scale, unit = powers(largest.amax(-1), TOP[out.turned.dtype])
    number = nearest(x.float() * scale[..., None, None], out.turned.dtype)
    out.rows.copy_(number.view(out.rows.shape))
    out.turned.copy_(number.view(out.rows.shape).mT)
    out.unit.copy_(unit)
    return out


def by_blocks(x, high):
    """Numbers of x [P, R, C], the units of blocks of so many rows and 128 columns, [P, R / high, C / 128]."""
    parts, rows, cols = x.shape
    whole = torch.nn.functional.pad(x.float(), (0, -cols % 128, 0, -rows % high))
    blocks = whole.view(parts, -1, high, whole.shape[2] // 128, 128)
    scale, unit = powers(blocks.abs().amax((2, 4), keepdim=True).view(torch.int32), TOP[E4M3])
    number = nearest(blocks * scale, E4M3).view(whole.shape)[:, :rows, :cols]
    return number, unit[:, :, 0, :, 0]


def quantise_spans(x):
    (rows, unit), (turned, turned_unit) = by_blocks(x[None], 1), by_blocks(x.t()[None], 1)
    return Fp8(rows[0], turned[0], unit[0].t(), turned_unit[0].t(), SPANS)


def quantise_squares_(x, out):
    for numbers, units, y in ((out.rows, out.unit, x), (out.turned, out.turned_unit, x.mT)):
        number, unit = by_blocks(y, 128)
        numbers.copy_(number)
        units[..., : unit.shape[2]] = unit
    return out
