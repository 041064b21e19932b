"""Masked diffusion, the mathematics only: schedules, masking, losses, likelihoods and samplers on tensors.

    python -m pytest tests/test_diffusion.py        # the identities below, checked

The forward process takes a caption x of L tokens and a time t in [0,1] and replaces each token by [MASK]
independently, keeping it with probability alpha_t. With the linear schedule alpha_t = 1 - t, t *is* the expected
share of masked tokens. The decoder sees what is left and the image, and is trained on (paper, eq. of the objective)

    L = E_{t ~ U[t_min, t_max]} E_{mask ~ Bernoulli(t)} [ 1/t * sum_{i masked} -log p(x_i | x_masked, image) ]

The weight 1/t = -alpha'_t / (1 - alpha_t) is what makes every token count the same: a position is masked with
probability t and then weighs 1/t, which is 1 on average at every t and at every position. A left-to-right captioner
learns from other evidence: many of its last words follow from the first ones, without a look at the image.
Sampling goes the other way: start from masks only, fill in the most confident word, look again.

What the paper compares with needs few lines of its own (`training_batch`): image-conditioned BERT is one fixed t,
parallel decoding is t = 1, autoregression shifts the caption by one, and CLIP has no masks but another loss.

Shape letters are model.py's: B captions, T positions, K positions with a loss, V vocabulary."""
import functools
import math

import torch
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------ schedules
def linear(t):
    """alpha_t = 1 - t, the paper's; in continuous time also MDLM's log-linear schedule."""
    return 1 - t


def cosine(t):
    """alpha_t = 1 - cos(pi/2 (1 - t)), MD4's favourite: more of the time at many masks, half of it above 71 %."""
    return 1 - torch.cos(math.pi / 2 * (1 - t))


def geometric(t):
    """alpha_t = exp(-b), with b growing geometrically from 1e-5 to 20 (MD4): most of the time at few masks."""
    return torch.exp(-(1e-5 ** (1 - t)) * 20.0 ** t)


SCHEDULES = {schedule.__name__: schedule for schedule in (linear, cosine, geometric)}


def weight(t, alpha=linear):
    """Weight -alpha'_t / (1 - alpha_t) of a masked token's cross-entropy at times t [...]; linear schedule: 1/t.

    The slope by a complex step, alpha(t + ih) = alpha_t + ih alpha'_t, exact for a tiny h (Squire & Trapp 1998): a
    backward pass would need autograd's threads, which do not survive the fork of a loader's worker."""
    kept = alpha(torch.complex(t.double(), torch.full_like(t, 1e-30, dtype=torch.float64)))
    return -kept.imag / 1e-30 / (1 - kept.real)


@functools.cache
def time_of(ratio, alpha=linear):
    """The time at which the expected share of masked tokens, 1 - alpha_t, is `ratio`, by bisection; a float."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        masked = 1 - float(alpha(torch.tensor(middle, dtype=torch.float64)))
        low, high = (middle, high) if masked < ratio else (low, middle)
    return high


def stratified_times(u, index, batch_size, t_min=0.5, t_max=1.0):
    """Times of a batch, one in each of `batch_size` equal slices of (t_min, t_max]: less noise than drawing them alone.

    u: one number in [0,1) for the whole *global* batch; index [B]: positions in the global batch -> [B] float64.
    Each time alone is still uniform. Low-discrepancy idea of MD4's and Kingma et al.'s (2021) code; counted down from
    t_max so that t = 0, where nothing is masked and 1/t is infinite, cannot come out."""
    return t_max - (t_max - t_min) * ((u + index.double() / batch_size) % 1)


def mask_tokens(noise, t, valid, alpha=linear):
    """The forward process: mask [B,T] bool, each valid token masked with probability 1 - alpha_t.

    noise [B,T] uniform in [0,1), t [B], valid [B,T] bool. Pass the result on: it cannot be recovered from token ids."""
    return (noise < 1 - alpha(t)[:, None]) & valid


# ------------------------------------------------------------------------------------------------ training
def shift_right(tokens):
    """Autoregressive input: each position sees the token before it, the first one [MASK] -> tokens and mask [B,T]."""
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 0] = True
    return tokens.roll(1, 1), mask


def training_batch(batch, objective, batch_size, mean_length, ratios=(0.5, 1.0), schedule="linear", flat=False):
    """What the model is given and must answer: the forward process on a batch of data.Batches, run in its workers.

    ratios       smallest and largest expected share of masked tokens; one and the same for BERT, (1, 1) for parallel
    flat         True leaves the weight out (ablation, of more than one ratio)
    mean_length  tokens a caption has on average, a constant of the data set: each *token* weighs the same. Never the
                 count of masked tokens, which would cancel the 1/t
    batch_size   captions in the global batch, so that its loss is the sum of its parts', whatever their number

    Adds mask [B,T], rows [M] (flat positions of the real tokens), where, targets and weight [K] (those with a loss)
    and ratio [K], the share of the caption that was hidden when this token was asked for."""
    tokens, valid, per_token = batch["tokens"], batch["valid"], torch.ones(())
    inputs, mask, ratio = tokens, torch.zeros_like(valid), torch.zeros(valid.shape)     # CLIP: no word is asked for
    if objective == "ar":
        inputs, mask = shift_right(tokens)
        ratio = 1 - torch.arange(valid.shape[1]) / valid.sum(1)[:, None]
    elif objective != "clip":
        alpha, (low, high) = SCHEDULES[schedule], (time_of(end, SCHEDULES[schedule]) for end in ratios)
        t = stratified_times(batch["u"], batch["index"], batch_size, low, high)
        mask, ratio = mask_tokens(batch["noise"], t, valid, alpha), (1 - alpha(t))[:, None]
        if ratios[0] == ratios[1]:
            per_token = 1 / ratio[:, 0]
        elif not flat:                                # so that a token weighs 1 on average in every schedule
            per_token = weight(t, alpha) * (high - low) / (ratios[1] - ratios[0])
    per_token = (per_token / batch_size / mean_length).expand(len(tokens))
    where = (valid if objective == "ar" else mask).flatten().nonzero().squeeze(1)
    return batch | {"tokens": inputs, "mask": mask, "rows": valid.flatten().nonzero().squeeze(1), "where": where,
                    "targets": tokens.flatten()[where], "ratio": ratio.expand(valid.shape).flatten()[where].float(),
                    "weight": per_token[:, None].expand(valid.shape).flatten()[where].float()}


def cross_entropy(logits, targets):
    """-log p of each target in float32: logits [K,V], targets [K] -> [K] nats, none if nothing is masked."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


class LinearCrossEntropy(torch.autograd.Function):
    """cross_entropy(x @ weight.T + bias, targets) with little memory: x [K,D], weight [V,D], targets [K] -> [K] nats.

    Logits would be most of the memory of a training step. Here they exist once, in autocast's type, and become their
    own gradient a few rows at a time; only those rows are ever float32. For the matrix products, which are faster so,
    V is rounded up to a multiple of 64; the columns added have weight 0 and no part in the softmax."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        device, V = x.device.type, len(weight)
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        padded = x.new_zeros(-(-V // 64) * 64, x.shape[1])
        padded[:V] = weight
        logits, losses = x @ padded.T, bias.new_empty(len(x))
        chunk = 1 + (2 ** 20 if device == "cpu" else 2 ** 24) // V          # a CPU's cache; a GPU wants few launches
        for first in range(0, len(x), chunk):
            rows, target = logits[first:first + chunk, :V], targets[first:first + chunk, None]
            log_p = (rows + bias).log_softmax(1)                                # float32, as the bias is
            losses[first:first + chunk] = -log_p.gather(1, target).squeeze(1)
            rows.copy_(log_p.exp_().scatter_add_(1, target, -log_p.new_ones(target.shape)))     # p - one-hot
        ctx.save_for_backward(x, padded, logits)
        ctx.V = V
        return losses

    @staticmethod
    def backward(ctx, slope):                         # [K], the weights of the losses
        x, padded, gradient = ctx.saved_tensors
        by_weight = gradient.T @ (x * slope[:, None]).to(x.dtype)
        by_bias = slope.to(x.dtype) @ gradient
        return (gradient @ padded) * slope[:, None], by_weight[:ctx.V], by_bias[:ctx.V], None


def contrastive_loss(image, text, all_images, all_texts, first=0):
    """CLIP's symmetric cross-entropy (Radford et al. 2021): this process's part of the mean over the global batch.

    image [b,D], text [b,D] from Captioner.match; all_images and all_texts [B,D] are everybody's, in which those of
    this process begin at `first`. The parts of all processes add up."""
    right = first + torch.arange(len(image), device=image.device)
    losses = F.cross_entropy(image @ all_texts.T, right, reduction="sum") + \
        F.cross_entropy(text @ all_images.T, right, reduction="sum")
    return losses / (2 * len(all_images))


def image_gain(real, control, length, ratio, plain, bins=10):
    """How much a caption's words depend on the image -> dict of plain numbers.

    real, control [B,T]: weighted losses, 0 where there is none, with the right images and with exchanged ones; length
    [B] of the captions; ratio [K] and plain [K]: masking ratio and unweighted loss of each predicted token

    val_loss     nats per token with the right images; control with exchanged ones; gain is the difference
    gain_se      its standard error over captions, that of a ratio of two sums
    by_ratio     mean loss of a masked token in each tenth of masking ratios, None where there was none
    by_position  [gain, its standard error, captions] for each token position that two captions have"""
    gain, tokens = (control - real).double(), length.sum()
    mean = gain.sum() / tokens
    figures = {"val_loss": real.sum() / tokens, "control": control.sum() / tokens, "gain": mean,
               "gain_se": (gain.sum(1) - mean * length).norm() / tokens}
    tenths = [plain[(ratio * bins).long().clamp(max=bins - 1) == i] for i in range(bins)]
    places = [gain[length > i, i] for i in range(gain.shape[1]) if (length > i).sum() > 1]
    return {name: float(value) for name, value in figures.items()} | {
        "by_ratio": [float(x.mean()) if len(x) else None for x in tenths],
        "by_position": [[float(x.mean()), float(x.std() / len(x) ** 0.5), len(x)] for x in places]}


def recall(image, text, number):
    """CLIP's retrieval: how often a right one of all captions (images) is among the nearest 1 or 5 of an image
    (caption). image, text [B,D]; number [B]: pairs of the same number are right for one another. -> dict of shares."""
    figures, same = {}, number[:, None] == number
    for name, table in (("image_to_text", image @ text.T), ("text_to_image", text @ image.T)):
        best = table.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        before = ((table >= best) & ~same).sum(1)     # a wrong one that ties stands before the right one
        figures |= {f"{name}_r{k}": float((before < k).float().mean()) for k in (1, 5)}
    return figures


# ------------------------------------------------------------------------------------------------ likelihood
def count_law(length, ratios=(0.0, 1.0)):
    """Law of the number l of masked tokens under which (L/l) sum_masked log p has the mean of the objective -> [L].

    For times uniform in [a, b], integrating 1/t times the binomial law of l gives the states with l masks the weight
    (P(Bin(L,a) < l) - P(Bin(L,b) < l)) / ((b - a) l). Times l/L that is a law; for [0, 1] it is uniform (LLaDA)."""
    a, b = max(0.0, min(ratios[0], ratios[1] - 1e-4)), ratios[1]        # one fixed ratio: a narrow range below it
    k = torch.arange(length, dtype=torch.float64)
    ways = math.lgamma(length + 1) - torch.lgamma(k + 1) - torch.lgamma(length - k + 1)         # logarithm of (L, k)
    below = [(ways + torch.xlogy(k, t) + torch.xlogy(length - k, 1 - t)).exp().cumsum(0) for t in (a, b)]
    return ((below[0] - below[1]) / ((b - a) * length)).clamp(min=0)                # a difference of -1e-14 is rounding


def scoring_masks(rule, length, noise=None, u=0.0, ratios=(0.0, 1.0)):
    """Masks [S,L] and weights [S] with which sum_s weight_s * sum_masked log p scores a caption of L tokens.

    "monte-carlo"    a bound on log p(caption | image, length) on average (ratios (0, 1)): exactly l masks with l
                     stratified over `count_law`, at the places where noise [S,T] is smallest; u shifts the strata
    "parallel"       every token from the image alone, in one pass
    "leave-one-out"  every token from the image and all others: pseudo-likelihood
    Captions that are compared get the same noise and u, which takes most of the noise out of the difference."""
    if rule == "parallel":
        return torch.ones(1, length, dtype=torch.bool), torch.ones(1)
    if rule == "leave-one-out":
        return torch.eye(length, dtype=torch.bool), torch.ones(length)
    S = len(noise)
    strata = (u + torch.arange(S, dtype=torch.float64) / S) % 1
    count = 1 + torch.searchsorted(count_law(length, ratios).cumsum(0), strata, right=True).clamp(max=length - 1)
    masks = noise[:, :length].argsort(dim=1).argsort(dim=1) < count[:, None]
    return masks, length / (count * S)


@torch.no_grad()
def log_likelihood(predict, tokens, valid, rule="parallel", draws=None, ratios=(0.0, 1.0)):
    """Scores of captions in nats, summed over tokens: tokens and valid [B,T] -> [B] float64.

    rule, ratios and of each caption the draw (noise, u): scoring_masks. predict is denoise's; an autoregressive one,
    which ignores the mask, makes "parallel" the exact log p."""
    draws = draws or [()] * len(tokens)
    plans = [scoring_masks(rule, int(own.sum()), *draw, ratios=ratios) for own, draw in zip(valid, draws, strict=True)]
    total, T = torch.zeros(len(tokens), dtype=torch.float64), tokens.shape[1]
    for s in range(max(len(weights) for _, weights in plans)):
        mask, weights = torch.zeros(valid.shape, dtype=torch.bool), torch.zeros(len(plans), dtype=torch.float64)
        for b, plan in enumerate(plans):
            if s < len(plan[1]):
                mask[b, :plan[0].shape[1]], weights[b] = plan[0][s], plan[1][s]
        mask = mask.to(valid.device)
        where = mask.flatten().nonzero().squeeze(1)
        loss = cross_entropy(predict(tokens, mask, where), tokens.flatten()[where]).cpu().double()
        total -= torch.zeros_like(total).index_add(0, where.cpu() // T, loss) * weights
    return total


# ------------------------------------------------------------------------------------------------ samplers
ORDERS = ("confidence", "random", "left-to-right", "ancestral")


def draw_tokens(logits, temperature=0.0, generator=None):
    """One token for each row of logits [K,V]: the likeliest (temperature 0) or a draw from softmax(logits/temperature).

    Drawn as argmax(logits + temperature * Gumbel noise) in float64: float32 cannot represent the large noise values
    that rare tokens need, which silently lowers the temperature (Zheng et al. 2024). Returns tokens [K] and their
    *unperturbed* probabilities [K], by which LLaDA ranks positions."""
    logits = logits.float()
    if temperature > 0:
        uniform = torch.rand(logits.shape, dtype=torch.float64, generator=generator)
        noisy = logits.cpu().double() - temperature * torch.log(-torch.log(uniform))
        tokens = noisy.argmax(dim=-1).to(logits.device)
    else:
        tokens = logits.argmax(dim=-1)
    return tokens, logits.softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)


@torch.no_grad()
def denoise(predict, tokens, mask, steps=None, order="confidence", temperature=0.0, generator=None):
    """Fill the masked positions step by step; yields (tokens [B,T], mask [B,T]) at the start and after every step.

    predict      (tokens [B,T], mask [B,T], where [K]) -> logits [K,V] of the flat positions `where`
    tokens,mask  the words that are given (kept for ever) and where to write
    steps        at most this many; None: one token of each caption a step (best)
    order        which positions to reveal first: "confidence" (highest probability of the token drawn; LLaDA),
                 "random" (uniform; equals the first-hitting sampler of Zheng et al. 2024), "left-to-right", or
                 "ancestral" (the reverse process itself: from t to s, each with probability (t - s)/t; MDLM)
    temperature  0 is greedy; otherwise tokens are drawn, on the CPU from `generator`

    A token that has been revealed never changes, and [MASK], which has no logit, cannot be drawn.
    Raises ValueError for an unknown order, or steps below 1."""
    if order not in ORDERS:
        raise ValueError(f"order {order!r}: expected one of {', '.join(ORDERS)}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps {steps}: expected at least 1")
    total = mask.sum(1)                                                         # [B] words to find
    planned = total.clamp(max=steps or mask.shape[1])                           # [B] steps of each caption
    last = steps if steps and order == "ancestral" else int(planned.max())
    yield tokens, mask
    for step in range(1, last + 1):
        where = mask.flatten().nonzero().squeeze(1)
        drawn, confidence = draw_tokens(predict(tokens, mask, where), temperature, generator)
        if order in ("random", "ancestral"):
            confidence = torch.rand(len(where), generator=generator).to(confidence)
        elif order == "left-to-right":
            confidence = -(where % mask.shape[1]).to(confidence)
        score = torch.full((mask.numel(),), -torch.inf, device=mask.device).index_copy(0, where, confidence.float())
        if order == "ancestral":                                                # t = 1 - (step-1)/last, s = t - 1/last
            reveal = mask & (score.view_as(mask) < 1 / (last - step + 1))
        else:
            rank = score.view_as(mask).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            left = total - torch.minimum(total, step * total // planned.clamp(min=1))   # [B] still masked afterwards
            reveal = mask & (rank < (mask.sum(1) - left)[:, None])
        tokens = torch.where(reveal, tokens.flatten().index_copy(0, where, drawn).view_as(tokens), tokens)
        mask = mask & ~reveal
        yield tokens, mask


@torch.no_grad()
def autoregress(next_word, B, length, eos, temperature=0.0, generator=None, device="cpu"):
    """Left-to-right captions of at most `length` tokens; yields (tokens [B,T], mask [B,T]) as denoise does.

    next_word: (tokens [B] before `position`, position) -> logits [B,V]. After its EOS a caption is EOS to the end."""
    tokens, mask = torch.full((B, length), eos, device=device), torch.ones(B, length, dtype=torch.bool, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    yield tokens, mask
    for i in range(length):
        drawn, _ = draw_tokens(next_word(tokens[:, i - 1], i), temperature, generator)
        tokens, mask = tokens.clone(), mask.clone()
        tokens[:, i], mask[:, i] = drawn.masked_fill(ended, eos), False
        ended = ended | (drawn == eos)
        yield tokens, mask
        if ended.all():
            break
