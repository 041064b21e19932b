"""data.py: what goes into a shard comes out again, and nothing bad gets in."""

import io
import json
import tarfile

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
    assert len(split) == 96 and len(split.meta["shards"]) == 3
    for i in (0, 39, 40, 95):
        image, caption = data.draw_shapes(i, 16)
        assert decode_caption(split.tokenizer, split.captions(i)[0]) == caption and SHAPES_CAPTION.fullmatch(caption)
        if not split.meta["held_out"]:
            assert np.array_equal(split.image(i), image) and split.key(i) == f"{i:012d}"
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
        ("b9.txt", b"x" * 70_000),
        ("c0.jpg", jpeg()),
        ("c0.json", b"[" * 100_000),
        ("c1.jpg", jpeg()),
        ("c1.json", b"[1]"),
    ]
    meta = build(tmp_path / "out", make_tar(tmp_path / "a.tar", good(3) + bad + good(2, 3)))
    assert meta["samples"] == 5
    assert meta["skipped"] == {
        "tar member is a link or a device": 1,
        "image data is broken": 1,
        "not a JPEG, PNG or WebP image": 2,
        "no caption": 2,
        "caption is not UTF-8": 1,
        "broken JSON": 1,
        "no image": 1,
        "image of an absurd size": 1,
        "caption is too long": 2,
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
    expected = everything(tmp_path / "whole/set/train")
    unlink = data.Path.unlink
    monkeypatch.setattr(
        data.Path, "unlink", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )  # killed before it tidied up
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", tmp_path / "*.tar")
    monkeypatch.setattr(data.Path, "unlink", unlink)
    folder = tmp_path / "cut/set/train"
    for name in ("meta.json", "00001.json", "00002.shard", "00002.json"):
        (folder / name).unlink()
    (folder / "00001.shard").write_bytes(b"half")
    kept = (folder / "00000.shard").stat().st_mtime_ns
    build(tmp_path / "cut", tmp_path / "*.tar")
    assert everything(folder) == expected and (folder / "00000.shard").stat().st_mtime_ns == kept


def test_other_options_and_a_second_process_are_refused(tmp_path):
    make_tar(tmp_path / "a.tar", good(3))
    build(tmp_path / "out", tmp_path / "a.tar")
    with pytest.raises(UserError, match="encoding was raw, now jpeg"):
        build(tmp_path / "out", tmp_path / "a.tar", encoding="jpeg")
    with pytest.raises(UserError, match="tokenizer was words:50, now words:9"):
        prepare("set", "train", tmp_path / "out", [str(tmp_path / "a.tar")], image_size=16, tokenizer="words:9")
    with open(tmp_path / "out/set/train/.lock", "w") as lock:
        data.fcntl.flock(lock, data.fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            build(tmp_path / "out", tmp_path / "a.tar")


@pytest.mark.parametrize(
    "lie", [{"samples": 10**9}, {"samples": -1}, {"image_bytes": 0}, {"tokens": 2}, {"captions": "many"}]
)
def test_meta_that_lies_is_refused(tmp_path, lie):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    meta = json.loads((tmp_path / "set/train/meta.json").read_text())
    meta["shards"][0] |= lie
    (tmp_path / "set/train/meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError):
        Shards(tmp_path / "set/train").captions(0)


def test_a_short_shard_and_a_missing_one_are_refused(tmp_path):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)))
    shard = tmp_path / "set/train/00000.shard"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="00000.shard"):
        Shards(tmp_path / "set/train").image(0)
    shard.unlink()
    with pytest.raises(UserError, match="00000.shard"):
        Shards(tmp_path / "set/train").image(0)


def test_thirty_lines_read_a_shard(tmp_path):
    build(tmp_path, make_tar(tmp_path / "a.tar", good(3)), encoding="jpeg")
    folder = tmp_path / "set/train"
    meta = json.loads((folder / "meta.json").read_text())
    entry, content = meta["shards"][0], (folder / "00000.shard").read_bytes()
    start = -(-entry["image_bytes"] // 8) * 8
    record = np.dtype(
        [("image_end", "<i8"), ("caption_end", "<i8"), ("size", "<i4", 2), ("original_size", "<i4", 2), ("key", "S48")]
    )
    samples = np.frombuffer(content, record, entry["samples"], start)
    token_ends = np.frombuffer(content, "<i8", entry["captions"], start + samples.nbytes)
    tokens = np.frombuffer(content, meta["token_dtype"], entry["tokens"], start + samples.nbytes + token_ends.nbytes)
    assert samples["key"].tolist() == [b"00000", b"00001", b"00002"] and samples["size"][0].tolist() == [20, 16]
    assert Image.open(io.BytesIO(content[: samples["image_end"][0]])).size == (20, 16)
    tokenizer = data.load_tokenizer(meta["tokenizer"])
    assert (
        tokenizer.decode(tokens[: token_ends[0] - 1].tolist()) == "caption number 0"
        and tokens[-1] == tokenizer.eot_token
    )


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


def test_batches_do_not_depend_on_processes_or_accumulation(shapes):
    split = open_split(shapes, "shapes", "train")
    options = {"batch_size": 12, "image_size": 8, "max_tokens": 16, "seed": 3, "crop_scale": 0.5, "flip": True}
    whole = Batches(split, **options)[5]
    for world, accumulation in ((1, 1), (2, 1), (1, 3), (2, 2)):
        parts = [
            Batches(split, **options, rank=rank, world=world, accumulation=accumulation)[5 * accumulation + micro]
            for rank in range(world)
            for micro in range(accumulation)
        ]
        index = torch.cat([part["index"] for part in parts])
        assert sorted(index.tolist()) == list(range(12))
        for name in ("images", "tokens", "noise"):
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name][index])
        assert all(part["u"] == whole["u"] for part in parts)


def test_a_caption_that_is_cut_keeps_its_end(shapes):
    split = open_split(shapes, "shapes", "train")
    batch = Batches(split, 4, 8, 6, 0)[0]
    assert batch["tokens"].shape == (4, 6) and (batch["tokens"][:, -1] == split.tokenizer.eot_token).all()


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
    assert (meta["samples"], meta["captions"], meta["skipped"]) == (1000, 5000, {})
    shards = Shards(tmp_path / "f/val")
    assert shards.image(999).mode == "RGB" and min(shards.image(999).size) == 37
