"""Checks the parallel attention of training against step-by-step inference, on random weights."""

import random

import torch

import task
from infer import Batch, Naive
from model import Config, Model
from vocab import text


def feeds_of(run):
    """The feeds and closed blocks of every pass of a simulated run, read back from its layout."""
    for t in range(run.t + 1):
        feeds = [[x for x, p in zip(run.tok[w], run.pas[w]) if p == t] for w in range(run.n)]
        yield feeds, [t in run.mov[w] for w in range(run.n)]


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    m = Model(Config(layers=3))
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim == 2 else None
    rng = random.Random(7)
    worst = {"naive": 0.0, "batch": 0.0}
    for n in (1, 2, 3, 4):
        for kind in task.SCHEDULES:
            run = task.simulate(rng, task.problem(rng, 3), task.draw_names(rng, n), kind, 0.1)
            with torch.no_grad():
                want = m(task.collate([run, run]))[0]
            naive, batch, at = Naive(m, run.prompt, n), Batch(m, [run.prompt], n, len(max(run.tok, key=len)) + 1), [0] * n
            for feeds, closed in feeds_of(run):
                a, b = naive.step(feeds, closed), batch.step({0: feeds}, {0: closed}, [0])
                for w in range(n):
                    if feeds[w]:
                        e = at[w] + len(feeds[w])
                        d = (a[w] - want[w, at[w] : e]).abs().max().item()
                        worst["naive"] = max(worst["naive"], d)
                        keep = b[0, w].isfinite()
                        worst["batch"] = max(worst["batch"], (b[0, w] - want[w, e - 1])[keep].abs().max().item())
                        at[w] = e
    print("largest difference of a logit:", worst, "; deviation of logits:", round(want.std().item(), 2))
    assert max(worst.values()) < 2e-3, text(run.prompt)


if __name__ == "__main__":
    main()
