"""The mathematics of masked diffusion: schedules, masks, losses, likelihood, samplers.

The forward process takes a caption x of L tokens and a time t in [0,1] and replaces each
token by [MASK] independently, with probability 1 - alpha_t. In the linear schedule alpha_t = 1 - t,
so t *is* the expected share of masked tokens. The decoder sees the other tokens and
the image, and minimizes the paper's objective

    L = E_{t ~ U[t_min, 1]} E_mask [ 1/t * sum_{i masked} -log p(x_i | x_masked, image) ]

A token is masked with probability t and then weighs 1/t: 1 on average, whatever t is. Other
schedules weigh -alpha'_t / (1 - alpha_t): 1 on average over [0,1], so with t_min > 0 losses of
two schedules cannot be compared. Sampling runs backwards in time: start from masks only, fill
in the most confident word, repeat.

The baselines are special cases or neighbours: an image-conditioned BERT has one fixed t,
parallel decoding is t = 1 (both are `mdc_loss`), an autoregressive captioner is asked for
every token (`ar_loss`), and CLIP compares whole captions with whole images (`clip_loss`).

Shape letters are model.py's; in `scoring_masks`, S is the number of masks of a caption."""
import math

import torch
import torch.nn.functional as F


# ---- schedules
def linear(t):
    """alpha_t = 1 - t, the paper's: times t [...] -> masking ratio t, weight 1/t."""
    ratio = t
    weight = 1 / t
    return ratio, weight


def cosine(t):
    """alpha_t = 1 - cos(pi/2 (1 - t)), MD4's: 71 % are masked at t = 1/2, all at 1.

    Times t [...] -> masking ratio 1 - alpha_t, weight -alpha'_t / (1 - alpha_t)."""
    angle = math.pi / 2 * (1 - t)
    ratio = angle.cos()
    weight = math.pi / 2 * angle.tan()
    return ratio, weight


def unweighted(t):
    """Ablation: the linear schedule without its weight; many masks count more."""
    return t, torch.ones_like(t)


SCHEDULES = {"linear": linear, "cosine": cosine, "unweighted": unweighted}


def stratified_times(u, strata, t_min=0.5, t_max=1.0):
    """Times of captions, each from a slice of its own of (t_min, t_max] -> [B] float64.

    u is one number in [0,1) for the whole *global* batch, strata [B] is place / size of that
    batch. Each time is uniform, and together they cover the interval evenly, which lowers the
    noise (the idea is in the code of MD4 and of Kingma et al. 2021). Counted down from t_max:
    t = 0, where nothing is masked and the weight is infinite, cannot come out."""
    return t_max - (t_max - t_min) * ((u + strata) % 1)


def mask_tokens(noise, valid, ratio):
    """The forward process: mask [B,T], every valid token masked with probability ratio [B].

    noise [B,T] is uniform in [0,1), valid [B,T] False at pads. Pass the mask on: it cannot be
    recovered from token ids."""
    return (noise < ratio[:, None]) & valid


# ---- losses
def cross_entropy(logits, targets):
    """-log p of each target in float32: logits [K,V], targets [K] -> nats [K]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def mdc_loss(model, images, tokens, mask, valid, where, t, schedule=linear):
    """The objective: the sum over masked tokens of w(t) * -log p, in nats.

    images [B,S,S,3]; tokens, mask and valid [B,T]; where [K], the flat positions of the
    masked tokens; t [B]. The caller divides by a constant (tokens of an average batch), never
    by the number of masked tokens, which would cancel the 1/t."""
    logits = model(images, tokens, mask, valid, where)       # [K,V]
    nll = cross_entropy(logits, tokens.flatten()[where])     # [K]
    caption = where // tokens.shape[1]                       # [K], caption of each token
    weight = schedule(t)[1][caption]                         # [K], 1/t
    return (weight * nll).sum()


def ar_loss(model, images, tokens, valid, where):
    """Autoregressive captioning: the sum of -log p of every token, given those before it.

    where [K]: the flat positions of all valid tokens. All are asked for: the mask is `valid`."""
    logits = model(images, tokens, valid, valid, where)      # [K,V]
    return cross_entropy(logits, tokens.flatten()[where]).sum()


def clip_loss(image, text, all_images, all_texts, scale, first=0):
    """CLIP's symmetric cross-entropy (Radford et al. 2021), summed over this process's pairs.

    image and text [b,D] are unit vectors of this process, all_images and all_texts [B,D]
    those of the global batch, in which this process's begin at `first`; scale is the inverse
    temperature."""
    targets = first + torch.arange(len(image), device=image.device)
    with torch.autocast(image.device.type, enabled=False):  # logits reach 100: no bfloat16
        image_to_text = scale * image @ all_texts.T  # logits [b,B]
        text_to_image = scale * text @ all_images.T
    loss = F.cross_entropy(image_to_text, targets, reduction="sum")
    loss += F.cross_entropy(text_to_image, targets, reduction="sum")
    return loss / 2


# ---- likelihood
def scoring_masks(rule, valid, noise=None, u=None):
    """Masks [B,S,T] and weights [B,S]: the score of a caption is the sum over s of
    weight_s * sum_masked log p.

    "monte-carlo"    unbiased for a lower bound on log p(caption | image, length): exactly l
                     of L tokens are masked, with l uniform in 1..L, and the sum weighs L/l
                     (LLaDA, Nie et al. 2025). noise [B,S,T] picks the places, u [B] in [0,1)
                     shifts the strata from which l is drawn
    "parallel"       every token from the image alone, in one pass
    "leave-one-out"  every token from the image and all others: pseudo-likelihood"""
    B, T = valid.shape
    if rule == "parallel":
        return valid[:, None], torch.ones(B, 1)
    if rule == "leave-one-out":
        one = torch.eye(T, dtype=torch.bool)
        return one & valid[:, None], torch.ones(B, T)

    S = noise.shape[1]
    length = valid.sum(1, keepdim=True)  # [B,1]
    place = torch.arange(S, dtype=torch.float64) / S
    strata = (u[:, None] + place) % 1  # [B,S]
    count = 1 + (strata * length).long()  # l
    noise = noise[:, :, :T].masked_fill(~valid[:, None], torch.inf)  # pads come last
    rank = noise.argsort(dim=2).argsort(dim=2)
    return rank < count[:, :, None], length / (count * S)


@torch.no_grad()
def log_likelihood(predict, tokens, valid, rule, noise=None, u=None):
    """Scores of captions in nats, summed over tokens -> [B] float64.

    predict  (tokens [B,T], mask [B,T]) -> logits [K,V] of the masked tokens, row by row
    rule     see `scoring_masks`; an autoregressive `predict`, which ignores the mask, makes
             "parallel" the exact log p
    noise    [B,S,T] and u [B], for "monte-carlo". The same noise for captions that are
             compared takes most of it out of their difference"""
    masks, weights = scoring_masks(rule, valid.cpu(), noise, u)
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for s in range(masks.shape[1]):
        mask = masks[:, s].to(tokens.device)
        nll = cross_entropy(predict(tokens, mask), tokens[mask])  # [K]
        sums = torch.zeros(mask.shape, dtype=torch.float64)
        sums[masks[:, s]] = nll.double().cpu()
        total -= weights[:, s] * sums.sum(1)
    return total


def visual_gain(scores):
    """How much better captions fit their own images than images in general, in nats -> [B].

    scores [B,M]: log p of a caption, or of its hidden words, given M images, its own first. The
    mean over images (log-mean-exp) stands for p without an image, so the mean gain is a lower
    bound on the mutual information, and at most ln M (InfoNCE, van den Oord et al. 2018)."""
    return scores[:, 0] - scores.logsumexp(dim=1) + math.log(scores.shape[1])


# ---- samplers
ORDERS = ("confidence", "random", "ancestral")


def draw_tokens(logits, temperature=0.0, generator=None):
    """The likeliest token of each row of logits [K,V] (temperature 0), or a draw from
    softmax(logits / temperature) -> tokens [K] and their probabilities [K] at temperature 1,
    by which LLaDA ranks positions."""
    logits = logits.float()
    if temperature > 0:
        scaled = logits.double().cpu() / max(temperature, 1e-300)  # finite
        p = scaled.softmax(dim=-1)
        drawn = torch.multinomial(p, 1, generator=generator)
        tokens = drawn.squeeze(1).to(logits.device)
    else:
        tokens = logits.argmax(dim=-1)
    probability = logits.softmax(dim=-1).gather(1, tokens[:, None])
    return tokens, probability.squeeze(1)


@torch.no_grad()
def denoise(predict, tokens, mask, steps=None, order="confidence", temperature=0.0, generator=None):
    """Fill the masked positions step by step; yields (tokens [B,T], mask [B,T]) before the
    first step and after every step.

    predict      see `log_likelihood`
    tokens,mask  the given words, which stay, and the positions to fill
    steps        at most this many ("ancestral": exactly); None: one for each token (best)
    order        which positions to reveal first: "confidence" (highest probability of the
                 drawn token; LLaDA), "random" (one a step: the first-hitting sampler of Zheng
                 et al. 2024), or "ancestral" (the reverse process: from time t to s, each mask
                 is revealed with probability (t - s)/t; MDLM)
    temperature  0 is greedy; otherwise tokens are drawn on the CPU from `generator`

    A revealed token never changes, and [MASK], which has no logit, cannot be drawn. Raises
    ValueError for an unknown order."""
    if order not in ORDERS:
        raise ValueError(f"order {order!r}: expected one of {', '.join(ORDERS)}")

    total = mask.sum(1)  # [B] tokens to find
    n = total.clamp(1, steps or mask.shape[1])  # [B] steps of each caption
    last = int(n.max())
    if order == "ancestral" and steps:
        last = steps
    yield tokens, mask

    for step in range(1, last + 1):
        logits = predict(tokens, mask)
        drawn, score = draw_tokens(logits, temperature, generator)  # each [K]
        if order != "confidence":  # uniform instead
            score = torch.rand(len(drawn), generator=generator).to(score)
        score = score.new_full(mask.shape, -torch.inf).masked_scatter(mask, score)  # [B,T]
        if order == "ancestral":
            # Masking ratio t = 1 - (step - 1)/last, then s = t - 1/last: (t - s)/t.
            chance = 1 / (last - step + 1)
            reveal = mask & (score < chance)
        else:
            # After `done` of n steps, done/n of the tokens are found, rounded down.
            done = n.clamp(max=step)  # [B]
            number = total * done // n - (total - mask.sum(1))  # to reveal now
            best_first = score.argsort(dim=1, descending=True, stable=True)
            rank = best_first.argsort(dim=1)
            reveal = mask & (rank < number[:, None])

        proposed = tokens.masked_scatter(mask, drawn)
        tokens = torch.where(reveal, proposed, tokens)
        mask = mask & ~reveal
        yield tokens, mask


@torch.no_grad()
def autoregress(predict, B, length, eos, temperature=0.0, generator=None, device="cpu"):
    """Left-to-right captions of at most `length` tokens; yields what `denoise` yields.

    predict is that of a causal decoder. A caption is EOS from its first EOS on."""
    tokens = torch.full((B, length), eos, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    place = torch.arange(length, device=device).expand(B, -1)  # [B,T]
    yield tokens, place >= 0
    for i in range(length):
        here = place == i
        drawn, _ = draw_tokens(predict(tokens, here), temperature, generator)
        drawn = drawn.masked_fill(ended, eos)
        tokens = tokens.masked_scatter(here, drawn)
        ended = drawn == eos
        yield tokens, place > i
        if ended.all():
            break
