"""Caption images by iterative unmasking: start from [MASK]s only, fill in the most confident word, look again.

    python sample.py --ckpt out/shapes-tiny-mdc/ckpt.pt --dataset shapes --split val --count 8 --html page.html
    python sample.py --ckpt out/flickr8k-tiny4-mdc/ckpt.pt photo.jpg folder/ --trace     # every step of the way
    python sample.py --ckpt out/flickr8k-tiny4-mdc/ckpt.pt photo.jpg --prompt "a ___ dog on the ___"       # infilling
    python sample.py --ckpt out/flickr8k-tiny4-mdc/ckpt.pt --score "a dog runs" "a cat sleeps" photo.jpg   # likelihoods

An image is encoded once, then the decoder runs once a step on all captions of a batch. It is told how long a caption
is (pads were hidden from it in training), so the length is chosen before the first word. A model of
`train.py --objective ar` writes from left to right instead and ends by itself."""
import base64
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import diffusion
from data import BadSample, Batches, UserError, check_least, crop_square, decode_caption, load_tokenizer, open_image
from model import Captioner, Config

PAGE_BYTES, PICTURE = 1_200_000, 256                  # of a page's attention maps; side of its pictures


def load_captioner(path, device="cpu"):
    """Checkpoint file -> (Captioner in eval mode, the checkpoint's dict), or UserError; nothing in it is executed."""
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

    length: a number, "typical" (the median of histogram {length: captions}) or "draw" (drawn from it)."""
    if str(length).isdecimal():
        return torch.full((count,), int(length))
    lengths, weights = torch.tensor(sorted(histogram)), torch.tensor([histogram[n] for n in sorted(histogram)]).double()
    if length == "draw":
        return lengths[torch.multinomial(weights, count, replacement=True, generator=generator)]
    return lengths[int((weights.cumsum(0) < weights.sum() / 2).sum())].expand(count)


@torch.no_grad()
def caption_images(model, images, lengths, steps=None, order="confidence", temperature=0.0, generator=None, given=None):
    """Caption a batch; yields (tokens [B,T], mask [B,T]) at the start and after every step, the captions last.

    images [B,S,S,3] uint8; lengths [B]: tokens of each caption, its EOS included; EOS also follows it. given: words to
    keep, as tokens [T] and mask [T], True at the blanks; lengths are T then. The rest is diffusion.denoise's. An
    autoregressive model takes only temperature and generator."""
    device, decoder, config = next(model.parameters()).device, model.decoder, model.config
    kv = decoder.read(model.encode(images.to(device)))
    if decoder.causal:
        caches = [[] for _ in decoder.blocks]
        yield from diffusion.autoregress(lambda tokens, i: decoder.next_word(kv, tokens, i, caches), len(images),
                                         config.max_tokens, config.eos, temperature, generator, device)
        return
    lengths = lengths if config.pads == "hidden" else torch.full((len(images),), config.max_tokens)
    valid = torch.arange(int(lengths.max()), device=device) < lengths.to(device)[:, None]
    rows = valid.flatten().nonzero().squeeze(1)
    tokens, mask = torch.full(valid.shape, config.eos, device=device), valid
    if given is not None:                             # with pads="eos" the pads are given as well
        tokens[:, :len(given[0])] = given[0].to(device)
        mask = F.pad(given[1], (0, valid.shape[1] - len(given[1]))).to(device).expand_as(valid)

    def predict(tokens, mask, where):
        logits = decoder(kv, tokens, mask, valid, rows, where)
        if given is not None:                         # a blank is a word: no end before the words that are given
            logits[:, model.config.eos] = -torch.inf
        return logits

    yield from diffusion.denoise(predict, tokens, mask, steps, order, temperature, generator)


def captions_of(model, images, lengths, tokenizer):
    """The captions that caption_images arrives at, as a list of str."""
    *_, (tokens, _) = caption_images(model, images, lengths)
    return [decode_caption(tokenizer, row) for row in tokens.tolist()]


def read_prompt(prompt, tokenizer, longest):
    """Text with blanks `___`, a token each -> tokens [T] and mask [T], True at the blanks, EOS last; or UserError."""
    tokens, mask = [], []
    for part in re.split(r"(\s*_{2,})", prompt):
        ids = [0] if part.endswith("__") else tokenizer.encode_ordinary(part)
        tokens, mask = tokens + ids, mask + [part.endswith("__")] * len(ids)
    if not any(mask) or len(tokens) >= longest:
        raise UserError(f"--prompt {prompt!r}: expected words and blanks `___`, at most {longest - 1} tokens in all")
    return torch.tensor([*tokens, tokenizer.eot_token]), torch.tensor([*mask, False])


@torch.no_grad()
def score_captions(model, features, captions, rule="monte-carlo", draws=32, seed=0, ratios=(0.0, 1.0), items=None):
    """How well captions fit images -> [B] float64, in nats summed over tokens; higher is better.

    features [B,N,D] from model.encode; captions: B lists of token ids with EOS, at most max_tokens long. rule, ratios:
    see diffusion.scoring_masks. items: B numbers; captions of the same one, which are compared (default: all), get the
    same random masks, others their own, so that their errors average out. An autoregressive model has one rule, the
    exact log p; of CLIP the score is the cosine."""
    device, config = features.device, model.config
    lengths = [config.max_tokens if config.pads == "eos" else len(caption) for caption in captions]
    padded = [[*caption, *[config.eos] * (max(lengths) - len(caption))] for caption in captions]
    tokens, lengths = torch.tensor(padded, device=device), torch.tensor(lengths, device=device)
    valid = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    if config.objective == "clip":
        return F.cosine_similarity(*model.match(features, tokens, valid)).cpu().double()
    kv = model.decoder.read(features)

    def predict(tokens, mask, where):
        inputs, mask = diffusion.shift_right(tokens) if model.decoder.causal else (tokens, mask)
        return model.decoder(kv, inputs, mask, valid, None, where)

    items = [0] * len(captions) if items is None else [int(item) for item in items]
    rngs = {item: data.random_stream(seed, data.SCORING, item) for item in items}
    masks = {item: (torch.from_numpy(r.random((draws, config.max_tokens))), r.random()) for item, r in rngs.items()}
    rule = "parallel" if model.decoder.causal else rule
    return diffusion.log_likelihood(predict, tokens, valid, rule, [masks[item] for item in items], ratios)


def length_terms(histogram, captions, config):
    """log p(length) [B] in nats of B token lists, from the training captions' histogram with one added to each length.

    What a model with hidden pads, which is told the length, leaves out; zero where the score has it already."""
    if config.objective != "mdc" or config.pads == "eos":
        return torch.zeros(len(captions), dtype=torch.float64)
    counts = torch.tensor([histogram.get(len(caption), 0) + 1 for caption in captions], dtype=torch.float64)
    return (counts / (sum(histogram.values()) + config.max_tokens)).log()


@torch.no_grad()
def print_scores(model, checkpoint, tokenizer, names, images, captions, draws, seed):
    """For every image the captions, best first (length included), with the scores of all rules in nats."""
    longest, objective = model.config.max_tokens, model.config.objective
    tokens = [[*tokenizer.encode_ordinary(data.clean_caption(text)), tokenizer.eot_token] for text in captions]
    if max(map(len, tokens)) > longest:
        raise UserError(f"--score: expected captions of at most {longest} tokens, EOS included")
    lengths, length_term = torch.tensor([*map(len, tokens)]), length_terms(checkpoint["lengths"], tokens, model.config)
    features = model.encode(images.to(next(model.parameters()).device))

    def score(i, rule="monte-carlo", ratios=(0.0, 1.0)):
        return score_captions(model, features[i].expand(len(tokens), -1, -1), tokens, rule, draws, seed, ratios)

    totals = torch.stack([score(i) for i in range(len(names))])                                 # [images, captions]
    for i, name in enumerate(names):
        total, others = totals[i], torch.cat([totals[:i], totals[i + 1:]])
        columns = {{"clip": "cosine", "ar": "log p"}.get(objective, "bound"): total}
        if objective != "clip":
            columns["a token"] = total / lengths
            if len(others):                           # log-mean-exp: the likelihood of a caption without its image
                columns["gain"] = (total - others.logsumexp(0) + math.log(len(others))) / lengths
        if objective == "mdc":
            columns |= {"+ length": total + length_term, "trained t": score(i, ratios=checkpoint["options"]["ratios"]),
                        "parallel": score(i, "parallel"), "leave 1 out": score(i, "leave-one-out")}
        print(name + "\n" + "".join(f"{column:>13}" for column in columns) + "   caption")
        for k in (total + length_term).argsort(descending=True).tolist():
            print("".join(f"{column[k]:13.3f}" for column in columns.values()) + f"   {captions[k]}")


# ---------------------------------------------------------------------------------------------- caption metrics
def ngrams(words, n):
    """Counter of the n-grams of a list of words."""
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def bleu(hypotheses, references):
    """Corpus BLEU-1..4 (Papineni et al. 2002) with the closest reference length -> four numbers in 0..1."""
    counts, lengths = np.zeros((4, 2)), np.zeros(2)
    for words, truths in zip(hypotheses, references, strict=True):
        lengths += len(words), min(map(len, truths), key=lambda length: (abs(length - len(words)), length))
        for n in range(4):
            most = Counter()
            for truth in truths:
                most |= ngrams(truth, n + 1)
            counts[n] += (ngrams(words, n + 1) & most).total(), max(0, len(words) - n)
    precisions = ((counts[:, 0] + 1e-15) / (counts[:, 1] + 1e-9)).cumprod() ** (1 / np.arange(1, 5))
    return (precisions * min(1, math.exp(1 - (lengths[1] + 1e-9) / (lengths[0] + 1e-15)))).tolist()


def rouge_l(words, truths, beta=1.2):
    """ROUGE-L (Lin 2004) of a caption: best recall and best precision of the longest common subsequence."""
    precision, recall = 0.0, 0.0
    for truth in truths:
        row = [0] * (len(truth) + 1)                  # longest common subsequence with each beginning of truth
        for word in words:
            before = row[:]
            for j, other in enumerate(truth):
                row[j + 1] = before[j] + 1 if word == other else max(row[j], before[j + 1])
        precision, recall = max(precision, row[-1] / max(1, len(words))), max(recall, row[-1] / max(1, len(truth)))
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision) if precision else 0.0


def cider_d(hypotheses, references, sigma=6.0):
    """Mean CIDEr-D (Vedantam et al. 2015), times 10: clipped cosines of tf-idf n-grams, punished for length."""
    seen = Counter(gram for truths in references
                   for gram in {g for truth in truths for n in range(4) for g in ngrams(truth, n + 1)})
    total = 0.0
    for words, truths in zip(hypotheses, references, strict=True):
        for truth, n in itertools.product(truths, range(1, 5)):
            own, other = (Counter({gram: count * math.log(len(references) / max(1, seen[gram]))
                                   for gram, count in ngrams(text, n).items()}) for text in (words, truth))
            norms = math.sqrt(sum(x * x for x in own.values()) * sum(x * x for x in other.values()))
            dot = sum(min(own[gram], other[gram]) * other[gram] for gram in own)
            distance = max(0, len(words) - 1) - max(0, len(truth) - 1)
            total += (dot / norms if norms else dot) * math.exp(-distance ** 2 / (2 * sigma ** 2)) / len(truths)
    return 10 / 4 * total / len(hypotheses)


def print_metrics(hypotheses, references):
    """Print the metrics of lists of words against lists of lists of words, as pycocoevalcap defines them."""
    scores = {f"BLEU-{n + 1}": value for n, value in enumerate(bleu(hypotheses, references))}
    scores |= {"ROUGE-L": np.mean([*map(rouge_l, hypotheses, references)]), "CIDEr-D": cider_d(hypotheses, references)}
    print("  ".join(f"{name} {value:.4f}" for name, value in scores.items()))


def score_files(made, given):
    """Print the metrics of two JSON files, {image: caption} and {image: [captions]}; words end at white space."""
    try:
        made, given = (json.loads(Path(file).read_text(encoding="utf-8")) for file in (made, given))
        pairs = [(made[name].split(), [text.split() for text in given[name]]) for name in sorted(made)]
        if not pairs or not all(given[name] and isinstance(given[name], list) for name in made):
            raise ValueError("an image without a list of captions")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as problem:
        raise UserError(f"--score-files: {type(problem).__name__}: {problem}; expected {{image: caption}} and {{image: "
                        "[captions]}, every image of the first in the second") from None
    print(f"{len(pairs):,} captions made, references given for {len(given):,} images")
    print_metrics(*zip(*pairs, strict=True))


# ---------------------------------------------------------------------------------------------- showing
def data_uri(image):
    """A picture [S,S,3] uint8 as a JPEG that a page can hold."""
    Image.fromarray(np.asarray(image)).save(file := io.BytesIO(), "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def write_page(template, path, content):
    """Fill a template of assets/ with JSON-ready content, which cannot end its script, and write it atomically."""
    page = (Path(__file__).parent / "assets" / template).read_text(encoding="utf-8")
    page = page.replace("/* DATA */ null", json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))
    with data.replace_file(path) as file:
        file.write(page.encode())


def watch(model, tokenizer, states, budget):
    """Run caption_images on one image and note what the model saw -> (its states, a dict as page.html wants it).

    For every token asked for at a step: its five likeliest words, and where it looks (mean of heads) in each layer,
    after the mean of layers. Maps of more than `budget` bytes become the mean alone, and then means of 2 x 2 patches.
    """
    decoder, maps, chances, rows, looks, kept = model.decoder, [], [], [], [], [next(states)]

    def look(cross, inputs, _):
        x, (k, _), _, pack = inputs
        q, k = (y.unflatten(-1, (cross.heads, -1)).transpose(1, 2) for y in (pack.pad(cross.q(x)), k))
        maps.append((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)[0].mean(0))         # [T,N]; "ar": [1,N]

    hooks = [block.cross.register_forward_hook(look) for block in decoder.blocks]
    hooks.append(decoder.head.register_forward_hook(lambda _, inputs, logits: chances.append(logits.softmax(-1))))
    for tokens, mask in states:
        asked = (kept[-1][1] & ~mask if decoder.causal else kept[-1][1])[0].nonzero()               # [K,1]
        chance = chances.pop()                                                                      # [K,V]
        likely, words = chance.topk(5)
        likely = torch.cat([chance.gather(1, tokens[0][asked]), likely], 1)                         # [K,6]
        step = torch.full_like(asked, len(kept) - 1)
        rows.append(torch.cat([step, asked, words, (1000 * likely).round().long()], 1))             # [K,13]
        looks.append(torch.stack([x[asked[:, 0] % len(x)] for x in maps[-len(decoder.blocks):]]))   # [L,K,N]
        kept.append((tokens, mask))
    for hook in hooks:
        hook.remove()
    looks = torch.cat(looks, 1).unflatten(-1, (math.isqrt(looks[0].shape[-1]), -1))                 # [L,P,side,side]
    looks = torch.cat([looks.mean(0, keepdim=True), looks])
    while looks.numel() > budget and looks.shape[-1] > 1:
        looks = looks[:1] if len(looks) > 1 else F.avg_pool2d(looks, 2, ceil_mode=True)
    looks = (255 * looks / looks.amax((2, 3), keepdim=True)).round().byte()
    rows, T = torch.cat(rows), tokens.shape[1]
    ids, words = torch.cat([tokens[0], rows[:, 2:7].flatten()]).unique(return_inverse=True)
    rows[:, 2:7] = words[T:].view(-1, 5)                                                            # places in ids
    rows, maps = (base64.b64encode(x.cpu().numpy().tobytes()).decode() for x in (rows.short(), looks))
    texts = [None if word == model.config.eos else tokenizer.decode([word]) for word in ids.tolist()]
    return kept, {"tokens": words[:T].tolist(), "words": texts, "steps": len(kept) - 1, "side": looks.shape[-1],
                  "rows": rows, "maps": maps}


def show(tokenizer, tokens, mask):
    """One state of a caption as text, `_` for every token that is still masked; nothing after an EOS."""
    blank = tokenizer.encode_ordinary(" _")
    ids = [blank if masked else [token] for token, masked in zip(tokens.tolist(), mask.tolist(), strict=True)]
    return decode_caption(tokenizer, sum(ids, []))


def show_example(batch, tokenizer, objective):
    """A training caption, its tokens, and what the model is asked about it, as text."""
    tokens, mask, length = batch["tokens"][0], batch["mask"][0], int(batch["valid"][0].sum())
    tokens = tokens.roll(-1) if objective == "ar" else tokens
    ratio = f"{float(batch['ratio'][0]):.2f}" if len(batch["ratio"]) else "-"
    fill = f"{show(tokenizer, tokens[:length], mask[:length])}   and the image (masking ratio {ratio})"
    task = {"clip": "to find the caption of each image in the batch, and vice versa",
            "ar": "each token from the image and the tokens before it"}.get(objective, fill)
    return (f"a training example:\n  caption  {decode_caption(tokenizer, tokens)}\n"
            f"  tokens   {' '.join(map(str, tokens[:length].tolist()))}\n  task     {task}")


def contact_sheet(images, texts, path, columns=4, side=180):
    """Draw images [n,S,S,3] uint8 in a grid over their lines of text; texts: for each a list of (line, colour)."""
    gap, height = 14, side + 180
    sheet = Image.new("RGB", (columns * (side + gap) + gap, -(-len(images) // columns) * height + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * height
        sheet.paste(Image.fromarray(np.asarray(image)).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        for number, (text, colour) in enumerate(lines):
            draw.text((x, y + side + 6 + 82 * number), textwrap.fill(text, side // 8, max_lines=4), colour, font)
    sheet.save(path)


def report(model, val, seed, lengths, path):
    """Caption validation images, draw the first into `path`; for shapes {"exact": share of captions exactly right}."""
    shapes, made, given = val.folder.parent.name == "shapes", [], []
    batches = Batches(val, min(100, len(val)), model.config.image_size, model.config.max_tokens, seed, augment=False)
    for number in range(-(-len(val) // batches.batch_size) if shapes else 1):
        batch = batches[number]
        made += captions_of(model, batch["images"], choose_lengths(lengths, len(batch["images"])), val.tokenizer)
        given += [decode_caption(val.tokenizer, row) for row in batch["tokens"]]
    right = [a == b for a, b in zip(made, given, strict=True)]
    texts = [[(a, ("green" if ok else "darkred") if shapes else "black"), (f"given: {b}", "grey")]
             for a, b, ok in zip(made[:12], given, right, strict=False)]
    contact_sheet(batches[0]["images"][:12], texts, path)
    return {"exact": sum(right) / len(right)} if shapes else {}


# ---------------------------------------------------------------------------------------------- command line
def main():
    """Caption what the command line names, batch by batch."""
    parser = data.Parser(__doc__)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="image files or folders; or use --dataset")
    add("--ckpt", metavar="FILE", help="checkpoint of train.py")
    add("--dataset", help="caption a split of these shards instead")
    add("--split", default="val", help="with --dataset (default: val)")
    add("--data-dir", default="data", metavar="DIR", help="default: data")
    add("--count", type=int, metavar="N", help="only the first N images (default: all)")
    add("--steps", type=int, metavar="N", help="denoising steps; fewer are faster and worse (default: a token a step)")
    add("--length", default="typical", metavar="N", help="tokens, EOS included: a number, `typical` (the median of the "
        "training captions, the default) or `draw` (drawn from them for each image)")
    add("--temperature", type=float, default=0.0, metavar="X", help="0: likeliest words (default); 1: drawn")
    add("--order", choices=diffusion.ORDERS, default="confidence", help="which words come first (default: confidence)")
    add("--prompt", metavar="TEXT", help='keep these words and fill the blanks, each `___` one token: "a ___ dog"')
    add("--score", nargs="+", metavar="TEXT", help="rank these captions instead; what names a file is an image")
    add("--metrics", action="store_true", help="with --dataset: BLEU, ROUGE-L and CIDEr-D against all its captions")
    add("--score-files", nargs=2, metavar=("MADE", "GIVEN"), help="metrics of JSON, {image: text} and {image: [texts]}")
    add("--draws", type=int, default=32, metavar="N", help="random masks for each score (default: 32)")
    add("--trace", action="store_true", help="print the caption after every step, `_` for a masked token")
    add("--html", metavar="FILE", help="page that plays the steps and shows where words look; 2 MB for 8 images")
    add("--compare", metavar="FILE", help="another checkpoint for the same images, beside the first in --html")
    add("--batch-size", type=int, default=64, metavar="B", help="images at a time (default: 64)")
    add("--seed", type=int, default=0, help="of temperature, order and length (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, else cpu")
    args = parser.parse_args()
    check_least(args, count=1, steps=1, batch_size=1, draws=1, temperature=0, seed=0)
    if args.score_files:
        return score_files(*args.score_files)
    files = [word for word in args.score or [] if os.path.exists(word) or data.split_name(word)[1] in data.IMAGE_TYPES]
    captions = [word for word in args.score or [] if word not in files]
    args.images += files
    shards = data.open_split(args.data_dir, args.dataset, args.split) if args.dataset else None
    names = [shards.key(i) for i in range(len(shards))[:args.count]] if shards else [
        str(file) for path in map(Path, args.images) for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file == path or file.suffix.lower().lstrip(".") in data.IMAGE_TYPES][:args.count]
    for wrong, message in (
            (not args.ckpt, "--ckpt is missing: a checkpoint of train.py, say out/shapes-tiny-mdc/ckpt.pt"),
            (bool(args.dataset) == bool(args.images) or (args.score and not captions), "expected either images or "
             "--dataset, for example: python sample.py --ckpt FILE photo.jpg; and with --score captions"),
            (not names, f"{args.dataset or ', '.join(args.images)}: no jpg, png or webp images there"),
            (args.metrics and not args.dataset, "--metrics needs captions to compare with: --dataset NAME --split val"),
            (args.html and args.score, "--html shows captions being written: leave out --score"),
            (args.html and (os.path.isdir(args.html) or not Path(args.html).parent.is_dir()),
             f"--html {args.html}: expected a file name in a folder that exists")):
        if wrong:
            raise UserError(message)

    def read(i, side):
        """Central square of an image [side,side,3] uint8."""
        try:
            return crop_square(shards.image(i, side) if shards else open_image(names[i], side), side)
        except BadSample as reason:
            raise UserError(f"{names[i]}: {reason}") from None

    # read before anything is captioned, so that a broken image costs nothing
    pictures = [{"name": names[i], "picture": data_uri(read(i, PICTURE))} for i in range(len(names)) if args.html]
    paths, pages = list(filter(None, (args.ckpt, args.compare))), []
    for path in paths:
        model, checkpoint = load_captioner(path, args.device)
        tokenizer, config, made, notes = load_tokenizer(checkpoint["tokenizer"]), model.config, [], []
        if config.objective == "clip" and not args.score:
            raise UserError(f"{path} is a contrastive model, which writes no captions; it ranks them: --score")
        if config.objective == "ar" and args.prompt:
            raise UserError(f"{path} writes from left to right and cannot fill blanks: --prompt needs masked diffusion")
        if args.length not in ("typical", "draw", *map(str, range(1, config.max_tokens + 1))):
            raise UserError(f"--length {args.length}: expected typical, draw or a number from 1 to {config.max_tokens}")
        given = args.prompt and read_prompt(args.prompt, tokenizer, config.max_tokens)
        generator, size = torch.Generator().manual_seed(args.seed), 1 if args.html else args.batch_size
        for part in (range(len(names))[first:first + size] for first in range(0, len(names), size)):
            images = torch.from_numpy(np.stack([read(i, config.image_size) for i in part]))
            if captions:
                print_scores(model, checkpoint, tokenizer, [names[i] for i in part], images, captions, args.draws,
                             args.seed)
                continue
            length = len(given[0]) if given else args.length
            states = caption_images(model, images, choose_lengths(checkpoint["lengths"], len(part), length, generator),
                                    args.steps, args.order, args.temperature, generator, given)
            if args.html:
                states, note = watch(model, tokenizer, states, PAGE_BYTES // (len(names) * len(paths)))
                notes.append(note)
            # what a causal model has not written yet has no place yet
            states = [(tokens.cpu(), mask.cpu() & (not model.decoder.causal)) for tokens, mask in states]
            for row, i in enumerate(part):
                texts = [show(tokenizer, tokens[row], mask[row]) for tokens, mask in states]
                for number, text in enumerate(texts[:-1] if args.trace else []):
                    print(f"{names[i]}\t{number:2}  {text}")
                print(f"{names[i]}\t{texts[-1]}", flush=True)
                made.append(texts[-1])
        pages.append({"name": path, "images": notes})
        if args.metrics:
            cut = re.compile(r"\w+").findall
            truths = [[decode_caption(tokenizer, ids).lower() for ids in shards.captions(i)] for i in range(len(names))]
            print("words: lower case, no punctuation (our own rule); METEOR and SPICE, which need Java, are left out")
            print_metrics([cut(text.lower()) for text in made], [[*map(cut, texts)] for texts in truths])
    if args.html:
        command = shlex.join(["python", *sys.argv])
        write_page("page.html", args.html, {"command": command, "images": pictures, "models": pages})


if __name__ == "__main__":
    data.run(main)
