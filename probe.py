"""What are the features good for? Linear probing of the frozen encoder.

    python probe.py --ckpt out/shapes-tiny-mdc/ckpt.pt --dataset shapes              # every attribute of the drawings
    python probe.py --ckpt out/flickr8k-tiny-mdc/ckpt.pt --dataset cifar10 --source raw/cifar10

The features of an image are the mean of its patch tokens after the encoder's final LayerNorm, computed once, in
float32, from the central square without augmentation, then standardized with the training images' mean and deviation.
On them a multinomial logistic regression is fitted to convergence. Its L2 strength is chosen on a held-out tenth of
the training images, then it is fitted again on all of them, and the test images are looked at once.

Beside every figure stands the same encoder at random initialization: the floor, and on small pictures a high one.

--source is a folder with train and test (or val): either folders of class folders of images, or tars whose members are
class/file, named train.tar and test.tar or DATASET-train.tar and DATASET-test.tar.
"""
import argparse
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    IMAGE_TYPES,
    SHAPES_CAPTION,
    BadSample,
    UserError,
    crop_square,
    decode_caption,
    open_image,
    open_split,
    run,
)
from model import Captioner
from sample import load_captioner

STRENGTHS = np.logspace(-6, 5, 12)                    # scikit-learn's inverse L2 strength C; DINOv2's range
PIXEL_BATCH = 256


# ---------------------------------------------------------------------------------------------- labelled images
def find_labelled(source, dataset, names):
    """The folder or tar of a split: SOURCE/NAME, SOURCE/NAME.tar or SOURCE/DATASET-NAME.tar for one of `names`."""
    tried = [Path(source) / form for name in names for form in (name, f"{name}.tar", f"{dataset}-{name}.tar")]
    for path in tried:
        if path.exists():
            return path
    inside = ", ".join(sorted(os.listdir(source))[:8]) if os.path.isdir(source) else "no such folder"
    raise UserError(f"--source {source} has none of {', '.join(path.name for path in tried)} (found: {inside}); "
                    f"expected folders {names[0]}/CLASS/image.jpg or tars of CLASS/image.jpg")


def read_labelled(path, side):
    """Folder of class folders or tar of class/file -> images [n,side,side,3] uint8, class names [n].

    Raises UserError that names the image if one cannot be read: an evaluation never drops samples silently.
    """
    if path.is_dir():
        files = [(file.parent.name, str(file), file) for file in sorted(path.glob("*/*"))]
    else:
        try:
            with tarfile.open(path, "r:") as tar:     # the few bytes of small labelled sets fit in memory
                files = [(Path(m.name).parent.name, f"{path}:{m.name}", io.BytesIO(tar.extractfile(m).read()))
                         for m in sorted(tar, key=lambda m: m.name) if m.isreg()]
        except tarfile.TarError as problem:
            raise UserError(f"{path} is not a readable tar ({problem})") from None
    files = [entry for entry in files if entry[1].lower().rpartition(".")[2] in IMAGE_TYPES]
    if not files:
        raise UserError(f"{path} has no images in class folders; expected CLASS/image.jpg (or png, webp)")
    images = np.empty((len(files), side, side, 3), np.uint8)
    for i, (_, name, file) in enumerate(tqdm(files, desc=path.name, unit="image", dynamic_ncols=True)):
        try:
            images[i] = crop_square(open_image(file, side), side)
        except BadSample as reason:
            raise UserError(f"{name}: {reason}; an evaluation needs every image") from None
    return images, np.array([label for label, _, _ in files])


def read_shapes(data_dir, split, side, limit=None):
    """Images [n,side,side,3] of the embedded data set and {attribute: labels [n]}, read off their captions."""
    shards = open_split(data_dir, "shapes", split)
    count = min(limit or len(shards), len(shards))
    images = np.stack([crop_square(shards.image(i), side) for i in range(count)])
    captions = [SHAPES_CAPTION.fullmatch(decode_caption(shards.tokenizer, shards.captions(i)[0])) for i in range(count)]
    return images, {name: np.array([caption[name] for caption in captions]) for name in SHAPES_CAPTION.groupindex}


# ---------------------------------------------------------------------------------------------- features and probe
@torch.no_grad()
def compute_features(model, images, device):
    """images [n,S,S,3] uint8 -> float32 features [n,D]: the mean of the patch tokens."""
    batches = (torch.from_numpy(images[i:i + PIXEL_BATCH]).to(device) for i in range(0, len(images), PIXEL_BATCH))
    return torch.cat([model.encode(batch).mean(1).cpu() for batch in batches])


def fit_logistic(features, labels, classes, strength, start=None):
    """Multinomial logistic regression with L2, in float64, to convergence.

    Minimizes strength * sum of cross-entropies + |W|^2/2 (scikit-learn's objective; the bias is free) by L-BFGS.
    features [n,D], labels [n] in 0..classes-1, start: a solution to begin from -> weights [D+1,classes], bias last.
    """
    n, D = features.shape
    weights = torch.zeros(D + 1, classes, dtype=torch.float64) if start is None else start.clone()
    weights.requires_grad_()
    scale = 1 / (strength * n + 1)                    # keeps the loss at most about 1 for every strength
    solver = torch.optim.LBFGS([weights], max_iter=1000, max_eval=2000, history_size=20, tolerance_grad=1e-6,
                               tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = scale * (strength * F.cross_entropy(features @ weights[:-1] + weights[-1], labels, reduction="sum")
                        + weights[:-1].square().sum() / 2)
        loss.backward()
        return loss

    solver.step(objective)
    return weights.detach()


def linear_probe(train, train_labels, test, test_labels, seed=0):
    """Features [n,D] and labels (names) [n] of both splits -> {"top1", "top5", "mean_class", "C"}; shares, not percent.

    C is the strength with the best accuracy on a random tenth of `train` (the smallest of equals).
    """
    names, labels = np.unique(train_labels, return_inverse=True)
    unknown = set(test_labels) - set(names)
    if unknown:
        raise UserError(f"test images of classes without training images: {', '.join(sorted(unknown)[:5])}")
    labels, test_labels = torch.from_numpy(labels), torch.from_numpy(np.searchsorted(names, test_labels))
    mean, deviation = train.double().mean(0), train.double().std(0).clamp(min=1e-6)
    train, test = ((x.double() - mean) / deviation for x in (train, test))
    held_out = torch.zeros(len(train), dtype=torch.bool)
    held_out[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:len(train) // 10]] = True
    best, chosen, weights = -1.0, None, None
    for strength in STRENGTHS:                        # from strong to weak L2, each from the solution before
        weights = fit_logistic(train[~held_out], labels[~held_out], len(names), strength, weights)
        guess = (train[held_out] @ weights[:-1] + weights[-1]).argmax(1)
        accuracy = float((guess == labels[held_out]).double().mean())
        if accuracy > best:
            best, chosen, start = accuracy, strength, weights
    weights = fit_logistic(train, labels, len(names), chosen, start)
    logits = test @ weights[:-1] + weights[-1]
    right = (logits.argmax(1) == test_labels).double()
    top5 = (logits.topk(min(5, len(names))).indices == test_labels[:, None]).any(1).double()
    per_class = [float(right[test_labels == c].mean()) for c in range(len(names)) if (test_labels == c).any()]
    return {"top1": float(right.mean()), "top5": float(top5.mean()), "mean_class": float(np.mean(per_class)),
            "C": float(chosen)}


def main():
    """Read the labelled images, probe the trained and the random encoder, print and append to probe.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="checkpoint of train.py; results go to probe.jsonl beside it")
    add("--dataset", required=True, help="shapes, or any name for the labelled images in --source")
    add("--source", metavar="DIR", help="folder with train and test; see above")
    add("--data-dir", default="data", metavar="DIR", help="of the shards of shapes (default: data)")
    add("--limit", type=int, default=200, metavar="N", help="labelled training images of shapes (default: 200; with "
        "thousands of such simple pictures a random encoder will do)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, else cpu")
    add("--seed", type=int, default=0, help="of the random encoder and of the held-out tenth (default: 0)")
    args = parser.parse_args()
    if args.limit < 20:
        raise UserError(f"--limit {args.limit}: expected at least 20")
    model, checkpoint = load_captioner(args.ckpt, args.device)
    side = model.config.image_size
    if args.dataset == "shapes":
        (images, tasks), (test_images, test_tasks) = (read_shapes(args.data_dir, *which)
                                                             for which in (("train", side, args.limit), ("val", side)))
    elif args.source:
        images, labels = read_labelled(find_labelled(args.source, args.dataset, ["train"]), side)
        test_images, test_labels = read_labelled(find_labelled(args.source, args.dataset, ["test", "val"]), side)
        tasks, test_tasks = {"class": labels}, {"class": test_labels}
    else:
        raise UserError(f"--source is missing: a folder with the training and test images of {args.dataset}")
    if len(images) < 20:
        raise UserError(f"{len(images)} training images: expected at least 20")
    torch.manual_seed(args.seed)
    random_model = Captioner(model.config).to(args.device).eval()
    features = {name: [compute_features(encoder, x, args.device) for x in (images, test_images)]
                for name, encoder in (("trained", model), ("random", random_model))}
    print(f"{args.dataset}: {len(images):,} training and {len(test_images):,} test images at {side} px, features of "
          f"{model.config.size} after {checkpoint['step']:,} steps\n\n"
          f"{'':12}{'classes':>8}{'trained':>10}{'random init':>13}{'gain':>7}   top-1 %")
    results = {}
    for task in tasks:
        results[task] = {name: linear_probe(train, tasks[task], test, test_tasks[task], args.seed)
                         for name, (train, test) in features.items()}
        trained, floor = results[task]["trained"], results[task]["random"]
        print(f"{task:12}{len(set(tasks[task])):8}{100 * trained['top1']:10.1f}{100 * floor['top1']:13.1f}"
              f"{100 * (trained['top1'] - floor['top1']):+7.1f}   top-5 {100 * trained['top5']:.1f}, "
              f"mean per class {100 * trained['mean_class']:.1f}, C {trained['C']:.2g}", flush=True)
    with open(Path(args.ckpt).parent / "probe.jsonl", "a") as file:
        file.write(json.dumps({"dataset": args.dataset, "ckpt": args.ckpt, "step": checkpoint["step"],
                               "seed": args.seed, "train": len(images), "test": len(test_images),
                               "results": results}) + "\n")


if __name__ == "__main__":
    run(main)
