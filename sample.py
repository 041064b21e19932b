"""Caption images by iterative unmasking: start from [MASK]s only, fill in the most confident word, look again.

    python sample.py --ckpt out/shapes-tiny-mdc/ckpt.pt --dataset shapes --split val --sheet shapes.png
    python sample.py --ckpt out/flickr8k-tiny-mdc/ckpt.pt photo.jpg another.png folder/
    python sample.py --ckpt out/flickr8k-tiny-mdc/ckpt.pt photo.jpg --trace             # every step of the way

An image is encoded once; the decoder then runs once a step on all captions of a batch. The decoder is told how long a
caption is (pads were hidden from it in training), so a length has to be chosen before the first word is.
"""
import argparse
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import diffusion
from data import IMAGE_TYPES, BadSample, UserError, crop_square, load_tokenizer, open_image, open_split, run
from model import Captioner, Config


def load_captioner(path, device="cpu"):
    """Checkpoint file -> (Captioner in eval mode on `device`, the checkpoint's dict). Nothing in the file is executed.

    Raises UserError for a file that is no checkpoint of ours.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = Captioner(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; train one with: python train.py") from None
    except Exception as problem:                      # a pickle can break in any way
        raise UserError(f"{path} is not a checkpoint of train.py ({type(problem).__name__})") from None
    try:
        return model.to(device).eval(), checkpoint
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device} cannot be used here; try --device cpu") from None


def choose_lengths(histogram, count, length="typical", generator=None):
    """Caption lengths in tokens, EOS included, for `count` images -> int tensor [count].

    histogram {length: captions} of the training set, or a part of it. length: "typical" is its median, "draw" draws
    from it, a number is taken as it is.
    """
    if isinstance(length, int):
        return torch.full((count,), length)
    lengths, weights = torch.tensor(sorted(histogram)), torch.tensor([histogram[n] for n in sorted(histogram)]).double()
    if length == "draw":
        return lengths[torch.multinomial(weights, count, replacement=True, generator=generator)]
    return lengths[int((weights.cumsum(0) < weights.sum() / 2).sum())].expand(count)


@torch.no_grad()
def caption_images(model, images, lengths, steps=None, order="confidence", temperature=0.0, generator=None):
    """Caption a batch; yields (tokens [B,T], mask [B,T]) at the start and after every step, the captions last.

    images [B,S,S,3] uint8; lengths [B]: tokens of each caption, its EOS included; the rest is diffusion.denoise's.
    """
    device = next(model.parameters()).device
    lengths = lengths.to(device)
    valid = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    kv = model.decoder.read(model.encode(images.to(device)))
    rows = valid.flatten().nonzero().squeeze(1)

    def predict(tokens, mask, where):
        return model.decoder(kv, tokens, mask, valid, rows, where)

    tokens = torch.zeros_like(valid, dtype=torch.long)
    yield from diffusion.denoise(predict, tokens, valid, steps, order, temperature, generator)


def final(steps):
    """The last item of an iterator: the captions of caption_images."""
    *_, last = steps
    return last[0].cpu()


def show(tokenizer, tokens, mask):
    """One state of a caption as text, `_` for every token that is still masked; nothing after an EOS."""
    words, start = [], 0
    for i, (token, masked) in enumerate(zip(tokens.tolist(), mask.tolist(), strict=True)):
        if masked or token == tokenizer.eot_token:
            words += [tokenizer.decode(tokens[start:i].tolist(), errors="replace")] + [" _"] * masked
            start = i + 1
        if token == tokenizer.eot_token and not masked:
            break
    else:
        words.append(tokenizer.decode(tokens[start:].tolist(), errors="replace"))
    return "".join(words).strip()


def contact_sheet(images, texts, path, columns=4, side=180):
    """Draw images [n,S,S,3] uint8 in a grid, each over its lines of text: texts is a list of [(line, colour), ...]."""
    font = ImageFont.load_default(15)
    wrapped = [[(part, colour) for line, colour in lines for part in textwrap.wrap(line, side // 8) or [""]]
               for lines in texts]
    gap, height = 14, side + 20 * max(map(len, wrapped)) + 22
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * height
        sheet.paste(Image.fromarray(np.asarray(image)).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        for number, (line, colour) in enumerate(lines):
            draw.text((x, y + side + 6 + 20 * number), line, colour, font)
    sheet.save(path)


def find_images(paths):
    """Files and folders -> image files, those of a folder in alphabetical order. Raises UserError if there is none."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected images (jpg, png, webp) or folders of them")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in inside if not path.is_dir() or file.suffix.lower().lstrip(".") in IMAGE_TYPES]
    if not files:
        raise UserError(f"{' '.join(paths)}: no jpg, png or webp images there")
    return files


def main():
    """Caption what the command line names, batch by batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="image files or folders; or use --dataset")
    add("--ckpt", required=True, metavar="FILE", help="checkpoint of train.py")
    add("--dataset", help="caption a split of these shards instead")
    add("--split", default="val", help="with --dataset (default: val)")
    add("--data-dir", default="data", metavar="DIR", help="default: data")
    add("--count", type=int, metavar="N", help="only the first N images (default: all)")
    add("--steps", type=int, metavar="N", help="denoising steps; fewer are faster and worse (default: a token a step)")
    add("--length", default="typical", metavar="N", help="tokens of a caption with its EOS: a number, `typical` "
        "(median of the training captions, the default) or `draw` (drawn from them for each image)")
    add("--temperature", type=float, default=0.0, metavar="X", help="0: likeliest words (default); 1: drawn")
    add("--order", choices=diffusion.ORDERS, default="confidence", help="which words come first (default: confidence)")
    add("--trace", action="store_true", help="print the caption after every step, `_` for a masked token")
    add("--sheet", metavar="FILE", help="draw the images over their captions into this PNG")
    add("--batch-size", type=int, default=64, metavar="B", help="images at a time (default: 64)")
    add("--seed", type=int, default=0, help="of temperature, order and length (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda, else cpu")
    args = parser.parse_args()
    model, checkpoint = load_captioner(args.ckpt, args.device)
    tokenizer, longest = load_tokenizer(checkpoint["tokenizer"]), model.config.max_tokens
    if args.length not in ("typical", "draw"):
        if not args.length.isdecimal() or not 1 <= int(args.length) <= longest:
            raise UserError(f"--length {args.length}: expected typical, draw or a number from 1 to {longest}")
        args.length = int(args.length)
    for name in ("steps", "count", "batch_size"):
        if (getattr(args, name) or 1) < 1 or getattr(args, name) == 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    if args.temperature < 0 or not 0 <= args.seed < 1 << 63:
        raise UserError("--temperature and --seed: expected 0 or more")
    if args.sheet and Path(args.sheet).suffix.lower() not in (".png", ".jpg"):
        raise UserError(f"--sheet {args.sheet}: expected a name that ends in .png")
    if bool(args.dataset) == bool(args.images):
        raise UserError("expected either images or --dataset, for example: python sample.py --ckpt FILE photo.jpg")
    side, generator = model.config.image_size, torch.Generator().manual_seed(args.seed)
    if args.dataset:
        shards = open_split(args.data_dir, args.dataset, args.split)
        names = [shards.key(i) for i in range(min(len(shards), args.count or len(shards)))]
    else:
        names = find_images(args.images)[:args.count]
    if not names:
        raise UserError(f"{args.data_dir}/{args.dataset} has no images in split {args.split}; try --split train")
    sheet_images, sheet_texts = [], []
    for first in range(0, len(names), args.batch_size):
        images = []
        for i in range(first, min(first + args.batch_size, len(names))):
            try:
                images.append(crop_square(shards.image(i, side) if args.dataset else open_image(names[i], side), side))
            except BadSample as reason:
                raise UserError(f"{names[i]}: {reason}") from None
        lengths = choose_lengths(checkpoint["lengths"], len(images), args.length, generator)
        batch = torch.from_numpy(np.stack(images))
        states = [(tokens.cpu(), mask.cpu()) for tokens, mask in
                  caption_images(model, batch, lengths, args.steps, args.order, args.temperature, generator)]
        for i, name in enumerate(names[first:first + args.batch_size]):
            frames = [show(tokenizer, tokens[i, :lengths[i]], mask[i, :lengths[i]]) for tokens, mask in states]
            for number, frame in enumerate(frames[:-1] if args.trace else []):
                print(f"{name}\t{number:2}  {frame}")
            print(f"{name}\t{frames[-1]}", flush=True)
            sheet_texts.append([(frames[-1], "black")])
        sheet_images += images if args.sheet else []
    if args.sheet:
        contact_sheet(sheet_images, sheet_texts, args.sheet)


if __name__ == "__main__":
    run(main)
