"""probe.py: the classifier is logistic regression, images are read whole or not at all, and scores follow the rules."""

import io
import itertools
import json
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import textwrap
import types
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import probe
from data import BadSample, UserError, decode_caption, open_split
from model import Captioner, Config, build_model


def blobs(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    centres = np.random.default_rng(9).normal(size=(3, 12))
    x = (centres[labels] + rng.normal(size=(n, 12)) * 1.5) * np.logspace(-1, 1, 12)
    return torch.tensor(x, dtype=torch.float32), torch.from_numpy(labels)


def test_all_strengths_at_once_are_scikit_learns_one_by_one():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(300, 0)
    x = x.double()
    strengths = np.logspace(-5, 4, 7)
    ours = probe.fit_logistic(x, y, 3, strengths, tolerance=1e-8)
    for weights, C in zip(ours, strengths, strict=True):
        theirs = linear_model.LogisticRegression(C=C, tol=1e-10, max_iter=100_000).fit(x.numpy(), y.numpy())
        expected = torch.from_numpy(theirs.predict_proba(x.numpy()))
        torch.testing.assert_close((x @ weights[:-1] + weights[-1]).softmax(1), expected, atol=1e-4, rtol=0)
        w = weights.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(x @ w[:-1] + w[-1], y) + w[:-1].square().sum() / (2 * C * len(x))
        assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-7, "not the minimum"


def test_with_two_classes_scikit_learns_C_is_twice_ours():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(300, 0)
    x, y = x.double(), (y > 0).long()
    for C, weights in zip((0.01, 1.0), probe.fit_logistic(x, y, 2, (0.01, 1.0), tolerance=1e-8), strict=True):
        theirs = linear_model.LogisticRegression(C=2 * C, tol=1e-10, max_iter=100_000).fit(x.numpy(), y.numpy())
        expected = torch.from_numpy(theirs.predict_proba(x.numpy()))
        torch.testing.assert_close((x @ weights[:-1] + weights[-1]).softmax(1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("signal", ["strong axes", "weak axes"])
def test_minibatches_reach_the_exact_solvers_accuracy_on_ill_conditioned_features(signal, monkeypatch):
    """Classes along axes of large variance, as of a trained encoder, or of small, as of a random one. Without whitening
    the accuracy on the weak axes is 62.7 % instead of 70."""
    generator = torch.Generator().manual_seed(0)
    D, classes = 48, 12
    spread = torch.logspace(3, -2, D)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    centres = torch.randn(classes, D, generator=generator) * 0.7
    centres[:, slice(D // 3, None) if signal == "strong axes" else slice(0, 2 * D // 3)] = 0
    splits = []
    for n in (3000, 1000):
        labels = torch.randint(classes, (n,), generator=generator)
        x = (torch.randn(n, D, generator=generator) + centres[labels]) * spread.sqrt() @ rotation
        splits += [x, labels]
    standardized = (splits[0] - splits[0].mean(0)) / splits[0].std(0)
    variances = torch.linalg.eigvalsh(standardized.T.cov())
    assert variances[-1] > 9 and variances[0] < 2e-4
    exact = probe.linear_probe(*splits)["top1"]
    monkeypatch.setattr(probe, "EXACT", 0)
    fast = probe.linear_probe(*splits)
    assert "lr" in fast
    fast = fast["top1"]
    assert 0.6 < exact < 0.99 and abs(exact - fast) < 0.025


def test_the_end_of_a_grid_is_said(monkeypatch, capsys):
    (x, labels), (test, test_labels) = blobs(300, 0), blobs(300, 1)
    probe.linear_probe(x, labels, test, test_labels)
    assert "end of its grid" not in capsys.readouterr().out
    monkeypatch.setattr(probe, "STRENGTHS", np.logspace(-6, -2, 5))
    chosen = probe.linear_probe(x, labels, test, test_labels)["C"]
    assert chosen == probe.STRENGTHS[-1] and "note: the best C, 0.01, is an end of its grid" in capsys.readouterr().out


def test_neighbours_are_those_of_the_raw_cosine():
    """One large constant feature makes all cosines alike; standardization, which DINO does not do, would remove it."""
    (x, labels), (test, test_labels) = blobs(200, 0), blobs(100, 1)
    x, test = (torch.nn.functional.pad(features, (1, 0), value=30.0) for features in (x, test))
    right = 0
    for row, answer in zip(test, test_labels, strict=True):
        cosines = torch.nn.functional.cosine_similarity(row[None], x)
        votes = torch.zeros(3)
        for i in cosines.argsort(descending=True)[:20]:
            votes[labels[i]] += (cosines[i] / 0.07).exp()
        right += int(votes.argmax() == answer)
    assert probe.nearest_neighbours(x, labels, test, test_labels) == pytest.approx(right / 100)


def test_separable_classes_constant_features_and_fewer_images_than_features_converge():
    """To the minimum itself: where the classes are apart it lies far away, and a step of it overshoots."""
    generator = torch.Generator().manual_seed(0)
    for n, D in ((60, 5), (30, 40)):
        y = torch.arange(n) % 2
        x = torch.cat([torch.randn(n, D, generator=generator) + 3 * y[:, None], torch.ones(n, 1)], 1).double()
        for C, weights in zip(probe.STRENGTHS, probe.fit_logistic(x, y, 2, probe.STRENGTHS), strict=True):
            w = weights.clone().requires_grad_()
            loss = torch.nn.functional.cross_entropy(x @ w[:-1] + w[-1], y) + w[:-1].square().sum() / (2 * C * n)
            assert torch.autograd.grad(loss, w)[0].norm() < 1e-5, "not the minimum"
        assert ((x @ weights[:-1] + weights[-1]).argmax(1) == y).all()


def test_a_sweep_takes_few_evaluations(monkeypatch):
    """Where the classes separate the curvature falls by orders of magnitude: scaled by the curvature of zero weights
    the sweep takes 2,500 evaluations."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (180,), generator=generator)
    centres = 3 * torch.nn.functional.one_hot(labels, 60)
    x = (torch.randn(180, 60, generator=generator) + centres) * torch.logspace(0, -2, 60)
    counted = mock.Mock(side_effect=torch.nn.functional.cross_entropy)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", counted)
    probe.fit_logistic(x, labels, 4, probe.STRENGTHS)
    assert 45 < counted.call_count < 1000


def test_figures_of_a_probe():
    (x, labels), (test, test_labels) = blobs(600, 0), blobs(600, 1)
    figures = probe.linear_probe(x, labels, test, test_labels)
    assert 0.6 < figures["top1"] < 1 and abs(figures["mean_class"] - figures["top1"]) < 0.05
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert probe.linear_probe(x, shuffled, test, test_labels)["top1"] < 0.45, "nothing to learn, yet learned"
    assert probe.nearest_neighbours(x, labels, test, test_labels) > 0.55


def test_classes_are_numbered_alike_in_both_splits():
    train, test = probe.number_classes(["cat", "dog", "ant", "cat"], ["dog", "dog", "ant"])
    assert train.tolist() == [1, 2, 0, 1] and test.tolist() == [2, 2, 0]
    with pytest.raises(UserError, match="without training images: eel"):
        probe.number_classes(["cat", "dog"], ["cat", "eel"])
    with pytest.raises(UserError, match=r"all training images are of class images \(their folder"):
        probe.number_classes(["images"] * 2, ["images"])


def test_mean_per_class_weighs_classes_alike():
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)  # always says 0
    figures = probe.figures_of(weights, torch.zeros(4, 1).double(), torch.tensor([0, 0, 0, 1]))
    assert figures["top1"] == 0.75 and figures["mean_class"] == 0.5


def captioner(seed=0, image_size=16, **options):
    torch.manual_seed(seed)
    return build_model(Config("tiny", image_size, 50, 12, eos=49, **options)).eval()


def png(*colour):
    Image.new("RGB", (12, 10), colour).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def add(tar, name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


def squares(opened, side=8):
    """What open_labelled gives -> labels and decoded images."""
    return [(label, probe.read_square(side, image).tolist()) for label, _, image in opened[1]]


@pytest.fixture
def pets(tmp_path):
    """The same four images as a tar and as class folders."""
    with tarfile.open(tmp_path / "set-train.tar", "w") as tar:
        for label in ("cat", "dog"):
            (tmp_path / "test" / label).mkdir(parents=True)
            for i in range(2):
                add(tar, f"{label}/{i}.png", png(i * 90, 20, 200))
                (tmp_path / "test" / label / f"{i}.png").write_bytes(png(i * 90, 20, 200))
    return tmp_path


def test_tar_and_folder_are_the_same_and_a_bad_image_is_named(pets):
    tar, folder = (probe.open_labelled(pets, "set", split) for split in ("train", "test"))
    assert tar[0] != folder[0] and probe.open_labelled(pets, "set", "test")[0] == folder[0]
    found = squares(tar)
    assert found == squares(folder) and [label for label, _ in found] == ["cat", "cat", "dog", "dog"]
    (pets / "test" / "cat" / "0.png").write_bytes(b"")
    key, images = probe.open_labelled(pets, "set", "test")
    assert key != folder[0], "another image under the same name"
    features, labels, unusable = probe.compute_features(captioner(), key, images)
    assert len(features) == 3 and labels.tolist() == ["cat", "dog", "dog"]
    assert len(unusable) == 1 and re.search("cat/0.png: not a JPEG", unusable[0])
    before = probe.open_labelled(pets, "set", "test")[0]
    (pets / "test" / "dog" / "0.png").rename(pets / "test" / "cat" / "1b.png")
    (pets / "test" / "cat" / "1b.png").rename(pets / "test" / "cat" / "0.png")
    assert probe.open_labelled(pets, "set", "test")[0] != before, "another class"


def test_images_beside_the_class_folders_are_counted(pets, capsys):
    probe.open_labelled(pets, "set", "test")
    assert capsys.readouterr().out == ""
    for name in ("loose.png", "another.png", "list.txt"):
        (pets / "test" / name).write_bytes(png(1, 2, 3))
    labels = [label for label, *_ in probe.open_labelled(pets, "set", "test")[1]]
    assert labels == ["cat", "cat", "dog", "dog"] and "/test: files without a class: 2" in capsys.readouterr().out


def test_folders_as_people_have_them(pets, tmp_path):
    """A flat test folder beside val/CLASS (ILSVRC), images in folders of their own (Tiny ImageNet), links, junk."""
    (pets / "test").rename(pets / "val")
    (pets / "test").mkdir()
    (pets / "test" / "1.png").write_bytes(png(1, 2, 3))
    expected = squares(probe.open_labelled(pets, "set", "train"))
    assert squares(probe.open_labelled(pets, "set", "test")) == expected
    cat = pets / "val" / "cat"
    (cat / "images").mkdir()
    (cat / "0.png").rename(cat / "images" / "0.png")
    (cat / "1.png").rename(pets / "elsewhere.png")
    (cat / "images" / "1.png").symlink_to(pets / "elsewhere.png")
    (cat / "images" / "back").symlink_to(cat)
    (pets / "val" / "dog").rename(pets / "dogs")
    (pets / "val" / "dog").symlink_to(pets / "dogs")
    for junk in ("._0.png", ".DS_Store", "Thumbs.db", "cat_boxes.txt", ".ipynb_checkpoints/1.png"):
        (cat / junk).parent.mkdir(exist_ok=True)
        (cat / junk).write_bytes(b"junk")
    (pets / "val" / "__MACOSX").mkdir()
    (pets / "val" / "__MACOSX" / "1.png").write_bytes(b"junk")
    assert squares(probe.open_labelled(pets, "set", "test")) == expected
    with tarfile.open(pets / "set-train.tar", "a") as tar:
        add(tar, "__MACOSX/cat/._1.png", b"junk")
        add(tar, "cat/._1.png", b"junk")
    assert squares(probe.open_labelled(pets, "set", "train")) == expected
    (cat / "gone.png").symlink_to(pets / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="gone.png"):  # run makes it one line
        probe.open_labelled(pets, "set", "test")


def test_a_wrong_layout_is_shown_beside_the_right_one(pets):
    (pets / "set-train.tar").rename(pets / "pictures.tar")
    for source in (pets, pets / "nothing", pets / "pictures.tar"):
        with pytest.raises(UserError, match="train/CLASS/image.jpg, or set-train.tar .* found in ") as caught:
            probe.open_labelled(source, "set", "train")
        assert "\n" not in str(caught.value) and ("pictures.tar, test" in str(caught.value)) == (source == pets)
    with pytest.raises(UserError, match="found in .*pictures.tar"):
        probe.open_labelled(pets / "pictures.tar", "set", "test")


def test_a_hostile_tar_does_no_harm(pets):
    """Names that lead out of the folder are only names; links, devices and damage are errors."""
    path, outside = pets / "set-train.tar", pets / "outside.png"
    with tarfile.open(path, "w") as tar:
        add(tar, "../../dog/outside.png", png(1, 2, 3))
        add(tar, "/tmp/ant/1.png", png(1, 2, 3))
    assert [label for label, _ in squares(probe.open_labelled(pets, "set", "train"))] == ["dog", "ant"]
    assert not outside.exists()
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(path.with_name("link-train.tar"), "w") as tar:
            add(tar, "cat/1.png", png(1, 2, 3))
            add(tar, "cat/2.png", type=kind, linkname="../outside.png")
        with pytest.raises(UserError, match="link-train.tar: tar member is not a file"):
            squares(probe.open_labelled(pets, "link", "train"))
    whole = path.read_bytes()
    backwards = bytearray(whole)  # a member of -512 bytes, which sends tarfile to the same member for ever
    backwards[124:136] = (-512).to_bytes(12, "big", signed=True)
    backwards[148:156] = b" " * 8
    backwards[148:156] = b"%06o\0 " % sum(backwards[:512])
    for damaged in (whole[:700], whole[:1024], b"\xff" * 2000, whole[:1024] + b"x" * 512 + whole[1536:], backwards):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="set-train.tar"):
            squares(probe.open_labelled(pets, "set", "train"))
    with tarfile.open(path, "w") as tar:  # a bomb: four gigapixels in a few bytes
        bomb, header = png(1, 2, 3), b"IHDR" + 2 * (65500).to_bytes(4, "big") + b"\x08\x02\0\0\0"
        add(tar, "cat/bomb.png", bomb[:12] + header + zlib.crc32(header).to_bytes(4, "big") + bomb[33:])
    with pytest.raises(BadSample, match="50 megapixels"):
        squares(probe.open_labelled(pets, "set", "train"))


@pytest.mark.parametrize("labels, files", [(1, ("data_batch_1.bin", "test_batch.bin")), (2, ("train.bin", "test.bin"))])
def test_cifars_binary_archive(tmp_path, labels, files):
    rng, pixels = np.random.default_rng(0), {}
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in files:
            rows = rng.integers(0, 256, (4, labels + 3072), dtype=np.uint8)
            rows[:, labels - 1] = [3, 1, 3, 7]
            add(tar, f"cifar/{name}", rows.tobytes())
            pixels[name] = rows[2, labels:].reshape(3, 32, 32).transpose(1, 2, 0).tolist()
    for split, file in zip(("train", "test"), files, strict=True):
        for source in (archive, tmp_path):
            found = squares(probe.open_labelled(source, "cifar10", split), 32)
            assert [label for label, _ in found] == ["003", "001", "003", "007"] and found[2][1] == pixels[file]
    for source in (archive, tmp_path):
        with pytest.raises(UserError, match=r"expected val/CLASS.* or CIFAR's \*-binary.tar.gz; found"):
            probe.open_labelled(source, "cifar100", "test")
    archive.write_bytes(archive.read_bytes()[:-3000])
    with pytest.raises(UserError, match="cifar-10-binary.tar.gz: .*; expected a whole tar"):
        squares(probe.open_labelled(tmp_path, "cifar10", "test"), 32)


def readme(mark):
    """The indented block after a mark in README.md or tests/README.md, without its indentation."""
    files = [ROOT / "README.md", ROOT / "tests" / "README.md"]
    text = "".join(file.read_text() for file in files if file.exists())
    assert f"<!-- {mark} -->\n" in text
    lines = text.partition(f"<!-- {mark} -->\n")[2].lstrip("\n").splitlines(True)
    return textwrap.dedent("".join(itertools.takewhile(lambda line: line.startswith("    "), lines)))


@pytest.mark.skipif(not shutil.which("bash"), reason="the commands are for bash")
def test_the_readmes_commands_make_class_folders(tmp_path):
    """Of miniatures of the official layouts: as many images as in the lists, in the folders of their classes."""
    official = {
        "images/Abyssinian_1.jpg": 0,
        "images/american_pit_bull_terrier_12.jpg": 1,
        "annotations/trainval.txt": "#Image CLASS-ID SPECIES BREED ID\nAbyssinian_1 1 1 1\n",
        "annotations/test.txt": "american_pit_bull_terrier_12 2 2 1\n",
        "food-101/images/apple_pie/1.jpg": 2,
        "food-101/images/waffles/2.jpg": 3,
        "food-101/meta/train.txt": "apple_pie/1\n",
        "food-101/meta/test.txt": "waffles/2",
        "fgvc-aircraft-2013b/data/images/0034309.jpg": 4,
        "fgvc-aircraft-2013b/data/images/1025794.jpg": 5,
        "fgvc-aircraft-2013b/data/images_variant_trainval.txt": "1025794 F/A-18\n",
        "fgvc-aircraft-2013b/data/images_variant_test.txt": "0034309 Boeing 717\n",
    }
    for name, content in official.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(content, 0, 0) if isinstance(content, int) else content.encode())
    for split, kind, numbers in (("train", "webp", range(3)), ("test", "jpg", range(3, 5))):
        folder = tmp_path / "wds" / "flowers" / split
        folder.mkdir(parents=True)
        for i in numbers:  # one image in each tar
            with tarfile.open(folder / f"{i}.tar", "w") as tar:
                for type_, content in (("cls", b"%d\n" % (i % 2)), (kind, png(10 + i, 0, 0)), ("json", b"{}")):
                    member = tarfile.TarInfo(f"s000{i}.{type_}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    commands = readme("class folders") + readme("labelled tars")
    subprocess.run(["bash", "-e", "-c", commands], cwd=tmp_path, check=True)
    expected = {
        "pets": [["Abyssinian"], ["american_pit_bull_terrier"]],
        "food101": [["apple_pie"], ["waffles"]],
        "aircraft": [["F-A-18"], ["Boeing 717"]],
        "flowers": [["0", "0", "1"], ["0", "1"]],
    }
    for dataset, classes in expected.items():
        found = [squares(probe.open_labelled(tmp_path / "raw" / dataset, dataset, s)) for s in ("train", "test")]
        assert [[label for label, _ in images] for images in found] == classes


def test_of_strengths_with_equal_accuracy_the_middle_is_taken(monkeypatch):
    """The first of them, the strongest penalty, would underfit: with few labels many strengths are all right."""
    asked = []

    def fit(features, labels, classes, strengths):
        asked.append(list(strengths))
        right = torch.stack([features[labels == k].mean(0) for k in range(classes)], 1)
        right = torch.cat([right, torch.zeros(1, classes)])
        return torch.stack([right if 1e-3 < C < 1e3 else -right for C in strengths])

    monkeypatch.setattr(probe, "fit_logistic", fit)
    labels = torch.arange(100) % 2
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)) + 9 * labels[:, None]
    figures = probe.linear_probe(x, labels, x, labels)
    equal = [C for C in probe.STRENGTHS if 1e-3 < C < 1e3]
    assert figures["top1"] == figures["held_out"] == 1 and len(equal) > 20
    assert asked[1] == [figures["C"]] and figures["C"] == np.median(equal)


def pictures(seed):
    """Four random pictures as open_labelled gives them: even, odd, even, odd."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    return str(seed), ((("even", "odd")[i % 2], f"image {i}", Image.fromarray(p)) for i, p in enumerate(pixels))


def test_features_are_cached_by_weights_and_data(tmp_path):
    models = [captioner(0), captioner(1)]
    first, labels, _ = probe.compute_features(models[0], *pictures(0), tmp_path)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for _, _, image in pictures(0)[1]]))
    torch.testing.assert_close(first, models[0].encode(pixels).mean(1).detach())
    assert labels.tolist() == ["even", "odd", "even", "odd"]
    assert not torch.equal(probe.compute_features(models[1], *pictures(0), tmp_path)[0], first)
    assert not torch.equal(probe.compute_features(models[0], *pictures(1), tmp_path)[0], first)
    again, names, _ = probe.compute_features(models[0], "0", None, tmp_path)
    assert torch.equal(again, first) and names.tolist() == labels.tolist()


def test_a_run_that_was_stopped_goes_on_with_the_first_missing_part(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "PART", 4)
    rng = np.random.default_rng(0)
    squares = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(12)]
    read = []

    def images(end, bad=()):
        for i, image in enumerate(squares[:end]):
            read.append(i)
            yield str(i % 3), f"image {i}", io.BytesIO(b"") if i in bad else image

    def stopped():
        yield from images(9)
        raise KeyboardInterrupt

    model = captioner()
    with pytest.raises(KeyboardInterrupt):
        probe.compute_features(model, "key", stopped(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    calls = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    found = probe.compute_features(model, "key", images(11), tmp_path)
    assert calls == [3] and len(list(tmp_path.iterdir())) == 3
    whole = probe.compute_features(model, "key", images(11))
    torch.testing.assert_close(found[0], whole[0])
    assert found[1].tolist() == whole[1].tolist() == [str(i % 3) for i in range(11)]
    read.clear()
    again = probe.compute_features(model, "key", images(11), tmp_path)
    assert torch.equal(again[0], found[0]) and not read, "a finished cache needs no images"
    for end in (8, 12):  # a whole number of parts
        assert len(probe.compute_features(model, f"{end}", images(end), tmp_path)[0]) == end
    x, labels, unusable = probe.compute_features(model, "bad", images(9, bad=(0, 1, 2, 3, 8)), tmp_path)
    assert labels.tolist() == ["1", "2", "0", "1"] and len(unusable) == 5
    torch.testing.assert_close(x, whole[0][4:8])


def test_the_exported_encoder_gives_the_features_in_timm_and_in_plain_torch(tmp_path, monkeypatch):
    """With the lines of the README as they stand."""
    model = captioner()
    probe.export_encoder(model, tmp_path / "encoder.pt")
    monkeypatch.chdir(tmp_path)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for _, _, image in pictures(0)[1]]))
    expected = model.encode(pixels).mean(1).detach()
    for mark in ("timm", "plain torch"):
        scope = {"images": pixels.permute(0, 3, 1, 2) / 255}
        if mark == "timm":
            hide_torchvision(monkeypatch)
            pytest.importorskip("timm")
        with torch.no_grad():
            exec(readme(mark), scope)
        torch.testing.assert_close(scope["features"], expected, atol=1e-5, rtol=0)


def test_an_export_replaces_nothing_and_says_if_the_disk_is_full(tmp_path, capsys, shapes):
    save_checkpoint(shapes, path := tmp_path / "ckpt.pt")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def export(target):
        words = ["probe.py", "--ckpt", str(path), "--export", str(target)]
        with pytest.raises(SystemExit) as end, mock.patch("sys.argv", words):
            data.run(probe.main)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1
        return said

    assert "ckpt.pt exists" in export(path) and path.read_bytes() == before
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        assert "make room" in export(tmp_path / "encoder.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


def hide_torchvision(monkeypatch):
    """timm imports torchvision, of which the CPU build of torch has none, and uses nothing of it here."""

    class Name(type):
        def __getattr__(cls, name):
            return name

    class Anything(types.ModuleType):
        __path__ = []

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Name(name, (), {}) if name[0].isupper() else Anything(name)

        def __call__(self, *args, **kwargs):
            return self

    parts = "transforms transforms.functional transforms.v2 ops ops.misc datasets models models.feature_extraction"
    for name in ("torchvision", *(f"torchvision.{part}" for part in parts.split())):
        monkeypatch.setitem(sys.modules, name, Anything(name))


def test_the_floor_is_the_encoder_before_its_own_training(shapes, monkeypatch):
    """Of the seed of the run, not of the probe."""
    encoders = []

    def features(encoder, key, images, cache):
        encoders.append(encoder)
        captions = [f"a small red {form} at the top left of a blue background" for form in ("cross", "square")]
        return torch.arange(6).view(2, 3).float(), np.array(captions), []

    monkeypatch.setattr(probe, "compute_features", features)
    monkeypatch.setattr(probe, "number_classes", lambda train, test: (torch.arange(2), torch.arange(2)))
    monkeypatch.setattr(probe, "linear_probe", lambda *splits: {"top1": 0.5})
    config = Config("tiny", 16, 30, 16, 29)
    torch.manual_seed(7)
    start = Captioner(config)
    trained = Captioner(config)
    args = types.SimpleNamespace(dataset="shapes", data_dir=shapes, limit=2, seed=3, device="cpu", knn=False)
    probe.main_probe(args, trained, {"options": {"seed": 7}})
    assert encoders[:2] == [trained, trained] and encoders[2] is encoders[3]
    torch.testing.assert_close(encoders[2].state_dict(), start.state_dict(), rtol=0, atol=0)


def test_swaps_exchange_what_they_say(shapes):
    items = probe.swap_items(open_split(shapes, "shapes", "val"))
    assert len(items) == 3 * 150
    for item in items:
        assert not re.search(r"\ba orange|\ban (?!orange)", " ".join(item.captions))
        true, wrong = (set(enumerate(option.replace(" an ", " a ").split())) for option in item.captions)
        assert len(true - wrong) == {"colours": 2, "form": 1, "place": 1}[item.group]


def test_official_files_are_read(tmp_path):
    sugar = {"0": {"filename": "1.jpg", "caption": "a  dog ", "negative_caption": "a cat"}}
    (tmp_path / "swap_obj.json").write_text(json.dumps(sugar))
    item = ((f"{tmp_path}/1.jpg", None), "swap_obj", ["a dog", "a cat"])
    assert probe.read_items("sugarcrepe", tmp_path, tmp_path) == [item]
    box = {"image_path": "1.jpg", "bbox_x": 1, "bbox_y": 2, "bbox_w": 3, "bbox_h": 4}
    box |= {"true_caption": "a", "false_caption": "b"}
    for dataset, extra, group in (
        ("aro-relation", {"relation_name": "on"}, "on"),
        ("aro-attribution", {"attributes": ["red", "old"]}, "red_old"),
    ):
        (tmp_path / "aro.json").write_text(json.dumps([box | extra]))
        (found,) = probe.read_items(dataset, tmp_path / "aro.json", tmp_path)
        assert found.image == (f"{tmp_path}/1.jpg", (1, 2, 4, 6)) and found.group == group
    sugar = '[{"filename": "x", "caption": "a dog", "negative_caption": %s}]'
    for broken in ("[1]", "{}}", '[{"filename": "x", "caption": "a dog"}]', sugar % '" "', sugar % "1"):
        (tmp_path / "aro.json").write_text(broken)
        with pytest.raises(UserError, match="aro.json: not sugarcrepe after 0 good items"):
            probe.read_items("sugarcrepe", tmp_path / "aro.json", tmp_path)


def report(dataset, groups, scores, owner=None, **arrays):
    """report_items of one rule, with blind scores of 0; all lengths are 1 unless given."""
    scores = np.array(scores, dtype=float)
    owner = range(len(groups)) if owner is None else owner
    boxes = itertools.count()  # of one photograph
    items = [probe.Item((image, next(boxes)), group, "ab") for image, group in zip(owner, groups, strict=True)]
    lengths, terms = arrays.get("lengths", np.ones(scores.shape)), arrays.get("terms", np.zeros(scores.shape))
    return probe.report_items(dataset, items, {"log p": np.stack([scores, scores * 0])}, lengths, terms)["log p"]


def test_ties_lose_and_means_are_macro():
    scores = [[-1, -2], [-2, -2], [-1, -3]]
    record = report("aro-relation", ("on", "on", "near"), scores, lengths=np.array([[1, 4]] * 3))
    assert record["on"]["sum"] == 50 and record["near"]["sum"] == 100 and record["on"]["a token"] == 0
    assert record["mean of groups"]["sum"] == 75 and record["not symmetric"]["sum"] == 50
    assert record["on"]["sum blind"] == 0, "a tie is wrong"
    assert "+ length" not in record["on"]
    record = report("swaps", ("a", "a"), [[-1, -2], [-2, -1]], terms=np.array([[-3.0, 0], [0, -3.0]]))
    assert record["a"]["sum"] == 50 and record["a"]["+ length"] == 50
    symmetric = (ROOT / "assets" / "aro-symmetric.txt").read_text().splitlines()
    assert len(symmetric) == 157 and {"near", "by", "around"} < set(symmetric) and "on" not in symmetric


def test_attribute_pairs_count_from_25_cases_on(capsys):
    record = report("aro-attribution", ["red_old"] * 25 + ["wet_new"] * 24, [[-1, -2]] * 25 + [[-2, -1]] * 24)
    assert record["mean of groups"]["sum"] == 100 and "wet_new" not in record
    assert "fewer than 25 items: 1" in capsys.readouterr().out


def test_an_image_counts_once_in_the_standard_error():
    """Thrice the same items of each image are no more evidence than once."""
    scores = np.random.default_rng(0).normal(size=(30, 2))
    once = report("swaps", ["a"] * 30, scores)
    thrice = report("swaps", ["a"] * 90, np.repeat(scores, 3, 0), np.repeat(np.arange(30), 3))
    assert thrice["gain"] == pytest.approx(once["gain"]) and thrice["gain_se"] == pytest.approx(once["gain_se"])
    assert once["gain_se"] == pytest.approx(scores[:, 0].std() / 30**0.5)


@pytest.mark.parametrize("objective", ["mdc", "ar", "clip"])
def test_every_caption_gets_the_score_of_its_own_and_of_other_images(shapes, objective):
    """Whatever the batches are: equal to score_captions called by hand, item by item; images are read about once."""
    split = open_split(shapes, "shapes", "val")
    torch.manual_seed(0)
    model = build_model(Config("tiny", 16, split.tokenizer.n_vocab, 16, split.tokenizer.eot_token, objective))
    if objective != "clip":
        torch.nn.init.normal_(model.decoder.head.weight)
    checkpoint = {"tokenizer": split.meta["tokenizer"], "lengths": {13: 9}}
    items = [item for item in probe.swap_items(split) if item.image[0] < 5][2:]
    items.append(items[0]._replace(captions=[items[0].captions[0], "a small cat"]))
    pixels = [torch.from_numpy(probe.read_square(16, split.image(i)).copy())[None] for i in range(5)]
    with torch.no_grad():
        features = {(i, None): model.encode(image)[0] for i, image in enumerate(pixels)}
    many = probe.score_items(model.eval(), checkpoint, items, features, 4, 0, 64, exchanges=2)
    few = probe.score_items(model, checkpoint, items, features, 4, 0, 5, exchanges=2)
    rule, words = {"mdc": ("parallel", ["parallel"]), "ar": ("log p", []), "clip": ("cosine", [])}[objective]
    for a, b in zip([*many[0][rule], *many[1:]], [*few[0][rule], *few[1:]], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    if objective == "mdc":  # masks belong to the item, in whatever batch: the same caption has others in another item
        a, b = many[0]["monte-carlo"][0], few[0]["monte-carlo"][0]
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
        assert abs(a[0, 0] - a[-1, 0]) > 0.01
    real, blind = many[0][rule]
    assert many[1][0, 0] == len(split.captions(items[0].image[0])[0])
    every = probe.score_items(model, checkpoint, items, features, 4)[0][rule][1]  # 64 are asked for, 4 are there
    for item, scores, others, other_four in zip(items, real, blind, every, strict=True):
        tokens = [[*split.tokenizer.encode_ordinary(text), split.tokenizer.eot_token] for text in item.captions]
        with torch.no_grad():
            table = [
                probe.score_captions(model, features[i, None].expand(2, -1, -1), tokens, *words).numpy()
                for i in range(5)
            ]
        np.testing.assert_allclose(scores, table[item.image[0]], rtol=1e-3, atol=1e-3)
        rest = [table[i] for i in range(5) if i != item.image[0]]
        pairs = [np.logaddexp(a, b) - np.log(2) for a, b in itertools.combinations(rest, 2)]
        assert min(np.abs(others - pair).max() for pair in pairs) < 1e-2, "not two other images"
        np.testing.assert_allclose(other_four, np.logaddexp.reduce(rest) - np.log(4), rtol=1e-3, atol=1e-3)


def save_checkpoint(shapes, path):
    """An untrained model for the fixture's `shapes` -> its validation set."""
    split = open_split(shapes, "shapes", "val")
    config = {"size": "tiny", "image_size": 16, "vocab_size": split.tokenizer.n_vocab, "max_tokens": 16}
    config |= {"eos": split.tokenizer.eot_token}
    checkpoint = {"config": config, "options": {"seed": 0}, "lengths": {13: 9}, "step": 0}
    checkpoint |= {"model": Captioner(Config(**config)).state_dict(), "tokenizer": split.meta["tokenizer"]}
    torch.save(checkpoint, path)
    return split


def test_bad_images_are_named_after_the_results(tmp_path, script, shapes):
    save_checkpoint(shapes, tmp_path / "ckpt.pt")
    for split, label, i in itertools.product(("train", "test"), ("cat", "dog"), range(12)):
        (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / split / label / f"{i}.png").write_bytes(png(i, 200 * (label == "dog"), 0))
    (tmp_path / "test" / "cat" / "3.png").write_bytes(png(1, 2, 3)[:40])
    done = script("probe.py", "--ckpt", tmp_path / "ckpt.pt", "--dataset", "pets", "--source", tmp_path, expect=2)
    assert done.stdout.count("mean_class") == 2 and "24 training and 23 test images" in done.stdout
    assert re.search(r"error: left out of these figures: .*test/cat/3.png: .*\n$", done.stderr)
    record = json.loads((tmp_path / "probe.jsonl").read_text())
    assert record["results"]["class"]["trained"]["top1"] == 1 and len(record["unusable"]) == 1
    for image in (tmp_path / "test").rglob("*.png"):
        image.write_bytes(b"")
    args = ("--ckpt", tmp_path / "ckpt.pt", "--dataset", "pets", "--source", tmp_path)
    none = script("probe.py", *args, expect=2).stderr
    assert re.search(r"error: no usable test images: .*cat/0.png: .* and 21 more\n$", none)


def test_results_are_printed_but_not_kept_if_the_checkpoints_folder_cannot_be_written(pets, script, shapes):
    folder = pets / "checkpoint"
    folder.mkdir()
    save_checkpoint(shapes, folder / "ckpt.pt")
    (folder / "features").write_text("no folder can be made here")
    done = script("probe.py", "--ckpt", folder / "ckpt.pt", "--dataset", "set", "--source", pets, "--knn")
    assert done.stdout.count("top1") == done.stdout.count("knn") == 2
    assert done.stderr.count("note: features and results are not kept") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["ckpt.pt", "features"]


def test_a_second_probe_of_the_checkpoint_waits(pets, shapes):
    """Both would write the same features."""
    save_checkpoint(shapes, pets / "ckpt.pt")
    words = ["probe.py", "--ckpt", pets / "ckpt.pt", "--dataset", "set", "--source", pets]
    locked = []

    def lock(folder, wait):
        assert wait and not [*folder.iterdir()], "locked before the first image"
        locked.append(folder)
        return io.StringIO()

    with mock.patch("data.lock", lock), mock.patch("sys.argv", [*map(str, words)]):
        probe.main()
    assert locked == [pets / "features"]


def test_captions_are_normalized():
    for caption in ("A dog runs.", "a dog runs", "A dog runs", "a dog runs ."):
        assert probe.normalize_caption(caption) == "a dog runs"


def test_boxes_are_cut_to_the_image_and_missing_images_are_counted(tmp_path, script, shapes):
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(tmp_path / "1.png")
    inside, beyond = (probe.read_square(8, tmp_path / "1.png", box) for box in ((2, 2, 10, 10), (2, 2, 99, 10**9)))
    assert np.array_equal(inside, beyond)
    with pytest.raises(BadSample, match="its box .* is empty"):
        probe.read_square(8, tmp_path / "1.png", (3, 3, 3, 8))
    split = save_checkpoint(shapes, tmp_path / "ckpt.pt")
    caption = decode_caption(split.tokenizer, split.captions(0)[0])
    rows = [{"filename": f"{i}.png", "caption": caption, "negative_caption": "a cat"} for i in (1, 2, 3, 4)]
    (tmp_path / "items.json").write_text(json.dumps(rows))
    for i in (2, 3):
        Image.new("RGB", (10, 10), (i, 0, 0)).save(tmp_path / f"{i}.png")
    command = ("probe.py", "--ckpt", tmp_path / "ckpt.pt", "--dataset", "sugarcrepe", "--source", tmp_path / "items.json")
    said = script(*command, "--images", tmp_path / "elsewhere", expect=2).stderr.split("\r")[-1]
    assert re.search(r"error: --images .*elsewhere: too few images; .*/1.png: No such file or directory, .*\n$", said)
    done = script(*command, "--images", tmp_path, "--samples", 2, expect=2)
    assert done.stdout.startswith("3 items with 3 images\n")
    said = done.stderr.split("\r")[-1]  # a progress bar is before it
    assert re.search(r"error: left out of these figures: .*4.png: No such file or directory\n$", said)
    record = json.loads((tmp_path / "probe.jsonl").read_text())
    assert record["items"] == 3 and set(record["results"]) == {
        "monte-carlo",
        "parallel",
        "leave-one-out",
        "normalized",
    }


def test_sugarcrepe_is_scored_as_given_and_normalized(tmp_path, script, shapes):
    save_checkpoint(shapes, tmp_path / "ckpt.pt")
    rows = {f"{i}": {"filename": f"{i}.png", "caption": "A cat.", "negative_caption": "A dog"} for i in range(3)}
    (tmp_path / "swap_obj.json").write_text(json.dumps(rows))
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i, 0, 0))
    source = ("--source", tmp_path / "swap_obj.json", "--images", tmp_path, "--samples", 2)
    said = script("probe.py", "--ckpt", tmp_path / "ckpt.pt", "--dataset", "sugarcrepe", *source).stdout
    assert said.count("monte-carlo:") == 2 and "without capital first letters and final full stops" in said
    results = json.loads((tmp_path / "probe.jsonl").read_text())["results"]
    assert results["normalized"]["parallel"]["swap_obj"].keys() == results["parallel"]["swap_obj"].keys()


def test_cifar10_tars(photographs):
    labels = [label for label, _, _ in probe.open_labelled(photographs, "cifar10", "test")[1]]
    assert len(labels) == 2000 and len(set(labels)) == 10
