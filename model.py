"""The captioner: a ViT turns an image into patch features, a text decoder reads them and
fills in words.

Masked diffusion captioning needs no new architecture. It is the encoder-decoder of CapPa
(Tschannen et al. 2023, "Image Captioners Are Scalable Vision Learners Too") without the
causal mask of the decoder. Two baselines have other models: "ar" keeps the causal mask, and
"clip" (`Contrastive`) replaces cross-attention by pooling and a comparison of the two sides.

  * `[MASK]` is an extra *input* embedding and has no output column: the model cannot predict it.
  * Cross-attention keys and values depend on the image only. `TextDecoder.read` computes them;
    sampling calls it once, however many steps it takes.

Shape letters, used at line ends in all files:
    B images, and captions of a batch   N patches of an image   T tokens of the longest caption
    K masked tokens of the batch   D width   H heads   V vocabulary   S pixels a side"""
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class Size(NamedTuple):
    """Shape of a model; the text decoder has the width and heads of the encoder."""
    width: int
    depth: int  # blocks of the image encoder
    heads: int
    patch: int  # side of a patch in pixels
    decoder_depth: int  # half of the encoder's, as in CapPa's B/16


SIZES = {
    "tiny": Size(128, 4, 2, 8, 2),
    "tiny/4": Size(128, 4, 2, 4, 2),
    "S/16": Size(384, 12, 6, 16, 6),
    "B/32": Size(768, 12, 12, 32, 6),
    "B/16": Size(768, 12, 12, 16, 6),
    "L/16": Size(1024, 24, 16, 16, 12),
}


@dataclass
class Config:
    """Arguments of `build_model`, in a checkpoint a plain dict."""
    size: str = "tiny"  # a key of SIZES
    image_size: int = 64  # S, pixels, square
    vocab_size: int = 50257  # V, without [MASK]
    max_tokens: int = 64  # longest caption, its end-of-sequence token included
    eos: int = 50256  # the token that ends a caption
    objective: str = "mdc"  # "ar": causal decoder; "clip": Contrastive; "mdc": all others


WORD_STD = 0.02  # of word embeddings at the start, as in GPT-2 and CLIP
# Times sines and cosines (root mean square 0.7): as large as words, or these drown.
POSITION_SCALE = 0.03


# ---- building blocks
def sincos(positions, width):
    """Sine-cosine table of positions [n] -> [n,width] (Vaswani et al. 2017); `width` is even.

    The usual base of 10000 is made for thousands of positions: half of its waves turn by less
    than 0.13 radians over 14 patches. With 100 none does."""
    positions = positions.double()[:, None]
    exponent = torch.arange(width // 2).to(positions) / (width // 2)
    angle = positions * 100.0 ** -exponent  # [n, width/2]
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sincos_2d(side, width):
    """Table of a side x side grid, row by row, half the width per axis -> [side**2,width]."""
    place = torch.arange(side ** 2)
    return torch.cat([sincos(place // side, width // 2), sincos(place % side, width // 2)], dim=1)


def split_heads(x, heads):
    """[B,T,D] -> [B,H,T,d]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q, k, v, heads, bias=None):
    """Multi-head softmax(q k^T / sqrt(d) + bias) v, q [B,T,D], k and v [B,N,D] -> [B,T,D].

    bias [B or 1,1,T or 1,N] is 0 where a query may look and -inf where it may not.

    CUDA uses torch's fused kernels. On a CPU the formula is written out: there the fused kernel's
    backward pass takes half of a small model's step. A bias, which flash attention does not take,
    is written out too: captions are short."""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    if bias is None and q.device.type != "cpu":
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # [B,H,T,N]
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        out = scores.softmax(dim=-1) @ v
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Every position of x [B,T,D] looks at all positions of x that the bias lets it see."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, bias=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, self.heads, bias))


class CrossAttention(nn.Module):
    """Every token of x [B,T,D] looks at all patches; `memory` has their keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, memory):
        k, v = memory  # each [B,N,D]
        return self.proj(attend(self.q(x), k, v, self.heads))


class Block(nn.Module):
    """Pre-LN transformer block with timm's parameter names; `cross`: it also looks at the image."""

    def __init__(self, width, heads, cross=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, heads)
        if cross:
            self.norm_cross = nn.LayerNorm(width, eps=1e-6)
            self.cross = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width),
            act=nn.GELU(),
            fc2=nn.Linear(4 * width, width),
        ))

    def forward(self, x, bias=None, memory=None):
        x = x + self.attn(self.norm1(x), bias)
        if memory is not None:
            x = x + self.cross(self.norm_cross(x), memory)
        return x + self.mlp(self.norm2(x))


# ---- image encoder
class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) without a class token, as in CapPa.

    Parameter names and shapes are timm's: its "vit_base_patch16_224" with class_token=False,
    global_pool="avg", fc_norm=False, num_classes=0 loads vit.state_dict() as it is.

    Raises ValueError if the image size is not a multiple of the patch size."""

    def __init__(self, config):
        super().__init__()
        size = SIZES[config.size]
        width = size.width
        if config.image_size % size.patch:
            raise ValueError(f"image size {config.image_size} is not a multiple of the patch size "
                             f"of {config.size}, {size.patch}")
        side = config.image_size // size.patch  # N = side**2
        patch_conv = nn.Conv2d(3, width, kernel_size=size.patch, stride=size.patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patch_conv))
        # Fixed: to learn them takes most of a short run.
        self.pos_embed = nn.Parameter(sincos_2d(side, width)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        """images [B,3,S,S] in [-1,1] -> patch features after the final LayerNorm [B,N,D]."""
        proj = self.patch_embed.proj
        P = proj.stride[0]
        # A convolution of separate patches is a linear layer, and faster written as one.
        x = F.pixel_unshuffle(images, P).flatten(2).mT.contiguous()  # [B,N,3*P*P]
        x = F.linear(x, proj.weight.flatten(1), proj.bias)  # [B,N,D]
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ---- text
class Text(nn.Module):
    """Token embeddings, positions and blocks of a decoder or of CLIP's text encoder."""

    def __init__(self, config, cross):
        super().__init__()
        size = SIZES[config.size]
        self.mask_id = config.vocab_size  # the last row of `embed`
        self.embed = nn.Embedding(config.vocab_size + 1, size.width)
        table = sincos(torch.arange(config.max_tokens), size.width)
        self.positions = nn.Parameter(POSITION_SCALE * table)  # learned from this start
        self.blocks = nn.ModuleList(
            Block(size.width, size.heads, cross) for _ in range(size.decoder_depth))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)

    def hidden(self, tokens, visible, memory=None):
        """tokens [B,T], visible [B or 1,T or 1,T] bool: keys that a query sees -> [B,T,D]."""
        x = self.embed(tokens) + self.positions[:tokens.shape[1]]  # [B,T,D]
        bias = torch.where(visible[:, None], 0.0, -torch.inf)  # [B,1,T or 1,T]
        for i, block in enumerate(self.blocks):
            x = block(x, bias, memory[i] if memory else None)
        return self.norm(x)


class TextDecoder(Text):
    """Predicts masked words from the image and from the words that are not masked.

    There is no time input: the number of masks tells the decoder all that t could (MDLM and
    LLaDA have none either)."""

    def __init__(self, config):
        super().__init__(config, cross=True)
        self.causal = config.objective == "ar"
        # A GPU multiplies 50257 columns slowly, multiples of 64 fast. `forward` cuts the rest.
        columns = math.ceil(config.vocab_size / 64) * 64
        self.head = nn.Linear(SIZES[config.size].width, columns)

    def read(self, features):
        """features [B,N,D] -> cross-attention's keys and values of every block, each [B,N,D]."""
        return [block.cross.kv(features).chunk(2, dim=-1) for block in self.blocks]

    def forward(self, memory, tokens, mask, valid, where=None):
        """Logits [K,V] of the K masked tokens, row by row.

        memory  from `read`
        tokens  [B,T] int; their values at masked positions and pads do not matter
        mask    [B,T] bool, True where a token is hidden and asked for
        valid   [B,T] bool, False at pads, which nothing looks at
        where   [K] int, flat positions of the masked tokens; training finds them on the CPU,
                as a GPU would have to be waited for

        An autoregressive decoder hides nothing: it predicts the token at each of these places
        from the image and all earlier tokens."""
        if where is None:
            where = mask.flatten().nonzero()[:, 0]
        if self.causal:
            # Shift right: each position gets the token before it, the first one [MASK].
            tokens = tokens.roll(1, dims=1)
            tokens[:, 0] = self.mask_id
            T = tokens.shape[1]
            visible = valid.new_ones(1, T, T).tril()
        else:
            tokens = tokens.masked_fill(mask, self.mask_id)
            visible = valid[:, None, :]  # [B,1,T]
        x = self.hidden(tokens, visible, memory)  # [B,T,D]
        # The head is wide: it sees only the positions where a word is asked for.
        x = x.flatten(0, 1).index_select(0, where)  # [K,D]
        return self.head(x)[:, :self.mask_id]  # one column a word


# ---- whole models
def init_weights(model):
    """Initialize in place: Xavier for matrices (the fused q, k, v is one), zero for biases and
    for the head (CapPa)."""
    for name, parameter in model.named_parameters():
        if name.endswith(".embed.weight"):
            nn.init.normal_(parameter, std=WORD_STD)
        elif name.endswith(("bias", ".head.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim > 1 and "pos" not in name:
            nn.init.xavier_uniform_(parameter.flatten(1))


class Captioner(nn.Module):
    """Image encoder f_phi and text decoder g_psi, the paper's h = g_psi(f_phi(image), caption)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = ViT(config)
        self.decoder = TextDecoder(config)
        init_weights(self)

    def encode(self, images):
        """images [B,S,S,3] uint8 -> patch features [B,N,D]."""
        return self.encoder(images.permute(0, 3, 1, 2).float() / 127.5 - 1)

    def forward(self, images, tokens, mask, valid, where=None):
        """images [B,S,S,3] uint8 and captions -> logits [K,V]; see TextDecoder.forward."""
        memory = self.decoder.read(self.encode(images))
        return self.decoder(memory, tokens, mask, valid, where)


class Contrastive(nn.Module):
    """CLIP (Radford et al. 2021): images and captions as points on the unit sphere."""

    def __init__(self, config):
        super().__init__()
        width = SIZES[config.size].width
        self.config = config
        self.encoder = ViT(config)
        self.text = Text(config, cross=False)
        self.image_proj = nn.Linear(width, width, bias=False)
        self.text_proj = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # inverse temperature
        init_weights(self)

    encode = Captioner.encode

    def embed_images(self, features):
        """Patch features [B,N,D] -> unit vectors [B,D]."""
        return F.normalize(self.image_proj(features.mean(1)).float(), dim=1)

    def embed_texts(self, tokens, valid):
        """Captions [B,T] -> unit vectors [B,D] of the mean over their words."""
        x = self.text.hidden(tokens, valid[:, None, :])  # [B,T,D]
        x = (x * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)  # pads do not count
        return F.normalize(self.text_proj(x).float(), dim=1)

    def forward(self, images, tokens, valid):
        """-> unit vectors of images and of captions, each [B,D]."""
        return self.embed_images(self.encode(images)), self.embed_texts(tokens, valid)


def build_model(config):
    """Config -> Captioner or Contrastive."""
    return Contrastive(config) if config.objective == "clip" else Captioner(config)


def flops(config, images, tokens, predicted):
    """Useful operations of a training step, counted as three forward passes.

    images, tokens, predicted: numbers of images, of valid tokens and of tokens with a loss.
    Pads are no useful work; attention among the few words of a caption is neglected."""
    size = SIZES[config.size]
    D = size.width
    N = (config.image_size // size.patch) ** 2
    block = 12 * D ** 2  # multiplications by weights: attention 4 D^2, MLP 8 D^2
    attention = 2 * N * D  # q k^T, and its product with v, for one query
    encoder = N * (3 * size.patch ** 2 * D + size.depth * (block + attention))
    decoder = size.decoder_depth * block
    if config.objective != "clip":
        encoder += N * size.decoder_depth * 2 * D ** 2  # TextDecoder.read
        decoder += size.decoder_depth * (2 * D ** 2 + attention)  # cross-attention
    head = D * config.vocab_size
    return 6 * (images * encoder + tokens * decoder + predicted * head)
