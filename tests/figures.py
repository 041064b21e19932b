"""The figures of the README that are neither a run's own nor tests/miniature.py's. By hand; pytest does not collect it.

    python tests/figures.py                      # assets/method.svg: one caption at several times
    python tests/figures.py out/A out/B ...      # assets/positions.png: cost of a wrong image, by token position

out/A, out/B, ... are runs of train.py. Those on the same data share a panel, those that differ by their seed a curve.
Needs matplotlib (requirements-dev.txt).
"""

import argparse
import json
import sys
from html import escape
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import diffusion  # noqa: E402
import sample  # noqa: E402

SEED, ROWS = 56, 5
SHAPES_PATTERN = "a size colour form at the row column of a colour background end"
LEAST_CAPTIONS = 30  # positions that fewer captions reach say nothing


def draw_method(path):
    """A drawing of `shapes` and its caption, masked by diffusion.mask_tokens at stratified times, with the weights."""
    image, caption = data.draw_shapes(SEED, 256)
    words = [*caption.split(), "end"]
    times = diffusion.stratified_times(0.5, torch.arange(ROWS) / ROWS).sort().values
    ratios, weights = diffusion.linear(times)
    noise = torch.rand(len(words), generator=torch.Generator().manual_seed(SEED)).expand(ROWS, -1)
    masks = diffusion.mask_tokens(noise, torch.ones(ROWS, len(words), dtype=torch.bool), ratios)
    parts, lefts, dark, grey = [], [], "#1c2330", "#5b6472"
    widths = [8.2 * len(word) + 14 for word in words]
    for i in range(len(words)):
        lefts.append(250 + sum(widths[:i]) + 8 * i)
    right, top, row_height = lefts[-1] + widths[-1] + 28, 92, 44
    width, height = right + 96, top + ROWS * row_height + 48

    def text(x, y, words, colour=dark, size=15, more=""):
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" {more}>{escape(words)}</text>')

    def box(x, y, w, h, fill, more=""):
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="6" fill="{fill}" {more}/>')

    box(0.5, 0.5, width - 1, height - 1, "#ffffff", 'stroke="#d9dde4"')
    parts.append(f'<image x="24" y="{top}" width="{ROWS * 30}" height="{ROWS * 30}" href="{sample.data_uri(image)}"/>')
    titles = {24: "image", 200: "t", lefts[0]: "caption, and what the decoder sees of it", right: "weight 1/t"}
    for x, name in titles.items():
        text(x, 36, name, grey, 13)
    for word, left, w in zip(words, lefts, widths, strict=True):
        text(left + w / 2, top - 26, word, more='text-anchor="middle"')
    for t, weight, mask, y in zip(times, weights, masks, range(top, height, row_height), strict=False):
        text(200, y + 20, f"{t:.2f}")
        for word, left, w, masked in zip(words, lefts, widths, mask, strict=True):
            box(left, y, w, 30, "#2f6fde" if masked else "#f1f3f6", "" if masked else 'stroke="#d9dde4"')
            if not masked:
                text(left + w / 2, y + 20, word, more='text-anchor="middle"')
        box(right, y + 9, 18 * weight, 12, "#d9730d")
        text(right + 18 * weight + 8, y + 20, f"{weight:.2f}")
    claim = "A word is masked with probability t and then weighs 1/t: 1 on average, at every t and wherever it stands."
    text(lefts[0], height - 22, claim, grey, 14)
    size = f'viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'
    path.write_text("\n".join([head, f"<title>{escape(caption)}</title>", *parts, "</svg>", ""]), encoding="utf-8")


def read_run(folder):
    """A run's folder -> (its last record, its options)."""
    _, checkpoint = sample.load_captioner(folder / "ckpt.pt")
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1]), checkpoint["options"]


def draw_positions(panels, path):
    """The paper's argument as a figure: of each data set a panel with a curve for each objective.

    panels {data set: {objective: [by_position of each seed]}}, by_position [[wrong_image, its standard error,
    captions], ...], from the last record of log.jsonl. Lines are means over seeds, points single seeds. The standard
    error is the mean over seeds: they share the validation images, so averaging them does not lower it.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    figure, columns = plt.subplots(1, len(panels), figsize=(1.5 + 5.5 * len(panels), 3.6), squeeze=False)
    for axes, (data_set, curves) in zip(columns[0], panels.items(), strict=True):
        for number, (name, seeds) in enumerate(curves.items()):
            values = np.array(seeds)  # [seeds, positions, 3]
            kept = values[0, :, 2] >= LEAST_CAPTIONS
            x = np.flatnonzero(kept) + 1 + 0.2 * (number - (len(curves) - 1) / 2)
            cost, error, _ = values[:, kept].mean(0).T
            axes.errorbar(x, cost, error, color=f"C{number}", lw=1, capsize=3, label=name)
            for seed in values[:, kept, 0]:
                axes.plot(x, seed, ".", color=f"C{number}", ms=5)
        axes.axhline(0, color="grey", lw=0.8)
        axes.set(xlabel="token position in the caption", title=data_set)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if data_set == "shapes":  # its captions have one pattern
            words = SHAPES_PATTERN.split()
            axes.set_xticks(range(1, len(words) + 1), words, rotation=30, ha="right")
        axes.grid(alpha=0.3)
        axes.legend()
    columns[0, 0].set(ylabel="cost of a wrong image, nats")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="OUT", help="folders of runs")
    folders = parser.parse_args().runs
    if not folders:
        draw_method(ROOT / "assets" / "method.svg")
        return
    panels = {}
    for record, options in map(read_run, folders):
        curves = panels.setdefault(options["dataset"], {})
        curves.setdefault(options["objective"], []).append(record["by_position"])
    draw_positions(panels, ROOT / "assets" / "positions.png")


if __name__ == "__main__":
    main()
