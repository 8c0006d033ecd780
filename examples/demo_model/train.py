"""Trains the demonstration model: `python train.py` (two processes of one thread each).

Muon for the matrices, Adam for the rest; constant rate, then linear to zero over the last 60 %. The amount of
work is a wall-clock budget, so another machine sees another number of tokens; both are recorded.
"""

import argparse
import json
import os
import platform
import random
import sys
import time

# Large buffers come and go all the time: without this, half of the time goes into page faults.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "8000000000")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "16000000000")
os.environ.setdefault("MALLOC_TOP_PAD_", "200000000")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import model as net  # noqa: E402
import task  # noqa: E402
from vocab import *  # noqa: E402, F403


def arguments():
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", default="run", help="folder of checkpoints and curve")
    ap.add_argument("--minutes", type=float, default=41)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--ranks", type=int, default=2)
    ap.add_argument("--tokens", type=int, default=3000, help="per step and rank")
    ap.add_argument("--muon", type=float, default=0.02)
    ap.add_argument("--adam", type=float, default=4e-3)
    ap.add_argument("--init", help="checkpoint to go on from, at the full task and a rate that falls at once")
    ap.add_argument("--workers", type=lambda s: [int(x) for x in s.split(",")], default=[1, 2, 2, 3, 3, 4, 4])
    return ap.parse_args()


def draw_batch(shared, own, done, budget, workers, level):
    """A batch of one number of workers; the task grows over the first fifth of the run."""
    grow = min(1.0, done * 5)
    k_max = 2 + round(grow * (task.MAX_ITEMS - 2))
    more = 2 + round(grow * (task.MAX_MORE - 2))
    n = shared.choice(workers if done > 0.05 else [1, 2])
    k = max(shared.randint(2, k_max), shared.randint(2, k_max))
    out, total = [], 0
    while total < budget:
        kind = own.choice(task.SCHEDULES[1:]) if done > 0.08 and own.random() < 0.45 else "normal"
        noise = 0.1 if own.random() < 0.4 else 0.0
        items = task.problem(own, max(2, k - own.randint(0, 1)), task.MIN_MORE, more)
        if level and own.random() < 0.5:
            items = task.level_problem(own, len(items))
        run = task.simulate(own, items, task.draw_names(own, n), kind, noise, clash=6.0 if level else 2.0)
        if task.n_tokens(run) > 1400:
            continue
        out.append(run)
        total += task.n_tokens(run)
    return task.collate(out), total


def orthogonal(g):
    """Newton–Schulz iteration of Muon."""
    x = (g / (g.norm() + 1e-7)).bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    for _ in range(5):
        b = x @ x.t()
        x = 3.4445 * x + (-4.7750 * b + 2.0315 * b @ b) @ x
    return (x.t() if tall else x).float()


def run(rank, a):
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    shared, own = random.Random(a.seed + 100), random.Random(a.seed + 1000 + rank)
    if a.ranks > 1:
        sync = os.path.abspath(os.path.join(a.out, "sync"))
        dist.init_process_group("gloo", init_method=f"file://{sync}", rank=rank, world_size=a.ranks)
    net.weigh = torch.compile(net.weigh, dynamic=True)
    m = net.Model()
    if a.init:
        m.load_state_dict(torch.load(a.init)["model"])
    mats = [p for n, p in m.named_parameters() if p.ndim == 2 and n != "emb"]
    rest = [p for n, p in m.named_parameters() if p.ndim != 2 or n == "emb"]
    adam = torch.optim.AdamW(rest, lr=a.adam, betas=(0.9, 0.98), weight_decay=0.0)
    bufs = [torch.zeros_like(p) for p in mats]
    params = sum(p.numel() for p in m.parameters())
    curve = None
    if rank == 0:
        info = dict(parameters=params, vocabulary=len(VOCAB), torch=torch.__version__, python=platform.python_version(),
                    **{key: value for key, value in vars(a).items() if key not in ("out", "init")})
        json.dump(info, open(os.path.join(a.out, "run.json"), "w"), indent=1)
        curve = open(os.path.join(a.out, "curve.csv"), "w")
        curve.write("seconds,step,tokens,loss,claims,answers,digits,runs_right\n")
        print(info, flush=True)
    is_digit = torch.zeros(len(VOCAB), dtype=torch.bool)
    is_digit[DIGIT] = True
    is_claim = torch.zeros(len(VOCAB), dtype=torch.bool)
    is_claim[[*CLAIM, TAKEN, COLON, ANSWER, WAIT, BOX]] = True
    hits = torch.zeros(2, 4)
    t0, tokens, step, done, saved = time.time(), 0, 0, 0.0, 0
    losses = []
    while done < 1:
        b, n = draw_batch(shared, own, 1.0 if a.init else done, a.tokens, a.workers, bool(a.init))
        rows = b["wt"] > 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = m(b, rows)
        y, w = b["tgt"][rows], b["wt"][rows]
        ce = F.cross_entropy(logits.float(), y, reduction="none")
        loss = (ce * w).sum() / w.sum()
        for p in m.parameters():
            p.grad = None
        loss.backward()
        seconds = time.time() - t0
        if a.ranks > 1:
            flat = torch.cat([p.grad.flatten() for p in m.parameters()] + [torch.tensor([seconds if rank == 0 else 0.0, float(n), loss.item()])])
            dist.all_reduce(flat)
            seconds, n, mean = flat[-3].item(), int(flat[-2].item()), flat[-1].item() / a.ranks
            at = 0
            for p in m.parameters():
                p.grad.copy_(flat[at : at + p.numel()].view_as(p) / a.ranks)
                at += p.numel()
        else:
            mean = loss.item()
        done = seconds / 60 / a.minutes
        rate = min(1, (step + 1) / (20 if a.init else 50)) * min(1, max(0.0, (1 - done) / (1 if a.init else 0.6)))
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for group in adam.param_groups:
            group["lr"] = a.adam * rate
        adam.step()
        with torch.no_grad():
            # The ranks share the orthogonalisation.
            ups = []
            for i, (p, buf) in enumerate(zip(mats, bufs)):
                buf.mul_(0.95).add_(p.grad, alpha=0.05)
                ups.append(orthogonal(p.grad * 0.05 + buf * 0.95) if i % a.ranks == rank else torch.zeros_like(p))
            if a.ranks > 1:
                flat = torch.cat([u.flatten() for u in ups])
                dist.all_reduce(flat)
                ups = [u.view_as(p) for u, p in zip(flat.split([p.numel() for p in mats]), mats)]
            for p, u in zip(mats, ups):
                p.mul_(1 - a.muon * rate * 0.05).add_(u, alpha=-a.muon * rate * max(1, p.shape[0] / p.shape[1]) ** 0.5)
        tokens += n
        step += 1
        losses.append(mean)
        with torch.no_grad():
            hit = logits.argmax(-1) == y
            # A digit in the box, as opposed to one of the running sums.
            boxed = ((b["tok"] == BOX).cumsum(-1) > 0)[rows]
            kinds = [is_claim[y], boxed, is_digit[y] & ~boxed]
            for i, s in enumerate(kinds):
                hits[:, i] += torch.tensor([(hit & s).sum(), s.sum()])
            problem = rows.nonzero()[:, 0]
            wrong = torch.zeros(len(b["tok"])).index_add_(0, problem, (~hit).float())
            hits[:, 3] += torch.tensor([(wrong == 0).sum(), len(wrong)])
        if step % 25 == 0 and rank == 0:
            r = (hits[0] / hits[1].clamp(min=1)).tolist()
            line = f"{seconds:.0f},{step},{tokens},{sum(losses) / len(losses):.4f}," + ",".join(f"{x:.4f}" for x in r)
            curve.write(line + "\n")
            curve.flush()
            print(line, f"{tokens / seconds:.0f}/s", flush=True)
            hits.zero_()
            losses.clear()
        if rank == 0 and int(done * 10) > saved:
            saved = int(done * 10)
            torch.save(dict(model=m.state_dict(), tokens=tokens, seconds=seconds), os.path.join(a.out, "checkpoint.pt"))
    if rank == 0:
        torch.save(dict(model=m.state_dict(), tokens=tokens, seconds=seconds), os.path.join(a.out, "final.pt"))
        info.update(tokens_seen=tokens, steps=step, seconds=round(seconds))
        json.dump(info, open(os.path.join(a.out, "run.json"), "w"), indent=1)
        print("done", info, flush=True)


if __name__ == "__main__":
    args = arguments()
    os.makedirs(args.out, exist_ok=True)
    sync = os.path.join(args.out, "sync")
    if os.path.exists(sync):
        os.remove(sync)
    if args.ranks == 1:
        run(0, args)
        sys.exit()
    import torch.multiprocessing as mp

    mp.spawn(run, (args,), nprocs=args.ranks)
