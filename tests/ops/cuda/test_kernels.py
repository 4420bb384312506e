"""Each kernel against its formula in float64; on a CPU under Triton's interpreter, else on the GPU."""

import sys

import pytest
import torch

from tests.ops.oracle import DTYPES, TOLERANCE, randn, relative

pytest.importorskip("triton", reason="Triton is not installed: pip install forgetrain[gpu]")

from forgetrain.ops.cuda import (
    adamw,
    attention,
    cross_entropy,
    embedding,
    flash_attention,
    gated,
    linear,
    rmsnorm,
    rope,
    swiglu,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def near(actual, expected, dtype):
    assert actual.shape == expected.shape
    assert relative(actual.cpu(), expected.detach().cpu()) < TOLERANCE[dtype]


def inputs(*shapes, dtype):
    return [randn(*shape, seed=i).to(DEVICE, dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "programs"), [(7, 48, 3), (6, 33, 8), (5, 1030, 2)])
def test_add_norm(rows, width, programs, dtype):
    x, branch, weight, d_y, d_residual = inputs(*[(rows, width)] * 2, (width,), *[(rows, width)] * 2, dtype=dtype)
    eps, branch_scale, out_scale = 1e-3, 0.3, 0.25
    total, y, rstd = rmsnorm.add_norm_forward(x, branch, weight, eps, branch_scale, out_scale)
    near(total, x.double() + branch.double() * branch_scale, dtype)
    leaf, scale = total.double().requires_grad_(), weight.double().requires_grad_()
    expected = leaf / torch.sqrt(leaf.square().mean(-1, keepdim=True) + eps) * scale * out_scale
    near(y, expected, dtype)
    d_sum, d_weight = torch.autograd.grad(expected, (leaf, scale), d_y.double())
    partial = torch.full((1, programs, width), float("nan"), device=DEVICE)
    found = rmsnorm.add_norm_backward((total, rstd, weight), d_y, d_residual, partial[0], out_scale)
    near(found, d_sum + d_residual.double(), dtype)
    grad = torch.ones(1, width, device=DEVICE)
    rmsnorm.norm_weight_grad_(partial, grad)
    near(grad[0], d_weight + 1.0, dtype)
    alone = rmsnorm.add_norm_backward((total, rstd, weight), d_y, None, partial[0], out_scale)
    near(alone, d_sum, dtype)


def test_a_norm_without_a_branch_leaves_its_input():
    x, weight = inputs((5, 32), (32,), dtype=torch.float32)
    total, y, _ = rmsnorm.add_norm_forward(x, None, weight, 1e-6)
    assert total is x
    near(y, x.double() / torch.sqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double(), x.dtype)


def gates_and_ups(gate_up, alternating):
    return (gate_up[:, 0::2], gate_up[:, 1::2]) if alternating else gate_up.chunk(2, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alternating", [False, True])
def test_swiglu(alternating, dtype):
    gate_up, d_act = inputs((5, 160), (5, 80), dtype=dtype)
    leaf = gate_up.double().requires_grad_()
    gate, up = gates_and_ups(leaf, alternating)
    expected = torch.nn.functional.silu(gate) * up
    (wanted,) = torch.autograd.grad(expected, leaf, d_act.double())
    near(swiglu.swiglu_forward(gate_up, alternating), expected, dtype)
    found = swiglu.swiglu_backward_(gate_up, d_act, alternating)
    assert found is gate_up
    near(found, wanted, dtype)


@pytest.mark.gpu
def test_swiglu_in_the_epilogue_of_its_product():
    pytest.importorskip("quack", reason="quack is not installed: pip install forgetrain[hopper]")
    x, weight = inputs((500, 256), (640, 256), dtype=torch.bfloat16)
    product = x.double() @ weight.double().t()
    gate, up = gates_and_ups(product, alternating=True)
    gate_up, act = gated.gated_forward(x, weight)
    near(gate_up, product, torch.bfloat16)
    near(act, torch.nn.functional.silu(gate) * up, torch.bfloat16)


def test_quack_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "quack.gemm_config", None)
    gated.gated_kernel.cache_clear()
    with pytest.raises(ImportError, match=r"quack.*pip install 'forgetrain\[hopper\]'"):
        gated.gated_kernel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [1, 2])
def test_rope(copies, dtype):
    rows, length, heads, groups, width = 3, 6, 4, 2, 8
    (qkv,) = inputs((rows * length, (heads + 2 * groups) * width), dtype=dtype)
    cos, sin = rope.rope_tables(length, width, 100.0, DEVICE)
    place = torch.arange(length, dtype=torch.float64).repeat(rows)
    angle = (place[:, None, None] * 100.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)).to(DEVICE)
    leaf = qkv.double().requires_grad_()
    q, k, v = leaf.view(-1, heads + 2 * groups, width).split([heads, groups, groups], dim=1)

    def rotated(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1
        ).flatten(1)

    turned = (rotated(q), rotated(k), v.flatten(1))
    d_q, d_k, d_v = inputs(
        *[(rows * length, n * width) for n in (heads, groups * copies, groups * copies)], dtype=dtype
    )
    d_out = [d_q.double()] + [d.double().view(-1, groups, copies, width).sum(2).flatten(1) for d in (d_k, d_v)]
    (wanted,) = torch.autograd.grad(turned, leaf, d_out)
    near(rope.rope_backward(d_q, d_k, d_v, cos, sin, groups, width), wanted, dtype)
    if copies == 1:
        packed = torch.cat((d_q, d_k, d_v), dim=1)
        found = rope.rope_backward_(packed, cos, sin, heads, groups, width)
        assert found is packed
        near(found, wanted, dtype)
    rope.rope_forward_(qkv, cos, sin, heads, groups, width)
    near(qkv, torch.cat(turned, dim=1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [96, 8208])  # less than one step of the kernel's loop, and one and a bit
def test_cross_entropy(vocab, dtype):
    logits, mask = 3 * inputs((5, vocab), dtype=dtype)[0], torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0], device=DEVICE)
    labels = torch.tensor([0, 3, vocab - 1, 17, 8], device=DEVICE)
    denominator = torch.tensor(3.5, device=DEVICE)
    leaf = logits.double().requires_grad_()
    nll = -torch.log_softmax(leaf, -1).gather(1, labels[:, None])[:, 0]
    expected = nll * mask.double() / 3.5
    (wanted,) = torch.autograd.grad(expected.sum(), leaf)
    before = logits.clone()
    near(cross_entropy.cross_entropy_(logits, labels, mask, denominator, gradient=False), expected, torch.float32)
    assert torch.equal(logits, before)
    near(cross_entropy.cross_entropy_(logits, labels, mask, denominator, gradient=True), expected, torch.float32)
    near(logits, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype):
    table, d_x = inputs((11, 48), (40, 48), dtype=dtype)
    tokens = torch.tensor([3] * 20 + [0, 10, 5, 3] * 5, device=DEVICE)  # a run longer than a kernel's block of rows
    near(embedding.embedding_forward(tokens, table, 12.0), table.double()[tokens] * 12.0, dtype)
    grad = torch.ones(11, 48, device=DEVICE)
    embedding.embedding_backward_(tokens, d_x, grad, 12.0)
    wanted = torch.ones(11, 48, dtype=torch.float64, device=DEVICE).index_add(0, tokens, d_x.double() * 12.0)
    near(grad, wanted, torch.float32)
    again = torch.ones(11, 48, device=DEVICE)
    embedding.embedding_backward_(tokens, d_x, again, 12.0)
    assert torch.equal(grad, again)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 7])
def test_linear(rank, dtype):
    x, weight, d_y = inputs((72, 48), (64, 48), (72, 64), dtype=dtype)
    forward, d_x = x.double() @ weight.double().t(), d_y.double() @ weight.double()
    near(linear.linear_forward(x, weight, rank), forward, dtype)
    near(linear.linear_input_grad(d_y, weight, rank), d_x, dtype)
    near(linear.linear_input_grad(d_y, weight, rank, 0.5), 0.5 * d_x, dtype)
    grad = torch.full((64, 48), 1000.0, device=DEVICE)
    linear.linear_weight_grad_(grad, d_y, x, rank, 0.5)
    near(grad, 1000.0 + 0.5 * d_y.double().t() @ x.double(), torch.float32)


def attention_case(dtype, width, length=24, rows=2, heads=4, groups=2):
    """q, k and v as views of one product, the context's gradient; the context and the gradients in float64."""
    (qkv,) = inputs((rows * length, (heads + 2 * groups) * width), dtype=dtype)
    views = attention.split_heads(qkv, rows, heads, groups, width)
    q, k, v = (x.double().requires_grad_() for x in views)
    expanded = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *expanded, is_causal=True)
    d_out = randn(rows, length, heads, width, seed=9).to(DEVICE, dtype).transpose(1, 2)
    return views, d_out, expected, torch.autograd.grad(expected, (q, k, v), d_out.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype):
    views, d_out, expected, wanted = attention_case(dtype, width=64)
    exact = dtype == torch.float32 or DEVICE == "cpu"
    forward = attention.exact_attention_forward if exact else attention.cudnn_attention_forward
    backward = attention.exact_attention_backward if exact else attention.cudnn_attention_backward
    out, saved = forward(*views)
    assert out.transpose(1, 2).is_contiguous()
    near(out, expected, dtype)
    for found, want in zip(backward(saved, d_out), wanted, strict=True):
        near(found, want, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_flash_attention(width):
    pytest.importorskip("flash_attn.cute", reason="FlashAttention-4 is not installed: pip install forgetrain[hopper]")
    views, d_out, expected, wanted = attention_case(torch.bfloat16, width, length=300)
    out, saved = flash_attention.flash_attention_forward(*views)
    assert out.transpose(1, 2).is_contiguous()
    near(out, expected, torch.bfloat16)
    d_qkv = flash_attention.flash_attention_backward(saved, d_out)
    for found, want in zip(attention.split_heads(d_qkv, 2, 4, 2, width), wanted, strict=True):
        near(found, want, torch.bfloat16)


def test_flash_attention_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    flash_attention.flash_kernels.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'forgetrain\[hopper\]'"):
        flash_attention.flash_kernels()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw(dtype):
    count, decayed, clip, betas, eps, decay = 3000, 2100, 1.0, (0.9, 0.95), 1e-8, 0.1
    master = randn(count, seed=0).to(DEVICE)
    weight = master.clone().to(dtype)
    m, v, step = (torch.zeros(shape, device=DEVICE) for shape in (count, count, ()))
    step = step.long()
    matrices, vectors = (part.clone().double().requires_grad_() for part in (master[:decayed], master[decayed:]))
    reference = torch.optim.AdamW(
        [{"params": [matrices], "weight_decay": decay}, {"params": [vectors], "weight_decay": 0.0}],
        lr=1e-2, betas=betas, eps=eps,
    )  # fmt: skip
    for number in range(3):
        grad = randn(count, seed=number + 1).to(DEVICE) * 10.0 ** (-number)
        matrices.grad, vectors.grad = grad[:decayed].double(), grad[decayed:].double()
        expected = torch.nn.utils.clip_grad_norm_([matrices, vectors], clip)
        reference.step()
        norm = adamw.grad_norm(grad)
        near(norm, expected, torch.float32)
        lr = torch.tensor(1e-2, dtype=torch.float64, device=DEVICE)
        applied = adamw.adamw_((grad, master, m, v, weight), decayed, step, lr, norm, clip, betas, eps, decay)
        assert bool(applied)
    near(master, torch.cat((matrices, vectors)), torch.float32)
    near(weight, master.double(), dtype)
    if DEVICE == "cuda":  # the interpreter truncates to bf16 where a GPU rounds to nearest
        assert torch.equal(weight, master.to(dtype))
    assert int(step) == 3


def test_a_norm_that_is_not_finite_moves_nothing():
    flat = tuple(randn(100, seed=i).abs().to(DEVICE) for i in range(5))
    before = [tensor.clone() for tensor in flat]
    step = torch.tensor(4, device=DEVICE)
    norm, lr = torch.tensor(float("nan"), device=DEVICE), torch.tensor(0.1, dtype=torch.float64, device=DEVICE)
    assert not bool(adamw.adamw_(flat, 50, step, lr, norm, 1.0, (0.9, 0.95), 1e-8, 0.1))
    assert all(torch.equal(old, new) for old, new in zip(before, flat, strict=True))
    assert int(step) == 4
