"""The loader and the preparation against what one would write or pick instead. By hand; pytest does not collect it.

    pip install webdataset
    python tests/bench_data.py                     # every row
    python tests/bench_data.py loader growth       # these

Prints a table and one JSON line a row. Ours and the peer take turns in one run; a ratio is the median of the rounds'.
The images are MDC_TEST_DATA's photographs enlarged, or where that is not set noise of every scale.
"""

import functools
import io
import itertools
import json
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402

WORKERS, ROUNDS, PAUSE, BATCH, SIDE, SCALE, COUNT, TARS = 2, 9, 3, 64, 224, 0.5, 2048, 2
TOKENIZER = "gpt2" if "TIKTOKEN_CACHE_DIR" in os.environ else "words:500"


def jpegs_of(tar):
    """The bytes of all JPEGs of a tar."""
    with tarfile.open(tar) as file:
        return [file.extractfile(member).read() for member in file if member.name.endswith(".jpg")]


def pictures(short_side):
    """COUNT JPEGs whose short side is `short_side`, 4 : 3, of the sizes that photographs have (q 90: 30 kB at 256)."""
    rng = np.random.default_rng(0)
    photographs = itertools.cycle([None])
    if "MDC_TEST_DATA" in os.environ:
        tar = Path(os.environ["MDC_TEST_DATA"], "flickr8k-train-00000.tar")
        photographs = itertools.cycle(jpegs_of(tar)[:256])
    size = (short_side * 4 // 3, short_side)
    grain = rng.normal(0, 6, (short_side + 64, size[0] + 64, 1))
    for _, photograph in zip(range(COUNT), photographs, strict=False):
        if photograph:
            image = Image.open(io.BytesIO(photograph)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        else:
            scales = [rng.integers(0, 256, (n * 3, n * 4, 3), dtype=np.uint8) for n in (1, 4, 16)]
            layers = [np.asarray(Image.fromarray(s).resize(size, Image.Resampling.BICUBIC), float) for s in scales]
            image = Image.fromarray(np.mean(layers, 0).astype(np.uint8))
        y, x = rng.integers(64, size=2)
        noisy = np.asarray(image, float) + grain[y : y + size[1], x : x + size[0]]
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=90)
        yield file.getvalue()


def write_tars(folder, jpegs):
    folder.mkdir()
    for number in range(TARS):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(number, COUNT, TARS):
                for kind, content in (("jpg", jpegs[i]), ("txt", b"a photograph of number %d of many others" % i)):
                    info = tarfile.TarInfo(f"{i:06d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return sorted(map(str, folder.glob("*.tar")))


@functools.cache
def material():
    """Tars of 512 px, the shards that data.py makes of them, and tars of what is in the shards: (folder, shards)."""
    folder, large = Path(tempfile.mkdtemp(prefix="bench_data")), list(pictures(512))
    write_tars(folder / "large", large)
    prepare(folder, "set")
    shards = data.Shards(folder / "set/train")
    small = [stored(shards, i) for i in range(len(shards))]
    write_tars(folder / "small", small)
    size = [round(np.mean([len(jpeg) for jpeg in jpegs]) / 1e3) for jpegs in (large, small)]
    print(f"{COUNT} images, {size[0]} kB in the source, {size[1]} kB in the shards; in {folder}", flush=True)
    return folder, shards


def prepare(folder, name):
    data.prepare(name, "train", folder, [str(folder / "large")], image_size=SIDE, tokenizer=TOKENIZER, workers=WORKERS)


def stored(shards, i):
    """The bytes of an image in a shard."""
    _, shard, start, size, *_ = shards.record(i)
    return shards.read(f"{shard:05d}.shard", start, size).tobytes()


def decode_and_crop(jpeg):
    """The bare work for one image: decode, the loader's crop and resize, to array."""
    rng = np.random.default_rng(len(jpeg))
    image = Image.open(io.BytesIO(jpeg))
    image.draft("RGB", (int(SIDE / SCALE**0.5),) * 2)
    box = data.random_crop_box(image.size, SCALE, rng)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def decode_and_encode(jpeg):
    """The bare work of preparation for one image: decode, resize, encode."""
    image = Image.open(io.BytesIO(jpeg))
    image.draft("RGB", (256, 256))
    size = [round(side * 256 / min(image.size)) for side in image.size]
    image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).save(io.BytesIO(), "JPEG", quality=90)


def cpu_seconds():
    """Processor time of this process and of its children that have ended: does not mind what else the machine does."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def bare(work, jpegs, workers):
    """A function that does the bare work for `count` JPEGs that are in memory, in as many processes."""

    def share(number, count):
        for i in range(number, count, max(1, workers)):
            work(jpegs[i % len(jpegs)])

    def go(count):
        children = [get_context("fork").Process(target=share, args=(number, count)) for number in range(workers)]
        for child in children:
            child.start()
        for child in children or [share(0, count)]:
            if child:
                child.join()

    return go


def loading(loader, workers):
    """A function that draws `count` images from an endless loader, and one that draws what it has made beforehand."""
    batches = iter(loader)

    def go(count):
        for _ in range(count // BATCH):
            next(batches)

    return go, lambda: go(2 * workers * BATCH)


def ours(shards, workers):
    batches = data.Batches(shards, BATCH, SIDE, 64, 0, crop_scale=SCALE)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(10**6), num_workers=workers)
    return loading(loader, workers)


def webdataset_loader(tars, workers):
    import webdataset

    def decode(sample):
        return decode_and_crop(sample["jpg"]), sample["txt"].decode()

    pipeline = webdataset.WebDataset(tars, shardshuffle=TARS, empty_check=False).shuffle(256).map(decode).repeat()
    return loading(webdataset.WebLoader(pipeline.batched(BATCH), batch_size=None, num_workers=workers), workers)


def compare(functions, count, clock):
    """Two take turns, each (function of a count, function that empties its queue): images/s of the median round, and
    the ratio of the first to the second in the rounds: median, lowest, highest."""
    rates = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, (go, drain) in functions.items():
            if clock is time.perf_counter:
                time.sleep(PAUSE)  # after its turn the other fills its queue, on the cores that are measured here
            drain()
            start = clock()
            go(count)
            rates[name].append(count / (clock() - start))
    ratios = sorted(first / last for first, last in zip(*rates.values(), strict=True))
    return {f"{name}_per_s": round(statistics.median(rate)) for name, rate in rates.items()} | {
        "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}


def both_ways(make, count=1024):
    """In WORKERS processes by the clock on the wall, and in this process by processor time."""
    wall = compare(make(WORKERS), count, time.perf_counter)
    return {"wall": wall, "cpu": compare(make(0), count // 2, cpu_seconds)}


def idle():
    pass


def bench_loader():
    """Loader alone, of bare Pillow in as many processes: goal 0.9."""
    _, shards = material()
    jpegs = [stored(shards, i) for i in range(COUNT)]
    return both_ways(lambda n: {"ours": ours(shards, n), "bare": (bare(decode_and_crop, jpegs, n), idle)})


def bench_webdataset():
    """Loader against webdataset on tars of the images in the shards: goal 1.0."""
    folder, shards = material()
    tars = sorted(map(str, folder.glob("small/*")))
    return both_ways(lambda n: {"ours": ours(shards, n), "webdataset": webdataset_loader(tars, n)})


def bench_webdataset_2x():
    """Loader against webdataset on the tars that the shards were made of, of twice the side: goal 2."""
    folder, shards = material()
    tars = sorted(map(str, folder.glob("large/*")))
    return both_ways(lambda n: {"ours": ours(shards, n), "webdataset": webdataset_loader(tars, n)})


def bench_prepare():
    """data.py, tars to shards, of bare decode + resize + encode in as many processes: goal 0.85."""
    folder, _ = material()
    jpegs, names = [jpeg for tar in folder.glob("large/*") for jpeg in jpegs_of(tar)], itertools.count()
    peer = bare(decode_and_encode, jpegs, WORKERS)
    functions = {"ours": (lambda _: prepare(folder, f"again{next(names)}"), idle), "bare": (peer, idle)}
    wall = compare(functions, COUNT, time.perf_counter)
    return {"wall": wall, "cpu": compare(functions, COUNT, cpu_seconds)}


def anonymous_mb():
    """Memory of this process that is not a mapped file."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


def pretend(folder, target, times):
    """A split whose shards are `times` links to those of another."""
    target.mkdir(parents=True)
    meta, rows = json.loads((folder / "meta.json").read_text()), np.fromfile(folder / "samples.bin", data.RECORD)
    shards = {name: size for name, size in meta["bytes"].items() if name != "samples.bin"}
    every, sizes = [], {}
    for number in range(times * len(shards)):
        name = f"{number:05d}.shard"
        os.link(folder / f"{number % len(shards):05d}.shard", target / name)
        sizes[name] = shards[f"{number % len(shards):05d}.shard"]
        if number % len(shards) == 0:
            copy = rows.copy()
            copy["shard"] += number
            every.append(copy)
    np.concatenate(every).tofile(target / "samples.bin")
    sizes["samples.bin"] = os.path.getsize(target / "samples.bin")
    meta |= {"samples": times * len(rows), "held_out": 0, "bytes": sizes}
    (target / "meta.json").write_text(json.dumps(meta))
    return data.Shards(target)


def bench_growth():
    """Batches of a set of 10 x the samples against those of the set itself, and how memory grows: goal 1.0 and none."""
    folder, _ = material()
    times = {"ten_times": 10, "once": 1}
    sets = {name: pretend(folder / "set/train", folder / name, number) for name, number in times.items()}
    functions = {name: ours(shards, 0) for name, shards in sets.items()}
    figures, grown = compare(functions, 512, cpu_seconds), {}
    for name, (go, _) in functions.items():
        before = anonymous_mb()
        go(4096)
        grown[name] = round(anonymous_mb() - before, 1)
    return figures | {"grown_mb": grown}


def bench_opening():
    """Ten million samples in 2,500 shards: goal under a second and no memory worth naming."""
    folder, shards = material()
    target = folder / "ten_million"
    target.mkdir()
    samples, names = 10_000_000, [f"{number:05d}.shard" for number in range(2500)]
    for name, size in [("samples.bin", samples * data.RECORD.itemsize), *((name, 1 << 27) for name in names)]:
        with open(target / name, "wb") as file:
            file.truncate(size)
    sizes = dict.fromkeys(names, 1 << 27) | {"samples.bin": samples * data.RECORD.itemsize}
    meta = shards.meta | {"samples": samples, "held_out": 50_000, "bytes": sizes}
    data.write_json(target / "meta.json", meta)
    before, start = anonymous_mb(), time.perf_counter()
    split = data.Shards(target)
    split.record(len(split) - 1)
    return {"seconds": time.perf_counter() - start, "mb": anonymous_mb() - before, "samples": len(split)}


def rounded(figures):
    return {key: rounded(value) if isinstance(value, dict) else round(value, 3) for key, value in figures.items()}


def main():
    torch.set_num_threads(1)
    rows = {name.removeprefix("bench_"): row for name, row in globals().items() if name.startswith("bench_")}
    try:
        for name in sys.argv[1:] or rows:
            figures = rounded(rows[name]())
            print(f"{name:14}" + "  ".join(f"{key} {value}" for key, value in figures.items()))
            print(json.dumps({"row": name, "workers": WORKERS} | figures), flush=True)
    finally:
        shutil.rmtree(material()[0])


if __name__ == "__main__":
    main()
