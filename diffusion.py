"""Masked diffusion, the mathematics only: noise schedule, masking, loss and sampler on tensors. No model, no files.

    python -m pytest tests/test_diffusion.py        # the identities below, checked

The forward process takes a caption x of L tokens and a time t in [0,1] and replaces each token by [MASK]
independently, keeping it with probability alpha_t. With the linear schedule alpha_t = 1 - t, t *is* the expected
share of masked tokens. The decoder sees what is left and the image, and is trained on (paper, eq. of the objective)

    L = E_{t ~ U[t_min, t_max]} E_{mask ~ Bernoulli(t)} [ 1/t * sum_{i masked} -log p(x_i | x_masked, image) ]

The weight 1/t = -alpha'_t / (1 - alpha_t) is what makes every token count the same: a position is masked with
probability t and then weighs 1/t, which is 1 on average at every t and at every position. A left-to-right captioner
has another diet: many of its last words follow from the first ones, without a look at the image.
Sampling goes the other way: start from masks only, fill in the most confident word, look again.

Shape letters are model.py's: B captions, T positions, K positions with a loss, V vocabulary.
"""
import torch
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------ schedule
def alpha(t):
    """Probability that a token is still there at time t, linear schedule: alpha_0 = 1 (clean), alpha_1 = 0."""
    return 1 - t


def weight(t):
    """Cross-entropy weight -alpha'_t / (1 - alpha_t) of a masked token; 1/t for the linear schedule (MDLM, MD4)."""
    return 1 / t


def stratified_times(u, index, batch_size, t_min=0.5, t_max=1.0):
    """Times of a batch, one in each of `batch_size` equal slices of (t_min, t_max]: less noise than drawing them alone.

    u: one number in [0,1) for the whole *global* batch; index [B]: positions in the global batch -> [B] float32.
    Each time alone is still uniform. Low-discrepancy idea of MD4's and Kingma et al.'s (2021) code; counted down from
    t_max so that t = 0, where nothing is masked and 1/t is infinite, cannot come out.
    """
    return (t_max - (t_max - t_min) * ((u + index.double() / batch_size) % 1)).float()


def mask_tokens(noise, t, valid):
    """The forward process: mask [B,T] bool, each valid token masked with probability 1 - alpha_t.

    noise [B,T] uniform in [0,1), t [B], valid [B,T] bool. Pass the result on: it cannot be recovered from token ids.
    """
    return (noise < 1 - alpha(t)[:, None]) & valid


def training_batch(batch, batch_size, tokens_in_batch, t_min=0.5, t_max=1.0):
    """The forward process on a batch of data.Batches (runs in its workers): what the model is given and must answer.

    Adds t [B], mask [B,T], rows [M] and where [K] (flat positions of the real and of the masked tokens), targets [K]
    and weight [K] = weight(t) / tokens_in_batch. `tokens_in_batch` is what as many captions have on average,
    a constant of the data set, and never the count of masked tokens, which would cancel the 1/t. So the loss of
    a batch is the sum of the losses of its parts, whatever the accumulation or the number of processes.
    """
    t = stratified_times(batch["u"], batch["index"], batch_size, t_min, t_max)
    mask = mask_tokens(batch["noise"], t, batch["valid"])
    where = mask.flatten().nonzero().squeeze(1)
    per_token = (weight(t) / tokens_in_batch)[:, None].expand_as(mask).flatten()
    return batch | {"t": t, "mask": mask, "rows": batch["valid"].flatten().nonzero().squeeze(1), "where": where,
                    "targets": batch["tokens"].flatten()[where], "weight": per_token[where]}


def cross_entropy(logits, targets):
    """-log p of each target in float32: logits [K,V], targets [K] -> [K] nats, none if nothing is masked."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


# ------------------------------------------------------------------------------------------------ sampler
ORDERS = ("confidence", "random", "left-to-right")


def draw_tokens(logits, temperature=0.0, generator=None):
    """One token for each row of logits [K,V]: the likeliest (temperature 0) or a draw from softmax(logits/temperature).

    Drawn as argmax(logits/temperature + Gumbel noise) in float64: float32 cannot represent the large noise values that
    rare tokens need, which silently lowers the temperature (Zheng et al. 2024). Returns tokens [K] and their
    *unperturbed* probabilities [K], by which LLaDA ranks positions.
    """
    logits = logits.float()
    if temperature > 0:
        uniform = torch.rand(logits.shape, dtype=torch.float64, generator=generator)
        noisy = logits.cpu().double() / temperature - torch.log(-torch.log(uniform))
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
                 "random" (uniform; equals the first-hitting sampler of Zheng et al. 2024) or "left-to-right"
    temperature  0 is greedy; otherwise tokens are drawn, on the CPU from `generator`

    A token that has been revealed never changes, and [MASK], which has no logit, cannot be drawn.
    Raises ValueError for an unknown order, or steps below 1.
    """
    if order not in ORDERS:
        raise ValueError(f"order {order!r}: expected one of {', '.join(ORDERS)}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps {steps}: expected at least 1")
    total = mask.sum(1)                                                         # [B] words to find
    planned = total.clamp(max=steps or mask.shape[1])                           # [B] steps of each caption
    yield tokens, mask
    for step in range(1, int(planned.max()) + 1):
        where = mask.flatten().nonzero().squeeze(1)
        drawn, confidence = draw_tokens(predict(tokens, mask, where), temperature, generator)
        if order == "random":
            confidence = torch.rand(len(where), generator=generator).to(confidence)
        elif order == "left-to-right":
            confidence = -(where % mask.shape[1]).to(confidence)
        score = torch.full((mask.numel(),), -torch.inf, device=mask.device).index_copy(0, where, confidence.float())
        rank = score.view_as(mask).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        left = total - torch.minimum(total, step * total // planned.clamp(min=1))   # [B] still masked afterwards
        reveal = mask & (rank < (mask.sum(1) - left)[:, None])
        tokens = torch.where(reveal, tokens.flatten().index_copy(0, where, drawn).view_as(tokens), tokens)
        mask = mask & ~reveal
        yield tokens, mask
