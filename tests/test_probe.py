"""probe.py: the classifier is logistic regression, images are read whole or not at all, and scores follow the rules."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import probe
from data import UserError
from model import Captioner, Config


def blobs(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    centres = np.random.default_rng(9).normal(size=(3, 12))
    x = (centres[labels] + rng.normal(size=(n, 12)) * 1.5) * np.logspace(-1, 1, 12)
    return torch.tensor(x, dtype=torch.float32), np.array(["a", "b", "c"])[labels]


def test_all_strengths_at_once_are_scikit_learns_one_by_one():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = blobs(300, 0)
    x, y = x.double(), torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    strengths = np.logspace(-5, 4, 7)
    ours = probe.fit_logistic(x, y, 3, strengths, tolerance=1e-9)
    for weights, C in zip(ours, strengths, strict=True):
        theirs = linear_model.LogisticRegression(C=C, tol=1e-10, max_iter=100_000).fit(x.numpy(), labels)
        expected = torch.from_numpy(theirs.predict_proba(x.numpy()))
        torch.testing.assert_close((x @ weights[:-1] + weights[-1]).softmax(1), expected, atol=1e-4, rtol=0)
        w = weights.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(x @ w[:-1] + w[-1], y) + w[:-1].square().sum() / (2 * C * len(x))
        assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-7, "not the minimum"


def test_separable_classes_and_constant_features_converge():
    x = torch.cat([torch.randn(60, 5) + 9 * torch.arange(60)[:, None] // 30, torch.ones(60, 1)], 1)
    weights = probe.fit_logistic(x, torch.arange(60) // 30, 2, probe.STRENGTHS)
    assert torch.isfinite(weights).all()
    assert ((x.double() @ weights[-1][:-1] + weights[-1][-1]).argmax(1) == torch.arange(60) // 30).all()


def test_figures_of_a_probe():
    (x, labels), (test, test_labels) = blobs(600, 0), blobs(600, 1)
    figures = probe.linear_probe(x, labels, test, test_labels)
    assert 0.6 < figures["top1"] < 1 and figures["top5"] == 1.0 and abs(figures["mean_class"] - figures["top1"]) < 0.05
    assert probe.linear_probe(x, labels, test, test_labels, minibatch=True)["top1"] == pytest.approx(
        figures["top1"], abs=0.03
    )
    shuffled = np.random.default_rng(0).permutation(labels)
    assert probe.linear_probe(x, shuffled, test, test_labels)["top1"] < 0.45, "nothing to learn, yet learned"
    with pytest.raises(UserError, match="without training images: d"):
        probe.linear_probe(x, labels, test, np.append(test_labels[:-1], "d"))
    means = [probe.few_shots(x, labels, test, test_labels, shots)[0] for shots in (1, 5, 50)]
    assert 0.33 < means[0] < means[1] < means[2] <= figures["top1"] + 0.02
    assert probe.nearest_neighbours(x, labels, test, test_labels) > 0.55


def test_mean_per_class_weighs_classes_alike():
    weights = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)  # always says 0
    figures = probe.figures_of(weights, torch.zeros(4, 1).double(), torch.tensor([0, 0, 0, 1]), 2)
    assert figures["top1"] == 0.75 and figures["mean_class"] == 0.5


def test_tar_and_folder_are_the_same_and_a_bad_image_is_named(tmp_path):
    with tarfile.open(tmp_path / "set-train.tar", "w") as tar:
        for label in ("cat", "dog"):
            (tmp_path / "test" / label).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (12, 10), (i * 90, 20, 200)).save(buffer := io.BytesIO(), "PNG")
                info = tarfile.TarInfo(f"{label}/{i}.png")
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
                (tmp_path / "test" / label / f"{i}.png").write_bytes(buffer.getvalue())
    tar, folder = (probe.Labelled(tmp_path, "set", [name]) for name in ("train", "test"))
    assert tar.labels.tolist() == folder.labels.tolist() == ["cat", "cat", "dog", "dog"]
    assert all(np.array_equal(tar.read(i, 8), folder.read(i, 8)) for i in range(4))
    (tmp_path / "test" / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="cat.0.png: not a JPEG"):
        probe.Labelled(tmp_path, "set", ["test"]).read(0, 8)
    with pytest.raises(UserError, match="val.*found: set-train.tar, test"):
        probe.Labelled(tmp_path, "set", ["val"])


@pytest.mark.parametrize("labels, files", [(1, ("data_batch_1.bin", "test_batch.bin")), (2, ("train.bin", "test.bin"))])
def test_cifars_binary_archive(tmp_path, labels, files):
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "cifar-binary.tar.gz", "w:gz") as tar:
        for name in files:
            rows = rng.integers(0, 256, (4, labels + 3072), dtype=np.uint8)
            rows[:, labels - 1] = [3, 1, 3, 7]
            info = tarfile.TarInfo(f"cifar/{name}")
            info.size = rows.size
            tar.addfile(info, io.BytesIO(rows.tobytes()))
            (tmp_path / name).write_bytes(rows.tobytes())
    for names, file in zip((["train"], ["test", "val"]), files, strict=True):
        for source in (tmp_path / "cifar-binary.tar.gz", tmp_path):
            split = probe.Labelled(source, "cifar10", names)
            assert split.labels.tolist() == ["003", "001", "003", "007"]
            pixels = np.fromfile(tmp_path / file, np.uint8).reshape(4, -1)[2, labels:].reshape(3, 32, 32)
            assert np.array_equal(split.read(2, 32), pixels.transpose(1, 2, 0))


class Pictures:
    """Four random pictures, as Labelled."""

    def __init__(self, seed):
        self.items, self.key = range(4), str(seed)
        self.pixels = np.random.default_rng(seed).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)

    def read(self, i, side):
        return self.pixels[i]


def test_features_are_cached_by_weights_and_data(tmp_path, monkeypatch):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(Captioner(Config("tiny", 16, 50, 12, eos=49)).eval())
    first = probe.compute_features(models[0], Pictures(0), tmp_path)
    expected = models[0].encode(torch.from_numpy(Pictures(0).pixels)).mean(1)
    torch.testing.assert_close(first, expected.detach())
    assert not torch.equal(probe.compute_features(models[1], Pictures(0), tmp_path), first)
    assert not torch.equal(probe.compute_features(models[0], Pictures(1), tmp_path), first)
    monkeypatch.setattr(Pictures, "read", None)
    assert torch.equal(probe.compute_features(models[0], Pictures(0), tmp_path), first)


def test_the_exported_encoder_gives_the_features(tmp_path):
    from model import ViT

    model = Captioner(Config("tiny", 16, 50, 12, eos=49)).eval()
    probe.export_encoder(model, tmp_path / "encoder.pt")
    saved = torch.load(tmp_path / "encoder.pt", weights_only=True)
    encoder = ViT(Config("tiny", saved["timm"]["img_size"]))
    encoder.load_state_dict(saved["state_dict"])
    images = torch.from_numpy(Pictures(0).pixels)
    with torch.no_grad():
        prepared = (images.permute(0, 3, 1, 2) / 255 - saved["mean"][0]) / saved["std"][0]
        torch.testing.assert_close(encoder(prepared), model.encode(images), atol=1e-5, rtol=0)


def test_swaps_exchange_what_they_say(shapes):
    items = probe.swap_items(probe.Drawings(shapes, "val"))
    assert len(items) == 3 * 150
    for item in items:
        true, wrong = (set(enumerate(option.split())) for option in item["options"])
        assert len(true - wrong) == {"colours": 2, "form": 1, "place": 1}[item["group"]]


def test_official_files_are_read(tmp_path):
    sugar = {"0": {"filename": "1.jpg", "caption": "a dog", "negative_caption": "a cat"}}
    (tmp_path / "swap_obj.json").write_text(json.dumps(sugar))
    item = {"image": f"{tmp_path}/1.jpg", "box": None, "group": "swap_obj", "options": ["a dog", "a cat"]}
    assert probe.read_items("sugarcrepe", tmp_path, tmp_path) == [item]
    box = {"image_path": "1.jpg", "bbox_x": 1, "bbox_y": 2, "bbox_w": 3, "bbox_h": 4}
    box |= {"true_caption": "a", "false_caption": "b"}
    for dataset, extra, group in (
        ("aro-relation", {"relation_name": "on"}, "on"),
        ("aro-attribution", {"attributes": ["red", "old"]}, "red_old"),
    ):
        (tmp_path / "aro.json").write_text(json.dumps([box | extra]))
        (found,) = probe.read_items(dataset, tmp_path / "aro.json", tmp_path)
        assert found["box"] == (1, 2, 4, 6) and found["group"] == group
    for broken in ("[1]", "{}}", '[{"image": "x", "options": ["one"]}]'):
        (tmp_path / "aro.json").write_text(broken)
        with pytest.raises(UserError, match="not the annotations"):
            probe.read_items("options", tmp_path / "aro.json", tmp_path)


def test_ties_lose_and_means_are_macro(capsys):
    items = [{"group": group} for group in ("on", "on", "near")]
    scores = [np.array([-1.0, -2.0]), np.array([-2.0, -2.0]), np.array([-1.0, -3.0])]
    rows = (scores, [s * 0 for s in scores], [np.array([1, 4])] * 3, [np.array([0.0, 0.0])] * 3)
    record = probe.print_compositionality("aro-relation", items, {"log p": rows}, causal=True)["log p"]
    assert record["on"]["sum"] == 50 and record["near"]["sum"] == 100 and record["on"]["a token"] == 0
    assert record["mean of groups"]["sum"] == 75 and record["not symmetric"]["sum"] == 50
    assert record["on"]["sum blind"] == 0, "a tie is wrong"


@pytest.mark.parametrize("objective", ["mdc", "ar", "clip"])
def test_scores_of_items_do_not_depend_on_the_batch(shapes, tmp_path, objective):
    from data import open_split

    split = open_split(shapes, "shapes", "val")
    torch.manual_seed(0)
    model = Captioner(Config("tiny", 16, split.tokenizer.n_vocab, 16, split.tokenizer.eot_token, objective=objective))
    if objective != "clip":
        torch.nn.init.normal_(model.decoder.head.weight)
    checkpoint = {"tokenizer": split.meta["tokenizer"], "lengths": {13: 9}, "options": {"ratios": (0.5, 1.0)}}
    drawings = probe.Drawings(shapes, "val", 5)
    items = probe.swap_items(drawings)
    few, many = (
        probe.score_items(model.eval(), checkpoint, items, lambda i, side: drawings.read(i["image"], side), 4, 0, size)
        for size in (4, 32)
    )
    for rule in few:
        for a, b in zip(few[rule], many[rule], strict=True):
            np.testing.assert_allclose(np.concatenate(a), np.concatenate(b), rtol=1e-3, atol=1e-3)
        real, blind = (np.concatenate(column) for column in few[rule][:2])
        assert not np.allclose(real, blind, atol=1e-4)


def test_cifar10_tars(photographs):
    split = probe.Labelled(photographs, "cifar10", ["test"])
    assert len(split.items) == 2000 and split.read(0, 32).shape == (32, 32, 3) and len(set(split.labels)) == 10
