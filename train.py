"""Train a captioner by masked diffusion; its image encoder learns visual features.

    python train.py                                     # synthetic images, minutes on a CPU
    torchrun --nproc_per_node=8 train.py --dataset cc3m # GPUs; data.py made the shards

The same command continues a stopped run, bit for bit on a CPU. `main` reads from top to bottom;
`step_loss` calls the objectives."""
import argparse
import functools
import json
import math
import multiprocessing.queues
import os
import shlex
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
from torch.nn.parallel import DistributedDataParallel

import data
import diffusion
import sample
from data import (DATASETS, Batches, UserError, decode_caption, fraction, non_negative_float,
                  non_negative_int, open_split, positive_float, positive_int)
from diffusion import SCHEDULES
from model import SIZES, Block, Config, build_model, flops

# cc3m, cc12m and others: CapPa and Cluster Masking at academic scale.
LARGE_SCALE = dict(model="B/16", epochs=32.0, batch_size=2048, lr=5e-4, warmup=2000,
                   weight_decay=0.2, crop_scale=0.5, save_every=2000, eval_every=2000)
OFTEN = dict(save_every=500, eval_every=500)
PRESETS = {
    "shapes": dict(OFTEN, model="tiny", steps=1250, batch_size=32, lr=1e-3, warmup=100,
                   weight_decay=0.05, crop_scale=1.0),
    "flickr8k": dict(OFTEN, model="tiny/4", steps=4000, batch_size=64, lr=7.5e-4, warmup=200,
                     weight_decay=0.1, crop_scale=0.5, flip=True),
    "coco": LARGE_SCALE | dict(OFTEN, model="S/16", batch_size=512, lr=1e-3, warmup=1000),
    "recap": dict(LARGE_SCALE, epochs=20.0),
}
# --init: gentle, to keep what the weights know.
FINE_TUNING = dict(steps=None, epochs=10.0, lr=5e-5, warmup=100, weight_decay=0.01)
OBJECTIVES = ("mdc", "ar", "clip", "bert", "parallel")
# May change in a continued run.
MAY_CHANGE = ("data_dir", "out", "fresh", "device", "compile", "workers", "micro_batch",
              "save_every", "eval_every", "log_every")
# Options in OUT's name, if changed, with the only objective that has them.
NAMED = {"mask_ratio": "bert", "t_min": "mdc", "t_max": "mdc", "schedule": "mdc",
         "pairs": None, "seed": None}

EVAL_BATCH = 128
EVAL_IMAGES = 1024
EXCHANGES = 8  # wrong images of a validation caption
CLIP_NORM = 1.0  # of gradients
# Dense bfloat16 FLOP/s, for model FLOP utilization (MFU).
PEAKS = {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


# ---- options
def make_parser():
    """All options; those of PRESETS without defaults."""
    parser = data.Parser(__doc__)
    add = parser.add_argument_group("data (defaults: the preset)").add_argument
    add("--dataset", default="shapes", help=f"{', '.join(DATASETS)} or another")
    add("--data-dir", default="data")
    add("--image-size", type=positive_int, help="pixels (default: preset or shards)")
    add("--crop-scale", type=fraction, help="least share of the area in a crop; 1: central")
    add("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror at random")
    add("--tokenizer", help="of the shards")
    add("--max-tokens", type=positive_int, help="longest caption; others are cut")
    add("--pairs", type=positive_int, help="train on a random subset")
    add("--workers", type=non_negative_int, help="per process (default: up to 16 with CUDA)")

    add = parser.add_argument_group("model and objective").add_argument
    add("--model", choices=SIZES)
    add("--objective", choices=OBJECTIVES, default="mdc", help="default: mdc")
    add("--t-min", type=non_negative_float, default=0.5, help="mdc: smallest t (default: 0.5)")
    add("--t-max", type=fraction, default=1.0, help="mdc: largest t (default: 1)")
    add("--mask-ratio", type=fraction, default=0.5, help="bert (default: 0.5)")
    add("--schedule", choices=SCHEDULES, default="linear", help="mdc (default: linear)")

    group = parser.add_argument_group("optimization (defaults: the preset)")
    add = group.add_argument
    add("--batch-size", type=positive_int, help="images per step, in all processes")
    add("--micro-batch", type=positive_int, help="images at a time (default: 256; clip: all)")
    add("--lr", type=non_negative_float, help="peak learning rate of AdamW")
    add("--warmup", type=non_negative_int, help="steps")
    add("--weight-decay", type=non_negative_float, help="of matrices")
    add("--seed", type=non_negative_int, default=0)
    add("--init", help="checkpoint to fine-tune")
    add = group.add_mutually_exclusive_group().add_argument
    add("--steps", type=positive_int)
    add("--epochs", type=positive_float)

    add = parser.add_argument_group("machine and output").add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="auto: with CUDA")
    add("--out", help="default: out/DATASET-MODEL-OBJECTIVE...")
    add("--fresh", action="store_true", help="start over, replace what OUT has")
    add("--save-every", type=positive_int, help="steps between checkpoints")
    add("--eval-every", type=non_negative_int, help="steps between validations; 0: the last only")
    add("--log-every", type=positive_int, default=50, help="steps (default: 50)")
    return parser


def parse_args(argv=None):
    """Command line -> namespace, completed by the preset."""
    parser = make_parser()
    args = parser.parse_args(argv)
    shards = DATASETS.get(args.dataset, data.PHOTOGRAPHS | {"image_size": None})
    preset = PRESETS.get(args.dataset, LARGE_SCALE) | shards | {"tokenizer": None}
    if args.init is not None:
        preset |= FINE_TUNING | {"crop_scale": max(0.8, preset["crop_scale"])}
    if args.steps or args.epochs:  # instead of the preset's length
        preset |= {"steps": None, "epochs": None}
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)

    if args.t_min > args.t_max:
        raise UserError(f"--t-min {args.t_min} --t-max {args.t_max}: expected t_min <= t_max")
    name = f"{args.dataset}-{args.model.replace('/', '')}-{args.objective}"
    for option, objective in NAMED.items():
        value = getattr(args, option)
        if value != parser.get_default(option):
            option = option.replace("_", "-")
            if objective not in (None, args.objective):
                raise UserError(f"--{option} is not for --objective {args.objective}")
            name += f"-{option}{value}"
    fixed = {"bert": (args.mask_ratio, args.mask_ratio), "parallel": (1.0, 1.0)}
    args.times = fixed.get(args.objective, (args.t_min, args.t_max))
    args.fresh &= os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # once
    args.out = args.out or f"out/{name}{'-init' if args.init else ''}"
    if args.init and Path(args.init).resolve().parent == Path(args.out).resolve():
        raise UserError(f"--init {args.init} is in --out {args.out}: use another --out, to keep it")
    return args


# ---- machine
class Processes(NamedTuple):
    """This process among those of torchrun; by default the only one."""
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launched: bool = False  # by torchrun


def find_processes():
    """Environment of torchrun -> Processes."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = [os.environ.get(name, "") for name in names]
    if not any(values[:2]):
        return Processes()
    numbers = [int(value) for value in values[:3] if value.isdecimal()]
    if not all(values) or len(numbers) < 3 or numbers[0] >= numbers[1]:
        found = dict(zip(names, values))
        raise UserError(f"environment {found}: start with torchrun, or `unset RANK WORLD_SIZE`")
    return Processes(*numbers, launched=True)


def connect(cuda):
    """Join torchrun's processes: gloo on CPUs, NCCL on CUDA."""
    # After a restart the store still holds the addresses of crashed workers.
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def find_device(args, local_rank):
    """-> device, name; completes --dtype, --compile and --workers."""
    cuda = args.device == "cuda"
    device = torch.device(args.device, local_rank if cuda else None)
    name = f"{torch.get_num_threads()} CPU threads"
    fast = False
    if cuda:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(f"only {count} GPUs: use --device cpu or a smaller --nproc_per_node")
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name()
        fast = torch.cuda.get_device_capability() >= (8, 0)
    elif os.path.exists("/proc/cpuinfo"):
        flags = Path("/proc/cpuinfo").read_text()
        fast = "avx512_bf16" in flags or "amx_bf16" in flags
    if args.dtype == "auto":
        args.dtype = "bfloat16" if fast else "float32"
    if args.compile == "auto":
        args.compile = "on" if cuda else "off"
    if args.workers is None:
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = min(16, cores) if cuda else 0
    return device, name


def print0(text):
    """Print in the first process only."""
    if os.environ.get("RANK", "") in ("", "0"):
        print(text, flush=True)


def gather(rows, world):
    """Rows of tensors of all processes -> their columns, concatenated."""
    parts = [rows] * world
    if world > 1:
        dist.all_gather_object(parts, rows)
    return map(torch.cat, zip(*sum(parts, [])))


# ---- one step
def get_lr(step, peak, warmup, steps):
    """Linear warm-up, then a cosine from `peak` to 0 at `steps`."""
    rise = min(1, (step + 1) / max(1, warmup))
    done = max(0, step - warmup) / max(1, steps - warmup)
    return peak * rise * 0.5 * (1 + math.cos(math.pi * done))


def split_batch(batch_size, world, micro_batch, contrastive=False):
    """Number of equal micro-batches of each process."""
    share = max(1, batch_size // world)
    micro = min(share, micro_batch or (share if contrastive else 256))
    if contrastive and micro < share:  # it compares all captions with all images
        raise UserError(f"--micro-batch {micro}: clip needs all {share} images; leave it out")
    if batch_size % world or share % micro:
        raise UserError(f"--batch-size {batch_size}: expected a multiple of {world * micro}, for "
                        f"{world} processes and micro-batches of {micro}")
    return share // micro


def add_masks(batch, objective, times, schedule):
    """Add t [B], mask [B,T] and the flat masked positions, where [K], to a batch on the CPU."""
    batch["mask"] = batch["valid"]
    if objective not in ("ar", "clip"):
        t = diffusion.stratified_times(batch["u"], batch["strata"], *times)
        ratio, _ = SCHEDULES[schedule](t)
        batch["t"] = t.float()
        batch["mask"] = diffusion.mask_tokens(batch["noise"], batch["valid"], ratio)
    batch["where"] = batch["mask"].flatten().nonzero()[:, 0]
    return batch


def step_loss(model, batch, objective, schedule, scale, ddp):
    """This process's loss, summed over tokens (clip: pairs); scale: inverse temperature."""
    images, tokens = batch["images"], batch["tokens"]
    valid, where = batch["valid"], batch["where"]
    if objective == "ar":
        return diffusion.ar_loss(model, images, tokens, valid, where)
    if objective == "clip":
        image, text = model(images, tokens, valid)
        both = torch.stack([image, text])  # [2,b,D]
        if ddp.world > 1:
            both = torch.cat(dist.nn.functional.all_gather(both), dim=1)  # [2,B,D]
        return diffusion.clip_loss(image, text, *both, scale, ddp.rank * len(image))
    return diffusion.mdc_loss(model, images, tokens, batch["mask"], valid, where, batch["t"],
                              SCHEDULES[schedule])


# ---- validation
def evaluate_captioner(model, batches, schedule, world):
    """Score captions given their own image, then EXCHANGES wrong ones, with fixed masks:

    val_loss      nats per token
    wrong_image   its cost in nats per token; _se: standard errors
    visual_gain   of the hidden words, nats per caption
    by_ratio      loss of a masked token in tenths of masking ratios
    by_position   [wrong_image, its standard error, captions]"""
    rows = []
    for batch in batches:
        tokens, where = batch["tokens"], batch["where"]
        targets = tokens.flatten()[where]
        B, T = tokens.shape
        ratio = weight = torch.ones(B, device=tokens.device)
        if "t" in batch:
            ratio, weight = SCHEDULES[schedule](batch["t"])
        nll = weight.new_zeros(B, min(EXCHANGES + 1, B), model.config.max_tokens)  # [B,M,L]
        features = model.encode(batch["images"])
        for shift in range(nll.shape[1]):  # 0: its own image
            memory = model.decoder.read(features.roll(shift, 0))
            logits = model.decoder(memory, tokens, batch["mask"], batch["valid"], where)
            nll[where // T, shift, where % T] = diffusion.cross_entropy(logits, targets)
        row = (nll, weight, ratio, batch["mask"].sum(1), batch["valid"].sum(1))
        rows.append([value.cpu().double() for value in row])
    nll, weight, ratio, masked, length = gather(rows, world)

    loss = nll * weight[:, None, None]  # [n,M,L]
    cost = loss[:, 1:].mean(1) - loss[:, 0]  # [n,L]
    wrong_image = cost.sum() / length.sum()
    error = (cost.sum(1) - wrong_image * length).norm() / length.sum()  # delta method
    gain = diffusion.visual_gain(-nll.sum(2))  # [n]; unweighted: a log p
    tenth = (ratio * 10 + 1e-6).long().clamp(max=9)  # 0.7 was rounded down in float32
    by_ratio = tenth.bincount(nll[:, 0].sum(1), 10) / tenth.bincount(masked, 10)
    by_position = [cost[length > i, i] for i in range(int(length.max()))]
    return dict(
        val_loss=float(loss[:, 0].sum() / length.sum()),
        wrong_image=float(wrong_image),
        wrong_image_se=float(error),
        visual_gain=float(gain.mean()),
        visual_gain_se=float(gain.std() / len(gain) ** 0.5),
        by_ratio=[None if math.isnan(mean) else mean for mean in by_ratio.tolist()],
        by_position=[[float(here.mean()), float(here.std() / len(here) ** 0.5), len(here)]
                     for here in by_position if len(here) > 1])


def evaluate_clip(model, batches, world):
    """Loss of all validation pairs in one batch of n; chance is log n."""
    rows = []
    for batch in batches:
        image, text = model(batch["images"], batch["tokens"], batch["valid"])
        rows.append([image.double().cpu(), text.double().cpu()])
    image, text = gather(rows, world)
    loss = diffusion.clip_loss(image, text, image, text, model.log_scale.exp().cpu())
    return {"val_loss": float(loss) / len(image)}


# ---- checkpoints
def save_checkpoint(path, checkpoint):
    """Write ckpt.pt; the one before becomes ckpt-previous.pt."""
    try:
        with data.replace_file(path) as file:
            torch.save(checkpoint, file)
            if path.exists():
                os.replace(path, path.with_name("ckpt-previous.pt"))
    except (OSError, RuntimeError) as problem:  # torch hides a full disk in a RuntimeError
        raise UserError(f"{path} was not written: {problem}") from None


def find_checkpoint(args):
    """The checkpoint to continue or None."""
    path, previous = (Path(args.out, name) for name in ("ckpt.pt", "ckpt-previous.pt"))
    if previous.exists() and not path.exists():  # killed in saving
        os.replace(previous, path)
    if args.fresh or not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        was = checkpoint["options"]
    except Exception as problem:  # damage can raise anything
        raise UserError(f"{path} cannot be read ({type(problem).__name__}): type mv {previous} "
                        f"{path} if it exists, or use --fresh") from None
    now = vars(args)
    changed = [f"{name} was {was.get(name)}, now {now[name]}"
               for name in now if name not in MAY_CHANGE and was.get(name) != now[name]]
    if changed:
        raise UserError(f"{path} differs ({'; '.join(changed)}): use what it was, --fresh or --out")
    print0(f"continuing {path} at step {checkpoint['step']:,} of {args.steps:,}")
    return checkpoint


def start_from(path, model, tokenizer):
    """Load the weights of another run (--init)."""
    start, checkpoint = sample.load_captioner(path)
    if checkpoint["tokenizer"] != tokenizer or start.config != model.config:
        raise UserError(f"--init {path} is a {start.config}, tokenizer "
                        f"{checkpoint['tokenizer']['name']}: {model.config} has to be the same")
    model.load_state_dict(start.state_dict())


# ---- stages of main
def log(run, record):
    """Append a record to OUT/log.jsonl and run.records."""
    if run.ddp.rank == 0:
        run.records.append(record)
        with open(run.out / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def save(run):
    """Write OUT/ckpt.pt."""
    if run.ddp.rank == 0:
        save_checkpoint(run.out / "ckpt.pt", dict(
            model=run.model.state_dict(), optimizer=run.optimizer.state_dict(), step=run.step,
            seconds=time.time() - run.started, config=vars(run.model.config),
            options=vars(run.args), lengths=dict(run.lengths), records=run.records,
            tokenizer=run.train.meta["tokenizer"]))


def open_data(args):
    """Training and validation shards; completes --image-size, --tokenizer and the checksum
    `shards`."""
    folder = Path(args.data_dir, args.dataset)
    for split in ("train", "val") if args.dataset == "shapes" else ():
        if not (folder / split / "meta.json").exists():
            data.prepare("shapes", split, args.data_dir, image_size=args.image_size,
                         tokenizer=args.tokenizer or DATASETS["shapes"]["tokenizer"])
    train = open_split(args.data_dir, args.dataset, "train")
    val = open_split(args.data_dir, args.dataset, "val")
    args.shards = f"{len(train)} of {train.digest[:8]}"  # len grows once val is made
    pixels = min(train.meta["image_size"], val.meta["image_size"])
    args.image_size = args.image_size or pixels
    names = [split.meta["tokenizer"]["name"] for split in (train, val)]
    args.tokenizer = args.tokenizer or names[0]
    problem = None
    if args.image_size > pixels:
        problem = f"images for {pixels} px, not {args.image_size}: train with --image-size {pixels}"
    elif args.tokenizer != names[0] or val.meta["tokenizer"] != train.meta["tokenizer"]:
        problem = f"tokens of {names}, not {args.tokenizer}: leave out --tokenizer"
    if problem:
        raise UserError(f"{folder} has {problem}, or make both splits again with data.py --fresh")
    if args.pairs:
        train = train.subset(args.pairs, args.seed)
    return train, val


def open_output(run):
    """Reserve OUT -> the checkpoint to continue or None."""
    found = ["error"]
    try:
        if run.ddp.rank == 0:
            run.out.mkdir(parents=True, exist_ok=True)
            run.lock = data.lock(run.out)  # until this process ends
            found = [find_checkpoint(run.args)]
    finally:
        if run.ddp.world > 1:
            dist.broadcast_object_list(found, device=torch.device("cpu"))
    if found == ["error"]:  # told by the first
        sys.exit(2)
    return found[0]


def clear_output(run, checkpoint):
    """Cut the log to the checkpoint, or remove an earlier run."""
    run.records = checkpoint["records"] if checkpoint else []
    lines = (json.dumps(record) + "\n" for record in run.records)
    (run.out / "log.jsonl").write_text("".join(lines))
    if not checkpoint:
        for name in ("ckpt.pt", "ckpt-previous.pt", "report.html", "samples.png"):
            (run.out / name).unlink(missing_ok=True)


def start_model(run, checkpoint):
    """Build the model: continued from a checkpoint, from --init, or new."""
    args, train = run.args, run.train
    objective = args.objective if args.objective in ("ar", "clip") else "mdc"
    config = Config(args.model, args.image_size, train.tokenizer.n_vocab, args.max_tokens,
                    train.tokenizer.eot_token, objective)
    try:
        model = build_model(config)
    except ValueError as problem:
        raise UserError(problem) from None
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    elif args.init is not None:
        start_from(args.init, model, train.meta["tokenizer"])
    elif args.objective != "clip":
        # Start at the word frequencies, which take many steps to learn.
        captions = [ids for i in range(min(len(train), 10_000)) for ids in train.captions(i)]
        counts = 0.1 + np.bincount(np.concatenate(captions), minlength=config.vocab_size)
        model.decoder.head.bias.data[:len(counts)] = torch.from_numpy(counts / counts.sum()).log()
    return model.to(run.device)


def make_optimizer(model, args):
    """AdamW with weight decay on matrices only, as in nanoGPT."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.98), fused=True)


def compile_blocks(model):
    """Compile the transformer blocks in place: one graph serves all layers of a part."""
    torch._dynamo.config.optimize_ddp = False  # it would cut large blocks in two
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()


def init_worker(_):
    """Leave the process group: Ctrl-C and `timeout` signal it, and train.py still needs batches."""
    os.setpgid(0, 0)
    # End if a batch does not fit into /dev/shm: train.py would wait for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)


def load(run, batches, items):
    """Yield masked batches on the device, copied in the background from pinned memory."""
    args = run.args
    mask = functools.partial(add_masks, objective=args.objective, times=args.times,
                             schedule=args.schedule)
    loader = torch.utils.data.DataLoader(
        batches, None, sampler=items, num_workers=min(args.workers, len(items)), collate_fn=mask,
        pin_memory=run.device.type == "cuda", worker_init_fn=init_worker)
    for batch in loader:
        yield {name: value.to(run.device, non_blocking=True) for name, value in batch.items()}


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # graphs for a few batches do not pay
def validate(run):
    """Evaluate and renew report.html -> figures, or {}."""
    if len(run.val) < 2:
        print0("warning: too few validation images: see data.py --split")
        return {}
    args, ddp = run.args, run.ddp
    # In random order: a batch exchanges images, and neighbours are alike.
    val = run.val.subset(min(len(run.val), EVAL_IMAGES), seed=0)
    count = math.ceil(len(val) / EVAL_BATCH)
    size = math.ceil(len(val) / count)
    batches = Batches(val, size, args.image_size, args.max_tokens, seed=0, augment=False)
    masked = load(run, batches, range(ddp.rank, count, ddp.world))

    with run.autocast:
        if args.objective == "clip":
            figures = evaluate_clip(run.model, masked, ddp.world)
        else:
            figures = evaluate_captioner(run.model, masked, args.schedule, ddp.world)
    line = "step {step:6,}  val_loss {val_loss:.4f}"
    if "wrong_image" in figures:
        line += ("  wrong_image {wrong_image:.3f} ± {wrong_image_se:.3f}"
                 "  visual_gain {visual_gain:.3f} ± {visual_gain_se:.3f}")
    print0(line.format(step=run.step, **figures))

    if ddp.rank == 0:
        first = batches[0]
        images = first["images"][:8]
        captions = []
        if args.objective != "clip":
            length = sample.median_length(run.lengths)
            captions = sample.captions_of(run.model, images, length, val.tokenizer)
        log(run, dict(figures, step=run.step, event="eval", captions=captions))
        page = dict(title=run.out.name, command=shlex.join(["python", *sys.argv]),
                    machine=run.machine, records=run.records,
                    images=[sample.data_uri(image) for image in images],
                    given=[decode_caption(val.tokenizer, row) for row in first["tokens"][:8]])
        sample.write_page("report.html", run.out / "report.html", page)
    return figures


def log_progress(run, since, norm, lr):
    """Print and log the figures since the last line."""
    steps = run.step - since["step"]
    elapsed = time.time() - since["start"]
    loss = since["loss"].cpu()
    if run.ddp.world > 1:
        dist.all_reduce(loss)
    record = dict(
        step=run.step, loss=float(loss) / steps, lr=lr, grad_norm=float(norm),
        images_per_s=steps * run.args.batch_size / elapsed, data_wait=since["wait"] / elapsed,
        tflops=since["flops"] / elapsed / 1e12 * run.ddp.world,
        minutes_left=(run.args.steps - run.step) * elapsed / steps / 60)
    line = ("step {step:6,}/{steps:,}  loss {loss:6.3f}  lr {lr:.1e}  grad {grad_norm:5.2f}  "
            "{images_per_s:6,.0f} img/s  wait {data_wait:3.0%}  {tflops:5.1f} TFLOP/s  ")
    if run.peak:
        record["mfu"] = since["flops"] / elapsed / run.peak
        line += "(MFU {mfu:3.0%})  "
    print0((line + "{minutes_left:5.1f} min left").format(steps=run.args.steps, **record))
    log(run, record)


def train_loop(run, wrapped, batches, accumulation):
    """Optimize until --steps; SIGTERM and Ctrl-C end the run after a checkpoint."""
    args, model, ddp = run.args, run.model, run.ddp
    clip = args.objective == "clip"
    # The loss is a mean over the tokens (clip: pairs) of an average batch: a constant, so
    # no part of a batch has to know the others.
    mean_length = sum(n * count for n, count in run.lengths.items()) / run.lengths.total()
    total = args.batch_size * (1 if clip else mean_length)
    stopped = []

    def stop_later(number, _):
        stopped.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the run at once

    signal.signal(signal.SIGTERM, stop_later)
    signal.signal(signal.SIGINT, stop_later)
    since = Counter(step=run.step, start=time.time())
    while run.step < args.steps:
        lr = get_lr(run.step, args.lr, args.warmup, args.steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        for micro in range(accumulation):
            asked = time.time()
            batch = next(batches)
            since["wait"] += time.time() - asked
            images = len(batch["images"])
            predicted = 0 if clip else len(batch["where"])
            since["flops"] += flops(model.config, images, images * mean_length, predicted)
            # DDP averages gradients after the last micro-batch; its forward pass prepares it.
            wrapped.require_backward_grad_sync = micro == accumulation - 1
            with run.autocast:
                scale = model.log_scale.exp() if clip else None
                loss = step_loss(wrapped, batch, args.objective, args.schedule, scale, ddp)
                loss = loss / total
            # DDP takes the mean over processes; the loss of the batch is their sum.
            (loss * ddp.world).backward()
            since["loss"] += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        since["broken"] += ~norm.isfinite()  # on the device: steps do not wait
        run.optimizer.step()
        run.optimizer.zero_grad()
        if clip:
            model.log_scale.data.clamp_(max=math.log(100))  # as CLIP

        run.step += 1
        stop = torch.tensor(max(stopped, default=0))
        if ddp.world > 1:  # all processes stop after the same step
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        ends = run.step == args.steps or stop > 0
        saves = ends or run.step % args.save_every == 0
        validates = args.eval_every and run.step % args.eval_every == 0 and not ends
        if not (saves or validates or run.step % args.log_every == 0):
            continue
        if since["broken"] > 0:
            raise UserError(f"a gradient after step {since['step']} is not finite, and nothing was "
                            "saved since: use --fresh with a smaller --lr")
        log_progress(run, since, norm, lr)
        if validates:
            validate(run)
        if saves:
            save(run)
        if stop:
            print0(f"stopped after step {run.step:,} and saved; the same command continues")
            sys.exit(128 + int(stop))
        since = Counter(step=run.step, start=time.time())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@torch.compiler.set_stance("force_eager")
def finish(run):
    """Validate, draw samples.png, print what is next."""
    args = run.args
    record = dict(validate(run), step=run.step, event="final", machine=run.machine)
    if run.ddp.rank > 0:
        return
    if "wrong_image" in record:
        record |= sample.report(run.model, run.val, run.lengths, run.out / "samples.png")
    if "exact" in record:
        print(f"{record['exact']:.1%} of the validation captions are exactly right")
    record["minutes"] = (time.time() - run.started) / 60
    log(run, record)

    print(f"{record['minutes']:.1f} minutes; look at {args.out}/report.html\nnext:")
    words = shlex.join(["--ckpt", f"{args.out}/ckpt.pt", "--dataset", args.dataset,
                        "--data-dir", args.data_dir])
    if args.objective != "clip":
        print(f"  python sample.py {words} --trace --count 3")
    if args.dataset == "shapes":
        print(f"  python probe.py {words}")


def main():
    started = time.time()
    args = parse_args()
    ddp = find_processes()
    device, name = find_device(args, ddp.local_rank)
    if ddp.launched:
        connect(device.type == "cuda")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    # data
    train, val = open_data(args)
    accumulation = split_batch(args.batch_size, ddp.world, args.micro_batch,
                               args.objective == "clip")
    args.steps = args.steps or max(1, round(args.epochs * len(train) / args.batch_size))
    lengths = Counter()
    cut = 0
    for length, count in train.lengths.items():
        lengths[min(length, args.max_tokens)] += count
        cut += count * (length > args.max_tokens)
    shown = [f"{option}={value}" for option, value in vars(args).items() if value is not None]
    print0("  ".join(shown))
    machine = f"{args.dtype} on {name}"
    print0(f"{machine}\n{len(train):,} training and {len(val):,} validation images, "
           f"{args.steps * args.batch_size / len(train):.1f} epochs "
           f"({min(1, args.warmup / args.steps):.0%} warm-up); {cut:,} captions cut")

    # output and model
    run = argparse.Namespace(
        args=args, ddp=ddp, device=device, autocast=autocast, machine=machine,
        peak=PEAKS.get(name), train=train, val=val, lengths=lengths, out=Path(args.out),
        step=0, started=started)
    checkpoint = open_output(run)
    model = run.model = start_model(run, checkpoint)
    if ddp.rank == 0:
        clear_output(run, checkpoint)
    run.optimizer = make_optimizer(model, args)
    if checkpoint:
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        run.step = checkpoint["step"]
        run.started -= checkpoint["seconds"]
        del checkpoint
    if args.compile == "on":
        compile_blocks(model)
    print0(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    wrapped = model
    if ddp.launched:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # batches
    batches = Batches(train, args.batch_size, args.image_size, args.max_tokens, args.seed, True,
                      args.crop_scale, args.flip, ddp.rank, ddp.world, accumulation)
    if run.step == 0:
        example = add_masks(batches[0], args.objective, args.times, args.schedule)
        print0(sample.show_example(example, train.tokenizer))

    # optimization
    items = range(run.step * accumulation, args.steps * accumulation)
    train_loop(run, wrapped, load(run, batches, items), accumulation)
    finish(run)
    if ddp.launched:
        del wrapped  # if it left the group last, the process could hang
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run(main)
