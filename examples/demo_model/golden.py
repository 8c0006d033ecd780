"""Writes a run of two workers as a golden case: `python golden.py run/final.pt ../../tests/golden/demo_trace`.

The format is `hogwild-golden-1` (tests/golden/README.md). The numbers are the trainer's, computed step by step in
double precision from the weights as they are stored.
"""

import json
import os
import platform
import random
import sys

import numpy as np
import torch
from safetensors.numpy import save_file

import task
from evaluate import load
from infer import Naive, Run
from vocab import *  # noqa: F403


def main(checkpoint, out, items=4, seed=5):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    m = load(checkpoint).double()
    names = DEFAULT_NAMES[:2]
    rng = random.Random(seed)
    problem = task.problem(rng, items, 1, 4)
    run = Run(problem, names, "normal", 0)
    prompt = task.prompt_ids(problem)
    e = Naive(m, prompt, 2)
    events, tensors = [], {}
    length = {"common": 0, "header_others": 0, "header_own": 0, "w0": 0, "w1": 0}
    views = [["common", "header_others", f"w{1 - w}", "header_own", f"w{w}"] for w in (0, 1)]

    def row(worker, view, tokens, logits, index, at):
        name = f"fwd_{index:03d}.row{at}"
        tensors[name] = logits.numpy().astype(np.float32)
        top = logits[-1].topk(2).values
        lengths = [length[b] for b in view]
        starts = [sum(lengths[:i]) for i in range(len(view))]
        end = sum(lengths)
        return dict(
            worker=worker, view=view, write_to=view[-1], tokens=tokens, positions=[end - len(tokens), end],
            view_block_starts=starts, view_block_lengths=lengths, logits=name, argmax_last=int(logits[-1].argmax()),
            top1_minus_top2=round(float(top[0] - top[1]), 6),
        )

    index = 0
    for block, tokens in (("common", prompt), ("header_others", [OTHERS]), ("header_own", [OWN])):
        length[block] = len(tokens)
        logits = e.solo(tokens, logits=True)[1]
        events.append(dict(op="forward", index=index, kind="prefill", rows=[row(None, [block], tokens, logits, index, 0)]))
        index += 1
    while not run.over:
        for w in (0, 1):
            if run.closed[w]:
                n, before = length[f"w{w}"], length["common"]
                events.append(dict(op="move", worker=w, src=f"w{w}", dst="common", n_tokens=n, dst_len_before=before, rotate_keys_by=before))
                length["common"], length[f"w{w}"] = before + n, 0
        feeds = run.turn()
        got = e.step(feeds, run.closed)
        for w in (0, 1):
            length[f"w{w}"] += len(feeds[w])
        rows = [row(w, views[w], feeds[w], got[w], index, w) for w in (0, 1)]
        kind = "worker_prompts" if index == 3 else "decode"
        events.append(dict(op="forward", index=index, kind=kind, rows=rows))
        index += 1
        chosen = []
        for w in (0, 1):
            got[w][-1, [ID["<|endoftext|>"], ID["#"]]] = float("-inf")
            chosen.append(int(got[w][-1].argmax()))
        run.observe(chosen)
    script = dict(
        format="hogwild-golden-1", case="demo_trace", model_dir="../../../examples/demo_model/model", layout="combined",
        n_workers=2, views={f"worker{w}": views[w] for w in (0, 1)}, write_to={f"worker{w}": f"w{w}" for w in (0, 1)},
        compute_dtype="float64, rounded to float32", reference="examples/demo_model/infer.py, Naive",
        versions=dict(python=platform.python_version(), torch=torch.__version__.split("+")[0], numpy=np.__version__),
        final_block_lengths=length, problem=task.problem_text(problem), answer=run.answer, passes=run.passes, events=events,
    )
    os.makedirs(out, exist_ok=True)
    with open(f"{out}/script.json", "w") as f:
        json.dump(script, f, separators=(",", ":"))
        f.write("\n")
    save_file(tensors, f"{out}/expected.safetensors")
    os.chmod(f"{out}/expected.safetensors", 0o644)
    print(task.problem_text(problem), run.answer, f"{run.passes} passes", sum(ev["op"] == "move" for ev in events), "moves")


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
