import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data

ROOT = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "1"  # for subprocesses: several of them share the cores
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A data directory with a small `shapes` of 16 px."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_SAMPLES", {"train": 96, "val": 150})
        patch.setattr(data, "UNIT_SAMPLES", 40)
        for split in ("train", "val"):
            data.prepare("shapes", split, folder, image_size=16, tokenizer="words:100", workers=1)
    return folder


@pytest.fixture(scope="session")
def photographs():
    """The folder with the captioned photographs and labelled images; tests that want it skip without it."""
    folder = os.environ.get("MDC_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MDC_TEST_DATA does not name the folder with the photographs")
    return Path(folder)


@pytest.fixture
def script():
    """Run one of the scripts as a user does: script("train.py", "--steps", 5) -> completed process."""

    def call(*words, launch=(), expect=0):
        done = subprocess.run(
            [sys.executable, *launch, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    return call
