"""Step-by-step inference, twice: `Naive` is the definition, `Batch` runs many problems at once.

`Naive` keeps one cache for each block and builds every worker's view by concatenation, so it shares no
bookkeeping with the parallel attention of training. `Batch` shares it, and is quick.
"""

import random
import re

import torch
import torch.nn.functional as F

import task
from task import NEVER, Layout, Schedule
from vocab import *  # noqa: F403

# What the rules of the paper's main version suppress: ends of text, `#` and `</think>`.
SUPPRESSED = [ID["<|endoftext|>"], ID["#"]]

MAX_POSITION = 4000  # of 4096: where a run that does not end is given up


class Naive:
    def __init__(self, m, prompt, n):
        self.m, self.n = m, n
        self.common, self.others, self.own = (self.solo(x) for x in (prompt, [OTHERS], [OWN]))
        self.blocks = [self.empty() for _ in range(n)]

    def empty(self):
        c = self.m.c
        return [(torch.zeros(0, c.kv, c.hd), torch.zeros(0, c.kv, c.hd)) for _ in range(c.layers)]

    def attend(self, q, pos, K, V):
        g = self.m.c.heads // self.m.c.kv
        at = torch.arange(len(K))
        q, k = self.m.rope(q, pos[:, None]), self.m.rope(K, at[:, None])
        s = torch.einsum("rhd,nhd->hrn", q, k.repeat_interleave(g, 1)) * self.m.c.hd**-0.5
        s = s.masked_fill(at[None, None] > pos[None, :, None], float("-inf")).softmax(-1)
        return torch.einsum("hrn,nhd->rhd", s, V.repeat_interleave(g, 1))

    @torch.no_grad()
    def solo(self, ids, logits=False):
        """A block that sees only itself."""
        x, cache, pos = self.m.emb[torch.tensor(ids)], [], torch.arange(len(ids))
        for layer in self.m.layers:
            q, k, v = self.m.qkv(layer, x)
            cache.append((k, v))
            x = self.m.out(layer, x, self.attend(q, pos, k, v))
        return (cache, self.m.head(x)) if logits else cache

    def move(self, w):
        self.common = [
            tuple(torch.cat(pair) for pair in zip(a, b)) for a, b in zip(self.common, self.blocks[w])
        ]
        self.blocks[w] = self.empty()

    @torch.no_grad()
    def step(self, feeds, closed):
        """Runs one pass; the logits of all fed tokens of each worker."""
        for w in range(self.n):
            if closed[w]:
                self.move(w)
        xs = [self.m.emb[torch.tensor(f, dtype=torch.long)] for f in feeds]
        for i, layer in enumerate(self.m.layers):
            qs = []
            for w in range(self.n):
                q, k, v = self.m.qkv(layer, xs[w])
                qs.append(q)
                self.blocks[w][i] = tuple(torch.cat(pair) for pair in zip(self.blocks[w][i], (k, v)))
            for w in range(self.n):
                if not feeds[w]:
                    continue
                view = [self.common[i], self.others[i]]
                view += [self.blocks[o][i] for o in range(self.n) if o != w]
                view += [self.own[i], self.blocks[w][i]]
                K, V = (torch.cat([b[j] for b in view]) for j in (0, 1))
                pos = torch.arange(len(K) - len(feeds[w]), len(K))
                xs[w] = self.m.out(layer, xs[w], self.attend(qs[w], pos, K, V))
        return [self.m.head(x) for x in xs]


class Batch:
    def __init__(self, m, prompts, n, cap, sees="all"):
        self.m, self.n, self.sees = m, n, sees
        c, B = m.c, len(prompts)
        self.L = [Layout(p, n) for p in prompts]
        self.lp = max(map(len, prompts))
        self.plen = torch.tensor([len(p) for p in prompts])
        ids = torch.zeros(B, self.lp, dtype=torch.long)
        for b, p in enumerate(prompts):
            ids[b, : len(p)] = torch.tensor(p)
        g, pp = c.heads // c.kv, torch.arange(self.lp)
        self.headers, self.prompt = [], []
        with torch.no_grad():
            xh, xp = m.emb[torch.tensor([OTHERS, OWN])], m.emb[ids]
            for layer in m.layers:
                q, k, v = m.qkv(layer, xh)
                self.headers.append((k, v))
                xh = m.out(layer, xh, v.repeat_interleave(g, 1))
                q, k, v = (t.transpose(1, 2) for t in m.qkv(layer, xp))
                kp = m.rope(k, pp)
                self.prompt.append((kp, v))
                o = F.scaled_dot_product_attention(
                    m.rope(q, pp), kp.repeat_interleave(g, 1), v.repeat_interleave(g, 1), is_causal=True
                )
                xp = m.out(layer, xp, o.transpose(1, 2))
        shape = (c.layers, B, c.kv, n, cap, c.hd)
        self.kabs, self.kloc, self.v = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
        self.raw = torch.zeros(shape)
        self.pas = torch.full((B, n, cap), 10**7)
        self.mov = torch.full((B, n, cap), NEVER)

    @torch.no_grad()
    def step(self, feeds, closed, act):
        """One pass of the problems `act`; the logits after each worker's last token [A, n, V]."""
        m, n = self.m, self.n
        before = {b: [len(x) for x in self.L[b].tok] for b in act}
        for b in act:
            L = self.L[b]
            start = list(L.start)
            L.feed(feeds[b], closed[b])
            for w in range(n):
                e = before[b][w]
                if closed[b][w]:
                    at = torch.tensor(L.P[w][start[w] : e])
                    self.mov[b, w, start[w] : e] = L.t
                    self.kabs[:, b, :, w, start[w] : e] = m.rope(self.raw[:, b, :, w, start[w] : e], at)
                self.pas[b, w, e : len(L.tok[w])] = L.t
        fm = max(len(f) for b in act for f in feeds[b])
        A, R = len(act), n * fm
        tok, idx, loc = (torch.zeros(A, n, fm, dtype=torch.long) for _ in range(3))
        off = torch.zeros(A, n, fm, 3 + task.MAX_WORKERS, dtype=torch.long)
        real = torch.zeros(A, n, fm, dtype=torch.bool)
        for a, b in enumerate(act):
            for w in range(n):
                f, j, L = feeds[b][w], before[b][w], self.L[b]
                k = len(f)
                if not k:
                    continue
                tok[a, w, :k], off[a, w, :k] = torch.tensor(f), torch.tensor(L.off[w][j : j + k])
                idx[a, w, :k], loc[a, w, :k] = torch.arange(j, j + k), torch.tensor(L.loc[w][j : j + k])
                real[a, w, :k] = True
        ai = torch.tensor(act)
        mx = max(len(x) for b in act for x in self.L[b].tok)
        t = torch.tensor([self.L[b].t for b in act])
        wid = torch.arange(n).repeat_interleave(fm)
        pas, mov = self.pas[ai, :, :mx], self.mov[ai, :, :mx]
        vis = (pas <= t[:, None, None])[:, None].expand(A, R, n, mx).clone()
        mine = wid[None, :, None, None] == torch.arange(n)[None, None, :, None]
        vis &= ~mine | (torch.arange(mx)[None, None, None] <= idx.flatten(1)[:, :, None, None])
        hist = (mov <= t[:, None, None])[:, None].expand(A, R, n, mx)
        if self.sees == "own":
            vis &= mine
        elif self.sees == "finished":
            vis &= mine | hist
        pv = (torch.arange(self.lp) < self.plen[ai][:, None])[:, None].expand(A, R, self.lp)
        seen = torch.cat([torch.ones(A, R, 2, dtype=torch.bool), pv, vis.flatten(2)], -1)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, -1e9)
        hist = hist.flatten(2)
        x, off = m.emb[tok.flatten(1)], off.flatten(1, 2)
        ra, rw, rf = real.nonzero(as_tuple=True)
        rb, rj = ai[ra], idx[ra, rw, rf]
        for i, layer in enumerate(m.layers):
            q, k, v = m.qkv(layer, x)
            k, v = (y.unflatten(1, (n, fm))[ra, rw, rf] for y in (k, v))
            self.raw[i][rb, :, rw, rj], self.v[i][rb, :, rw, rj] = k, v
            self.kloc[i][rb, :, rw, rj] = m.rope(k, loc[ra, rw, rf][:, None])
            kp, vp = self.prompt[i]
            o = m.attend(
                q.transpose(1, 2), off, *self.headers[i], kp[ai], vp[ai], self.kabs[i][ai, :, :, :mx],
                self.kloc[i][ai, :, :, :mx], self.v[i][ai, :, :, :mx], hist, mask,
            )
            x = m.out(layer, x, o.transpose(1, 2))
        last = (real.sum(-1) - 1).clamp(min=0)
        x = x.unflatten(1, (n, fm)).gather(2, last[:, :, None, None].expand(-1, -1, 1, x.shape[-1]))[:, :, 0]
        out = m.head(x)
        out[..., SUPPRESSED] = float("-inf")
        return out


def answer_in(ids):
    """The contents of the rightmost box, blanks left out."""
    found = re.findall(r"\\boxed\{([^}]+)\}", text(ids))
    return found[-1].replace(" ", "") if found else None


class Run:
    """What the engine's protocol does with one problem's tokens."""

    def __init__(self, items, names, kind, seed):
        self.items, self.names = items, names
        n = len(names)
        self.sched = Schedule(random.Random(seed), n, kind)
        self.pending = [task.prefix(name, 1) for name in names]
        self.current = [list(p) for p in self.pending]
        self.step, self.closed = [1] * n, [False] * n
        self.gone, self.last = [False] * n, [False] * n
        self.passes, self.answer, self.over = 0, None, False
        self.started, self.clock = [], -1

    def turn(self):
        """The next pass's feeds; skips moments in which nobody has a turn."""
        n = len(self.names)
        for _ in range(10000):
            self.clock += 1
            act = self.sched.active(self.clock)
            act = [(act[w] or self.last[w]) and not self.gone[w] for w in range(n)]
            if any(act):
                self.act = act
                return [self.pending[w] if act[w] else [] for w in range(n)]
        raise RuntimeError("nobody is left")

    def observe(self, chosen):
        self.passes += 1
        n = len(self.names)
        self.closed = [False] * n
        for w in range(n):
            if not self.act[w]:
                continue
            if self.last[w]:
                self.gone[w], self.last[w] = True, False
                continue
            y, before = chosen[w], self.current[w][-1]
            if y == COLON and before in ITEM_OF:
                self.started.append(ITEM_OF[before])
            self.current[w].append(y)
            self.pending[w] = [y]
            if y == SEPARATOR and before in (DOT, WAIT_ON):
                answer = answer_in(self.current[w])
                if answer and not self.over:
                    self.answer, self.over = answer, True
                self.step[w] += 1
                self.closed[w] = True
                self.current[w] = task.prefix(self.names[w], self.step[w])
                self.pending[w] = [SEPARATOR, *self.current[w]]
                others = any(not (self.gone[o] or self.last[o]) for o in range(n) if o != w)
                self.last[w] = self.step[w] > self.sched.quit[w] and others


def generate(m, problems, names, kinds, seeds, sees="all"):
    """Greedy runs of problems with as many workers each; one dict for each problem."""
    n = len(names[0])
    runs = [Run(*x) for x in zip(problems, names, kinds, seeds)]
    cap = max(int(1.6 * sum(12 + 5 * len(i) for i in it) + 4 * len(it) + 60) * (1 + 2 * (kind != "normal"))
              for it, kind in zip(problems, kinds))
    e = Batch(m, [task.prompt_ids(it) for it in problems], n, cap + 40, sees)
    while True:
        room = [len(L.prompt) + sum(map(len, L.tok)) < MAX_POSITION and max(map(len, L.tok)) < cap for L in e.L]
        act = [b for b, r in enumerate(runs) if not r.over and room[b] and r.passes < cap]
        if not act:
            break
        feeds = {b: runs[b].turn() for b in act}
        out = e.step(feeds, {b: runs[b].closed for b in act}, act).argmax(-1).tolist()
        for a, b in enumerate(act):
            runs[b].observe(out[a])
    res = []
    for b, r in enumerate(runs):
        want = [str(sum(it)) for it in r.items]
        got = (r.answer or "").split(",")
        res.append(dict(
            k=len(want), passes=r.passes, finished=r.over, right=got == want, answer=r.answer,
            items=sum(a == g for a, g in zip(got, want)) / len(want), started=len(r.started),
            twice=len(r.started) - len(set(r.started)), prompt=text(e.L[b].prompt),
            streams=[text(x) for x in e.L[b].tok],
        ))
    return res
