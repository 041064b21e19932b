"""Caption images by iterative unmasking, or score given captions.

    python sample.py --ckpt out/shapes-tiny-mdc/ckpt.pt --dataset shapes --count 8 --html page.html
    python sample.py --ckpt CKPT photo.jpg folder/ --trace
    python sample.py --ckpt CKPT photo.jpg --prompt "a ___ dog on the ___"
    python sample.py --ckpt CKPT one.jpg two.jpg --score "a dog runs" "a cat sleeps"

A caption starts as [MASK] tokens only; each step predicts all of them and keeps the most confident.
Its length is chosen first. An autoregressive model writes from left to right and ends by itself."""
import base64
import functools
import io
import itertools
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
import diffusion
from data import BadSample, Batches, UserError, crop_square, decode_caption, positive_int
from model import Config, build_model


def load_captioner(path, device="cpu"):
    """Checkpoint file -> (model in eval mode, checkpoint dict); executes nothing in the file."""
    if not os.path.exists(path):
        raise UserError(f"no checkpoint at {path}; make one with train.py")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = build_model(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model.to(device).eval(), checkpoint
    except Exception as problem:  # a damaged pickle can raise anything
        raise UserError(f"{path} is not a checkpoint of this version of train.py, or {device} is "
                        f"not available: {problem!r:.99}") from None


# ---- captions
def choose_lengths(histogram, count):
    """Median of {length in tokens with EOS: captions} -> int tensor [count]."""
    lengths = np.repeat([*histogram], [*histogram.values()])
    return torch.full((count,), int(np.median(lengths)))


@torch.no_grad()
def caption_images(model, images, lengths, prompt=None, temperature=0.0, generator=None, **options):
    """Caption a batch; yields (tokens [B,T], mask [B,T]) at the start and after every step.

    images [B,S,S,3] uint8; lengths [B] in tokens with EOS ("ar" ends by itself); prompt: tokens [T]
    and mask [T], True at blanks, lengths are then T; others: diffusion.denoise."""
    device = next(model.parameters()).device
    eos = model.config.eos
    memory = model.decoder.read(model.encode(images.to(device)))
    if model.decoder.causal:
        lengths = torch.full((len(images),), model.config.max_tokens)
    valid = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)

    def predict(tokens, mask):
        logits = model.decoder(memory, tokens, mask, valid)
        if prompt is not None:  # no end before the last given word
            logits[:, eos] = -torch.inf
        return logits

    if model.decoder.causal:
        return diffusion.autoregress(predict, *valid.shape, eos, temperature, generator, device)
    tokens = torch.full(valid.shape, eos, device=device)
    mask = valid
    if prompt is not None:
        tokens[:] = prompt[0]
        mask = valid & prompt[1].to(device)
    return diffusion.denoise(
        predict, tokens, mask, temperature=temperature, generator=generator, **options)


def captions_of(model, images, lengths, tokenizer):
    """Captions as strings, see caption_images."""
    *_, (tokens, _) = caption_images(model, images, lengths)
    return [decode_caption(tokenizer, row) for row in tokens.tolist()]


def read_prompt(prompt, tokenizer, max_tokens):
    """Text with blanks `___`, one token each -> tokens [T] with EOS, mask [T] True at blanks."""
    tokens = []
    mask = []
    for part in re.split(r"(\s*_{2,})", prompt):
        blank = part.endswith("__")
        ids = [0] if blank else tokenizer.encode_ordinary(part)
        tokens += ids
        mask += [blank] * len(ids)
    if not any(mask) or len(tokens) >= max_tokens:
        raise UserError(f"--prompt: expected blanks `___`, at most {max_tokens - 1} tokens")
    return torch.tensor([*tokens, tokenizer.eot_token]), torch.tensor([*mask, False])


# ---- scores
@torch.no_grad()
def score_captions(model, features, captions, rule="monte-carlo", draws=32, seed=0, items=None):
    """log p(caption | image, length), or a bound -> [B] float64 nats ("clip": the cosine).

    features [B,N,D]; captions: B lists of token ids with EOS; rule: see diffusion.log_likelihood
    ("ar": always exact). Captions of the same item, items [B], get the same random masks."""
    config = model.config
    lengths = torch.tensor([len(caption) for caption in captions])
    tokens = torch.tensor([*itertools.zip_longest(*captions, fillvalue=config.eos)]).T  # [B,T]
    tokens = tokens.to(features.device)
    valid = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(features.device)
    if config.objective == "clip":
        cosine = (model.embed_images(features) * model.embed_texts(tokens, valid)).sum(1)
        return cosine.double().cpu()

    rule = "parallel" if model.decoder.causal else rule
    items = [0] * len(captions) if items is None else items
    rngs = [data.random_stream(seed, data.SCORING, int(item)) for item in items]
    noise = torch.tensor(np.stack([rng.random((draws, config.max_tokens)) for rng in rngs]))
    u = torch.tensor([rng.random() for rng in rngs], dtype=torch.float64)
    predict = functools.partial(model.decoder, model.decoder.read(features), valid=valid)
    return diffusion.log_likelihood(predict, tokens, valid, rule, noise, u)


def length_terms(histogram, captions, config):
    """log p(length) [B] in nats of B token lists, from {length: training captions} plus 1 each;
    0 unless the objective is "mdc"."""
    if config.objective != "mdc":
        return torch.zeros(len(captions), dtype=torch.float64)
    counts = torch.tensor([histogram.get(len(caption), 0) + 1.0 for caption in captions])
    return (counts.double() / (sum(histogram.values()) + config.max_tokens)).log()


# ---- metrics
def ngrams(words):
    """Counter of the n-grams of a list of words, n from 1 to 4."""
    grams = Counter()
    for n in range(1, 5):
        grams.update(zip(*(words[i:] for i in range(n)), strict=False))
    return grams


def bleu(made, given):
    """Corpus BLEU-1..4 (Papineni et al. 2002) -> array [4]."""
    matches = np.full(4, 1e-15)  # the small numbers are those of pycocoevalcap
    totals = np.full(4, 1e-9)
    given_length = 0
    for words, truths in zip(made, given, strict=True):
        lengths = sorted(len(truth) for truth in truths)
        given_length += min(lengths, key=lambda length: abs(length - len(words)))
        most = Counter()  # of each n-gram in any reference
        for truth in truths:
            most |= ngrams(truth)
        for gram, count in (ngrams(words) & most).items():
            matches[len(gram) - 1] += count
        totals += np.maximum(0, len(words) - np.arange(4))
    made_length = max(1, sum(map(len, made)))
    brevity = min(1, math.exp(1 - given_length / made_length))
    return brevity * (matches / totals).cumprod() ** (1 / np.arange(1, 5))


def rouge_l(words, truths):
    """ROUGE-L (Lin 2004) of one caption: best precision and best recall over the references."""
    precision = recall = 0.0
    for truth in truths:
        common = np.zeros(len(truth) + 1)  # longest subsequence with the first j words of truth
        for word in words:
            longer = common[:-1] + [word == other for other in truth]
            common[1:] = np.maximum.accumulate(np.maximum(common[1:], longer))
        precision = max(precision, common[-1] / max(1, len(words)))
        recall = max(recall, common[-1] / max(1, len(truth)))
    return 2.44 * precision * recall / max(recall + 1.44 * precision, 1e-9)  # beta = 1.2


def cider_d(made, given):
    """Mean CIDEr-D (Vedantam et al. 2015): clipped cosine of tf-idf n-grams, times 10."""
    images_with = Counter()  # n-gram: images with a reference containing it
    for truths in given:
        images_with.update(set().union(*map(ngrams, truths)))

    def tf_idf(words, n):
        return {gram: count * math.log(len(given) / max(1, images_with[gram]))
                for gram, count in ngrams(words).items() if len(gram) == n}

    total = 0.0
    for words, truths in zip(made, given, strict=True):
        for truth, n in itertools.product(truths, range(1, 5)):
            own = tf_idf(words, n)
            other = tf_idf(truth, n)
            dot = sum(min(own[gram], other[gram]) * other[gram] for gram in own if gram in other)
            norms = math.hypot(*own.values()) * math.hypot(*other.values())
            penalty = math.exp(-((len(words) - len(truth)) ** 2) / (2 * 6**2))
            total += penalty * dot / max(norms, 1e-300) / len(truths)
    return 10 / 4 * total / len(made)


def split_words(text):
    return re.findall(r"\w+", text.lower())


def print_metrics(made, given):
    print("words: lower case, no punctuation")
    for n, score in enumerate(bleu(made, given), 1):
        print(f"BLEU-{n} {score:.4f}", end="  ")
    rouge = np.mean([*map(rouge_l, made, given)])
    print(f"ROUGE-L {rouge:.4f}  CIDEr-D {cider_d(made, given):.4f}")


# ---- showing
def show(tokenizer, tokens, mask):
    """State of a caption [T] as text, `_` for a masked token; nothing after an EOS."""
    blank = tokenizer.encode_ordinary(" _")
    ids = []
    for token, masked in zip(tokens.tolist(), mask.tolist(), strict=True):
        ids += blank if masked else [token]
    return decode_caption(tokenizer, ids)


def show_example(tokens, mask, valid, tokenizer, objective, ratio=None):
    """A training caption [T] as text; with a masking ratio, its masked view too."""
    tokens = tokens[valid]
    text = f"a training example ({objective}):\n  caption  {decode_caption(tokenizer, tokens)}"
    text += f"\n  tokens   {tokens.tolist()}"
    if ratio is not None:
        text += f"\n  masked   {show(tokenizer, tokens, mask[valid])}  (masking ratio {ratio:.2f})"
    return text


def report(model, val, seed, lengths, path):
    """Caption validation images, draw twelve into `path`, green if exactly as given.

    lengths: see choose_lengths. -> {"exact": share} for `shapes`, else {}."""
    config = model.config
    shapes = val.folder.parent.name == "shapes"
    count = len(val) if shapes else 12
    batch = Batches(val, count, config.image_size, config.max_tokens, seed, augment=False)[0]
    images = batch["images"]
    made = captions_of(model, images, choose_lengths(lengths, len(images)), val.tokenizer)
    given = [decode_caption(val.tokenizer, row) for row in batch["tokens"]]
    exact = [caption == truth for caption, truth in zip(made, given, strict=True)]

    sheet = Image.new("RGB", (4 * 200, 3 * 360), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images[:12]):
        x = i % 4 * 200
        y = i // 4 * 360
        sheet.paste(Image.fromarray(image.numpy()).resize((190, 190)), (x, y))
        text = made[i] if exact[i] else f"{made[i]} (given: {given[i]})"
        text = textwrap.fill(text, 24, max_lines=9)
        draw.text((x, y + 192), text, "green" if exact[i] else "black", font_size=15)
    sheet.save(path)
    return {"exact": sum(exact) / len(exact)} if shapes else {}


# ---- web pages
def data_uri(image):
    """Picture [S,S,3] uint8 -> URI that contains it as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def write_page(template, path, content):
    """Write a template of assets/ filled with JSON-ready content."""
    page = (Path(__file__).parent / "assets" / template).read_text(encoding="utf-8")
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")  # no </script>
    with data.replace_file(path) as file:
        file.write(page.replace("/* DATA */ null", text).encode())


def watch(model, tokenizer, states):
    """Run caption_images on one image -> (its states, the record that page.html describes)."""
    decoder = model.decoder
    attention = []  # [T,N] of each layer, mean over heads
    calls = []  # mask [1,T] and logits [K,V]

    def record_attention(cross, inputs):
        x, (keys, _) = inputs
        split = (cross.heads, -1)
        queries = cross.q(x)[0].unflatten(-1, split)
        keys = keys[0].unflatten(-1, split)
        scores = torch.einsum("thd,nhd->htn", queries, keys) / math.sqrt(keys.shape[-1])
        attention.append(scores.softmax(-1).mean(0))

    hooks = [block.cross.register_forward_pre_hook(record_attention) for block in decoder.blocks]
    hooks.append(decoder.register_forward_hook(
        lambda _, inputs, logits: calls.append((inputs[2][0], logits))))
    kept = [next(states)]
    steps = []
    words = {model.config.eos: None}
    for tokens, mask in states:
        kept.append((tokens, mask))
        asked, logits = calls.pop()
        likely = logits.softmax(-1).topk(5)
        maps = torch.stack(attention).mean(0)[asked]  # [K,N]
        attention.clear()
        side = math.isqrt(maps.shape[1])
        maps = maps.unflatten(1, (side, side))
        maps = torch.nn.functional.avg_pool2d(maps, math.ceil(side / 8), ceil_mode=True)
        maps = (255 * maps / maps.amax((1, 2), keepdim=True)).round().byte()
        steps.append({
            "asked": asked.nonzero().flatten().tolist(),
            "likely": likely.indices.tolist(),
            "chances": (100 * likely.values).round().int().tolist(),
            "maps": base64.b64encode(maps.cpu().numpy().tobytes()).decode()})
        for word in {*tokens[0].tolist(), *likely.indices.flatten().tolist()}:
            words.setdefault(word, tokenizer.decode([word]))
    for hook in hooks:
        hook.remove()
    return kept, {"tokens": tokens[0].tolist(), "words": words, "causal": decoder.causal,
                  "side": maps.shape[1], "steps": steps}


# ---- command line
def is_image(path):
    return data.split_name(path)[1] in data.IMAGE_TYPES


def parse_args():
    parser = data.Parser(__doc__)
    add = parser.add_argument
    add("images", nargs="*", help="files or folders")
    add("--ckpt", required=True, help="checkpoint of train.py")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--dataset", help="data set, in place of images")
    add("--split", choices=("train", "val", "test"), default="val", help="default: val")
    add("--data-dir", default="data", help="default: data")
    add("--count", type=positive_int, help="only the first COUNT")
    add("--batch-size", type=positive_int, default=64, help="default: 64")
    add("--steps", type=positive_int, help="default: one per token (best)")
    add("--order", choices=diffusion.ORDERS, default="confidence", help="default: confidence")
    add("--temperature", type=data.non_negative_float, default=0.0, help="default: 0, greedy")
    add("--seed", type=data.non_negative_int, default=0, help="random seed (default: 0)")
    add("--length", type=positive_int,
        help="tokens of a caption with its end (default: median of the training captions)")
    add("--prompt", help="words with blanks `___`, one token each")
    add("--trace", action="store_true", help="print all steps")
    add("--html", help="page that replays the steps")
    add("--metrics", action="store_true", help="BLEU, ROUGE-L and CIDEr-D")
    add("--score", nargs="+", metavar="TEXT", default=[], help="rank captions; scores in nats")
    args = parser.parse_args()
    files = [word for word in args.score if os.path.exists(word) or is_image(word)]
    args.images += files
    args.score = [word for word in args.score if word not in files]
    if (bool(args.images) == bool(args.dataset) or args.metrics and not args.dataset
            or files and not args.score or args.html and args.score):
        raise UserError("expected images or --dataset NAME (for --metrics), and captions after "
                        "--score (without --html)")
    if not Path(args.html or ".").parent.is_dir():
        raise UserError(f"--html {args.html}: no such folder")
    return args


def find_images(args):
    """-> names, and Shards (None: the names are files)."""
    if args.dataset:
        shards = data.open_split(args.data_dir, args.dataset, args.split)
        if not len(shards):
            raise UserError(f"{shards.folder}: no {args.split} images")
        return [shards.key(i) for i in range(len(shards))[:args.count]], shards
    names = []
    for path in args.images:
        files = [path]
        if os.path.isdir(path):
            files = [*filter(is_image, data.list_files(path, set()))]
        if not files:
            raise UserError(f"{path}: no jpg, png or webp images")
        names += files
    return names[:args.count], None


def read_images(names, shards, size, side):
    """Yield indices and squares [B,side,side,3] uint8; names bad images on stderr."""
    for first in range(0, len(names), size):
        squares = {}
        for i, name in enumerate(names[first:first + size], first):
            try:
                image = shards.image(i, side) if shards else data.open_image(name, side)
                squares[i] = crop_square(image, side)
            except BadSample as reason:
                print(f"error: {name}: {reason}", file=sys.stderr)
        if squares:
            yield list(squares), torch.from_numpy(np.stack([*squares.values()]))


def write_captions(model, checkpoint, names, shards, args):
    """Print captions, metrics and the page -> number of images."""
    config = model.config
    if config.objective == "clip" or config.objective == "ar" and args.prompt:
        raise UserError(f"{args.ckpt}: contrastive models can only --score, autoregressive ones "
                        "cannot fill blanks")
    tokenizer = data.load_tokenizer(checkpoint["tokenizer"])
    options = {"steps": args.steps, "order": args.order, "temperature": args.temperature,
               "generator": torch.Generator().manual_seed(args.seed)}
    histogram = checkpoint["lengths"]
    if args.length:
        histogram = {min(args.length, config.max_tokens): 1}
    if args.prompt:
        options["prompt"] = read_prompt(args.prompt, tokenizer, config.max_tokens)
        histogram = {len(options["prompt"][0]): 1}

    records = []
    made = {}
    size = 1 if args.html else args.batch_size
    for indices, batch in read_images(names, shards, size, config.image_size):
        lengths = choose_lengths(histogram, len(batch))
        states = caption_images(model, batch, lengths, **options)
        if args.html:
            states, record = watch(model, tokenizer, states)
            record |= {"name": names[indices[0]], "picture": data_uri(batch[0])}
            records.append(record)
        states = list(states)
        for row, i in enumerate(indices):
            for step, (tokens, mask) in enumerate(states):
                masked = mask[row] & (not model.decoder.causal)  # words to come have no place yet
                made[i] = show(tokenizer, tokens[row], masked)
                if args.trace and step < len(states) - 1:
                    print(f"{names[i]}\t{step:2}  {made[i]}")
            print(f"{names[i]}\t{made[i]}", flush=True)

    if args.metrics:
        given = []
        for i in made:
            captions = shards.captions(i)
            given.append([split_words(decode_caption(tokenizer, ids)) for ids in captions])
        print_metrics([*map(split_words, made.values())], given)
    if args.html:
        write_page("page.html", args.html, {"images": records})
    return len(made)


@torch.no_grad()
def print_scores(model, checkpoint, names, shards, args):
    """Rank --score's captions for every image -> number of images. bound: on log p(caption |
    image, length), in nats; + length: plus log p(length), which ranks; visual gain: against the
    mean over the given images, see diffusion.visual_gain."""
    config = model.config
    tokenizer = data.load_tokenizer(checkpoint["tokenizer"])
    encode = tokenizer.encode_ordinary
    captions = [[*encode(data.clean_caption(text)), config.eos] for text in args.score]
    lengths = torch.tensor([[len(caption)] for caption in captions])
    if lengths.max() > config.max_tokens:
        raise UserError(f"--score: expected at most {config.max_tokens - 1} tokens")

    shown = []
    scores = []
    for [i], image in read_images(names, shards, 1, config.image_size):
        shown.append(names[i])
        features = model.encode(image.to(args.device)).expand(len(captions), -1, -1)
        scores.append(score_captions(model, features, captions, seed=args.seed))
    if not shown:
        return 0

    score = torch.stack(scores, 1)  # [captions,images]
    ranked = score + length_terms(checkpoint["lengths"], captions, config)[:, None]
    columns = {"bound": score, "+ length": ranked}
    if config.objective != "mdc":
        columns = {"log p" if config.objective == "ar" else "cosine": score}
    if config.objective != "clip":
        columns["per token"] = score / lengths
        if len(shown) > 1:
            mean = score.logsumexp(1, keepdim=True) - math.log(len(shown))
            columns["visual gain"] = score - mean
    for i, name in enumerate(shown):
        print(name + "\n" + "".join(f"{column:>13}" for column in columns) + "   caption")
        for k in ranked[:, i].argsort(descending=True).tolist():
            numbers = "".join(f"{values[k, i]:13.3f}" for values in columns.values())
            print(f"{numbers}   {args.score[k]}")
    return len(shown)


def main():
    args = parse_args()
    names, shards = find_images(args)
    model, checkpoint = load_captioner(args.ckpt, args.device)
    act = print_scores if args.score else write_captions
    done = act(model, checkpoint, names, shards, args)
    if done < len(names):
        sys.exit(1 if done else 2)


if __name__ == "__main__":
    data.run(main)
