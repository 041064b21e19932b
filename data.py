"""Captioned images in, shards out, batches from shards.

    python data.py --dataset shapes                                              # the embedded data set, drawn here
    python data.py --dataset cc3m --source 'cc3m/*.tar'                          # img2dataset / WebDataset tars
    python data.py --dataset coco --split val --source val2017 --captions captions_val2017.json
    python data.py --dataset cc3m coco --stats                                   # print and draw what is in them
    python data.py --dataset cc3m --verify                                       # against the checksums

Every image is resized once and every caption tokenized once. DATA_DIR/DATASET/SPLIT then holds, little-endian,

    NNNNN.shard    of each sample the bytes of its image, then its captions in uint32 tokens, each with its EOS
    samples.bin    of each sample one RECORD, which says where it is; the held-out samples come last
    meta.json      what is needed to read the others: record, tokenizer, counts, checksums

and is memory-mapped. Images (JPEG; up to 64 px PPM, which is faster) keep their aspect ratio, so that a random crop can
use all of the photograph. The held-out samples, whose keys hash below 0.5 %, validate where there is no other split.
Sources may be hostile: nothing is unpacked, and a worker holds one sample at a time, in less than 1 GB.

Nothing in the loader is random in the usual sense: order, crop, choice of caption and noise are functions of
(seed, position in the run), whatever the number of processes, and a resumed run needs no saved state."""
import argparse
import contextlib
import csv
import errno
import fcntl
import glob
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
import tarfile
import threading
import warnings
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

FORMAT = 2                                            # of the shards; raised when a reader of the old one would misread
RECORD = np.dtype([("key", "S48"), ("shard", "<i4"), ("start", "<i8"), ("image_bytes", "<i4"), ("tokens", "<i4"),
                   ("width", "<i4"), ("height", "<i4"), ("held_out", "|b1")])   # the size is that of the source
HELD_OUT, HELD_OUT_MOST = 0.005, 10_000
UNIT_SAMPLES = 2048                                   # in a shard of drawings or of a table; a tar or a folder is one
MAX_PIXELS, MAX_RATIO, MIN_SIDE, PPM_SIDE = 50_000_000, 10, 8, 64
LEAST_STORED = 64                                     # so that crops of small images need not be enlarged
IMAGE_TYPES, TEXT_TYPES = ("jpg", "jpeg", "png", "webp"), ("txt", "json")
MAX_BYTES = dict.fromkeys(IMAGE_TYPES, 1 << 25) | dict.fromkeys(TEXT_TYPES, 1 << 20)    # larger files are not read


class UserError(Exception):
    """Bad input, in words for the user: `run` prints it as one line and exits with status 2."""


class BadSample(Exception):
    """A sample that is skipped; its text is the reason under which it is counted."""


def run(main):
    """Call a script's main(). UserErrors, unusable files, a full disk and a GPU that is too small become one line and
    status 2; bugs keep their traceback."""
    try:
        main()
    except (UserError, OSError, torch.OutOfMemoryError) as problem:
        words = str(problem).split("UserError: ")[-1].strip()       # loader processes send theirs with a traceback
        if isinstance(problem, torch.OutOfMemoryError):
            words = f"{words.splitlines()[0][:120]}: try a smaller --micro-batch (of train.py) or --batch-size"
        elif isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            words += ": make room and type the same command again; what was finished is kept"
        elif isinstance(problem, OSError) and not problem.filename:
            raise
        sys.stderr.write(f"error: {words}\n")
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """The command line of a script: -h prints its docstring as it stands, a mistake becomes a UserError."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; {self.prog} -h lists the options")


def check_least(args, **least):
    """Raise UserError if an option is given and is smaller than its least value, or absurdly large."""
    for name, low in least.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) < 1 << 63:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {low}, below 2^63")


# ---------------------------------------------------------------------------------------------- tokenizers
PIECE = r" ?\w+| ?[^\w\s]+|\s+"                       # cuts any text into pieces; the same to `re` and to tiktoken


def load_tokenizer(spec):
    """{"name": "gpt2"} or {"name": "words:N", "pieces": [...]} -> tiktoken.Encoding; its `eot_token` is our EOS.
    Raises UserError if tiktoken does not know the name, or would have to download it and cannot."""
    if "pieces" in spec:
        ranks = [bytes([b]) for b in range(256)] + [piece.encode() for piece in spec["pieces"]]
        return tiktoken.Encoding(spec["name"], pat_str=PIECE, mergeable_ranks={r: i for i, r in enumerate(ranks)},
                                 special_tokens={"<|endoftext|>": len(ranks)})
    try:
        return tiktoken.get_encoding(spec["name"])
    except (OSError, ValueError) as problem:          # no network, a damaged cache, an unknown name
        raise UserError(f"tokenizer {spec['name']!r} is unknown or not to be had ({type(problem).__name__}): set "
                        "TIKTOKEN_CACHE_DIR to a folder that has it, or make one with --tokenizer words:8000") from None


def words_tokenizer(name, counts):
    """Name "words:N" and a Counter of pieces -> spec: the 256 bytes and the N most frequent pieces of several bytes."""
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return {"name": name, "pieces": [p for p in ranked if len(p.encode()) > 1][:int(name.removeprefix("words:"))]}


def decode_caption(tokenizer, tokens):
    """Token ids -> the text before the first EOS."""
    before_end = itertools.takewhile(lambda token: token != tokenizer.eot_token, map(int, tokens))
    return tokenizer.decode(list(before_end), errors="replace").strip()


# ---------------------------------------------------------------------------------------------- images
def open_image(file, short_side=None):
    """File name or binary file -> upright RGB PIL image; `info["original_size"]` is its size in the file.
    With `short_side` a JPEG may come back smaller, but never below it. Transparency becomes white.
    Raises BadSample with the reason: everything that a hostile file can do has to end here."""
    try:
        image = Image.open(file, formats=("JPEG", "PNG", "WEBP", "PPM"))
        width, height = size = image.size
        if min(size) < MIN_SIDE or max(size) > MAX_RATIO * min(size) or width * height > MAX_PIXELS:
            raise Image.DecompressionBombError
        if short_side:                                # a JPEG can be decoded at 1/2, 1/4 or 1/8 if that is still enough
            image.draft("RGB", (width * short_side // min(size), height * short_side // min(size)))
        image.load()
    except Exception as problem:                      # Pillow's decoders raise a dozen different types
        reasons = {FileNotFoundError: "no such file", Image.DecompressionBombError: "image of an absurd size",
                   Image.UnidentifiedImageError: "not a JPEG, PNG or WebP image"}
        raise BadSample(reasons.get(type(problem), "image data is broken")) from None
    with contextlib.suppress(Exception):              # a broken EXIF block says nothing about the picture
        ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        image, layer = Image.new("RGB", image.size, "white"), image.convert("RGBA")
        image.paste(layer, mask=layer)
    image = image if image.mode == "RGB" else image.convert("RGB")
    image.info["original_size"] = size
    return image


def crop_square(image, side, box=None):
    """The box (left, top, right, bottom; default: the central square) of a PIL image as uint8 [side,side,3]."""
    if box is None:
        short = min(image.size)
        left, top = ((length - short) // 2 for length in image.size)
        box = (left, top, left + short, top + short)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


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
    Backgrounds are pale and objects are not: with contrasts of both signs, forms stayed at chance for three minutes."""
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
def split_name(name):
    """File name -> name without extension, which the files of a sample share, and extension: a/b.JPG -> a/b, jpg."""
    stem, extension = os.path.splitext(name)
    return stem, extension[1:].lower()


def find_units(dataset, split, source, captions):
    """What there is to read, one unit a shard: ["shapes", first seed, count], ["tar", file, bytes],
    ["folder", path, images] or ["table", folder, [image, captions], ...]. Raises UserError if there is nothing."""
    if dataset == "shapes":
        first, count = (0 if split == "train" else 1 << 32), SHAPES_SAMPLES[split]
        return [["shapes", first + i, min(UNIT_SAMPLES, count - i)] for i in range(0, count, UNIT_SAMPLES)]
    found = [path for pattern in source or [] for path in glob.glob(os.path.expanduser(pattern))]
    if captions and found:
        table = read_table(captions)
        return [["table", found[0], *table[i:i + UNIT_SAMPLES]] for i in range(0, len(table), UNIT_SAMPLES)]
    files = sorted({str(path) for top in found for path in (top, *Path(top).rglob("*"))})
    folders = Counter(os.path.dirname(file) for file in files if split_name(file)[1] in IMAGE_TYPES)
    units = [["tar", file, os.path.getsize(file)] for file in files if split_name(file)[1] == "tar"]
    if not units and not folders:
        raise UserError(f"--source {' '.join(source or ['is missing'])}: nothing there; expected .tar files, images "
                        "with a .txt or .json of the same name, or with --captions FILE a folder of images")
    return units + [["folder", *item] for item in folders.items()]


def read_table(path):
    """COCO's captions_*.json, a CSV `image,caption` or Flickr's lines `image#0<TAB>caption` -> [(image, captions)]."""
    table = {}
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8", newline="") as file:
            if ".json" in os.path.basename(path):
                coco = json.load(file)
                names = {image["id"]: image["file_name"] for image in coco["images"]}
                rows = [(names[note["image_id"]], note["caption"]) for note in coco["annotations"]]
            elif "token" in os.path.basename(path):
                rows = [line.rstrip().split("\t") for line in file if line.strip()]
            else:
                rows = [row for row in csv.reader(file, skipinitialspace=True) if row][1:]
        for name, caption in rows:
            table.setdefault(name.partition("#")[0], []).append(caption)
    except (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise UserError(f"--captions {path}: {type(error).__name__}: {error}; expected COCO's captions_*.json, "
                        "a CSV with the header `image,caption`, or Flickr's *.token.txt") from None
    return sorted(table.items())


def read_tar(path, types, skipped):
    """Yield what read_files does. tarfile parses single headers only: left alone it would read names of gigabytes and
    recurse without end. Members that are no files, and what follows damage, are counted in `skipped`."""
    long_name, total = None, os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            while (header := file.read(512)) != bytes(512):             # zeros are the end
                member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
                start, size, (stem, kind) = file.tell(), member.size, split_name(long_name or member.name)
                if not 0 <= size <= total - start:
                    raise tarfile.HeaderError
                long_name = None
                if member.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):      # of the member that follows
                    text = file.read(min(size, 1 << 16)).decode(errors="replace")
                    found = re.search(r"(?m)^\d+ path=(.*)\n" if member.type == tarfile.XHDTYPE else r"([^\0]+)", text)
                    long_name = found and found[1]
                elif member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.XGLTYPE):
                    skipped["tar member is not a file"] += 1
                elif kind in types:
                    yield stem, kind, file.read(min(size, MAX_BYTES[kind] + 1))
                file.seek(start + size + -size % 512)
        except tarfile.HeaderError:
            skipped["tar is cut short or damaged"] += 1


def read_files(unit, types, skipped, pixels):
    """Yield (stem, type, bytes) of a unit's files of these types, those of a sample one after the other. Of a file that
    is larger than MAX_BYTES one byte more is read, by which read_samples knows. `pixels` is the size of drawings."""
    kind, place, *rest = unit
    if kind == "shapes":
        for seed in range(place, place + rest[0]):
            image, caption = draw_shapes(seed, pixels)
            image.save(picture := io.BytesIO(), "PPM")
            yield from ((f"{seed:012d}", "png", picture.getvalue()), (f"{seed:012d}", "txt", caption.encode()))
    elif kind == "tar":
        yield from read_tar(place, types, skipped)
    else:
        names = sorted(os.listdir(place), key=lambda name: (split_name(name), name)) if kind == "folder" else ()
        for name, captions in rest if kind == "table" else zip(names, itertools.repeat(None)):
            (stem, kind), path = split_name(name), os.path.join(place, name)
            if captions:
                yield stem, "json", json.dumps({"captions": captions}).encode()
            if kind in types and os.path.isfile(path):
                with open(path, "rb") as file:
                    yield stem, kind, file.read(MAX_BYTES[kind] + 1)


def clean_caption(text):
    """Caption as it is learnt and scored: white space collapsed, and CC12M's <PERSON> as "person", one common word for
    five odd pieces. "" if nothing is left."""
    words = text.replace("\0", " ").replace("<PERSON>", "person").split()
    return " ".join(words).encode(errors="replace").decode()


def read_samples(unit, types, skipped, caption_key, pixels=MIN_SIDE):
    """Yield (key, {type: bytes}, captions) of a unit's samples, counting in `skipped` those without a usable caption.

    Captions are JSON's `caption_key`, or if that is None JSON's "captions", KEY.txt or JSON's "caption", the first that
    is there."""
    for stem, group in itertools.groupby(read_files(unit, types, skipped, pixels), lambda file: file[0]):
        files = {}
        for _, kind, content in group:
            skipped["file of the same name"] += kind in files
            files[kind] = content
        try:
            if any(len(content) > MAX_BYTES[kind] for kind, content in files.items()):
                raise BadSample("file is too large")
            text, record = files.get("txt", b"").decode(), json.loads(files.get("json", b"{}"))
            record = record if isinstance(record, dict) else {}
            found = record.get(caption_key) if caption_key else record.get("captions") or text or record.get("caption")
            texts = [text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)]
            captions = list(filter(None, map(clean_caption, texts)))
            if not captions:
                raise BadSample("no caption")
        except BadSample as reason:
            skipped[str(reason)] += 1
        except (ValueError, RecursionError) as problem:
            skipped["caption is not UTF-8" if isinstance(problem, UnicodeDecodeError) else "broken JSON"] += 1
        else:
            yield os.path.basename(stem), files, captions


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
    folder = os.open(path.parent, os.O_RDONLY)        # the name is on disk only when its folder is
    os.fsync(folder)
    os.close(folder)


def write_json(path, value):
    """Replace a JSON file, whole or not at all."""
    with replace_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def fingerprint(path):
    """Size and checksum of a file, as in meta.json."""
    with open(path, "rb") as file:
        return {"bytes": os.path.getsize(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def end_with_parent():
    """For a worker to start with: it would outlive a parent that is killed, and hold its lock for ever."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_shard(unit, number, folder, plan):
    """Read a unit and write NNNNN.shard, its records NNNNN.samples and last its counts NNNNN.done, which say what it
    was made from. Returns those counts; what an earlier run has finished is left alone."""
    shard_file, samples_file, done_file = (folder / f"{number:05d}.{name}" for name in ("shard", "samples", "done"))
    made_from = hashlib.sha256(json.dumps([unit, plan]).encode()).hexdigest()
    if done_file.exists() and (done := json.loads(done_file.read_text()))["made_from"] == made_from:
        return done
    warnings.simplefilter("ignore")                   # Pillow's, of sizes that are refused and of broken EXIF blocks
    tokenizer, side, lengths, skipped = load_tokenizer(plan["tokenizer"]), plan["stored_side"], Counter(), Counter()
    with replace_file(shard_file) as shard, replace_file(samples_file) as samples:
        for key, files, captions in read_samples(unit, MAX_BYTES, skipped, plan["caption_key"], plan["image_size"]):
            found = [files[kind] for kind in IMAGE_TYPES if kind in files]
            try:
                image = open_image(io.BytesIO(found[0] if found else b""), side)
            except BadSample as reason:
                skipped[str(reason) if found else "no image"] += 1
                continue
            original_size, image.info = image.info["original_size"], {}     # JPEGs would keep comments from there
            if min(image.size) > side:                # never upscaled
                size = [round(length * side / min(image.size)) for length in image.size]
                image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
            image.save(encoded := io.BytesIO(), plan["encoding"], quality=90)
            captions = [[*tokenizer.encode_ordinary(caption), tokenizer.eot_token] for caption in captions]
            lengths.update(str(len(caption)) for caption in captions)       # as in JSON
            tokens = np.fromiter(itertools.chain(*captions), "<u4")
            key = key.encode(errors="replace")[-RECORD["key"].itemsize:]    # the end of a long one
            held_out = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) < HELD_OUT * 2 ** 64
            record = (key, number, shard.tell(), encoded.tell(), len(tokens), *original_size, held_out)
            samples.write(np.array(record, RECORD).tobytes())
            shard.write(encoded.getvalue() + tokens.tobytes())
    done = {"made_from": made_from, "lengths": lengths, "skipped": skipped, "file": fingerprint(shard_file)}
    write_json(done_file, done)
    return done


def count_pieces(unit, caption_key):
    """How often each piece occurs in the captions of a unit: the first pass for a words:N tokenizer."""
    samples = read_samples(unit, TEXT_TYPES, Counter(), caption_key)
    return Counter(piece for *_, captions in samples for caption in captions for piece in re.findall(PIECE, caption))


def prepare(dataset, split, data_dir="data", source=None, captions=None, caption_key=None, image_size=224,
            tokenizer="gpt2", workers=None, fresh=False):
    """Make the shards of data_dir/dataset/split and return its meta.json. The arguments are those of `data.py -h`.
    Killed at any moment and called again it makes what is missing; the bytes are the same. Raises UserError."""
    folder = Path(data_dir) / dataset / split
    folder.mkdir(parents=True, exist_ok=True)
    meta_file, samples_file = folder / "meta.json", folder / "samples.bin"
    plan = {"format": FORMAT, "image_size": image_size, "caption_key": caption_key, "tokenizer": {"name": tokenizer},
            "stored_side": image_size if dataset == "shapes" else max(LEAST_STORED, round(image_size * 8 / 7)),
            "encoding": "PPM" if image_size <= PPM_SIDE else "JPEG"}
    with open(folder / ".lock", "w") as lock:         # the system drops the lock with the process, however that ends
        try:                                          # all processes of a training run ask for `shapes`: they wait
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if dataset == "shapes" else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{folder} is being made by another process: wait, or use another --data-dir") from None
        if meta_file.exists() and not fresh:
            meta = Shards(folder).meta
            was = meta | {"tokenizer": {"name": meta["tokenizer"]["name"]}}
            changed = [f"{name} was {was.get(name)}, now {plan[name]}" for name in plan if was.get(name) != plan[name]]
            if changed:
                raise UserError(f"{folder} was made otherwise ({'; '.join(changed)}): use --fresh, the train split "
                                "first, or another --data-dir")
            return meta
        units = find_units(dataset, split, source, captions)
        bar = {"total": len(units), "unit": "shard", "dynamic_ncols": True}
        if not (words := re.fullmatch(r"words:\d+", tokenizer)):
            load_tokenizer(plan["tokenizer"])         # before the work begins; forked workers inherit it
        meta_file.unlink(missing_ok=True)
        try:
            with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
                if words and split == "train":
                    counts = pool.map(count_pieces, units, itertools.repeat(caption_key))
                    plan["tokenizer"] = words_tokenizer(tokenizer, sum(tqdm(counts, "captions", **bar), Counter()))
                elif words:                           # one tokenizer for all splits
                    plan["tokenizer"] = Shards(folder.parent / "train").meta["tokenizer"]
                    if plan["tokenizer"]["name"] != tokenizer:
                        raise UserError(f"--tokenizer {tokenizer}: train has {plan['tokenizer']['name']}, as must val")
                jobs = pool.map(write_shard, units, itertools.count(), itertools.repeat(folder), itertools.repeat(plan))
                shards = list(tqdm(jobs, f"{dataset}/{split}", **bar))
        except BrokenExecutor:
            raise UserError("a worker was killed, perhaps for want of memory: type the same command again, with fewer "
                            "--workers; finished shards are kept") from None
        rows = np.concatenate([np.fromfile(folder / f"{number:05d}.samples", RECORD) for number in range(len(units))])
        lengths, skipped = (sum((Counter(s[name]) for s in shards), Counter()) for name in ("lengths", "skipped"))
        if not len(rows):
            raise UserError(f"not one usable sample in --source {source} ({dict(skipped)})")
        samples_file.write_bytes(rows[np.argsort(rows["held_out"], kind="stable")].tobytes())
        files = {f"{number:05d}.shard": shard["file"] for number, shard in enumerate(shards)}
        files["samples.bin"] = fingerprint(samples_file)
        meta = plan | {"record": RECORD.descr, "samples": len(rows), "held_out": int(rows["held_out"].sum()),
                       "lengths": lengths, "skipped": skipped, "files": files}
        write_json(meta_file, meta)
        for path in [*folder.glob("[0-9]*.samples"), *folder.glob("[0-9]*.done")]:
            path.unlink()
    return meta


# ---------------------------------------------------------------------------------------------- reading shards
class Shards:
    """Random access to a split by sample number in O(1), through memory maps; a shard is mapped when first touched.
    part: "all", or of a split without a validation set "train" (all but the held-out samples) or "held_out".
    Raises UserError where the files do not fit meta.json or each other, before anything is read out of range."""

    def __init__(self, folder, part="all"):
        self.folder, self.maps = Path(folder), {}
        if not (self.folder / "meta.json").exists():
            raise UserError(f"no shards in {folder}; make them with: python data.py --dataset {self.folder.parent.name}"
                            f" --split {self.folder.name} --source TARS")
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            if self.meta["format"] != FORMAT:
                raise ValueError(f"format {self.meta['format']}, this program reads {FORMAT}")
            samples, held_out = int(self.meta["samples"]), min(int(self.meta["held_out"]), HELD_OUT_MOST)
            self.sizes = {name: int(file["bytes"]) for name, file in self.meta["files"].items()}
            self.lengths = {int(length): int(count) for length, count in self.meta["lengths"].items()}
            self.digest = hashlib.sha256(json.dumps(self.meta["files"]).encode()).hexdigest()
            self.tokenizer = load_tokenizer(self.meta["tokenizer"])
            if not 0 <= held_out <= samples or samples * RECORD.itemsize != self.sizes["samples.bin"]:
                raise ValueError("its counts make no sense")
            for name, size in self.sizes.items():
                if os.path.getsize(self.folder / name) != size:
                    raise ValueError(f"{name} does not have {size:,} bytes")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as problem:
            raise UserError(f"the shards in {folder} are damaged ({type(problem).__name__}: {problem}): copy them "
                            "again, or prepare them again with --fresh") from None
        every, end = range(samples), samples - held_out
        self.rows = {"all": every, "train": every[:end], "held_out": every[end:]}[part]     # of samples.bin

    def __len__(self):
        return len(self.rows)

    def __getstate__(self):                           # a loader process that is not forked maps the files itself
        return self.__dict__ | {"maps": {}}

    def _read(self, name, start, count):
        """Part of a file, uint8 [count]. Raises UserError if the file has no such part."""
        if not 0 <= start < start + count <= self.sizes.get(name, -1):
            raise UserError(f"{self.folder}: damaged, samples.bin points beyond {name}; try data.py --verify")
        if name not in self.maps:                     # torch closes a mapped file, numpy would hold thousands open
            memory = torch.from_file(str(self.folder / name), size=self.sizes[name], dtype=torch.uint8)
            self.maps[name] = memory.numpy()
        return self.maps[name][start:start + count]

    def record(self, index):
        """RECORD of a sample as a tuple."""
        size = RECORD.itemsize
        return self._read("samples.bin", self.rows[index] * size, size).view(RECORD)[0].item()

    def key(self, index):
        """Key of a sample: file name without extension, COCO image id, ..."""
        return self.record(index)[0].decode(errors="replace")

    def image(self, index, short_side=None):
        """RGB PIL image as stored; with short_side a JPEG may come back smaller, never below it: less to decode."""
        _, shard, start, size, *_ = self.record(index)
        try:
            return open_image(io.BytesIO(self._read(f"{shard:05d}.shard", start, size)), short_side)
        except BadSample as reason:
            raise UserError(f"{self.folder}: image {index}: {reason}; try data.py --verify") from None

    def captions(self, index):
        """Token ids of all captions of a sample: a list of int arrays that end in EOS."""
        _, shard, start, size, count, *_ = self.record(index)
        tokens = self._read(f"{shard:05d}.shard", start + size, 4 * count).view("<u4")
        ends = np.flatnonzero(tokens == self.tokenizer.eot_token) + 1
        if not len(ends) or ends[-1] != count or tokens.max() >= self.tokenizer.n_vocab:
            raise UserError(f"{self.folder}: captions of image {index} are damaged; try data.py --verify")
        return [tokens[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


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


def shuffled(position, count, seed, epoch):
    """Where `position` of 0..count-1 goes in the permutation of this epoch: O(1), whatever the size of the data set.
    A Feistel network permutes a power of four; what lands beyond `count` is sent through again until it does not."""
    half = 1 << max(1, ((count - 1).bit_length() + 1) // 2)
    while True:
        left, right = divmod(position, half)
        for turn in range(4):
            mixed = hashlib.blake2b(b"%d %d %d %d" % (seed, epoch, turn, right), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(mixed) % half
        position = left * half + right
        if position < count:
            return position


class Batches(torch.utils.data.Dataset):
    """Item k is the k-th micro-batch that process `rank` of `world` trains on, ready for the device.

    The global batch of step s is samples s*B .. s*B+B-1 of an endless sequence of shuffled epochs. With `accumulation`
    A it is dealt out in A*world interleaved parts, so that each part has early and late times alike. augment=False is
    for evaluation: in order, central crop, first caption; the last batch may be shorter. An item has
        images [B,S,S,3] uint8   tokens [C,T]   valid [C,T] bool, False at pads   noise [C,T] uniform in [0,1)
        u, one number in [0,1) for the whole global batch   index [C] places in the global batch   length [C]
    with C = B * captions, those of an image in a row: different ones, or where it has fewer the same with other noise.
    T is the longest caption of the item rounded up to a multiple of 8, to spare compiled graphs; with pads="eos" it is
    max_tokens, and pads are tokens like others. `transform` (dict -> dict) runs on it in the worker."""

    def __init__(self, shards, batch_size, image_size, max_tokens, seed, augment=True, crop_scale=1.0, flip=False,
                 captions=1, pads="hidden", rank=0, world=1, accumulation=1, transform=None):
        self.shards, self.batch_size, self.image_size, self.max_tokens = shards, batch_size, image_size, max_tokens
        self.seed, self.augment, self.crop_scale, self.flip, self.captions = seed, augment, crop_scale, flip, captions
        self.rank, self.world, self.accumulation = rank, world, accumulation
        self.pads, self.transform = pads, transform

    def __getitem__(self, item):
        step, micro = divmod(item, self.accumulation)
        index = np.arange(micro * self.world + self.rank, self.batch_size, self.accumulation * self.world)
        if not self.augment:
            index = index[step * self.batch_size + index < len(self.shards)]
        images, captions, noise = zip(*(self.sample(step * self.batch_size + int(i)) for i in index), strict=True)
        captions, eos = sum(captions, []), self.pads == "eos"
        length = np.array([len(caption) for caption in captions])
        T = self.max_tokens if eos else min(-(-length.max() // 8) * 8, self.max_tokens)
        words = np.arange(T) < length[:, None]
        tokens = np.full(words.shape, self.shards.tokenizer.eot_token)
        tokens[words] = np.concatenate(captions)
        index = (index[:, None] + self.batch_size * np.arange(self.captions)).flatten()     # each at another time
        batch = {"images": np.stack(images), "tokens": tokens, "valid": words | eos, "index": index, "length": length,
                 "noise": np.concatenate(noise)[:, :T]}
        batch = {name: torch.from_numpy(array) for name, array in batch.items()}
        batch["u"] = random_stream(self.seed, TIME, step).random()
        return self.transform(batch) if self.transform else batch

    def sample(self, number):
        """Sample `number` of the endless sequence -> image [S,S,3] uint8, captions (a list), noise [captions,T]."""
        epoch, position = divmod(number, len(self.shards))
        rng = random_stream(self.seed, SAMPLE, number)
        noise = rng.random((self.captions, self.max_tokens), dtype=np.float32)
        place = shuffled(position, len(self.shards), self.seed, epoch) if self.augment else position
        captions = self.shards.captions(place)
        first = rng.integers(len(captions)) if self.augment else 0
        tokens = [captions[(first + i) % len(captions)] for i in range(self.captions)]
        tokens = [np.append(ids[:-1][:self.max_tokens - 1], ids[-1]) for ids in tokens]     # cut, but never its EOS
        image, box = self.shards.image(place, round(self.image_size / self.crop_scale ** 0.5)), None
        if self.augment and self.crop_scale < 1:      # RandomResizedCrop, cut to the image
            width, height = image.size
            area, aspect = width * height * rng.uniform(self.crop_scale, 1), np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
            w, h = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = (left, top, left + w, top + h)
        image = crop_square(image, self.image_size, box)
        return image[:, ::-1] if self.augment and self.flip and rng.random() < 0.5 else image, tokens, noise


# ---------------------------------------------------------------------------------------------- command line
def verify(folder):
    """Compare every file of a split with its checksum. Raises UserError that names the bad ones."""
    files = Shards(folder).meta["files"]
    bad = [name for name in tqdm(files, unit="file") if fingerprint(Path(folder) / name) != files[name]]
    if bad:
        raise UserError(f"{folder}: {', '.join(bad)} not as written: copy them again, or prepare again with --fresh")


def show_stats(data_dir, datasets, split, max_tokens):
    """Print what data sets hold; draw how long their captions are (the paper's Fig. 3) to DATA_DIR/lengths.svg and ten
    samples of each to DATA_DIR/DATASET/SPLIT.png."""
    from sample import contact_sheet  # late: sample.py imports this file
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 340" font-family="sans-serif" font-size="13">',
           f'<text x="200" y="338">tokens a caption, at most {max_tokens}; share of the most frequent</text>']
    for number, name in enumerate(datasets):
        shards = open_split(data_dir, name, split)
        lengths = np.repeat(*np.array(sorted(shards.lengths.items())).T)
        used, sizes = np.zeros(shards.tokenizer.n_vocab, bool), []
        for i in tqdm(range(len(shards)), name, leave=False):
            used[np.concatenate(shards.captions(i))] = True
            sizes.append(shards.record(i)[5:7])
        print(f"{name}, {split}: {len(shards):,} images, {len(lengths):,} captions, {np.mean(lengths > max_tokens):.2%}"
              f" cut at {max_tokens} tokens; {used.mean():.1%} of {len(used):,} tokens occur")
        percent = (0, 5, 25, 50, 75, 95, 100)
        print(f"  {'percentile':12}" + "".join(f"{p:8}" for p in percent))
        for what, values in zip(("tokens", "width", "height"), (lengths, *np.transpose(sizes)), strict=True):
            print(f"  {what:12}" + "".join(f"{value:8.0f}" for value in np.percentile(values, percent)))
        ten = random_stream(0, ORDER, 0).permutation(len(shards))[:10]
        texts = [[(decode_caption(shards.tokenizer, shards.captions(i)[0]), "black")] for i in ten]
        contact_sheet([crop_square(shards.image(i), 180) for i in ten], texts, Path(data_dir, name, f"{split}.png"), 5)
        share = np.bincount(lengths.clip(max=max_tokens), minlength=max_tokens + 1)
        heights = 300 - 270 * share / share.max()
        points = " ".join(f"{40 + 560 * x / max_tokens:.0f},{y:.0f}" for x, y in enumerate(heights))
        svg.append(f'<g fill="hsl({137 * number} 70% 40%)"><polygon points="{points} 600,300" fill-opacity=".3"/><text '
                   f'x="440" y="{30 + 18 * number}">{name}, mean {lengths.mean():.1f} tokens</text></g>')
    svg += [f'<text x="{34 + 560 * x / max_tokens:.0f}" y="320">{x}</text>' for x in range(0, max_tokens + 1, 8)]
    Path(data_dir, "lengths.svg").write_text("\n".join([*svg, "</svg>"]))


def main():
    from train import PRESETS  # late: train.py imports this file
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", nargs="+", required=True, help="any name; files go to DATA_DIR/DATASET/SPLIT; several for --stats")
    add("--split", choices=("train", "val"), default="train", help="default: train, which comes first; val is optional")
    add("--source", nargs="+", metavar="PATH", help="tars, folders or patterns; with --captions the images' folder")
    add("--captions", metavar="FILE", help="COCO's captions_*.json, a CSV headed `image,caption`, Flickr's *.token.txt")
    add("--caption-key", metavar="KEY", help="field of KEY.json (default: captions, else KEY.txt, else caption)")
    add("--image-size", type=int, metavar="PX", help="largest size to train at (default: train.py's preset, else 224)")
    add("--tokenizer", metavar="NAME", help="tiktoken's, or words:N, made of the captions (default: preset, else gpt2)")
    add("--data-dir", default="data", metavar="DIR", help="default: data")
    add("--workers", type=int, metavar="N", help="processes (default: one a core)")
    add("--fresh", action="store_true", help="make a finished split anew")
    add("--verify", action="store_true", help="only compare the split's files with their checksums")
    add("--stats", action="store_true", help="only print and draw what is in the data sets")
    add("--max-tokens", type=int, default=64, metavar="N", help="for --stats: where captions are cut (default: 64)")
    args = parser.parse_args()
    for each in args.dataset:
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", each):
            raise UserError(f"--dataset {each}: expected a name of letters, digits, dots and dashes")
    if len(args.dataset) > 1 and not args.stats:
        raise UserError(f"--dataset {' '.join(args.dataset)}: several are for --stats; otherwise one at a time")
    name = args.dataset[0]
    check_least(args, image_size=MIN_SIDE, workers=1, max_tokens=2)
    if args.stats:
        return show_stats(args.data_dir, args.dataset, args.split, args.max_tokens)
    if args.verify:
        return verify(Path(args.data_dir, name, args.split))
    preset = {"image_size": 224, "tokenizer": "gpt2"} | PRESETS.get(name, {})
    for split in ("train", "val") if name == "shapes" else (args.split,):
        meta = prepare(name, split, args.data_dir, args.source, args.captions, args.caption_key,
                       args.image_size or preset["image_size"], args.tokenizer or preset["tokenizer"], args.workers,
                       args.fresh)
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in meta["skipped"].items()) or "none"
        print(f"{args.data_dir}/{name}/{split}: {meta['samples']:,} images, {sum(meta['lengths'].values()):,} captions;"
              f" skipped: {skipped}")
    print(f"next: python train.py --dataset {name}")


if __name__ == "__main__":
    run(main)
