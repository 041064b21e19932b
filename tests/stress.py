"""Faults on purpose: kill runs at random moments, damage inputs, fill the disk, and compare with an undisturbed run.

    python tests/stress.py                      # every row, about 12 minutes on two cores
    python tests/stress.py kill-train mutate    # these

Seeded and bounded; needs POSIX. Prints one row a fault: how often it was tried, how often the result was the promised
one, and how many samples were lost that were not damaged themselves. By hand; pytest does not collect it.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import sample  # noqa: E402

KILLS, MUTATIONS = 20, 2000
STEPS = 800


def command(script, *words):
    return [sys.executable, str(ROOT / script), *map(str, words)]


def run(words, **options):
    """A finished process; its own group, so that a kill takes its workers along."""
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900, **options)


def killed(words, delay, ready):
    """Start a command, kill -9 its whole group `delay` seconds after `ready()`; False if it ended before."""
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and not ready():
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def picture(rng, kind="JPEG"):
    pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC)
    image.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def make_tars(folder, tars, samples, mutate=lambda name, content: content):
    """Tars of pictures with captions, in all three formats."""
    rng, words = np.random.default_rng(0), "a red dog runs over the green grass near two cats".split()
    for number in range(tars):
        members = []
        for i in range(samples):
            kind = ("JPEG", "PNG", "WEBP")[i % 3]
            caption = " ".join(rng.choice(words, 6)).encode()
            pair = [(f"{number:03d}{i:05d}.{kind.lower()}", picture(rng, kind)), (f"{number:03d}{i:05d}.txt", caption)]
            members += [(name, mutate(name, content)) for name, content in pair]
        write_tar(folder / f"{number:03d}.tar", members)


def prepare_words(folder, out, *more):
    return command(
        "data.py", "--dataset", "set", "--source", f"{folder}/*.tar", "--image-size", 32, "--tokenizer", "words:50",
        "--data-dir", out, *more,
    )  # fmt: skip


def digests(folder):
    """{name: sha256} of the files of a folder, without locks."""
    files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file() and not file.name.startswith(".")]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def train_words(folder, out):
    return command(
        "train.py", "--device", "cpu", "--dtype", "float32", "--image-size", 16, "--batch-size", 8, "--warmup", 2,
        "--steps", STEPS, "--save-every", 4, "--eval-every", 50, "--log-every", 4, "--data-dir", folder / "data",
        "--out", out,
    )  # fmt: skip


def make_shapes(folder):
    """A small embedded data set, so that a run is short."""
    data.SHAPES_SAMPLES = {"train": 96, "val": 40}
    for split in ("train", "val"):
        data.prepare("shapes", split, folder / "data", image_size=16, tokenizer="words:100", workers=1)


def same_run(out, reference):
    """Are the weights the same, bit for bit, and the logged losses too?"""
    both = [torch.load(folder / "ckpt.pt", weights_only=True)["model"] for folder in (out, reference)]
    logs = [
        [record["loss"] for record in map(json.loads, (folder / "log.jsonl").open()) if "loss" in record]
        for folder in (out, reference)
    ]
    return logs[0] == logs[1] and all(torch.equal(value, both[1][name]) for name, value in both[0].items())


def stress_kill_train(folder, rng):
    """kill -9 of training (saving every fourth step): the end is that of a run that was never killed."""
    make_shapes(folder)
    assert run(train_words(folder, folder / "whole")).returncode == 0
    out, kills = folder / "cut", 0
    log = out / "log.jsonl"
    for _ in range(KILLS):
        before = log.stat().st_size if log.exists() else 0

        def further(before=before):
            return log.exists() and log.stat().st_size > before

        kills += killed(train_words(folder, out), rng.uniform(0, 0.6), further)
    assert run(train_words(folder, out)).returncode == 0
    return kills, kills * same_run(out, folder / "whole"), 0


def stress_kill_prepare(folder, rng):
    """kill -9 of data.py and its workers: the shards are byte for byte those of an undisturbed run."""
    (folder / "raw").mkdir()
    make_tars(folder / "raw", 40, 150)
    began = time.time()
    assert run(prepare_words(folder / "raw", folder / "whole")).returncode == 0
    length, kills = time.time() - began, 0
    while kills < KILLS:
        kills += killed(prepare_words(folder / "raw", folder / "cut"), rng.uniform(0.3, 1) * length, lambda: True)
        if (folder / "cut" / "set" / "train" / "meta.json").exists():
            run(["rm", "-r", str(folder / "cut")])  # it was finished: start over, so that every kill hits work
    assert run(prepare_words(folder / "raw", folder / "cut")).returncode == 0
    return kills, kills * (digests(folder / "cut") == digests(folder / "whole")), 0


def damage(rng, content):
    """Flip, cut, insert or repeat some bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(content) or 1), rng.randint(1, 16)
        kind = rng.randrange(4)
        if kind == 0:
            content[place : place + length] = rng.randbytes(length)
        elif kind == 1:
            del content[place : place + rng.randint(1, 400)]
        elif kind == 2:
            content[place:place] = rng.randbytes(length)
        else:
            content[place:place] = content[place : place + 200] * rng.randint(1, 20)
    return bytes(content)


def stress_mutate(folder, rng):
    """Damaged images and captions between good ones: data.py ends well, under 1 GB, and loses no good sample."""
    (folder / "raw").mkdir()
    hurt = set()

    def mutate(name, content):
        key = name.partition(".")[0]
        if int(key) % 2 and (name.endswith(".txt") == (int(key) % 10 == 1)):
            hurt.add(key)
            return damage(rng, content)
        return content

    make_tars(folder / "raw", 20, MUTATIONS // 10, mutate)
    done = run(prepare_words(folder / "raw", folder / "out"))
    meta = json.loads((folder / "out/set/train/meta.json").read_text())
    shards = data.Shards(folder / "out/set/train")
    keys = {shards.key(i) for i in range(len(shards))}
    for i in range(len(shards)):
        shards.image(i), shards.captions(i)
    total = 20 * (MUTATIONS // 10)
    good = {f"{number:03d}{i:05d}" for number in range(20) for i in range(MUTATIONS // 10)} - hurt
    counted = meta["samples"] + sum(meta["skipped"].values()) == total
    small = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1 << 20  # kilobytes: 1 GiB
    return len(hurt), len(hurt) * (done.returncode == 0 and counted and small), len(good - keys)


def stress_mutate_files(folder, rng):
    """Damaged tars, meta.json and checkpoints: one line and status 2, or a result; never a traceback or a crash."""
    (folder / "raw").mkdir()
    make_tars(folder / "raw", 1, 30)
    make_shapes(folder)
    assert run([*train_words(folder, folder / "run"), "--fresh"]).returncode == 0
    tar, checkpoint = (folder / "raw/000.tar").read_bytes(), (folder / "run/ckpt.pt").read_bytes()
    meta_file = folder / "data/shapes/train/meta.json"
    meta, survived = meta_file.read_text(), 0
    for number in range(60):
        kind = number % 3
        try:
            if kind == 0:
                (folder / "raw/000.tar").write_bytes(damage(rng, tar))
                with contextlib.redirect_stderr(io.StringIO()):
                    data.prepare(
                        "set", "train", folder / f"out{number}", [str(folder / "raw/*.tar")], image_size=32,
                        tokenizer="words:50", workers=1,
                    )  # fmt: skip
            elif kind == 1:
                meta_file.write_bytes(damage(rng, meta.encode()))
                shards = data.Shards(meta_file.parent)
                [(shards.image(i), shards.captions(i)) for i in range(len(shards))]
            else:
                (folder / "bad.pt").write_bytes(damage(rng, checkpoint))
                sample.load_captioner(folder / "bad.pt", "cpu")
        except data.UserError:
            pass
        except Exception as problem:
            print(f"  {('tar', 'meta.json', 'checkpoint')[kind]} {number}: {type(problem).__name__}: {problem}")
            continue
        survived += 1
    return 60, survived, 0


def stress_full_disk(folder, rng):
    """Files may not grow beyond a limit (as on a full disk): one line, status 2, what was saved stays; with room again
    the same command ends as if nothing had been."""
    make_shapes(folder)
    (folder / "raw").mkdir()
    make_tars(folder / "raw", 4, 100)
    assert run(train_words(folder, folder / "whole")).returncode == 0
    assert run(prepare_words(folder / "raw", folder / "whole-data")).returncode == 0
    survived, tried = 0, 10
    for number in range(tried):
        train = number % 2
        cut = folder / f"cut-{number}"
        words = train_words(folder, cut) if train else prepare_words(folder / "raw", cut)
        full = rng.randint(1, 16_000_000 if train else 300_000)

        def limit(full=full):
            resource.setrlimit(resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))

        done = run(words, preexec_fn=limit)
        one_line = done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
        again = run(words)
        same = again.returncode == 0 and (
            same_run(cut, folder / "whole") if train else digests(cut) == digests(folder / "whole-data")
        )
        if not one_line:
            print(f"  {'train' if train else 'data'}.py with files of at most {full:,} bytes: {done.stderr[-300:]}")
        survived += one_line and same
    return tried, survived, 0


def main():
    rows = {name.removeprefix("stress_").replace("_", "-"): row for name, row in globals().items() if "stress_" in name}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", nargs="*", choices=[[], *rows], metavar="FAULT", help=", ".join(rows))
    faults = parser.parse_args().fault or rows
    print("| fault | tried | survived | good samples lost |\n| --- | --- | --- | --- |")
    for name in faults:
        with tempfile.TemporaryDirectory() as folder:
            tried, survived, lost = rows[name](Path(folder), random.Random(0))
        print(f"| {rows[name].__doc__.splitlines()[0]} | {tried} | {survived} | {lost} |", flush=True)


if __name__ == "__main__":
    main()
