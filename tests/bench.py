"""Speed of the training step and of sampling against what one would write or pick instead, both in the same run.

    python tests/bench.py                          # every row; MDC_TEST_DATA names the folder with Flickr8k's tars
    python tests/bench.py tiny B/16 --minutes 5    # these, five minutes each
    python tests/bench.py B/16 --batch-size 512 --against P2      # on a GPU; the peak memory of each is told too

By hand; pytest does not collect it. Prints a table and one JSON line a row. Contestants are processes that take turns,
a step each; a ratio is the median of the turns' (of sampling: of the median times), which holds on a noisy machine,
as seconds do not. The peers are

    P1  timm's VisionTransformer and torch.nn.TransformerDecoder, 64 padded tokens, logits everywhere, float32, eager
    P2  the same with its loss under bfloat16 autocast and torch.compile

with our widths, depths, vocabulary, batch, captions and AdamW (for all the fused one). Pictures are noise: a step does
not care. The share is that of the rate of 2048^3 bfloat16 products (8192^3 on a GPU), measured in turns with the steps, and counts useful
work only: no pads, no logits nobody asked for. The first turns, of which compilation is one, are not counted.
"""
import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import diffusion  # noqa: E402
from data import Batches, open_split, prepare  # noqa: E402
from model import SIZES, Captioner, Config, flops  # noqa: E402
from sample import caption_images  # noqa: E402
from train import add_masks, compile_blocks  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# name: image size, batch, whether compiling pays for ours on a CPU (a factor of 1.08, but not for tiny)
STEPS = {"tiny": (64, 64, False), "S/16": (224, 32, True), "B/32": (224, 32, True), "B/16": (224, 16, True)}
INPUTS = ("images", "tokens", "mask", "valid", "where", "t")  # of mdc_loss
MAX_TOKENS, POOL, WARM = 64, 4, 3


def import_timm():
    """timm without torchvision, which it imports but whose builds do not fit every torch; its ViT needs none of it."""

    class StubClass(type):
        def __getattr__(cls, name):
            return name

    class Stub(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return StubClass(name, (), {}) if name[0].isupper() else Stub(name)

        def __call__(self, *args, **kwargs):
            return self

    parts = ("", ".transforms", ".transforms.functional", ".transforms.v2", ".ops", ".ops.misc", ".datasets", ".models",
             ".models.feature_extraction")
    before = {name: sys.modules.get(name) for name in (f"torchvision{part}" for part in parts)}
    sys.modules.update({name: Stub(name) for name in before})
    try:
        import timm
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            sys.modules.update({name: module} if module else {})
    return timm


class Peer(nn.Module):
    """The same captioner as most people would write it."""

    def __init__(self, config):
        super().__init__()
        width, depth, heads, patch, decoder_depth = SIZES[config.size]
        self.encoder = import_timm().models.VisionTransformer(
            config.image_size, patch, embed_dim=width, depth=depth, num_heads=heads, class_token=False,
            global_pool="avg", fc_norm=False, num_classes=0)
        self.mask_id = config.vocab_size
        self.embed = nn.Embedding(config.vocab_size + 1, width)
        self.positions = nn.Parameter(torch.zeros(config.max_tokens, width))
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
                                           norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, decoder_depth, nn.LayerNorm(width))
        self.head = nn.Linear(width, config.vocab_size)

    def forward(self, images, tokens, mask, valid):
        features = self.encoder.forward_features(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        x = self.embed(tokens.masked_fill(mask, self.mask_id)) + self.positions
        return self.head(self.decoder(x, features, tgt_key_padding_mask=~valid))


def make_shards(folder):
    """A thousand photographs of Flickr8k with their captions in GPT-2's tokens."""
    if "MDC_TEST_DATA" not in os.environ:
        sys.exit("error: MDC_TEST_DATA is not set: expected the folder with flickr8k-train-00000.tar")
    source = os.path.join(os.environ["MDC_TEST_DATA"], "flickr8k-train-00000.tar")
    prepare("flickr8k", "train", folder, [source], image_size=32, tokenizer="gpt2", workers=1)


def make_batches(config, batch_size, folder):
    """A few training batches, their pictures noise, on the device."""
    batches = []
    shards, side = open_split(folder, "flickr8k", "train"), config.image_size
    for item in range(POOL):
        batch = add_masks(Batches(shards, batch_size, 32, MAX_TOKENS, seed=0)[item], "mdc", (0.5, 1.0), "linear")
        batch["images"] = torch.randint(256, (batch_size, side, side, 3), dtype=torch.uint8)
        batches.append({name: value.to(DEVICE) for name, value in batch.items()})
    return batches


def ours(config, compiled):
    """A function (batch) that takes a training step of ours."""
    model = Captioner(config).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if compiled:
        compile_blocks(model)

    def step(batch):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = diffusion.mdc_loss(model, *(batch[name] for name in INPUTS)) / len(batch["images"]) / 13
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer(config, fast):
    """A function (batch) that takes a training step of P1, or of P2 if `fast`."""
    model = Peer(config).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def loss_of(images, tokens, mask, valid, weight):
        logits = model(images, tokens, mask, valid)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        return (losses * weight.flatten()).sum()

    loss_of = torch.compile(loss_of) if fast else loss_of

    def step(batch):
        pad = MAX_TOKENS - batch["tokens"].shape[1]
        tokens, mask, valid = (F.pad(batch[name], (0, pad)) for name in ("tokens", "mask", "valid"))
        weight = mask / batch["t"][:, None] / len(batch["images"]) / 13
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=fast):
            loss = loss_of(batch["images"], tokens, mask, valid, weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def product(_, times=6, size=8192 if DEVICE.type == "cuda" else 2048):
    """Some products of bfloat16 matrices: their operations."""
    a, b = torch.randn(2, size, size, device=DEVICE).to(torch.bfloat16)
    start = clock()
    for _ in range(times):
        a @ b
    return 2 * size ** 3 * times / (clock() - start)


def clock():
    """Seconds, when all work on the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def contest(pipe, name, config, batch_size, folder, compiled):
    """A process that takes a step whenever it is told the number of a batch, and answers with its seconds."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    batches = make_batches(config, batch_size, folder)
    step = ours(config, compiled) if name == "ours" else peer(config, fast=name == "P2")
    while (number := pipe.recv()) is not None:
        start = clock()
        step(batches[number % POOL])
        pipe.send(clock() - start)
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send(peak / 2 ** 30)


def bench_step(size, args):
    """Training steps of ours and of the peers in turns -> the figures of a row."""
    side, batch_size, compiled = STEPS[size]
    compiled = {"auto": compiled or DEVICE.type == "cuda", "on": True, "off": False}[args.compile]
    batch_size, names = args.batch_size or batch_size, ["ours", *args.against]
    config, pipes, workers = Config(size, side, 50257, MAX_TOKENS), {}, []
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        make_shards(folder)
        work = [flops(config, batch_size, int(b["valid"].sum()), len(b["where"])) for b in
                make_batches(Config(size, 32, 50257, MAX_TOKENS), batch_size, folder)]
        for name in names:
            pipes[name], far = context.Pipe()
            arguments = far, name, config, batch_size, folder, compiled
            workers.append(context.Process(target=contest, args=arguments, daemon=True))
            workers[-1].start()
            far.close()  # its own copy tells us when it dies
        seconds, rates, begun = {name: [] for name in names}, [], None
        for turn in range(10 ** 9):
            for pipe in pipes.values() if turn == 0 else ():  # compile side by side
                pipe.send(turn)
            for name, pipe in pipes.items():
                if turn > 0:
                    pipe.send(turn)
                seconds[name].append(pipe.recv())
            rates.append(product(None))
            begun = begun or turn + 1 == WARM and time.time()
            if begun and time.time() - begun > args.minutes * 60 and turn + 1 - WARM >= POOL:
                break
    figures = {"batch": batch_size, "compiled": compiled, "turns": turn + 1 - WARM}
    figures["matrix_tflops"] = statistics.median(rates) / 1e12
    shares = [work[k % POOL] / t / rate for k, (t, rate) in enumerate(zip(seconds["ours"], rates, strict=True))]
    figures["share"] = statistics.median(shares[WARM:])
    for name, pipe in pipes.items():
        pipe.send(None)
        times = seconds[name]
        figures |= {f"{name}_images_per_s": batch_size / statistics.median(times[WARM:]), f"{name}_gib": pipe.recv(),
                    f"{name}_first_s": times[0]}
        if name != "ours":
            ratios = [theirs / mine for theirs, mine in zip(times, seconds["ours"], strict=True)]
            figures[f"ours/{name}"] = statistics.median(ratios[WARM:])
    for worker in workers:
        worker.join()
    return figures


def bench_sampling(args):
    """Captions of 16 tokens by an S/16 at 224 px: batches of 32 with the image read once, against one image at a time
    with encoder and decoder run at every step."""
    torch.manual_seed(0)
    model = Captioner(Config("S/16", 224, 50257, MAX_TOKENS)).to(DEVICE).eval()
    torch.nn.init.normal_(model.decoder.head.weight, std=0.02)
    images = torch.randint(256, (32, 224, 224, 3), dtype=torch.uint8)

    def naive(image):
        tokens, mask = torch.zeros(1, 16, dtype=torch.long), torch.ones(1, 16, dtype=torch.bool)

        def predict(tokens, mask):
            return model(image[None], tokens, mask, torch.ones_like(mask))

        list(diffusion.denoise(predict, tokens.to(DEVICE), mask.to(DEVICE)))

    mine, theirs, begun = [], [], time.time()
    with torch.no_grad():
        while len(mine) < 3 or time.time() - begun < args.minutes * 60:
            start = clock()
            list(caption_images(model, images, 16))
            middle = clock()
            naive(images[len(mine) % 32].to(DEVICE))
            mine.append((middle - start) / 32)
            theirs.append(clock() - middle)
    return {"ours_per_s": 1 / statistics.median(mine), "naive_per_s": 1 / statistics.median(theirs),
            "ratio": statistics.median(theirs) / statistics.median(mine)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [*STEPS, "sampling"]
    parser.add_argument("rows", nargs="*", default=rows, help="default: " + " ".join(rows))
    parser.add_argument("--minutes", type=float, default=1.0, help="for the turns of a row (default: 1)")
    parser.add_argument("--batch-size", type=int, metavar="B", help="of every contestant (default: by row)")
    parser.add_argument("--against", nargs="*", choices=("P1", "P2"), default=["P1", "P2"], metavar="PEER",
                        help="P1, P2, or nothing for ours alone; all are in memory at once (default: both)")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="default: where it pays")
    args = parser.parse_args()
    for name in args.rows:
        figures = bench_sampling(args) if name == "sampling" else bench_step(name, args)
        print(f"{name:10}" + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
        machine = {"threads": torch.get_num_threads(), "device": str(DEVICE)}
        print(json.dumps({"row": name} | machine | figures), flush=True)


if __name__ == "__main__":
    main()
