"""The paper in miniature: every objective at an equal budget on the synthetic images, three seeds.

    python tests/miniature.py              # 45 minutes on two cores; typed again it goes on where it stopped

Every core has a run of its own, which is faster than one run on all of them. Writes out/miniature/results.jsonl, one
line a run, and from it a table, which it prints and puts between the miniature marks of tests/README.md, and
assets/miniature.png: (left) probe accuracy over BERT's masking ratio with MDC as a line, the paper's Fig. 4;
(right) probe accuracy over the number of training pairs, its Fig. 5. Needs matplotlib (requirements-dev.txt).
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import sample  # noqa: E402

OUT = ROOT / "out" / "miniature"
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs started here
STEPS = 900  # fewer than the preset's: at its end, the best would be at 97 to 100 % of everything
SEEDS = range(3)
LABELS, SCORED, DRAWS = 500, 512, 16  # labelled images of the probe; captions scored, with so many random masks each
TABLE, RATIOS, PAIRS = ("mdc", "ar", "bert", "parallel", "clip"), (0.15, 0.3, 0.7, 0.9), (625, 2500)


def runs():
    """Every run of the study as (name, options of train.py)."""
    for seed in SEEDS:
        for objective in TABLE:
            yield f"{objective}-{seed}", ["--objective", objective, "--seed", seed]
        for ratio in RATIOS:
            yield f"bert{ratio}-{seed}", ["--objective", "bert", "--mask-ratio", ratio, "--seed", seed]
        for pairs in PAIRS:
            for objective in ("mdc", "ar", "clip"):
                yield f"{objective}@{pairs}-{seed}", ["--objective", objective, "--pairs", pairs, "--seed", seed]


def probe_encoder(ckpt):
    """Top-1 accuracy in percent by attribute of linear probes: ({task: trained}, {task: at random initialization})."""
    words = ["probe.py", "--ckpt", str(ckpt), "--dataset", "shapes", "--limit", str(LABELS)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    found = json.loads((ckpt.parent / "probe.jsonl").read_text().splitlines()[-1])["results"]
    return [{task: 100 * found[task][who]["top1"] for task in found} for who in ("trained", "random")]


def nats_a_token(model, checkpoint):
    """-log p(caption, length | image) a token on held-out captions: the bound over all ratios; exact for AR."""
    val = data.open_split("data", "shapes", "val")
    batch = data.Batches(val, SCORED, model.config.image_size, model.config.max_tokens, 0, augment=False)[0]
    captions = [row[valid].tolist() for row, valid in zip(batch["tokens"], batch["valid"], strict=True)]
    numbers = range(len(captions))
    with torch.no_grad():
        scores = sample.score_captions(model, model.encode(batch["images"]), captions, draws=DRAWS, items=numbers)
    scores += sample.length_terms(checkpoint["lengths"], captions, model.config)
    return -float(scores.sum()) / sum(map(len, captions))


def measure(name, options):
    """Train (or continue) a run and evaluate it: its line of results.jsonl."""
    options = [*map(str, options), "--steps", str(STEPS), "--eval-every", "0", "--out", str(OUT / name)]
    command = [sys.executable, "train.py", *options]
    subprocess.run(command, cwd=ROOT, check=True)
    model, checkpoint = sample.load_captioner(OUT / name / "ckpt.pt")
    final = json.loads((OUT / name / "log.jsonl").read_text().splitlines()[-1])
    nats = None if model.config.objective == "clip" else nats_a_token(model, checkpoint)
    trained, floor = probe_encoder(OUT / name / "ckpt.pt")
    row = {"name": name, "nats": nats, "exact": final.get("exact"), "minutes": final["minutes"]}
    return row | {"probe": trained, "random": floor, "machine": final["machine"]}


def spread(values, digits=1, scale=1):
    """Mean and standard deviation over seeds as text, `-` where there is nothing."""
    values = [scale * value for value in values if value is not None]
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else "-"


def write_table(results):
    """Print the table in markdown, and put it between the marks where there are any."""
    tasks = list(results["mdc-0"]["probe"])
    lines = [
        f"| objective | bound, nats per token | exact captions, % | mean | {' | '.join(tasks)} | minutes |",
        "| --- " * (len(tasks) + 5) + "|",
    ]
    for objective in TABLE:
        rows = [results[f"{objective}-{seed}"] for seed in SEEDS]
        columns = [spread([row["nats"] for row in rows], 4), spread([row["exact"] for row in rows], 1, 100)]
        columns.append(spread([mean(row["probe"].values()) for row in rows]))
        columns += [spread([row["probe"][task] for row in rows]) for task in tasks]
        lines.append(f"| `{objective}` | {' | '.join(columns)} | {mean(row['minutes'] for row in rows):.1f} |")
    for name, objective in (("random", "mdc"), ("random, of `clip`", "clip")):
        floors = [results[f"{objective}-{seed}"]["random"] for seed in SEEDS]
        columns = [spread([mean(floor.values()) for floor in floors])]
        columns += [spread([floor[task] for floor in floors]) for task in tasks]
        lines.append(f"| {name} | - | - | {' | '.join(columns)} | - |")
    table = "\n".join(lines) + "\n"
    print(table)
    path = ROOT / "tests" / "README.md"
    head, begin, rest = path.read_text(encoding="utf-8").partition("<!-- miniature -->\n")
    _, end, tail = rest.partition("<!-- end of miniature -->")
    if end:
        path.write_text(head + begin + table + end + tail, encoding="utf-8")


def draw_figures(results):
    """assets/miniature.png: the paper's Fig. 4 and Fig. 5 in miniature."""
    import matplotlib.pyplot as plt

    def accuracies(*names):
        return [[mean(results[f"{name}-{seed}"]["probe"].values()) for seed in SEEDS] for name in names]

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    ratios = sorted([*RATIOS, 0.5, 1.0])
    names = [{0.5: "bert", 1.0: "parallel"}.get(ratio, f"bert{ratio}") for ratio in ratios]
    right.set_xscale("log")
    [mdc] = accuracies("mdc")
    left.axhline(mean(mdc), color="C0", label="MDC (t from 0.5 to 1)")
    left.axhspan(min(mdc), max(mdc), color="C0", alpha=0.15)
    curves = [(left, ratios, names, "C1", "BERT, one ratio")]
    for colour, objective in zip(("C0", "C2", "C3"), ("mdc", "ar", "clip"), strict=True):
        names = [*(f"{objective}@{pairs}" for pairs in PAIRS), objective]
        curves.append((right, [*PAIRS, data.SHAPES_SAMPLES["train"]], names, colour, objective.upper()))
    for axes, x, names, colour, label in curves:
        points = accuracies(*names)
        axes.plot(x, [mean(p) for p in points], "-", color=colour, label=label)
        axes.plot(x, points, ".", color=colour)
    left.set(xlabel="masking ratio", ylabel=f"mean of six linear probes, {LABELS} labels, %", title="One ratio or many")
    right.set(xlabel="training pairs (equal steps)", title="More pairs")
    floor = mean(mean(results[f"mdc-{seed}"]["random"].values()) for seed in SEEDS)
    for axes in (left, right):
        axes.axhline(floor, color="grey", linestyle=":", label="random encoder")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.05))
    figure.savefig(ROOT / "assets" / "miniature.png", dpi=100)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / "results.jsonl"
    results = {row["name"]: row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    torch.set_num_threads(1)
    left = [(name, options) for name, options in runs() if name not in results]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(lambda run: measure(*run), left):
            results[row["name"]] = row
            with open(file, "a") as lines:
                lines.write(json.dumps(row) + "\n")
    write_table(results)
    draw_figures(results)


if __name__ == "__main__":
    main()
