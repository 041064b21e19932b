"""Train a captioner by masked diffusion; the encoder's features are what it is for.

    python train.py                                                       # the embedded data set, minutes on a CPU
    python train.py --dataset cc3m                                        # one GPU; data.py has made the shards
    torchrun --nproc_per_node=8 train.py --dataset cc3m --model B/16      # eight GPUs
    python train.py --objective ar                                        # what the paper compares with: ar, bert, ...

Typing the same command again continues a run that was stopped, bit for bit on a CPU. The global batch (--batch-size)
is what counts: how it is split into processes and micro-batches changes speed and memory, not the result. OUT (default
out/DATASET-MODEL-OBJECTIVE) gets ckpt.pt, ckpt-previous.pt, best.pt, log.jsonl, report.html and at the end samples.png
and final.json."""
import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import diffusion
from data import Batches, UserError, decode_caption, open_split, random_stream, run
from model import SIZES, Captioner, Config, flops
from sample import captions_of, choose_lengths, data_uri, load_captioner, report, show_example, write_page

# What `--dataset NAME` alone means; an explicit option wins. Values for photographs follow Cap and Cluster Masking at
# academic scale; see "Choices made without the full text" in the README.
PHOTOGRAPHS = {"model": "B/16", "image_size": 224, "tokenizer": "gpt2", "max_tokens": 64, "epochs": 32.0,
               "batch_size": 2048, "captions_per_image": 1, "lr": 5e-4, "warmup": 2000, "encoder_start": 0,
               "weight_decay": 0.2, "crop_scale": 0.5, "flip": False, "t_min": 0.5}
MILLIONS = PHOTOGRAPHS | {"save_every": 2000, "eval_every": 2000}
PRESETS = {
    "shapes": {"model": "tiny", "image_size": 48, "tokenizer": "words:100", "max_tokens": 16, "steps": 1250,
               "batch_size": 32, "captions_per_image": 1, "lr": 1e-3, "warmup": 100, "encoder_start": 0,
               "weight_decay": 0.05, "crop_scale": 1.0, "flip": False, "t_min": 0.5},
    "flickr8k": {"model": "tiny/4", "image_size": 32, "tokenizer": "words:4000", "max_tokens": 32, "steps": 4900,
                 "batch_size": 64, "captions_per_image": 3, "lr": 1.5e-3, "warmup": 200, "encoder_start": 300,
                 "weight_decay": 0.1, "crop_scale": 0.25, "flip": True, "t_min": 0.5},
    "coco": PHOTOGRAPHS | {"model": "S/16", "batch_size": 512, "lr": 1e-3, "warmup": 1000},
    "cc3m": MILLIONS,
    "cc12m": MILLIONS,
    "recap": MILLIONS | {"max_tokens": 128, "epochs": 20.0},
}
OBJECTIVES = {"mdc": "masked diffusion captioning", "ar": "autoregressive captioning", "clip": "contrastive learning",
              "bert": "image-conditioned BERT, one masking ratio", "parallel": "everything masked, one pass"}
# Options that change where, how fast or how often, but not the weights that come out.
MAY_CHANGE = {"data_dir", "out", "fresh", "device", "compile", "workers", "micro_batch", "save_every", "eval_every",
              "log_every", "bench"}
EVAL_BATCH, EVAL_BATCHES, SHOWN = 128, 8, 8
INPUTS = ("images", "tokens", "mask", "valid", "rows", "where", "targets")        # of Captioner.forward
# Dense bfloat16 FLOP/s of the data sheets, by the whole name of the card: a guess would make MFU a lie.
PEAKS = {"NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12,
         "NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12}


def parse_args(argv=None):
    """Command line -> (namespace with the data set's preset filled in, the preset)."""
    parser = data.Parser(__doc__)
    add = parser.add_argument_group("data (defaults of most options: the preset, printed first)").add_argument
    add("--dataset", default="shapes", help="name under DATA_DIR; presets: " + ", ".join(PRESETS) + " (others: cc3m's)")
    add("--data-dir", default="data", metavar="DIR", help="where data.py put the shards (default: data)")
    add("--image-size", type=int, metavar="PX", help="pixels of the square that the encoder sees")
    add("--crop-scale", type=float, metavar="X", help="smallest share of the area that a crop keeps; 1: no crops")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the images; but captions may say left")
    add("--tokenizer", metavar="NAME", help="has to be the shards'; see data.py")
    add("--max-tokens", type=int, metavar="N", help="longest caption with its EOS; longer ones are cut, EOS kept")
    add("--pairs", type=int, metavar="N", help="train on the first N images only (default: on all)")
    add("--workers", type=int, metavar="N", help="loader processes a rank; 0: none (default: CUDA at most 16, else 0)")
    add = parser.add_argument_group("model and objective").add_argument
    add("--model", choices=list(SIZES), help="size of encoder and decoder")
    add("--positions", choices=("sincos", "learned"), default="sincos", help="of the patches (default: sincos)")
    add("--objective", choices=list(OBJECTIVES), default="mdc", help="; ".join(map(": ".join, OBJECTIVES.items())))
    add("--t-min", type=float, metavar="R", help="mdc: smallest masking ratio 1 - alpha, 0..1; 0: bound on log p")
    add("--t-max", type=float, default=1.0, metavar="R", help="mdc: largest masking ratio (default: 1)")
    add("--mask-ratio", type=float, default=0.5, metavar="R", help="bert: its masking ratio, in (0,1] (default: 0.5)")
    add("--schedule", choices=list(diffusion.SCHEDULES), default="linear", help="mdc: alpha_t (default: linear)")
    add("--weight", choices=("elbo", "flat"), default="elbo", help="of a masked token: elbo, -alpha'/(1-alpha), which "
        "is 1/t for linear (default), or flat, 1 (ablation)")
    add("--pads", choices=("hidden", "eos"), default="hidden", help="after the end of a caption: hidden, for nothing "
        "(default), or eos, tokens like others, with which a caption can end by itself")
    add = parser.add_argument_group("optimization").add_argument
    add("--batch-size", type=int, metavar="B", help="images of a step over all processes")
    add("--captions-per-image", type=int, metavar="N", help="captions to answer about an image that is encoded once; "
        "more than it has: the same ones, masked anew (ar, parallel: repeated)")
    add("--micro-batch", type=int, metavar="B", help="images, with their captions, that a process takes at a time: "
        "memory, not the result")
    add("--steps", type=int, metavar="N", help="length of the run; or give --epochs")
    add("--epochs", type=float, metavar="X", help="length of the run in passes over the images")
    add("--lr", type=float, help="peak learning rate of AdamW (betas 0.9, 0.98), cosine to 0")
    add("--warmup", type=int, metavar="N", help="steps of linear warm-up; 0 turns it off")
    add("--encoder-start", type=int, metavar="N", help="step at which the encoder's own warm-up begins; before it only "
        "the decoder learns")
    add("--weight-decay", type=float, metavar="X", help="on tensors of two or more dimensions; 0 turns it off")
    add("--clip", type=float, default=1.0, metavar="X", help="largest gradient norm; 1e9 turns it off (default: 1)")
    add("--seed", type=int, default=0, help="of weights, order, crops and masks (default: 0)")
    add("--init", metavar="CKPT", help="start from the weights of another run (fine-tuning)")
    add = parser.add_argument_group("machine and output").add_argument
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="default: the first of these there is")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="default: bfloat16 where it is fast")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile (default: on for CUDA)")
    add("--bench", choices=("real", "repeat"), help="only measure the speed of --steps steps (default: 40), with the "
        "loader, or with one batch again and again; nothing is saved")
    add("--out", metavar="DIR", help="default: out/DATASET-MODEL-OBJECTIVE")
    add("--fresh", action="store_true", help="start over and replace what is in OUT")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints (default: preset, else 500)")
    add("--eval-every", type=int, metavar="N", help="steps between validations; 0: none (default: preset, else 500)")
    add("--log-every", type=int, metavar="N", help="steps between log lines (default: 50)")
    args = parser.parse_args(argv)
    preset = PRESETS.get(args.dataset, PHOTOGRAPHS)
    if args.bench:
        args.steps, args.fresh, args.eval_every = args.steps or 40, True, 0
        args.log_every = min(args.steps, args.log_every or 10)
    given = ("steps", "epochs") if args.steps or args.epochs else ()
    values = {"save_every": 500, "eval_every": 500, "log_every": 50} | preset
    if args.init or args.objective == "clip":                     # --init: it has learnt; clip: no words come first
        values["encoder_start"] = 0
    if args.objective == "clip":
        values["captions_per_image"] = 1
    for name, value in values.items():
        if getattr(args, name) is None and name not in given:
            setattr(args, name, value)
    args.out = args.out or f"out/{args.dataset}-{args.model.replace('/', '')}-{args.objective}"
    data.check_least(args, image_size=1, batch_size=1, captions_per_image=1, micro_batch=1, pairs=1, steps=1,
                     save_every=1, log_every=1, max_tokens=2, workers=0, warmup=0, encoder_start=0, weight_decay=0,
                     seed=0, lr=0, clip=0, eval_every=0, epochs=1e-9, t_min=0, mask_ratio=1e-9, crop_scale=1e-9)
    if args.init and not os.path.isfile(args.init):
        raise UserError(f"--init {args.init}: no such file")
    args.ratios = {"bert": (args.mask_ratio,) * 2, "parallel": (1.0, 1.0)}.get(args.objective, (args.t_min, args.t_max))
    if not args.ratios[0] <= args.ratios[1] <= 1 or args.ratios[1] <= 0:
        raise UserError(f"masking ratios from {args.ratios[0]} to {args.ratios[1]}: expected 0 <= --t-min <= --t-max "
                        "<= 1 and --mask-ratio in (0,1]")
    if args.pads == "eos" and args.objective in ("ar", "clip"):
        raise UserError(f"--pads eos is for masked objectives; {args.objective} has no use for it")
    if args.captions_per_image > 1 and args.objective == "clip":
        raise UserError("--objective clip compares an image with one caption: --captions-per-image 1")
    if args.crop_scale > 1:
        raise UserError(f"--crop-scale {args.crop_scale}: expected at most 1, which means no crops")
    return args, preset


def find_device(device, dtype, local_rank):
    """--device, --dtype -> (torch.device, torch.dtype of autocast, the reason in words). fp16 is never chosen."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{local_rank + 1} or more processes, but {torch.cuda.device_count()} GPUs here: "
                            f"torchrun --nproc_per_node={max(1, torch.cuda.device_count())}, or --device cpu")
        torch.cuda.set_device(local_rank)
        fast, name = torch.cuda.get_device_capability() >= (8, 0), torch.cuda.get_device_name()
    elif device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: this machine has none; use --device cpu")
        fast, name = False, "this Mac's GPU"
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
        fast = "avx512_bf16" in cpuinfo or "amx_bf16" in cpuinfo
        name = f"this CPU ({torch.get_num_threads()} threads)"
    reason = f"{name} has {'' if fast else 'no fast '}bfloat16 matrix products"
    if dtype == "auto":
        dtype = "bfloat16" if fast else "float32"
    return torch.device(device, local_rank if device == "cuda" else None), getattr(torch, dtype), f"{dtype}: {reason}"


def keep_memory():
    """Keep freed memory instead of returning it to Linux, and use huge pages; to be called before the first tensor.

    A step allocates and frees the same gigabytes again and again. By default each large tensor is mapped anew and paid
    for page by page: a third of a step of `tiny` on a CPU."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")            # PyTorch's switch for huge pages on the CPU
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)                                            # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, -1)                                           # M_TRIM_THRESHOLD: what is free at the end stays


def get_lr(step, peak, warmup, steps, start=0):
    """Learning rate of a step: 0 before `start`, linear warm-up, a cosine from `peak` at `warmup` to 0 at `steps`."""
    rise = min(1, max(0, step + 1 - start) / max(1, warmup))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))


def split_batch(batch_size, world, micro_batch, contrastive=False):
    """Global batch -> number of equal micro-batches of each process, by default of at most 256 images.

    Raises UserError with the numbers if the images cannot be shared out equally, or if CLIP's would be split: each of
    its captions is compared with all images of the batch."""
    share = max(1, batch_size // world)
    micro = min(share, micro_batch or (share if contrastive else 256))
    if batch_size % world or share % micro:
        raise UserError(f"--batch-size {batch_size} cannot be shared out equally among {world} processes in parts of "
                        f"{micro}: expected a multiple of {world * micro}; change --batch-size or --micro-batch")
    if contrastive and micro < share:
        raise UserError(f"--micro-batch {micro}: --objective clip needs all {share} images of a process "
                        f"({batch_size} / {world}) at once; use more processes or a smaller --batch-size")
    return share // micro


def print_main(*words):
    """Print on the first process only, above the progress bar if there is one."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def gather(mine, world):
    """Lists of CPU tensors and plain values of all processes -> one list, the same everywhere."""
    parts = [mine] * world
    if world > 1:
        dist.all_gather_object(parts, mine)
    return sum(parts, [])


def to_device(batch, device):
    """Every tensor of a batch to the device; from pinned memory the copy runs while the host goes on."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def matmul_rate(device, dtype):
    """FLOP/s of this machine's product of large square matrices, the best of some rounds: what a model can hope for."""
    n, rates = 2048 if device.type == "cpu" else 8192, []
    x = torch.randn(n, n, device=device).to(dtype)
    for _ in range(8):
        began = time.perf_counter()
        float((x @ x)[0, 0])                                      # waits for the device
        rates.append(2 * n ** 3 / (time.perf_counter() - began))
    return max(rates)


@torch.no_grad()
def evaluate(model, batches, device, autocast, rank, world):
    """Validation on all processes, each with batches of its own, fixed times and masks -> dict of plain numbers.

    The training objective with the right images and with others of their batch: diffusion.image_gain. Of CLIP the loss
    over all images at once, and diffusion.recall."""
    model.eval()
    L, clip, mine = model.config.max_tokens, model.config.objective == "clip", []
    for number, batch in enumerate(batches):
        batch = to_device(batch, device)
        B, T = batch["mask"].shape
        with autocast:
            if clip:
                captions = torch.nn.functional.pad(batch["tokens"], (0, L - T), value=model.config.eos)
                mine.append([x.cpu() for x in (*model(*(batch[name] for name in INPUTS)), captions)])
                continue
            features, shift = model.encode(batch["images"]), random_stream(rank + number * world, data.EXCHANGE, 0)
            exchanged = features.roll(1 + int(shift.integers(B - 1)), 0)
            losses = [model.decoder(model.decoder.read(seen), *(batch[name] for name in INPUTS[1:])).cpu().double()
                      for seen in (features, exchanged)]
        place, weight = (batch["where"] // T * L + batch["where"] % T).cpu(), batch["weight"].cpu()
        table = [torch.zeros(B * L, dtype=torch.float64).index_copy(0, place, loss * weight) for loss in losses]
        mine.append((*(x.view(B, L) for x in table), batch["length"].cpu(), batch["ratio"].cpu(), losses[0]))
    model.train()
    columns = map(torch.cat, zip(*gather(mine, world), strict=True))
    if clip:
        image, text, captions = columns
        number = captions.unique(dim=0, return_inverse=True)[1]                           # equal captions are one
        loss = diffusion.contrastive_loss(image, text, image, text)
        return {"val_loss": float(loss)} | diffusion.recall(image, text, number)
    return diffusion.image_gain(*columns)


def save_checkpoint(path, checkpoint):
    """Write a checkpoint; the ckpt.pt before it stays as ckpt-previous.pt. At every moment one of the two is whole."""
    try:
        with data.replace_file(path) as file:
            torch.save(checkpoint, file)
            if path.name == "ckpt.pt" and path.exists():
                os.replace(path, path.with_name("ckpt-previous.pt"))
    except (OSError, RuntimeError) as problem:                    # torch hides a full disk in a RuntimeError
        raise UserError(f"{path} could not be written ({problem}): what was saved before is intact; make room and type "
                        "the same command again") from None


def find_checkpoint(args, digest):
    """The checkpoint to continue, or None; and why this run is refused, or None. digest: Shards.digest of the training
    shards."""
    paths = [] if args.fresh else [Path(args.out) / name for name in ("ckpt.pt", "ckpt-previous.pt")]
    paths = [path for path in paths if path.exists()]
    for path in paths:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            options = checkpoint["options"]
        except Exception as problem:                              # a file cut short can break in any way
            print_main(f"{path} cannot be read ({type(problem).__name__})")
            continue
        changed = [f"--{name.replace('_', '-')} was {options.get(name)}, now {value}"
                   for name, value in vars(args).items() if name not in MAY_CHANGE and options.get(name) != value]
        changed += ["the training shards were made anew"] * (checkpoint["shards"] != digest)
        if changed:
            return None, (f"{path} is another run ({'; '.join(changed)}): repeat its options, or use --fresh or "
                          "another --out")
        print_main(f"continuing {path} at step {checkpoint['step']:,}")
        return checkpoint, None
    return None, f"no checkpoint in {args.out} can be read: start over with --fresh" if paths else None


def start_from(path, model, tokenizer):
    """Load the weights of another run (--init); its captions may be shorter or longer, the rest has to be the same."""
    start, checkpoint = load_captioner(path)
    weights, config, own = start.state_dict(), start.config, model.decoder.positions.detach()
    old, new = ((c.size, c.image_size, c.objective == "clip") for c in (config, model.config))
    if checkpoint["tokenizer"] != tokenizer or old != new:
        raise UserError(f"--init {path} is a {config.size} ({config.objective}) for images of {config.image_size} px, "
                        f"tokenizer {checkpoint['tokenizer']['name']}: this run has to be the same")
    weights["decoder.positions"] = torch.cat([weights["decoder.positions"], own[config.max_tokens:]])[:len(own)]
    model.load_state_dict(weights)


def main():
    """Configuration, data, model, optimizer, loop, report: one after the other."""
    started = time.time()
    keep_memory()
    args, preset = parse_args()
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device, dtype, reason = find_device(args.device, args.dtype, local_rank)
    args.dtype, out = str(dtype).removeprefix("torch."), Path(args.out)
    cuda, clip = device.type == "cuda", args.objective == "clip"
    if world > 1:                                                 # gloo too: what is said about steps needs no GPU
        store, *_ = next(dist.rendezvous("env://"))               # after a restart it still has the dead's addresses
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    out.mkdir(parents=True, exist_ok=True)

    # data
    print_main(f"nanoMDC: {OBJECTIVES[args.objective]} on {args.dataset} -> {out}\n{reason}\npreset "
               f"{args.dataset if args.dataset in PRESETS else 'cc3m'}: "
               + ", ".join(f"{name} {getattr(args, name)}" for name in preset if getattr(args, name) is not None))
    for split in ("train", "val") if args.dataset == "shapes" else ():
        if not (Path(args.data_dir) / "shapes" / split / "meta.json").exists():
            what = "waiting for the first process, which draws" if rank else "drawing"
            print(f"{what} the embedded data set, split {split}, into {args.data_dir}/shapes (once)", flush=True)
            data.prepare("shapes", split, args.data_dir, image_size=args.image_size, tokenizer=args.tokenizer)
    train, val = (open_split(args.data_dir, args.dataset, split) for split in ("train", "val"))
    for made in (train.meta, val.meta):
        if made["tokenizer"] != train.meta["tokenizer"] or made["tokenizer"]["name"] != args.tokenizer or \
                made["image_size"] < args.image_size:
            raise UserError(f"{args.data_dir}/{args.dataset} has shards of {made['tokenizer']['name']} tokens, up to "
                            f"{made['image_size']} px, this run wants {args.tokenizer} and {args.image_size} px: make "
                            "both splits again, data.py --fresh --tokenizer ... --image-size ...")
    train.rows = train.rows[:args.pairs]
    args.steps = args.steps or max(1, round(args.epochs * len(train) / args.batch_size))
    if args.encoder_start >= args.steps and not args.bench:
        raise UserError(f"--encoder-start {args.encoder_start}: in {args.steps} steps the encoder would learn nothing; "
                        "use --encoder-start 0, or a longer run")
    if args.warmup >= args.steps and not args.bench:
        print_main(f"warning: --warmup {args.warmup}: in {args.steps} steps the learning rate never reaches its peak")
    accumulation = split_batch(args.batch_size, world, args.micro_batch, clip)
    lengths = Counter()                                           # of the captions as they are trained on, cut
    for length, count in train.lengths.items():
        lengths[min(length, args.max_tokens)] += count
    mean_length = sum(n * count for n, count in lengths.items()) / lengths.total()
    print_main(f"{len(train):,} training images, {len(val):,} for validation; captions of {mean_length:.1f} tokens on "
               f"average; {args.steps:,} steps of {args.batch_size} images, {args.captions_per_image} captions each: "
               f"{args.steps * args.batch_size / len(train):.1f} epochs")

    # model and optimizer
    config = Config(args.model, args.image_size, train.tokenizer.n_vocab, args.max_tokens, train.tokenizer.eot_token,
                    args.pads, args.positions, args.objective if args.objective in ("ar", "clip") else "mdc")
    found = [*find_checkpoint(args, train.digest), (out / "final.json").exists()] if rank == 0 else [None] * 3
    if world > 1:                                                 # the first process decides, the others need no disk
        dist.broadcast_object_list(found, device=torch.device("cpu"))
    checkpoint, refused, finished = found
    if refused:
        raise UserError(refused) if rank == 0 else SystemExit(2)
    first, best, before = map(checkpoint.get, ("step", "best", "seconds")) if checkpoint else (0, math.inf, 0.0)
    started -= before
    if first == args.steps and finished:
        print_main(f"this run is finished ({args.steps:,} steps); --fresh starts over")
        return print_end(args) if rank == 0 else None
    try:
        model = Captioner(config)
    except ValueError as problem:
        raise UserError(problem) from None
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    elif args.init:
        start_from(args.init, model, train.meta["tokenizer"])
    elif not clip:                    # start at the words' frequencies: learning them alone would take many steps
        captions = [ids[:args.max_tokens] for i in range(min(len(train), 10_000)) for ids in train.captions(i)]
        counts = torch.from_numpy(np.bincount(np.concatenate(captions), minlength=config.vocab_size) + 1)
        counts[config.eos] += (args.pads == "eos") * sum(args.max_tokens - len(ids) for ids in captions)
        model.decoder.head.bias.data = (counts / counts.sum()).log().float()
    model.to(device)
    groups = []                                                   # the encoder may start later than the rest
    for part, start in ((True, args.encoder_start), (False, 0)):
        for matrix, decay in ((True, args.weight_decay), (False, 0.0)):
            groups.append({"weight_decay": decay, "start": start, "params": [
                p for name, p in model.named_parameters() if p.requires_grad and (p.ndim > 1) == matrix and
                name.startswith("encoder.") == part]})
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=device.type != "mps")
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    use_compile = args.compile == "on" or (args.compile == "auto" and cuda)
    millions = [sum(p.numel() for p in part) / 1e6 for part in (
        model.encoder.parameters(), model.parameters(), (p for group in groups[::2] for p in group["params"]))]
    print_main("{}: {:.2f} M parameters in the encoder, {:.2f} M in all; weight decay on {:.2f} M; torch.compile {}"
               .format(args.model, *millions, "on" if use_compile else "off"))
    if use_compile:
        torch._dynamo.config.optimize_ddp = False                 # it would cut large blocks in two
        for block in [*model.encoder.blocks, *model.decoder.blocks]:
            block.compile()                                       # in place: one graph for all layers of a part
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    # batches: everything random about them is decided in the loader, by (seed, step, place in the global batch)
    view = functools.partial(diffusion.training_batch, objective=args.objective, ratios=args.ratios,
                             schedule=args.schedule)
    same = {name: getattr(args, name) for name in ("image_size", "max_tokens", "seed", "pads")}
    ask = functools.partial(view, batch_size=args.batch_size * args.captions_per_image, flat=args.weight == "flat",
                            mean_length=args.max_tokens if args.pads == "eos" else mean_length)
    batches = Batches(train, args.batch_size, crop_scale=args.crop_scale, flip=args.flip, accumulation=accumulation,
                      captions=args.captions_per_image, transform=ask, rank=rank, world=world, **same)
    size = max(2, min(EVAL_BATCH, len(val)))
    ask_for_sums = functools.partial(view, batch_size=size, mean_length=1 / size)            # of nats, no means
    checks = Batches(val, size, augment=False, transform=ask_for_sums, **same)
    eval_count = min(EVAL_BATCHES, (len(val) + size - 2) // size)                 # a single image cannot be exchanged
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = args.workers if args.workers is not None else max(1, min(16, cores)) if cuda else 0
    loader = functools.partial(torch.utils.data.DataLoader, batch_size=None, num_workers=workers, pin_memory=cuda)
    stopped = []                                                  # signals; a second one ends the run at once
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: (stopped.append(number), signal.signal(number, signal.SIG_DFL)))
    stream = iter(loader(batches, sampler=range(first * accumulation, args.steps * accumulation)))
    if args.bench == "repeat":
        stream = itertools.repeat(next(stream))
    if not checkpoint:
        print_main(show_example(batches[0], train.tokenizer, args.objective))

    # loop
    log_file, machine = out / "log.jsonl", f"{platform.machine()}, {reason}"
    images = checks[0]["images"][:SHOWN] if eval_count else []
    given = [decode_caption(val.tokenizer, val.captions(i)[0]) for i in range(len(images))]
    if rank == 0 and not args.bench:
        kept = log_file.read_text().splitlines() if checkpoint and log_file.exists() else []
        kept = [line for line in kept if line.endswith("}") and json.loads(line)["step"] <= first]
        log_file.write_text("".join(f"{line}\n" for line in kept))
        for name in ("final.json", *(() if checkpoint else ("ckpt.pt", "ckpt-previous.pt", "best.pt"))):
            (out / name).unlink(missing_ok=True)

    def log(record):
        if rank == 0 and not args.bench:
            with open(log_file, "a") as file:
                file.write(json.dumps(record) + "\n")

    def save(name, step):
        if rank == 0:
            save_checkpoint(out / name, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "best": best,
                "seconds": time.time() - started,
                "config": asdict(config), "options": vars(args), "lengths": dict(lengths),
                "tokenizer": train.meta["tokenizer"], "shards": train.digest})

    @torch.compiler.set_stance("force_eager")                     # graphs for a few batches do not pay
    def validate(step):
        """Evaluate, tell, keep the best, and bring report.html up to date; returns the figures."""
        nonlocal best
        mine = range(rank, eval_count, world)
        own = loader(checks, sampler=mine, num_workers=min(workers, len(mine)))
        figures = evaluate(model, own, device, autocast, rank, world)
        if figures["val_loss"] < best:
            best = figures["val_loss"]
            save("best.pt", step)
        print_main(f"step {step:6,}  validation: " + ", ".join(
            f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float)))
        if rank == 0:
            captions = [] if clip else captions_of(model, images, choose_lengths(lengths, len(images)), val.tokenizer)
            log({"step": step, "event": "eval", "captions": captions} | figures)
            write_page("report.html", out / "report.html", {
                "title": out.name, "command": shlex.join(["python", *sys.argv]), "machine": machine, "given": given,
                "records": [json.loads(line) for line in log_file.read_text().splitlines()],
                "images": [data_uri(image) for image in images]})
        return figures

    card = torch.cuda.get_device_name() if cuda else ""
    bar = tqdm(total=args.steps, initial=first, unit="step", dynamic_ncols=True,
               disable=rank > 0 or not sys.stderr.isatty())
    total, broken = torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device)
    work, waited, since, since_step = 0, 0.0, time.time(), first
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, args.lr, args.warmup, args.steps, group["start"])
        for micro in range(accumulation):
            asked = time.time()
            batch = next(stream)
            waited += time.time() - asked
            work += flops(config, len(batch["images"]), len(batch["rows"]), len(batch["where"])) * world
            batch = to_device(batch, device)
            # gradients travel with the last micro-batch only; DDP wants to know before the forward pass
            with contextlib.nullcontext() if world == 1 or micro == accumulation - 1 else wrapped.no_sync():
                with autocast:
                    outputs = wrapped(*(batch[name] for name in INPUTS))
                if clip:                                          # this process's part of the global batch's loss
                    everyone = outputs
                    if world > 1:
                        everyone = [torch.cat(dist.nn.functional.all_gather(side)) for side in outputs]
                    loss = diffusion.contrastive_loss(*outputs, *everyone, first=rank * len(outputs[0]))
                else:
                    loss = (outputs * batch["weight"]).sum()
                (loss * world).backward()                         # DDP takes the mean over processes, we want the sum
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        broken = torch.where((broken == 0) & ~norm.isfinite(), step + 1, broken)      # on the device: no waiting
        optimizer.step()
        optimizer.zero_grad()
        if clip:                                                  # the inverse temperature is at most 100
            model.log_scale.data.clamp_(max=math.log(100))
        done = step + 1
        bar.update()
        stop = torch.tensor(max(stopped, default=0))
        if world > 1:                                             # all processes agree on the step
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        save_now = not args.bench and (done % args.save_every == 0 or done == args.steps or stop)
        if done % args.log_every == 0 or save_now:                # before a save, so that no broken state is saved
            if broken > 0:
                raise UserError(f"the gradient of step {int(broken):,} is not finite; the last checkpoint in {out} is "
                                "from before it: try a smaller --lr with --fresh")
            steps, elapsed = done - since_step, time.time() - since
            record = {"step": done, "loss": sum(gather([float(total)], world)) / steps, "grad_norm": float(norm),
                      "lr": optimizer.param_groups[-1]["lr"], "images_per_s": steps * args.batch_size / elapsed,
                      "data_wait": waited / elapsed, "tflops": work / elapsed / 1e12}
            record |= {"mfu": work / elapsed / world / PEAKS[card]} if card in PEAKS else {}
            log(record)
            print_main(f"step {done:6,}/{args.steps:,}  loss {record['loss']:7.4f}  lr {record['lr']:.2e}  "
                       f"grad {record['grad_norm']:6.3f}  {record['images_per_s']:7.1f} img/s  "
                       f"wait {record['data_wait']:5.1%}  {record['tflops']:7.2f} TFLOP/s  "
                       + (f"MFU {record['mfu']:5.1%}  " if card in PEAKS else "")
                       + f"left {(args.steps - done) * elapsed / steps / 60:5.1f} min")
            total, work, waited, since_step = torch.zeros_like(total), 0, 0.0, done
            since = time.time()
        paused = time.time()
        if args.eval_every and done % args.eval_every == 0 and done < args.steps and eval_count and not stop:
            validate(done)
        if save_now:
            save("ckpt.pt", done)
        since += time.time() - paused
        if stop and not args.bench:
            print_main(f"stopped after step {done:,} and saved; the same command goes on from there")
            sys.exit(128 + int(stop))
    bar.close()
    if args.bench:
        rate, achieved = matmul_rate(device, dtype), record["tflops"] * 1e12 / world
        return print_main(f"last {steps} steps: {achieved / 1e12:.2f} TFLOP/s a process (pads and unmasked logits not "
                          f"counted), {achieved / rate:.1%} of the {rate / 1e12:.2f} TFLOP/s of a matrix product here")
    # report
    figures = validate(args.steps) if eval_count else {}
    if rank == 0:
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            figures |= report(model, val, args.seed, lengths, out / "samples.png") if len(val) and not clip else {}
        figures |= {"minutes": (time.time() - started) / 60, "machine": machine}
        record = {"step": args.steps, "event": "final"} | figures
        log(record)
        (out / "final.json").write_text(json.dumps(record))
        print_end(args)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def print_end(args):
    """What was reached, and the commands to type next."""
    record = json.loads((Path(args.out) / "final.json").read_text())
    if "gain" in record:
        print_main(f"\nvalidation loss {record['val_loss']:.4f} nats per token; with exchanged images "
                   f"{record['gain']:.3f} ± {record['gain_se']:.3f} more")
    if "exact" in record:
        print_main(f"{record['exact']:.1%} of the held-out captions are exactly right, every word of them")
    what = f"--ckpt {args.out}/ckpt.pt"
    labelled = "shapes" if args.dataset == "shapes" else "cifar10 --source raw/cifar10"
    use = '--score "a dog" "a red circle" photo.jpg' if args.objective == "clip" else \
        f"--dataset {args.dataset} --split val --trace --count 3"
    print_main(f"{record['minutes']:.1f} minutes; look at {args.out}/report.html and samples.png\nnext:\n"
               f"  python sample.py {what} {use}\n  python probe.py {what} --dataset {labelled}")


if __name__ == "__main__":
    run(main)
