"""The task, the scripted policy that solves it, and the bookkeeping of the combined layout.

A pass feeds every active worker its pending tokens and every fed worker chooses its next token. Exactly as
the engine does it: headers stand alone in their blocks; the opening words of all workers are one ragged pass;
a step is over when a blank line follows a full stop, its block is history from the next pass on, and the
blank line is the first token of the worker's next block, before the next prefix. A held worker keeps its
pending tokens; a worker that retires at the end of a step leaves the next prefix behind.
"""

import random

import numpy as np

from vocab import *  # noqa: F403

MIN_FIRST, MAX_FIRST = 10, 45
MIN_MORE, MAX_MORE = 1, 6
NEVER = 10**6
MAX_WORKERS = 4
SCHEDULES = ["normal", "stalls", "slow", "bursts", "late", "retire"]


def problem(rng, k, min_more=MIN_MORE, max_more=MAX_MORE):
    """k lists: a number of two digits, then 1 to 6 digits; every sum has two digits."""
    return [
        [rng.randint(MIN_FIRST, MAX_FIRST)] + [rng.randint(1, 9) for _ in range(rng.randint(min_more, max_more))]
        for _ in range(k)
    ]


def level_problem(rng, k):
    """Lists of one length: workers finish together, so that several often claim in the same pass."""
    more = rng.randint(MIN_MORE, MAX_MORE - 1)
    return problem(rng, k, more, more)


def problem_text(items):
    return "; ".join(f"{LABELS[i]}) " + "+".join(map(str, it)) for i, it in enumerate(items))


def prompt_ids(items):
    out = [INTRO]
    for i, it in enumerate(items):
        if i:
            out.append(NEXT_ITEM)
        out += [LABEL[i], *number(it[0])]
        for x in it[1:]:
            out += [PLUS, DIGIT[x]]
    return [*out, PAST, SEPARATOR]


def solution_ids(it):
    """What follows `c: `: running sums, full stop, blank line."""
    s = it[0]
    out = number(s)
    for x in it[1:]:
        s += x
        out += [PLUS, DIGIT[x], EQUALS, *number(s)]
    return [*out, DOT, SEPARATOR]


def preference(initial, k):
    """Order in which a worker looks for an untaken item: front, back, middle up or middle down."""
    mid = k // 2
    return [
        list(range(k)),
        list(range(k - 1, -1, -1)),
        [(mid + i) % k for i in range(k)],
        [(mid - 1 - i) % k for i in range(k)],
    ][initial % 4]


def draw_names(rng, n, fresh=False):
    """Names of training: the usual ones mostly; else shuffled, or any initials and any endings."""
    if fresh:
        return rng.sample(RESERVED_NAMES, n)
    r = rng.random()
    if r < 0.6:
        return DEFAULT_NAMES[:n]
    if r < 0.8:
        return rng.sample(DEFAULT_NAMES[:4], n)
    tails = list(TAILS)
    out = []
    for c in rng.sample(UPPER[:16], n):
        while True:
            tail = rng.choice(tails) if rng.random() < 0.7 else "".join(rng.choice(LOWER) for _ in range(rng.randint(2, 5)))
            if c + tail not in RESERVED_NAMES:
                break
        out.append(c + tail)
    return out


class Layout:
    """The combined layout of one problem: where every token stands, for every later query."""

    def __init__(self, prompt, n):
        self.prompt, self.n, self.common, self.t = prompt, n, len(prompt), -1
        self.tok, self.pas, self.loc, self.off, self.P, self.mov = ([[] for _ in range(n)] for _ in range(6))
        self.start = [0] * n

    def feed(self, feeds, closed):
        """Runs one pass: closed[w] relabels w's block as history first; feeds[w] may be empty."""
        self.t += 1
        for w in range(self.n):
            if closed[w]:
                s, e = self.start[w], len(self.tok[w])
                self.P[w][s:e] = range(self.common, self.common + e - s)
                self.mov[w][s:e] = [self.t] * (e - s)
                self.common += e - s
                self.start[w] = e
        base = [len(x) for x in self.tok]
        for w in range(self.n):
            m = len(feeds[w])
            self.loc[w] += range(base[w] - self.start[w], base[w] - self.start[w] + m)
            self.tok[w] += feeds[w]
            self.pas[w] += [self.t] * m
            self.P[w] += [0] * m
            self.mov[w] += [NEVER] * m
        ln = [len(self.tok[w]) - self.start[w] for w in range(self.n)]
        for w in range(self.n):
            if not feeds[w]:
                continue
            st = [0] * MAX_WORKERS
            c = self.common + 1
            for o in range(self.n):
                if o != w:
                    st[o] = c
                    c += ln[o]
            own_header = c
            st[w] = c + 1
            for j in range(base[w], len(self.tok[w])):
                p = st[w] + self.loc[w][j]
                self.off[w].append([p, p - self.common, p - own_header] + [max(p - s, 0) for s in st])


class Schedule:
    """Who takes part in which pass."""

    def __init__(self, rng, n, kind="normal"):
        self.rng, self.n, self.kind = rng, n, kind
        self.join, self.quit = [0] * n, [NEVER] * n
        self.stall = [0.0] * n
        self.every = [1] * n
        self.left = [0] * n
        self.on = [True] * n
        if n == 1:
            self.kind = "normal"
        elif kind == "stalls":
            self.stall = [rng.choice([0, 0.1, 0.2, 0.3, 0.5, 0.8]) for _ in range(n)]
        elif kind == "slow":
            self.every[rng.randrange(n)] = rng.randint(2, 5)
        elif kind == "late":
            m = rng.randint(1, n - 1)
            at = sorted(rng.randint(1, 60) for _ in range(m))
            self.join[n - m :] = at
        elif kind == "retire":
            for w in rng.sample(range(n), rng.randint(1, n - 1)):
                self.quit[w] = rng.randint(1, 3)

    def active(self, t):
        rng = self.rng
        if self.kind == "bursts":
            for w in range(self.n):
                if self.left[w] == 0:
                    self.on[w] = rng.random() < 0.65
                    self.left[w] = rng.randint(1, 15)
                self.left[w] -= 1
        return [
            t >= self.join[w] and rng.random() >= self.stall[w] and t % self.every[w] == 0 and self.on[w]
            for w in range(self.n)
        ]


def simulate(rng, items, names, kind="normal", noise=0.0, max_passes=900, clash=2.0):
    """Runs the scripted policy; the layout it returns carries targets and loss weights."""
    k, n = len(items), len(names)
    L = Layout(prompt_ids(items), n)
    rank = [UPPER.index(name[0]) for name in names]
    prefs = [preference(r, k) for r in rank]
    sched = Schedule(rng, n, kind)
    claims, done, slot = [], set(), 0  # claims: (item or 'A', worker, pass)
    taken = set()
    tgt, wt = [[] for _ in range(n)], [[] for _ in range(n)]
    pending = [prefix(name, 1) for name in names]
    step, closed, queue, doing = [1] * n, [False] * n, [[] for _ in range(n)], [None] * n
    gone, last = [False] * n, [False] * n
    ended, clock = False, -1
    work = 0
    while not ended and L.t + 1 < max_passes:
        clock += 1
        act = sched.active(clock)
        act = [(act[w] or last[w]) and not gone[w] for w in range(n)]
        if not any(act):
            continue
        t = L.t + 1
        feeds = [pending[w] if act[w] else [] for w in range(n)]
        for w in range(n):
            if closed[w]:
                if doing[w] is not None:
                    done.add(doing[w])
                doing[w] = None
            if not act[w]:
                continue
            x = feeds[w][-1]
            if len(feeds[w]) == 1:
                me = ITEM_OF.get(x, "A" if x == ANSWER else None)
                if me is not None:
                    claims.append((me, w, t))
                    taken.add(me)
        L.feed(feeds, closed)
        closed = [False] * n
        for w in range(n):
            if not act[w]:
                continue
            x, m = feeds[w][-1], len(feeds[w])
            if last[w]:
                gone[w], last[w] = True, False
                tgt[w] += [0] * m
                wt[w] += [0.0] * m
                continue
            weight = 1.0
            if queue[w]:
                y = queue[w].pop(0)
            elif x in (STEP_CLOSE, TAKEN):
                free = [i for i in prefs[w] if i not in taken]
                weight = 2.0
                if free:
                    y = CLAIM[free[0]]
                    r = rng.random() if noise else 1.0
                    if r < noise:
                        y, weight = CLAIM[rng.choice(free)], 0.0
                    elif r < noise * 1.3 and len(taken):
                        y, weight = CLAIM[rng.choice(sorted(taken - {"A"}))], 0.0
                else:
                    y = WAIT if "A" in taken else ANSWER
            elif x in ITEM_OF or x == ANSWER:
                me = ITEM_OF.get(x, "A")
                lost = any(
                    c == me and (p < t or (o != w and rank[o] < rank[w])) for c, o, p in claims if (o, p) != (w, t)
                )
                weight = 2.0
                if any(c == me and o != w for c, o, _ in claims):
                    weight = clash
                if lost:
                    y = TAKEN
                else:
                    doing[w] = me
                    if me == "A":
                        y = BOX
                    else:
                        y, work = COLON, work + 1
                        queue[w] = solution_ids(items[me])
            elif x in (BOX, COMMA, BLANK):
                weight = 2.0
                if slot in done:
                    q = [*number(sum(items[slot]))] + ([COMMA] if slot < k - 1 else [CLOSE, DOT, SEPARATOR])
                    slot += 1
                    y, queue[w] = q[0], q[1:]
                else:
                    y, weight = BLANK, 1.0
            else:
                y, weight = WAIT_ON, 0.2
            tgt[w] += [0] * (m - 1) + [y]
            wt[w] += [0.0] * (m - 1) + [weight]
            pending[w] = [y]
            if y == SEPARATOR:
                ended = ended or doing[w] == "A"
                step[w] += 1
                closed[w] = True
                pending[w] = [SEPARATOR, *prefix(names[w], step[w])]
                others = any(not (gone[o] or last[o]) for o in range(n) if o != w)
                if step[w] > sched.quit[w] and others:
                    last[w] = True
    L.tgt, L.wt, L.passes, L.ended, L.work = tgt, wt, L.t + 1, ended, work
    return L


def n_tokens(L):
    return len(L.prompt) + sum(map(len, L.tok))


def collate(layouts):
    """Pads layouts of one number of workers into tensors."""
    import torch

    n, B = layouts[0].n, len(layouts)
    lp = max(len(x.prompt) for x in layouts)
    lw = max(len(s) for x in layouts for s in x.tok)
    full = lambda *s, f=0, dt=np.int64: np.full(s, f, dt)  # noqa: E731
    d = dict(
        prompt=full(B, lp), plen=full(B), tok=full(B, n, lw), pas=full(B, n, lw, f=10**7), loc=full(B, n, lw),
        P=full(B, n, lw), mov=full(B, n, lw, f=NEVER), off=full(B, n, lw, 3 + MAX_WORKERS), tgt=full(B, n, lw),
        wt=full(B, n, lw, dt=np.float32), val=full(B, n, lw, dt=bool),
    )
    for b, x in enumerate(layouts):
        d["prompt"][b, : len(x.prompt)] = x.prompt
        d["plen"][b] = len(x.prompt)
        for w in range(n):
            m = len(x.tok[w])
            d["val"][b, w, :m] = True
            for key in ("tok", "pas", "loc", "P", "mov", "off", "tgt", "wt"):
                if m and hasattr(x, key):
                    d[key][b, w, :m] = getattr(x, key)[w]
    return {key: torch.from_numpy(v) for key, v in d.items()}


if __name__ == "__main__":
    import time

    rng = random.Random(1)
    for n in (1, 2, 4):
        for kind in SCHEDULES:
            items = problem(rng, 5)
            L = simulate(rng, items, draw_names(rng, n), kind, 0.1)
            print(n, kind, "passes", L.passes, "tokens", n_tokens(L), L.ended)
            print(repr(text(L.prompt)))
            for w in range(n):
                print("   ", repr(text(L.tok[w])))
    t, m = time.time(), 0
    for i in range(100):
        m += n_tokens(simulate(rng, problem(rng, 6), draw_names(rng, 1 + i % 4), rng.choice(SCHEDULES), 0.1))
    print("tokens/s", m / (time.time() - t), "mean", m / 100)
    for k in (3, 4, 6, 8, 9):
        print(k, [float(np.mean([simulate(rng, problem(rng, k), DEFAULT_NAMES[:n]).passes for _ in range(60)])) for n in (1, 2, 3, 4)])
