"""A Llama and its training loop as one writes them oneself, on the bytes of this file. Five lines, marked below, make a
golden record of it; see docs/capture.md for what to do with that.

    python examples/train_my_own.py runs/my-own/golden
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from forgetrain.capture import Capture  # 1

LAYERS, DIM, HEADS, KV, HEAD, FFN, SEQ, BATCH, MICRO, LR, CLIP = 2, 64, 4, 2, 16, 160, 32, 4, 2, 3e-3, 1.0


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, self.gain.shape, self.gain, eps=1e-6)


class Rotary(nn.Module):
    def forward(self, q, k):
        frequency = 1.0 / 10000.0 ** (torch.arange(0, HEAD, 2).float() / HEAD)
        angle = torch.outer(torch.arange(q.shape[2]).float(), frequency)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        return tuple(x * cos + torch.cat((-x[..., HEAD // 2 :], x[..., : HEAD // 2]), -1) * sin for x in (q, k))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.rotary = Norm(DIM), Rotary()
        self.q, self.k, self.v = (nn.Linear(DIM, heads * HEAD, bias=False) for heads in (HEADS, KV, KV))
        self.out = nn.Linear(HEADS * HEAD, DIM, bias=False)
        self.norm2 = Norm(DIM)
        self.gate, self.up = nn.Linear(DIM, FFN, bias=False), nn.Linear(DIM, FFN, bias=False)
        self.down = nn.Linear(FFN, DIM, bias=False)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = self.rotary(q, k)
        k, v = (y.repeat_interleave(HEADS // KV, dim=1) for y in (k, v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class MyLlama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = Norm(DIM), nn.Linear(DIM, 256, bias=False)
        for weight in (self.embed.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


LAYER = r"model.layers.\1."
NAMES = {  # 2: what the modules above are called in Hugging Face's Llama
    "embed": "model.embed_tokens",
    r"blocks\.(\d+)\.norm1": LAYER + "input_layernorm",
    r"blocks\.(\d+)\.([qkv])": LAYER + r"self_attn.\2_proj",
    r"blocks\.(\d+)\.rotary": (LAYER + "self_attn.q_rope", LAYER + "self_attn.k_rope"),
    r"blocks\.(\d+)\.out": LAYER + "self_attn.o_proj",
    r"blocks\.(\d+)\.norm2": LAYER + "post_attention_layernorm",
    r"blocks\.(\d+)\.(gate|up|down)": LAYER + r"mlp.\2_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


def main(folder):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = MyLlama()
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    with Capture(folder, Path(__file__).with_name("my_own.toml"), model, optimizer, NAMES) as golden:  # 3
        for step in range(8):
            rows = torch.randint(0, len(text) - SEQ, (BATCH,)).tolist()
            tokens, labels = (torch.stack([text[row + i : row + i + SEQ] for row in rows]) for i in (0, 1))
            golden.begin(tokens, labels)  # 4
            optimizer.zero_grad()
            total = torch.zeros(())
            for x, y in zip(tokens.split(MICRO), labels.split(MICRO), strict=True):
                nll = F.cross_entropy(model(x).view(-1, 256), y.reshape(-1), reduction="none")
                loss = nll.sum() / labels.numel()
                loss.backward()
                total = total + loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            golden.end(total, norm)  # 5
            print(f"step {step}: loss {total:.4f}, gradient norm {norm:.4f}")


if __name__ == "__main__":
    main(sys.argv[1])
