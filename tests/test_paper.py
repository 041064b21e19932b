"""The commands of tests/README.md's table of the paper and of README.md, as they stand there.

Each runs on a miniature of its data set in the official layout. Models keep their names, so that commands find the
default folders of others, but not their widths; the options of SMALLER stand behind the typed ones and win."""

import contextlib
import hashlib
import io
import itertools
import json
import math
import re
import shlex
import signal
import sys
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import probe
import sample
import train
from model import SIZES, Size

SCRIPTS = {"data.py": data, "train.py": train, "sample.py": sample, "probe.py": probe}
SMALLER = {
    "data.py": "--tokenizer words:100 --workers 1",
    "train.py": "--steps 2 --batch-size 4 --warmup 1 --log-every 1 --fresh --workers 0 --device cpu --dtype float32",
    "sample.py": "--device cpu",
    "probe.py": "--device cpu --samples 2 --limit 48",
}
MINIATURES = {name: Size(32, 2, 2, size.patch, 3) for name, size in SIZES.items()}
# Every data set has each of them equally often, hence the same tokenizer words:100: --init wants that of CKPT.
CAPTIONS = ("a red dog on the grass", "a cat sleeps", "two men ride a horse", "an old bus, parked", "a dog runs")
PAIRS, HELD_OUT = 40, 8
IMAGES = {"train": 5, "val": 2, "test": 3}  # of COCO and Flickr30k; and of each class for the probe
CLASSES = ("ash", "birch", "cedar")
PROBES = {"cifar10": "", "cifar100": "", "food101": "test", "pets": "test", "aircraft": "test", "imagenet": "val"}
ITEMS = {"aro-relation": 30, "aro-attribution": 30, "sugarcrepe": 14}


# ---- the commands in the documents
CODE = r"`([^`]+)`"


def fill_in(cell):
    """Commands of a cell of the table, with all values of the words in capitals; CKPT is kept."""
    templates = re.findall(r"`(python [^`]+)`", cell)
    lists = re.findall(r"([A-Z]+): ((?:`[^`]+`,? ?)+)", cell)
    values = {name: re.findall(CODE, text) for name, text in lists}
    untested = set(re.findall(CODE, cell)) - {*templates, *itertools.chain(*values.values())}
    assert not untested, f"neither commands nor values of a word: {untested}"
    commands = []
    for choice in itertools.product(*values.values()):
        for command in templates:
            for name, value in zip(values, choice, strict=True):
                command = re.sub(rf"\b{name}\b", value, command)
            commands.append(command)
    return list(dict.fromkeys(commands))


SECTION = (ROOT / "tests" / "README.md").read_text().partition("## The paper's experiments as commands")[2]
SECTION = SECTION.partition("\n## ")[0]
CKPT = re.search(rf"CKPT is {CODE}", SECTION)[1]
ROWS = [line.strip("| ").split(" | ") for line in SECTION.splitlines() if "`python " in line]
TABLE = {experiment: fill_in(commands) for experiment, commands, *_ in ROWS}
README = {}
for part in (ROOT / "README.md").read_text().split("\n## "):
    commands = re.findall(r"(?m)^ {4,}(?:python|torchrun \S+) (\S+\.py.*)$", part)
    README[part.partition("\n")[0]] = [f"python {command}" for command in commands]


# ---- miniatures of the data sets
def photo(path, colour=None, side=40, seed=0):
    """A picture of noise, or of one channel: its class."""
    pixels = np.random.default_rng(seed).integers(0, 200, (side, side, 3), dtype=np.uint8)
    if colour is not None:
        pixels //= 4
        pixels[..., colour] += 200
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, "JPEG")
    return pixels


def write_tar(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def make_pairs(folder):
    """WebDataset tars of the hub (CC3M, CC12M) and of img2dataset, whose caption column was re_caption."""
    pictures = []
    for i in range(4_000):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (i % 16 * 16, i // 16 % 16 * 16, i // 256 * 16)).save(file, "JPEG")
        pictures.append(file.getvalue())
    # The digest of a stored image says whether data.py holds it out: about 20 of them.
    pictures.sort(key=lambda picture: hashlib.sha256(data.store_image({"jpg": picture}, 224)).digest())
    pictures = [*pictures[:HELD_OUT], *pictures[HELD_OUT - PAIRS :]]
    tars = {"cc3m": "cc3m-train-{:04d}.tar", "cc12m": "cc12m-train-{:04d}.tar", "recap": "{:05d}.tar"}
    for dataset, tar in tars.items():
        for half in range(2):
            files = []
            for i in range(half, PAIRS, 2):
                caption = CAPTIONS[i % len(CAPTIONS)]
                record = {"key": f"{i:09d}", "caption": caption, "url": "https://example.org/1.jpg", "status": "success"}
                files.append((f"{i:09d}.jpg", pictures[i]))
                files.append((f"{i:09d}.json", json.dumps(record).encode()))
                files.append((f"{i:09d}.txt", caption.encode()))
            write_tar(folder / "raw" / dataset / tar.format(half), files)


def make_captioned(folder):
    """Karpathy's JSON files; COCO's `restval` belongs to the training images, in the folder of the others."""
    splits = {"coco": ["train", "train", "train", "restval", "restval"], "flickr30k": ["train"] * 5}
    for dataset, source in (("coco", "coco"), ("flickr30k", "flickr30k-images")):
        images = []
        for i, split in enumerate([*splits[dataset], "val", "val", "test", "test", "test"]):
            name = f"10000{i}.jpg"
            image = {"sentids": [], "imgid": i, "split": split, "filename": name}
            if dataset == "coco":
                year = "train2014" if split == "train" else "val2014"
                name = f"COCO_{year}_{i:012d}.jpg"
                image |= {"filepath": year, "filename": name, "cocoid": i}
            photo(folder / source / image.get("filepath", "") / name, seed=i)
            sentences = [{"tokens": text.split(), "raw": text, "imgid": i, "sentid": i} for text in CAPTIONS]
            images.append(image | {"sentences": sentences})
        content = json.dumps({"images": images, "dataset": dataset})
        (folder / f"dataset_{dataset}.json").write_text(content)
    lines = [f'{i}.jpg,"{text}"' for i, text in enumerate(CAPTIONS * 2)]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *lines]))
    for i in range(len(lines)):
        photo(folder / "photos" / f"{i}.jpg", seed=i)


def make_labelled(folder):
    """Class folders, and CIFAR's archives of the binary version."""
    for dataset, test in PROBES.items():
        for k, i in itertools.product(range(3), range(IMAGES["train"] + IMAGES["test"])):
            split = "train" if i < IMAGES["train"] else test
            if test:
                photo(folder / "raw" / dataset / split / CLASSES[k] / f"{i}.JPEG", colour=k, seed=i)

    def records(rows, *coarse):
        """A row for each class."""
        row = [bytes([*coarse, k]) + photo(None, k, 32, i).transpose(2, 0, 1).tobytes() for i in rows for k in range(3)]
        return b"".join(row)

    batches = [(f"cifar-10-batches-bin/data_batch_{i + 1}.bin", records([i])) for i in range(5)]
    test = ("cifar-10-batches-bin/test_batch.bin", records([5, 6, 7]))
    names = ("cifar-10-batches-bin/batches.meta.txt", b"airplane\nautomobile\nbird\n")
    write_tar(folder / "raw" / "cifar10" / "cifar-10-binary.tar.gz", [names, *batches, test], "w:gz")
    names = ("cifar-100-binary/fine_label_names.txt", b"apple\naquarium_fish\nbaby\n")
    splits = [(f"cifar-100-binary/{s}.bin", records(rows, 7)) for s, rows in (("test", [5, 6, 7]), ("train", range(5)))]
    write_tar(folder / "raw" / "cifar100" / "cifar-100-binary.tar.gz", [names, *splits], "w:gz")


def make_compositional(folder):
    """ARO's two lists with boxes, SugarCrepe's seven files."""
    box = {"bbox_x": 2, "bbox_y": 3, "bbox_w": 30, "bbox_h": 24}
    relation, attribution = [], []
    for i in range(4):
        photo(folder / "vg" / f"23{i}.jpg", seed=i)
        photo(folder / "val2017" / f"{i:012d}.jpg", seed=i)
    for i in range(30):
        image = box | {"image_id": 230 + i % 4, "image_path": f"23{i % 4}.jpg"}
        captions = {"true_caption": "the dog is on the grass", "false_caption": "the grass is on the dog"}
        relation.append(image | captions | {"relation_name": ("on", "near", "riding")[i % 3]})
        captions = {"true_caption": "the red bus and the old dog", "false_caption": "the old bus and the red dog"}
        attribution.append(image | captions | {"attributes": ["red", "old"]})
    (folder / "visual_genome_relation.json").write_text(json.dumps(relation))
    (folder / "visual_genome_attribution.json").write_text(json.dumps(attribution))
    (folder / "sugar-crepe" / "data").mkdir(parents=True)
    for kind in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        item = {"caption": "A dog runs.", "negative_caption": "A cat runs on the dog."}
        items = {str(i): item | {"filename": f"{i:012d}.jpg"} for i in range(2)}
        (folder / "sugar-crepe" / "data" / f"{kind}.json").write_text(json.dumps(items))


# ---- typing a command
@contextlib.contextmanager
def signals_kept():
    """Restore what train.py sets: the handlers of signals and the precision of matrix products."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def shorten(command):
    """Typed command -> its words, and the same with SMALLER behind them."""
    python, *words = shlex.split(command, comments=True)
    assert python == "python" and words[0] in SCRIPTS
    words = [CKPT if word == "CKPT" else word for word in words]
    more = shlex.split(SMALLER[words[0]])
    if "--pairs" in words:  # a million becomes one
        millions, rest = divmod(int(words[words.index("--pairs") + 1]), 1_000_000)
        assert rest == 0
        more += ["--pairs", str(millions)]
    return words, words + more


def type_command(command, folder):
    """Run a command in the folder and check what it says and leaves."""
    words, shorter = shorten(command)
    said, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(errors),
        mock.patch.dict(SIZES, MINIATURES),
        mock.patch.object(probe, "STRENGTHS", np.logspace(-2, 1, 3)),
        mock.patch.object(data, "SHAPES_SAMPLES", {"train": 96, "val": 24}),
        mock.patch.object(sys, "argv", shorter),
        signals_kept(),
    ):
        try:
            data.run(SCRIPTS[words[0]].main)
        except SystemExit as end:
            pytest.fail(f"{command}\nexit status {end.code}: {errors.getvalue()}")
        checks = {"data.py": check_data, "train.py": check_train, "sample.py": check_sample, "probe.py": check_probe}
        checks[words[0]](words, shorter, said.getvalue())


def option(words, name, default=None):
    return words[words.index(name) + 1] if name in words else default


def check_data(words, shorter, said):
    dataset, split = option(words, "--dataset"), option(words, "--split", "train")
    if dataset == "shapes":
        assert said.startswith("shapes, train: 96 images")
        return
    images, each = (IMAGES[split], len(CAPTIONS)) if dataset in ("coco", "flickr30k") else (PAIRS, 1)
    images = 10 if dataset == "mine" else images
    assert said.startswith(f"{dataset}, {split}: {images} images, {images * each} captions; skipped: none"), said
    assert "tokens of a caption: mean " in said


def check_train(words, shorter, said):
    args = train.parse_args(shorter[1:])
    typed = train.parse_args(words[1:])
    if "--pairs" not in words:
        assert args.out == typed.out, "the typed command has the default folder of this one"
    images = {"shapes": (96, 24), "coco": (5, 2), "flickr30k": (5, 2)}.get(args.dataset, (PAIRS - HELD_OUT, HELD_OUT))
    assert f"{args.pairs or images[0]} training and {images[1]} validation images" in said
    records = [json.loads(line) for line in Path(args.out, "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "event" not in record]
    final = records[-1]
    assert len(losses) == 2 and final["event"] == "final"
    figures = [] if args.objective == "clip" else ["wrong_image", "visual_gain"]
    assert all(map(math.isfinite, [*losses, final["val_loss"], *(final[name] for name in figures)]))
    saved = torch.load(f"{args.out}/ckpt.pt", weights_only=True)
    assert saved["step"] == 2 and saved["config"]["size"] == typed.model and saved["options"]["times"] == typed.times
    objective = args.objective if args.objective in ("ar", "clip") else "mdc"
    assert saved["config"]["objective"] == objective and saved["config"]["image_size"] in (48, 224)
    blocks = {name for name in saved["model"] if re.search(r"(decoder|text)\..*blocks\.\d+\.norm1\.weight", name)}
    assert len(blocks) == MINIATURES[typed.model].decoder_depth, sorted(saved["model"])
    assert objective == "clip" or Path(args.out, "samples.png").stat().st_size > 1000


def check_sample(words, shorter, said):
    dataset, split = option(words, "--dataset"), option(words, "--split", "val")
    pictures_and_captions = [word for word in words if re.fullmatch(r"\w+\.jpg|a \w+ \w+", word)]
    assert all(word in said for word in pictures_and_captions)
    if "folder/" in words:
        assert said.count("folder/1.jpg\t") == 1
    if "--prompt" in words:
        assert re.search(r"photo\.jpg\ta.* dog on the", said)
    if dataset and "--trace" not in words:
        images = int(option(words, "--count", IMAGES[split]))
        assert said.count("\t") == images, said
    if "--metrics" in words:
        assert 0 <= float(re.search(r"BLEU-4 (\S+)", said)[1]) <= 1 and re.search(r"CIDEr-D \d", said)
    if "--html" in words:
        assert Path(option(words, "--html")).stat().st_size > 1000


def check_probe(words, shorter, said):
    if "--export" in words:
        assert "state_dict" in torch.load(option(words, "--export"), weights_only=True)
        return
    dataset, ckpt = option(words, "--dataset"), Path(option(words, "--ckpt"))
    record = json.loads(ckpt.with_name("probe.jsonl").read_text().splitlines()[-1])
    results = record["results"]
    assert record["dataset"] == dataset and not record["unusable"]
    if dataset in ITEMS:
        assert record["items"] == ITEMS[dataset] and ("normalized" in results) == (dataset == "sugarcrepe")
        objective = ckpt.parent.name.split("-")[2]
        assert set(results) - {"normalized"} == set(probe.RULES[objective])
        for rule in probe.RULES[objective]:
            assert 0 <= results[rule]["mean of groups"]["sum"] <= 100 and f"{rule}: gain over other images" in said
        return
    train_images, test_images = (48, 24) if dataset == "shapes" else (15, 9)
    assert f"{dataset}: {train_images} training and {test_images} test images" in said
    tasks = {"shape", "colour", "background", "size", "row", "column"} if dataset == "shapes" else {"class"}
    assert set(results) == tasks and all(set(figures) == {"trained", "random"} for figures in results.values())
    assert ("knn" in next(iter(results.values()))["trained"]) == ("--knn" in words)
    assert dataset == "shapes" or results["class"]["trained"]["top1"] == 1, "the colours tell the classes apart"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with all data sets, their shards, and CKPT of the three objectives."""
    folder = tmp_path_factory.mktemp("prepared")
    for seed, name in enumerate(("photo.jpg", "another.jpg", "folder/1.jpg")):
        photo(folder / name, seed=seed)
    make_pairs(folder)
    make_captioned(folder)
    make_labelled(folder)
    make_compositional(folder)
    type_command("python data.py --dataset shapes", folder)
    for command in itertools.chain(*TABLE.values()):
        if "python data.py" in command and "--source" in command or re.search("cc12m .*B/16", command):
            type_command(command, folder)
    assert (folder / CKPT).exists()
    return folder


@pytest.mark.parametrize("experiment", TABLE)
def test_the_papers_experiments_can_be_typed(experiment, prepared):
    for command in TABLE[experiment]:
        for objective in ("mdc", "ar", "clip") if "aro-" in command else ("mdc",):
            type_command(command.replace("CKPT", CKPT.replace("mdc", objective)), prepared)


def test_no_two_experiments_share_a_folder(prepared):
    commands = dict.fromkeys(command for commands in TABLE.values() for command in commands if "train.py" in command)
    with contextlib.chdir(prepared):
        settings = {}
        for command in commands:
            args = train.parse_args(shorten(command)[0][1:])
            settings.setdefault(args.out, set()).add(str(args))
    assert len(settings) > 30 and not [out for out, found in settings.items() if len(found) > 1]


@pytest.mark.parametrize("section", ["Quick start", "Train on CC3M", "Use the result"])
def test_the_readmes_commands_can_be_typed(section, prepared):
    assert len(README[section]) > 2
    for command in README[section]:
        type_command(command, prepared)
