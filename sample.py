"""Caption images by iterative unmasking, or score given captions.

    python sample.py --ckpt out/shapes-tiny-mdc/ckpt.pt --dataset shapes --count 8 --html page.html
    python sample.py --ckpt CKPT photo.jpg --prompt "a ___ dog on the ___"
    python sample.py --ckpt CKPT one.jpg two.jpg --score "a dog runs" "a cat sleeps"

A caption starts as [MASK] tokens, their number chosen first; each step predicts all of them and
keeps the most confident. An autoregressive model writes from left to right and ends by itself."""
import base64
import functools
import io
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
from model import Config, build_model, split_heads


def load_captioner(path, device="cpu"):
    """Checkpoint file -> (model in eval mode, checkpoint dict); executes nothing in the file."""
    if not os.path.exists(path):
        raise UserError(f"no checkpoint at {path}; make one with train.py")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = build_model(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model.to(device).eval(), checkpoint
    except Exception as problem:
        raise UserError(f"{path} is not a checkpoint of this version of train.py, or {device} is "
                        f"not available: {problem!r:.99}") from None


# ---- captions
def median_length(histogram):
    """Median of {length in tokens with EOS: captions}."""
    return int(np.median(np.repeat([*histogram], [*histogram.values()])))


@torch.no_grad()
def caption_images(model, images, length, prompt=None, temperature=0.0, generator=None, **options):
    """Caption a batch; yields (tokens [B,T], mask [B,T]) at the start and after every step.

    images [B,S,S,3] uint8; length T in tokens with EOS ("ar" ends by itself); prompt [T]: see
    read_prompt; options: steps and order of diffusion.denoise."""
    device = next(model.parameters()).device
    eos = model.config.eos
    memory = model.decoder.read(model.encode(images.to(device)))
    if model.decoder.causal:
        length = model.config.max_tokens
    valid = torch.ones(len(images), length, dtype=torch.bool, device=device)

    def predict(tokens, mask):
        logits = model.decoder(memory, tokens, mask, valid)
        if prompt is not None:  # a blank is never the end; in place, so `watch` sees it too
            logits[:, eos] = -torch.inf
        return logits

    if model.decoder.causal:
        return diffusion.autoregress(predict, *valid.shape, eos, temperature, generator, device)
    start = torch.full(valid.shape, -1, device=device)  # -1 where a token is masked
    if prompt is not None:
        start[:] = prompt
    return diffusion.denoise(predict, start.clamp(min=0), start < 0, temperature=temperature,
                             generator=generator, **options)


def captions_of(model, images, length, tokenizer):
    """Captions as strings, see caption_images."""
    *_, (tokens, _) = caption_images(model, images, length)
    return [decode_caption(tokenizer, row) for row in tokens.tolist()]


def read_prompt(prompt, tokenizer, max_tokens):
    """Text with blanks `___` -> tokens [T] with EOS, -1 for each blank."""
    tokens = []
    for part in re.split(r"\s*_{2,}", data.clean_caption(prompt)):
        tokens += [*tokenizer.encode_ordinary(part), -1]
    tokens[-1] = tokenizer.eot_token  # no blank follows the last part
    if -1 not in tokens or len(tokens) > max_tokens:
        raise UserError(f"--prompt: expected blanks `___`, at most {max_tokens - 1} tokens")
    return torch.tensor(tokens)


# ---- scores
@torch.no_grad()
def score_captions(model, features, captions, rule="monte-carlo", draws=32, seed=0, items=None):
    """Scores by a rule of diffusion.scoring_masks -> [B] float64 nats ("ar": the exact log p,
    whatever the rule; "clip": the cosine).

    features [B,N,D]; captions: B lists of token ids with EOS; items [B]: captions of the same
    item get the same random masks."""
    config = model.config
    rows = [*map(torch.tensor, captions)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=-1).to(features.device)
    valid = tokens >= 0  # [B,T]
    tokens = tokens.clamp(min=0)  # pads need an embedding
    if config.objective == "clip":
        cosine = (model.embed_images(features) * model.embed_texts(tokens, valid)).sum(1)
        return cosine.double().cpu()

    items = [0] * len(rows) if items is None else items
    rngs = [data.random_stream(seed, data.SCORING, int(item)) for item in items]
    noise = torch.tensor(np.stack([rng.random((draws, config.max_tokens)) for rng in rngs]))
    u = torch.tensor([rng.random() for rng in rngs], dtype=torch.float64)
    rule = "parallel" if model.decoder.causal else rule
    predict = functools.partial(model.decoder, model.decoder.read(features), valid=valid)
    return diffusion.log_likelihood(predict, tokens, valid, rule, noise, u)


def length_terms(histogram, captions, config):
    """log p(length) [B] in nats of B token lists, from {length: training captions} plus 1 each;
    0 unless the objective is "mdc"."""
    if config.objective != "mdc":
        return torch.zeros(len(captions), dtype=torch.float64)
    counts = [histogram.get(len(caption), 0) + 1 for caption in captions]
    total = sum(histogram.values()) + config.max_tokens
    return torch.tensor(counts, dtype=torch.float64).div(total).log()


# ---- metrics
def ngrams(words, n):
    """Counter of the n-grams of a list of words."""
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(made, given):
    """Corpus BLEU-1..4 (Papineni et al. 2002) -> array [4]."""
    matches = np.full(4, 1e-15)  # the small numbers are those of pycocoevalcap
    totals = np.full(4, 1e-9)
    given_length = 0
    for words, truths in zip(made, given):
        lengths = sorted(map(len, truths))
        given_length += min(lengths, key=lambda length: abs(length - len(words)))
        for i in range(4):
            most = Counter()  # of each n-gram in any reference
            for truth in truths:
                most |= ngrams(truth, i + 1)
            found = ngrams(words, i + 1)
            matches[i] += (found & most).total()
            totals[i] += found.total()
    made_length = max(1, sum(map(len, made)))
    brevity = min(1, math.exp(1 - given_length / made_length))
    return brevity * (matches / totals).cumprod() ** (1 / np.arange(1, 5))


def common_length(words, others):
    """Length of the longest common subsequence of two lists."""
    row = [0] * (len(others) + 1)  # of the words so far and the first j others
    for word in words:
        above = row
        row = [0]
        for j, other in enumerate(others):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]


def rouge_l(words, truths):
    """ROUGE-L (Lin 2004) of one caption: best precision and best recall over the references."""
    common = np.array([common_length(words, truth) for truth in truths])
    precision = max(common) / max(1, len(words))
    recall = max(common / [max(1, len(truth)) for truth in truths])
    return 2.44 * precision * recall / max(recall + 1.44 * precision, 1e-9)  # beta = 1.2


def cider_d(made, given):
    """Mean CIDEr-D (Vedantam et al. 2015): clipped cosine of tf-idf n-grams, times 10."""
    images_with = Counter()  # n-gram: images with a reference that contains it
    for truths in given:
        for n in range(1, 5):
            images_with.update({gram for truth in truths for gram in ngrams(truth, n)})

    def tf_idf(words, n):
        weights = ngrams(words, n)
        for gram in weights:
            weights[gram] *= math.log(len(given) / max(1, images_with[gram]))
        return weights

    total = 0.0
    for words, truths in zip(made, given):
        for truth in truths:
            penalty = math.exp(-((len(words) - len(truth)) ** 2) / (2 * 6**2))
            for n in range(1, 5):
                ours = tf_idf(words, n)
                theirs = tf_idf(truth, n)
                clipped = ours & theirs  # the smaller weights
                dot = sum(clipped[gram] * theirs[gram] for gram in clipped)
                norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                total += penalty * dot / max(norms, 1e-300) / len(truths)
    return 10 / 4 * total / len(made)


def split_words(text):
    """Lower-case words, no punctuation."""
    return re.findall(rf"[^\s{data.MARKS}۔॥？]+", text.lower())


def print_metrics(made, given):
    """Metrics of captions, each with a list of references."""
    made = [*map(split_words, made)]
    given = [[*map(split_words, captions)] for captions in given]
    for n, score in enumerate(bleu(made, given), 1):
        print(f"BLEU-{n} {score:.4f}", end="  ")
    rouge = np.mean([*map(rouge_l, made, given)])
    print(f"ROUGE-L {rouge:.4f}  CIDEr-D {cider_d(made, given):.4f}")


# ---- showing
def show(tokenizer, tokens, mask):
    """State of a caption [T] as text, `_` for a masked token; nothing after an EOS."""
    blank = tokenizer.encode_ordinary(" _")
    ids = []
    for token, masked in zip(tokens, mask):
        ids += blank if masked else [token]
    return decode_caption(tokenizer, ids)


def show_example(batch, tokenizer):
    """First caption of a training batch as text, and with its masks if it has any."""
    valid = batch["valid"][0]
    tokens = batch["tokens"][0][valid]
    text = f"a training example:\n  caption  {decode_caption(tokenizer, tokens)}"
    if "t" in batch:
        text += f"\n  masked   {show(tokenizer, tokens, batch['mask'][0][valid])}"
    return text


def report(model, val, lengths, path):
    """Caption validation images, draw twelve into `path`, green if exactly as given.

    lengths: {tokens: captions}. -> {"exact": share} for `shapes`, else {}."""
    config = model.config
    shapes = val.folder.parent.name == "shapes"
    count = len(val) if shapes else 12
    batch = Batches(val, count, config.image_size, config.max_tokens, 0, augment=False)[0]
    images = batch["images"]
    made = captions_of(model, images, median_length(lengths), val.tokenizer)
    given = [decode_caption(val.tokenizer, row) for row in batch["tokens"]]

    sheet = Image.new("RGB", (4 * 200, 3 * 360), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images[:12].numpy()):
        x = i % 4 * 200
        y = i // 4 * 360
        sheet.paste(Image.fromarray(image).resize((190, 190)), (x, y))
        text = textwrap.fill(f"{made[i]} (given: {given[i]})", 24, max_lines=9)
        colour = "green" if made[i] == given[i] else "black"
        draw.text((x, y + 192), text, colour, font_size=15)
    sheet.save(path)
    return {"exact": np.equal(made, given).mean()} if shapes else {}


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
    """States of one image -> the same in a list, and the record that page.html describes."""
    decoder = model.decoder
    attention = []  # of each layer [1,T,N], mean over heads
    calls = []  # mask [1,T] and logits [K,V]

    def record_attention(cross, inputs):
        x, (keys, _) = inputs
        q = split_heads(cross.q(x), cross.heads)  # [1,H,T,d]
        k = split_heads(keys, cross.heads)  # [1,H,N,d]
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        attention.append(scores.softmax(-1).mean(1))

    def record_call(decoder, inputs, logits):
        calls.append((inputs[2], logits))

    hooks = [block.cross.register_forward_pre_hook(record_attention) for block in decoder.blocks]
    hooks.append(decoder.register_forward_hook(record_call))
    kept = [next(states)]
    words = {model.config.eos: None}
    steps = []
    for tokens, mask in states:
        kept.append((tokens, mask))
        asked, logits = calls.pop()
        likely = logits.softmax(-1).topk(5)
        for word in {*tokens[0].tolist(), *likely.indices.flatten().tolist()}:
            words.setdefault(word, tokenizer.decode([word]))

        maps = torch.stack(attention).mean(0)[asked]  # [K,N]
        attention.clear()
        side = math.isqrt(maps.shape[1])
        maps = maps.unflatten(1, (1, side, side))  # K can be 0
        # small pages
        maps = torch.nn.functional.avg_pool2d(maps, math.ceil(side / 8), ceil_mode=True)
        maps = (255 * maps / maps.amax((2, 3), keepdim=True)).round().byte()
        steps.append({
            "asked": asked[0].nonzero().flatten().tolist(),
            "likely": likely.indices.tolist(),
            "chances": (100 * likely.values).round().int().tolist(),
            "maps": base64.b64encode(maps.cpu().numpy()).decode()})
    for hook in hooks:
        hook.remove()
    return kept, {"tokens": tokens[0].tolist(), "words": words, "causal": decoder.causal,
                  "side": maps.shape[2], "steps": steps}


# ---- command line
def find_images(args):
    """-> names, and Shards (None: the names are files)."""
    if args.dataset:
        shards = data.open_split(args.data_dir, args.dataset, args.split)
        if not len(shards):
            raise UserError(f"{shards.folder}: no {args.split} images")
        return [shards.key(i) for i in range(len(shards))[:args.count]], shards
    names = []
    for path in args.images:
        files = [file for file in data.list_files(path, set())
                 if file == path or data.not_text(file)]
        if not files:
            raise UserError(f"{path}: no images")
        names += files
    return names[:args.count], None


def read_images(names, shards, batch_size, side):
    """Yield indices [B] and images [B,side,side,3] uint8; names bad images on stderr."""
    for first in range(0, len(names), batch_size):
        squares = {}
        for i, name in enumerate(names[first:first + batch_size], first):
            try:
                image = shards.image(i, side) if shards else data.open_image(name, side)
                squares[i] = crop_square(image, side)
            except BadSample as reason:
                print(f"error: {name}: {reason}", file=sys.stderr)
        if squares:
            yield [*squares], torch.tensor(np.stack([*squares.values()]))


def write_captions(model, checkpoint, names, shards, args):
    """Print captions, metrics and the page -> number of images."""
    config = model.config
    others = args.prompt or args.length or args.steps or args.order != "confidence"
    if config.objective == "clip" or config.objective == "ar" and others:
        raise UserError(f"{args.ckpt}: clip can only --score, and ar has no --prompt, --length, "
                        "--steps or --order")
    tokenizer = data.load_tokenizer(checkpoint["tokenizer"])
    generator = torch.Generator().manual_seed(args.seed)
    length = args.length or median_length(checkpoint["lengths"])
    if length > config.max_tokens:
        raise UserError(f"--length: expected at most {config.max_tokens} tokens")
    prompt = None
    if args.prompt is not None:
        prompt = read_prompt(args.prompt, tokenizer, config.max_tokens)
        length = len(prompt)

    made = {}
    records = []
    batch_size = 1 if args.html else args.batch_size
    for indices, images in read_images(names, shards, batch_size, config.image_size):
        states = caption_images(model, images, length, prompt, args.temperature, generator,
                                steps=args.steps, order=args.order)
        if args.html:
            states, record = watch(model, tokenizer, states)
            records.append(record | {"name": names[indices[0]], "picture": data_uri(images[0])})
        *earlier, (final, _) = states
        for row, i in enumerate(indices):
            for step, (tokens, mask) in enumerate(earlier if args.trace else []):
                masked = mask[row] & (not model.decoder.causal)  # words to come have no place yet
                print(f"{names[i]}\t{step:2}  {show(tokenizer, tokens[row], masked)}")
            made[i] = decode_caption(tokenizer, final[row])
            print(f"{names[i]}\t{made[i]}", flush=True)

    if args.metrics:
        given = [[decode_caption(shards.tokenizer, ids) for ids in shards.captions(i)]
                 for i in made]
        print_metrics(made.values(), given)
    if args.html:
        write_page("page.html", args.html, {"images": records})
    return len(made)


@torch.no_grad()
def print_scores(model, checkpoint, names, shards, args):
    """Rank the captions of --score for every image, in nats -> number of images."""
    config = model.config
    tokenizer = data.load_tokenizer(checkpoint["tokenizer"])
    texts = map(data.clean_caption, args.score)
    captions = [[*tokenizer.encode_ordinary(text), config.eos] for text in texts]
    lengths = torch.tensor([*map(len, captions)])
    if lengths.max() > config.max_tokens:
        raise UserError(f"--score: expected at most {config.max_tokens - 1} tokens")

    done = 0
    for [i], image in read_images(names, shards, 1, config.image_size):
        features = model.encode(image.to(args.device)).expand(len(captions), -1, -1)
        score = score_captions(model, features, captions, seed=args.seed)
        ranked = score + length_terms(checkpoint["lengths"], captions, config)
        if config.objective == "clip":
            columns = {"cosine": score}
        elif config.objective == "ar":
            columns = {"log p": score, "per token": score / lengths}
        else:  # bounds on log p(caption | image, length) and log p(caption | image)
            columns = {"bound": score, "+ length": ranked, "per token": score / lengths}
        head = "".join(f"{column:>13}" for column in columns)
        print(f"{names[i]}\n{head}   caption")
        for k in ranked.argsort(descending=True).tolist():
            numbers = "".join(f"{values[k]:13.3f}" for values in columns.values())
            print(f"{numbers}   {args.score[k]}")
        done += 1
    return done


def main():
    parser = data.Parser(__doc__)
    add = parser.add_argument
    add("images", nargs="*", help="files or folders")
    add("--ckpt", required=True)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dataset", help="data set instead of images")
    add("--split", choices=("train", "val", "test"), default="val")
    add("--data-dir", default="data")
    add("--count", type=positive_int, help="only the first COUNT")
    add("--batch-size", type=positive_int, default=64)
    add("--steps", type=positive_int, help="default: one per token (best)")
    add("--order", choices=diffusion.ORDERS, default="confidence")
    add("--temperature", type=data.non_negative_float, default=0.0, help="default: 0, greedy")
    add("--seed", type=data.non_negative_int, default=0)
    add("--length", type=positive_int, help="tokens, end included (default: training median)")
    add("--prompt", help="words with blanks `___`, one token each")
    add("--trace", action="store_true", help="print all steps")
    add("--html", help="page that replays the steps")
    add("--metrics", action="store_true", help="BLEU, ROUGE-L and CIDEr-D, in lower case")
    add("--score", nargs="+", metavar="TEXT", default=[], help="rank captions; in nats")
    args = parser.parse_args()
    captioning = args.html or args.metrics or args.prompt is not None or args.trace
    if (bool(args.images) == bool(args.dataset) or args.metrics and not args.dataset
            or args.score and captioning):
        raise UserError("expected images or --dataset NAME (for --metrics), and captions after "
                        "them: --score (without --html, --prompt, --trace)")
    if args.html and not (args.html.endswith(".html") and Path(args.html).parent.is_dir()):
        raise UserError(f"--html {args.html}: expected FOLDER/NAME.html")
    names, shards = find_images(args)
    model, checkpoint = load_captioner(args.ckpt, args.device)
    act = print_scores if args.score else write_captions
    done = act(model, checkpoint, names, shards, args)
    if done < len(names):
        sys.exit(1 if done else 2)


if __name__ == "__main__":
    data.run(main)
