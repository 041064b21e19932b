"""probe.py: the classifier is logistic regression, and labelled images are read whole or not at all."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import probe
from data import UserError


def blobs(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    centres = np.random.default_rng(9).normal(size=(3, 12))
    return torch.tensor(centres[labels] + rng.normal(size=(n, 12)) * 1.5, dtype=torch.float32), np.array(
        ["a", "b", "c"]
    )[labels]


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
def test_the_solution_is_scikit_learns(C):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = blobs(300, 0)
    y = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    ours = probe.fit_logistic(x.double(), y, 3, C)
    theirs = linear_model.LogisticRegression(C=C, tol=1e-8, max_iter=10_000).fit(x.double().numpy(), labels)
    torch.testing.assert_close(
        (x.double() @ ours[:-1] + ours[-1]).softmax(1),
        torch.from_numpy(theirs.predict_proba(x.double().numpy())),
        atol=1e-4,
        rtol=0,
    )


def test_figures_of_a_probe():
    (x, labels), (test, test_labels) = blobs(600, 0), blobs(600, 1)
    figures = probe.linear_probe(x, labels, test, test_labels)
    assert 0.6 < figures["top1"] < 1 and figures["top5"] == 1.0 and abs(figures["mean_class"] - figures["top1"]) < 0.05
    shuffled = np.random.default_rng(0).permutation(labels)
    assert probe.linear_probe(x, shuffled, test, test_labels)["top1"] < 0.45, "nothing to learn, yet learned"
    with pytest.raises(UserError, match="without training images: d"):
        probe.linear_probe(x, labels, test, np.append(test_labels[:-1], "d"))


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
    (images, labels), (same, same_labels) = (
        probe.read_labelled(probe.find_labelled(tmp_path, "set", [name]), 8) for name in ("train", "test")
    )
    assert np.array_equal(images, same) and labels.tolist() == same_labels.tolist() == ["cat", "cat", "dog", "dog"]
    (tmp_path / "test" / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="cat.0.png: not a JPEG"):
        probe.read_labelled(tmp_path / "test", 8)
    with pytest.raises(UserError, match="val.*found: set-train.tar, test"):
        probe.find_labelled(tmp_path, "set", ["val"])


def test_cifar10_tars(photographs):
    images, labels = probe.read_labelled(probe.find_labelled(photographs, "cifar10", ["test"]), 32)
    assert images.shape == (2000, 32, 32, 3) and len(set(labels)) == 10
