"""Evaluate a checkpoint: linear probes of its encoder, compositionality of its captions.

    python probe.py --ckpt CKPT --dataset cifar10 --source raw/cifar10 --knn
    python probe.py --ckpt CKPT --dataset sugarcrepe --source sugar-crepe/data --images val2017

Linear probe: logistic regression on mean patch features (SGD for large sets; ImageNet takes
20 GB); one of 45 L2 strengths is chosen on a tenth of the training images. A random encoder is
the baseline. Compositionality: the true caption has to score higher. `blind` scores use 64
other images instead: a lower bound on the accuracy of language alone."""
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import sys
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
from data import BadSample, UserError
from model import SIZES, build_model
from sample import length_terms, load_captioner, score_captions

STRENGTHS = np.logspace(-6, 5, 45)  # scikit-learn's C, the range of DINOv2
RATES = np.logspace(-3, 1, 9)
EXACT = 8e6  # most images * max(classes, D/16) of fit_logistic: half an hour
PART = 8192  # images in a file of cached features
RULES = {
    "mdc": ("monte-carlo", "parallel", "leave-one-out"),
    "ar": ("log p",),
    "clip": ("cosine",),
}
ANNOTATIONS = {  # fields: image, group (None: name of the file) and two captions
    "sugarcrepe": ("filename", None, "caption", "negative_caption"),
    "aro-relation": ("image_path", "relation_name", "true_caption", "false_caption"),
    "aro-attribution": ("image_path", "attributes", "true_caption", "false_caption"),
}
# image: (file name or number, box); captions: (true, wrong)
Item = namedtuple("Item", "image group captions")


# ---- images and features
def read_archive(path, split):
    """Yield (label, name, image) of a tar of CLASS/image or CIFAR's archive."""
    file = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    skipped = Counter()
    try:
        for name, size in data.tar_members(file, skipped):
            content = file.read(min(size, 1 << 28))
            folder, base = os.path.split(name)
            if not base.endswith(".bin"):
                if data.not_text(name):
                    yield os.path.basename(folder), name, io.BytesIO(content)
            elif base.startswith("test") == (split == "test"):
                labels = 1 if "batch" in base else 2  # CIFAR-100: a coarse one first
                for record in np.frombuffer(content, np.uint8).reshape(-1, labels + 3072):
                    pixels = record[labels:].reshape(3, 32, 32).transpose(1, 2, 0)
                    yield f"{record[labels - 1]:03}", name, Image.fromarray(pixels)
    except Exception as problem:
        skipped[problem] += 1
    if skipped:
        raise UserError(f"{path}: {data.listed([*skipped])}; expected a whole tar of plain files")


def open_labelled(source, dataset, split):
    """-> key, which changes with the images of the split, and iterator over (label, name, file or
    PIL image)."""
    source = Path(source)
    names = ["train"] if split == "train" else ["test", "val"]
    archive = dataset.replace("cifar", "cifar-") + "-binary.tar.gz"
    places = [source / place for name in names
              for place in (name, f"{name}.tar", f"{dataset}-{name}.tar")]
    places.append(source if source.name == archive else source / archive)
    place = source
    for place in filter(Path.exists, places):
        if not place.is_dir():
            return f"{split} {data.describe(place)}", read_archive(place, split)
        files = [Path(file) for file in data.list_files(place, set()) if data.not_text(file)]
        images = [(file.relative_to(place).parts[0], file, file) for file in files
                  if file.parent != place]
        if images:  # ILSVRC's flat test folder has no labels: val is next
            if len(images) < len(files):
                print(f"note: {place}: files without a class: {len(files) - len(images)}")
            key = [(label, *data.describe(file)) for label, _, file in images]
            return f"{split} {key}", iter(images)

    inside = data.listed(sorted(os.listdir(place))) if place.is_dir() else "no such folder"
    raise UserError(f"--source {source}: expected {names[-1]}/CLASS/image.jpg, or {dataset}-"
                    f"{names[0]}.tar of these, or CIFAR's *-binary.tar.gz; found in {place}: {inside}")


def read_square(side, image, box=None):
    """Central square of an image or its box -> uint8 [side,side,3]. Raises BadSample."""
    if not isinstance(image, Image.Image):
        image = data.open_image(image, None if box else side)
    if box:
        image = image.crop(np.clip(box, 0, image.size * 2).tolist())  # w, h, w, h
    if not all(image.size):
        raise BadSample(f"its box {box} is empty")
    return data.crop_square(image, side)


@torch.no_grad()
def encode(model, samples, unusable, batch_size=128):
    """Samples (label, name, image[, box]) -> yield (labels, features [B,N,D]); messages about
    images that cannot be read go to the list `unusable`."""
    def load(sample):
        label, name, *image = sample
        try:
            return label, read_square(model.config.image_size, *image)
        except BadSample as reason:
            return f"{name}: {reason}"

    samples = iter(tqdm(samples, "images", leave=False))
    with ThreadPoolExecutor() as threads:
        while batch := list(itertools.islice(samples, batch_size)):
            loaded = list(threads.map(load, batch))
            unusable += [message for message in loaded if isinstance(message, str)]
            pairs = [pair for pair in loaded if isinstance(pair, tuple)]
            if pairs:
                labels, squares = zip(*pairs)
                pixels = torch.from_numpy(np.stack(squares)).to(next(model.parameters()).device)
                yield labels, model.encode(pixels)


def compute_features(model, key, images, cache=None):
    """Mean patch features [n,D], labels [n] and messages about unusable images. The folder `cache`
    keeps them in parts: a stopped run continues."""
    digest = hashlib.sha256(f"{model.config} {PART} {key}".encode())
    for weight in model.encoder.parameters():
        digest.update(weight.detach().cpu().numpy())
    for file in ("model.py", "data.py", "probe.py"):  # code changes features
        digest.update(Path(__file__).with_name(file).read_bytes())
    parts = []
    skip = 0  # cached ones, still in `images`
    while not parts or len(parts[-1]["labels"] + parts[-1]["unusable"]) == PART:
        path = Path(cache or "", f"{digest.hexdigest()[:32]}-{len(parts):04}.pt")
        if cache and path.exists():
            parts.append(torch.load(path, weights_only=True, mmap=True))
            skip += PART
            continue
        part = {"labels": [], "unusable": []}
        features = [torch.zeros(0, SIZES[model.config.size].width)]
        samples = itertools.islice(images, skip, skip + PART)
        skip = 0
        for labels, patches in encode(model, samples, part["unusable"]):
            part["labels"] += labels
            features.append(patches.mean(1).cpu())
        parts.append(part | {"features": torch.cat(features)})
        if cache:
            with data.replace_file(path) as file:
                torch.save(parts[-1], file)
    features = torch.cat([part["features"] for part in parts])
    labels = np.concatenate([part["labels"] for part in parts])
    return features, labels, [message for part in parts for message in part["unusable"]]


# ---- classifiers: n images, D features, S strengths, R learning rates
def fit_logistic(features, labels, classes, strengths, tolerance=1e-6):
    """Multinomial logistic regressions of features [n,D], labels [n] -> [S,D+1,classes], bias last.

    Each minimizes scikit-learn's objective, mean cross-entropy + |W|^2 / (2 C n), until no entry of
    the gradient exceeds `tolerance`. With two classes its C is twice this one."""
    x = F.pad(features.double(), (0, 1), value=1.0)
    penalty = x.new_full((x.shape[1], 1), 1 / len(x))
    penalty[-1] = 0  # the bias is free
    w = previous = x.new_zeros(x.shape[1], classes)
    solutions = []
    for C in tqdm(strengths, "regressions", leave=False):
        guess = 2 * w - previous  # extrapolates the last two solutions
        decay = penalty / C
        p = (x @ guess).softmax(1)
        curvature = x.square().T @ (p * (1 - p)).mean(1, keepdim=True) / len(x) + decay
        # LBFGS sees v = w / scale, in which curvatures are about 1, and the loss divided by
        # `tolerance`, as it ignores curvatures below 1e-10.
        scale = (curvature + 1e-12).rsqrt()
        v = (guess / scale).requires_grad_()
        optimizer = torch.optim.LBFGS([v], max_iter=10_000, tolerance_grad=float(scale.min()),
                                      tolerance_change=1e-12, history_size=10,
                                      line_search_fn="strong_wolfe")

        def closure():
            v.grad = None
            w = v * scale
            loss = F.cross_entropy(x @ w, labels) + (decay * w ** 2).sum() / 2
            loss = loss / tolerance
            loss.backward()
            return loss

        optimizer.step(closure)
        closure()  # LBFGS may leave the gradient of a point that it rejected
        if (v.grad / scale).abs().max() > 1:
            print(f"warning: the fit with C = {C:.1e} did not converge")
        previous, w = w, (v * scale).detach()
        solutions.append(w)
    return torch.stack(solutions)


def fit_minibatch(features, labels, classes, rates, batch_size=1024):
    """Linear classifiers for R learning rates, trained together -> [R,D+1,classes], bias last.

    20 epochs of SGD with momentum 0.9 and a cosine (DINOv2: 10, of crops)."""
    scale = (features.var(0) + 1e-3).rsqrt()  # else axes of small variance are not learned
    weights = features.new_zeros(len(rates), features.shape[1] + 1, classes)
    velocity = torch.zeros_like(weights)
    rates = torch.as_tensor(rates).to(features)[:, None, None]
    generator = torch.Generator().manual_seed(0)
    steps = max(1000, 20 * math.ceil(len(features) / batch_size))
    for step in tqdm(range(steps), "SGD", leave=False):
        rows = torch.randint(len(features), (batch_size,), generator=generator)
        x = F.pad(features[rows] * scale, (0, 1), value=1.0)
        error = (x @ weights).softmax(2) - F.one_hot(labels[rows], classes)  # [R,batch,classes]
        velocity = 0.9 * velocity + x.T @ error / batch_size
        weights -= rates * 0.5 * (1 + math.cos(math.pi * step / steps)) * velocity
    weights[:, :-1] *= scale[:, None]
    return weights


def figures_of(weights, features, labels):
    """Weights [D+1,classes], features [n,D], labels [n] -> {"top1", "mean_class"}."""
    logits = features.to(weights) @ weights[:-1] + weights[-1]
    right = (logits.argmax(1) == labels).double()
    per_class = torch.bincount(labels, right) / torch.bincount(labels)
    return {"top1": float(right.mean()), "mean_class": float(per_class.nanmean())}


def number_classes(train, test):
    """Class names [n] of both splits -> their numbers [n]."""
    names, labels = np.unique(train, return_inverse=True)
    unknown = sorted(set(test) - set(names))
    if len(names) < 2:
        raise UserError(f"all training images are of class {names[0]} (their folder)")
    if unknown:
        raise UserError(f"test images of classes without training images: {data.listed(unknown)}")
    return torch.from_numpy(labels), torch.from_numpy(np.searchsorted(names, test))


def linear_probe(train, labels, test, answers, seed=0):
    """Features [n,D], labels [n] -> figures_of on `test`, the best "C" or "lr", and "held_out", its
    accuracy on a random tenth of `train`."""
    classes = int(labels.max()) + 1
    large = len(train) * max(classes, train.shape[1] / 16) > EXACT
    fit, grid, name = (fit_minibatch, RATES, "lr") if large else (fit_logistic, STRENGTHS, "C")
    mean = train.mean(0)
    deviation = train.std(0, correction=0).clamp(min=1e-6)
    train = (train - mean) / deviation
    axes = torch.linalg.eigh(train.T @ train).eigenvectors
    train = train @ axes  # on principal axes the solvers' scaling whitens the features
    test = (test - mean) / deviation @ axes

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order.tensor_split([math.ceil(len(train) / 10)])
    fitted = fit(train[rest], labels[rest], classes, grid)
    found = [figures_of(w, train[held_out], labels[held_out])["top1"] for w in fitted]
    best = float(np.median(grid[np.equal(found, max(found))]))  # ties: the first underfits
    if best in (grid[0], grid[-1]):
        print(f"note: the best {name}, {best:.2g}, is an end of its grid")
    weights = fit(train, labels, classes, [best])[0]
    return figures_of(weights, test, answers) | {name: best, "held_out": max(found)}


def nearest_neighbours(train, labels, test, answers):
    """Top-1 of a vote of 20 neighbours weighted by exp(cosine / 0.07), as in DINO."""
    train = F.normalize(train)
    right = 0
    for x, y in zip(test.split(128), answers.split(128)):
        cosines, rows = (F.normalize(x) @ train.T).topk(min(20, len(train)))
        votes = F.one_hot(labels[rows]) * (cosines / 0.07).exp()[:, :, None]
        right += int((votes.sum(1).argmax(1) == y).sum())
    return right / len(test)


# ---- compositionality
def swap_items(shards):
    """Three Items per synthetic image: colours exchanged, another form, another place."""
    forms = [{"shape": form} for form in data.FORMS]
    places = [{"row": row} for row in data.ROWS] + [{"column": column} for column in data.COLUMNS]
    items = []
    for i in range(len(shards)):
        caption = data.decode_caption(shards.tokenizer, shards.captions(i)[0])
        words = data.SHAPES_CAPTION.fullmatch(caption).groupdict()
        rng = data.random_stream(i, data.SWAP, 1)
        exchanged = {"colour": words["background"], "background": words["colour"]}
        for group, changes in (("colours", [exchanged]), ("form", forms), ("place", places)):
            wrong = [words | change for change in changes if words | change != words]
            wrong = data.shapes_caption(**rng.choice(wrong))
            items.append(Item((i, None), group, [caption, wrong]))
    return items


def read_items(dataset, source, folder):
    """Annotation file, or folder of them -> Items."""
    image, group, *fields = ANNOTATIONS[dataset]
    source = Path(source)
    items = []
    try:
        for file in sorted(source.glob("*.json")) if source.is_dir() else [source]:
            rows = json.loads(file.read_bytes())
            for row in rows.values() if isinstance(rows, dict) else rows:
                captions = [data.clean_caption(row[field]) for field in fields]
                if not all(captions):
                    raise ValueError("a caption is empty")
                box = None
                if "bbox_w" in row:
                    x, y = int(row["bbox_x"]), int(row["bbox_y"])
                    box = (x, y, x + int(row["bbox_w"]), y + int(row["bbox_h"]))
                name = row[group] if group else file.stem
                name = name if isinstance(name, str) else "_".join(name)
                items.append(Item((os.path.join(folder, row[image]), box), name, captions))
    except Exception as problem:
        raise UserError(f"{file}: not {dataset} after {len(items)} good items: {problem!r}") from None
    if not items:
        raise UserError(f"--source {source}: no items")
    return items


def normalize_caption(caption):
    """Without capital first letter and final full stop: SugarCrepe's wrong ones have more."""
    return caption[:1].lower() + caption[1:].removesuffix(".").rstrip()


@torch.no_grad()
def score_items(model, checkpoint, items, features, draws=32, seed=0, batch_size=128,
                exchanges=64):
    """-> scores {rule: [real or blind, items, 2 captions]}, lengths in tokens [items,2] and
    log p(length) [items,2]. features: {item.image: [N,D]}, shuffled; a blind score is the
    log-mean-exp over the next `exchanges` images, with the same masks."""
    tokenizer = data.load_tokenizer(checkpoint["tokenizer"])
    config = model.config
    circle = list(features.values())
    places = {image: place for place, image in enumerate(features)}
    exchanges = min(exchanges, len(circle) - 1)

    texts = [text for item in items for text in item.captions]
    tokens = [tokenizer.encode_ordinary(text) for text in texts]
    if max(map(len, tokens)) >= config.max_tokens:
        print(f"note: captions of more than {config.max_tokens} tokens are cut")
    tokens = [[*ids[:config.max_tokens - 1], config.eos] for ids in tokens]
    owner = np.arange(len(texts)) // 2  # items
    home = np.repeat([places[item.image] for item in items], 2)
    scores = {rule: np.full((2, len(texts)), -np.inf) for rule in RULES[config.objective]}
    for start in tqdm(range(0, len(texts), batch_size), "scoring"):
        batch = slice(start, start + batch_size)
        for shift in range(exchanges + 1):
            seen = [circle[place] for place in (home[batch] + shift) % len(circle)]
            seen = torch.stack(seen).to(next(model.parameters()).device, torch.float32)
            for rule in scores:
                score = score_captions(model, seen, tokens[batch], rule, draws, seed, owner[batch])
                view = scores[rule][min(shift, 1), batch]  # real or blind
                np.logaddexp(view, score, out=view)

    for rule, total in scores.items():
        total[1] -= np.log(exchanges)
        scores[rule] = total.reshape(2, -1, 2)
    lengths = np.array([len(ids) for ids in tokens]).reshape(-1, 2)
    terms = length_terms(checkpoint["lengths"], tokens, config)
    return scores, lengths, terms.view(-1, 2).numpy()


def report_items(dataset, items, scores, lengths, terms):
    """Print and return accuracies in percent, by rule and group."""
    names = np.array([item.group for item in items])
    least = 25 if dataset == "aro-attribution" else 1  # ARO's rule
    counts = Counter(names.tolist())
    groups = {name: names == name for name in sorted(counts) if counts[name] >= least}
    if len(groups) < len(counts):
        print(f"note: groups with fewer than {least} items: {len(counts) - len(groups)}")
    means = {"mean of groups": list(groups)}
    if dataset == "aro-relation":
        symmetric = (Path(__file__).parent / "assets/aro-symmetric.txt").read_text().splitlines()
        means["not symmetric"] = [name for name in groups if name not in symmetric]
    _, owner = np.unique([str(item.image[0]) for item in items], return_inverse=True)

    record = {}
    for rule, score in scores.items():
        variants = {"sum": score}
        if rule != "cosine":
            variants["a token"] = score / lengths
        if terms.any():
            variants["+ length"] = score + terms
        real, blind = variants.get("a token", score)[:, :, 0]
        gains = real - blind
        sums = np.bincount(owner, gains - gains.mean())  # clustered by image
        error = np.linalg.norm(sums) / len(items)
        record[rule] = {"gain": float(gains.mean()), "gain_se": float(error)}

        columns = [name + kind for name in variants for kind in ("", " blind")]
        scored = np.concatenate([*variants.values()])  # [columns,items,2]
        right = scored[:, :, 0] > scored[:, :, 1]  # a tie is wrong
        percent = {name: 100 * right[:, rows].mean(1) for name, rows in groups.items()}
        for mean, members in means.items():
            if members:
                percent[mean] = np.mean([percent[name] for name in members], 0)
        print(f"\n{rule}: gain over other images {gains.mean():.3f} ± {error:.3f}")
        print(f"{'percent':20}" + "".join(f"{column:>15}" for column in columns))
        for name, row in percent.items():
            record[rule][name] = dict(zip(columns, row.tolist()))
            if len(groups) <= 12 or name in means:
                print(f"{name[:19]:20}" + "".join(f"{value:15.1f}" for value in row))
    return record


def main_compositionality(args, model, checkpoint):
    """Score the items, print tables, return the record."""
    open_item = Path  # `encode` opens files
    if args.dataset == "swaps":
        shards = data.open_split(args.data_dir, "shapes", "val")
        items = swap_items(shards)
        open_item = shards.image
    else:
        items = read_items(args.dataset, args.source, args.images)
    data.random_stream(args.seed, data.ORDER, 0).shuffle(items)
    items = items[:args.limit]

    unusable = []
    images = dict.fromkeys(item.image for item in items)
    samples = ((image, image[0], open_item(image[0]), image[1]) for image in images)
    features = {}
    for batch, patches in encode(model, samples, unusable):
        # float16: scores move by 0.0003
        features.update(zip(batch, patches.half().cpu()))
    items = [item for item in items if item.image in features]
    print(f"{len(items):,} items with {len(features):,} images")
    if len(features) < 2:
        raise UserError(f"--images {args.images}: too few images; {data.listed(unusable)}")

    def evaluate(items):
        scores = score_items(model, checkpoint, items, features, args.samples, args.seed)
        return report_items(args.dataset, items, *scores)

    results = evaluate(items)
    if args.dataset == "sugarcrepe":
        print("\nwithout capital first letters and final full stops:")
        items = [item._replace(captions=[*map(normalize_caption, item.captions)]) for item in items]
        results["normalized"] = evaluate(items)
    return {"items": len(items), "unusable": unusable, "results": results}


# ---- probes
def load_split(args, encoder, split, cache):
    """Features [n,D], {task: class names [n]}, messages about unusable images."""
    limit = args.limit if split == "train" else None
    if args.dataset == "shapes":
        shards = data.open_split(args.data_dir, "shapes", split.replace("test", "val"))
        rows = range(len(shards))[:limit]
        key = f"{shards.digest} {rows}"
        captions = (data.decode_caption(shards.tokenizer, shards.captions(i)[0]) for i in rows)
        images = zip(captions, rows, map(shards.image, rows))
    else:
        key, images = open_labelled(args.source, args.dataset, split)
    features, labels, unusable = compute_features(encoder, key, images, cache)
    if not len(labels):
        raise UserError(f"no usable {split} images: {data.listed(unusable)}")
    if limit:
        subset = np.random.default_rng(args.seed).permutation(len(labels))[:limit]
        features, labels = features[subset], labels[subset]
    tasks = {"class": labels}
    if args.dataset == "shapes":
        words = [data.SHAPES_CAPTION.fullmatch(caption) for caption in labels]
        tasks = {task: [match[task] for match in words] for task in words[0].groupdict()}
    return features, tasks, unusable


def main_probe(args, model, checkpoint, cache=None):
    """Probe the trained and the random encoder, print figures, return the record."""
    torch.manual_seed(checkpoint["options"]["seed"])  # as train.py does
    encoders = {"trained": model, "random": build_model(model.config).to(args.device).eval()}
    results = {}
    for name, encoder in encoders.items():
        test, others, more = load_split(args, encoder, "test", cache)  # the smaller first
        train, names, unusable = load_split(args, encoder, "train", cache)
        for task in names:
            labels, answers = number_classes(names[task], others[task])
            splits = [x.to(args.device) for x in (train, labels, test, answers)]
            figures = linear_probe(*splits, args.seed)
            if args.knn:
                figures["knn"] = nearest_neighbours(*splits)
            results.setdefault(task, {})[name] = figures

    print(f"{args.dataset}: {len(train):,} training and {len(test):,} test images")
    for task, name in itertools.product(results, encoders):
        figures = (f"{key} {value:.4g}" for key, value in results[task][name].items())
        print(f"{task:12}{name:9}" + "   ".join(figures))
    return {"unusable": unusable + more, "results": results}


# ---- command line
def export_encoder(model, path):
    """Write the encoder with the arguments of timm's VisionTransformer."""
    config = model.config
    size = SIZES[config.size]
    timm = dict(img_size=config.image_size, patch_size=size.patch, embed_dim=size.width,
                depth=size.depth, num_heads=size.heads, class_token=False, global_pool="avg",
                fc_norm=False, num_classes=0)
    saved = dict(state_dict=model.encoder.cpu().state_dict(), timm=timm, config=vars(config),
                 mean=[0.5] * 3, std=[0.5] * 3)
    with data.replace_file(path) as file:
        torch.save(saved, file)


def main():
    parser = data.Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="results go to probe.jsonl and features/ beside it")
    add("--dataset", help="shapes, or any name with --source; compositionality: swaps (of shapes), "
        "sugarcrepe, aro-relation, aro-attribution")
    add("--source", help="annotations; CIFAR's *-binary.tar.gz; folder with folders or tars `train` "
        "and `test` (or `val`) of CLASS/image")
    add("--images", default=".", help="folder of the annotated images")
    add("--data-dir", default="data")
    add("--limit", type=data.positive_int, help="random training images or items (shapes: first 200)")
    add("--knn", action="store_true", help="also 20 nearest neighbours")
    add("--samples", type=data.positive_int, default=32, help="masks of a Monte Carlo score")
    add("--export", help="only write the encoder to this file, for timm")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=data.non_negative_int, default=0)
    args = parser.parse_args()
    if not (args.export or args.dataset and args.source or args.dataset in ("shapes", "swaps")):
        parser.error("expected --dataset shapes or swaps, or --dataset NAME --source PATH")
    if args.dataset == "shapes" and not args.limit:
        args.limit = 200

    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    model, checkpoint = load_captioner(args.ckpt, args.device)
    if args.export:
        if os.path.exists(args.export):
            parser.error(f"--export {args.export} exists")
        export_encoder(model, args.export)
        return

    cache = Path(args.ckpt).parent / "features"
    try:
        cache.mkdir(exist_ok=True)
        held = data.lock(cache, wait=True)
    except OSError as problem:
        print(f"note: features and results are not kept: {problem}", file=sys.stderr)
        cache = None
    if args.dataset in ("swaps", *ANNOTATIONS):
        record = main_compositionality(args, model, checkpoint)
    else:
        record = main_probe(args, model, checkpoint, cache)
    if cache:
        with open(cache.parent / "probe.jsonl", "a") as file:
            file.write(json.dumps(vars(args) | {"step": checkpoint["step"]} | record) + "\n")
        held.close()
    if record["unusable"]:
        raise UserError(f"left out of these figures: {data.listed(record['unusable'])}")


if __name__ == "__main__":
    data.run(main)
