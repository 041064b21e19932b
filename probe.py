"""What are the features good for? Probes of the frozen encoder, and compositionality of the captioner.

    python probe.py --ckpt out/shapes-tiny-mdc/ckpt.pt --dataset shapes              # every attribute of the drawings
    python probe.py --ckpt out/flickr8k-tiny-mdc/ckpt.pt --dataset cifar10 --source raw/cifar10 --knn --shots 1,5,10
    python probe.py --ckpt out/shapes-tiny-mdc/ckpt.pt --dataset swaps               # true captions against wrong ones
    python probe.py --ckpt out/coco-S16-mdc/ckpt.pt --dataset sugarcrepe --source sugar-crepe/data --images val2017
    python probe.py --ckpt out/flickr8k-tiny-mdc/ckpt.pt --export encoder.pt         # the encoder alone, for timm

Linear probe: the features of an image are the mean of its patch tokens after the encoder's final LayerNorm, computed
once, in float32, from the central square without augmentation, then standardized with the training images' mean and
deviation. On them a multinomial logistic regression is fitted to convergence. Its L2 strength is chosen out of 45 on a
held-out tenth of the training images, then it is fitted again on all of them, and the test images are looked at once.
Beside every figure stands the same encoder at random initialization: the floor, and on small pictures a high one.

--source for labelled images is a folder with train and test (or val): folders of class folders, or tars of class/file
named train.tar or DATASET-train.tar; or CIFAR's binary archive, unpacked or not.

Compositionality: of each item's captions the true one, the first, has to score highest, strictly. Every score is also
taken with other images in place of the right one (`blind`): what is right there is the language's doing, not sight's.
"""
import argparse
import functools
import hashlib
import io
import json
import os
import re
import tarfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import (
    EXCHANGE,
    FORMS,
    IMAGE_TYPES,
    SHAPES_CAPTION,
    BadSample,
    UserError,
    check_least,
    crop_square,
    decode_caption,
    load_tokenizer,
    open_image,
    open_split,
    random_stream,
    run,
)
from model import SIZES, Captioner
from sample import length_terms, load_captioner, score_captions

STRENGTHS = np.logspace(-6, 5, 45)                    # scikit-learn's inverse L2 strength C; DINOv2's range
RATES = np.logspace(-3.5, 0.5, 9)                     # learning rates of the minibatch solver
METRIC = dict.fromkeys(("pets", "aircraft", "caltech101", "flowers"), "mean_class")     # of the others: top1
PIXEL_BATCH, EXCHANGES = 256, 2
# Relations of VG-Relation that read the same both ways, as ARO's authors list them: their macro mean leaves these out.
SYMMETRIC = set(re.split(r",\s+", """
adjusting, attached to, between, bigger than, biting, boarding, brushing, chewing, cleaning, climbing, close to,
coming from, coming out of, contain, crossing, dragging, draped over, drinking, drinking from, driving, driving down,
driving on, eating from, eating in, enclosing, exiting, facing, filled with, floating in, floating on, flying, flying
above, flying in, flying over, flying through, full of, going down, going into, going through, grazing in, growing in,
growing on, guiding, hanging from, hanging in, hanging off, hanging over, higher than, holding onto, hugging, in
between, jumping off, jumping on, jumping over, kept in, larger than, leading, leaning over, leaving, licking, longer
than, looking in, looking into, looking out, looking over, looking through, lying next to, lying on top of, making,
mixed with, mounted on, moving, on the back of, on the edge of, on the front of, on the other side of, opening,
painted on, parked at, parked beside, parked by, parked in, parked in front of, parked near, parked next to, perched
on, petting, piled on, playing, playing in, playing on, playing with, pouring, reaching for, reading, reflected on,
riding on, running in, running on, running through, seen through, sitting behind, sitting beside, sitting by, sitting
in front of, sitting near, sitting next to, sitting under, skiing down, skiing on, sleeping in, sleeping on, smiling
at, sniffing, splashing, sprinkled on, stacked on, standing against, standing around, standing behind, standing
beside, standing in front of, standing near, standing next to, staring at, stuck in, surrounding, swimming in,
swinging, talking to, topped with, touching, traveling down, traveling on, tying, typing on, underneath, wading in,
waiting for, walking across, walking by, walking down, walking next to, walking through, working in, working on, worn
on, wrapped around, wrapped in, by, of, near, next to, with, beside, on the side of, around""".strip()))


# ---------------------------------------------------------------------------------------------- labelled images
class Labelled:
    """Labelled images of a split, decoded when asked for: `labels` [n] names, `read(i, side)` -> [side,side,3] uint8.

    Raises UserError where nothing fits the layout, naming what was looked for and what was found; `read` raises one
    that names the image if it cannot be read: an evaluation never drops samples silently.
    """

    def __init__(self, source, dataset, names):
        source, train = Path(source), names[0] == "train"
        tried = [source / form for name in names for form in (name, f"{name}.tar", f"{dataset}-{name}.tar")]
        found, items = next((path for path in tried if path.exists()), source), []         # (label, name, offset, size)
        try:
            if found.is_dir() and found != source:
                items = [(path.parent.name, str(path), 0, path.stat().st_size) for path in sorted(found.glob("*/*"))]
            elif found.suffix == ".tar":
                with tarfile.open(found, "r:") as tar:
                    members = sorted((m for m in tar if m.isreg()), key=lambda m: m.name)
                items = [(Path(m.name).parent.name, m.name, m.offset_data, m.size) for m in members]
        except tarfile.TarError as problem:
            raise UserError(f"{found} is not a readable tar ({problem})") from None
        self.items = [item for item in items if item[1].lower().rpartition(".")[2] in IMAGE_TYPES]
        self.tar, self.pixels = found if found.suffix == ".tar" else None, None
        self.key = f"{self.items} {found.stat().st_mtime_ns if self.tar else ''}"
        if found == source:
            self._read_cifar(source, train)
        if not self.items:
            inside = ", ".join(sorted(os.listdir(source))[:8]) if source.is_dir() else "no such folder"
            raise UserError(f"--source {source}: no images in {', '.join(path.name for path in tried)} (found: {inside}"
                            f"); expected {names[0]}/CLASS/image.jpg or a tar of CLASS/image.jpg")
        self.labels = np.array([item[0] for item in self.items])

    def _read_cifar(self, source, train):
        """CIFAR's binary version, unpacked or not: records of one label, or CIFAR-100's two, and 3 x 32 x 32 pixels."""
        wanted = r"(data_batch_\d|train)\.bin" if train else r"test(_batch)?\.bin"
        files = {}
        if source.is_dir():
            files = {path.name: path.read_bytes() for path in source.rglob("*.bin") if re.fullmatch(wanted, path.name)}
        elif source.name.endswith("binary.tar.gz") and source.exists():
            with tarfile.open(source) as tar:
                files = {Path(m.name).name: tar.extractfile(m).read() for m in tar
                         if re.fullmatch(wanted, Path(m.name).name)}
        if files:
            record = 3074 if {"train.bin", "test.bin"} & set(files) else 3073
            rows = np.frombuffer(b"".join(files[name] for name in sorted(files)), np.uint8).reshape(-1, record)
            self.pixels = rows[:, -3072:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            self.items = [(f"{label:03d}", f"image {i}", 0, 0) for i, label in enumerate(rows[:, record - 3073])]
            self.key = hashlib.sha256(rows.tobytes()).hexdigest()

    def read(self, i, side):
        """Image i as the encoder sees it."""
        _, name, offset, size = self.items[i]
        if self.pixels is not None:
            return crop_square(Image.fromarray(np.ascontiguousarray(self.pixels[i])), side)
        with open(self.tar or name, "rb") as file:
            file.seek(offset)
            try:
                return crop_square(open_image(io.BytesIO(file.read(size)), side), side)
            except BadSample as reason:
                raise UserError(f"{name}: {reason}; an evaluation needs every image") from None


class Drawings:
    """Drawings of the embedded data set, as Labelled; `tasks` {attribute: labels [n]} are read off their captions."""

    def __init__(self, data_dir, split, limit=None):
        self.shards = open_split(data_dir, "shapes", split)
        self.items = range(len(self.shards))[:limit]
        self.key = f"{self.shards.digest} {self.items}"
        self.captions = [decode_caption(self.shards.tokenizer, self.shards.captions(i)[0]) for i in self.items]
        words = [SHAPES_CAPTION.fullmatch(caption) for caption in self.captions]
        self.tasks = {name: np.array([caption[name] for caption in words]) for name in SHAPES_CAPTION.groupindex}

    def read(self, i, side):
        """Image i as the encoder sees it."""
        return crop_square(self.shards.image(i), side)


@torch.no_grad()
def compute_features(model, images, cache=None):
    """The mean patch features [n,D] float32 of a Labelled or Drawings; kept in the folder `cache`."""
    side, device = model.config.image_size, next(model.parameters()).device
    key = hashlib.blake2b(f"{side} mean {images.key}".encode(), digest_size=16)
    for value in model.encoder.state_dict().values():
        key.update(value.cpu().numpy().tobytes())
    path = cache and Path(cache) / f"{key.hexdigest()}.pt"
    if path and path.exists():
        return torch.load(path, weights_only=True)
    features, n = [], len(images.items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in tqdm(range(0, n, PIXEL_BATCH), desc="features", unit="batch", dynamic_ncols=True):
            part = range(first, min(first + PIXEL_BATCH, n))
            batch = np.stack(list(pool.map(functools.partial(images.read, side=side), part)))
            features.append(model.encode(torch.from_numpy(batch).to(device)).mean(1).cpu())
    features = torch.cat(features)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(features, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    return features


# ---------------------------------------------------------------------------------------------- classifiers
def fit_logistic(features, labels, classes, strengths, tolerance=1e-6, most_steps=5000, memory=10):
    """Multinomial logistic regressions for S strengths of L2, solved at once, in float64, to convergence.

    Each minimizes mean cross-entropy + |W|^2 / (2 C n), scikit-learn's objective (the bias is free), until no entry of
    its gradient exceeds `tolerance`. features [n,D], labels [n] in 0..classes-1, strengths [S] -> weights
    [S,D+1,classes], bias last. One batched L-BFGS: every evaluation is two matrix products for all strengths that have
    not converged. What makes it short is the preconditioner: along principal axes (to which L2 is blind) the curvature
    is nearly diagonal and known, the variance of the axis / classes + 1/(C n), for each strength its own.
    """
    n, D = features.shape
    labels, mean, S = labels.to(features.device), features.double().mean(0), len(strengths)
    x = features.double() - mean
    variance, axes = torch.linalg.eigh(x.T @ x / n)
    x = torch.cat([x @ axes, x.new_ones(n, 1)], dim=1)                                          # [n,D+1]
    decay = (1 / (n * torch.as_tensor(strengths, dtype=torch.float64))).to(x)[:, None, None].repeat(1, D + 1, 1)
    decay[:, D] = 0                                                                             # [S,D+1,1]
    variance = torch.cat([variance.clamp(min=0), variance.new_ones(1)])[:, None]
    scale = (variance / classes + decay).rsqrt()
    rows = max(1, (1 << 22) // (S * classes))                                                   # keeps memory small

    def objective(v, which):
        """Losses [s], gradients for v [s,D+1,classes], largest gradient entries for W [s]."""
        w = v * scale[which]
        flat = w.transpose(0, 1).flatten(1)
        loss, gradient = w.new_zeros(len(which)), torch.zeros_like(flat)
        for part, y in zip(x.split(rows), labels.split(rows), strict=True):
            log_p = (part @ flat).view(len(part), -1, classes).log_softmax(2)
            right = y[:, None, None].expand(-1, len(which), 1)
            loss -= log_p.gather(2, right).sum((0, 2))
            error = log_p.exp_().scatter_add_(2, right, -torch.ones_like(right, dtype=w.dtype))
            gradient += part.T @ error.flatten(1)
        gradient = gradient.view(D + 1, len(which), classes).transpose(0, 1) / n + decay[which] * w
        return loss / n + (decay[which] * w * w).sum((1, 2)) / 2, gradient * scale[which], gradient.abs().amax((1, 2))

    def dot(a, b):
        return (a * b).sum((1, 2), keepdim=True)

    solution, active, pairs = x.new_zeros(S, D + 1, classes), torch.arange(S, device=x.device), []
    v = solution.clone()
    loss, gradient, size = objective(v, active)
    for _ in range(most_steps):
        step, rates = -gradient, []                   # L-BFGS's two loops (Nocedal and Wright, algorithm 7.4)
        for s, y, rho in reversed(pairs):
            rates.append(rho * dot(s, step))
            step = step - rates[-1] * y
        if pairs:
            step = step * (dot(pairs[-1][0], pairs[-1][1]) / dot(pairs[-1][1], pairs[-1][1]).clamp(min=1e-300))
        for (s, y, rho), rate in zip(pairs, reversed(rates), strict=True):
            step = step + s * (rate - rho * dot(y, step))
        slope, length, todo = dot(step, gradient).flatten(), torch.ones_like(loss), torch.arange(len(active))
        new = [v.clone(), loss.clone(), gradient.clone(), size.clone()]
        for _ in range(40):                           # each problem halves its own step until its loss falls
            new[0][todo] = v[todo] + length[todo, None, None] * step[todo]
            new[1][todo], new[2][todo], new[3][todo] = objective(new[0][todo], active[todo])
            todo = todo[(new[1][todo] > loss[todo] + 1e-4 * length[todo] * slope[todo] + 1e-15).cpu()]
            if not len(todo):
                break
            length[todo] *= 0.5
        s, y = new[0] - v, new[2] - gradient
        pairs = [*pairs, (s, y, torch.where(dot(s, y) > 1e-300, 1 / dot(s, y), 0.0))][-memory:]
        v, loss, gradient, size = new
        solution[active] = v
        left = size > tolerance                       # what has converged is dropped
        if not left.all():
            active, v, loss, gradient, size = (value[left] for value in (active, v, loss, gradient, size))
            pairs = [tuple(value[left] for value in pair) for pair in pairs]
        if not len(active):
            break
    else:
        print(f"warning: {len(active)} of {S} regressions stopped at a gradient of {float(size.max()):.1e}")
    w = solution * scale
    return torch.cat([axes @ w[:, :-1], w[:, -1:] - (mean @ axes @ w[:, :-1])[:, None]], dim=1)


def fit_minibatch(features, labels, classes, rates, epochs=20, batch_size=1024, seed=0):
    """Linear classifiers for R learning rates, trained in one pass over shuffled batches -> [R,D+1,classes].

    SGD with momentum 0.9 and a cosine to 0, for millions of images: each batch is read once for all rates (DINOv2's
    linear evaluation). features [n,D] standardized, which stands for the usual BatchNorm without parameters.
    """
    n, D = features.shape
    weights = features.new_zeros(len(rates), D + 1, classes)
    velocity, rates = torch.zeros_like(weights), torch.as_tensor(rates).to(features)[:, None, None]
    steps, generator = epochs * (n // batch_size + 1), torch.Generator().manual_seed(seed)
    for step in tqdm(range(steps), desc="minibatch probe", unit="step", dynamic_ncols=True):
        rows = torch.randint(n, (batch_size,), generator=generator).to(features.device)
        x = torch.cat([features[rows], features.new_ones(batch_size, 1)], dim=1)
        error = (x @ weights).softmax(2)                                                        # [R,b,classes]
        error[:, torch.arange(batch_size), labels[rows]] -= 1
        velocity.mul_(0.9).add_(x.T @ error / batch_size)
        weights -= rates * 0.5 * (1 + np.cos(np.pi * step / steps)) * velocity
    return weights


def figures_of(weights, test, labels, classes):
    """Weights [D+1,classes], features [n,D], labels [n] -> {"top1", "top5", "mean_class"}; shares, not percent."""
    logits = test @ weights[:-1] + weights[-1]
    right = (logits.argmax(1) == labels).double()
    top5 = (logits.topk(min(5, classes)).indices == labels[:, None]).any(1).double()
    per_class = [float(right[labels == c].mean()) for c in labels.unique()]
    return {"top1": float(right.mean()), "top5": float(top5.mean()), "mean_class": float(np.mean(per_class))}


def numbered(train_labels, test_labels):
    """Class names of both splits -> their numbers [n] and the number of classes. Raises UserError for unknown ones."""
    names, labels = np.unique(train_labels, return_inverse=True)
    unknown = set(test_labels) - set(names)
    if unknown:
        raise UserError(f"test images of classes without training images: {', '.join(sorted(unknown)[:5])}")
    return torch.from_numpy(labels), torch.from_numpy(np.searchsorted(names, test_labels)), len(names)


def standardize(train, test, dtype=torch.float64):
    """Both with the training features' mean and deviation."""
    mean, deviation = train.double().mean(0), train.double().std(0).clamp(min=1e-6)
    return [((x - mean) / deviation).to(dtype) for x in (train, test)]


def linear_probe(train, train_labels, test, test_labels, seed=0, device="cpu", minibatch=None):
    """Features [n,D] and labels (names) [n] of both splits -> {"top1", "top5", "mean_class", "C" or "lr"}.

    The strength (learning rate) is the one with the best accuracy on a random tenth of `train`, the smallest of equals.
    minibatch: which solver; None lets the size decide.
    """
    labels, answers, classes = numbered(train_labels, test_labels)
    minibatch = len(train) * classes > 1 << 26 if minibatch is None else minibatch
    train, test = standardize(train, test, torch.float32 if minibatch else torch.float64)
    train, test, labels, answers = (x.to(device) for x in (train, test, labels, answers))
    held_out = torch.zeros(len(train), dtype=torch.bool)
    held_out[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:len(train) // 10]] = True
    fit, values = (fit_minibatch, RATES) if minibatch else (fit_logistic, STRENGTHS)
    weights = fit(train[~held_out], labels[~held_out], classes, values)
    guesses = torch.stack([(train[held_out] @ w[:-1] + w[-1]).argmax(1) for w in weights])
    chosen = values[int((guesses == labels[held_out]).double().mean(1).argmax())]
    weights = fit(train, labels, classes, [chosen])[0]
    return figures_of(weights, test, answers, classes) | {"lr" if minibatch else "C": float(chosen)}


def few_shots(train, train_labels, test, test_labels, shots, seeds=5):
    """Linear probe from `shots` images a class, C = 1: mean and standard deviation of top-1 over draws of them."""
    labels, answers, classes = numbered(train_labels, test_labels)
    accuracies = []
    for seed in range(seeds):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([order[labels[order] == c][:shots] for c in range(classes)])
        few, rest = standardize(train[rows], test)
        weights = fit_logistic(few, labels[rows], classes, [1.0])[0]
        accuracies.append(figures_of(weights, rest, answers, classes)["top1"])
    return float(np.mean(accuracies)), float(np.std(accuracies, ddof=1))


def nearest_neighbours(train, train_labels, test, test_labels, k=20, temperature=0.07):
    """Top-1 of a vote of the k nearest training images by cosine, weighted by exp(cosine / temperature) (DINO)."""
    labels, answers, classes = numbered(train_labels, test_labels)
    train, test = (torch.nn.functional.normalize(x, dim=1) for x in standardize(train, test, torch.float32))
    right = 0
    for x, y in zip(test.split(1024), answers.split(1024), strict=True):
        closeness, rows = (x @ train.T).topk(min(k, len(train)))
        votes = torch.zeros(len(x), classes).scatter_add_(1, labels[rows], (closeness / temperature).exp())
        right += int((votes.argmax(1) == y).sum())
    return right / len(test)


def export_encoder(model, path):
    """The encoder alone: a state dict for timm's VisionTransformer, its arguments, and how to prepare images."""
    width, depth, heads, patch = SIZES[model.config.size]
    arguments = {"img_size": model.config.image_size, "patch_size": patch, "embed_dim": width, "depth": depth,
                 "num_heads": heads, "class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    state = {name: value.cpu().clone() for name, value in model.encoder.state_dict().items()}
    torch.save({"state_dict": state, "timm": arguments, "mean": [0.5] * 3, "std": [0.5] * 3, "pool": "avg"}, path)


# ---------------------------------------------------------------------------------------------- compositionality
def swap_items(drawings):
    """Three items of wrong captions for each drawing: colours exchanged, another form, another row or column."""
    items = []
    for i, caption in enumerate(drawings.captions):
        words = SHAPES_CAPTION.fullmatch(caption).groupdict()
        rng = random_stream(i, EXCHANGE, 1)
        other = {name: rng.choice([x for x in values if x != words[name]]) for name, values in
                 (("shape", FORMS), ("row", ("top", "middle", "bottom")), ("column", ("left", "center", "right")))}
        place = ("row", "column")[rng.integers(2)]
        wrong = {"colours": {"colour": words["background"], "background": words["colour"]},
                 "form": {"shape": other["shape"]}, "place": {place: other[place]}}
        pattern = "a {size} {colour} {shape} at the {row} {column} of a {background} background"
        items += [{"image": i, "group": group, "options": [caption, pattern.format(**words | change)]}
                  for group, change in wrong.items()]
    return items


def read_items(dataset, source, folder):
    """Annotation files -> items {"image": path, "box": left, top, right, bottom or None, "group", "options"}."""
    files = sorted(Path(source).glob("*.json")) if os.path.isdir(source) else [Path(source)]
    items = []
    try:
        for file in files:
            rows = json.loads(file.read_text())
            for row in rows.values() if isinstance(rows, dict) else rows:
                if dataset == "sugarcrepe":
                    item = (row["filename"], None, file.stem, [row["caption"], row["negative_caption"]])
                elif dataset == "options":
                    item = (row["image"], None, file.stem, row["options"])
                else:
                    x, y, w, h = (row[f"bbox_{side}"] for side in "xywh")
                    group = row["relation_name"] if dataset == "aro-relation" else "_".join(row["attributes"])
                    options = [row["true_caption"], row["false_caption"]]
                    item = (row["image_path"], (x, y, x + w, y + h), group, options)
                items.append(dict(zip(("image", "box", "group", "options"), item, strict=True)))
                items[-1]["image"] = os.path.join(folder, item[0])
                if len(item[3]) < 2 or not all(isinstance(option, str) and option for option in item[3]):
                    raise ValueError("an item needs two captions or more")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise UserError(f"--source {source}: not the annotations of {dataset} ({type(problem).__name__}: {problem})"
                        ) from None
    return items


def read_item_image(item, side):
    """The image of an item, cut to its box, as the encoder sees it."""
    try:
        image = open_image(item["image"])
    except BadSample as reason:
        raise UserError(f"{item['image']}: {reason}; an evaluation needs every image") from None
    return crop_square(image.crop(item["box"]) if item["box"] else image, side)


@torch.no_grad()
def score_items(model, checkpoint, items, read, draws, seed, batch_size=32):
    """Scores of all captions of all items with the right image and with others.

    Returns {rule: (real, blind, lengths)}, each a list of one array [options] an item, in nats summed over tokens;
    blind is the log-mean-exp over EXCHANGES other images of the set; and log p(length) of the training captions.
    """
    tokenizer, config = load_tokenizer(checkpoint["tokenizer"]), model.config
    device, rng = next(model.parameters()).device, random_stream(seed, EXCHANGE, 0)
    places, trained = {}, checkpoint["options"]["ratios"]
    masked = {"monte-carlo": ("monte-carlo", draws, seed), "trained range": ("monte-carlo", draws, seed, trained),
              "parallel": ("parallel",), "leave-one-out": ("leave-one-out",)}
    rules = {"ar": {"log p": ()}, "clip": {"cosine": ()}}.get(config.objective, masked)
    for number, item in enumerate(items):
        places.setdefault((item["image"], item.get("box")), []).append(number)
    owners, order = list(places.values()), {number: k for k, group in enumerate(places.values()) for number in group}
    if len(owners) <= EXCHANGES:
        raise UserError(f"{len(owners)} different images: expected at least {EXCHANGES + 1}, for the exchange")
    shifts = [0, *(1 + rng.choice(len(owners) - 1, EXCHANGES, replace=False))]
    results = {rule: ([], [], [], []) for rule in rules}
    for first in tqdm(range(0, len(items), batch_size), desc="scoring", unit="batch", dynamic_ncols=True):
        part = range(first, min(first + batch_size, len(items)))
        tokens = [[*tokenizer.encode_ordinary(o)[:config.max_tokens - 1], tokenizer.eot_token]
                  for i in part for o in items[i]["options"]]
        counts = [len(items[i]["options"]) for i in part]
        scores = {rule: [] for rule in rules}
        for shift in shifts:
            images = [read(items[owners[(order[i] + shift) % len(owners)][0]], config.image_size) for i in part]
            features = model.encode(torch.from_numpy(np.stack(images)).to(device))
            features = features.repeat_interleave(torch.tensor(counts, device=device), dim=0)
            for rule, arguments in rules.items():
                scores[rule].append(score_captions(model, features, tokens, *arguments))
        ends = np.cumsum(counts)[:-1]
        lengths = np.array([len(ids) for ids in tokens])
        terms = length_terms(checkpoint["lengths"], tokens, config).numpy()
        for rule, (real, *others) in scores.items():
            blind = real * 0 + torch.stack(others).logsumexp(0) - np.log(len(others))
            for column, values in zip(results[rule], (real.numpy(), blind.numpy(), lengths, terms), strict=True):
                column += np.split(values, ends)
    return results


def print_compositionality(dataset, items, results, causal):
    """Table of accuracies in percent by rule and group; returns them as plain numbers."""
    groups, record = defaultdict(list), {}
    for number, item in enumerate(items):
        groups[item["group"]].append(number)
    for rule, (real, blind, lengths, terms) in results.items():
        variants = {"sum": lambda s, n, p: s} if rule == "cosine" else {
            "sum": lambda s, n, p: s, "a token": lambda s, n, p: s / n}
        if rule != "cosine" and not causal:
            variants["+ length"] = lambda s, n, p: s + p
        right = {f"{name}{kind}": np.array([all(variant(*row)[0] > variant(*row)[1:]) for row in
                                            zip(scores, lengths, terms, strict=True)])
                 for kind, scores in (("", real), (" blind", blind)) for name, variant in variants.items()}
        gains = np.array([(r[0] - b[0]) / n[0] for r, b, n in zip(real, blind, lengths, strict=True)])
        error = gains.std(ddof=1) / len(gains) ** 0.5
        print(f"\n{rule}: its own image is worth {gains.mean():.3f} ± {error:.3f} a token of the true caption (nats)\n"
              f"{'group':20}{'items':>7}" + "".join(f"{name:>15}" for name in right))
        table = {group: {name: 100 * float(ok[rows].mean()) for name, ok in right.items()} for group, rows
                 in groups.items() if dataset != "aro-attribution" or len(rows) >= 25}
        means = {"mean of groups": list(table)}
        if dataset == "aro-relation":
            means["not symmetric"] = [group for group in table if group not in SYMMETRIC]
        for group, row in table.items() if len(table) <= 12 else ():
            print(f"{group[:19]:20}{len(groups[group]):7}" + "".join(f"{value:15.1f}" for value in row.values()))
        for name, members in means.items():
            table[name] = {column: float(np.mean([table[g][column] for g in members])) if members else float("nan")
                           for column in right}
            print(f"{name:20}{len(members):7}" + "".join(f"{value:15.1f}" for value in table[name].values()))
        record[rule] = table
    return record


# ---------------------------------------------------------------------------------------------- command line
def main():
    """Probe or score what the command line names, print, and append one line to probe.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="checkpoint of train.py; results go to probe.jsonl beside it")
    add("--dataset", help="shapes; any name for the labelled images in --source; or, for compositionality: swaps (in "
        "drawings), sugarcrepe, aro-relation, aro-attribution, or options: a JSON list {image, options: [true, ...]}")
    add("--source", metavar="PATH", help="folder with train and test, see above; or the annotation file or folder")
    add("--images", metavar="DIR", default=".", help="compositionality: where the images are (default: here)")
    add("--data-dir", default="data", metavar="DIR", help="of the shards of shapes (default: data)")
    add("--limit", type=int, metavar="N", help="labelled training images, or items, to use (default: 200 of shapes, "
        "where a random encoder does as well with thousands; otherwise all)")
    add("--shots", metavar="K,K", help="also probe from so many images a class, with five draws of them: 1,5,10")
    add("--knn", action="store_true", help="also vote of the 20 nearest neighbours, which needs no training")
    add("--samples", type=int, default=32, metavar="N", help="random masks of a Monte Carlo score (default: 32)")
    add("--allow-missing", action="store_true", help="leave out items whose image is not there, naming them")
    add("--export", metavar="FILE", help="write the encoder alone, for timm, and do nothing else")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, else cpu")
    add("--seed", type=int, default=0, help="of the random encoder, the held-out tenth, the masks (default: 0)")
    args = parser.parse_args()
    check_least(args, limit=20, samples=1, seed=0)
    model, checkpoint = load_captioner(args.ckpt, args.device)
    if args.export:
        export_encoder(model, args.export)
        return print(f"encoder of {args.ckpt} written to {args.export}")
    if not args.dataset:
        raise UserError("--dataset is missing: for example shapes, or cifar10 with --source raw/cifar10")
    record = {"dataset": args.dataset, "ckpt": args.ckpt, "step": checkpoint["step"], "seed": args.seed}
    if args.dataset in ("swaps", "sugarcrepe", "aro-relation", "aro-attribution", "options"):
        record |= {"results": main_compositionality(args, model, checkpoint)}
    else:
        record |= main_probe(args, model, checkpoint)
    with open(Path(args.ckpt).parent / "probe.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def main_compositionality(args, model, checkpoint):
    """Score the items and print the tables; returns the accuracies."""
    if args.dataset == "swaps":
        drawings = Drawings(args.data_dir, "val", args.limit)
        items, read = swap_items(drawings), lambda item, side: drawings.read(item["image"], side)
    elif args.source:
        items, read = read_items(args.dataset, args.source, args.images)[:args.limit], read_item_image
        missing = sorted({item["image"] for item in items if not os.path.exists(item["image"])})
        if missing and not args.allow_missing:
            raise UserError(f"{len(missing)} images are missing, {missing[0]} first: expected them in --images "
                            f"{args.images}; --allow-missing leaves their items out")
        if missing:
            items = [item for item in items if item["image"] not in set(missing)]
            print(f"{len(missing)} images are missing, {len(items)} items are left; missing: {' '.join(missing)}")
    else:
        raise UserError(f"--source is missing: the annotation file of {args.dataset}")
    if not items:
        raise UserError(f"no item of {args.dataset} is left")
    results = score_items(model, checkpoint, items, read, args.samples, args.seed)
    return print_compositionality(args.dataset, items, results, model.config.objective == "ar")


def main_probe(args, model, checkpoint):
    """Probe the trained and the random encoder and print their figures; returns them."""
    if args.dataset == "shapes":
        splits = Drawings(args.data_dir, "train", args.limit or 200), Drawings(args.data_dir, "val")
        tasks = [splits[0].tasks, splits[1].tasks]
    elif args.source:
        splits = [Labelled(args.source, args.dataset, names) for names in (["train"], ["test", "val"])]
        tasks = [{"class": split.labels} for split in splits]
    else:
        raise UserError(f"--source is missing: a folder with the training and test images of {args.dataset}")
    counts = [len(split.items) for split in splits]
    if counts[0] < 20:
        raise UserError(f"{counts[0]} training images: expected at least 20")
    torch.manual_seed(args.seed)
    random_model = Captioner(model.config).to(args.device).eval()
    features = {name: [compute_features(encoder, split, Path(args.ckpt).parent / "features") for split in splits]
                for name, encoder in (("trained", model), ("random", random_model))}
    metric = METRIC.get(args.dataset, "top1")
    print(f"{args.dataset}: {counts[0]:,} training and {counts[1]:,} test images at {model.config.image_size} px, "
          f"features of {model.config.size} after {checkpoint['step']:,} steps\n\n"
          f"{'':12}{'classes':>8}{'trained':>10}{'random init':>13}{'gain':>7}   {metric} %")
    results = {}
    for task, labels in tasks[0].items():
        pairs = {name: (train, labels, test, tasks[1][task]) for name, (train, test) in features.items()}
        found = results[task] = {name: linear_probe(*pair, args.seed, args.device) for name, pair in pairs.items()}
        values = [100 * found[name][metric] for name in ("trained", "random")]
        print(f"{task:12}{len(set(labels)):8}{values[0]:10.1f}{values[1]:13.1f}{values[0] - values[1]:+7.1f}   "
              + ", ".join(f"{name} {value:.2g}" if name in ("C", "lr") else f"{name} {100 * value:.1f}"
                          for name, value in found["trained"].items()), flush=True)
        for shots in map(int, args.shots.split(",") if args.shots else ()):
            few = {name: few_shots(*pair, shots) for name, pair in pairs.items()}
            found[f"{shots}-shot"] = few
            print(f"{f'{shots} a class':20}" + "".join(f"{100 * mean:7.1f} ± {100 * deviation:4.1f}"
                                                       for mean, deviation in few.values()))
        if args.knn:
            found["knn"] = {name: nearest_neighbours(*pair) for name, pair in pairs.items()}
            print(f"{'20 neighbours':20}" + "".join(f"{100 * value:10.1f}" for value in found["knn"].values()))
    return {"train": counts[0], "test": counts[1], "results": results}


if __name__ == "__main__":
    run(main)
