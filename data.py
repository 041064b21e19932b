"""Makes shards of captioned images, and batches of shards.

    python data.py --dataset cc3m --source 'cc3m/*.tar'    # img2dataset or WebDataset tars

Images are resized and captions tokenized once. DATA_DIR/DATASET/SPLIT has

    NNNNN.shard   bytes of each image, followed by its captions in uint32 tokens
    samples.bin   one RECORD for each image, the held-out ones (0.5 %) last
    meta.json     record, tokenizer, counts

Batches depend on (seed, position in the run) alone: a resumed run needs no saved state."""
import argparse
import contextlib
import csv
import fcntl
import functools
import glob
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import tarfile
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from tqdm import tqdm

# Other names use PHOTOGRAPHS. max_tokens counts EOS.
PHOTOGRAPHS = {"image_size": 224, "tokenizer": "gpt2", "max_tokens": 64}
DATASETS = {
    "shapes": {"image_size": 48, "tokenizer": "words:100", "max_tokens": 16},
    "flickr8k": {"image_size": 32, "tokenizer": "words:4000", "max_tokens": 32},
    "recap": PHOTOGRAPHS | {"max_tokens": 128},
    **dict.fromkeys(("coco", "cc3m", "cc12m"), PHOTOGRAPHS),
}
FORMAT = 4
RECORD = np.dtype([("key", "S48"), ("shard", "<i4"), ("start", "<i8"), ("image_bytes", "<i4"),
                   ("tokens", "<i4"), ("held_out", "|b1")])
HELD_OUT = 0.005  # share of the images
UNIT_SAMPLES = 2048  # in a shard; a tar becomes one shard
MIN_SIDE, MEGAPIXELS, MAX_RATIO = 8, 50, 10  # of images that are read
SMALL = 64  # least side of stored photos; sets up to it are PPM files
IMAGE_TYPES, TEXT_TYPES = ("jpg", "jpeg", "png", "webp"), ("txt", "json")
MAX_BYTES = dict.fromkeys(IMAGE_TYPES, 1 << 25) | dict.fromkeys(TEXT_TYPES, 1 << 20)
JUNK = {".ds_store", "thumbs.db", "desktop.ini", "__macosx", ".ipynb_checkpoints"}


# ---- errors and options
class UserError(Exception):
    """Bad input: one line and status 2. Functions that read options or files raise it."""


class BadSample(Exception):
    """A sample to skip and count by the message."""


def run(main):
    """Call main(). An error that is no bug becomes one line and exit status 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names need not be UTF-8
    try:
        main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `sample.py ... | head`
        os._exit(1)
    except (UserError, OSError, RuntimeError) as problem:
        lines = str(problem).strip().splitlines() or [""]
        message = lines[-1].split("UserError: ")[-1]  # after a loader's traceback
        if isinstance(problem, torch.OutOfMemoryError):
            message = f"{lines[0]}: try a smaller --micro-batch or --batch-size"
        elif "DataLoader worker (pid" in lines[0]:
            message = "a worker ended (memory, /dev/shm, TMPDIR?): try fewer --workers"
        elif "BackendCompilerFailed" in str(type(problem).__mro__):
            message = f"{' '.join(lines[:2])}: try --compile off"
        elif re.search("No space|quota exceeded|File too large|unexpected pos", message):
            message += ": make room, then try again"
        elif not isinstance(problem, UserError) and "[Errno" not in message:
            raise  # a bug
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Raises UserError, one line, instead of argparse's usage."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; {self.prog} -h lists the options")


def number_type(kind, fits, expected):
    """-> argparse type: text -> kind(text), if it fits."""
    def parse(text):
        with contextlib.suppress(ValueError):
            number = kind(text)
            if fits(number) and number < 1 << 63:
                return number
        raise argparse.ArgumentTypeError(f"{text:.99}: expected {expected}, below 2^63")

    return parse


positive_int = number_type(int, lambda x: x > 0, "a whole number above 0")
non_negative_int = number_type(int, lambda x: x >= 0, "a whole number, not negative")
positive_float = number_type(float, lambda x: x > 0, "a number above 0")
non_negative_float = number_type(float, lambda x: x >= 0, "a number, not negative")
fraction = number_type(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")


def listed(names):
    """The first three names and how many others."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(map(str, names[:3])) + more


# ---- tokenizers
# re's \w, unlike tiktoken's, lacks the vowel signs of Hindi and Thai.
MARKS = r"!-/:-@\[-^`{-~¡-¿،؛؟।\u2010-\u206f\u3000-\u303f\uff00-\uff0f"
PIECE = rf" ?[^\s{MARKS}]+| ?[{MARKS}]+|\s+"


def load_tokenizer(spec):
    """{"name": "gpt2"} or {"name": "words:N", "pieces": [...]} -> tiktoken.Encoding; its eot_token
    is EOS."""
    name = spec["name"]
    if "pieces" in spec:
        pieces = [bytes([byte]) for byte in range(256)]
        pieces += [piece.encode() for piece in spec["pieces"]]
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        return tiktoken.Encoding(name, pat_str=PIECE, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(pieces)})
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError):  # no network, a damaged cache, an unknown name
        raise UserError(f"tokenizer {name!r} is unknown or not in TIKTOKEN_CACHE_DIR: "
                        "copy it there, or use words:8000") from None


def words_tokenizer(name, counts):
    """"words:N", Counter of pieces -> spec with the N most frequent of several bytes."""
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    pieces = [piece for piece in ranked if len(piece.encode()) > 1]
    return {"name": name, "pieces": pieces[:int(name.removeprefix("words:"))]}


def clean_caption(text):
    """Caption with white space collapsed and CC12M's <PERSON> as "person"."""
    words = text.replace("\0", " ").replace("<PERSON>", "person").split()
    return " ".join(words).encode(errors="replace").decode()


def decode_caption(tokenizer, tokens):
    """Token ids -> the text before the first EOS."""
    ids = [*map(int, tokens), tokenizer.eot_token]
    return tokenizer.decode(ids[:ids.index(tokenizer.eot_token)], errors="replace").strip()


# ---- images
def open_image(file, short_side=None):
    """File name or binary file -> upright RGB PIL image, perhaps reduced to `short_side` or more.
    Raises BadSample, whatever the file contains."""
    PngImagePlugin.MAX_TEXT_CHUNK = 1 << 24
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(file, formats=("JPEG", "PNG", "WEBP", "PPM"))
        size = image.size
        if math.prod(size) > MEGAPIXELS * 10**6:
            raise BadSample(f"image above {MEGAPIXELS} megapixels")
        if min(size) < MIN_SIDE or max(size) > MAX_RATIO * min(size):
            raise BadSample(f"image side below {MIN_SIDE} pixels or ratio above {MAX_RATIO}:1")
        if short_side:  # JPEG can be decoded at 1/2, 1/4 or 1/8
            image.draft("RGB", [length * short_side // min(size) for length in size])
        image.load()
        with contextlib.suppress(Exception):  # broken EXIF
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)
    except BadSample:
        raise
    except Image.UnidentifiedImageError:
        reason = "not a JPEG, PNG or WebP image"
    except Exception as problem:  # decoders raise a dozen types
        reason = getattr(problem, "strerror", None) or "image data is broken"
    raise BadSample(reason)


def to_rgb(image):
    """PIL image -> RGB on white; 16 bits are scaled."""
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 257).convert("L")
        image.info.pop("transparency", None)  # a grey of 16 bits
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def crop_square(image, side):
    """Central square of a PIL image -> uint8 [side,side,3]."""
    return np.asarray(ImageOps.fit(image, (side, side)))


def random_crop_box(size, scale, rng):
    """(left, top, right, bottom) of torchvision's RandomResizedCrop: area uniform in [scale, 1],
    aspect ratio log-uniform in [3/4, 4/3]."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(scale, 1)
        aspect = (4 / 3) ** rng.uniform(-1, 1)
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            x, y = rng.random(2)
            break
    else:
        w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
        x, y = 0.5, 0.5
    left, top = x * (width - w), y * (height - h)
    return left, top, left + w, top + h


# ---- synthetic images: shapes
SHAPES_SAMPLES = {"train": 20_000, "val": 1024}
COLOURS = {"red": (205, 25, 40), "green": (25, 130, 45), "blue": (30, 65, 200),
           "yellow": (215, 175, 0), "purple": (125, 40, 155), "orange": (235, 110, 15)}
FORMS = ("circle", "square", "triangle", "cross")
FORM_SIZES = {"small": 0.1, "large": 0.16}  # radius / side of the image
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
SHAPES_CAPTION = re.compile(
    r"a (?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+) at the (?P<row>\w+) (?P<column>\w+) "
    r"of an? (?P<background>\w+) background")


def shapes_caption(size, colour, shape, row, column, background):
    """The six words of an image -> its caption."""
    text = f"a {size} {colour} {shape} at the {row} {column} of a {background} background"
    return text.replace("of a orange", "of an orange")


def draw_shapes(seed, pixels):
    """Seed -> PIL image [pixels,pixels] and its caption, in which two colours differ."""
    rng = np.random.default_rng(seed)
    size = list(FORM_SIZES)[rng.integers(2)]
    form = FORMS[rng.integers(4)]
    colour, background = rng.permutation(list(COLOURS))[:2]
    column, row = rng.integers(3, size=2)

    scale = 3 * pixels  # against aliasing
    r = scale * FORM_SIZES[size] * rng.uniform(0.95, 1.05)
    x, y = scale * ((np.array([column, row]) + 0.5) / 3 + rng.uniform(-0.02, 0.02, 2))
    pale = tuple(255 - (255 - value) * 2 // 5 for value in COLOURS[background])
    image = Image.new("RGB", (scale, scale), pale)
    draw = ImageDraw.Draw(image)
    fill = COLOURS[colour]
    if form == "circle":
        draw.circle((x, y), r, fill)
    elif form == "cross":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
    else:
        draw.regular_polygon((x, y, 1.2 * r), 4 if form == "square" else 3, fill=fill)

    image = np.asarray(image.resize((pixels, pixels), Image.BOX))
    image = image + rng.normal(0, 4, image.shape)
    caption = shapes_caption(size, colour, form, ROWS[row], COLUMNS[column], background)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), caption


# ---- sources: files and tars
def split_name(name):
    """a/b.JPG -> a/b, jpg. Files of a sample share the first, the stem."""
    stem, extension = os.path.splitext(name)
    return stem, extension[1:].lower()


def not_text(name):
    """False for the names of texts and tables."""
    return split_name(name)[1] not in ("txt", "csv", "json", "xml", "md", "html")


def is_junk(path):
    """Made by an operating system or notebook?"""
    return any(part in JUNK or part[:2] == "._" for part in str(path).lower().split("/"))


def list_files(path, entered):
    """A file, or all below a folder, also through links, without folders in the set `entered`."""
    if not os.path.isdir(path):
        return [path]
    real = os.path.realpath(path)
    names = [] if real in entered else sorted(os.listdir(path))
    entered.add(real)
    paths = [os.path.join(path, name) for name in names if not is_junk(name)]
    return [file for path in paths for file in list_files(path, entered)]


def group_files(files):
    """(name, place) of files -> samples (stem, [(type, place), ...], None), see find_units. A
    place is the end of read_file's arguments: (path,) or (path, start, size).

    KEY.seg.png beside KEY.jpg is another type of KEY, as in WebDataset, and left out."""
    samples = defaultdict(list)
    for name, place in files:
        stem, kind = split_name(name)
        if kind in MAX_BYTES:
            samples[stem].append((kind, place))

    def is_part(stem, places):
        key = re.sub(r"\.[^/]*$", "", stem)
        kinds = {kind in IMAGE_TYPES for kind, _ in places}
        return len(kinds) < 2 and key != stem and key in samples

    return [(*sample, None) for sample in samples.items() if not is_part(*sample)]


def find_sources(patterns):
    """Patterns with *, **, ? and [] -> paths, at least one each."""
    found = set()
    for pattern in map(os.path.expanduser, patterns):
        literal = pattern.replace("[", "[[]")  # [] may be of a name
        paths = glob.glob(literal, recursive=True) or glob.glob(pattern, recursive=True)
        if not paths:
            hint = "; type {0..9} without quotes" if "{" in pattern else ""
            raise UserError(f"--source {pattern}: no such file or folder{hint}")
        found.update(os.path.normpath(path) for path in paths if not is_junk(path))
    return sorted(found)


def digest(value):
    """SHA-256 of a JSON-ready value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def describe(path):
    """Name, size and time of a file."""
    status = os.stat(path)
    return [os.path.basename(path), status.st_size, int(status.st_mtime)]


def split_units(source, values):
    """Values -> [(source, at most UNIT_SAMPLES), ...]"""
    return [(source, values[i:i + UNIT_SAMPLES]) for i in range(0, len(values), UNIT_SAMPLES)]


def find_units(dataset, split, source, captions):
    """-> units, one for each shard, and a text that changes with the input. A unit is
    ("shapes", seeds), ("tar", path) or ("files", samples), a sample (stem, [(type, (path,)), ...],
    captions); captions are None if they are in its files."""
    if dataset == "shapes":
        first = 0 if split == "train" else 1 << 32
        seeds = range(first, first + SHAPES_SAMPLES[split])
        return split_units("shapes", seeds), f"{seeds}"

    files = []
    entered = set()
    for path in find_sources(source or []):
        if not os.path.isdir(path) and (captions or split_name(path)[1] != "tar"):
            raise UserError(f"--source {path}: expected a folder, or without --captions a .tar")
        files += list_files(path, entered)
    tars = []
    if captions:
        samples = place_table(read_table(captions, split), files)
    else:
        packed = [path for path in files if re.search(r"\.(tgz|tar\.[gxbz]\w*)$", path.lower())]
        if packed:
            raise UserError(f"--source: {listed(packed)}: unpack them")
        tars = sorted({path for path in files if split_name(path)[1] == "tar"})
        folders = {os.path.dirname(path) for path in files if split_name(path)[1] in IMAGE_TYPES}
        samples = group_files((path, (path,)) for path in files if os.path.dirname(path) in folders)
    units = [("tar", path) for path in tars] + split_units("files", samples)
    if not (files and units):
        raise UserError("--source: expected tars, or images with .txt, .json or --captions")

    stamps = [describe(path) for path in tars]
    stamps += [([describe(*place) for _, place in places], texts) for _, places, texts in samples]
    return units, digest(stamps)[:8]


def tar_members(file, skipped):
    """Yield (name, size) of the plain files in a tar, with `file` at the start of each; `skipped`
    counts others and damage. (TarFile ends at damage in silence.)"""
    long_names = {tarfile.XHDTYPE: r"(?m)^\d+ path=(.*)\n", tarfile.GNUTYPE_LONGNAME: r"([^\0]+)"}
    zeros = bytes(512)
    header = found = None
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        while file.tell() < total or header != zeros:
            header = file.read(512)
            if header == zeros:  # the end, or another tar (cat)
                continue
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            start = file.tell()
            if not 0 <= member.size <= total - start:
                raise tarfile.HeaderError
            name = found[1] if found else member.name
            found = None
            if member.type in long_names:  # of the next member
                text = file.read(min(member.size, 1 << 16)).decode(errors="surrogateescape")
                found = re.search(long_names[member.type], text)
            elif member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                if not is_junk(name):
                    yield name, member.size
            elif member.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE):
                skipped["tar member is not a file"] += 1
            file.seek(start + math.ceil(member.size / 512) * 512)
    except tarfile.HeaderError:
        skipped[f"{os.path.basename(file.name)} is cut short or damaged"] += 1


# ---- tables of captions
TABLES = ("JSON of COCO or Karpathy, [{image, caption}, ...], lines `image,caption`, or .jsonl of "
          "{file_name, text}")


def read_table(path, split):
    """Table of captions -> sorted [(image name, [caption, ...]), ...]"""
    table = defaultdict(list)
    try:
        text = Path(path).read_text("utf-8-sig")
        if path.endswith(".jsonl"):  # Hugging Face's image folders
            lines = map(json.loads, filter(str.strip, text.split("\n")))
            rows = ((row["file_name"], row["text"]) for row in lines)
        elif text.lstrip()[:1] in ("{", "["):
            rows = json_rows(json.loads(text), split)
        else:
            rows = text_rows(text)
        for name, captions in rows:
            captions = [captions or ""] if isinstance(captions or "", str) else captions
            "".join(captions)  # raises unless all are texts
            table[os.path.normpath(name)] += captions
    except Exception as problem:  # parsers raise a dozen types
        raise UserError(f"--captions {path}: {type(problem).__name__} after {len(table):,} good "
                        f"images: {problem}; expected {TABLES}") from None
    if not table:
        raise UserError(f"--captions {path}: no captions of the split {split}")
    return sorted(table.items())


def json_rows(value, split):
    """Yield (image, caption or captions)."""
    if isinstance(value, list):  # as coco_karpathy_test.json
        for row in value:
            yield row["image"], row["caption"]
    elif "annotations" in value:  # COCO
        names = {image["id"]: image["file_name"] for image in value["images"]}
        for row in value["annotations"]:
            yield names[row["image_id"]], row["caption"]
    else:  # Karpathy
        for image in value["images"]:
            if image["split"].replace("restval", "train") == split:
                name = os.path.join(image.get("filepath", ""), image["filename"])
                yield name, [sentence["raw"] for sentence in image["sentences"]]


def text_rows(text):
    """Yield (image, caption) without Flickr30k's numbers; one row lacks a |."""
    if re.match(".+_number", text):
        text = re.sub(r"(?m)^([^|,\t\n]+[|,]) *(\d|\w+_number)([|,]| {3})", r"\1", text)
    mark = re.search(r"[,;|\t]|$", text)[0] or ","
    quoting = csv.QUOTE_MINIMAL if mark in ",;" else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, quoting=quoting,
                        skipinitialspace=True, strict=True)
    for row in filter(None, reader):
        if len(row) != 2:
            raise ValueError(f"line {reader.line_num:,} ({mark.join(row):.80}) has {len(row)} "
                             "columns, not 2")
        name = re.sub(r"(\.[A-Za-z]\w+)#\d+$", r"\1", row[0].strip())  # Flickr: name.jpg#0
        if reader.line_num > 1 or re.search(r"\.\w{2,5}$", name):  # not the header
            yield name, row[1]


def place_table(table, files):
    """Table -> samples of find_units. Folders count if names repeat."""
    by_name = defaultdict(list)
    for path in files:
        by_name[os.path.basename(path)].append(path)
    rows = Counter(os.path.basename(name) for name, _ in table)
    samples = []
    for name, captions in table:
        base = os.path.basename(name)
        paths = [path for path in by_name[base]
                 if os.path.abspath(path).endswith("/" + name.lstrip("/"))]
        if not paths and rows[base] == 1:
            paths = by_name[base]
        if len(paths) > 1:
            raise UserError(f"--captions: {name} is both of {listed(paths)}: use one --source")
        stem, kind = split_name(name)
        samples.append((stem, [(kind, (path,)) for path in paths], captions))
    missing = [stem for stem, places, _ in samples if not places]
    if missing:
        sys.stderr.write(f"note: no image for {listed(missing)}\n")
    return samples


# ---- samples
def read_file(kind, path, start=0, size=1 << 62):
    """Bytes of a file or of a tar's member. Raises BadSample above MAX_BYTES."""
    with open(path, "rb") as file:
        file.seek(start)
        content = file.read(min(size, MAX_BYTES[kind] + 1))
    if len(content) > MAX_BYTES[kind]:
        raise BadSample(f"{kind} file above {MAX_BYTES[kind] >> 20} MB")
    return content


def find_captions(files):
    """{type: bytes} -> captions"""
    try:
        text = files.get("txt", b"").decode("utf-8-sig")
        record = json.loads(files.get("json", b"{}"))
    except (ValueError, RecursionError):
        raise BadSample("caption is not UTF-8, or broken JSON") from None
    record = record if isinstance(record, dict) else {}
    captions = record.get("captions") or text or record.get("caption")
    captions = captions if isinstance(captions, list) else [captions]
    return [caption for caption in captions if isinstance(caption, str)]


def encode_image(image, image_size):
    """RGB PIL image -> bytes: PPM up to SMALL pixels, else JPEG."""
    image.info = {}  # JPEG would keep comments
    file = io.BytesIO()
    image.save(file, "PPM" if image_size <= SMALL else "JPEG", quality=90)
    return file.getvalue()


def store_image(files, image_size):
    """{type: bytes} -> bytes of the resized image"""
    contents = [files[kind] for kind in IMAGE_TYPES if kind in files]
    if not contents:
        raise BadSample("no image")
    side = max(SMALL, round(image_size * 8 / 7))
    image = open_image(io.BytesIO(contents[0]), side)
    if min(image.size) > side:
        image = ImageOps.cover(image, (side, side))
    return encode_image(image, image_size)


def read_samples(unit, skipped, image_size=None):
    """Yield (key, stored image, captions) of a unit; `skipped` counts others. Without image_size
    only captions are read."""
    source, content = unit
    if source == "shapes":
        for seed in content:
            image, caption = draw_shapes(seed, image_size or MIN_SIDE)
            yield f"{seed:012d}", encode_image(image, image.width), [caption]
        return
    if source == "tar":
        with open(content, "rb") as file:
            content = group_files([(name, (content, file.tell(), size))
                                   for name, size in tar_members(file, skipped)])

    types = MAX_BYTES if image_size else TEXT_TYPES
    for stem, places, captions in content:
        try:
            files = {kind: read_file(kind, *place) for kind, place in places if kind in types}
            captions = find_captions(files) if captions is None else captions
            captions = [*filter(None, map(clean_caption, captions))]
            if not captions:
                raise BadSample("no caption")
            image = image_size and store_image(files, image_size)
        except BadSample as reason:
            skipped[str(reason)] += 1
        else:
            kinds = {"image" if kind in IMAGE_TYPES else kind for kind, _ in places}
            skipped["file of the same name"] += len(places) - len(kinds)
            yield os.path.basename(stem), image, captions


# ---- writing shards
@contextlib.contextmanager
def replace_file(path):
    """A binary file that replaces `path` when the block ends well."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Replace a file by JSON."""
    with replace_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def lock(folder, wait=False):
    """Reserve a folder while the returned file is open, here and in workers."""
    file = open(Path(folder, ".lock"), "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process: wait, or use another") from None
    except OSError as problem:
        sys.stderr.write(f"note: {folder} has no lock ({problem.strerror}): use one program\n")
    return file


def write_shard(folder, plan, job):
    """Write a shard, then NNNNN.done with its counts, unless an earlier run did -> its path."""
    number, unit = job
    name = f"{folder}/{number:05d}"
    path = Path(f"{name}.done")
    if path.exists() and json.loads(path.read_text())["plan"] == digest(plan):
        return path

    warnings.simplefilter("ignore")  # Pillow's, about broken EXIF blocks
    tokenizer = load_tokenizer(plan["tokenizer"])
    lengths, skipped = Counter(), Counter()
    records = []
    with replace_file(f"{name}.shard") as shard:
        for key, image, captions in read_samples(unit, skipped, plan["image_size"]):
            tokens = []
            for caption in captions:
                ids = [*tokenizer.encode_ordinary(caption), tokenizer.eot_token]
                lengths[len(ids)] += 1
                tokens += ids
            key = key.encode(errors="replace")[-RECORD["key"].itemsize:]
            # Copies of an image stay together.
            u = int.from_bytes(hashlib.sha256(image).digest()[:8]) / 2 ** 64
            records.append((key, number, shard.tell(), len(image), len(tokens), u < HELD_OUT))
            shard.write(image + np.array(tokens, "<u4").tobytes())
        size = shard.tell()
    done = {"plan": digest(plan), "lengths": lengths, "skipped": +skipped, "bytes": size,
            "records": np.array(records, RECORD).tobytes().hex()}
    write_json(path, done)
    return path  # not `done`: sending so much, an orphaned worker would hang


def choose_tokenizer(folder, units, name):
    """Spec of the tokenizer: that of train, of tiktoken, or made of the captions."""
    words = re.fullmatch(r"words:\d+", name)
    train = folder.parent / "train"
    if folder != train and (words or (train / "meta.json").exists()):
        tokenizer = Shards(train).meta["tokenizer"]
        if tokenizer["name"] != name:
            raise UserError(f"--tokenizer {name}: train has {tokenizer['name']}, as all must")
        return tokenizer
    if not words:
        load_tokenizer({"name": name})
        return {"name": name}
    counts = Counter()
    for unit in tqdm(units, "captions"):
        for *_, captions in read_samples(unit, Counter()):
            counts.update(re.findall(PIECE, "\n".join(captions)))
    return words_tokenizer(name, counts)


def make_split(folder, units, plan, workers):
    """Write the shards of a split, then meta.json."""
    for file in folder.parent.glob("*/meta.json"):
        if file.parent != folder and json.dumps(plan["sources"]) in file.read_text("latin1"):
            raise UserError(f"--source: expected other images than of {file.parent}")
    plan = plan | {"tokenizer": choose_tokenizer(folder, units, plan["tokenizer"])}
    lengths, skipped = Counter(), Counter()
    samples = (sample for unit in units for sample in read_samples(unit, skipped))
    if not next(samples, None):  # before a finished split is removed
        raise UserError(f"no captions, skipped: {dict(skipped.most_common(9))}")
    skipped.clear()
    (folder / "meta.json").unlink(missing_ok=True)
    sizes = {}
    records = []
    loader = torch.utils.data.DataLoader(  # a pool of write_shard
        list(enumerate(units)), collate_fn=functools.partial(write_shard, folder, plan),
        num_workers=min(workers or os.cpu_count(), len(units)),
        batch_size=None, generator=torch.Generator())  # the global one draws train.py's weights
    for i, path in enumerate(tqdm(loader, folder.name, unit="shard")):
        done = json.loads(path.read_text())
        lengths.update(done["lengths"])
        skipped.update(done["skipped"])
        sizes[f"{i:05d}.shard"] = done["bytes"]
        records.append(np.frombuffer(bytes.fromhex(done["records"]), RECORD))

    records = np.concatenate(records)
    if len(records) < max(1, skipped.total()):
        why = dict(skipped.most_common(9))
        raise UserError(f"only {len(records):,} samples can be used, skipped: {why}")
    records = records[np.argsort(records["held_out"], kind="stable")]
    (folder / "samples.bin").write_bytes(records.tobytes())
    sizes["samples.bin"] = records.nbytes
    meta = plan | {"record": RECORD.descr, "samples": len(records), "lengths": lengths,
                   "held_out": int(records["held_out"].sum()), "skipped": skipped, "bytes": sizes}
    write_json(folder / "meta.json", meta)
    for path in folder.glob("[0-9]*"):
        if path.name not in sizes:
            path.unlink()


def prepare(dataset, split, data_dir="data", source=None, captions=None, image_size=224,
            tokenizer="gpt2", workers=None, fresh=False):
    """Make what is missing of a split -> meta.json. A finished split is compared with its sources
    if they exist."""
    folder = Path(data_dir) / dataset / split
    finished = (folder / "meta.json").exists() and not fresh
    plan = {"format": FORMAT, "image_size": image_size, "tokenizer": tokenizer}
    try:
        units, plan["sources"] = find_units(dataset, split, source, captions)
    except UserError as problem:
        if not finished:
            raise
        sys.stderr.write(f"note: not compared: {problem}\n")

    if not finished:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder, wait=dataset == "shapes"):  # all ranks of train.py make shapes
            if fresh or not (folder / "meta.json").exists():
                make_split(folder, units, plan, workers)
    meta = Shards(folder).meta
    was = meta | {"tokenizer": meta["tokenizer"]["name"]}
    for key in plan:
        if was[key] != plan[key]:
            raise UserError(f"{folder}: {key} was {was[key]}, now {plan[key]}: type --fresh (train "
                            "first), or another --data-dir")
    if finished:
        sys.stderr.write(f"note: {folder} was finished earlier, see --fresh\n")
    return meta


# ---- reading shards
class Shards:
    """Memory-mapped samples of a split."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.maps = {}
        file = self.folder / "meta.json"
        if not file.exists():
            raise UserError(f"no shards in {folder}: type python data.py --source TARS --dataset "
                            f"{self.folder.parent.name} --split {self.folder.name}")
        try:
            self.meta = json.loads(file.read_text())
            self.digest = digest(self.meta)
            self.tokenizer = load_tokenizer(self.meta["tokenizer"])
            self.lengths = {int(length): int(n) for length, n in self.meta["lengths"].items()}
            self.sizes = self.meta["bytes"]
            self.rows = range(self.meta["samples"])
            if (self.meta["format"] != FORMAT or self.meta["held_out"] not in range(len(self) + 1)
                    or self.sizes["samples.bin"] != len(self) * RECORD.itemsize):
                raise ValueError("format or counts are wrong")
            for name, size in self.sizes.items():
                if os.path.getsize(self.folder / name) != size:
                    raise ValueError(f"{name} does not have {size:,} bytes")
        except UserError:
            raise
        except Exception as problem:
            raise self.damaged(f"{type(problem).__name__}: {problem}") from None

    def __len__(self):
        return len(self.rows)

    def __getstate__(self):  # spawned loader processes map the files themselves
        return self.__dict__ | {"maps": {}}

    def subset(self, count, seed):
        """`count` random samples; a larger subset with the same seed contains them."""
        if count > len(self):
            raise UserError(f"{self.folder} has {len(self):,} samples, fewer than {count:,}")
        part = Shards(self.folder)
        part.rows = random_stream(seed, SUBSET, 0).permutation(self.rows)[:count].copy()
        return part

    def damaged(self, what):
        return UserError(f"{self.folder} is damaged: {what}; copy it again or use data.py --fresh")

    def read(self, name, start, count):
        if not 0 <= start < start + count <= self.sizes.get(name, 0):
            raise self.damaged(f"samples.bin points beyond {name}")
        if name not in self.maps:  # torch, unlike numpy, closes the file
            path, size = str(self.folder / name), self.sizes[name]
            self.maps[name] = torch.from_file(path, size=size, dtype=torch.uint8).numpy()
        return self.maps[name][start:start + count]

    def record(self, index):
        start = int(self.rows[index]) * RECORD.itemsize
        return self.read("samples.bin", start, RECORD.itemsize).view(RECORD).item()

    def key(self, index):
        return self.record(index)[0].decode(errors="replace")

    def image(self, index, short_side=None):
        """RGB PIL image; short_side as in open_image."""
        _, shard, start, size, *_ = self.record(index)
        try:
            return open_image(io.BytesIO(self.read(f"{shard:05d}.shard", start, size)), short_side)
        except BadSample as reason:
            raise self.damaged(f"image {index}: {reason}") from None

    def captions(self, index):
        """List of arrays of token ids, each with EOS at its end."""
        _, shard, start, size, count, *_ = self.record(index)
        tokens = self.read(f"{shard:05d}.shard", start + size, 4 * count).view("<u4")
        ends = np.flatnonzero(tokens == self.tokenizer.eot_token) + 1
        if not len(ends) or ends[-1] != count or tokens.max() >= self.tokenizer.n_vocab:
            raise self.damaged(f"captions of image {index}")
        return np.split(tokens, ends[:-1])


def open_split(data_dir, dataset, split):
    """Shards of a split; "val" is held out of "train" if it has no folder."""
    folder = Path(data_dir) / dataset
    if split == "test" or (folder / "val" / "meta.json").exists():
        return Shards(folder / split)
    shards = Shards(folder / "train")
    end = len(shards) - shards.meta["held_out"]
    shards.rows = shards.rows[:end] if split == "train" else shards.rows[end:]
    return shards


# ---- batches
ORDER, SAMPLE, TIME, SCORING, SWAP, SUBSET = range(6)


def random_stream(seed, purpose, number):
    """Generator of a purpose above and a number."""
    return np.random.default_rng((seed, purpose, number))


@functools.lru_cache(maxsize=2)
def shuffled(count, seed, epoch):
    """Permutation of an epoch, uint32 [count]."""
    return random_stream(seed, ORDER, epoch).permutation(np.arange(count, dtype=np.uint32))


@dataclass
class Batches(torch.utils.data.Dataset):
    """Item k is the k-th micro-batch of process `rank` of `world`:

        images  uint8   [B,S,S,3]
        tokens  int64   [B,T]      EOS at pads
        valid   bool    [B,T]      False at pads
        noise   float32 [B,T]      uniform in [0,1)
        u       float64 []         uniform in [0,1), one for the global batch
        strata  float64 [B]        place in the global batch / its size

    T is a multiple of 8, or max_tokens; longer captions are cut, EOS stays. augment=False: in
    order, central crop, first caption; the last batch may be smaller."""
    shards: Shards
    batch_size: int
    image_size: int
    max_tokens: int
    seed: int
    augment: bool = True
    crop_scale: float = 1.0
    flip: bool = False
    rank: int = 0
    world: int = 1
    accumulation: int = 1

    def __getitem__(self, item):
        step, micro = divmod(item, self.accumulation)
        start = step * self.batch_size
        size = self.batch_size if self.augment else min(self.batch_size, len(self.shards) - start)
        places = np.arange(micro * self.world + self.rank, size, self.accumulation * self.world)

        images, captions, noise = zip(*(self.sample(start + place) for place in places))
        length = np.array([len(caption) for caption in captions])
        T = min(math.ceil(length.max() / 8) * 8, self.max_tokens)
        valid = np.arange(T) < length[:, None]
        tokens = np.full(valid.shape, self.shards.tokenizer.eot_token)
        tokens[valid] = np.concatenate(captions)
        batch = {"images": np.stack(images), "tokens": tokens, "valid": valid,
                 "noise": np.stack(noise)[:, :T], "strata": places / size,
                 "u": np.array(random_stream(self.seed, TIME, step).random())}
        return {name: torch.from_numpy(array).contiguous() for name, array in batch.items()}

    def sample(self, number):
        """Sample `number` of all epochs -> image [S,S,3] uint8, caption, noise [max_tokens]."""
        epoch, index = divmod(number, len(self.shards))
        rng = random_stream(self.seed, SAMPLE, number)
        noise = rng.random(self.max_tokens, dtype=np.float32)
        if self.augment:
            index = shuffled(len(self.shards), self.seed, epoch)[index]
        captions = self.shards.captions(index)
        caption = captions[rng.integers(len(captions)) if self.augment else 0]
        if len(caption) > self.max_tokens:
            caption = np.append(caption[:self.max_tokens - 1], caption[-1])
        image = self.shards.image(index, round(self.image_size / math.sqrt(self.crop_scale)))
        if self.augment and self.crop_scale < 1:
            box = random_crop_box(image.size, self.crop_scale, rng)
            image = image.resize((self.image_size, self.image_size), box=box)
        image = crop_square(image, self.image_size)
        if self.augment and self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return image, caption, noise


# ---- command line
def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", required=True, help="any name")
    add("--split", choices=("train", "val", "test"), default="train")
    add("--source", nargs="+", action="extend", help="tars, folders or patterns")
    add("--captions", metavar="FILE", help=TABLES)
    add("--image-size", type=positive_int, help="largest to train at (default: preset's or 224)")
    add("--tokenizer", help="of tiktoken, or words:N (default: preset's or gpt2)")
    add("--data-dir", default="data")
    add("--workers", type=positive_int, help="processes (default: one a core)")
    add("--fresh", action="store_true", help="make a finished split again")
    args = parser.parse_args()
    name = args.dataset
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--dataset {name}: expected letters, digits, dots and dashes")
    if name == "shapes" and (args.source or args.captions or args.split == "test"):
        raise UserError("--dataset shapes has no --source, --captions or test split")
    preset = DATASETS.get(name, PHOTOGRAPHS)

    for split in ("train", "val") if name == "shapes" else (args.split,):
        meta = prepare(name, split, args.data_dir, args.source, args.captions,
                       args.image_size or preset["image_size"],
                       args.tokenizer or preset["tokenizer"], args.workers, args.fresh)
        lengths = np.repeat([*map(int, meta["lengths"])], [*meta["lengths"].values()])
        print(f"{name}, {split}: {meta['samples']:,} images, {len(lengths):,} captions; skipped: "
              f"{meta['skipped'] or 'none'}\ntokens of a caption: mean {lengths.mean():.1f}, "
              f"percentiles 5, 50, 95: {np.percentile(lengths, (5, 50, 95)).round()}")
    print(f"next: python train.py --dataset {name} --data-dir {shlex.quote(args.data_dir)} "
          f"--image-size {meta['image_size']}")


if __name__ == "__main__":
    run(main)
