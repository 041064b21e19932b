"""Everything that needs a GPU to measure, in one command of seven minutes.

    python tests/gpu.py FOLDER [--out OUT] [--minutes MINUTES]

FOLDER holds flickr8k-train-*.tar, flickr8k-val-*.tar, cifar10-train.tar, cifar10-test.tar and `tokenizers`, a
cache of tiktoken with GPT-2's files; no network is used. By hand; pytest does not collect it.

Every step has a time limit, and all together have MINUTES, of which RESERVE is kept for the steps that are not timed.
The next step starts whatever became of the one before, unless there are no shards. The timed steps come first and
have the machine for themselves; the others share it. OUT/gpu.jsonl gets one line a
step, OUT/NAME.log its output. Without a GPU, tiny sizes rehearse the same steps."""
import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CUDA = torch.cuda.is_available()
RESERVE = 150  # seconds
STARTED = time.time()
MODEL, SIDE, BATCH = ("B/16", 224, 256) if CUDA else ("tiny", 32, 8)
COUNTED = """import runpy, sys, torch
sys.path.insert(0, "."); sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"peak memory {peak:.2f} GiB, {graphs} graphs", flush=True)"""


def descendants(pid):
    """Processes that a process started, also those that left its group (torchrun's, loader workers)."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children] + [pid for child in children for pid in descendants(child)]
    return []


class Steps:
    def __init__(self, out, seconds):
        self.out = out
        self.end = STARTED + seconds
        self.rows = []

    def run(self, name, limit, *commands, stop_at=None, reserve=0):
        """Run python commands one after the other within `limit` seconds, or those left for all steps but `reserve`;
        returns whether all ended well.

        stop_at: SIGTERM goes to the first command when its log has this text, and status 143 is right."""
        began = time.time()
        limit = min(limit, self.end - reserve - began)
        status = []
        log_file = self.out / f"{name}.log"
        with open(log_file, "w") as log:
            for number, words in enumerate(commands):
                if time.time() - began >= limit:
                    status.append("not started")
                    break
                process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=log,
                                           stderr=subprocess.STDOUT, start_new_session=True)
                stopped = False
                while process.poll() is None and time.time() - began < limit:
                    time.sleep(0.2)
                    if number == 0 and stop_at and not stopped and stop_at in log_file.read_text(errors="replace"):
                        process.send_signal(signal.SIGTERM)
                        stopped = True
                if process.poll() is None:
                    family = [process.pid, *descendants(process.pid)]
                    process.terminate()
                    time.sleep(5)
                    for pid in family:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    status.append("time limit")
                    break
                status.append(0 if stopped and process.returncode == 143 else process.returncode)
        row = {"step": name, "ok": not any(status), "status": status, "seconds": round(time.time() - began, 1)}
        row["said"] = [line[:300] for line in log_file.read_text(errors="replace").splitlines() if re.search(
            r"img/s|graphs|passed|failed|exactly|val_loss|images_per_s|trained|random|BLEU|continuing|rror", line)][-9:]
        self.rows.append(row)
        with open(self.out / "gpu.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:14} {'ok' if row['ok'] else status} {row['seconds']:6.1f} s")
        print("".join(f"    {line}\n" for line in row["said"]), end="", flush=True)
        return row["ok"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--minutes", type=float, default=7)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.folder.absolute()
    os.environ |= {"TIKTOKEN_CACHE_DIR": str(folder / "tokenizers"), "MDC_TEST_DATA": str(folder),
                   "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    steps = Steps(args.out.absolute(), 60 * args.minutes)
    work = steps.out / "work"
    name = torch.cuda.get_device_name() if CUDA else "no GPU: a rehearsal"
    print(f"{name}, torch {torch.__version__}, {os.cpu_count()} cores", flush=True)

    def prepare(split):
        return ["data.py", "--dataset", "photos", "--split", split, "--data-dir", work, "--image-size", SIDE,
                "--tokenizer", "gpt2" if CUDA else "words:200", "--source", *sorted(folder.glob(f"flickr8k-{split}-*.tar"))]

    def train(out, *words, size=MODEL, steps=60, batch=BATCH, launch=("-c", COUNTED)):
        return [*launch, "train.py", "--dataset", "photos", "--data-dir", work, "--image-size", SIDE, "--model", size,
                "--batch-size", batch, "--steps", steps, "--warmup", steps // 3, "--log-every", 10, "--save-every",
                steps, "--eval-every", 0, "--fresh", "--out", work / out, *words]

    small = {"size": "S/16" if CUDA else "tiny", "steps": 30, "batch": 64 if CUDA else 8}
    # Names of machines need not resolve without a network.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=1")
    if not steps.run("prepare", 60, prepare("train"), prepare("val"), reserve=RESERVE):
        sys.exit("error: the shards could not be made; see prepare.log")

    run = train("run", steps=200)  # so many that the loader has no batches left from the time of compilation
    again = [word for word in run if word != "--fresh"]
    steps.run("train", 200, run, again, stop_at="step    100", reserve=RESERVE)
    large = CUDA and torch.cuda.get_device_properties(0).total_memory > 100e9  # ours and P2 are in memory together
    for size, batch in (("B/16", 512 if large else 256), ("B/32", 512)) if CUDA else (("tiny", 8),):
        bench = ["tests/bench.py", size, "--batch-size", batch, "--against", "P2", "--minutes", 0.1]
        steps.run(f"bench-{size}".replace("/", ""), 150, bench, reserve=RESERVE)

    # Seven programs share the cores.
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2" if CUDA else "1"}
    two = ("--workers", 2 if CUDA else 0)
    with ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(steps.run, "tests", 180, ["-m", "pytest", "-q", "-n", "4" if CUDA else "0",
                                                      "-p", "no:cacheprovider", "tests/test_cuda.py"])]
        jobs.append(pool.submit(steps.run, "torchrun", 180, train("ddp", *two, steps=20, launch=torchrun)))
        for objective in ("ar", "clip", "bert", "parallel"):
            jobs.append(pool.submit(steps.run, objective, 180, train(objective, "--objective", objective, *two, **small)))
        mdc = train("small", *two, **small)
        probe = ["probe.py", "--ckpt", work / "small" / "ckpt.pt", "--dataset", "cifar10", "--source", folder,
                 "--knn", "--limit", 1000 if CUDA else 100]
        caption = ["sample.py", "--ckpt", work / "small" / "ckpt.pt", "--dataset", "photos", "--data-dir", work]
        score = [*caption, "--count", 64, "--metrics"]
        page = [*caption, "--count", 2, "--html", work / "page.html", "--order", "ancestral", "--temperature", 1]
        jobs.append(pool.submit(steps.run, "probe", 180, mdc, score, page, probe))
        for job in jobs:
            job.result()

    print(f"{sum(row['ok'] for row in steps.rows)} of {len(steps.rows)} steps ok, results in {args.out}/gpu.jsonl")


if __name__ == "__main__":
    main()
