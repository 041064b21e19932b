"""The captioner: a ViT that turns an image into patch features and a text decoder that reads them.

    python model.py                       # the size registry: parameters of every model

Masked diffusion captioning needs no new architecture. It is the encoder-decoder of CapPa (Tschannen et al. 2023,
"Image Captioners Are Scalable Vision Learners Too") with the causal mask taken out of the decoder. Everything the
paper adds is in diffusion.py. Three things here are worth a look:

  * `[MASK]` is an extra *input* embedding row and has no output column, so the model can never predict it.
  * The decoder works on a flat stream of the real tokens of a batch; pads exist only inside attention.
  * Cross-attention keys and values are computed once an image (`TextDecoder.read`) and used at every step.

Shape letters, used at line ends in all files:
    B images (= captions) of a batch   N patches of an image   T token positions of the longest caption
    M real tokens of the batch (no pads)   K positions with a loss   D width   H heads   V vocabulary
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# name: (width, encoder depth, heads, patch size). The decoder has half the encoder's depth, as CapPa's B/16 has.
SIZES = {
    "tiny": (128, 4, 2, 8),
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
    positions: str = "sincos"     # of the patches: "sincos" (fixed) or "learned" (started at sincos)

    def to_dict(self):
        """Plain values only, so that a checkpoint loads with `weights_only=True`."""
        return asdict(self)


# ------------------------------------------------------------------------------------------------ building blocks
def sincos(positions, width):
    """Sine-cosine table of positions [n] -> [n, width] (Vaswani et al. 2017); `width` must be even.

    Positions learned from small noise cost most of a short run; so does the usual base of 10000, made for thousands of
    words: on a grid of 6 to 14 patches most of its waves hardly move. With 100 all of them tell neighbours apart.
    """
    frequency = 100.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = positions.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sincos_2d(side, width):
    """Table for a side x side grid of patches in row-major order, half the width for each axis -> [side**2, width]."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([sincos(y.flatten(), width // 2), sincos(x.flatten(), width // 2)], dim=1)


def attend(q, k, v, bias=None):
    """softmax(q k^T / sqrt(d) + bias) v with q [B,H,T,d], k and v [B,H,N,d], bias broadcast to [B,H,T,N] or None.

    CUDA and MPS have fused kernels for it. On a CPU, PyTorch's fused kernel is the slow way: at a few dozen patches its
    backward alone takes more than half of a training step, so there the formula is written out.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias.to(scores.dtype)).softmax(dim=-1) @ v


def split_heads(x, heads):
    """[B,T,D] -> [B,H,T,D/H]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x):
    """[B,H,T,D/H] -> [B,T,D]."""
    return x.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Two linear layers with a GELU between them; four times as wide inside."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


# ------------------------------------------------------------------------------------------------ image encoder
class SelfAttention(nn.Module):
    """Multi-head self-attention; `pack` (None: no pads) moves the flat token stream in and out of [B,T]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, bias=None, pack=None):
        qkv = self.qkv(x)
        qkv = qkv if pack is None else pack.pad(qkv)                                            # [B,T,3D]
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, dim=-1))              # [B,H,T,d]
        out = merge_heads(attend(q, k, v, bias))                                                # [B,T,D]
        return self.proj(out if pack is None else pack.unpad(out))


class EncoderBlock(nn.Module):
    """Pre-LN transformer block with timm's parameter names."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each to the model's width."""

    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                                          # [B,N,D]


class ViT(nn.Module):
    """Vision transformer without a class token (Dosovitskiy et al. 2021; no token as in CapPa and timm).

    Parameter names and shapes are timm's, so `timm.create_model("vit_base_patch16_224", class_token=False,
    global_pool="avg", fc_norm=False, num_classes=0).load_state_dict(vit.state_dict())` works as it is.
    """

    def __init__(self, config):
        super().__init__()
        width, depth, heads, patch = SIZES[config.size]
        if config.image_size % patch:
            raise ValueError(f"image size {config.image_size} is not a multiple of {config.size}'s patch size {patch}")
        self.patch_embed = PatchEmbed(width, patch)
        table = sincos_2d(config.image_size // patch, width)[None]                              # [1,N,D]
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        """images [B,3,S,S] float in [-1,1] -> patch features after the final LayerNorm [B,N,D]."""
        x = self.patch_embed(images) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ------------------------------------------------------------------------------------------------ text decoder
class Pack:
    """Where the real tokens of a padded batch stand: pads never enter a linear layer, only attention sees [B,T].

    valid [B,T] bool; rows [M] = flat positions b*T+i of the real tokens (found here unless the loader already did,
    which saves a CUDA host synchronisation).
    """

    def __init__(self, valid, rows=None):
        self.B, self.T = valid.shape
        self.rows = valid.flatten().nonzero().squeeze(1) if rows is None else rows

    def pad(self, x):
        """[M,D] -> [B,T,D] with zeros at the pads."""
        return x.new_zeros(self.B * self.T, x.shape[-1]).index_copy(0, self.rows, x).view(self.B, self.T, -1)

    def unpad(self, x):
        """[B,T,D] -> [M,D]."""
        return x.flatten(0, 1).index_select(0, self.rows)


class CrossAttention(nn.Module):
    """Text asks, image answers; the keys and values come from `read`, once an image."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def read(self, features):
        """features [B,N,D] -> keys and values, each [B,H,N,d]."""
        return tuple(split_heads(part, self.heads) for part in self.kv(features).chunk(2, dim=-1))

    def forward(self, x, kv, pack):
        q = split_heads(pack.pad(self.q(x)), self.heads)                                        # [B,H,T,d]
        return self.proj(pack.unpad(merge_heads(attend(q, *kv))))                               # [M,D]


class DecoderBlock(nn.Module):
    """Pre-LN block: self-attention among the words, cross-attention to the patches, MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.cross = CrossAttention(width, heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x, kv, bias, pack):
        x = x + self.attn(self.norm1(x), bias, pack)
        x = x + self.cross(self.norm2(x), kv, pack)
        return x + self.mlp(self.norm3(x))


class TextDecoder(nn.Module):
    """Predicts the words of a caption from the image and from the words that are not masked.

    There is no time input: how many words are masked tells the decoder all that t could (MDLM and LLaDA have none).
    """

    def __init__(self, config):
        super().__init__()
        width, depth, heads, _ = SIZES[config.size]
        self.mask_id = config.vocab_size                                   # the last input row; no output column
        self.embed = nn.Embedding(config.vocab_size + 1, width)
        self.positions = nn.Parameter(sincos(torch.arange(config.max_tokens), width))
        self.blocks = nn.ModuleList(DecoderBlock(width, heads) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, config.vocab_size)

    def read(self, features):
        """features [B,N,D] -> the cross-attention keys and values of every layer; sampling calls it once an image."""
        return [block.cross.read(features) for block in self.blocks]

    def forward(self, kv, tokens, mask, valid, rows=None, where=None, causal=False):
        """Logits for the words of B captions.

        kv      from `read`
        tokens  [B,T] int, anything at masked positions and pads
        mask    [B,T] bool, True where the input is [MASK]; never recovered from ids
        valid   [B,T] bool, False at pads, which nothing attends to; a caption has at least one real token
        rows    [M] int, flat positions of the real tokens, if the caller knows them
        where   [K] int, flat positions whose logits are wanted (real tokens only); None: all
        returns [K,V], or [B,T,V] with zeros at pads
        """
        pack = Pack(valid, rows)
        x = self.embed(tokens.masked_fill(mask, self.mask_id)) + self.positions[:tokens.shape[1]]
        x = pack.unpad(x)                                                                       # [M,D]
        seen = valid[:, None, None, :]                                                          # [B,1,1,T] keys
        if causal:
            seen = seen & torch.ones(pack.T, pack.T, dtype=torch.bool, device=x.device).tril()  # [B,1,T,T]
        bias = torch.zeros(seen.shape, device=x.device).masked_fill(~seen, -torch.inf)
        for block, block_kv in zip(self.blocks, kv, strict=True):
            x = block(x, block_kv, bias, pack)
        x = self.norm(x)
        if where is None:
            return pack.pad(self.head(x))
        return self.head(pack.pad(x).flatten(0, 1).index_select(0, where))


# ------------------------------------------------------------------------------------------------ both together
class Captioner(nn.Module):
    """Image encoder f_phi and text decoder g_psi, the paper's h = g_psi(f_phi(image), masked caption)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = ViT(config)
        self.decoder = TextDecoder(config)
        self.apply(self._init)
        nn.init.zeros_(self.decoder.head.weight)      # CapPa: the first prediction is uniform, the first loss log V

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def encode(self, images):
        """images [B,S,S,3] uint8 as the loader makes them -> patch features [B,N,D]; pixels become [-1,1] here."""
        return self.encoder(images.permute(0, 3, 1, 2).float() / 127.5 - 1)

    def forward(self, images, tokens, mask, valid, rows=None, where=None, causal=False):
        """One training pass: images [B,S,S,3] uint8, the rest as in TextDecoder.forward."""
        return self.decoder(self.decoder.read(self.encode(images)), tokens, mask, valid, rows, where, causal)


def main():
    print(f"{'model':8}{'encoder':>12}{'decoder':>12}   parameters in millions, GPT-2 vocabulary, 224 px, 64 tokens")
    for size in SIZES:
        with torch.device("meta"):
            model = Captioner(Config(size=size, image_size=224))
        counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.decoder)]
        print(f"{size:8}{counts[0]:12.1f}{counts[1]:12.1f}")


if __name__ == "__main__":
    main()
