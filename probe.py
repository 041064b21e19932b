"""What are the features good for? Probes of the frozen encoder, and compositionality of the captioner.

    python probe.py --ckpt out/shapes-tiny-mdc/ckpt.pt --dataset shapes              # every attribute of the drawings
    python probe.py --ckpt out/flickr8k-tiny4-mdc/ckpt.pt --dataset cifar10 --source raw/cifar10 --knn --shots 1,5,10
    python probe.py --ckpt out/shapes-tiny-mdc/ckpt.pt --dataset swaps               # true captions against wrong ones
    python probe.py --ckpt out/coco-S16-mdc/ckpt.pt --dataset sugarcrepe --source sugar-crepe/data --images val2017

Linear probe: the features of an image are the mean of its patch tokens after the encoder's final LayerNorm, computed
once, in float32, from the central square without augmentation, then standardized with the training images' mean and
deviation. On them a multinomial logistic regression is fitted to convergence. Its L2 strength is chosen out of 45 on a
held-out tenth of the training images, then it is fitted again on all of them, and the test images are looked at once.
Beside every figure stands the same encoder before its training (with --init: a random one): the floor, and on small
pictures a high one.
Also tried, on CIFAR-10: the mean before the LayerNorm is as good, and mean and deviation (or maximum) together are 2 to
5 points better, as much for the random encoder as for trained ones: so the mean it is.

Compositionality: of each item's captions the true one, the first, has to score highest, strictly. Every score is also
taken with other images in place of the right one (`blind`): what is right there is not the doing of sight.
"""
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
from data import BadSample, UserError
from model import SIZES, Captioner
from sample import length_terms, load_captioner, score_captions

STRENGTHS = np.logspace(-6, 5, 45)                    # scikit-learn's inverse L2 strength C; DINOv2's range
RATES = np.logspace(-3.5, 0.5, 9)                     # learning rates of the minibatch solver
ANNOTATIONS = {                                       # fields of image, group (None: the name of the file) and captions
    "sugarcrepe": ("filename", None, "caption", "negative_caption"),
    "aro-relation": ("image_path", "relation_name", "true_caption", "false_caption"),
    "aro-attribution": ("image_path", "attributes", "true_caption", "false_caption"),
    "options": ("image", None, "options"),
}
Item = namedtuple("Item", "image box group options")  # box: left, top, right, bottom or None; the first option is true


# ---------------------------------------------------------------------------------------------- images and features
def open_labelled(source, dataset, split):
    """What identifies the images of a split, "train" or "test", and an iterator over their (label, name, image), which
    is a file name, file or PIL image. Raises UserError if nothing fits the layout, with what was found."""
    source, names, digits = Path(source), ["train"] if split == "train" else ["test", "val"], re.sub(r"\D", "", dataset)
    forms = [source / form for name in names for form in (name, f"{name}.tar", f"{dataset}-{name}.tar")]
    archive = f"cifar*{digits}-binary.tar.gz"
    forms += [source] if source.match(archive) else sorted(source.glob(archive))
    found = next((path for path in forms if path.exists()), None)
    if found and found.is_dir():                      # every file counts: an evaluation never drops samples silently
        files = sorted(file for file in found.glob("*/[!.]*") if file.is_file())
        images = ((file.parent.name, str(file), str(file)) for file in files)
    else:
        files, images = [found], read_archive(found, split) if found else iter(())
    if not (first := next(images, None)):
        found = found or source
        inside = ", ".join(sorted(os.listdir(found))[:8]) if found.is_dir() else "nothing of the kind"
        raise UserError(f"--source {source}: expected {names[-1]}/CLASS/image.jpg, or {forms[2].name} with "
                        f"CLASS/image.jpg in it, or {archive}; found in {found}: {inside}")
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{split} {stats}", itertools.chain([first], images)


def read_archive(path, split):
    """Iterate over a tar of CLASS/image, or CIFAR-10's or -100's binary archive, as open_labelled does. Nothing is
    extracted: links and devices are refused, and of a name only the last folder is used."""
    try:
        with tarfile.open(path) as tar:
            for member in itertools.takewhile(lambda member: member.size >= 0, tar):        # below 0 tarfile goes round
                tar.members = []                      # it remembers every member it has seen; we need none
                label, name = Path(member.name).parent.name, Path(member.name).name
                if member.isreg() and label and path.suffix == ".tar" and name[0] != ".":
                    yield label, member.name, io.BytesIO(tar.extractfile(member).read(data.MAX_BYTES["jpg"]))
                elif member.isreg() and name.endswith(".bin") and name.startswith("test") == (split == "test"):
                    record = 3074 if name in ("train.bin", "test.bin") else 3073    # CIFAR-100: a coarse label first
                    rows = np.frombuffer(tar.extractfile(member).read(1 << 28), np.uint8).reshape(-1, record)
                    for i, row in enumerate(rows):
                        pixels = np.ascontiguousarray(row[-3072:].reshape(3, 32, 32).transpose(1, 2, 0))
                        yield f"{row[-3073]:03}", f"{name} {i}", Image.fromarray(pixels)
                elif not (member.isreg() or member.isdir()):
                    raise tarfile.ReadError(f"{member.name} is a link or a device")
            tar.fileobj.seek(tar.offset)              # tarfile takes a damaged header for the end; the end is zeros
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError("it is cut short or damaged")
    except Exception as problem:                      # tarfile and gzip raise half a dozen different types
        raise UserError(f"{path} cannot be read ({problem}): expected a whole tar of plain files") from None


def read_square(name, image, side, box=None):
    """File name, file or PIL image, cut to a box -> as the encoder sees it, uint8 [side,side,3]. UserError names it."""
    try:
        image = image if isinstance(image, Image.Image) else data.open_image(image, None if box else side)
        image = image.crop(np.clip(box, 0, image.size * 2).tolist()) if box else image
        if not all(image.size):
            raise BadSample(f"its box {box} is empty")
        return data.crop_square(image, side)
    except BadSample as reason:
        raise UserError(f"{name}: {reason}; an evaluation needs every image") from None


@torch.no_grad()
def compute_features(model, key, images, cache, batch_size=256):
    """Images of open_labelled -> mean patch features [n,D] float32, and labels (names) [n]; kept in the folder `cache`
    under a name made of the encoder's weights, its image size and `key`."""
    side, device = model.config.image_size, next(model.parameters()).device
    weights = torch.nn.utils.parameters_to_vector(model.encoder.parameters()).cpu().numpy().tobytes()
    digest = hashlib.blake2b(f"{model.config.size} {side} mean {key}".encode() + weights, digest_size=16)
    path = Path(cache, f"{digest.hexdigest()}.pt")
    if not path.exists():
        features, labels, images = [], [], iter(tqdm(images, desc="features", unit="image", dynamic_ncols=True))
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            while batch := list(itertools.islice(images, batch_size)):
                pixels = np.stack(list(threads.map(lambda image: read_square(*image[1:], side), batch)))
                features.append(model.encode(torch.from_numpy(pixels).to(device)).mean(1).cpu())
                labels += [label for label, _, _ in batch]
        path.parent.mkdir(parents=True, exist_ok=True)
        with data.replace_file(path) as file:
            torch.save((torch.cat(features), labels), file)
    features, labels = torch.load(path, weights_only=True)
    return features, np.array(labels)


# ---------------------------------------------------------------------------------------------- classifiers
def fit_logistic(features, labels, classes, strengths, tolerance=1e-6, most_steps=10_000):
    """Multinomial logistic regressions for S strengths of L2, solved at once, in float64, to convergence.

    Each minimizes mean cross-entropy + |W|^2 / (2 C n), scikit-learn's objective (the bias is free), until no entry of
    its gradient exceeds `tolerance`. features [n,D], labels [n] in 0..classes-1, strengths [S] -> weights
    [S,D+1,classes], bias last. It is BFGS with a memory of one step (Nocedal and Wright, section 7.2) on all strengths
    that have not converged, two matrix products a step. What makes it short:
      * A preconditioner. Along principal axes (to which L2 is blind) the curvature is nearly diagonal and known, the
        variance of the axis / classes + 1/(C n). Axes with a deviation below the tolerance have no larger gradient.
      * No line search. A step that does not lower the loss is not taken, but what it says about the curvature is true
        all the same, the loss being convex, and makes the next step a better one."""
    n, S, mean = len(features), len(strengths), features.double().mean(0)
    x = features.double() - mean
    variance, axes = torch.linalg.eigh(x.T @ x / n)
    variance, axes = variance[variance > tolerance ** 2], axes[:, variance > tolerance ** 2]
    x = torch.cat([x @ axes, x.new_ones(n, 1)], dim=1)                                          # [n,K+1], K <= D
    decay = (1 / (n * torch.as_tensor(strengths, dtype=torch.float64))).to(x)[:, None, None].repeat(1, x.shape[1], 1)
    decay[:, -1] = 0                                                                            # [S,K+1,1]
    scale = (torch.cat([variance, variance.new_ones(1)])[:, None] / classes + decay).rsqrt()
    everyone, active, solution = torch.arange(n).to(x.device), torch.arange(S).to(x.device), decay.repeat(1, 1, classes)

    def dot(a, b):
        return (a * b).sum((1, 2), keepdim=True)

    def evaluate(v):
        """v [s,K+1,classes], weights / scale -> v, losses, gradients, largest entries of the gradients for weights."""
        w = v * scale
        log_p = (x @ w.transpose(0, 1).flatten(1)).view(n, -1, classes).log_softmax(2)          # [n,s,classes]
        loss = dot(decay * w, w) / 2 - log_p[everyone, :, labels].mean(0)[:, None, None]
        log_p.exp_()[everyone, :, labels] -= 1        # now the derivative of the cross-entropy
        gradient = (x.T @ log_p.flatten(1)).view(-1, *w.shape[::2]).transpose(0, 1) / n + decay * w
        return v, loss, gradient * scale, gradient.abs().amax((1, 2), True)

    v, loss, gradient, size = evaluate(torch.zeros_like(solution))
    step, change = -gradient, -gradient               # as if the curvature were 1, which it is nearly
    bar = tqdm(total=S, desc="regressions", leave=False, dynamic_ncols=True, disable=S == 1)
    for _ in range(most_steps):
        curvature = torch.maximum(dot(step, change), 1e-14 * dot(step, step))         # less is lost in rounding
        along = dot(step, gradient) / curvature
        direction = (along * change - gradient) * curvature / dot(change, change)
        step = direction - (along + dot(change, direction) / curvature) * step
        new = evaluate(v + step)
        change, better, old = new[2] - gradient, new[1] <= loss + 1e-15, (v, loss, gradient, size)
        v, loss, gradient, size = (torch.where(better, *pair) for pair in zip(new, old, strict=True))
        solution[active] = v * scale
        left = (size > tolerance).flatten()           # what has converged is dropped
        active, v, loss, gradient, size, step, change, decay, scale = (
            value[left] for value in (active, v, loss, gradient, size, step, change, decay, scale))
        bar.update(S - bar.n - len(active))
        if not len(active):
            break
    else:
        print(f"warning: {len(active)} of {S} regressions stopped at a gradient of {float(size.max()):.1e}")
    weights = axes @ solution[:, :-1]
    return torch.cat([weights, solution[:, -1:] - (mean @ weights)[:, None]], dim=1)


def fit_minibatch(features, labels, classes, rates, epochs=20, batch_size=1024):
    """Linear classifiers for R learning rates, trained in one pass over random batches -> [R,D+1,classes].

    SGD with momentum 0.9 and a cosine to 0; each batch is read once for all rates (DINOv2's linear evaluation). That
    the features [n,D] are standardized stands for the usual BatchNorm without parameters."""
    n, generator = len(features), torch.Generator().manual_seed(0)
    weights, steps = features.new_zeros(len(rates), features.shape[1] + 1, classes), epochs * (n // batch_size + 1)
    velocity, rates = torch.zeros_like(weights), torch.as_tensor(rates).to(features)[:, None, None]
    for step in tqdm(range(steps), desc="minibatch probe", unit="step", dynamic_ncols=True):
        rows = torch.randint(n, (batch_size,), generator=generator).to(features.device)
        x = torch.cat([features[rows], features.new_ones(batch_size, 1)], dim=1)
        error = (x @ weights).softmax(2)                                                        # [R,b,classes]
        error[:, torch.arange(batch_size), labels[rows]] -= 1
        velocity.mul_(0.9).add_(x.T @ error / batch_size)
        weights -= rates * 0.5 * (1 + np.cos(np.pi * step / steps)) * velocity
    return weights


def figures_of(weights, test, labels):
    """Weights [D+1,classes], features [n,D], labels [n] -> {"top1", "top5", "mean_class"}; shares, not percent."""
    logits = test.to(weights) @ weights[:-1] + weights[-1]
    right = (logits.argmax(1) == labels).double()
    top5 = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1).double()
    per_class = [float(right[labels == c].mean()) for c in labels.unique()]
    return {"top1": float(right.mean()), "top5": float(top5.mean()), "mean_class": float(np.mean(per_class))}


def number_classes(train, test, shots=()):
    """Class names [n] of both splits -> their numbers [n] among those of `train`. Raises UserError for names that only
    `test` has, a single class, and more `shots` than a class has images."""
    names, labels = np.unique(train, return_inverse=True)
    if max(shots, default=0) > (least := np.bincount(labels).min()):
        raise UserError(f"--shots {max(shots)}: the smallest class has {least} training images")
    if len(names) < 2:
        raise UserError(f"all training images are of class {names[0]}, the last folder of their names")
    if unknown := sorted(set(test) - set(names)):
        raise UserError(f"test images of classes without training images: {', '.join(unknown[:5])}")
    return torch.from_numpy(labels), torch.from_numpy(np.searchsorted(names, test))


def standardize(train, test):
    """Both with the training features' mean and deviation."""
    mean, deviation = train.mean(0), train.std(0, correction=0).clamp(min=1e-6)
    return (train - mean) / deviation, (test - mean) / deviation


def linear_probe(train, labels, test, answers, seed=0, device="cpu", chosen=None, minibatch=None):
    """Features [n,D] and labels [n] of both splits -> {"top1", "top5", "mean_class", "C" or "lr", "held_out"}.

    held_out is the accuracy by which the strength was chosen: whoever compares settings should look at that one alone.
    chosen: the strength (learning rate); None: the one with the best accuracy on a random tenth of `train`, the
    smallest of equals. minibatch: which solver; None: the exact one while it fits into some 8 GB of memory."""
    classes = int(labels.max()) + 1
    minibatch = len(train) * classes > 1 << 23 if minibatch is None else minibatch
    train, test, labels, answers = (x.to(device) for x in (*standardize(train, test), labels, answers))
    fit, values, kind = (fit_minibatch, RATES, "lr") if minibatch else (fit_logistic, STRENGTHS, "C")
    found = {}
    if chosen is None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(device)
        held_out, rest = order[:-(-len(train) // 10)], order[-(-len(train) // 10):]
        weights = fit(train[rest], labels[rest], classes, values)
        accuracies = [figures_of(w, train[held_out], labels[held_out])["top1"] for w in weights]
        found, chosen = {"held_out": max(accuracies)}, float(values[np.argmax(accuracies)])
    return figures_of(fit(train, labels, classes, [chosen])[0], test, answers) | found | {kind: chosen}


def few_shots(train, labels, test, answers, shots, device="cpu", seeds=5):
    """Linear probe from `shots` images a class, C = 1: mean and standard deviation of top-1 over draws of them."""
    accuracies = []
    for seed in range(seeds):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([order[labels[order] == c][:shots] for c in labels.unique()])
        accuracies.append(linear_probe(train[rows], labels[rows], test, answers, 0, device, 1.0, False)["top1"])
    return float(np.mean(accuracies)), float(np.std(accuracies, ddof=1))


def nearest_neighbours(train, labels, test, answers, k=20, temperature=0.07):
    """Top-1 of a vote of the k nearest training images by cosine, weighted by exp(cosine / temperature) (DINO)."""
    train, test = (torch.nn.functional.normalize(x, dim=1) for x in standardize(train, test))
    right = 0
    for x, y in zip(test.split(128), answers.split(128), strict=True):
        closeness, rows = (x @ train.T).topk(min(k, len(train)))
        votes = torch.zeros(len(x), int(labels.max()) + 1)
        right += int((votes.scatter_add_(1, labels[rows], (closeness / temperature).exp()).argmax(1) == y).sum())
    return right / len(test)


# ---------------------------------------------------------------------------------------------- compositionality
def swap_items(shards):
    """Three items of wrong captions for each drawing: colours exchanged, another form, another row or column."""
    items = []
    for i in range(len(shards)):
        caption = data.decode_caption(shards.tokenizer, shards.captions(i)[0])
        words, rng = data.SHAPES_CAPTION.fullmatch(caption).groupdict(), data.random_stream(i, data.EXCHANGE, 1)
        place, values = (("row", data.ROWS), ("column", data.COLUMNS))[rng.integers(2)]
        wrong = {"colours": {"colour": words["background"], "background": words["colour"]},
                 "form": {"shape": rng.choice([x for x in data.FORMS if x != words["shape"]])},
                 "place": {place: rng.choice([x for x in values if x != words[place]])}}
        pattern = "a {size} {colour} {shape} at the {row} {column} of a {background} background"
        items += [Item(i, None, group, [caption, pattern.format(**words | new)]) for group, new in wrong.items()]
    return items


def read_items(dataset, source, folder):
    """Annotation file, or a folder of them -> Items. Raises UserError if they are not of this data set."""
    items, (image, group, *fields) = [], ANNOTATIONS[dataset]
    try:
        for file in sorted(Path(source).glob("*.json")) if os.path.isdir(source) else [Path(source)]:
            rows = json.loads(file.read_text(encoding="utf-8"))
            for row in rows.values() if isinstance(rows, dict) else rows:
                options = row["options"] if dataset == "options" else [row[field] for field in fields]
                options = [data.clean_caption(option) for option in options]
                if len(options) < 2 or not all(options):
                    raise ValueError("an item needs two captions or more")
                name = row[group] if group else file.stem
                x, y, w, h = (int(row.get(f"bbox_{field}", 0)) for field in "xywh")
                items.append(Item(os.path.join(folder, row[image]), (x, y, x + w, y + h) if "bbox_w" in row else None,
                                  name if isinstance(name, str) else "_".join(name), options))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as problem:
        raise UserError(f"--source {source}: no {dataset} annotations ({type(problem).__name__}: {problem})") from None
    return items


@torch.no_grad()
def score_items(model, checkpoint, items, find_image, draws=32, seed=0, batch_size=32, exchanges=2):
    """Scores of all captions of all items, with the right image and with others; find_image(item.image): file or image.

    Returns {rule: (real, blind)} in nats summed over tokens, lengths in tokens, log p(length) of the training captions,
    all [items,options] (-inf where an item has fewer options). blind is the log-mean-exp over other images: all stand
    in a random circle, and an item is scored with those that come after its own. So a batch of items needs a stretch
    of the circle, and an image is read and encoded about once."""
    tokenizer, config = data.load_tokenizer(checkpoint["tokenizer"]), model.config
    rules = {"ar": {"log p": ()}, "clip": {"cosine": ()}}.get(config.objective) or {
        "monte-carlo": ("monte-carlo", draws, seed), "parallel": ("parallel",), "leave-one-out": ("leave-one-out",),
        "trained range": ("monte-carlo", draws, seed, checkpoint["options"]["ratios"])}
    images = list(dict.fromkeys((item.image, item.box) for item in items))
    if len(images) <= exchanges:
        raise UserError(f"{len(images)} different images: expected at least {exchanges + 1}, for the exchange")
    order = data.random_stream(seed, data.EXCHANGE, 0).permutation(len(images))
    circle, place = [images[i] for i in order], {images[i]: k for k, i in enumerate(order)}
    owner = np.array([place[item.image, item.box] for item in items])
    shape = len(items), max(len(item.options) for item in items)
    scores = {rule: np.full((1 + exchanges, *shape), -np.inf) for rule in rules}
    lengths, terms = np.ones(shape), np.zeros(shape)
    parts = np.array_split(np.argsort(owner, kind="stable"), -(-len(items) // batch_size))
    for part in tqdm(parts, desc="scoring", unit="batch", dynamic_ncols=True):
        first, last = owner[part[0]], owner[part[-1]] + exchanges
        pixels = [read_square(image, find_image(image), config.image_size, box)
                  for image, box in (circle + circle)[first:last + 1]]
        features = model.encode(torch.from_numpy(np.stack(pixels)).to(next(model.parameters()).device))
        i, j = np.array([(i, j) for i in part for j in range(len(items[i].options))]).T
        tokens = [tokenizer.encode_ordinary(text)[:config.max_tokens - 1] for k in part for text in items[k].options]
        tokens = [[*ids, config.eos] for ids in tokens]
        lengths[i, j], terms[i, j] = list(map(len, tokens)), length_terms(checkpoint["lengths"], tokens, config)
        for (rule, arguments), shift in itertools.product(rules.items(), range(1 + exchanges)):
            seen = features[owner[i] - first + shift]
            scores[rule][shift, i, j] = score_captions(model, seen, tokens, *arguments, items=i)
    if full := int((lengths == config.max_tokens).sum()):
        print(f"note: {full} captions fill the model's {config.max_tokens} tokens; longer ones were cut")
    scores = {rule: (s[0], np.logaddexp.reduce(s[1:]) - np.log(exchanges)) for rule, s in scores.items()}
    return scores, lengths, terms


def report_items(dataset, items, scores, lengths, terms):
    """Print accuracies in percent by rule and group, and return them; scores, ... are what score_items returns."""
    names, record = np.array([item.group for item in items]), {}
    owner = np.unique([str(item.image) for item in items], return_inverse=True)[1]
    groups = {group: np.flatnonzero(names == group) for group in dict.fromkeys(names.tolist())}
    if dataset == "aro-attribution":                  # ARO's rule
        groups = {group: numbers for group, numbers in groups.items() if len(numbers) >= 25}
    means = {"mean of groups": list(groups)}
    if dataset == "aro-relation":
        symmetric = (Path(__file__).parent / "assets" / "aro-symmetric.txt").read_text().splitlines()
        means["not symmetric"] = [group for group in groups if group not in symmetric]
    for rule, (real, blind) in scores.items():
        right = {}
        for kind, score in (("", real), (" blind", blind)):
            variants = {"sum": score, "a token": score / lengths, "+ length": score + terms}
            for name in list(variants)[:1 if rule == "cosine" else 3 if terms.any() else 2]:
                right[name + kind] = variants[name][:, 0] > variants[name][:, 1:].max(1)        # a tie is wrong
        gains = (real[:, 0] - blind[:, 0]) / (1 if rule == "cosine" else lengths[:, 0])
        error = np.sqrt((np.bincount(owner, gains - gains.mean()) ** 2).sum()) / len(items)     # clustered by image
        print(f"\n{rule}: its own image is worth {gains.mean():.3f} ± {error:.3f} "
              f"{'(cosine)' if rule == 'cosine' else 'nats per token'} to the true caption\n"
              f"{'group':20}{'items':>7}" + "".join(f"{name:>15}" for name in right))
        rows = {group: [100 * float(ok[numbers].mean()) for ok in right.values()] for group, numbers in groups.items()}
        rows |= {mean: np.mean([rows[group] for group in members], 0).tolist()
                 for mean, members in means.items() if members}
        for group, row in rows.items():
            if len(groups) <= 12 or group in means:
                print(f"{group[:19]:20}{len((means | groups)[group]):7}" + "".join(f"{value:15.1f}" for value in row))
        record[rule] = {group: dict(zip(right, row, strict=True)) for group, row in rows.items()}
        record[rule] |= {"gain": float(gains.mean()), "gain_se": float(error)}
    return record


# ---------------------------------------------------------------------------------------------- command line
def export_encoder(model, path):
    """The encoder alone: a state dict for timm's VisionTransformer, its arguments, and how to prepare images."""
    width, depth, heads, patch = SIZES[model.config.size]
    arguments = {"img_size": model.config.image_size, "patch_size": patch, "embed_dim": width, "depth": depth,
                 "num_heads": heads, "class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    weights = {name: value.cpu().clone() for name, value in model.encoder.state_dict().items()}
    with data.replace_file(path) as file:
        torch.save({"state_dict": weights, "timm": arguments, "mean": [0.5] * 3, "std": [0.5] * 3, "pool": "avg",
                    "config": {"size": model.config.size, "image_size": model.config.image_size}}, file)


def main_compositionality(args, model, checkpoint):
    """Score the items and print the tables; returns the accuracies."""
    if args.dataset == "swaps":
        shards = data.open_split(args.data_dir, "shapes", "val")
        items, find_image, missing = swap_items(shards), shards.image, {}
    else:
        items, find_image = read_items(args.dataset, args.source, args.images), str
        missing = dict.fromkeys(item.image for item in items if not os.path.exists(item.image))
    if missing and not args.allow_missing:
        raise UserError(f"{len(missing)} images are missing, {next(iter(missing))} first: expected them in --images "
                        f"{args.images}; --allow-missing leaves their items out")
    items = [item for item in items if item.image not in missing]
    if missing:
        print(f"{len(missing)} images are missing, {len(items)} items are left; missing: {' '.join(missing)}")
    order = data.random_stream(args.seed, data.ORDER, 0).permutation(len(items))
    items = [items[i] for i in sorted(order[:args.limit])]
    scores = score_items(model, checkpoint, items, find_image, args.samples, args.seed)
    return {"items": len(items), "results": report_items(args.dataset, items, *scores)}


def main_probe(args, model, checkpoint):
    """Probe the trained and the random encoder and print their figures; returns them."""
    torch.manual_seed(checkpoint["options"]["seed"])  # as train.py did: the encoder before its training
    encoders = {"trained": model, "random": Captioner(model.config).to(args.device).eval()}
    shapes, features, labels, results = args.dataset == "shapes", {}, {}, defaultdict(dict)
    for split, limit in (("train", args.limit or (200 if shapes else None)), ("test", None)):
        for name, encoder in encoders.items():
            if shapes:                                # the label is the caption, which has all classes in it
                shards = data.open_split(args.data_dir, "shapes", "train" if split == "train" else "val")
                rows = range(len(shards))[:limit]
                key, images = f"{shards.digest} {rows}", (
                    (data.decode_caption(shards.tokenizer, shards.captions(i)[0]), i, shards.image(i)) for i in rows)
            else:
                key, images = open_labelled(args.source, args.dataset, split)
            x, names = compute_features(encoder, key, images, Path(args.ckpt).parent / "features")
            rows = np.random.default_rng(args.seed).permutation(len(names))[:limit]
            features[name, split], labels[split] = x[rows], names[rows]
    count = {split: len(names) for split, names in labels.items()}
    print(f"{args.dataset}: {count['train']:,} training and {count['test']:,} test images; {model.config.size} after "
          f"{checkpoint['step']:,} steps and at random initialization; in percent:")
    metric = "mean_class" if args.dataset in ("pets", "aircraft", "caltech101", "flowers") else "top1"
    device = "cpu" if args.device.startswith("mps") else args.device              # MPS has no float64
    for task in data.SHAPES_CAPTION.groupindex if shapes else ["class"]:
        words = [[data.SHAPES_CAPTION.fullmatch(name)[task] for name in names] if shapes else names
                 for names in labels.values()]
        given, answers = number_classes(*words, args.shots)
        for name in encoders:
            splits = features[name, "train"], given, features[name, "test"], answers
            found = results[task][name] = linear_probe(*splits, args.seed, device)
            found |= {f"{shots}-shot": few_shots(*splits, shots, device) for shots in args.shots}
            found |= {"knn": nearest_neighbours(*splits)} if args.knn else {}
            texts = [f"{figure} {' ± '.join(f'{100 * x:.1f}' for x in np.atleast_1d(found[figure]))}"
                     for figure in sorted(found, key=lambda figure: figure != metric) if figure not in ("C", "lr")]
            print(f"{task:12}{name:9}" + "   ".join(texts), flush=True)
    return count | {"results": results}


def main():
    """Probe or score what the command line names, print, and append one line to probe.jsonl."""
    parser = data.Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="FILE", help="checkpoint of train.py; results go to probe.jsonl beside it")
    add("--dataset", help="shapes; any name for the labelled images in --source; or, for compositionality: swaps (in "
        "drawings), sugarcrepe, aro-relation, aro-attribution, or options: a JSON list {image, options: [true, ...]}")
    add("--source", metavar="PATH", help="folder with train and test (or val), which are folders of class folders or "
        "tars of CLASS/image, or with CIFAR's *-binary.tar.gz; or annotations, a file or a folder")
    add("--images", metavar="DIR", default=".", help="compositionality: where the images are (default: here)")
    add("--data-dir", default="data", metavar="DIR", help="of the shards of shapes (default: data)")
    add("--limit", type=int, metavar="N", help="use N random training images, or items (default: all; of shapes 200)")
    add("--shots", type=lambda text: [int(k) for k in text.split(",")], default=[], metavar="K,K", help="also probe "
        "from so many images a class, mean and deviation of five draws: 1,5,10")
    add("--knn", action="store_true", help="also vote of the 20 nearest neighbours, which needs no training")
    add("--samples", type=int, default=32, metavar="N", help="random masks of a Monte Carlo score (default: 32)")
    add("--allow-missing", action="store_true", help="leave out items whose image is not there, naming them")
    add("--export", metavar="FILE", help="write the encoder alone, for timm, and do nothing else")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, else cpu")
    add("--seed", type=int, default=0, help="of the held-out tenth, of --limit and of the masks (default: 0)")
    args = parser.parse_args()
    data.check_least(args, limit=20, samples=1, seed=0)
    if min(args.shots, default=1) < 1:
        raise UserError("--shots: expected numbers of at least 1, for example 1,5,10")
    model, checkpoint = load_captioner(args.ckpt, args.device)
    if args.export:
        export_encoder(model, args.export)
        return print(f"encoder of {args.ckpt} written to {args.export}")
    if not args.dataset or not (args.source or args.dataset in ("shapes", "swaps")):
        raise UserError("expected --dataset shapes or swaps, or --dataset NAME --source PATH (see -h)")
    work = main_compositionality if args.dataset in ("swaps", *ANNOTATIONS) else main_probe
    record = vars(args) | {"step": checkpoint["step"]} | work(args, model, checkpoint)
    with open(Path(args.ckpt).parent / "probe.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    data.run(main)
