"""A Qwen3-style decoder and exact Hogwild! attention over all passes of a run in parallel.

A finished block has one absolute position for ever; a block in progress stands elsewhere in every view. So
each key is rotated twice, to its place in the history and to its place in its block, and each query once for
absolute positions, once for each header and once for each worker's current block: the rotation of query q for
block b is by `position of q in its view - start of b`. A mask says which of the two scores holds.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vocab import OTHERS, OWN, VOCAB


class Config:
    def __init__(self, d=128, layers=4, heads=4, kv=2, hd=32, ff=384, theta=10000.0, vocab=len(VOCAB), eps=1e-6):
        self.d, self.layers, self.heads, self.kv, self.hd = d, layers, heads, kv, hd
        self.ff, self.theta, self.vocab, self.eps = ff, theta, vocab, eps


def rms(x, w, eps):
    return F.rms_norm(x, (x.shape[-1],), w, eps)


def weigh(headers, common, local, hist, mask):
    """Attention weights [B, KV, g, R, keys]: the absolute score for the history, the block-local one else."""
    lp = common.shape[-1] - local.shape[-1]
    own = torch.where(hist[:, None, None], common[..., lp:], local)
    s = torch.cat([headers, common[..., :lp], own], -1) + mask[:, None, None]
    return s.float().softmax(-1).to(common.dtype)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n1, self.n2 = nn.Parameter(torch.ones(c.d)), nn.Parameter(torch.ones(c.d))
        self.qn, self.kn = nn.Parameter(torch.ones(c.hd)), nn.Parameter(torch.ones(c.hd))
        self.qkv = nn.Linear(c.d, (c.heads + 2 * c.kv) * c.hd, bias=False)
        self.o = nn.Linear(c.heads * c.hd, c.d, bias=False)
        self.gu = nn.Linear(c.d, 2 * c.ff, bias=False)
        self.down = nn.Linear(c.ff, c.d, bias=False)


class Model(nn.Module):
    def __init__(self, c=None):
        super().__init__()
        self.c = c = c or Config()
        self.emb = nn.Parameter(torch.randn(c.vocab, c.d) * 0.04)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.nf = nn.Parameter(torch.ones(c.d))
        for name, p in self.named_parameters():
            if p.ndim == 2 and name != "emb":
                nn.init.normal_(p, std=1 / math.sqrt(p.shape[1]))
                if name.endswith(("o.weight", "down.weight")):
                    nn.init.zeros_(p)
        inv = c.theta ** (-torch.arange(0, c.hd, 2).float() / c.hd)
        angle = torch.outer(torch.arange(4096).float(), inv)
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], -1), persistent=False)

    def rope(self, x, pos):
        """Rotates x [..., hd] by positions that broadcast to its leading shape."""
        a, b = x.chunk(2, -1)
        return x * self.cos[pos] + torch.cat([b, a], -1) * self.sin[pos]

    def qkv(self, layer, x):
        """Queries [.., H, hd], keys and values [.., KV, hd], normed, not rotated."""
        c = self.c
        y = layer.qkv(rms(x, layer.n1, c.eps)).unflatten(-1, (c.heads + 2 * c.kv, c.hd))
        q, k, v = y.split([c.heads, c.kv, c.kv], -2)
        return rms(q, layer.qn, c.eps), rms(k, layer.kn, c.eps), v

    def out(self, layer, x, o):
        x = x + layer.o(o.flatten(-2))
        g, u = layer.gu(rms(x, layer.n2, self.c.eps)).chunk(2, -1)
        return x + layer.down(F.silu(g) * u)

    def head(self, x):
        return rms(x, self.nf, self.c.eps) @ self.emb.t()

    def attend(self, q, off, kh, vh, kp, vp, kabs, kloc, vw, hist, mask):
        """Attention of worker queries.

        q [B, H, R, hd]; off [B, R, 3 + workers]; kh, vh [2, KV, hd] the headers; kp, vp [B, KV, Lp, hd] the
        prompt; kabs, kloc, vw [B, KV, W, Lw, hd]; hist [B, R, W * Lw]; mask [B, R, 2 + Lp + W * Lw].
        """
        g = self.c.heads // self.c.kv
        B, _, R, hd = q.shape
        W, Lw = kabs.shape[2:4]
        KV = self.c.kv
        q = q * hd**-0.5

        def turned(i):
            return self.rope(q, off[:, None, :, i]).reshape(B, KV, g * R, hd)

        at = turned(0)
        headers = torch.stack([(turned(1 + i) * kh[i][None, :, None]).sum(-1) for i in (0, 1)], -1)
        common = at @ torch.cat([kp, kabs.flatten(2, 3)], 2).transpose(-1, -2)
        local = torch.cat([turned(3 + w) @ kloc[:, :, w].transpose(-1, -2) for w in range(W)], -1)
        fold = (g, R)
        p = weigh(headers.to(common.dtype).unflatten(2, fold), common.unflatten(2, fold), local.unflatten(2, fold), hist, mask)
        p = p.flatten(2, 3)
        v = torch.cat([vh.transpose(0, 1)[None].expand(B, -1, -1, -1), vp, vw.flatten(2, 3)], 2)
        return (p @ v).view(B, KV * g, R, hd)

    def forward(self, b, rows=None):
        """Parallel training pass; logits of the worker rows [B, W, Lw, V], or of the chosen rows only."""
        c = self.c
        B, lp = b["prompt"].shape
        _, W, lw = b["tok"].shape
        R, g = W * lw, c.heads // c.kv
        ids = torch.cat([torch.tensor([OTHERS, OWN]).expand(B, 2), b["prompt"], b["tok"].flatten(1)], 1)
        x = F.embedding(ids, self.emb)
        off, pas, mov, val = (b[key].flatten(1, 2) for key in ("off", "pas", "mov", "val"))
        wid, idx = torch.arange(W).repeat_interleave(lw), torch.arange(lw).repeat(W)
        same = wid[:, None] == wid[None]
        vis = torch.where(same, idx[None] <= idx[:, None], pas[:, None] <= pas[:, :, None]) & val[:, None]
        hist = mov[:, None] <= pas[:, :, None]
        pv = (torch.arange(lp) < b["plen"][:, None])[:, None].expand(B, R, lp)
        seen = torch.cat([torch.ones(B, R, 2, dtype=torch.bool), pv, vis], -1)
        mask = torch.zeros(B, R, 2 + lp + R).masked_fill_(~seen, -1e9)
        if torch.is_autocast_enabled("cpu"):
            mask = mask.bfloat16()
        pp, P, loc = torch.arange(lp), b["P"], b["loc"]
        for layer in self.layers:
            q, k, v = (t.transpose(1, 2) for t in self.qkv(layer, x))
            kp, vp = self.rope(k[:, :, 2 : 2 + lp], pp), v[:, :, 2 : 2 + lp]
            op = F.scaled_dot_product_attention(
                self.rope(q[:, :, 2 : 2 + lp], pp).to(v.dtype), kp.to(v.dtype).repeat_interleave(g, 1),
                vp.repeat_interleave(g, 1), is_causal=True,
            )
            kw, vw = (t[:, :, 2 + lp :].unflatten(2, (W, lw)) for t in (k, v))
            ow = self.attend(
                q[:, :, 2 + lp :], off, k[0, :, :2].transpose(0, 1), v[0, :, :2].transpose(0, 1), kp, vp,
                self.rope(kw, P[:, None]), self.rope(kw, loc[:, None]), vw, hist, mask,
            )
            o = torch.cat([v[:, :, :2].repeat_interleave(g, 1), op, ow.to(v.dtype)], 2).transpose(1, 2)
            x = self.out(layer, x, o)
        x = x[:, 2 + lp :].unflatten(1, (W, lw))
        return self.head(x if rows is None else x[rows])
