"""The captioner: a ViT that turns an image into patch features and a text decoder that reads them.

    python model.py                       # the size registry: parameters and operations of every model

Masked diffusion captioning needs no new architecture: it is the encoder-decoder of CapPa (Tschannen et al. 2023,
"Image Captioners Are Scalable Vision Learners Too") without the decoder's causal mask; all else is in diffusion.py.
What it is compared with differs in the lines that ask for the objective: "ar" keeps the causal mask, "clip" pools
both sides instead of cross-attending. Three things are worth a look:

  * `[MASK]` is an extra *input* embedding row and has no output column, so the model can never predict it.
  * The decoder works on a flat stream of the real tokens of a batch; pads exist only inside attention.
  * Cross-attention keys and values are computed once an image (`TextDecoder.read`) and used at every step.

Shape letters, used at line ends in all files:
    B captions of a batch, and images if each has one   N patches of an image   T positions of the longest caption
    M real tokens of the batch (no pads)   K positions with a loss   D width   H heads   V vocabulary"""
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion import LinearCrossEntropy

# name: (width, encoder depth, heads, patch size). The decoder has half the encoder's depth, as CapPa's B/16 has.
SIZES = {
    "tiny": (128, 4, 2, 8),
    "tiny/4": (128, 4, 2, 4),
    "S/16": (384, 12, 6, 16),
    "B/32": (768, 12, 12, 32),
    "B/16": (768, 12, 12, 16),
    "L/16": (1024, 24, 16, 16),
}


@dataclass
class Config:
    """All that is needed to build a Captioner; saved in a checkpoint as a plain dict under "config"."""
    size: str = "tiny"            # a key of SIZES
    image_size: int = 64          # pixels, square
    vocab_size: int = 50257       # V, without [MASK]
    max_tokens: int = 64          # longest caption in tokens, its EOS included
    eos: int = 50256              # the token that ends a caption
    pads: str = "hidden"          # what follows it: "hidden" from attention and loss, or "eos", tokens like others
    positions: str = "sincos"     # of the patches: "sincos" (fixed) or "learned" (started at sincos)
    objective: str = "mdc"        # "ar" makes the decoder causal, "clip" a text encoder; the others share one model


# ------------------------------------------------------------------------------------------------ building blocks
def sincos(positions, width):
    """Sine-cosine table of positions [n] -> [n, width] (Vaswani et al. 2017); `width` must be even.

    Learning them from noise costs most of a short run. So does the usual base of 10000, made for thousands of words:
    most of its waves hardly move on 6 to 14 patches. With 100 all of them tell neighbours apart."""
    frequency = 100.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = positions.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sincos_2d(side, width):
    """Table for a side x side grid of patches in row-major order, half the width for each axis -> [side**2, width]."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([sincos(y.flatten(), width // 2), sincos(x.flatten(), width // 2)], dim=1)


def attend(q, k, v, heads, bias=None):
    """Multi-head softmax(q k^T / sqrt(d) + bias) v: q [B,T,D], k and v [B,N,D], bias [B|1,1,T|1,N] -> [B,T,D].

    CUDA and MPS have fused kernels for it. The formula is written out on a CPU, where the fused kernel is the slow way
    (at a few dozen patches its backward alone takes more than half of a training step), and wherever there is a bias:
    only captions have one, they are short, and the flash kernel takes none."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))                 # [B,H,T|N,D/H]
    if bias is None and q.device.type != "cpu":
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)                                # [B,H,T,N]
        out = (scores if bias is None else scores + bias.to(q.dtype)).softmax(dim=-1) @ v
    return out.transpose(1, 2).flatten(2)


class Pack:
    """Where the real tokens of a padded batch stand, rows [M] (flat positions b*T+i): pads never enter a linear layer,
    only attention sees [B,T]."""

    def __init__(self, valid, rows=None):
        self.B, self.T = valid.shape
        self.rows = valid.flatten().nonzero().squeeze(1) if rows is None else rows

    def pad(self, x):                                                           # [M,D] -> [B,T,D], zeros at the pads
        return x.new_zeros(self.B * self.T, x.shape[-1]).index_copy(0, self.rows, x).view(self.B, self.T, -1)

    def unpad(self, x):                                                         # [B,T,D] -> [M,D]
        return x.flatten(0, 1).index_select(0, self.rows)


class Attention(nn.Module):
    """Multi-head attention, of images on [B,N,D], of texts (with `pack`) on the flat stream of real tokens [M,D].

    With `cross` text asks and the image answers: keys and values come from TextDecoder.read, once an image.
    cache: a list that collects the keys and values of earlier calls, for left-to-right decoding."""

    def __init__(self, width, heads, cross=False):
        super().__init__()
        self.heads = heads
        if cross:
            self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, kv=None, bias=None, pack=None, cache=None):
        x = self.qkv(x) if kv is None else self.q(x)
        x = x if pack is None else pack.pad(x)
        # the c captions of an image ask side by side, [B,T,D] -> [B/c,c*T,D]
        q, k, v = x.chunk(3, dim=-1) if kv is None else (x.unflatten(0, (len(kv[0]), -1)).flatten(1, 2), *kv)
        if cache is not None:
            cache.append((k, v))
            k, v = (torch.cat(parts, dim=1) for parts in zip(*cache, strict=True))
        out = attend(q, k, v, self.heads, bias)
        return self.proj(out if pack is None else pack.unpad(out))


class Block(nn.Module):
    """Pre-LN transformer block with timm's parameter names; with `cross` it also looks at the image."""

    def __init__(self, width, heads, cross=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        if cross:
            self.norm_cross = nn.LayerNorm(width, eps=1e-6)
            self.cross = Attention(width, heads, cross=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(),
                                             fc2=nn.Linear(4 * width, width)))

    def forward(self, x, kv=None, bias=None, pack=None, cache=None):
        x = x + self.attn(self.norm1(x), None, bias, pack, cache)
        if kv is not None:
            x = x + self.cross(self.norm_cross(x), kv, None, pack)
        return x + self.mlp(self.norm2(x))


# ------------------------------------------------------------------------------------------------ image encoder
class ViT(nn.Module):
    """Vision transformer without a class token (Dosovitskiy et al. 2021; no token as in CapPa and timm).

    Parameter names and shapes are timm's: its "vit_base_patch16_224" with class_token=False, global_pool="avg",
    fc_norm=False, num_classes=0 loads vit.state_dict() as it is."""

    def __init__(self, config):
        super().__init__()
        width, depth, heads, patch = SIZES[config.size]
        if config.image_size % patch:
            raise ValueError(f"image size {config.image_size} is not a multiple of {config.size}'s patch size {patch}")
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, kernel_size=patch, stride=patch)))
        table = sincos_2d(config.image_size // patch, width)[None]                              # [1,N,D]
        self.pos_embed = nn.Parameter(table, requires_grad=config.positions == "learned")
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        """images [B,3,S,S] float in [-1,1] -> patch features after the final LayerNorm [B,N,D]."""
        proj = self.patch_embed.proj                  # a convolution of separate patches is a linear layer, and faster
        x = images.unflatten(3, (-1, proj.stride[1])).unflatten(2, (-1, proj.stride[0]))        # [B,3,S/P,P,S/P,P]
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)                                # [B,N,3*P*P]
        x = F.linear(x, proj.weight.flatten(1), proj.bias) + self.pos_embed                     # [B,N,D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ------------------------------------------------------------------------------------------------ text decoder
class TextDecoder(nn.Module):
    """Predicts the words of a caption from the image and from the words that are not masked.

    There is no time input: how many words are masked tells the decoder all that t could (MDLM and LLaDA have none)."""

    def __init__(self, config):
        super().__init__()
        width, depth, heads, _ = SIZES[config.size]
        self.causal, cross = config.objective == "ar", config.objective != "clip"
        self.mask_id = config.vocab_size               # the last input row; no output column. "ar": the start of a text
        self.embed = nn.Embedding(config.vocab_size + 1, width)
        self.positions = nn.Parameter(sincos(torch.arange(config.max_tokens), width))
        self.blocks = nn.ModuleList(Block(width, heads, cross) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if cross:
            self.head = nn.Linear(width, config.vocab_size)

    def read(self, features):
        """features [B,N,D] -> of every layer cross-attention's keys and values, each [B,N,D]; once an image."""
        return [block.cross.kv(features).chunk(2, dim=-1) for block in self.blocks]

    def hidden(self, kv, tokens, mask, valid, rows=None, caches=None, first=0):
        """Outputs of the last block for the real tokens [B,T,D], zeros at pads; arguments: forward's, next_word's."""
        pack = Pack(valid, rows)
        x = pack.unpad(self.embed(tokens.masked_fill(mask, self.mask_id)) + self.positions[first:first + pack.T])
        seen = valid[:, None, None, :]                                                          # [B,1,1,T] keys
        if self.causal:
            seen = seen & torch.ones(pack.T, pack.T, dtype=torch.bool, device=x.device).tril()  # [B,1,T,T]
        bias = torch.where(seen, 0.0, -torch.inf)
        for number, block in enumerate(self.blocks):
            x = block(x, kv and kv[number], bias, pack, caches and caches[number])
        return pack.pad(self.norm(x))

    def forward(self, kv, tokens, mask, valid, rows=None, where=None, targets=None):
        """Logits for the words of B captions; of B/c images, if each has c captions in a row.

        kv      from `read`
        tokens  [B,T] int, anything at masked positions and pads
        mask    [B,T] bool, True where the input is [MASK]; never recovered from ids
        valid   [B,T] bool, False at pads, which nothing attends to; a caption has at least one real token
        rows    [M] int, flat positions of the real tokens, if the caller knows them
        where   [K] int, flat positions whose logits are wanted (real tokens only); None: all
        targets [K] int, the words at `where`, if their losses are wanted instead of logits
        returns [K,V], or [B,T,V]; with targets [K] nats"""
        x = self.hidden(kv, tokens, mask, valid, rows)
        x = x if where is None else x.flatten(0, 1).index_select(0, where)
        if targets is not None:
            return LinearCrossEntropy.apply(x, self.head.weight, self.head.bias, targets)
        return self.head(x)

    def next_word(self, kv, tokens, position, caches):
        """Left-to-right decoding: logits [B,V] of the word at `position`, given the one before it, tokens [B] (at 0
        ignored). caches: a list of an empty list for each block, which fills up."""
        valid = torch.ones(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        start = valid if position == 0 else ~valid
        return self.head(self.hidden(kv, tokens[:, None], start, valid, None, caches, position)[:, 0])


# ------------------------------------------------------------------------------------------------ both together
class Captioner(nn.Module):
    """Image encoder f_phi and text decoder g_psi, the paper's h = g_psi(f_phi(image), masked caption)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = ViT(config)
        self.decoder = TextDecoder(config)
        width = SIZES[config.size][0]
        if config.objective == "clip":
            self.image_proj = nn.Linear(width, width, bias=False)
            self.text_proj = nn.Linear(width, width, bias=False)
            self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        for name, value in self.named_parameters():
            if name.endswith("embed.weight"):
                nn.init.normal_(value, std=0.02)
            elif name.endswith(("bias", "head.weight")):
                nn.init.zeros_(value)                 # of the head as CapPa; train.py sets its bias
            elif value.ndim > 1 and "pos" not in name:
                nn.init.xavier_uniform_(value.flatten(1))

    def encode(self, images):
        """images [B,S,S,3] uint8 as the loader makes them -> patch features [B,N,D]; pixels become [-1,1] here."""
        return self.encoder(images.permute(0, 3, 1, 2).float() / 127.5 - 1)

    def match(self, features, tokens, valid, rows=None):
        """CLIP: the means of patch features and of words as points on the unit sphere, image [B,D] and text [B,D]. The
        images come multiplied by the learned inverse temperature, so that image @ text.T are the logits."""
        text = self.decoder.hidden(None, tokens, torch.zeros_like(valid), valid, rows).sum(1) / valid.sum(1)[:, None]
        image, text = self.image_proj(features.mean(1)).float(), self.text_proj(text).float()
        return F.normalize(image, dim=1) * self.log_scale.exp(), F.normalize(text, dim=1)

    def forward(self, images, tokens, mask, valid, rows=None, where=None, targets=None):
        """One training pass: images [B/c,S,S,3] uint8, the rest as in TextDecoder.forward; for "clip" as in match."""
        features = self.encode(images)
        if self.config.objective == "clip":
            return self.match(features, tokens, valid, rows)
        return self.decoder(self.decoder.read(features), tokens, mask, valid, rows, where, targets)


def flops(config, images, tokens, predicted):
    """Useful operations of a training step, three forward passes, for so many images, real tokens, tokens with a loss.

    Pads and logits that nobody asked for are no work; attention among the few words of a caption is neglected."""
    width, depth, _, patch = SIZES[config.size]
    N = (config.image_size // patch) ** 2
    block, attention = 12 * width ** 2, 2 * N * width               # products with the weights; q k^T and attention v
    read = depth // 2 * 2 * width ** 2 * (config.objective != "clip")           # cross-attention's k, v; and q, proj
    encoder = N * (3 * patch ** 2 * width + depth * (block + attention) + read)
    decoder = depth // 2 * (block + attention * (config.objective != "clip")) + read
    return 6 * (images * encoder + tokens * decoder + predicted * width * config.vocab_size)


def main():
    print("model   encoder M  decoder M  GFLOP to train on an image of 224 px, 12 of 16 tokens masked, GPT-2's words")
    for size in SIZES:
        with torch.device("meta"):
            model = Captioner(Config(size, image_size=224))
        counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.decoder)]
        print(f"{size:6}{counts[0]:11.1f}{counts[1]:11.1f}{flops(model.config, 1, 16, 12) / 1e9:11.1f}")


if __name__ == "__main__":
    main()
