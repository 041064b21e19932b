"""Train a captioner by masked diffusion; the encoder's features are what it is for.

    python train.py                                                       # the embedded data set, minutes on a CPU
    python train.py --dataset cc3m                                        # one GPU; data.py has made the shards
    torchrun --nproc_per_node=8 train.py --dataset cc3m --model B/16      # eight GPUs
    python train.py --objective ar                                        # what the paper compares with: ar, bert, ...

Typing the same command again continues a run that was stopped. The global batch (--batch-size) is what counts: how it
is split into processes and micro-batches changes speed and memory, not the result. OUT (default
out/DATASET-MODEL-OBJECTIVE) gets ckpt.pt, log.jsonl and, at the end, samples.png.
"""
import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch.nn.parallel import DistributedDataParallel

import diffusion
from data import EXCHANGE, Batches, UserError, check_least, open_split, prepare, random_stream, run
from model import SIZES, Captioner, Config
from sample import load_captioner, report, show_example

# What `--dataset NAME` alone means; an explicit option wins. Values for photographs follow Cap and Cluster Masking at
# academic scale; see "Choices made without the full text" in the README.
PHOTOGRAPHS = {"model": "B/16", "image_size": 224, "tokenizer": "gpt2", "max_tokens": 64, "epochs": 32.0,
               "batch_size": 2048, "lr": 5e-4, "warmup": 2000, "weight_decay": 0.2, "crop_scale": 0.5, "t_min": 0.5}
PRESETS = {
    "shapes": {"model": "tiny", "image_size": 48, "tokenizer": "words:100", "max_tokens": 16, "steps": 1250,
               "batch_size": 32, "lr": 1e-3, "warmup": 100, "weight_decay": 0.05, "crop_scale": 1.0, "t_min": 0.5},
    "flickr8k": {"model": "tiny", "image_size": 64, "tokenizer": "gpt2", "max_tokens": 64, "epochs": 20.0,
                 "batch_size": 64, "lr": 1e-3, "warmup": 100, "weight_decay": 0.1, "crop_scale": 0.5, "t_min": 0.5},
    "coco": PHOTOGRAPHS | {"model": "S/16", "batch_size": 512, "lr": 1e-3, "warmup": 1000},
    "cc3m": PHOTOGRAPHS,
    "cc12m": PHOTOGRAPHS,
    "recap": PHOTOGRAPHS | {"max_tokens": 128, "epochs": 20.0},
}
OBJECTIVES = {"mdc": "masked diffusion captioning", "ar": "autoregressive captioning", "clip": "contrastive learning",
              "bert": "image-conditioned BERT, one masking ratio", "parallel": "everything masked, one pass"}
# Options that change where, how fast or how often, but not the weights that come out.
MAY_CHANGE = {"data_dir", "out", "fresh", "resume", "device", "compile", "workers", "micro_batch", "save_every",
              "eval_every", "log_every"}
EVAL_BATCH, EVAL_BATCHES, BINS = 128, 8, 10


def parse_args(argv=None):
    """Command line -> (namespace with the data set's preset filled in, the preset)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data (defaults of most options: the preset, printed first)").add_argument
    add("--dataset", default="shapes", help="name under DATA_DIR; presets: " + ", ".join(PRESETS) + " (others: cc3m's)")
    add("--data-dir", default="data", metavar="DIR", help="where data.py put the shards (default: data)")
    add("--image-size", type=int, metavar="PX", help="pixels of the square that the encoder sees")
    add("--crop-scale", type=float, metavar="X", help="smallest share of the area that a crop keeps; 1: no crops")
    add("--flip", action="store_true", help="mirror half of the images; off by default, because captions say left")
    add("--tokenizer", metavar="NAME", help="has to be the shards'; see data.py")
    add("--max-tokens", type=int, metavar="N", help="longest caption with its EOS; longer ones are cut, EOS kept")
    add("--pairs", type=int, metavar="N", help="train on the first N images only (default: on all)")
    add("--workers", type=int, metavar="N", help="loader processes a rank; 0 loads in the training process (default: "
        "on CUDA the cores divided by the ranks, at most 16; else 0)")
    add = parser.add_argument_group("model and objective").add_argument
    add("--model", choices=list(SIZES), help="size of encoder and decoder")
    add("--positions", choices=("sincos", "learned"), default="sincos", help="of the patches (default: sincos)")
    add("--objective", choices=list(OBJECTIVES), default="mdc",
        help="; ".join(f"{name}: {words}" for name, words in OBJECTIVES.items()) + " (default: mdc)")
    add("--t-min", type=float, metavar="R", help="mdc: smallest masking ratio 1 - alpha, in [0,1]: the paper's is 0.5; "
        "0 makes the loss a bound on the likelihood")
    add("--t-max", type=float, default=1.0, metavar="R", help="mdc: largest masking ratio, in (0,1] (default: 1)")
    add("--mask-ratio", type=float, default=0.5, metavar="R", help="bert: its masking ratio, in (0,1] (default: 0.5)")
    add("--schedule", choices=list(diffusion.SCHEDULES), default="linear", help="mdc: how often each ratio between "
        "--t-min and --t-max comes (default: linear, all alike)")
    add("--weight", choices=("elbo", "flat"), default="elbo", help="of a masked token: elbo, -alpha'/(1-alpha), which "
        "is 1/t for linear (default), or flat, 1 (ablation)")
    add("--loss-per", choices=("token", "caption"), default="token", help="what counts the same (default: token)")
    add("--pads", choices=("hidden", "eos"), default="hidden", help="after the end of a caption: hidden, for nothing "
        "(default), or eos, tokens like others, with which a caption can end by itself")
    add = parser.add_argument_group("optimization").add_argument
    add("--batch-size", type=int, metavar="B", help="images of a step over all processes")
    add("--micro-batch", type=int, metavar="B", help="images a process takes at a time: memory, not the result "
        "(default: at most 256)")
    add("--steps", type=int, metavar="N", help="length of the run; or give --epochs")
    add("--epochs", type=float, metavar="X", help="length of the run in passes over the images")
    add("--lr", type=float, help="peak learning rate of AdamW (betas 0.9, 0.98), cosine to 0")
    add("--warmup", type=int, metavar="N", help="steps of linear warm-up; 0 turns it off")
    add("--weight-decay", type=float, metavar="X", help="on tensors of two or more dimensions; 0 turns it off")
    add("--clip", type=float, default=1.0, metavar="X", help="largest gradient norm; inf turns it off (default: 1)")
    add("--seed", type=int, default=0, help="of weights, order, crops and masks (default: 0)")
    add("--init", metavar="CKPT", help="start from the weights of another run (fine-tuning)")
    add = parser.add_argument_group("machine and output").add_argument
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="default: the first of these there is")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of matrix products (default: "
        "bfloat16 where the hardware has it)")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile (default: on for CUDA)")
    add("--out", metavar="DIR", help="default: out/DATASET-MODEL-OBJECTIVE")
    add("--resume", metavar="CKPT", help="continue from this checkpoint instead of OUT/ckpt.pt")
    add("--fresh", action="store_true", help="start over and replace what is in OUT")
    for name, what in (("save", "checkpoints"), ("eval", "validations (0: only at the end)"), ("log", "log lines")):
        steps = 50 if name == "log" else 500
        add(f"--{name}-every", type=int, default=steps, metavar="N", help=f"steps between {what} (default: {steps})")
    args = parser.parse_args(argv)
    preset = PRESETS.get(args.dataset, PHOTOGRAPHS)
    lengths = ("steps", "epochs") if args.steps or args.epochs else ()
    for name, value in preset.items():
        if getattr(args, name) is None and name not in lengths:
            setattr(args, name, value)
    for name in ("resume", "init"):
        if getattr(args, name) and not os.path.isfile(getattr(args, name)):
            raise UserError(f"--{name} {getattr(args, name)}: no such file")
    args.out = args.out or f"out/{args.dataset}-{args.model.replace('/', '')}-{args.objective}"
    check_least(args, image_size=1, batch_size=1, micro_batch=1, pairs=1, steps=1, save_every=1, log_every=1,
                max_tokens=2, workers=0, warmup=0, weight_decay=0, seed=0, lr=0, clip=0, eval_every=0, epochs=1e-9,
                t_min=0, mask_ratio=1e-9, crop_scale=1e-9)
    args.ratios = {"bert": (args.mask_ratio,) * 2, "parallel": (1.0, 1.0)}.get(args.objective, (args.t_min, args.t_max))
    if not args.ratios[0] <= args.ratios[1] <= 1 or not args.ratios[1] > 0:
        raise UserError(f"masking ratios from {args.ratios[0]} to {args.ratios[1]}: expected 0 <= --t-min <= --t-max "
                        "<= 1 and --mask-ratio in (0,1]")
    if args.pads == "eos" and args.objective in ("ar", "clip"):
        raise UserError(f"--pads eos is for masked objectives; {args.objective} has no use for it")
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
        has_bf16, name = torch.cuda.get_device_capability() >= (8, 0), torch.cuda.get_device_name()
    elif device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: this machine has none; use --device cpu")
        has_bf16, name = False, "this Mac's GPU"
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
        has_bf16 = "avx512_bf16" in cpuinfo or "amx_bf16" in cpuinfo
        name = f"this CPU ({torch.get_num_threads()} threads)"
    if dtype == "auto":
        dtype = "bfloat16" if has_bf16 else "float32"
        reason = f"{dtype}: {name} has {'' if has_bf16 else 'no fast '}bfloat16 matrix products"
    else:
        reason = f"{dtype}: --dtype, on {name}"
    return torch.device(device, local_rank if device == "cuda" else None), getattr(torch, dtype), reason


def keep_memory():
    """Keep freed memory instead of returning it to Linux, and use huge pages; to be called before the first tensor.

    A step allocates and frees the same gigabytes again and again. By default each large tensor is mapped anew and paid
    for page by page: a third of a step of `tiny` on a CPU.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")            # PyTorch's switch for huge pages on the CPU
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)                                            # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, -1)                                           # M_TRIM_THRESHOLD: what is free at the end stays


def compile_blocks(model):
    """torch.compile the transformer blocks in place: one graph for all layers of the encoder, one of the decoder."""
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        block.compile()


def get_lr(step, peak, warmup, steps):
    """Learning rate of a step: linear warm-up to `peak`, then a cosine to 0 at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def split_batch(batch_size, world, micro_batch, contrastive=False):
    """Global batch -> number of equal micro-batches of each process, by default of at most 256 images.

    Raises UserError with the numbers if the images cannot be shared out equally, or if CLIP's would be split: each of
    its captions is compared with all images of the batch.
    """
    if batch_size % world:
        raise UserError(f"--batch-size {batch_size} cannot be shared out equally among {world} processes")
    share = batch_size // world
    if contrastive and (micro_batch or share) < share:
        raise UserError(f"--micro-batch {micro_batch}: --objective clip needs all {share} images of a process "
                        f"({batch_size} / {world}) at once; use more processes or a smaller --batch-size")
    largest = share if contrastive else next(size for size in range(256, 0, -1) if share % size == 0)
    micro_batch = min(share, micro_batch or largest)
    if share % micro_batch:
        raise UserError(f"--micro-batch {micro_batch}: expected a divisor of {share} "
                        f"({batch_size} images / {world} processes)")
    return share // micro_batch


def make_optimizer(model, lr, weight_decay, device):
    """AdamW with decay on matrices only (also embeddings), not on biases and gains; fused where that exists."""
    groups = [[p for p in model.parameters() if p.requires_grad and (p.ndim > 1) == matrix] for matrix in (True, False)]
    print_main(f"weight decay {weight_decay} on {sum(p.numel() for p in groups[0]):,} numbers, none on "
               f"{sum(p.numel() for p in groups[1]):,}")
    groups = [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=device.type != "mps")


def print_main(*words):
    """Print on the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


def add_up(tensor, world):
    """Sum a tensor over all processes, in place."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


def to_device(batch, device):
    """Every tensor of a batch to the device; from pinned memory the copy runs while the host goes on."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


@torch.no_grad()
def evaluate(model, batches, device, autocast, rank, world):
    """Validation on all processes, each with batches of its own, fixed times and masks -> dict of plain numbers.

    val_loss   the training objective in nats a token
    control    the same with each image exchanged for another one of its batch; gain = control - val_loss says how
               much the words depend on the image, gain_se is its standard error over captions
    by_ratio   mean -log p of a masked token (unweighted) by masking ratio, in tenths; None where there was none
    """
    model.eval()
    home = torch.device("cpu") if device.type == "mps" else device        # MPS has no float64
    zeros = functools.partial(torch.zeros, dtype=torch.float64, device=home)
    sums, bins = zeros(6), zeros(2, BINS)
    for number, batch in enumerate(batches):
        batch = to_device(batch, device)
        B, T = batch["mask"].shape
        caption, length = (batch["where"] // T).to(home), batch["length"].to(home).double()
        shift = 1 + int(random_stream(rank + number * world, EXCHANGE, 0).integers(B - 1))
        with autocast:
            features = model.encode(batch["images"])
            words = [batch[name] for name in ("tokens", "mask", "valid", "rows", "where")]
            logits = (model.decoder(model.decoder.read(f), *words) for f in (features, features.roll(shift, 0)))
            losses = [diffusion.cross_entropy(x, batch["targets"]).to(home).double() for x in logits]
        real, control = (zeros(B).index_add(0, caption, loss * batch["weight"].to(home)) for loss in losses)
        gain = control - real
        sums += torch.stack([length, real, gain, gain * gain, gain * length, length * length]).sum(1)
        bin_of = (batch["ratio"].to(home) * BINS).long().clamp(max=BINS - 1)
        bins += torch.stack([zeros(BINS).index_add(0, bin_of, x) for x in (losses[0], torch.ones_like(losses[0]))])
    model.train()
    tokens, real, gain, gain2, gain_length, length2 = add_up(sums, world).tolist()
    ratio = gain / tokens                                         # standard error of a ratio of two sums over captions
    se = math.sqrt(max(0.0, gain2 - 2 * ratio * gain_length + ratio ** 2 * length2)) / tokens
    total, count = add_up(bins, world).tolist()
    return {"val_loss": real / tokens, "control": (real + gain) / tokens, "gain": ratio, "gain_se": se,
            "by_ratio": [t / c if c else None for t, c in zip(total, count, strict=True)]}


@torch.no_grad()
def evaluate_clip(model, batches, device, autocast):
    """Validation of CLIP, the same on all processes: the loss, and how often a right one of all captions (images) is
    among the nearest 1 or 5 of an image (caption). Images of the same caption are right for one another."""
    model.eval()
    pairs, captions = [], {}
    for batch in batches:
        numbers = [captions.setdefault(tuple(row[:n]), len(captions)) for row, n in
                   zip(batch["tokens"].tolist(), batch["length"].tolist(), strict=True)]
        batch = to_device(batch, device)
        with autocast:
            pairs.append([*model(*(batch[name] for name in ("images", "tokens", "mask", "valid", "rows"))),
                          torch.tensor(numbers, device=device)])
    model.train()
    image, text, number = (torch.cat(side) for side in zip(*pairs, strict=True))
    figures, same = {"val_loss": float(diffusion.contrastive_loss(image, text))}, number[:, None] == number
    for name, table in (("image_to_text", image @ text.T), ("text_to_image", text @ image.T)):
        best = table.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        before = ((table >= best) & ~same).sum(1)                 # a wrong one that ties stands before the right one
        figures |= {f"{name}_r{k}": float((before < k).float().mean()) for k in (1, 5)}
    return figures


def save_checkpoint(path, checkpoint):
    """Replace `path` by a new checkpoint; at every moment there is a whole one at `path` or at ckpt-previous.pt."""
    torch.save(checkpoint, f"{path}.tmp")
    with open(f"{path}.tmp", "rb+") as file:
        os.fsync(file.fileno())
    if path.exists():
        os.replace(path, path.with_name("ckpt-previous.pt"))
    os.replace(f"{path}.tmp", path)


def find_checkpoint(args):
    """The run to continue: the checkpoint's dict, or None for a new run. Raises UserError if options have changed."""
    paths = [Path(args.resume)] if args.resume else [Path(args.out) / name for name in ("ckpt.pt", "ckpt-previous.pt")]
    paths = [] if args.fresh else [path for path in paths if path.exists()]
    for path in paths:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            options = checkpoint["options"]
        except Exception as problem:                              # a file cut short can break in any way
            print_main(f"{path} cannot be read ({type(problem).__name__})")
            continue
        changed = [f"--{name.replace('_', '-')} was {options.get(name)}, now {value}"
                   for name, value in vars(args).items() if name not in MAY_CHANGE and options.get(name) != value]
        if changed:
            raise UserError(f"{path} is a run with other options ({'; '.join(changed)}): repeat its options, or use "
                            "--fresh or another --out")
        print_main(f"continuing {path} at step {checkpoint['step']:,}")
        return checkpoint
    if paths:
        raise UserError(f"no checkpoint in {args.out} can be read: start over with --fresh")
    return None


def main():
    """Configuration, data, model, optimizer, loop, report: one after the other."""
    started = time.time()
    args, preset = parse_args()
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device, dtype, reason = find_device(args.device, args.dtype, local_rank)
    args.dtype = str(dtype).removeprefix("torch.")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    out, clip = Path(args.out), args.objective == "clip"
    out.mkdir(parents=True, exist_ok=True)

    # data
    print_main(f"nanoMDC: {OBJECTIVES[args.objective]} on {args.dataset} -> {out}\n{reason}")
    print_main(f"preset {args.dataset if args.dataset in PRESETS else 'cc3m'}: "
               + ", ".join(f"{name} {getattr(args, name)}" for name in preset))
    if args.dataset == "shapes":
        for split in ("train", "val"):
            if not (Path(args.data_dir) / "shapes" / split / "meta.json").exists():
                print_main(f"drawing the embedded data set, split {split}, into {args.data_dir}/shapes (once)")
                prepare("shapes", split, args.data_dir, image_size=args.image_size, tokenizer=args.tokenizer)
    train, val = (open_split(args.data_dir, args.dataset, split) for split in ("train", "val"))
    train.total = min(len(train), args.pairs or len(train))
    for shards in (train, val):
        again = (f"prepare it again: python data.py --dataset {args.dataset} --split {shards.folder.name} --source ... "
                 "--fresh")
        if shards.meta["tokenizer"]["name"] != args.tokenizer or shards.meta["tokenizer"] != train.meta["tokenizer"]:
            raise UserError(f"{shards.folder} was tokenized by {shards.meta['tokenizer']['name']}, not as the training "
                            f"split and --tokenizer {args.tokenizer} want; {again} --tokenizer {args.tokenizer}")
        if shards.meta["image_size"] < args.image_size:
            raise UserError(f"{shards.folder} was made for images of {shards.meta['image_size']} px, --image-size is "
                            f"{args.image_size}; {again} --image-size {args.image_size}")
    args.steps = args.steps or max(1, round(args.epochs * len(train) / args.batch_size))
    accumulation = split_batch(args.batch_size, world, args.micro_batch, clip)
    lengths = {}
    for length, count in train.lengths.items():
        lengths[min(length, args.max_tokens)] = lengths.get(min(length, args.max_tokens), 0) + count
    mean_length = sum(n * count for n, count in lengths.items()) / sum(lengths.values())
    epochs = args.steps * args.batch_size / len(train)
    print_main(f"{len(train):,} training images, {len(val):,} for validation; captions of {mean_length:.1f} tokens on "
               f"average; {args.steps:,} steps of {args.batch_size} images = {epochs:.1f} epochs")

    # model
    config = Config(args.model, args.image_size, train.tokenizer.n_vocab, args.max_tokens, train.tokenizer.eot_token,
                    args.pads, args.positions, args.objective if args.objective in ("ar", "clip") else "mdc")
    checkpoint = find_checkpoint(args)
    if checkpoint and checkpoint["step"] == args.steps and (out / "final.json").exists():
        print_main(f"this run is finished ({args.steps:,} steps); --fresh starts over")
        return print_end(json.loads((out / "final.json").read_text()), args)
    try:
        model = Captioner(config)
    except ValueError as problem:
        raise UserError(problem) from None
    if checkpoint and checkpoint["shards"] != train.digest:
        raise UserError(f"{train.folder} was made anew since {out} was trained: use --fresh, or another --out")
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    elif args.init:
        start, spec = load_captioner(args.init)
        if spec["tokenizer"] != train.meta["tokenizer"] or start.config.size != args.model:
            raise UserError(f"--init {args.init} is a {start.config.size} with tokenizer {spec['tokenizer']['name']}, "
                            f"this run a {args.model} with {args.tokenizer}: they have to be the same")
        weights, rows = start.state_dict(), min(args.max_tokens, start.config.max_tokens)
        positions = weights["decoder.positions"][:rows], model.decoder.positions.detach()[rows:]
        weights["decoder.positions"] = torch.cat(positions)
        if weights["encoder.pos_embed"].shape != model.encoder.pos_embed.shape:
            raise UserError(f"--init {args.init} has images of {start.config.image_size} px: use --image-size "
                            f"{start.config.image_size}")
        model.load_state_dict(weights)
    model.to(device)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.decoder)]
    print_main(f"{args.model}: encoder {sizes[0]:.1f} M parameters, decoder {sizes[1]:.1f} M")
    optimizer = make_optimizer(model, args.lr, args.weight_decay, device)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    use_compile = args.compile == "on" or (args.compile == "auto" and device.type == "cuda" and sys.platform != "win32")
    step_model = torch.compile(wrapped) if use_compile else wrapped    # for training; `model` is saved and sampled
    print_main(f"torch.compile {'on' if use_compile else 'off'} (--compile {args.compile})")
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    # batches: everything random about them is decided in the loader, by (seed, step, place in the global batch)
    view = functools.partial(diffusion.training_batch, objective=args.objective, ratios=args.ratios,
                             schedule=args.schedule)
    same = {name: getattr(args, name) for name in ("image_size", "max_tokens", "seed", "pads")}
    per_token = {"token": args.max_tokens if args.pads == "eos" else mean_length, "caption": None}[args.loss_per]
    corrupt = functools.partial(view, batch_size=args.batch_size, mean_length=per_token, flat=args.weight == "flat")
    batches = Batches(train, args.batch_size, crop_scale=args.crop_scale, flip=args.flip, accumulation=accumulation,
                      transform=corrupt, rank=rank, world=world, **same)
    size = max(2, min(EVAL_BATCH, len(val)))
    corrupt = functools.partial(view, batch_size=size, mean_length=1 / size)                 # sums of nats, no means
    checks = Batches(val, size, augment=False, transform=corrupt, **same)
    eval_count = min(EVAL_BATCHES, (len(val) + size - 2) // size)                 # a single image cannot be exchanged
    cuda = device.type == "cuda"
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = args.workers if args.workers is not None else max(1, min(16, cores)) if cuda else 0
    loader = functools.partial(torch.utils.data.DataLoader, batch_size=None, num_workers=workers, pin_memory=cuda)
    first = checkpoint["step"] if checkpoint else 0
    stream = iter(loader(batches, sampler=range(first * accumulation, args.steps * accumulation)))
    if not checkpoint:
        print_main(show_example(batches[0], train.tokenizer, args.objective))

    # loop
    log_file = out / "log.jsonl"
    kept = log_file.read_text().splitlines() if checkpoint and log_file.exists() else []
    if rank == 0:
        for name in ("final.json",) if checkpoint else ("final.json", "ckpt.pt", "ckpt-previous.pt"):
            (out / name).unlink(missing_ok=True)
        kept = [line for line in kept if line.endswith("}") and json.loads(line)["step"] <= first]
        log_file.write_text("".join(f"{line}\n" for line in kept))

    def log(record):
        if rank == 0:
            with open(log_file, "a") as file:
                file.write(json.dumps(record) + "\n")

    def validate(step):
        if clip:
            figures = evaluate_clip(model, loader(checks, sampler=range(eval_count)), device, autocast)
            said = "".join(f", {name.replace('_', ' ')} {value:.1%}" for name, value in figures.items() if "_r" in name)
        else:
            mine = loader(checks, sampler=range(rank, eval_count, world))
            figures = evaluate(model, mine, device, autocast, rank, world)
            said = (f", with exchanged images {figures['control']:.4f}: the image is worth {figures['gain']:.3f} "
                    f"± {figures['gain_se']:.3f} nats a token")
        log({"step": step, "event": "eval"} | figures)
        print_main(f"step {step:6,}  validation loss {figures['val_loss']:.4f}{said}")
        return figures

    def loss_of(outputs, batch):
        """This process's part of the loss of the global batch; the parts add up."""
        if not clip:
            return (diffusion.cross_entropy(outputs, batch["targets"]) * batch["weight"]).sum()
        gather = dist.nn.functional.all_gather                    # also carries gradients back to where they belong
        everybody = [torch.cat(gather(side)) for side in outputs] if world > 1 else outputs
        return diffusion.contrastive_loss(*outputs, *everybody, first=rank * len(outputs[0]))

    total, waited, since, since_step, begun = torch.zeros((), device=device), 0.0, time.time(), first, time.time()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, args.lr, args.warmup, args.steps)
        for micro in range(accumulation):
            asked = time.time()
            batch = next(stream)
            waited += time.time() - asked
            batch = to_device(batch, device)
            # gradients travel with the last micro-batch only; DDP wants to know before the forward pass
            last = micro == accumulation - 1
            with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
                with autocast:
                    inputs = (batch[name] for name in ("images", "tokens", "mask", "valid", "rows", "where"))
                    outputs = step_model(*inputs)
                loss = loss_of(outputs, batch)
                (loss * world).backward()                         # DDP takes the mean over processes, we want the sum
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        if clip:                                                  # the inverse temperature is at most 100
            model.log_scale.data.clamp_(max=math.log(100))
        done = step + 1
        save = done % args.save_every == 0 or done == args.steps
        if done % args.log_every == 0 or save:                    # before a save, so that no broken state is saved
            steps = done - since_step
            loss, elapsed = float(add_up(total, world)) / steps, time.time() - since
            if not math.isfinite(loss + float(norm)):
                raise UserError(f"the loss became {loss} and its gradient {float(norm)} before step {done}; the "
                                f"checkpoint in {out} is from before that: try a smaller --lr with --fresh")
            record = {"step": done, "loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": float(norm),
                      "images_per_s": steps * args.batch_size / elapsed, "data_wait": waited / elapsed}
            log(record)
            eta = (time.time() - begun) / (done - first) * (args.steps - done)
            print_main(f"step {done:6,}/{args.steps:,}  loss {loss:7.4f}  lr {record['lr']:.2e}  "
                       f"grad {record['grad_norm']:6.3f}  {record['images_per_s']:7.1f} img/s  "
                       f"wait {record['data_wait']:5.1%}  left {eta / 60:5.1f} min")
            total, waited, since, since_step = torch.zeros_like(total), 0.0, time.time(), done
        if save and rank == 0:
            save_checkpoint(out / "ckpt.pt", {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done,
                "config": asdict(config), "options": vars(args), "lengths": lengths,
                "tokenizer": train.meta["tokenizer"], "shards": train.digest})
        if args.eval_every and done % args.eval_every == 0 and done < args.steps and eval_count:
            paused = time.time()
            validate(done)
            since, begun = since + time.time() - paused, begun + time.time() - paused

    # report
    figures = validate(args.steps) if eval_count else {}
    if rank == 0:
        model.eval()
        figures |= report(model, val, args.seed, lengths, out / "samples.png") if len(val) and not clip else {}
        figures |= {"minutes": (time.time() - started) / 60, "machine": f"{platform.machine()}, {reason}"}
        record = {"step": args.steps, "event": "final"} | figures
        log(record)
        (out / "final.json").write_text(json.dumps(record))
        print_end(record, args)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def print_end(record, args):
    """What was reached, and the commands to type next."""
    if "gain" in record:
        ratios = {f"{(i + 0.5) / BINS:.0%}": value for i, value in enumerate(record["by_ratio"]) if value is not None}
        print_main(f"\nvalidation loss {record['val_loss']:.4f} nats a token; with exchanged images "
                   f"{record['gain']:.3f} more (standard error {record['gain_se']:.3f})\nnats of a hidden token by the "
                   "share that is hidden: " + ", ".join(f"{share} {value:.3f}" for share, value in ratios.items()))
    if "exact" in record:
        print_main(f"{record['exact']:.1%} of the held-out captions are exactly right, every word of them")
    print_main(f"{record['minutes']:.1f} minutes, log and checkpoint in {args.out}\nnext:")
    what = f"--ckpt {args.out}/ckpt.pt"
    if args.objective == "clip":
        print_main(f'  python sample.py {what} --score "a dog" "a red circle" photo.jpg')
    else:
        print_main(f"  python sample.py {what} --dataset {args.dataset} --split val --trace --count 3")
        print_main(f"  python sample.py {what} photo.jpg     # captions of validation images: {args.out}/samples.png")
    labels = "shapes" if args.dataset == "shapes" else "cifar10 --source raw/cifar10"
    print_main(f"  python probe.py {what} --dataset {labels}")


if __name__ == "__main__":
    run(main)
