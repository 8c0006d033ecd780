"""Tables and the training curve from a run's records: `python report.py run .` prints and writes them."""

import csv
import json
import os
import shutil
import sys


def table(rows):
    out = [
        "| setting | workers | items | n | all right | 95 % interval | items right | passes | policy's | ratio | done twice |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ks = r["items"]
        ks = str(ks[0]) if len(ks) == 1 else f"{ks[0]}–{ks[-1]}"
        low, high = r["interval"]
        out.append(
            f"| {r['setting']} | {r['workers']} | {ks} | {r['n']} | {r['right']:.1%} | {low:.1%}–{high:.1%} | "
            f"{r['items_right']:.1%} | {r['passes']:.1f} | {r['script']:.1f} | {r['ratio']:.3f} | {r['twice']:.1%} |"
        )
    return "\n".join(out)


def curve(rows, path):
    """Share of right choices over tokens seen, as an SVG."""
    w, h, pad = 640, 300, 40
    end = max(float(r["tokens"]) for r in rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" font-family="sans-serif" font-size="12">',
        f'<rect width="{w}" height="{h}" fill="white"/>',
    ]
    for i in range(6):
        y = h - pad - i / 5 * (h - 2 * pad)
        lines.append(f'<path d="M{pad} {y:.0f}H{w - pad}" stroke="#ddd"/><text x="4" y="{y + 4:.0f}">{20 * i} %</text>')
    names = [("claims", "#1b6ca8"), ("digits", "#2a9d4a"), ("answers", "#c77c11"), ("runs_right", "#b3202c")]
    for i, (key, colour) in enumerate(names):
        points = " ".join(
            f"{pad + float(r['tokens']) / end * (w - 2 * pad):.1f},{h - pad - float(r[key]) * (h - 2 * pad):.1f}" for r in rows
        )
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        lines.append(f'<text x="{pad + 110 * i}" y="20" fill="{colour}">{key.replace("_", " ")}</text>')
    lines.append(f'<text x="{w - pad}" y="{h - 12}" text-anchor="end">{end / 1e6:.1f} million tokens seen</text></svg>')
    with open(path, "w") as f:
        f.write("\n".join(lines) + "\n")


def main(run, out):
    os.makedirs(f"{out}/results", exist_ok=True)
    rows, about = [], []
    for stage in (run, f"{run}/second"):
        with open(f"{stage}/run.json") as f:
            about.append(json.load(f))
        with open(f"{stage}/curve.csv") as f:
            for r in csv.DictReader(f):
                for key, of in (("seconds", "seconds"), ("step", "steps"), ("tokens", "tokens_seen")):
                    r[key] = int(r[key]) + sum(a[of] for a in about[:-1])
                rows.append(r)
    with open(f"{out}/results/run.json", "w") as f:
        json.dump(about, f, indent=1)
        f.write("\n")
    with open(f"{out}/results/curve.csv", "w") as f:
        to = csv.DictWriter(f, rows[0], lineterminator="\n")
        to.writeheader()
        to.writerows(rows)
    curve(rows, f"{out}/results/curve.svg")
    if os.path.exists(f"{run}/evaluation.jsonl"):
        shutil.copy(f"{run}/evaluation.jsonl", f"{out}/results/evaluation.jsonl")
        with open(f"{run}/evaluation.jsonl") as f:
            print(table([json.loads(line) for line in f]))


if __name__ == "__main__":
    main(*sys.argv[1:])
