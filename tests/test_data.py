"""data.py: what goes into a shard comes out again, and nothing bad gets in."""

import contextlib
import errno
import functools
import gc
import importlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from PIL import Image

import data
from data import SHAPES_CAPTION, Batches, Shards, UserError, decode_caption, open_split, prepare


def jpeg(width=20, height=16, colour="red"):
    Image.new("RGB", (width, height), colour).save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b""))
    return path


def good(n, start=0):
    return [
        m
        for i in range(start, start + n)
        for m in ((f"{i:05d}.jpg", jpeg()), (f"{i:05d}.txt", f"caption number {i}".encode()))
    ]


def build(folder, source, split="train", **options):
    gc.collect()  # the loader of a build that failed, whose processes have its lock
    for process in multiprocessing.active_children():
        process.join(10)
    return prepare("set", split, folder, [str(source)], image_size=16, tokenizer="words:50", workers=1, **options)


def everything(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_shapes_captions_say_what_is_drawn(shapes):
    split = open_split(shapes, "shapes", "train")
    assert len(split) == 96 and set(split.meta["bytes"]) == {f"0000{i}.shard" for i in range(3)} | {"samples.bin"}
    for i in (0, 39, 40, 95):
        image, caption = data.draw_shapes(int(split.key(i)), 16)
        assert decode_caption(split.tokenizer, split.captions(i)[0]) == caption and SHAPES_CAPTION.fullmatch(caption)
        assert np.array_equal(split.image(i), image)
        words = SHAPES_CAPTION.fullmatch(caption)
        assert words["colour"] != words["background"]


def test_bad_samples_are_skipped_and_counted(tmp_path):
    bad = [
        ("b0.jpg", jpeg(200, 160)[:-200]),
        ("b0.txt", b"x"),
        ("b1.jpg", b""),
        ("b1.txt", b"x"),
        ("b2.jpg", b"<html>"),
        ("b2.txt", b"x"),
        ("b3.jpg", jpeg()),
        ("b4.jpg", jpeg()),
        ("b4.txt", b"\xff\xfe\xfa"),
        ("b5.jpg", jpeg()),
        ("b5.json", b"{" * 9000),
        ("b6.txt", b"no image"),
        ("b7.jpg", jpeg(400, 12)),
        ("b7.txt", b"x"),
        ("b8.jpg", None),
        ("b9.jpg", jpeg()),
        ("b9.txt", b"x" * (data.MAX_BYTES["txt"] + 1)),
        ("c0.jpg", jpeg()),
        ("c0.json", b"[" * 10_000),
        ("c1.jpg", jpeg()),
        ("c1.json", b"[1]"),
        ("c2.jpg", jpeg()),
        ("c2.txt", " \0\u3000\n".encode()),
    ]
    meta = build(tmp_path / "out", make_tar(tmp_path / "a.tar", good(13) + bad + good(2, 13)))
    assert meta["samples"] == 15
    assert meta["skipped"] == {
        "tar member is not a file": 1,
        "image data is broken": 1,
        "not a JPEG, PNG or WebP image": 2,
        "no caption": 3,
        "caption is not UTF-8, or broken JSON": 3,
        "no image": 1,
        "image side below 8 pixels or ratio above 10:1": 1,
        "txt file above 1 MB": 1,
    }
    assert not (tmp_path / "passwd").exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2 + 100], lambda b: b[:1100], lambda b: b"not a tar" * 99])
def test_a_damaged_tar_costs_only_itself(tmp_path, damage):
    make_tar(tmp_path / "a.tar", good(3))
    whole = make_tar(tmp_path / "b.tar", good(6, 10)).read_bytes()
    (tmp_path / "b.tar").write_bytes(damage(whole))
    meta = build(tmp_path / "out", tmp_path / "*.tar")
    assert 3 <= meta["samples"] < 9 and meta["skipped"]["b.tar is cut short or damaged"] == 1


def test_a_second_image_of_a_sample_is_counted(tmp_path):
    both = [("b.jpg", jpeg()), ("b.PNG", jpeg(colour="blue")), ("b.txt", b"x"), ("b.json", b"{}")]
    meta = build(tmp_path / "out", make_tar(tmp_path / "a.tar", good(3) + both))
    assert meta["samples"] == 4 and meta["skipped"] == {"file of the same name": 1}


def test_longer_extensions_are_other_types_of_the_same_sample(tmp_path):
    """DataCompDR has KEY.syn.json and KEY.paug.json, others KEY.seg.png; photo.v2.jpg with its text is a photograph."""
    extras = [("syn.json", b'{"caption": "made"}'), ("paug.json", b"{}"), ("seg.png", jpeg(colour="blue")), ("npz", b"x")]
    members = []
    for i in range(3):
        members += good(3)[2 * i:2 * i + 2] + [(f"{i:05d}.{kind}", content) for kind, content in extras]
    files = members + [("photo.v2.jpg", jpeg()), ("photo.v2.txt", b"another"), ("photo.jpg", jpeg()), ("a.b.jpg", jpeg())]
    for source in (make_tar(tmp_path / "a.tar", files), make_folder(tmp_path / "a", files)):
        meta = build(tmp_path, source, fresh=True)
        assert keys(Shards(tmp_path / "set/train")) == ["00000", "00001", "00002", "photo.v2"]
        assert meta["skipped"] == {"no caption": 2}, "photo and a.b"


def test_tars_joined_with_cat_are_read_to_the_last(tmp_path):
    parts = [make_tar(tmp_path / f"{i}.part", good(5, 5 * i)).read_bytes() for i in range(3)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    meta = build(tmp_path / "out", tmp_path / "a.tar")
    assert meta["samples"] == 15 and not meta["skipped"]
    (tmp_path / "a.tar").write_bytes(b"".join(parts)[:-600] + b"x" * 600)
    meta = build(tmp_path / "out", tmp_path / "a.tar", fresh=True)
    assert meta["samples"] == 15 and meta["skipped"] == {"a.tar is cut short or damaged": 1}


@pytest.mark.parametrize("name", ["b.tgz", "b.tar.gz", "b.TAR.zst"])
def test_a_compressed_tar_beside_tars_is_named(tmp_path, name):
    (tmp_path / "in").mkdir()
    make_tar(tmp_path / "in/a.tar", good(3))
    (tmp_path / "in" / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: unpack"):
        build(tmp_path / "out", tmp_path / "in")


def test_all_layouts_give_the_same_samples(tmp_path):
    captions = [[f"caption {i}", f"other words, {i}"] for i in range(5)]
    files, photos = tmp_path / "files" / "00000", tmp_path / "photos"
    files.mkdir(parents=True)
    photos.mkdir()
    members = []
    for i, both in enumerate(captions):
        members += [(f"{i}.jpg", jpeg()), (f"{i}.json", json.dumps({"captions": both}).encode())]
        (photos / f"{i}.jpg").write_bytes(jpeg())
    for name, content in members:
        (files / name).write_bytes(content)
    (files / "0.js.txt").write_text(" ")  # by name between 0.jpg and 0.json
    rows = [(i, caption) for i, both in enumerate(captions) for caption in both]
    (tmp_path / "captions.txt").write_text("image,caption\n" + "".join(f'{i}.jpg,"{c}"\n' for i, c in rows))
    (tmp_path / "flickr.token.txt").write_text("".join(f"{i}.jpg#{n % 2}\t{c}\n" for n, (i, c) in enumerate(rows)))
    (tmp_path / "captions_val.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(5)],
                "annotations": [{"id": n, "image_id": i, "caption": c} for n, (i, c) in enumerate(rows)],
            }
        )
    )
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": c}) + "\r\n" for i, c in [*rows, (0, None)]]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "".join(lines) + "\n")
    build(tmp_path / "tar", make_tar(tmp_path / "a.tar", members))
    expected = (tmp_path / "tar/set/train/00000.shard").read_bytes()
    build(tmp_path / "folder", files.parent)
    assert (tmp_path / "folder/set/train/00000.shard").read_bytes() == expected
    for table in ("captions.txt", "flickr.token.txt", "captions_val.json", "metadata.jsonl"):
        build(tmp_path / table[:8], photos, captions=str(tmp_path / table), fresh=True)
        assert (tmp_path / table[:8] / "set/train/00000.shard").read_bytes() == expected
    shards = Shards(tmp_path / "tar/set/train")
    assert [[decode_caption(shards.tokenizer, c) for c in shards.captions(i)] for i in range(5)] == captions


def test_stopped_preparation_is_finished_to_the_same_bytes(tmp_path, monkeypatch):
    for i in range(3):
        make_tar(tmp_path / f"{i}.tar", good(4, 10 * i))
    build(tmp_path / "whole", tmp_path / "*.tar")
    expected, write_json = everything(tmp_path / "whole/set/train"), data.write_json

    def killed(path, value):
        write_json(path, value)
        if path.name in ("meta.json", "00001.done"):
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "write_json", killed)
    with pytest.raises(BaseException):  # noqa: B017
        build(tmp_path / "cut", tmp_path / "*.tar")
    monkeypatch.setattr(data, "write_json", write_json)
    folder = tmp_path / "cut/set/train"
    assert (folder / "00000.done").exists() and not (folder / "meta.json").exists()
    (folder / "00001.done").unlink()
    (folder / "00001.shard").write_bytes(b"half")
    kept = (folder / "00000.shard").stat().st_mtime_ns
    build(tmp_path / "cut", tmp_path / "*.tar")
    assert everything(folder) == expected and (folder / "00000.shard").stat().st_mtime_ns == kept


def test_a_killed_preparation_releases_its_lock_and_keeps_finished_shards(tmp_path, monkeypatch):
    for i in range(3):
        make_tar(tmp_path / f"{i}.tar", good(4, 10 * i))
    build(tmp_path / "whole", tmp_path / "*.tar")
    write_json, folder = data.write_json, tmp_path / "cut/set/train"

    def stops_after_the_first(path, value):
        if path.name == "00001.done":
            time.sleep(3)
            return  # never written: the loader's process ends with its parent
        write_json(path, value)

    monkeypatch.setattr(data, "write_json", stops_after_the_first)
    child = multiprocessing.get_context("fork").Process(target=build, args=(tmp_path / "cut", tmp_path / "*.tar"))
    child.start()
    while not (folder / "00001.shard").exists():
        time.sleep(0.01)
    child.kill()
    child.join()
    monkeypatch.setattr(data, "write_json", write_json)
    kept = (folder / "00000.shard").stat().st_mtime_ns
    with open(folder / ".lock", "w") as lock:  # held until the last worker has noticed
        data.fcntl.flock(lock, data.fcntl.LOCK_EX)
    build(tmp_path / "cut", tmp_path / "*.tar")
    assert everything(folder) == everything(tmp_path / "whole/set/train")
    assert (folder / "00000.shard").stat().st_mtime_ns == kept


def test_unfinished_shards_of_other_options_are_not_taken(tmp_path):
    bad = [(f"{i:05d}.jpg", b"x") for i in range(3)] + good(3)[1::2]
    with pytest.raises(UserError, match="only 0 samples.*'not a JPEG, PNG or WebP image': 3"):
        build(tmp_path, make_tar(tmp_path / "a.tar", bad))
    assert (tmp_path / "set/train/00000.done").exists()
    assert build(tmp_path, make_tar(tmp_path / "b.tar", good(3)))["samples"] == 3


def test_a_finished_split_needs_its_sources_no_more(tmp_path):
    meta = build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    (tmp_path / "a.tar").unlink()
    assert build(tmp_path, tmp_path / "a.tar") == json.loads(json.dumps(meta))


def test_other_options_and_a_second_process_are_refused(tmp_path):
    make_tar(tmp_path / "a.tar", good(3))
    build(tmp_path / "out", tmp_path / "a.tar")
    with pytest.raises(UserError, match="image_size was 16, now 32"):
        prepare("set", "train", tmp_path / "out", [str(tmp_path / "a.tar")], image_size=32, tokenizer="words:50")
    with pytest.raises(UserError, match="tokenizer was .*words:50.*, now .*words:9"):
        prepare("set", "train", tmp_path / "out", [str(tmp_path / "a.tar")], image_size=16, tokenizer="words:9")
    with open(tmp_path / "out/set/train/.lock", "w") as lock:
        data.fcntl.flock(lock, data.fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            build(tmp_path / "out", tmp_path / "a.tar", fresh=True)


@pytest.mark.parametrize(
    "lie",
    [
        {"samples": 10**9},
        {"samples": -1},
        {"samples": 2},
        {"samples": float("inf")},
        {"held_out": -1},
        {"held_out": 4},
        {"format": 1},
        {"lengths": {"many": 1}},
        {"bytes": {}},
        {"bytes": {"samples.bin": 10**12}},
        {"bytes": {"samples.bin": "many"}},
        {"bytes": []},
        {"tokenizer": None},
        {"tokenizer": {"name": "words:1", "pieces": [1]}},
    ],
)
def test_meta_that_lies_is_refused(tmp_path, lie):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    meta = json.loads((tmp_path / "set/train/meta.json").read_text())
    (tmp_path / "set/train/meta.json").write_text(json.dumps(meta | lie))
    with pytest.raises(UserError, match="damaged"):
        Shards(tmp_path / "set/train")


def test_one_tokenizer_for_all_splits(tmp_path):
    make_tar(tmp_path / "a.tar", good(3))
    with pytest.raises(UserError, match="--split train"):
        build(tmp_path, tmp_path / "a.tar", "val")
    train = build(tmp_path, tmp_path / "a.tar")
    make_tar(tmp_path / "b.tar", good(3, 10))
    assert build(tmp_path, tmp_path / "b.tar", "val")["tokenizer"] == train["tokenizer"]
    with pytest.raises(UserError, match="train has words:50"):
        prepare("set", "val", tmp_path, [str(tmp_path / "b.tar")], image_size=16, tokenizer="words:9", fresh=True)


@pytest.mark.parametrize("meta", ["", "[]", "{}", "[" * 10_000, "null", "\0"])
def test_meta_that_is_none_is_refused(tmp_path, meta):
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(UserError, match="damaged"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [("shard", 1), ("shard", -1), ("start", -1), ("start", 2**62), ("image_bytes", -1), ("image_bytes", 2**31 - 1)],
)
def test_records_that_lie_are_refused(tmp_path, field, value):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    rows = np.fromfile(tmp_path / "set/train/samples.bin", data.RECORD)
    rows[field][2] = value
    (tmp_path / "set/train/samples.bin").write_bytes(rows.tobytes())
    shards = Shards(tmp_path / "set/train")
    for read in (shards.image, shards.captions):
        with pytest.raises(UserError, match="is damaged: .*--fresh"):
            read(2)
    assert shards.image(0).size == (20, 16)


@pytest.mark.parametrize("count, token", [(0, None), (-1, None), (2**31 - 1, None), (2, None), (None, 2**32 - 1)])
def test_tokens_that_lie_are_refused(tmp_path, count, token):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    folder = tmp_path / "set/train"
    rows = np.fromfile(folder / "samples.bin", data.RECORD)
    if token is None:
        rows["tokens"][1] = count
        (folder / "samples.bin").write_bytes(rows.tobytes())
    else:
        with open(folder / "00000.shard", "r+b") as file:
            file.seek(int(rows["start"][1] + rows["image_bytes"][1]))
            file.write(np.uint32(token).tobytes())
    with pytest.raises(UserError, match="is damaged: .*--fresh"):
        Shards(folder).captions(1)


def test_a_picture_that_lies_about_its_size_is_refused(tmp_path):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    shard = tmp_path / "set/train/00000.shard"
    for size in (b"99 99", b"0 16 ", b"9" * 5):
        shard.write_bytes(shard.read_bytes().replace(b"P6\n20 16", b"P6\n" + size, 1))
        with pytest.raises(UserError, match="is damaged: .*--fresh"):
            Shards(tmp_path / "set/train").image(0)


def test_a_short_shard_and_a_missing_one_are_refused_at_once(tmp_path):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    shard = tmp_path / "set/train/00000.shard"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="00000.shard"):
        Shards(tmp_path / "set/train")
    shard.unlink()
    with pytest.raises(UserError, match="00000.shard"):
        Shards(tmp_path / "set/train")


def test_thirty_lines_read_a_split(tmp_path):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    folder = tmp_path / "set/train"
    meta = json.loads((folder / "meta.json").read_text())
    samples = np.memmap(folder / "samples.bin", np.dtype([tuple(field) for field in meta["record"]]))
    tokenizer = data.load_tokenizer(meta["tokenizer"])
    assert sorted(samples["key"].tolist()) == [b"00000", b"00001", b"00002"]
    for sample in samples:
        shard = (folder / f"{sample['shard']:05d}.shard").read_bytes()[sample["start"] :]
        image = Image.open(io.BytesIO(shard[: sample["image_bytes"]]))
        tokens = np.frombuffer(shard[sample["image_bytes"] :], "<u4", sample["tokens"])
        assert image.size == (20, 16)
        assert tokenizer.decode(tokens[:-1].tolist()) == f"caption number {int(sample['key'])}"
        assert tokens[-1] == tokenizer.eot_token


def test_held_out_samples_take_the_place_of_a_missing_val(tmp_path, monkeypatch):
    """A set with a row for each caption repeats its images; other sets have one name for all samples."""
    monkeypatch.setattr(data, "HELD_OUT", 0.3)
    for tar, names in (("a", "image{:02}"), ("b", "folder{:02}/image"), ("c", "image{:02}")):
        images = [jpeg(colour=(8 * i, 0, 100 if tar == "b" else 0)) for i in range(30)]
        stems = map(names.format, range(30))
        members = [m for stem, image in zip(stems, images, strict=True) for m in ((f"{stem}.jpg", image), (f"{stem}.txt", b"x"))]
        make_tar(tmp_path / f"{tar}.tar", members)
    build(tmp_path, tmp_path / "*.tar")
    splits = [open_split(tmp_path, "set", split) for split in ("train", "val")]
    pictures = [{np.asarray(split.image(i)).tobytes() for i in range(len(split))} for split in splits]
    assert sum(map(len, splits)) == 90 and not pictures[0] & pictures[1]
    assert len(pictures[0]) + len(pictures[1]) == 60 and 8 < len(pictures[1]) < 30


def test_words_tokenizer_spells_what_it_does_not_know():
    spec = data.words_tokenizer("words:2", data.Counter({"a": 9, " dog": 5, " cat": 3, " cow": 3}))
    assert spec["pieces"] == [" dog", " cat"]
    tokenizer = data.load_tokenizer(spec)
    assert tokenizer.encode_ordinary("a dog") == [97, 256] and tokenizer.eot_token == 258
    for text in ("a cow, größer\u202e!", "<|endoftext|> a", "猫 \U0001f600", "\ud800"):
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.eot_token not in ids and (decode_caption(tokenizer, ids) == text or text == "\ud800")


def test_without_network_gpt2_names_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})

    def offline(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr("tiktoken.load.read_file", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR.*words:8000"):
        data.load_tokenizer({"name": "gpt2"})
    with pytest.raises(UserError, match="unknown"):
        data.load_tokenizer({"name": "gpt9"})


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1000, 4097])
def test_shuffled_is_a_permutation_of_its_own_in_every_epoch(count):
    orders = [data.shuffled(count, 5, epoch).tolist() for epoch in (0, 1)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 17 or orders[0] != orders[1]


def test_batches_do_not_depend_on_processes_or_accumulation(shapes):
    split = open_split(shapes, "shapes", "train")
    options = {"batch_size": 12, "image_size": 8, "max_tokens": 16, "seed": 3, "crop_scale": 0.5, "flip": True}
    whole = Batches(split, **options)[5]
    assert whole["strata"].tolist() == [place / 12 for place in range(12)]
    for world, accumulation in ((1, 1), (2, 1), (1, 3), (2, 2)):
        parts = [
            Batches(split, **options, rank=rank, world=world, accumulation=accumulation)[5 * accumulation + micro]
            for rank in range(world)
            for micro in range(accumulation)
        ]
        places = (torch.cat([part["strata"] for part in parts]) * 12).round().long()
        assert sorted(places.tolist()) == list(range(12))
        for name in ("images", "tokens", "valid", "noise"):
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name][places])
        assert all(part["u"] == whole["u"] for part in parts)


def test_items_have_the_documented_types(shapes):
    batch = Batches(open_split(shapes, "shapes", "train"), 12, 8, 32, 3)[0]
    T = batch["tokens"].shape[1]
    assert T % 8 == 0 and T - 8 < batch["valid"].sum(1).max() <= T
    types = {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()}
    assert types == {
        "images": (torch.uint8, (12, 8, 8, 3)),
        "tokens": (torch.int64, (12, T)),
        "valid": (torch.bool, (12, T)),
        "noise": (torch.float32, (12, T)),
        "u": (torch.float64, ()),
        "strata": (torch.float64, (12,)),
    }
    assert (batch["valid"].int().diff(dim=1) <= 0).all(), "pads come last"
    eos = open_split(shapes, "shapes", "train").tokenizer.eot_token
    assert torch.equal((batch["tokens"] != eos).sum(1) + 1, batch["valid"].sum(1))


def test_a_short_last_validation_batch_is_stratified_too(shapes):
    split = open_split(shapes, "shapes", "val")  # 150 images
    for world in (1, 2):
        parts = [Batches(split, 64, 8, 16, 3, augment=False, rank=rank, world=world)[2] for rank in range(world)]
        strata = torch.cat([part["strata"] for part in parts]).sort().values
        assert strata.tolist() == [place / 22 for place in range(22)]


def test_a_subset_is_random_nested_and_small(shapes):
    split = open_split(shapes, "shapes", "train")
    keys = lambda part: [part.key(i) for i in range(len(part))]  # noqa: E731
    small, large = keys(split.subset(20, 7)), keys(split.subset(60, 7))
    assert len(set(small)) == 20 and set(small) < set(large) < set(keys(split))
    assert small == keys(split.subset(20, 7)) != keys(split.subset(20, 8)) and small != keys(split)[:20]
    batch = Batches(split.subset(4, 7), 4, 8, 16, 0)[0]
    assert len(batch["images"].flatten(1).unique(dim=0)) == 4
    with pytest.raises(UserError, match="96 samples, fewer than 97"):
        split.subset(97, 0)
    split.rows = range(10_000_000)
    assert split.subset(1000, 0).rows.nbytes <= 8000


def test_random_crops_are_those_of_torchvision():
    rng = np.random.default_rng(0)
    for width, height, scale in ((300, 200, 0.9), (300, 200, 0.25), (200, 200, 0.5)):
        boxes = np.array([data.random_crop_box((width, height), scale, rng) for _ in range(3000)])
        w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        share, aspect = w * h / (width * height), w / h
        assert boxes.min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
        assert aspect.min() > 0.7499 and aspect.max() < 1.3334
        central = np.isclose(share, 8 / 9) & np.isclose(aspect, 4 / 3)  # after ten tries, of 3:2
        assert (share[~central] >= scale - 1e-9).all() and share.max() <= 1
        assert central.mean() > 0.1 if scale == 0.9 else central.mean() < 0.01
        assert scale != 0.5 or abs(share.mean() - 0.72) < 0.03  # large ones fit less often
    box = data.random_crop_box((900, 100), 0.9, rng)
    assert np.allclose(box, (450 - 200 / 3, 0, 450 + 200 / 3, 100))


def test_a_caption_that_is_cut_keeps_its_end(shapes):
    split = open_split(shapes, "shapes", "train")
    batch = Batches(split, 4, 8, 6, 0)[0]
    assert batch["tokens"].shape == (4, 6) and (batch["tokens"][:, -1] == split.tokenizer.eot_token).all()


@pytest.mark.filterwarnings("ignore")
def test_broken_exif_and_transparency(tmp_path):
    Image.new("RGBA", (20, 16), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert data.open_image(tmp_path / "a.png").getpixel((3, 3)) == (255, 255, 255)
    Image.new("RGB", (20, 16), "red").save(tmp_path / "b.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)
    assert data.open_image(tmp_path / "b.jpg").size == (20, 16)


def test_flickr8k_keeps_all_captions(photographs, tmp_path, monkeypatch):
    tokenizers = photographs.parent / "tokenizers"
    if not tokenizers.exists():
        pytest.skip("no GPT-2 files")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tokenizers))
    meta = prepare("f", "val", tmp_path, [str(photographs / "flickr8k-val-00000.tar")], image_size=32, tokenizer="gpt2")
    assert (meta["samples"], sum(meta["lengths"].values()), meta["skipped"]) == (1000, 5000, {})
    shards = Shards(tmp_path / "f/val")
    assert shards.image(999).mode == "RGB" and min(shards.image(999).size) == 64, "a crop is never enlarged"


def header(name, size, kind=b"0"):
    """A tar header that may claim anything."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, max(size, 0)
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        block[124:136] = b"\xff" * 12
        block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


def padded(content):
    return content + bytes(-len(content) % 512)


def member(name, content, kind=b"0"):
    return header(name, len(content), kind) + padded(content)


HUGE = 3 << 30
PAIRS = b"".join(member(*each) for each in good(7))
HOSTILE_TARS = {
    "gigabyte caption": ([member("x.jpg", jpeg()), header("x.txt", HUGE), HUGE], {"txt file above 1 MB": 1}),
    "gigabyte image": ([header("x.jpg", HUGE), HUGE, member("x.txt", b"x")], {"jpg file above 32 MB": 1}),
    "gigabyte JSON": ([member("x.jpg", jpeg()), header("x.json", HUGE), HUGE], {"json file above 1 MB": 1}),
    "the same name again": ([member("x.txt", b"a"), member("x.jpg", jpeg()), member("x.txt", b"b")],
                            {"file of the same name": 1}),
    "gigabyte pax header": ([header("x", HUGE, b"x"), HUGE], {}),
    "gigabyte global header": ([header("x", HUGE, b"g"), HUGE], {}),
    "gigabyte long name": ([header("././@LongLink", HUGE, b"L"), HUGE], {}),
    "endless long names": ([header("././@LongLink", 0, b"L") * 20_000], {}),
    "pax headers of digits": ([member("x", b"9" * (1 << 16), b"x")] * 4, {}),
    "sparse": ([header("x.jpg", 512, b"S"), 512], {"tar member is not a file": 1}),
    "devices and links": (
        [header("x.jpg", 0, kind) for kind in (b"1", b"2", b"3", b"4", b"6")],
        {"tar member is not a file": 5},
    ),
    "escaping names": ([member("../../x.jpg", jpeg()), member("/x.txt", b"x")], {"no caption": 1, "no image": 1}),
    "backward member": ([header("x.txt", -512)], {"a.tar is cut short or damaged": 1}),
    "beyond the end": ([header("x.txt", 1 << 32)], {"a.tar is cut short or damaged": 1}),
}


@pytest.mark.parametrize("name", HOSTILE_TARS)
def test_hostile_tars_cost_little_and_are_counted(tmp_path, name):
    parts, losses = HOSTILE_TARS[name]
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(PAIRS)
        for part in parts:
            file.write(part) if isinstance(part, bytes) else file.seek(part, 1)
        ended = "a.tar is cut short or damaged" in losses
        file.write(bytes(1024) if ended else b"".join(member(*each) for each in good(1, 90)) + bytes(1024))
    before = set(tmp_path.parent.rglob("*"))
    meta = build(tmp_path / "out", tmp_path / "a.tar")
    assert meta["samples"] == 8 - ended + ("again" in name)
    assert meta["skipped"] == losses
    assert all(path.is_relative_to(tmp_path / "out") for path in set(tmp_path.parent.rglob("*")) - before)
    unit = ("tar", tmp_path / "a.tar")
    read = lambda: list(data.read_samples(unit, data.Counter(), 16))  # noqa: E731
    assert growth(read) < 200
    start = time.process_time()
    read()
    assert time.process_time() - start < 4


def growth(function):
    """By how many MB the memory of a forked process grows at most while it calls the function."""
    receiver, sender = os.pipe()
    if not (child := os.fork()):
        with contextlib.suppress(BaseException):
            Path("/proc/self/clear_refs").write_text("5")
            peak = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])  # noqa: E731
            start = peak()
            function()
            os.write(sender, str((peak() - start) // 1024).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(sender)
    with open(receiver) as file:
        return int(file.read())


def png_chunk(kind, content):
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def png(width, height, rows):
    """A PNG of 8 bit RGBA whatever its rows are."""
    start = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 6, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", start) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def webp_bomb():
    """Claims a canvas of 16,384 x 16,384 pixels for a picture of 20 x 16."""
    Image.new("RGB", (20, 16)).save(small := io.BytesIO(), "WEBP", lossless=True)
    canvas = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + b"\xff\x3f\0\xff\x3f\0" + small.getvalue()[12:]
    return b"RIFF" + (4 + len(canvas)).to_bytes(4, "little") + b"WEBP" + canvas


def try_to_open(file):
    with contextlib.suppress(data.BadSample):
        return data.open_image(io.BytesIO(file), 256)


@pytest.mark.filterwarnings("ignore")
def test_bombs_are_refused_or_fit_in_a_gigabyte():
    start = jpeg().index(b"\xff\xc0") + 5
    wide = jpeg()[:start] + b"\xff" * 4 + jpeg()[start + 4 :]
    bombs = [png(20_000, 20_000, b""), png(9000, 8000, b""), webp_bomb(), wide]
    assert not any(map(try_to_open, bombs)) and growth(lambda: [try_to_open(file) for file in bombs]) < 100
    largest = png(7000, 7000, zlib.compress(bytes(7000 * 28_001), 1))
    assert 100 < growth(lambda: try_to_open(largest)) < 1000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_mutated_images_are_images_or_bad_samples(form):
    rng = random.Random(0)
    picture = data.draw_shapes(3, 64)[0]
    picture.save(file := io.BytesIO(), form)
    outcomes = data.Counter()
    for _ in range(200):
        content = bytearray(file.getvalue()[: rng.randrange(20, 2 * len(file.getvalue()))])
        for _ in range(rng.randrange(9)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        image = try_to_open(bytes(content))
        outcomes[image is not None] += 1
        assert image is None or image.mode == "RGB" and np.asarray(image).shape == (*image.size[::-1], 3)
    assert min(outcomes[False], outcomes[True]) > 5


def test_hostile_text_goes_through_unchanged(tmp_path):
    texts = ["a <|endoftext|> b", "<|endoftext|>", "a \u202e b", "\u200f", "<b>", "x" * 999, "猫 \U0001f600 e\u0301"]
    files = [(f"{i}.jpg", jpeg()) for i in range(9)] + [(f"{i}.txt", text.encode()) for i, text in enumerate(texts)]
    files += [("7.json", b'{"captions": ["a\\u0000b \\ud800", 7, null, "", "<PERSON> c"]}')]
    build(tmp_path, make_tar(tmp_path / "a.tar", sorted([*files, ("8.json", b'{"caption": "d"}')])))
    shards = Shards(tmp_path / "set/train")
    tokenizer = shards.tokenizer
    made = {shards.key(i): [decode_caption(tokenizer, c) for c in shards.captions(i)] for i in range(len(shards))}
    assert made == {str(i): [text] for i, text in enumerate(texts)} | {"7": ["a b ?", "person c"], "8": ["d"]}


def test_long_names_of_both_kinds_keep_sample_and_key(tmp_path):
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            for name, content in ((f"{'d' * 150}/{'k' * 60}.JPG", jpeg()), (f"{'d' * 150}/{'k' * 60}.txt", b"x")):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(content), 1.5
                tar.addfile(info, io.BytesIO(content))
        build(tmp_path, tmp_path / "a.tar", fresh=True)
        assert Shards(tmp_path / "set/train").key(0) == "k" * 48


def one_line(capsys, function):
    with pytest.raises(SystemExit) as status:
        data.run(function)
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert status.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", ["data", "train", "sample", "probe"])
def test_a_mistyped_option_is_one_line(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--nonsense"])
    assert f"{name}.py -h lists the options" in one_line(capsys, importlib.import_module(name).main)


def test_a_gpu_that_is_too_small_is_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore words.")

    assert "CUDA out of memory" in (said := one_line(capsys, main)) and "--micro-batch" in said


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, capsys):
    source = make_tar(tmp_path / "a.tar", good(3))
    build(tmp_path / "whole", source)
    folder = tmp_path / "out/set/train"
    folder.mkdir(parents=True)
    for name in ("00000.shard.tmp", "00000.done.tmp", "samples.bin", "meta.json.tmp"):
        (folder / name).symlink_to("/dev/full")
        said = one_line(capsys, lambda: build(tmp_path / "out", source))
        assert "No space left" in said and "make room" in said
        assert not (folder / "meta.json").exists()
        (folder / name).unlink(missing_ok=True)
    build(tmp_path / "out", source)
    assert everything(folder) == everything(tmp_path / "whole/set/train")


def test_a_limit_on_the_size_of_files_is_one_line_like_a_full_disk(tmp_path, capsys):
    source, limits = make_tar(tmp_path / "a.tar", good(3)), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        said = one_line(capsys, lambda: build(tmp_path / "out", source))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in said and "make room" in said


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    source = make_tar(tmp_path / "a.tar", good(3))
    assert "Not a directory" in one_line(capsys, lambda: build(tmp_path / "file", source))


def test_a_killed_worker_is_one_line(tmp_path, capsys, monkeypatch):
    source = make_tar(tmp_path / "a.tar", good(3))
    with monkeypatch.context() as patch:
        patch.setattr(data, "open_image", lambda *_: os.kill(os.getpid(), 9))
        assert "fewer --workers" in one_line(capsys, lambda: build(tmp_path, source))
    assert build(tmp_path, source)["samples"] == 3


@pytest.mark.parametrize("name", ["secret.jpg", "it's secret.jpg"])
def test_a_file_that_a_worker_may_not_read_is_one_line(tmp_path, capsys, monkeypatch, name):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied", name)

    source = make_tar(tmp_path / "a.tar", good(3))
    monkeypatch.setattr(data, "open_image", refused)
    assert f"Permission denied: {name!r}" in one_line(capsys, lambda: build(tmp_path, source))


def test_an_image_that_may_not_be_read_is_not_called_broken(monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "secret.jpg")

    monkeypatch.setattr(Image, "open", refused)
    with pytest.raises(data.BadSample, match="Permission denied"):
        data.open_image("secret.jpg")


@pytest.mark.parametrize("problem", [RuntimeError("a bug"), RuntimeError(), OSError("a bug")])
def test_bugs_keep_their_tracebacks(problem):
    def main():
        raise problem

    with pytest.raises(type(problem)):
        data.run(main)


def test_damage_met_by_a_loader_process_is_one_line(tmp_path, capsys):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    shard = tmp_path / "set/train/00000.shard"
    shard.write_bytes(shard.read_bytes().replace(b"P6", b"XX"))
    batches = Batches(Shards(tmp_path / "set/train"), 2, 8, 8, 0)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(2), num_workers=1)
    assert "data.py --fresh" in one_line(capsys, lambda: list(loader))


def test_loader_processes_do_not_change_batches(shapes):
    split = open_split(shapes, "shapes", "train")
    batches = Batches(split, 12, 8, 16, 3, crop_scale=0.5)
    assert batches[0]["images"].shape == (12, 8, 8, 3) and len(pickle.dumps(batches)) < 100_000
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(5), num_workers=workers)
        for k, batch in enumerate(loader):
            assert all(np.array_equal(batch[name], batches[k][name]) for name in batch)


def test_the_lengths_of_the_captions_are_printed(tmp_path, capsys, monkeypatch):
    words = ["a", "a dog runs", "a dog runs in the park"]
    files = [m for i, text in enumerate(words) for m in ((f"{i}.jpg", jpeg(20 + i, 16)), (f"{i}.txt", text.encode()))]
    build(tmp_path, make_tar(tmp_path / "a.tar", files))
    options = ["--image-size", "16", "--tokenizer", "words:50"]
    monkeypatch.setattr("sys.argv", ["data.py", "--dataset", "set", "--data-dir", str(tmp_path), *options])
    data.main()
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "tokens of a caption: mean 4.3, percentiles 5, 50, 95: [2. 4. 7.]"


# What people have: tars, folders, tables and pictures from the field.
def make_folder(folder, files):
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def keys(shards):
    return [shards.key(i) for i in range(len(shards))]


def texts(shards):
    return [[decode_caption(shards.tokenizer, c) for c in shards.captions(i)] for i in range(len(shards))]


def test_files_of_a_sample_need_not_be_neighbours_in_a_tar(tmp_path):
    members = good(4)
    build(tmp_path, make_tar(tmp_path / "a.tar", members[::2] + members[1::2]))
    shards = Shards(tmp_path / "set/train")
    assert texts(shards) == [[f"caption number {i}"] for i in range(4)] and shards.meta["skipped"] == {}


def test_most_samples_must_be_usable(tmp_path):
    without = [(f"{i:05d}.jpg", jpeg()) for i in range(90, 95)]
    source = make_tar(tmp_path / "a.tar", good(4) + without)
    with pytest.raises(UserError, match=r"only 4 samples.*'no caption': 5"):
        build(tmp_path, source)
    assert not (tmp_path / "set/train/meta.json").exists()
    make_tar(source, good(5) + without)
    assert build(tmp_path, source)["skipped"] == {"no caption": 5}


def test_sources_without_captions_do_not_remove_a_finished_split(tmp_path):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(4)))
    before = everything(tmp_path / "set/train")
    source = make_tar(tmp_path / "b.tar", [(f"{i:05d}.jpg", jpeg()) for i in range(5)])
    with pytest.raises(UserError, match="no captions, skipped: .*'no caption': 5"):
        build(tmp_path, source, fresh=True)
    assert everything(tmp_path / "set/train") == before and len(Shards(tmp_path / "set/train")) == 4


def test_junk_of_operating_systems_is_ignored_in_tars_and_folders(tmp_path):
    names = ("._00000.jpg", "__MACOSX/._00000.jpg", ".DS_Store", "Thumbs.db", ".ipynb_checkpoints/00000.jpg")
    junk = [(name, b"x" * 9) for name in names]
    pairs = good(3)
    files = pairs[:1] + junk + pairs[1:]
    for source in (make_tar(tmp_path / "a.tar", files), make_folder(tmp_path / "a", files)):
        build(tmp_path, source, fresh=True)
        shards = Shards(tmp_path / "set/train")
        assert keys(shards) == ["00000", "00001", "00002"] and shards.meta["skipped"] == {}
    assert data.is_junk("a/__MACOSX/b.jpg") and data.is_junk(Path("._b.jpg")) and not data.is_junk("./a/b.jpg")


def test_links_inside_a_source_are_followed_once(tmp_path):
    make_folder(tmp_path / "elsewhere", good(2))
    source = make_folder(tmp_path / "in", good(2, 5))
    (source / "more").symlink_to(tmp_path / "elsewhere")
    (source / "loop").symlink_to(source)
    build(tmp_path, source)
    assert sorted(keys(Shards(tmp_path / "set/train"))) == ["00000", "00001", "00005", "00006"]
    (source / "gone.jpg").symlink_to("nowhere")
    assert str(source / "gone.jpg") in data.list_files(source, set())
    with pytest.raises(FileNotFoundError, match="gone.jpg"):
        build(tmp_path, source, fresh=True)


def test_an_existing_path_wins_over_a_pattern(tmp_path):
    folder = tmp_path / "cc3m [2024] {a,b}"
    make_folder(folder, good(3))
    make_tar(folder / "7.tar", good(2, 7))
    for source, count in ((folder, 5), (folder / "*.tar", 2)):
        assert build(tmp_path, source, fresh=True)["samples"] == count


def test_patterns_and_names_may_have_brackets(tmp_path):
    names = [str(tmp_path / name) for name in ("a08.tar", "a11.tar", "a1[0].tar", "{x,y}")]
    for name in (*names, tmp_path / "a1.tar"):
        Path(name).touch()
    assert data.find_sources([f"{tmp_path}/a[01][0-9].tar"]) == names[:2]
    assert data.find_sources([f"{tmp_path}/a1[0].tar", f"{tmp_path}/{{x,y}}"]) == names[2:]
    with pytest.raises(UserError, match=r"a\{08..11\}.tar: no such file or folder; type .* without quotes"):
        data.find_sources([f"{tmp_path}/a{{08..11}}.tar"])


def test_two_stars_find_tars_at_any_depth(tmp_path):
    for name in ("a.tar", "1/b.tar", "1/2/c.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert len(data.find_sources([f"{tmp_path}/**/*.tar"])) == 3


def test_a_folder_as_the_hugging_face_hub_fills_it(tmp_path):
    folder = tmp_path / "hf"
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for name in ("a", "b"):
        make_tar(folder / f"{name}.tar", good(2))
        for kind in ("metadata", "lock"):
            (notes / f"{name}.tar.{kind}").write_text("1")
    assert build(tmp_path, folder)["samples"] == 4
    (folder / "c.tar.gz").touch()
    with pytest.raises(UserError, match="c.tar.gz: unpack them"):
        build(tmp_path, folder, fresh=True)


def test_hundreds_of_files_that_are_no_tars_get_one_short_line(tmp_path):
    """As after a clone without `git lfs pull`."""
    for i in range(300):
        (tmp_path / f"{i}.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for expected in ("no captions, skipped: .*0.tar is cut short", "only 2 samples can be used, skipped: .*0.tar is cut"):
        with pytest.raises(UserError, match=expected) as told:
            build(tmp_path, tmp_path / "*.tar")
        assert len(str(told.value)) < 600
        make_tar(tmp_path / "good.tar", good(2))


def test_a_source_given_twice_counts_twice(tmp_path, script):
    tars = [make_tar(tmp_path / f"{name}.tar", good(2, start)) for name, start in (("a", 0), ("b", 5))]
    said = script("data.py", "--dataset", "set", "--data-dir", tmp_path, "--tokenizer", "words:9", "--workers", 1,
                  "--source", tars[0], "--source", tars[1]).stdout
    assert "4 images" in said


def test_a_validation_split_of_the_training_images_is_refused(tmp_path):
    for source in (make_tar(tmp_path / "a.tar", good(3)), make_folder(tmp_path / "a", good(3))):
        build(tmp_path, source, fresh=True)
        with pytest.raises(UserError, match="--source: expected other images than of .*set/train"):
            build(tmp_path, source, "val", fresh=True)
        other = make_tar(tmp_path / "b.tar", good(2, 7))
        build(tmp_path, other, "val", fresh=True)
        with pytest.raises(UserError, match="--source: expected other images than of .*set/val"):
            build(tmp_path, other, fresh=True)


def test_fresh_repairs_a_split_beside_a_damaged_one(tmp_path):
    first, second = make_tar(tmp_path / "a.tar", good(3)), make_tar(tmp_path / "b.tar", good(2, 7))
    build(tmp_path, first)
    build(tmp_path, second, "val")
    for split in ("train", "val"):
        (tmp_path / "set" / split / "samples.bin").write_bytes(b"")
    assert build(tmp_path, first, fresh=True)["samples"] == 3, "its sibling is still damaged"
    assert build(tmp_path, second, "val", fresh=True)["samples"] == 2
    assert [len(Shards(tmp_path / "set" / split)) for split in ("train", "val")] == [3, 2]


def test_every_source_that_does_not_exist_is_named_in_a_short_line(tmp_path):
    make_folder(tmp_path / "a", good(2))
    with pytest.raises(UserError, match="b: no such"):
        prepare("set", "train", tmp_path, [str(tmp_path / "a"), str(tmp_path / "b")], tokenizer="words:9")
    with pytest.raises(UserError, match="00001.tar: no such file or folder$") as problem:
        prepare("set", "train", tmp_path, [f"{i:05d}.tar" for i in range(1, 7300)])
    assert len(str(problem.value)) < 500
    with pytest.raises(UserError, match="00000.jpg: expected a folder"):
        build(tmp_path, tmp_path / "a" / "*.jpg")


def test_the_images_of_a_table_are_found_in_all_sources(tmp_path, capsys):
    for folder, first in (("train2014", 0), ("val2014/deep", 3)):
        make_folder(tmp_path / folder, [(f"{i}.jpg", jpeg()) for i in range(first, first + 3)])
    rows = "".join(f"{i}.jpg,picture {i}\n" for i in range(6))
    (tmp_path / "c.csv").write_text(rows + "val2014/deep/5.jpg,once more\nmissing.jpg,x\n")
    sources = [str(tmp_path / "train2014"), str(tmp_path / "val2014")]
    options = {"captions": str(tmp_path / "c.csv"), "image_size": 16, "tokenizer": "words:50", "workers": 1}
    meta = prepare("set", "train", tmp_path, sources, **options)
    assert meta["samples"] == 7 and meta["skipped"] == {"no image": 1}
    assert "note: no image for missing\n" in capsys.readouterr().err
    make_folder(tmp_path / "train2014", [("deep/5.jpg", jpeg())])
    with pytest.raises(UserError, match="5.jpg is both of .*train2014/deep/5.jpg, .*val2014/deep/5.jpg"):
        prepare("set", "val", tmp_path, sources, **options)
    with pytest.raises(UserError, match="a.tar: expected a folder"):
        build(tmp_path, make_tar(tmp_path / "a.tar", good(1)), captions=options["captions"], fresh=True)


def test_a_row_never_gets_an_image_that_another_row_may_mean(tmp_path):
    make_folder(tmp_path / "in" / "dogs", [("1.jpg", jpeg())])
    for rows, used in (("cats/1.jpg,a cat\ndogs/1.jpg,a dog\n", ["a dog"]), ("elsewhere/1.jpg,a dog\n", ["a dog"])):
        (tmp_path / "c.csv").write_text(rows)
        build(tmp_path, tmp_path / "in", captions=str(tmp_path / "c.csv"), fresh=True)
        assert texts(Shards(tmp_path / "set/train")) == [used]


def test_folders_in_a_table_may_be_relative_sources_or_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("train", "val"):
        make_folder(tmp_path / folder, [("1.jpg", jpeg())])
    (tmp_path / "c.csv").write_text(f"train/1.jpg,a dog\n{tmp_path}/val/1.jpg,a cat\n")
    options = {"captions": "c.csv", "image_size": 16, "tokenizer": "words:50", "workers": 1}
    assert prepare("set", "train", tmp_path, ["train", "val"], **options)["samples"] == 2


def test_corrected_captions_and_added_files_are_noticed(tmp_path):
    source = make_folder(tmp_path / "in", good(3))
    build(tmp_path, source)
    moved = source.rename(tmp_path / "moved")
    assert build(tmp_path, moved)["samples"] == 3
    for change in (lambda: make_folder(moved, good(1, 9)), lambda: (moved / "00001.txt").write_text("corrected")):
        change()
        with pytest.raises(UserError, match="sources was .* now .*--fresh"):
            build(tmp_path, moved)
        build(tmp_path, moved, fresh=True)
    assert ["corrected"] in texts(Shards(tmp_path / "set/train"))
    table = tmp_path / "c.csv"
    for name in ("a dog", "a cat"):
        table.write_text(f"00000.jpg,{name}\n")
        build(tmp_path / name, moved, captions=str(table))
    with pytest.raises(UserError, match="sources was"):
        build(tmp_path / "a dog", moved, captions=str(table))


def test_a_killed_run_leaves_no_process_that_keeps_the_folder(tmp_path):
    """The loader's result of many samples must not wait in a pipe that nobody reads."""
    make_tar(tmp_path / "a.tar", good(2500))
    command = [data.__file__, "--dataset", "set", "--source", tmp_path / "a.tar", "--data-dir", tmp_path]
    command += ["--tokenizer", "words:50", "--image-size", "16", "--workers", "1"]
    run = subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.DEVNULL)
    folder = tmp_path / "set/train"
    wait_for(lambda: (folder / "00000.shard.tmp").exists())
    run.kill()
    run.wait()

    def is_free():
        with contextlib.suppress(UserError), data.lock(folder):
            return True

    wait_for(is_free)


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def test_unfinished_shards_of_other_sources_are_made_again(tmp_path, monkeypatch):
    for i in range(2):
        make_tar(tmp_path / f"{i}.tar", good(4, 10 * i))
    write_json = data.write_json
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_json", lambda path, value: write_json(path, value | {1: 1 / (path.name != "00001.done")}))
        with pytest.raises(ZeroDivisionError):
            build(tmp_path, tmp_path / "*.tar")
    assert (tmp_path / "set/train/00000.done").exists()
    make_tar(tmp_path / "0.tar", good(5, 50))
    (tmp_path / "1.tar").unlink()
    build(tmp_path, tmp_path / "*.tar")
    assert keys(Shards(tmp_path / "set/train")) == [f"{i:05d}" for i in range(50, 55)]
    assert {path.name for path in (tmp_path / "set/train").iterdir()} == {
        ".lock", "00000.shard", "meta.json", "samples.bin"}


def test_file_systems_without_locks_will_do(tmp_path, monkeypatch, capsys):
    def nothing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(data.fcntl, "flock", nothing)
    assert build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))["samples"] == 3
    said = capsys.readouterr().err
    assert said.count("note: ") == 1 and "no lock (Function not implemented)" in said


def test_a_locked_folder_is_refused_until_it_is_free(tmp_path):
    with data.lock(tmp_path):
        with pytest.raises(UserError, match="another process"):
            data.lock(tmp_path)
    data.lock(tmp_path).close()


RAMP = np.arange(0, 256, 4, dtype=np.uint8)[None].repeat(16, 0)


def red(image):
    """The middle row of an image as open_image gives it."""
    if isinstance(image, bytes):
        return np.asarray(data.open_image(io.BytesIO(image)))[8, :, 0].astype(int)
    return np.asarray(data.to_rgb(image))[8, :, 0].astype(int)


def saved(image, form, **options):
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"])
def test_a_ramp_in_any_mode_stays_a_ramp(mode):
    grey = Image.fromarray(RAMP)
    if mode in ("P", "PA"):
        image = Image.fromarray(RAMP)
        image.putpalette([value for value in range(256) for _ in range(3)])
        if mode == "PA":
            image.putalpha(255)
    else:
        image = grey.convert("RGB").convert(mode, dither=Image.Dither.NONE)
    assert image.mode == mode
    expected = 255 * (RAMP[8] > 127) if mode == "1" else RAMP[8]
    assert np.abs(red(image) - expected).max() <= 2


def test_sixteen_bits_are_scaled():
    deep = RAMP.astype(np.uint16) * 257
    image = Image.fromarray(deep)
    assert image.mode == "I;16"
    chunk = png_chunk(b"tRNS", b"\0\0")
    plain = saved(image, "PNG")
    place = plain.index(b"IDAT") - 4
    pictures = {
        "I;16": image,
        "I": Image.fromarray(deep.astype(np.int32)),
        "PNG": plain,
        "PNG with tRNS": plain[:place] + chunk + plain[place:],
        "PGM": b"P5\n64 16\n65535\n" + deep.astype(">u2").tobytes(),
        "12 bits": b"P5\n64 16\n4095\n" + (deep >> 4).astype(">u2").tobytes(),
    }
    for name, picture in pictures.items():
        assert np.abs(red(picture) - RAMP[8]).max() <= 1, name


def test_jpegs_of_printers_keep_their_greys():
    """CMYK as Adobe writes it, inverted; and YCCK, which is CMYK through a colour transform."""
    cmyk = saved(Image.fromarray(RAMP).convert("RGB").convert("CMYK"), "JPEG", quality=100)
    assert np.abs(red(cmyk) - RAMP[8]).max() <= 3
    layers = [Image.fromarray(RAMP), *(Image.new("L", (64, 16), value) for value in (127, 127, 0))]
    ycck = bytearray(saved(Image.merge("CMYK", layers), "JPEG", quality=100))
    ycck[ycck.index(b"Adobe") + 11] = 2
    assert np.abs(red(bytes(ycck)) - RAMP[8]).max() <= 3


def test_large_metadata_is_read_and_limits_are_named():
    from PIL import PngImagePlugin

    def picture(size, profile):
        text = PngImagePlugin.PngInfo()
        text.add_text("workflow", "w" * size, zip=True)
        return saved(Image.new("RGB", (40, 40)), "PNG", pnginfo=text, icc_profile=b"q" * profile)

    assert data.open_image(io.BytesIO(picture(1_500_000, 2_000_000))).size == (40, 40)
    limits = {
        "image data is broken": picture(9, 1 << 25),
        "image above 50 megapixels": png(9000, 6000, b""),
        "image side below 8 pixels": png(7, 7, b""),
        "ratio above 10:1": png(400, 39, b""),
        "image above 50 megapixels ": png(20_000, 20_000, b""),
    }
    for reason, file in limits.items():
        with pytest.raises(data.BadSample, match=reason.strip()):
            data.open_image(io.BytesIO(file))


def test_byte_order_marks_are_no_part_of_captions_or_names(tmp_path):
    encoding = "utf-8-sig"
    files = [("0.jpg", jpeg()), ("0.txt", "dog one\r\n".encode(encoding)), ("1.jpg", jpeg())]
    files += [("1.json", '{"caption": "dog two"}'.encode(encoding))]
    build(tmp_path, make_folder(tmp_path / "in", files))
    assert texts(Shards(tmp_path / "set/train")) == [["dog one"], ["dog two"]]
    (tmp_path / "c").write_bytes("0.jpg#0\ta dog\r\n1.jpg#0\ta cat\r\n".encode(encoding))
    assert data.read_table(str(tmp_path / "c"), "train") == [("0.jpg", ["a dog"]), ("1.jpg", ["a cat"])]


def test_pieces_are_the_same_to_re_and_to_tiktoken():
    words = ["एक कुत्ता घास पर दौड़ रहा है।", "สุนัข วิ่ง บน หญ้า", "ஒரு நாய் ஓடுகிறது", "собака бежит", "كَلْبٌ يَجْرِي",
             unicodedata.normalize("NFD", "ein Mädchen läuft über die Straße"), "half ½ x² a_b no.7!", "ক্ষ कर्‍ता", "dog\u2019s"]
    for text in words[:3]:
        assert len(re.findall(data.PIECE, text)) == len(text.split()) + text.endswith("।")
    rng = random.Random(0)
    points = [i for i in range(0x20, 0x20000) if not 0xD800 <= i < 0xE000 and unicodedata.category(chr(i)) != "Cn"]
    words += ["".join(chr(rng.choice(points)) for _ in range(9)) for _ in range(3000)]
    words = [data.clean_caption(text) for text in words]
    pieces = [re.findall(data.PIECE, text) for text in words]
    counts = data.Counter(piece for some in pieces for piece in some)
    tokenizer = data.load_tokenizer(data.words_tokenizer(f"words:{len(counts)}", counts))
    differ = [text for text, some in zip(words, pieces, strict=True) if len(tokenizer.encode_ordinary(text)) != len(some)]
    assert not set(differ) & set(words[:9]) and len(differ) < 30, differ  # letters that only one of them knows


def table(tmp_path, content, split="train"):
    path = tmp_path / "tokenized.whatever"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return data.read_table(str(path), split)


@pytest.mark.parametrize(
    "content",
    [
        "image,caption\n0.jpg,a dog\n1.jpg,a cat\n",
        "0.jpg,a dog\n1.jpg,a cat\n",
        '"image","caption"\r\n"0.jpg","a dog"\r\n\r\n1.jpg, a cat',
        "0.jpg#0\ta dog\n1.jpg#0\ta cat\n",
        "filepath\ttitle\n0.jpg\ta dog\n1.jpg\ta cat\n",
        "image.file_name,caption\n0.jpg,a dog\n1.jpg,a cat\n",
        "image;caption\n0.jpg;a dog\n1.jpg;a cat\n",
        "image_name| comment_number| comment\n0.jpg| 0| a dog\n1.jpg| 4   a cat\n",
        "image_name,comment_number,comment\n0.jpg,0,a dog\n1.jpg, 4, a cat\n",
        json.dumps([{"image": "0.jpg", "caption": ["a dog"]}, {"image": "1.jpg", "caption": "a cat"}]),
    ],
)
def test_a_table_is_known_by_its_content(tmp_path, content):
    assert [(name, [c.strip() for c in some]) for name, some in table(tmp_path, content)] == [
        ("0.jpg", ["a dog"]), ("1.jpg", ["a cat"])]


def test_a_caption_may_start_with_a_number(tmp_path):
    """Without a header that names comment numbers, a digit and a comma are part of the caption."""
    assert table(tmp_path, 'image,caption\n0.jpg,"5, six"\n') == [("0.jpg", ["5, six"])]
    with pytest.raises(UserError, match="line 2 .* has 3 columns"):
        table(tmp_path, "image,caption\n0.jpg,1,000 birds\n")


def test_captions_without_sources_ask_for_them(tmp_path):
    (tmp_path / "c.csv").write_text("0.jpg,a dog\n")
    with pytest.raises(UserError, match="--source: expected"):
        prepare("set", "train", tmp_path, captions=str(tmp_path / "c.csv"), tokenizer="words:9", workers=1)


def test_a_source_that_is_not_there_is_named_beside_a_finished_split(tmp_path, capsys):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    assert build(tmp_path, tmp_path / "typo")["samples"] == 3
    assert f"not compared: --source {tmp_path}/typo: no such file" in capsys.readouterr().err


def test_only_the_number_of_flickr_keys_is_cut_off(tmp_path):
    rows = "a#1.jpg#0\tone\na#1.jpg#1\ttwo\n#2.jpg#0\tthree, four\n"
    assert table(tmp_path, rows) == [("#2.jpg", ["three, four"]), ("a#1.jpg", ["one", "two"])]
    assert table(tmp_path, "a#1.jpg,one\nb#22,jpg\n")[0] == ("a#1.jpg", ["one"])


@pytest.mark.parametrize(
    "content, row",
    [
        ("image,caption\n0.jpg,a dog\n1.jpg,a dog, a cat\n", "line 3 .1.jpg,a dog,a cat. has 3 columns, not 2"),
        ("0.jpg\ta dog\n1.jpg\n", "line 2 .1.jpg. has 1 columns, not 2"),
        ("image,caption,split\n0.jpg,a dog,train\n", "line 1 .image,caption,split. has 3 columns, not 2"),
        ('0.jpg,a dog\n1.jpg,"a "big" dog"\n', "after 1 good images"),
        ('0.jpg,a dog\n1.jpg,"a dog\n2.jpg,a cat\n', "after 1 good images"),
        ('[{"image": "0.jpg", "caption": "a dog"}, {"image": "1.jpg", "caption": 7}]', "after 1 good images"),
        ('{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "KeyError after 0 good images"),
        ('{"images": 7}', "after 0 good images"),
        ("[" * 9999, "RecursionError"),
        (b"0.jpg,\xff\n", "UnicodeDecodeError"),
        ("", "no captions"),
    ],
)
def test_a_bad_row_is_an_error_that_says_which(tmp_path, content, row):
    with pytest.raises(UserError, match=row):
        table(tmp_path, content)


def test_karpathys_splits_are_kept_apart(tmp_path):
    splits = ["train", "restval", "val", "test"]
    images = [{"filename": f"{i}.jpg", "split": name, "sentences": [{"raw": f"a {name} {j}"} for j in range(2)]}
              for i, name in enumerate(splits)]
    assert table(tmp_path, json.dumps({"images": images}), "val") == [("2.jpg", ["a val 0", "a val 1"])]
    for image in images:
        image["filepath"] = "val2014"
    content = json.dumps({"images": images, "dataset": "coco"})
    made = {split: [name for name, _ in table(tmp_path, content, split)] for split in ("train", "val", "test")}
    assert made == {"train": ["val2014/0.jpg", "val2014/1.jpg"], "val": ["val2014/2.jpg"], "test": ["val2014/3.jpg"]}
    with pytest.raises(UserError, match="no captions of the split test"):
        table(tmp_path, json.dumps({"images": images[:3]}), "test")
    make_folder(tmp_path / "coco/val2014", [(f"{i}.jpg", jpeg()) for i in range(4)])
    (tmp_path / "dataset_coco.json").write_text(content)
    for split in splits[::2] + ["test"]:
        for source in ("coco", "coco/val2014"):
            build(tmp_path, tmp_path / source, split, captions=str(tmp_path / "dataset_coco.json"), fresh=True)
    assert texts(open_split(tmp_path, "set", "test")) == [["a test 0", "a test 1"]]
    assert len(open_split(tmp_path, "set", "train")) == 2


@pytest.mark.parametrize("name", ["positive_int", "non_negative_int", "positive_float", "non_negative_float", "fraction"])
def test_types_of_options_refuse_in_one_line(name):
    whole = name.endswith("int")
    good = {"positive_int": ["1", "1000"], "non_negative_int": ["0"], "positive_float": ["1e-9", "7"],
            "non_negative_float": ["0", "1e9"], "fraction": ["1", "0.1"]}[name]
    bad = ["-1", "nan", "x", "", str(1 << 63), "9" * 5000]
    bad += {"positive_int": ["0", "1.5"], "positive_float": ["0", "inf"], "fraction": ["0", "1.01"]}.get(name, ["1.5" if whole else "inf"])
    parser = data.Parser("")
    parser.add_argument("--x", type=getattr(data, name))
    for text in good:
        assert parser.parse_args(["--x", text]).x == (int if whole else float)(text)
    for text in bad:
        with pytest.raises(UserError, match="argument --x: .*expected a"):
            parser.parse_args([f"--x={text}"])


def test_ctrl_c_is_one_line(tmp_path):
    noise = saved(Image.effect_noise((1500, 1500), 50).convert("RGB"), "PNG", compress_level=0)
    for number in range(6):
        make_tar(tmp_path / f"{number}.tar", [m for i in range(20) for m in ((f"{i}.png", noise), (f"{i}.txt", b"x"))])
    words = ["--dataset", "set", "--source", "*.tar", "--tokenizer", "words:9", "--workers", "2"]
    with open(tmp_path / "said.txt", "w") as said:
        # A shell's background jobs ignore Ctrl-C, these tests among them.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen([sys.executable, data.__file__, *words], cwd=tmp_path, stderr=said,
                                   start_new_session=True, preexec_fn=heed)
    while process.poll() is None and not [*tmp_path.glob("data/set/train/00000.*")]:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    said = (tmp_path / "said.txt").read_text()
    assert said.endswith("interrupted\n") and "Traceback" not in said


def test_a_closed_pipe_and_names_that_are_not_utf_8_are_no_tracebacks(tmp_path):
    main = "import data, os; data.run(lambda: [print(os.fsdecode(b'caf\\xe9'), flush=True) for _ in range(100_000)])"
    process = subprocess.Popen([sys.executable, "-c", main], cwd=Path(data.__file__).parent, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    assert process.stdout.readline() == b"caf\\udce9\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 1


def test_names_that_are_not_utf_8_are_read(tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    for letter in (b"\xe8", b"\xe9"):
        for end, content in ((b".jpg", jpeg()), (b".txt", b"a cup of coffee")):
            Path(os.fsdecode(folder + b"/caf" + letter + end)).write_bytes(content)
    with tarfile.open(tmp_path / "a.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        tar.add(tmp_path / "in", ".")
    for source in (tmp_path / "in", tmp_path / "a.tar"):
        assert build(tmp_path, source, fresh=True)["samples"] == 2


def test_the_next_command_can_be_typed(tmp_path, script):
    make_tar(tmp_path / "my tars.tar", good(3))
    words = ["--data-dir", tmp_path / "my data", "--tokenizer", "words:9", "--image-size", 16, "--workers", 1]
    for again in (False, True):
        done = script("data.py", "--dataset", "set", "--source", tmp_path / "my tars.tar", *words)
        assert done.stdout == (
            "set, train: 3 images, 3 captions; skipped: none\n"
            "tokens of a caption: mean 4.0, percentiles 5, 50, 95: [4. 4. 4.]\n"
            f"next: python train.py --dataset set --data-dir '{tmp_path}/my data' --image-size 16\n")
        assert ("was finished earlier, see --fresh" in done.stderr) == again


def test_a_mistyped_source_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file"):
        build(tmp_path / "out", tmp_path / "nowhere")
    with pytest.raises(UserError, match="--source: expected"):
        prepare("set", "train", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finished_shapes_need_no_lock(shapes, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_SAMPLES", {"train": 96, "val": 150})
    monkeypatch.setattr(data, "lock", None)  # as a folder that cannot be written
    assert prepare("shapes", "train", shapes, image_size=16, tokenizer="words:100")["samples"] == 96


def test_output_may_be_captured_or_closed(monkeypatch):
    monkeypatch.setattr("sys.stdout", output := io.StringIO())
    data.run(lambda: print("captured"))
    assert output.getvalue() == "captured\n"
    monkeypatch.setattr("sys.stdout", None)  # as `>&-`
    data.run(lambda: print("lost"))


def test_digests_are_those_of_the_shards(tmp_path):
    sources = [make_folder(tmp_path / f"in{start}", good(3, start)) for start in (0, 10)]
    for folder, source in zip("abc", (sources[0], *sources), strict=True):
        build(tmp_path / folder, source)
    digests = [Shards(tmp_path / folder / "set/train").digest for folder in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_shapes_say_an_orange():
    captions = {data.draw_shapes(seed, 8)[1] for seed in range(60)}
    assert any("of an orange background" in text for text in captions)
    assert all(SHAPES_CAPTION.fullmatch(text) for text in captions) and not any(" a orange" in text for text in captions)
