"""Measures a checkpoint: `python evaluate.py run/final.pt` prints one JSON line for each setting.

Problems are fresh, decoding is greedy, weights are rounded to the stored type. Passes are compared with those of
the scripted policy on the same problems and schedules; intervals are Wilson's, 95 %.
"""

import argparse
import json
import math
import random
import time

import torch

import task
from infer import generate
from model import Model
from vocab import *  # noqa: F403


def load(path):
    m = Model()
    m.load_state_dict(torch.load(path)["model"])
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(p.half().float())
    return m.eval()


def wilson(right, n, z=1.96):
    p = right / n
    mid, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return [round((mid - half) / (1 + z * z / n), 4), round((mid + half) / (1 + z * z / n), 4)]


def measure(m, label, n_workers, n, ks, kinds=("normal",), sees="all", pool="default", seed=20_000, chunk=50):
    rng = random.Random(f"{seed} {n_workers} {ks}")
    problems = [task.problem(rng, rng.choice(ks)) for _ in range(n)]
    if pool == "default":
        names = [DEFAULT_NAMES[:n_workers]] * n
    elif pool == "swapped":
        names = [rng.sample(DEFAULT_NAMES[:4], n_workers) for _ in range(n)]
    elif pool == "second":
        names = [[DEFAULT_NAMES[i % 4]] for i in range(n)]
    else:
        names = [task.draw_names(rng, n_workers, fresh=True) for _ in range(n)]
    kind = [kinds[i % len(kinds)] for i in range(n)]
    seeds = [rng.randrange(2**32) for _ in range(n)]
    order = sorted(range(n), key=lambda i: sum(map(len, problems[i])))
    out, t = [], time.time()
    for i in range(0, n, chunk):
        at = order[i : i + chunk]
        pick = lambda x: [x[j] for j in at]  # noqa: E731
        out += generate(m, pick(problems), pick(names), pick(kind), pick(seeds), sees)
    script = [task.simulate(random.Random(s), p, a, c).passes for p, a, c, s in zip(problems, names, kind, seeds)]
    right = sum(x["right"] for x in out)
    mean = lambda key: sum(x[key] for x in out) / n  # noqa: E731
    row = dict(
        setting=label, workers=n_workers, items=ks, n=n, right=round(right / n, 4), interval=wilson(right, n),
        items_right=round(mean("items"), 4), finished=round(mean("finished"), 4), passes=round(mean("passes"), 2),
        script=round(sum(script) / n, 2), ratio=round(mean("passes") * n / sum(script), 4),
        twice=round(sum(x["twice"] for x in out) / max(1, sum(x["started"] for x in out)), 4), seconds=round(time.time() - t, 1),
    )
    print(json.dumps(row), flush=True)
    return row, out


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("checkpoint")
    ap.add_argument("-n", type=int, default=200)
    ap.add_argument("--skip", type=int, default=0, help="leave out that many settings")
    ap.add_argument("--out", help="JSON lines of all settings")
    ap.add_argument("--show", type=int, default=0, help="texts of that many runs of each setting")
    a = ap.parse_args()
    torch.set_num_threads(1)
    m, rows, wide = load(a.checkpoint), [], [3, 4, 5, 6, 7, 8]

    settings = [(("plain", n, a.n, wide), {}) for n in (1, 2, 3, 4)]
    settings += [((kind, n, a.n, wide, (kind,)), {}) for n in (2, 4) for kind in ("stalls", "late", "retire")]
    settings += [(("plain", n, a.n, [8]), {}) for n in (1, 2, 4)]
    settings += [(("unseen names", n, a.n, wide), dict(pool="reserved")) for n in (2, 4)]
    settings += [(("swapped names", 2, a.n, wide), dict(pool="swapped"))]
    # Masked: the others' words are hidden, the positions stay. Apart: the same workers in sessions of their own.
    half = a.n // 2
    for n in (2, 4):
        settings += [((f"only {sees} steps seen", n, half, [6]), dict(sees=sees)) for sees in ("own", "finished")]
        settings += [(("all seen", n, half, [6]), {})]
    settings += [(("sessions of their own", 1, half, [6]), dict(pool="second"))]
    for args, kw in settings[a.skip :]:
        row, out = measure(m, *args, **kw)
        rows.append(row)
        for x in out[-a.show :] if a.show else []:
            print(repr(x["prompt"]), *map(repr, x["streams"]), x["answer"], x["right"], sep="\n    ")
        if a.out:
            with open(a.out, "w") as f:
                f.writelines(json.dumps(r) + "\n" for r in rows)


if __name__ == "__main__":
    main()
