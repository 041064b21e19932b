"""The mathematics of diffusion.py: identities, not shapes."""

import itertools
import math

import pytest
import torch

import diffusion


def all_masks(length):
    return torch.tensor(list(itertools.product([False, True], repeat=length)))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.73, 1.0])
def test_every_position_weighs_one_at_every_time(t):
    masks = all_masks(4)
    t = torch.tensor(t, dtype=torch.float64)
    probability = torch.where(masks, 1 - diffusion.alpha(t), diffusion.alpha(t)).prod(1)
    expected = (probability[:, None] * diffusion.weight(t) * masks).sum(0)
    torch.testing.assert_close(expected, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("w", [0.0, 0.5])
def test_states_with_l_masks_weigh_as_derived(w):
    L, steps = 5, 200_000  # integral over t by the midpoint rule
    t = w + (1 - w) * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    for masked in range(1, L + 1):
        binomial = math.comb(L, masked) * (1 - diffusion.alpha(t)) ** masked * diffusion.alpha(t) ** (L - masked)
        at_least = sum(math.comb(L, k) * w**k * (1 - w) ** (L - k) for k in range(masked))  # P(Bin(L, w) < l)
        assert float((binomial * diffusion.weight(t)).mean()) == pytest.approx(at_least / ((1 - w) * masked), rel=1e-6)


def test_times_are_stratified_and_never_zero():
    for u in (0.0, 0.3, 0.999):
        t = diffusion.stratified_times(u, torch.arange(16), 16, 0.0, 1.0)
        assert (t > 0).all() and (t <= 1).all()
        assert sorted(((1 - t.double()) * 16 + 1e-6).floor().long().tolist()) == list(range(16))
    t = diffusion.stratified_times(0.3, torch.arange(16), 16)
    assert (t > 0.5).all() and (t <= 1).all()
    parts = [diffusion.stratified_times(0.3, torch.arange(start, 16, 4), 16) for start in range(4)]
    assert torch.equal(torch.stack(parts, 1).flatten(), t), "a time depends on the place in the global batch only"


def test_share_of_masked_tokens_is_the_time():
    noise, valid = (
        torch.rand(4, 50_000, generator=torch.Generator().manual_seed(0)),
        torch.ones(4, 50_000, dtype=torch.bool),
    )
    valid[:, 40_000:] = False
    t = torch.tensor([0.1, 0.5, 0.9, 1.0])
    mask = diffusion.mask_tokens(noise, t, valid)
    assert not mask[:, 40_000:].any(), "a pad was masked"
    torch.testing.assert_close(mask[:, :40_000].float().mean(1), t, atol=0.01, rtol=0)


def example(B=6, T=5, V=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 1, 3, 4, 2, 5])[:B]
    batch = {
        "tokens": torch.randint(V, (B, T), generator=generator),
        "valid": torch.arange(T) < lengths[:, None],
        "noise": torch.rand(B, T, generator=generator),
        "u": 0.4,
        "index": torch.arange(B),
    }
    return batch, torch.randn(B, T, V, dtype=torch.float64, generator=generator)


def test_loss_equals_the_equation_written_as_loops():
    batch, logits = example()
    view = diffusion.training_batch(batch, 6, 20.0)
    loss = (diffusion.cross_entropy(logits.flatten(0, 1)[view["where"]], view["targets"]) * view["weight"]).sum()
    slow = 0.0
    for b in range(6):
        t = 1.0 - 0.5 * ((0.4 + b / 6) % 1)
        for i in range(int(batch["valid"][b].sum())):
            if batch["noise"][b, i] < t:
                p = math.exp(logits[b, i, batch["tokens"][b, i]]) / sum(math.exp(x) for x in logits[b, i])
                slow += -math.log(p) / t / 20.0
    assert float(loss) == pytest.approx(slow, rel=1e-5)


def test_loss_of_a_batch_is_the_sum_over_any_parts():
    batch, logits = example()

    def loss_of(rows):
        part = {k: v[rows] if torch.is_tensor(v) else v for k, v in batch.items()}
        view = diffusion.training_batch(part, 6, 20.0)
        return (
            diffusion.cross_entropy(logits[rows].flatten(0, 1)[view["where"]], view["targets"]) * view["weight"]
        ).sum()

    whole = loss_of(torch.arange(6))
    for parts in ([[0, 2, 4], [1, 3, 5]], [[0], [1, 2], [3, 4, 5]]):
        torch.testing.assert_close(sum(loss_of(torch.tensor(part)) for part in parts), whole)


def test_nothing_masked_gives_zero_loss_and_zero_gradient():
    logits = torch.randn(0, 7, requires_grad=True)
    weights = torch.randn(3, 7, requires_grad=True)
    loss = (
        diffusion.cross_entropy(logits @ torch.eye(7) + weights[:0], torch.zeros(0, dtype=torch.long)) * torch.zeros(0)
    ).sum()
    loss.backward()
    assert loss.item() == 0 and torch.equal(weights.grad, torch.zeros(3, 7))


def predictor(V=5):
    """Logits that depend on everything that is visible, so that the order of revealing matters."""
    table = torch.randn(64, V, generator=torch.Generator().manual_seed(3)) * 2

    def predict(tokens, mask, where):
        seen = (torch.where(mask, 0, tokens + 1) * torch.arange(1, tokens.shape[1] + 1)).sum(1)
        return table[(seen[where // tokens.shape[1]] * 7 + where % tokens.shape[1]) % 64]

    return predict


@pytest.mark.parametrize("order", diffusion.ORDERS)
@pytest.mark.parametrize("steps", [None, 1, 3])
def test_sampler_reveals_for_good_and_never_masks(order, steps):
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, False], [False] * 6])
    given = torch.arange(18).view(3, 6) % 5
    states = list(diffusion.denoise(predictor(), given, mask, steps, order, 1.0, torch.Generator().manual_seed(0)))
    assert len(states) - 1 == (steps or 6) and not states[-1][1].any()
    for (tokens, before), (later, after) in itertools.pairwise(states):
        assert torch.equal(tokens[~before], later[~before]), "a revealed token changed"
        assert not (after & ~before).any(), "a token was masked again"
        if steps is None:
            assert (before.sum(1) - after.sum(1)).tolist() == before.any(1).long().tolist(), "not one token a step"
    assert torch.equal(states[-1][0][~mask], given[~mask]) and states[-1][0].max() < 5


def test_confidence_order_takes_the_most_confident_first():
    logits = torch.tensor([[0.0, 1.0], [0.0, 3.0], [2.0, 0.0]])
    states = list(
        diffusion.denoise(
            lambda tokens, mask, where: logits[where], torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3) > 0
        )
    )
    assert [state[1].tolist()[0] for state in states] == [
        [True] * 3,
        [True, False, True],
        [True, False, False],
        [False] * 3,
    ]
    assert states[-1][0].tolist() == [[1, 1, 0]]


def test_temperature_one_draws_from_the_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    drawn, probability = diffusion.draw_tokens(logits.expand(40_000, 4), 1.0, torch.Generator().manual_seed(0))
    expected = logits.softmax(0)
    chi2 = ((drawn.bincount(minlength=4) - 40_000 * expected) ** 2 / (40_000 * expected)).sum()
    assert chi2 < 16.3, "0.1 % of three degrees of freedom"
    torch.testing.assert_close(probability, expected[drawn])


def test_random_order_is_one_position_at_a_time_in_any_order():
    """Empirical joint law of the sampler against its enumeration over the orders of three positions, two words each."""
    predict, n = predictor(2), 20_000
    law = torch.zeros(8, dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        for words in itertools.product(range(2), repeat=3):
            p, tokens, mask = 1 / 6, torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)
            for i in order:
                p *= float(predict(tokens, mask, torch.tensor([i])).double().softmax(1)[0, words[i]])
                tokens, mask = (
                    tokens.index_fill(1, torch.tensor(i), words[i]),
                    mask.index_fill(1, torch.tensor(i), False),
                )
            law[words[0] * 4 + words[1] * 2 + words[2]] += p
    start = torch.zeros(n, 3, dtype=torch.long)
    *_, (tokens, _) = diffusion.denoise(
        predict, start, torch.ones(n, 3) > 0, None, "random", 1.0, torch.Generator().manual_seed(1)
    )
    counts = (tokens * torch.tensor([4, 2, 1])).sum(1).bincount(minlength=8)
    assert float(((counts - n * law) ** 2 / (n * law)).sum()) < 24.3, "0.1 % of seven degrees of freedom"


def test_bad_arguments_are_refused():
    ones = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="order"):
        next(diffusion.denoise(None, ones, ones > 0, order="best"))
    with pytest.raises(ValueError, match="steps"):
        next(diffusion.denoise(None, ones, ones > 0, steps=0))
