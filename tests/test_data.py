"""data.py: what goes into a shard comes out again, and nothing bad gets in."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import tarfile
import time
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
    return prepare("set", split, folder, [str(source)], image_size=16, tokenizer="words:50", workers=1, **options)


def everything(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_shapes_captions_say_what_is_drawn(shapes):
    split = open_split(shapes, "shapes", "train")
    assert len(split) == 96 and set(split.meta["files"]) == {f"0000{i}.shard" for i in range(3)} | {"samples.bin"}
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
    meta = build(tmp_path / "out", make_tar(tmp_path / "a.tar", good(3) + bad + good(2, 3)))
    assert meta["samples"] == 5
    assert meta["skipped"] == {
        "tar member is not a file": 1,
        "image data is broken": 1,
        "not a JPEG, PNG or WebP image": 2,
        "no caption": 3,
        "caption is not UTF-8": 1,
        "broken JSON": 2,
        "no image": 1,
        "image of an absurd size": 1,
        "file is too large": 1,
    }
    assert not (tmp_path / "passwd").exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2 + 100], lambda b: b[:1100], lambda b: b"not a tar" * 99])
def test_a_damaged_tar_costs_only_itself(tmp_path, damage):
    make_tar(tmp_path / "a.tar", good(3))
    whole = make_tar(tmp_path / "b.tar", good(6, 10)).read_bytes()
    (tmp_path / "b.tar").write_bytes(damage(whole))
    meta = build(tmp_path / "out", tmp_path / "*.tar")
    assert 3 <= meta["samples"] < 9 and meta["skipped"]["tar is cut short or damaged"] == 1


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
    build(tmp_path / "tar", make_tar(tmp_path / "a.tar", members))
    expected = (tmp_path / "tar/set/train/00000.shard").read_bytes()
    build(tmp_path / "folder", files.parent)
    assert (tmp_path / "folder/set/train/00000.shard").read_bytes() == expected
    for table in ("captions.txt", "flickr.token.txt", "captions_val.json"):
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
            time.sleep(60)
        write_json(path, value)

    monkeypatch.setattr(data, "write_json", stops_after_the_first)
    child = multiprocessing.get_context("fork").Process(target=build, args=(tmp_path / "cut", tmp_path / "*.tar"))
    child.start()
    while not (folder / "00001.samples").exists():
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
    make_tar(tmp_path / "a.tar", good(3))
    with pytest.raises(UserError, match="not one usable sample.*'no caption': 3"):
        build(tmp_path, tmp_path / "a.tar", caption_key="alt")
    assert (tmp_path / "set/train/00000.done").exists() and build(tmp_path, tmp_path / "a.tar")["samples"] == 3


def test_a_finished_split_needs_its_sources_no_more(tmp_path):
    meta = build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    (tmp_path / "a.tar").unlink()
    assert build(tmp_path, tmp_path / "a.tar") == json.loads(json.dumps(meta))


def test_other_options_and_a_second_process_are_refused(tmp_path):
    make_tar(tmp_path / "a.tar", good(3))
    build(tmp_path / "out", tmp_path / "a.tar")
    with pytest.raises(UserError, match="caption_key was None, now alt"):
        build(tmp_path / "out", tmp_path / "a.tar", caption_key="alt")
    with pytest.raises(UserError, match="tokenizer was .*words:50.*, now .*words:9"):
        prepare("set", "train", tmp_path / "out", [str(tmp_path / "a.tar")], image_size=16, tokenizer="words:9")
    with open(tmp_path / "out/set/train/.lock", "w") as lock:
        data.fcntl.flock(lock, data.fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            build(tmp_path / "out", tmp_path / "a.tar")


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
        {"files": {}},
        {"files": {"samples.bin": {"bytes": 10**12, "sha256": ""}}},
        {"files": []},
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
    assert build(tmp_path, tmp_path / "a.tar", "val")["tokenizer"] == train["tokenizer"]
    with pytest.raises(UserError, match="train has words:50"):
        prepare("set", "val", tmp_path, [str(tmp_path / "a.tar")], image_size=16, tokenizer="words:9", fresh=True)


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
        with pytest.raises(UserError, match="verify"):
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
    with pytest.raises(UserError, match="verify"):
        Shards(folder).captions(1)


def test_a_picture_that_lies_about_its_size_is_refused(tmp_path):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    shard = tmp_path / "set/train/00000.shard"
    for size in (b"99 99", b"0 16 ", b"9" * 5):
        shard.write_bytes(shard.read_bytes().replace(b"P6\n20 16", b"P6\n" + size, 1))
        with pytest.raises(UserError, match="verify"):
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


def test_verify_names_the_bad_shard(tmp_path):
    for i in range(3):
        make_tar(tmp_path / f"{i}.tar", good(2, 10 * i))
    build(tmp_path, tmp_path / "*.tar")
    data.verify(tmp_path / "set/train")
    content = bytearray((tmp_path / "set/train/00001.shard").read_bytes())
    content[7] ^= 1
    (tmp_path / "set/train/00001.shard").write_bytes(content)
    with pytest.raises(UserError, match="train: 00001.shard not"):
        data.verify(tmp_path / "set/train")


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
        assert image.size == (sample["width"], sample["height"]) == (20, 16)
        assert tokenizer.decode(tokens[:-1].tolist()) == f"caption number {int(sample['key'])}"
        assert tokens[-1] == tokenizer.eot_token


def test_held_out_samples_take_the_place_of_a_missing_val(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HELD_OUT", 0.3)
    make_tar(tmp_path / "a.tar", good(30))
    make_tar(tmp_path / "b.tar", good(30, 30))
    build(tmp_path, tmp_path / "*.tar")
    train, val = (open_split(tmp_path, "set", split) for split in ("train", "val"))
    keys = [{split.key(i) for i in range(len(split))} for split in (train, val)]
    assert len(keys[0] | keys[1]) == 60 and not keys[0] & keys[1] and 5 < len(val) < 30
    monkeypatch.setattr(data, "HELD_OUT_MOST", 7)
    train, val = (open_split(tmp_path, "set", split) for split in ("train", "val"))
    assert 5 <= len(val) <= 7 and len(train) + len(val) == 60
    assert not {train.key(i) for i in range(len(train))} & {val.key(i) for i in range(len(val))}


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
    orders = [[data.shuffled(i, count, 5, epoch) for i in range(count)] for epoch in (0, 1)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 17 or orders[0] != orders[1]


@pytest.mark.parametrize("captions", [1, 3])
def test_batches_do_not_depend_on_processes_or_accumulation(shapes, captions):
    split = open_split(shapes, "shapes", "train")
    options = {"batch_size": 12, "image_size": 8, "max_tokens": 16, "seed": 3, "crop_scale": 0.5, "flip": True}
    options["captions"] = captions
    whole, place = Batches(split, **options)[5], {}
    for row, i in enumerate(whole["index"].tolist()):
        place[i] = row
    for world, accumulation in ((1, 1), (2, 1), (1, 3), (2, 2)):
        parts = [
            Batches(split, **options, rank=rank, world=world, accumulation=accumulation)[5 * accumulation + micro]
            for rank in range(world)
            for micro in range(accumulation)
        ]
        index = torch.cat([part["index"] for part in parts])
        assert sorted(index.tolist()) == list(range(12 * captions))
        rows = torch.tensor([place[i] for i in index.tolist()])
        for name in ("tokens", "noise"):
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name][rows])
        assert torch.equal(torch.cat([part["images"] for part in parts]), whole["images"][rows[::captions] // captions])
        assert all(part["u"] == whole["u"] for part in parts)


def test_an_image_comes_with_several_captions_and_noise_for_each(tmp_path):
    texts = ["one dog", "two dogs run", "three"]
    members = [("a.jpg", jpeg()), ("a.json", json.dumps({"captions": texts}).encode())]
    build(tmp_path, make_tar(tmp_path / "a.tar", members))
    split = Shards(tmp_path / "set/train")
    for captions in (1, 2, 3, 5):
        batch = Batches(split, 2, 8, 16, 0, captions=captions)[0]
        words = [decode_caption(split.tokenizer, row) for row in batch["tokens"]]
        assert len(batch["images"]) == 2 and len(words) == 2 * captions == len(batch["noise"].unique(dim=0))
        for some in (words[:captions], words[captions:]):
            assert set(some) <= set(texts) and len(set(some)) == min(3, captions)


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


def test_flickr8k_keeps_all_captions(photographs, tmp_path):
    meta = (
        prepare("f", "val", tmp_path, [str(photographs / "flickr8k-val-00000.tar")], image_size=32, tokenizer="gpt2")
        if (photographs.parent / "tokenizers").exists()
        else pytest.skip("no GPT-2 files")
    )
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
PAIRS = b"".join(member(*each) for each in good(2))
HOSTILE_TARS = {
    "gigabyte caption": ([member("x.jpg", jpeg()), header("x.txt", HUGE), HUGE], {"file is too large": 1}),
    "gigabyte image": ([header("x.jpg", HUGE), HUGE, member("x.txt", b"x")], {"file is too large": 1}),
    "gigabyte JSON": ([member("x.jpg", jpeg()), header("x.json", HUGE), HUGE], {"file is too large": 1}),
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
    "backward member": ([header("x.txt", -512)], {"tar is cut short or damaged": 1}),
    "beyond the end": ([header("x.txt", 1 << 32)], {"tar is cut short or damaged": 1}),
}


@pytest.mark.parametrize("name", HOSTILE_TARS)
def test_hostile_tars_cost_little_and_are_counted(tmp_path, name):
    parts, losses = HOSTILE_TARS[name]
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(PAIRS)
        for part in parts:
            file.write(part) if isinstance(part, bytes) else file.seek(part, 1)
        ended = "tar is cut short or damaged" in losses
        file.write(bytes(1024) if ended else b"".join(member(*each) for each in good(1, 7)) + bytes(1024))
    before = set(tmp_path.parent.rglob("*"))
    meta = build(tmp_path / "out", tmp_path / "a.tar")
    assert meta["samples"] == 3 - ended + ("again" in name) and meta["skipped"] == losses
    assert all(path.is_relative_to(tmp_path / "out") for path in set(tmp_path.parent.rglob("*")) - before)
    read = lambda: list(data.read_tar(tmp_path / "a.tar", data.MAX_BYTES, data.Counter()))  # noqa: E731
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
    expected = build(tmp_path / "whole", source)["files"]
    folder = tmp_path / "out/set/train"
    folder.mkdir(parents=True)
    for name in ("00000.shard.tmp", "00000.done.tmp", "samples.bin", "meta.json.tmp"):
        (folder / name).symlink_to("/dev/full")
        said = one_line(capsys, lambda: build(tmp_path / "out", source))
        assert "No space left" in said and "make room" in said
        assert not (folder / "meta.json").exists()
        (folder / name).unlink(missing_ok=True)
    assert build(tmp_path / "out", source)["files"] == expected


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


def test_damage_met_by_a_loader_process_is_one_line(tmp_path, capsys):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    shard = tmp_path / "set/train/00000.shard"
    shard.write_bytes(shard.read_bytes().replace(b"P6", b"XX"))
    batches = Batches(Shards(tmp_path / "set/train"), 2, 8, 8, 0)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(2), num_workers=1)
    assert "data.py --verify" in one_line(capsys, lambda: list(loader))


def test_loader_processes_do_not_change_batches(shapes):
    split = open_split(shapes, "shapes", "train")
    batches = Batches(split, 12, 8, 16, 3, crop_scale=0.5)
    assert batches[0]["images"].shape == (12, 8, 8, 3) and len(pickle.dumps(batches)) < 100_000
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(5), num_workers=workers)
        for k, batch in enumerate(loader):
            assert all(np.array_equal(batch[name], batches[k][name]) for name in batch)


def test_stats_are_those_of_the_shards(tmp_path, capsys):
    words = ["a", "a dog runs", "a dog runs in the park"]
    files = [m for i, text in enumerate(words) for m in ((f"{i}.jpg", jpeg(20 + i, 16)), (f"{i}.txt", text.encode()))]
    build(tmp_path, make_tar(tmp_path / "a.tar", files))
    data.show_stats(tmp_path, ["set", "set"], "train", 3)
    said = " ".join(capsys.readouterr().out.split())
    assert f"3 images, 3 captions, 66.67% cut at 3 tokens; {7 / 262:.1%} of 262 tokens occur" in said
    assert "tokens 2 2 3 4 6 7 7 width 20 20 20 21 22 22 22 height 16" in said
    assert (tmp_path / "lengths.svg").read_text().count("<polygon") == 2
    assert Image.open(tmp_path / "set/train.png").size[0] > 180


def test_a_mistyped_tokenizer_with_fresh_leaves_the_finished_split(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "SHAPES_SAMPLES", {"train": 8, "val": 8})
    options = {"image_size": 16, "workers": 1}
    prepare("shapes", "train", tmp_path, tokenizer="words:8", **options)
    with pytest.raises(UserError, match="words:many"):
        prepare("shapes", "train", tmp_path, tokenizer="words:many", fresh=True, **options)
    assert len(Shards(tmp_path / "shapes" / "train")) == 8
