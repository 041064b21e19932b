"""Captioned images in, shards out, batches from shards.

    python data.py --dataset shapes                                              # the embedded data set, drawn here
    python data.py --dataset cc3m --split train --source 'cc3m/*.tar'            # img2dataset / WebDataset tars
    python data.py --dataset coco --split val --source val2017 --captions captions_val2017.json

A source is read once: every image is resized, every caption tokenized, and both go to shards that training reads
through memory maps. A shard NNNNN.shard is the bytes of its images one after the other, zeros up to a multiple of 8,
and three little-endian arrays whose lengths are in meta.json (n samples, m captions, k tokens):

    samples     RECORD [n]    where the sample's image and captions end, its sizes, its key
    token_ends  int64 [m]     where each caption ends in tokens
    tokens      uint16 or uint32 [k] (meta: token_dtype), every caption with its EOS

An image is a JPEG, or for small pictures raw RGB (meta: encoding). It keeps its aspect ratio, so that a random crop
can use all of the photograph. The last `held_out` samples of a shard (those whose key hashes below 0.5 %) are the
validation split of data sets that come without one.

Nothing in the loader is random in the usual sense: order, crop, choice of caption and masking noise are functions of
(seed, position in the run). They are the same for any number of processes, and a resumed run needs no saved state.
"""
import argparse
import contextlib
import csv
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tarfile
import warnings
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import tiktoken
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                   # Windows has no flock: do not prepare a split twice at once there
    fcntl = None

FORMAT = 1                                            # of the shards; raised when a reader of the old one would misread
RECORD = np.dtype([("image_end", "<i8"), ("caption_end", "<i8"), ("size", "<i4", 2), ("original_size", "<i4", 2),
                   ("key", "S48")])                   # sizes are (width, height); of a longer key the end is kept
HELD_OUT, HELD_OUT_MOST = 0.005, 10_000
UNIT_SAMPLES = 2048                                   # in a shard of anything but tars; a tar becomes one shard
MAX_PIXELS, MAX_RATIO, MIN_SIDE = 64_000_000, 10, 8
IMAGE_TYPES, TEXT_TYPES = ("jpg", "jpeg", "png", "webp"), ("txt", "json")
MAX_BYTES = dict.fromkeys(IMAGE_TYPES, 64 << 20) | dict.fromkeys(TEXT_TYPES, 1 << 16)   # of one file


class UserError(Exception):
    """Bad input, in words for the user: `run` prints it as one line and exits with status 2."""


class BadSample(Exception):
    """A sample that is skipped; its text is the reason under which it is counted."""


def run(main):
    """Call a script's main(). UserErrors and unusable files become one line and status 2; bugs keep their traceback."""
    try:
        main()
    except (UserError, OSError) as problem:
        if isinstance(problem, OSError) and problem.filename is None:
            raise
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """The command line of a script: -h prints its docstring as it stands, a mistake becomes a UserError."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; {self.prog} -h lists the options")


def check_least(args, **least):
    """Raise UserError if an option is given and smaller than its least value."""
    for name, low in least.items():
        if getattr(args, name) is not None and not getattr(args, name) >= low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {low}")


# ---------------------------------------------------------------------------------------------- tokenizers
PIECE = r" ?\w+| ?[^\w\s]+|\s+"                       # cuts any text into pieces; the same to `re` and to tiktoken


def load_tokenizer(spec):
    """{"name": "gpt2"} or {"name": "words:N", "pieces": [...]} -> tiktoken.Encoding; its `eot_token` is our EOS.

    Raises UserError if tiktoken does not know the name, or would have to download it and cannot.
    """
    if "pieces" in spec:
        ranks = [bytes([b]) for b in range(256)] + [piece.encode() for piece in spec["pieces"]]
        return tiktoken.Encoding(spec["name"], pat_str=PIECE, mergeable_ranks={r: i for i, r in enumerate(ranks)},
                                 special_tokens={"<|endoftext|>": len(ranks)})
    if spec["name"] not in tiktoken.list_encoding_names():
        names = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"tokenizer {spec['name']!r} is unknown: expected words:N (words:8000, say) or one of {names}")
    try:
        return tiktoken.get_encoding(spec["name"])
    except (OSError, ValueError) as problem:          # requests' errors are OSErrors; ValueError: a damaged cache
        raise UserError(f"tokenizer {spec['name']!r} could not be downloaded ({type(problem).__name__}): set "
                        "TIKTOKEN_CACHE_DIR to a folder that has it, or make one with --tokenizer words:8000") from None


def words_tokenizer(name, counts):
    """Name "words:N" and a Counter of pieces -> spec: the 256 bytes and the N most frequent pieces of several bytes."""
    if not name.removeprefix("words:").isdecimal():
        raise UserError(f"tokenizer {name!r}: expected words:N with a whole number, for example words:8000")
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return {"name": name, "pieces": [p for p in ranked if len(p.encode()) > 1][:int(name.removeprefix("words:"))]}


def decode_caption(tokenizer, tokens):
    """Token ids -> the text before the first EOS."""
    tokens = [int(token) for token in tokens]
    end = tokens.index(tokenizer.eot_token) if tokenizer.eot_token in tokens else len(tokens)
    return tokenizer.decode(tokens[:end], errors="replace").strip()


# ---------------------------------------------------------------------------------------------- images
def open_image(file, short_side=None):
    """File name or binary file -> upright RGB PIL image; `info["original_size"]` is its size in the file.

    With `short_side` a JPEG may come back smaller, but never below it. Transparency becomes white.
    Raises BadSample with the reason: everything that a hostile file can do has to end here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=("JPEG", "PNG", "WEBP"))
        except FileNotFoundError:
            raise BadSample("no such file") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise BadSample("image of an absurd size") from None
        except Exception:
            raise BadSample("not a JPEG, PNG or WebP image") from None
    width, height = size = image.size
    if min(size) < MIN_SIDE or max(size) > MAX_RATIO * min(size) or width * height > MAX_PIXELS:
        raise BadSample("image of an absurd size")
    try:
        if short_side:                                # a JPEG can be decoded at 1/2, 1/4 or 1/8 if that is still enough
            image.draft("RGB", (width * short_side // min(size), height * short_side // min(size)))
        image.load()
    except Exception:                                 # Pillow's decoders raise a dozen different types
        raise BadSample("image data is broken") from None
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("error")                # a broken EXIF block says nothing about the picture
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    image.info["original_size"] = size
    return image


def crop_square(image, side, box=None):
    """The box (left, top, right, bottom; default: the central square) of a PIL image as uint8 [side,side,3]."""
    if box is None:
        short = min(image.size)
        left, top = ((length - short) // 2 for length in image.size)
        box = (left, top, left + short, top + short)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def random_box(rng, width, height, scale):
    """RandomResizedCrop's box: scale..1 of the area, aspect ratio 3/4..4/3, cut to the image; None for scale 1."""
    if scale >= 1:
        return None
    area, aspect = width * height * rng.uniform(scale, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return (left, top, left + w, top + h)


# ---------------------------------------------------------------------------------------------- shapes
SHAPES_SAMPLES = {"train": 20_000, "val": 1024}
COLOURS = {"red": (205, 25, 40), "green": (25, 130, 45), "blue": (30, 65, 200), "yellow": (215, 175, 0),
           "purple": (125, 40, 155), "orange": (235, 110, 15)}
FORMS, FORM_SIZES = ("circle", "square", "triangle", "cross"), {"small": 0.1, "large": 0.16}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
SHAPES_CAPTION = re.compile(r"a (?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+) at the (?P<row>\w+) (?P<column>\w+) "
                            r"of a (?P<background>\w+) background")


def draw_shapes(seed, pixels):
    """One picture of the embedded data set and its caption, functions of the seed: PIL image [pixels,pixels], str.

    Every attribute is in the caption, so SHAPES_CAPTION can judge a caption by rule and label pictures for probing.
    Object and background never share a colour: exchanging the two words makes a wrong caption of the same words.
    Backgrounds are pale and objects are not: with contrasts of both signs, forms stayed at chance for three minutes.
    """
    rng = np.random.default_rng(seed)
    size, form = list(FORM_SIZES)[rng.integers(2)], FORMS[rng.integers(len(FORMS))]
    colour, background = rng.permutation(list(COLOURS))[:2]
    column, row = rng.integers(3, size=2)
    scale = 3 * pixels                                # drawn three times as large, then averaged
    r = scale * FORM_SIZES[size] * rng.uniform(0.95, 1.05)
    x, y = scale * ((np.array([column, row]) + 0.5) / 3 + rng.uniform(-0.02, 0.02, 2))
    image = Image.new("RGB", (scale, scale), tuple(255 - (255 - c) * 2 // 5 for c in COLOURS[background]))
    draw, fill = ImageDraw.Draw(image), COLOURS[colour]
    if form == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill)
    elif form == "cross":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
    else:
        corners = 4 if form == "square" else 3
        angle = 2 * np.pi * np.arange(corners) / corners - np.pi / (4 if form == "square" else 2)
        draw.polygon([*zip(x + 1.2 * r * np.cos(angle), y + 1.2 * r * np.sin(angle), strict=True)], fill)
    picture = np.asarray(image.resize((pixels, pixels), Image.Resampling.BOX)) + rng.normal(0, 4, (pixels, pixels, 3))
    caption = f"a {size} {colour} {form} at the {ROWS[row]} {COLUMNS[column]} of a {background} background"
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8)), caption


# ---------------------------------------------------------------------------------------------- sources
def sample_of(name):
    """File name -> (folder, name up to the first dot): the files that share it are one sample (WebDataset's rule)."""
    folder, name = os.path.split(name)
    return folder, name.partition(".")[0]


def extension_of(name):
    """File name -> what follows its last dot, in lower case."""
    return name.rpartition(".")[2].lower()


def find_units(dataset, split, source, captions):
    """What there is to read, one unit of work a shard: a list of JSON-ready lists.

    ["shapes", first seed, count], ["tar", file, bytes], ["files", [name, ...]] or
    ["table", folder, [[image, [captions]], ...]]. Raises UserError if there is nothing.
    """
    if dataset == "shapes":
        first, count = (0 if split == "train" else 1 << 32), SHAPES_SAMPLES[split]
        return [["shapes", first + i, min(UNIT_SAMPLES, count - i)] for i in range(0, count, UNIT_SAMPLES)]
    found = sorted(path for pattern in source or [] for path in glob.glob(os.path.expanduser(pattern)))
    if not found:
        raise UserError(f"--source {' '.join(source or ['is missing'])}: no such file; expected tars or a folder, "
                        f"for example --source '{dataset}/*.tar'")
    if captions:
        table = sorted(read_caption_table(captions).items())
        return [["table", found[0], table[i:i + UNIT_SAMPLES]] for i in range(0, len(table), UNIT_SAMPLES)]
    names = [str(f) for path in found for f in ([path] if os.path.isfile(path) else sorted(Path(path).rglob("*")))]
    units = [["tar", name, os.path.getsize(name)] for name in names if name.endswith((".tar", ".tar.gz"))]
    names = sorted((name for name in names if extension_of(name) in MAX_BYTES), key=sample_of)
    samples = [list(files) for _, files in itertools.groupby(names, sample_of)]
    units += [["files", sum(samples[i:i + UNIT_SAMPLES], [])] for i in range(0, len(samples), UNIT_SAMPLES)]
    if not units:
        raise UserError(f"--source {' '.join(source)}: expected .tar files, or images with a .txt or .json of the same "
                        "name, or with --captions FILE a folder of images")
    return units


def read_caption_table(path):
    """COCO's captions_*.json, a CSV `image,caption` or Flickr's lines `image#0<TAB>caption` -> {image: [captions]}."""
    table = {}
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8", newline="") as file:
            if ".json" in Path(path).name:
                coco = json.load(file)
                names = {image["id"]: image["file_name"] for image in coco["images"]}
                notes = sorted(coco["annotations"], key=lambda note: note["id"])
                rows = [(names[note["image_id"]], note["caption"]) for note in notes]
            elif "token" in Path(path).name:
                rows = [line.rstrip().split("\t") for line in file if line.strip()]
            else:
                rows = [row for row in csv.reader(file, skipinitialspace=True) if row][1:]
        for name, caption in rows:
            table.setdefault(name.partition("#")[0], []).append(caption)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error) as problem:
        raise UserError(f"--captions {path}: {type(problem).__name__}: {problem}; expected COCO's captions_*.json, "
                        "a CSV with the header `image,caption`, or Flickr's *.token.txt") from None
    return table


def read_members(unit, image_size, skipped, text_only):
    """Yield (name, bytes) of every file in a unit, those of a sample one after the other; nothing is extracted.

    Of a file that is too long come one byte more than allowed, which make_sample refuses; text_only leaves images
    unread. Members of tars that are no files are counted in `skipped`, a Counter.
    """
    def read(name, file):
        with file:
            unread = text_only and extension_of(name) in IMAGE_TYPES
            return name, b"" if unread else file.read(MAX_BYTES[extension_of(name)] + 1)

    kind, *rest = unit
    if kind == "shapes":
        for seed in range(rest[0], sum(rest)):
            image, caption = draw_shapes(seed, image_size)
            image.save(png := io.BytesIO(), "PNG", compress_level=0)
            yield f"{seed:012d}.png", png.getvalue()
            yield f"{seed:012d}.txt", caption.encode()
    elif kind == "table":
        for name, captions in rest[1]:
            yield f"{name}.json", json.dumps({"captions": captions}).encode()
            if os.path.isfile(path := os.path.join(rest[0], name)) and extension_of(name) in IMAGE_TYPES:
                yield read(name, open(path, "rb"))
    elif kind == "files":
        for name in rest[0]:
            yield read(name, open(name, "rb"))
    else:
        try:
            with tarfile.open(rest[0], "r:gz" if rest[0].endswith("gz") else "r:") as tar:
                for member in tar:
                    tar.members = []                  # tarfile remembers every member it has seen; we need none
                    if not member.isreg():
                        skipped["tar member is a link or a device"] += not member.isdir()
                    elif extension_of(member.name) in MAX_BYTES:
                        yield read(member.name, tar.extractfile(member))
                tar.fileobj.seek(tar.offset)          # tarfile takes a damaged header for the end; the end is zeros
                if tar.fileobj.read(512) != bytes(512):
                    raise tarfile.ReadError
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile):
            skipped["tar is cut short or damaged"] += 1


def read_unit(unit, image_size, skipped, text_only=False):
    """Yield (key, {extension: bytes}) for each sample of a unit; the arguments are read_members's."""
    members = read_members(unit, image_size, skipped, text_only)
    for (_, key), files in itertools.groupby(members, lambda member: sample_of(member[0])):
        yield key, {extension_of(name): content for name, content in files}


def read_captions(files, caption_key):
    """{extension: bytes} of a sample -> its captions, white space collapsed. Raises BadSample.

    JSON's `caption_key`, or if that is None JSON's "captions", KEY.txt or JSON's "caption", the first that is there.
    CC12M's <PERSON> becomes "person", one common word for five odd pieces.
    """
    for extension, content in files.items():
        if len(content) > MAX_BYTES[extension]:
            raise BadSample("image file is too large" if extension in IMAGE_TYPES else "caption is too long")
    try:
        record = json.loads(files.get("json", b"{}"))
        record = record if isinstance(record, dict) else {}
        text = files.get("txt", b"").decode()
    except UnicodeDecodeError:
        raise BadSample("caption is not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadSample("broken JSON") from None
    found = record.get(caption_key) if caption_key else record.get("captions") or text or record.get("caption")
    captions = [c for c in (found if isinstance(found, list) else [found]) if isinstance(c, str)]
    captions = [" ".join(c.replace("\0", " ").replace("<PERSON>", "person").split()) for c in captions]
    if not any(captions):
        raise BadSample("no caption")
    return [caption for caption in captions if caption]


# ---------------------------------------------------------------------------------------------- writing shards
@contextlib.contextmanager
def replace_file(path):
    """A binary file that becomes `path` when the block ends well: flushed to disk and renamed, whole or not at all."""
    path = Path(path)
    try:
        with open(f"{path}.tmp", "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except BaseException:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise
    if os.name == "posix":                            # the name is on disk only when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_json(path, value):
    """Replace a JSON file, whole or not at all."""
    with replace_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def write_shard(unit, number, folder, plan):
    """Read a unit and write its shard; returns (and leaves in NNNNN.json) the shard's entry of meta.json.

    The same unit and plan give the same bytes. A unit whose NNNNN.json is there was finished by an earlier run.
    """
    path = folder / f"{number:05d}.shard"
    if path.with_suffix(".json").exists():
        return json.loads(path.with_suffix(".json").read_text())
    tokenizer, short_side = load_tokenizer(plan["tokenizer"]), plan["stored_side"]
    records, token_ends, tokens, held_out, skipped = [], [], [], [], Counter()

    def add(data, captions, *rest):
        file.write(data)
        for caption in captions:
            tokens.extend(caption)
            token_ends.append(len(tokens))
        records.append((file.tell(), len(token_ends), *rest))

    with open(f"{path}.tmp", "w+b") as file:
        for key, files in read_unit(unit, plan["image_size"], skipped):
            try:
                captions, found = read_captions(files, plan["caption_key"]), [e for e in IMAGE_TYPES if e in files]
                if not found:
                    raise BadSample("no image")
                image = open_image(io.BytesIO(files[found[0]]), short_side)
            except BadSample as reason:
                skipped[str(reason)] += 1
                continue
            original_size = image.info["original_size"]
            if min(image.size) > short_side:          # never upscaled
                size = [round(side * short_side / min(image.size)) for side in image.size]
                image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
            data = image.tobytes()
            if plan["encoding"] == "jpeg":
                image.save(buffer := io.BytesIO(), "JPEG", quality=90)
                data = buffer.getvalue()
            captions = [[*tokenizer.encode_ordinary(caption), tokenizer.eot_token] for caption in captions]
            key = key.encode(errors="replace")[-RECORD["key"].itemsize:]
            sample = (data, captions, image.size, original_size, key)
            if int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < HELD_OUT * 2 ** 64:
                held_out.append(sample)
            else:
                add(*sample)
        for sample in held_out:
            add(*sample)
        image_bytes = file.tell()
        file.write(bytes(-image_bytes % 8))
        for array in (np.array(records, RECORD), np.array(token_ends, "<i8"), np.array(tokens, plan["token_dtype"])):
            file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())
        lengths = Counter(np.diff(token_ends, prepend=0).tolist())
        entry = {"samples": len(records), "held_out": len(held_out), "captions": len(token_ends), "tokens": len(tokens),
                 "image_bytes": image_bytes, "bytes": file.tell(), "skipped": skipped,
                 "lengths": sorted(lengths.items())}
        file.seek(0)
        entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    os.replace(f"{path}.tmp", path)
    write_json(path.with_suffix(".json"), entry)
    return entry


def count_pieces(unit, caption_key):
    """How often each piece occurs in the captions of a unit; the first pass for a words:N tokenizer."""
    counts = Counter()
    for _, files in read_unit(unit, MIN_SIDE, Counter(), text_only=True):
        with contextlib.suppress(BadSample):          # counted when the shards are written
            for caption in read_captions(files, caption_key):
                counts.update(re.findall(PIECE, caption))
    return counts


def prepare(dataset, split, data_dir="data", source=None, captions=None, caption_key=None, image_size=224,
            encoding=None, tokenizer="gpt2", workers=None, fresh=False):
    """Make the shards of data_dir/dataset/split and return its meta.json. The arguments are those of `data.py -h`.

    Killed at any moment and called again it makes what is missing; the bytes are the same. Raises UserError.
    """
    folder = Path(data_dir) / dataset / split
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:         # the system drops the lock with the process, however that ends
        try:
            fcntl and fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if dataset != "shapes":
                raise UserError(f"{folder} is being prepared by another process: wait for it, or use another "
                                "--data-dir") from None
            print(f"another process is making {folder}: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        units = find_units(dataset, split, source, captions)
        for path in [*folder.glob("*.json*"), *folder.glob("*.shard*")] if fresh else []:
            path.unlink()
        plan = {"format": FORMAT, "image_size": image_size, "caption_key": caption_key,
                "stored_side": image_size if dataset == "shapes" else round(image_size * 8 / 7),
                "encoding": encoding or ("raw" if image_size <= 64 else "jpeg"),
                "source": hashlib.sha256(json.dumps(units).encode()).hexdigest()[:16]}
        plan_file, spec_file, meta_file = folder / "plan.json", folder.parent / "tokenizer.json", folder / "meta.json"
        old = json.loads(plan_file.read_text()) if plan_file.exists() else plan
        changed = [f"{key} was {old.get(key)}, now {plan[key]}" for key in plan if old.get(key) != plan[key]]
        spec = json.loads(spec_file.read_text()) if spec_file.exists() and not (fresh and split == "train") else None
        if spec and spec["name"] != tokenizer:        # one tokenizer for all splits
            changed.append(f"tokenizer was {spec['name']}, now {tokenizer}")
        if changed:
            raise UserError(f"{folder} has shards of another kind ({'; '.join(changed)}): use --fresh to replace them, "
                            "the train split first, or another --data-dir")
        if meta_file.exists():
            return json.loads(meta_file.read_text())
        if not spec and tokenizer.startswith("words:") and split != "train":
            raise UserError(f"--tokenizer {tokenizer} is made from the training captions: prepare --split train first")
        write_json(plan_file, plan)
        bar = functools.partial(tqdm, total=len(units), unit="shard", desc=f"{dataset}/{split}", dynamic_ncols=True)
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            if not spec and tokenizer.startswith("words:"):
                jobs = pool.map(count_pieces, units, [caption_key] * len(units))
                spec = words_tokenizer(tokenizer, sum(bar(jobs, desc="reading captions"), Counter()))
            plan["tokenizer"] = spec or {"name": tokenizer}
            plan["vocab_size"] = load_tokenizer(plan["tokenizer"]).n_vocab
            plan["token_dtype"] = "<u2" if plan["vocab_size"] <= 1 << 16 else "<u4"
            write_json(spec_file, plan["tokenizer"])
            jobs = [pool.submit(write_shard, unit, number, folder, plan) for number, unit in enumerate(units)]
            for job in bar(as_completed(jobs)):
                job.result()                          # a worker's error stops us here and not at the end
        shards = [job.result() for job in jobs]
        totals = {name: sum(s[name] for s in shards) for name in ("samples", "held_out", "captions", "tokens", "bytes")}
        skipped = sum((Counter(shard["skipped"]) for shard in shards), Counter())
        if not totals["samples"]:
            raise UserError(f"not one usable sample in --source {source} ({dict(skipped)})")
        lengths = sum((Counter(dict(shard.pop("lengths"))) for shard in shards), Counter())
        meta = plan | totals | {"skipped": skipped, "lengths": sorted(lengths.items()), "shards": shards}
        write_json(meta_file, meta)
        for path in folder.glob("[0-9]*.json"):
            path.unlink()
    return meta


# ---------------------------------------------------------------------------------------------- reading shards
class Shards:
    """Random access to a split by sample number in O(1); a shard is memory-mapped when it is first touched.

    part: "all", or of a split without a validation set "train" (all but the held-out samples) or "held_out".
    Raises UserError where meta.json and the files do not fit together, before anything is read through it.
    """

    def __init__(self, folder, part="all"):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            if self.meta["format"] != FORMAT:
                raise UserError(f"{folder} has shards of format {self.meta['format']}, this program reads {FORMAT}: "
                                "prepare them again with --fresh")
            samples, held_out = (np.array([s[name] for s in self.meta["shards"]]) for name in ("samples", "held_out"))
            if not len(samples) or (held_out < 0).any() or (samples < held_out).any():
                raise ValueError("its counts make no sense")
            self.lengths = {int(length): int(count) for length, count in self.meta["lengths"]}
            self.tokenizer = load_tokenizer(self.meta["tokenizer"])
            self.digest = hashlib.sha256("".join(s["sha256"] for s in self.meta["shards"]).encode()).hexdigest()
        except FileNotFoundError:
            raise UserError(f"no shards in {folder}; make them with: python data.py --dataset {self.folder.parent.name}"
                            f" --split {self.folder.name} --source TARS") from None
        except (ValueError, KeyError, TypeError, RecursionError) as problem:
            raise UserError(f"{folder}/meta.json is damaged ({type(problem).__name__}: {problem}): prepare it again"
                            ) from None
        held_out = (held_out * min(1, HELD_OUT_MOST / max(1, held_out.sum()))).astype(int)
        self.first = samples - held_out if part == "held_out" else 0 * samples
        self.counts = {"all": samples, "train": samples - held_out, "held_out": held_out}[part]
        self.ends = np.cumsum(self.counts)
        self.total = int(self.ends[-1])               # may be lowered: the first so many
        self.maps = [None] * len(samples)

    def __len__(self):
        return self.total

    def _open(self, number):
        """Map shard `number` -> (bytes, samples, token_ends, tokens), checked."""
        entry, path = self.meta["shards"][number], self.folder / f"{number:05d}.shard"
        try:
            arrays = [(RECORD, entry["samples"]), (np.dtype("<i8"), entry["captions"]),
                      (np.dtype(self.meta["token_dtype"]), entry["tokens"])]
            ends = np.cumsum([entry["image_bytes"] + -entry["image_bytes"] % 8, *(d.itemsize * n for d, n in arrays)])
            if path.stat().st_size != ends[-1]:
                raise ValueError(f"{path.stat().st_size:,} bytes, {ends[-1]:,} expected")
            # torch closes the file once it is mapped; numpy would keep a descriptor for each of thousands of shards
            memory = torch.from_file(str(path), size=int(ends[-1]), dtype=torch.uint8).numpy()
            samples, token_ends, tokens = (memory[start:end].view(dtype) for (dtype, _), start, end
                                           in zip(arrays, ends[:-1], ends[1:], strict=True))
            for index, last in ((samples["image_end"], entry["image_bytes"]), (samples["caption_end"], len(token_ends)),
                                (token_ends, len(tokens))):
                if len(index) and (index[0] < 0 or index[-1] != last or (np.diff(index) < 0).any()):
                    raise ValueError("its index is damaged")
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as problem:
            raise UserError(f"{path} does not fit its meta.json ({problem}): copy it or prepare it again") from None
        self.maps[number] = memory, samples, token_ends, tokens
        return self.maps[number]

    def _locate(self, index):
        """Sample number -> its shard's four arrays and its row there."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        row = int(self.first[number] + index - (self.ends[number] - self.counts[number]))
        return *(self.maps[number] or self._open(number)), row

    def key(self, index):
        """Key of a sample: file name without extension, COCO image id, ..."""
        _, samples, _, _, row = self._locate(index)
        return samples["key"][row].decode(errors="replace")

    def image(self, index, short_side=None):
        """RGB PIL image as stored; with short_side a JPEG may come back smaller, never below it: less to decode."""
        memory, samples, _, _, row = self._locate(index)
        data = memory[samples["image_end"][row - 1] if row else 0:samples["image_end"][row]]
        if self.meta["encoding"] == "raw":
            return Image.frombuffer("RGB", tuple(samples["size"][row].tolist()), data, "raw", "RGB", 0, 1)
        return open_image(io.BytesIO(data), short_side)

    def captions(self, index):
        """Token ids of all captions of a sample: a list of int arrays that end in EOS."""
        _, samples, token_ends, tokens, row = self._locate(index)
        first, last = samples["caption_end"][row - 1] if row else 0, samples["caption_end"][row]
        return [tokens[token_ends[i - 1] if i else 0:token_ends[i]] for i in range(first, last)]


def open_split(data_dir, dataset, split):
    """Shards of data_dir/dataset/split. Where there is no "val", the held-out part of "train" takes its place."""
    folder = Path(data_dir) / dataset
    if split not in ("train", "val") or (folder / "val" / "meta.json").exists():
        return Shards(folder / split)
    return Shards(folder / "train", "train" if split == "train" else "held_out")


# ---------------------------------------------------------------------------------------------- batches
ORDER, SAMPLE, TIME, SCORING, EXCHANGE = range(5)     # what a random stream is for


def random_stream(seed, purpose, number):
    """The numpy generator that belongs to (seed, purpose, number): the same wherever and whenever it is made."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, purpose, number))))


@functools.lru_cache(maxsize=4)
def _feistel_keys(seed, epoch):
    return random_stream(seed, ORDER, epoch).integers(1 << 62, size=4).tolist()


def shuffled(position, count, seed, epoch):
    """Where `position` of 0..count-1 goes in the permutation of this epoch: O(1), whatever the size of the data set.

    A Feistel network permutes a power of four; what lands beyond `count` is sent through again until it does not.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    while True:
        left, right = position >> half, position & ((1 << half) - 1)
        for key in _feistel_keys(seed, epoch):
            mixed = (right + key) * 0x9E3779B97F4A7C15 % (1 << 64)
            mixed = (mixed ^ mixed >> 31) * 0xBF58476D1CE4E5B9 % (1 << 64)
            left, right = right, left ^ (mixed >> 40) % (1 << half)
        position = left << half | right
        if position < count:
            return position


class Batches(torch.utils.data.Dataset):
    """Item k is the k-th micro-batch that process `rank` of `world` trains on, ready for the device.

    The global batch of step s is samples s*B .. s*B+B-1 of an endless sequence of shuffled epochs. With `accumulation`
    A it is dealt out in A*world interleaved parts, so that each part has early and late times alike.
    augment=False is for evaluation: in order, central crop, first caption; the last batch may be shorter.

    `transform` (dict -> dict) runs in the worker. An item has
        images [B,S,S,3] uint8   tokens [B,T]   valid [B,T] bool, False at pads   noise [B,T] uniform in [0,1)
        u, one number in [0,1) for the whole global batch   index [B] places in the global batch   length [B]
    with T the longest caption of the item rounded up to a multiple of 8, to spare compiled graphs. With pads="eos" T is
    max_tokens and pads are tokens like others.
    """

    def __init__(self, shards, batch_size, image_size, max_tokens, seed, augment=True, crop_scale=1.0, flip=False,
                 pads="hidden", rank=0, world=1, accumulation=1, transform=None):
        super().__init__()
        self.shards, self.batch_size, self.image_size, self.max_tokens = shards, batch_size, image_size, max_tokens
        self.seed, self.augment, self.crop_scale, self.flip, self.pads = seed, augment, crop_scale, flip, pads
        self.rank, self.world, self.accumulation, self.transform = rank, world, accumulation, transform

    def __getitem__(self, item):
        step, micro = divmod(item, self.accumulation)
        index = np.arange(micro * self.world + self.rank, self.batch_size, self.accumulation * self.world)
        if not self.augment:
            index = index[step * self.batch_size + index < len(self.shards)]
        images, captions, noise = zip(*(self.sample(step * self.batch_size + int(i)) for i in index), strict=True)
        longest = max(map(len, captions)) if self.pads == "hidden" else self.max_tokens
        T = min(-(-longest // 8) * 8, self.max_tokens)
        tokens = np.full((len(captions), T), self.shards.tokenizer.eot_token)
        for row, caption in zip(tokens, captions, strict=True):
            row[:len(caption)] = caption
        valid = np.arange(T) < np.array([T if self.pads == "eos" else len(caption) for caption in captions])[:, None]
        batch = {"images": torch.from_numpy(np.stack(images)), "tokens": torch.from_numpy(tokens),
                 "valid": torch.from_numpy(valid), "noise": torch.from_numpy(np.stack(noise)[:, :T]),
                 "u": random_stream(self.seed, TIME, step).random(), "index": torch.from_numpy(index),
                 "length": torch.tensor([len(caption) for caption in captions])}
        return self.transform(batch) if self.transform else batch

    def sample(self, number):
        """Sample `number` of the endless sequence -> image [S,S,3] uint8, tokens, noise [max_tokens]."""
        epoch, position = divmod(number, len(self.shards))
        rng = random_stream(self.seed, SAMPLE, number)
        noise = rng.random(self.max_tokens, dtype=np.float32)
        place = shuffled(position, len(self.shards), self.seed, epoch) if self.augment else position
        captions = self.shards.captions(place)
        tokens = captions[rng.integers(len(captions)) if self.augment else 0]
        if len(tokens) > self.max_tokens:             # EOS is sticky: a caption that is cut still ends
            tokens = np.append(tokens[:self.max_tokens - 1], tokens[-1])
        image = self.shards.image(place, round(self.image_size / self.crop_scale ** 0.5))
        box = random_box(rng, *image.size, self.crop_scale) if self.augment else None
        image = crop_square(image, self.image_size, box)
        return image[:, ::-1] if self.augment and self.flip and rng.random() < 0.5 else image, tokens, noise


# ---------------------------------------------------------------------------------------------- command line
def main():
    from train import PRESETS  # late: train.py imports this file
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", required=True, help="any name; shards go to DATA_DIR/DATASET/SPLIT. `shapes` is drawn here")
    add("--split", choices=("train", "val"), default="train", help="default: train, which comes first; val is optional")
    add("--source", nargs="+", metavar="PATH", help="tars, folders or patterns; with --captions the images' folder")
    add("--captions", metavar="FILE", help="caption table: COCO's captions_*.json, a CSV headed `image,caption`, or "
        "Flickr's *.token.txt; images that it does not name are left out")
    add("--caption-key", metavar="KEY", help="field of KEY.json with the caption or a list of captions "
        "(default: captions, else KEY.txt, else caption)")
    add("--image-size", type=int, metavar="PX", help="largest size to train at; the short side is stored 8/7 as long, "
        "never upscaled (default: the data set's preset in train.py, else 224)")
    add("--encoding", choices=("jpeg", "raw"), help="default: raw up to 64 px, else jpeg of quality 90")
    add("--tokenizer", metavar="NAME", help="any of tiktoken's, or words:N, the N most frequent words of the training "
        "captions, which needs no network (default: the data set's preset, else gpt2)")
    add("--data-dir", default="data", metavar="DIR", help="default: data")
    add("--workers", type=int, metavar="N", help="processes (default: one a core)")
    add("--fresh", action="store_true", help="remove the split's shards and start over")
    args = parser.parse_args()
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", args.dataset):
        raise UserError(f"--dataset {args.dataset}: expected a name of letters, digits, dots and dashes")
    check_least(args, image_size=MIN_SIDE, workers=1)
    preset = PRESETS.get(args.dataset, {})
    options = vars(args) | {"image_size": args.image_size or preset.get("image_size", 224),
                            "tokenizer": args.tokenizer or preset.get("tokenizer", "gpt2")}
    for split in ("train", "val") if args.dataset == "shapes" else (args.split,):
        meta = prepare(**options | {"split": split})
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in meta["skipped"].items()) or "none"
        print(f"{args.data_dir}/{args.dataset}/{split}: {meta['samples']:,} images, {meta['captions']:,} captions of "
              f"{meta['tokens'] / meta['captions']:.1f} tokens on average ({meta['tokenizer']['name']}, vocabulary "
              f"{meta['vocab_size']:,}), {meta['bytes'] / 1e6:,.1f} MB in {len(meta['shards'])} shards; "
              f"skipped: {skipped}")
    print(f"next: python train.py --dataset {args.dataset}")


if __name__ == "__main__":
    run(main)
