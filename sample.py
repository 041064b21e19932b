"""Caption images by iterative unmasking: start from [MASK]s only, fill in the most confident word, look again.

    python sample.py --ckpt out/shapes-tiny-mdc/ckpt.pt --dataset shapes --split val --sheet shapes.png
    python sample.py --ckpt out/flickr8k-tiny-mdc/ckpt.pt photo.jpg another.png folder/
    python sample.py --ckpt out/flickr8k-tiny-mdc/ckpt.pt photo.jpg --trace             # every step of the way
    python sample.py --ckpt out/flickr8k-tiny-mdc/ckpt.pt photo.jpg --prompt "a ___ dog on the ___"       # infilling
    python sample.py --ckpt out/flickr8k-tiny-mdc/ckpt.pt --score "a dog runs" "a cat sleeps" photo.jpg   # likelihoods

An image is encoded once; the decoder then runs once a step on all captions of a batch. The decoder is told how long a
caption is (pads were hidden from it in training), so a length has to be chosen before the first word is. A model of
`train.py --objective ar` writes from left to right instead and ends by itself.
"""
import argparse
import functools
import json
import math
import operator
import os
import re
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import diffusion
from data import (
    IMAGE_TYPES,
    SCORING,
    BadSample,
    Batches,
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
from model import Captioner, Config


def load_captioner(path, device="cpu"):
    """Checkpoint file -> (Captioner in eval mode on `device`, the checkpoint's dict). Nothing in the file is executed.

    Raises UserError for a file that is no checkpoint of ours.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = Captioner(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; train one with: python train.py") from None
    except Exception as problem:                      # a pickle can break in any way
        raise UserError(f"{path} is not a checkpoint of train.py ({type(problem).__name__})") from None
    try:
        return model.to(device).eval(), checkpoint
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device} cannot be used here; try --device cpu") from None


# ---------------------------------------------------------------------------------------------- captions
def choose_lengths(histogram, count, length="typical", generator=None):
    """Caption lengths in tokens, EOS included, for `count` images -> int tensor [count].

    histogram {length: captions} of the training set, or a part of it. length: "typical" is its median, "draw" draws
    from it, a number is taken as it is.
    """
    if isinstance(length, int):
        return torch.full((count,), length)
    lengths, weights = torch.tensor(sorted(histogram)), torch.tensor([histogram[n] for n in sorted(histogram)]).double()
    if length == "draw":
        return lengths[torch.multinomial(weights, count, replacement=True, generator=generator)]
    return lengths[int((weights.cumsum(0) < weights.sum() / 2).sum())].expand(count)


@torch.no_grad()
def caption_images(model, images, lengths, steps=None, order="confidence", temperature=0.0, generator=None, given=None):
    """Caption a batch; yields (tokens [B,T], mask [B,T]) at the start and after every step, the captions last.

    images [B,S,S,3] uint8; lengths [B]: tokens of each caption, its EOS included. given: words to keep, as tokens [T]
    and mask [T], True at the blanks; lengths are T then. The rest is diffusion.denoise's. An autoregressive model takes
    only temperature and generator.
    """
    device, decoder = next(model.parameters()).device, model.decoder
    kv = decoder.read(model.encode(images.to(device)))
    if decoder.causal:
        caches = [[] for _ in decoder.blocks]
        yield from diffusion.autoregress(lambda tokens, i: decoder.next_word(kv, tokens, i, caches), len(images),
                                         model.config.max_tokens, model.config.eos, temperature, generator, device)
        return
    lengths = lengths.to(device) if model.config.pads == "hidden" else lengths.to(device) * 0 + model.config.max_tokens
    valid = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    rows = valid.flatten().nonzero().squeeze(1)
    tokens, mask = torch.zeros_like(valid, dtype=torch.long), valid
    if given is not None:                             # with pads="eos" the pads are given as well
        missing = valid.shape[1] - len(given[0])
        tokens, mask = (F.pad(x, (0, missing), value=fill).to(device).expand(len(images), -1)
                        for x, fill in zip(given, (model.config.eos, False), strict=True))
    yield from diffusion.denoise(lambda tokens, mask, where: decoder(kv, tokens, mask, valid, rows, where),
                                 tokens, mask, steps, order, temperature, generator)


def final(steps):
    """The last item of an iterator: the captions of caption_images."""
    *_, last = steps
    return last[0].cpu()


def read_prompt(prompt, tokenizer, longest):
    """Text with blanks -> tokens [T] and mask [T], True at the blanks, EOS last. `___` is one token, mostly a word.

    Raises UserError if there is no blank, or more than `longest` tokens.
    """
    tokens, mask = [], []
    for part in re.split(r"(\s*_{2,})", prompt):
        ids = [0] if part.endswith("__") else tokenizer.encode_ordinary(part)
        tokens, mask = tokens + ids, mask + [part.endswith("__")] * len(ids)
    if not any(mask) or len(tokens) >= longest:
        raise UserError(f"--prompt {prompt!r}: expected words with blanks, as in \"a ___ dog on the ___\", of at most "
                        f"{longest - 1} tokens in all")
    return torch.tensor([*tokens, tokenizer.eot_token]), torch.tensor([*mask, False])


@torch.no_grad()
def score_captions(model, features, captions, rule="monte-carlo", draws=32, seed=0, ratios=(0.0, 1.0)):
    """How well captions fit images -> [B] float64, in nats summed over tokens; higher is better.

    features [B,N,D] from model.encode; captions: B lists of token ids with EOS, at most max_tokens long. rule, ratios:
    see diffusion.scoring_masks; the same seed gives all captions the same random masks. An autoregressive model has one
    rule, the exact log p; of CLIP the score is the cosine.
    """
    device, config = features.device, model.config
    T = config.max_tokens if config.pads == "eos" else max(map(len, captions))
    tokens = torch.tensor([[*caption, *[config.eos] * (T - len(caption))] for caption in captions], device=device)
    lengths = [T if config.pads == "eos" else len(caption) for caption in captions]
    valid = torch.arange(T, device=device) < torch.tensor(lengths, device=device)[:, None]
    if config.objective == "clip":
        return F.cosine_similarity(*model.match(features, tokens, valid)).cpu().double()
    kv = model.decoder.read(features)

    def predict(tokens, mask, where):
        inputs, mask = diffusion.shift_right(tokens) if model.decoder.causal else (tokens, mask)
        return model.decoder(kv, inputs, mask, valid, None, where)

    rng = random_stream(seed, SCORING, 0)
    noise, u = torch.from_numpy(rng.random((draws, config.max_tokens))), rng.random()
    rule = "parallel" if model.decoder.causal else rule
    return diffusion.log_likelihood(predict, tokens, valid, rule, noise, u, ratios)


def length_terms(histogram, captions, config):
    """log p(length) [B] in nats of B token lists, from the training captions' histogram with one added to each length.

    What a model with hidden pads, which is told the length, leaves out; zero where the score has it already.
    """
    if config.objective != "mdc" or config.pads == "eos":
        return torch.zeros(len(captions), dtype=torch.float64)
    counts = torch.tensor([histogram.get(len(caption), 0) + 1 for caption in captions], dtype=torch.float64)
    return (counts / (sum(histogram.values()) + config.max_tokens)).log()


def print_scores(model, checkpoint, tokenizer, names, images, captions, draws, seed):
    """For every image the captions, best first (length included), with the scores of all rules in nats."""
    longest, trained = model.config.max_tokens, checkpoint["options"]["ratios"]
    tokens = [[*tokenizer.encode_ordinary(caption), tokenizer.eot_token] for caption in captions]
    if max(map(len, tokens)) > longest:
        raise UserError(f"--score: expected captions of at most {longest} tokens, EOS included")
    objective, lengths = model.config.objective, torch.tensor([len(ids) for ids in tokens])
    lengthy = length_terms(checkpoint["lengths"], tokens, model.config)
    features = model.encode(images.to(next(model.parameters()).device))
    for i, name in enumerate(names):
        def score(rule, image=i, ratios=(0.0, 1.0)):
            expanded = features[image].expand(len(tokens), -1, -1)
            return score_captions(model, expanded, tokens, rule, draws, seed, ratios)

        columns = {{"clip": "cosine", "ar": "log p"}.get(objective, "bound"): (total := score("monte-carlo"))}
        if objective != "clip":
            columns["a token"] = total / lengths
            others = [score("monte-carlo", image=other) for other in range(len(names)) if other != i]
            if others:                                # log-mean-exp: the likelihood of a caption without its image
                columns["gain"] = (total - torch.stack(others).logsumexp(0) + math.log(len(others))) / lengths
        if objective not in ("clip", "ar"):
            columns |= {"+ length": total + lengthy, "trained t": score("monte-carlo", ratios=trained),
                        "parallel": score("parallel"), "leave 1 out": score("leave-one-out")}
        print(name + "\n" + "".join(f"{column:>13}" for column in columns) + "   caption")
        for k in (total + lengthy).argsort(descending=True).tolist():
            print("".join(f"{column[k]:13.3f}" for column in columns.values()) + f"   {captions[k]}")


# ---------------------------------------------------------------------------------------------- caption metrics
def ngrams(words, n):
    """Counter of the n-grams of a list of words."""
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def bleu(hypotheses, references):
    """Corpus BLEU-1..4 (Papineni et al. 2002) with the closest reference length -> four numbers in 0..1."""
    right, guessed, length, closest = [0] * 4, [0] * 4, 0, 0
    for words, truths in zip(hypotheses, references, strict=True):
        length += len(words)
        closest += min((abs(len(truth) - len(words)), len(truth)) for truth in truths)[1]
        for n in range(4):
            most = functools.reduce(operator.or_, (ngrams(truth, n + 1) for truth in truths))
            right[n] += (ngrams(words, n + 1) & most).total()
            guessed[n] += max(0, len(words) - n)
    precisions = np.cumprod([(r + 1e-15) / (g + 1e-9) for r, g in zip(right, guessed, strict=True)])
    ratio = (length + 1e-15) / (closest + 1e-9)
    return [float(p ** (1 / (n + 1)) * min(1, math.exp(1 - 1 / ratio))) for n, p in enumerate(precisions)]


def rouge_l(hypotheses, references, beta=1.2):
    """Mean ROUGE-L (Lin 2004): best recall and best precision of the longest common subsequence, taken apart."""
    scores = []
    for words, truths in zip(hypotheses, references, strict=True):
        common = []
        for truth in truths:
            row = [0] * (len(truth) + 1)
            for word in words:
                before = row[:]
                for j, other in enumerate(truth):
                    row[j + 1] = before[j] + 1 if word == other else max(row[j], before[j + 1])
            common.append(row[-1])
        precision = max(common) / max(1, len(words))
        recall = max(c / max(1, len(truth)) for c, truth in zip(common, truths, strict=True))
        scores.append((1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision) if precision else 0.0)
    return float(np.mean(scores))


def cider_d(hypotheses, references, sigma=6.0):
    """Mean CIDEr-D (Vedantam et al. 2015), times 10: clipped cosines of tf-idf n-grams, punished for length."""
    seen = Counter(gram for truths in references
                   for gram in {g for truth in truths for n in range(4) for g in ngrams(truth, n + 1)})
    documents = math.log(len(references))

    def vectors(words):
        return [{g: count * (documents - math.log(max(1, seen[g]))) for g, count in ngrams(words, n + 1).items()}
                for n in range(4)]

    scores = []
    for words, truths in zip(hypotheses, references, strict=True):
        mine, total = vectors(words), 0.0
        for truth in truths:
            distance = max(0, len(words) - 1) - max(0, len(truth) - 1)
            for own, other in zip(mine, vectors(truth), strict=True):
                norms = math.sqrt(sum(x * x for x in own.values()) * sum(x * x for x in other.values()))
                dot = sum(min(value, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, value in own.items())
                total += (dot / norms if norms else dot) * math.exp(-distance ** 2 / (2 * sigma ** 2))
        scores.append(10 * total / 4 / len(truths))
    return float(np.mean(scores))


def print_metrics(hypotheses, references):
    """Print BLEU, ROUGE-L and CIDEr-D of lists of words and lists of lists of words, as pycocoevalcap defines them."""
    names = [f"BLEU-{n}" for n in range(1, 5)] + ["ROUGE-L", "CIDEr-D"]
    values = [*bleu(hypotheses, references), rouge_l(hypotheses, references), cider_d(hypotheses, references)]
    print("  ".join(f"{name} {value:.4f}" for name, value in zip(names, values, strict=True)))


def score_files(made, given):
    """Print the metrics of two JSON files, {image: caption} and {image: [captions]}; words end at white space."""
    try:
        made, given = (json.loads(Path(file).read_text()) for file in (made, given))
        pairs = [(made[name].split(), [text.split() for text in given[name]]) for name in sorted(made)]
        if not pairs or not all(truths for _, truths in pairs):
            raise ValueError("an image without a caption")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as problem:
        raise UserError(f"--score-files: {type(problem).__name__}: {problem}; expected {{image: caption}} and {{image: "
                        "[captions]}, every image of the first in the second") from None
    print_metrics(*zip(*pairs, strict=True))


# ---------------------------------------------------------------------------------------------- showing
def show(tokenizer, tokens, mask):
    """One state of a caption as text, `_` for every token that is still masked; nothing after an EOS."""
    words, start = [], 0
    for i, (token, masked) in enumerate(zip(tokens.tolist(), mask.tolist(), strict=True)):
        if masked or token == tokenizer.eot_token:
            words += [tokenizer.decode(tokens[start:i].tolist(), errors="replace")] + [" _"] * masked
            start = i + 1
        if token == tokenizer.eot_token and not masked:
            break
    else:
        words.append(tokenizer.decode(tokens[start:].tolist(), errors="replace"))
    return "".join(words).strip()


def contact_sheet(images, texts, path, columns=4, side=180):
    """Draw images [n,S,S,3] uint8 in a grid, each over its lines of text: texts is a list of [(line, colour), ...]."""
    font = ImageFont.load_default(15)
    wrapped = [[(part, colour) for line, colour in lines for part in textwrap.wrap(line, side // 8) or [""]]
               for lines in texts]
    gap, height = 14, side + 20 * max(map(len, wrapped)) + 22
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * height
        sheet.paste(Image.fromarray(np.asarray(image)).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        for number, (line, colour) in enumerate(lines):
            draw.text((x, y + side + 6 + 20 * number), line, colour, font)
    sheet.save(path)


def find_images(paths):
    """Files and folders -> image files, those of a folder in alphabetical order. Raises UserError if there is none."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected images (jpg, png, webp) or folders of them")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in inside if not path.is_dir() or file.suffix.lower().lstrip(".") in IMAGE_TYPES]
    if not files:
        raise UserError(f"{' '.join(paths)}: no jpg, png or webp images there")
    return files


def show_example(batch, tokenizer, objective):
    """A training caption, its tokens, and what the model is asked about it, as text."""
    tokens, mask, length = batch["tokens"][0], batch["mask"][0], int(batch["valid"][0].sum())
    if objective == "ar":
        tokens, mask = tokens.roll(-1), mask & False
    numbers = " ".join(map(str, tokens[:length].tolist()))
    text = f"  caption  {decode_caption(tokenizer, tokens)}\n  tokens   {numbers}\n"
    if objective == "clip":
        return f"a training example:\n{text}  task     to find the caption of each image in the batch, and vice versa"
    if objective == "ar":
        return f"a training example:\n{text}  task     each token from the image and the tokens before it"
    share = f"masked at t = {float(batch['ratio'][0]):.2f}" if len(batch["ratio"]) else "masked"
    return (f"a training example, {share}; every masked word weighs 1/t:\n{text}"
            f"  input    {show(tokenizer, tokens[:length], mask[:length])}   and the image")


def report(model, val, seed, lengths, path):
    """Caption validation images: draws the first into `path`; {"exact": share of captions exactly right} for shapes."""
    shapes, right, total = val.folder.parent.name == "shapes", 0, 0
    batches = Batches(val, min(100, len(val)), model.config.image_size, model.config.max_tokens, seed, augment=False)
    for number in range(-(-len(val) // batches.batch_size) if shapes else 1):
        batch = batches[number]
        count = len(batch["images"])
        tokens = final(caption_images(model, batch["images"], choose_lengths(lengths, count)))
        made, given = ([decode_caption(val.tokenizer, row) for row in rows] for rows in (tokens, batch["tokens"]))
        right, total = right + sum(a == b for a, b in zip(made, given, strict=True)), total + count
        if number == 0:
            texts = [[(a, "green" if a == b else "darkred") if shapes else (a, "black"), (f"given: {b}", "grey")]
                     for a, b in zip(made[:12], given[:12], strict=True)]
            contact_sheet(batch["images"][:12], texts, path)
    return {"exact": right / total} if shapes else {}


# ---------------------------------------------------------------------------------------------- command line
def main():
    """Caption what the command line names, batch by batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="image files or folders; or use --dataset")
    add("--ckpt", metavar="FILE", help="checkpoint of train.py")
    add("--dataset", help="caption a split of these shards instead")
    add("--split", default="val", help="with --dataset (default: val)")
    add("--data-dir", default="data", metavar="DIR", help="default: data")
    add("--count", type=int, metavar="N", help="only the first N images (default: all)")
    add("--steps", type=int, metavar="N", help="denoising steps; fewer are faster and worse (default: a token a step)")
    add("--length", default="typical", metavar="N", help="tokens of a caption with its EOS: a number, `typical` "
        "(median of the training captions, the default) or `draw` (drawn from them for each image)")
    add("--temperature", type=float, default=0.0, metavar="X", help="0: likeliest words (default); 1: drawn")
    add("--order", choices=diffusion.ORDERS, default="confidence", help="which words come first (default: confidence)")
    add("--prompt", metavar="TEXT", help='keep these words and fill the blanks, each `___` one token: "a ___ dog"')
    add("--score", nargs="+", metavar="TEXT", help="rank these captions instead; what names a file is an image. "
        "gain: against the other images of the same --batch-size")
    add("--metrics", action="store_true", help="with --dataset: BLEU, ROUGE-L and CIDEr-D against all its captions")
    add("--score-files", nargs=2, metavar=("MADE", "GIVEN"), help="the same for captions made elsewhere, already cut "
        "into words: JSON files {image: caption} and {image: [captions]}")
    add("--draws", type=int, default=32, metavar="N", help="random masks for each score (default: 32)")
    add("--trace", action="store_true", help="print the caption after every step, `_` for a masked token")
    add("--sheet", metavar="FILE", help="draw the images over their captions into this PNG")
    add("--batch-size", type=int, default=64, metavar="B", help="images at a time (default: 64)")
    add("--seed", type=int, default=0, help="of temperature, order and length (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, else cpu")
    args = parser.parse_args()
    check_least(args, count=1, steps=1, batch_size=1, draws=1, temperature=0, seed=0)
    if args.score_files:
        return score_files(*args.score_files)
    if not args.ckpt:
        raise UserError("--ckpt is missing: a checkpoint of train.py, for example out/shapes-tiny-mdc/ckpt.pt")
    captions = [word for word in args.score or [] if not os.path.exists(word)]
    args.images += [word for word in args.score or [] if os.path.exists(word)]
    model, checkpoint = load_captioner(args.ckpt, args.device)
    tokenizer, longest = load_tokenizer(checkpoint["tokenizer"]), model.config.max_tokens
    if args.length not in ("typical", "draw"):
        if not args.length.isdecimal() or not 1 <= int(args.length) <= longest:
            raise UserError(f"--length {args.length}: expected typical, draw or a number from 1 to {longest}")
        args.length = int(args.length)
    if args.sheet and Path(args.sheet).suffix.lower() not in (".png", ".jpg"):
        raise UserError(f"--sheet {args.sheet}: expected a name that ends in .png")
    if bool(args.dataset) == bool(args.images) or (args.score and not captions):
        raise UserError("expected either images or --dataset, for example: python sample.py --ckpt FILE photo.jpg; "
                        "and with --score captions")
    if args.metrics and not args.dataset:
        raise UserError("--metrics needs captions to compare with: --dataset NAME --split val")
    if model.config.objective == "clip" and not args.score:
        raise UserError(f"{args.ckpt} is a contrastive model, which writes no captions; it ranks them: --score")
    if model.config.objective == "ar" and args.prompt:
        raise UserError(f"{args.ckpt} writes from left to right and cannot fill blanks: --prompt needs masked "
                        "diffusion")
    given = args.prompt and read_prompt(args.prompt, tokenizer, longest)
    generator = torch.Generator().manual_seed(args.seed)
    shards = open_split(args.data_dir, args.dataset, args.split) if args.dataset else None
    names = [shards.key(i) for i in range(len(shards))] if shards else find_images(args.images)
    names = names[:args.count]
    if not names:
        raise UserError(f"{args.data_dir}/{args.dataset} has no images in split {args.split}; try --split train")
    sheet_images, sheet_texts = [], []
    for first in range(0, len(names), args.batch_size):
        part, side, images = range(first, min(first + args.batch_size, len(names))), model.config.image_size, []
        for i in part:
            try:
                images.append(crop_square(shards.image(i, side) if shards else open_image(names[i], side), side))
            except BadSample as reason:
                raise UserError(f"{names[i]}: {reason}") from None
        batch = torch.from_numpy(np.stack(images))
        if captions:
            print_scores(model, checkpoint, tokenizer, [str(names[i]) for i in part], batch, captions, args.draws,
                         args.seed)
            continue
        lengths = choose_lengths(checkpoint["lengths"], len(images), len(given[0]) if given else args.length, generator)
        states = [(tokens.cpu(), mask.cpu()) for tokens, mask in caption_images(
            model, batch, lengths, args.steps, args.order, args.temperature, generator, given)]
        for i in part:
            frames = []
            for tokens, mask in states:
                tokens, mask = tokens[i - first], mask[i - first]
                if model.decoder.causal:              # what is not written yet has no place yet
                    tokens, mask = tokens[~mask], mask[~mask]
                elif model.config.pads == "hidden":
                    tokens, mask = tokens[:lengths[i - first]], mask[:lengths[i - first]]
                frames.append(show(tokenizer, tokens, mask))
            for number, frame in enumerate(frames[:-1] if args.trace else []):
                print(f"{names[i]}\t{number:2}  {frame}")
            print(f"{names[i]}\t{frames[-1]}", flush=True)
            sheet_texts.append([(frames[-1], "black")])
        sheet_images += images if args.sheet else []
    if args.metrics:
        truths = [[decode_caption(tokenizer, ids) for ids in shards.captions(i)] for i in range(len(names))]
        print("words: lower case, without punctuation (our own rule; published figures mostly use the Penn Treebank's)")
        cut = functools.partial(re.findall, r"\w+")
        made = [cut(lines[0][0].lower()) for lines in sheet_texts]
        print_metrics(made, [[cut(text.lower()) for text in texts] for texts in truths])
    if args.sheet and sheet_images:
        contact_sheet(sheet_images, sheet_texts, args.sheet)


if __name__ == "__main__":
    run(main)
