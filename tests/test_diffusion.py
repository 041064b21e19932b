"""The mathematics of diffusion.py: identities, not shapes."""

import itertools
import math

import pytest
import torch

import diffusion


def all_masks(length):
    return torch.tensor(list(itertools.product([False, True], repeat=length)))


def slope(alpha, t, step=1e-6):
    return (alpha(t + step) - alpha(t - step)) / (2 * step)


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.73, 0.999])
def test_every_position_carries_the_same_expected_weight(name, t):
    alpha, masks, t = diffusion.SCHEDULES[name], all_masks(4), torch.tensor(t, dtype=torch.float64)
    probability = torch.where(masks, 1 - alpha(t), alpha(t)).prod(1)
    expected = (probability[:, None] * diffusion.weight(t, alpha) * masks).sum(0)
    torch.testing.assert_close(expected, -slope(alpha, t).expand(4), rtol=1e-6, atol=1e-9)
    if name == "linear":
        torch.testing.assert_close(expected, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_expected_weight_integrates_to_the_difference_of_alpha(name):
    alpha, (low, high), n = diffusion.SCHEDULES[name], (0.3, 0.9), 4000
    t = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    mean = ((1 - alpha(t)) * diffusion.weight(t, alpha)).mean()
    ends = [alpha(torch.tensor(end, dtype=torch.float64)) for end in (low, high)]
    torch.testing.assert_close(mean, (ends[0] - ends[1]) / (high - low), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_a_ratio_is_a_ratio_in_every_schedule(name):
    alpha = diffusion.SCHEDULES[name]
    for ratio in (0.0, 1e-3, 0.25, 0.5, 0.9):
        t = torch.tensor(diffusion.time_of(ratio, alpha), dtype=torch.float64)
        assert 1 - alpha(t).item() == pytest.approx(ratio, abs=1.1e-5)
    assert diffusion.time_of(1.0, alpha) == pytest.approx(1.0)
    exact = {"linear": 0.3, "cosine": 1 - 2 / math.pi * math.acos(0.3)}
    if name in exact:
        assert diffusion.time_of(0.3, alpha) == pytest.approx(exact[name], abs=1e-12)


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_weights_are_finite_and_need_no_backward_pass(name):
    """Loader workers compute them; one forked after a backward pass on CUDA can run none, as here."""
    alpha = diffusion.SCHEDULES[name]
    with torch.inference_mode():
        weight = diffusion.weight(torch.tensor([1e-9, 1e-6, 0.5, 1.0]), alpha)
    assert weight.dtype == torch.float64 and weight.isfinite().all() and (weight >= 0).all()


@pytest.mark.parametrize("w", [0.0, 0.5])
def test_states_with_l_masks_weigh_as_derived(w):
    L, steps = 5, 200_000  # integral over t by the midpoint rule
    t = w + (1 - w) * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    law = diffusion.count_law(L, (w, 1.0))
    assert law.sum().item() == pytest.approx(1)
    for masked in range(1, L + 1):
        binomial = math.comb(L, masked) * (1 - diffusion.linear(t)) ** masked * diffusion.linear(t) ** (L - masked)
        at_least = sum(math.comb(L, k) * w**k * (1 - w) ** (L - k) for k in range(masked))  # P(Bin(L, w) < l)
        assert float((binomial * diffusion.weight(t)).mean()) == pytest.approx(at_least / ((1 - w) * masked), rel=1e-6)
        assert float(law[masked - 1]) == pytest.approx(at_least / ((1 - w) * L), rel=1e-9)


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
@pytest.mark.parametrize("ratios", [(0.0, 1.0), (0.5, 1.0), (0.2, 0.6), (0.3, 0.3), (1.0, 1.0)])
def test_a_token_weighs_one_on_average_in_every_schedule_and_range(name, ratios):
    B, T = 40_000, 4
    noise = torch.rand(B, T, generator=torch.Generator().manual_seed(0))
    batch = {"tokens": torch.zeros(B, T, dtype=torch.long), "valid": torch.ones(B, T) > 0, "noise": noise, "u": 0.3}
    view = diffusion.training_batch(batch | {"index": torch.arange(B)}, "mdc", B, T, ratios, name)
    assert view["weight"].sum().item() == pytest.approx(1, abs=0.03)
    low, high = view["ratio"].min().item(), view["ratio"].max().item()
    assert ratios[0] - 1e-4 < low and high < ratios[1] + 1e-4


def test_law_of_the_number_of_masks_at_one_fixed_ratio():
    law = diffusion.count_law(6, (0.4, 0.4))
    binomial = torch.tensor([math.comb(6, k) * 0.4**k * 0.6 ** (6 - k) * k / (6 * 0.4) for k in range(1, 7)])
    torch.testing.assert_close(law.float(), binomial, atol=1e-3, rtol=0)
    assert diffusion.count_law(6, (1.0, 1.0))[-1] > 0.999


@pytest.mark.parametrize("length", [1, 128, 1500])
@pytest.mark.parametrize("ratios", [(0.0, 1.0), (0.5, 1.0), (0.15, 0.15), (1e-6, 1e-6), (1.0, 1.0)])
def test_law_of_the_number_of_masks_is_one_for_long_captions_too(length, ratios):
    law = diffusion.count_law(length, ratios)
    assert law.min() >= 0 and law.sum().item() == pytest.approx(1, abs=1e-6)
    low, high = max(0.0, min(ratios[0], ratios[1] - 1e-4)), ratios[1]  # the mean of 1/l tells laws apart
    t = low + (high - low) * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    expected = ((1 - (1 - t) ** length) / t / length).mean().item()
    assert float((law / torch.arange(1, length + 1)).sum()) == pytest.approx(expected, rel=1e-6)


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
    view = diffusion.training_batch(batch, "mdc", 6, 20 / 6)
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
        view = diffusion.training_batch(part, "mdc", 6, 20 / 6)
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
    exact = steps is None and order != "ancestral"  # ancestral sampling may reveal none or several in a step
    for (tokens, before), (later, after) in itertools.pairwise(states):
        assert torch.equal(tokens[~before], later[~before]), "a revealed token changed"
        assert not (after & ~before).any(), "a token was masked again"
        if exact:
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


def test_a_temperature_near_zero_is_greedy():
    logits = torch.tensor([[-3.0, -1.0, -2.0], [5.0, 4.0, -9.0]])
    drawn, _ = diffusion.draw_tokens(logits, 1e-310, torch.Generator().manual_seed(0))
    assert drawn.tolist() == [1, 0]


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


def test_ancestral_sampling_follows_its_transition_law():
    """Two steps, t = 1 -> 1/2 -> 0: each of three positions is revealed first with probability 1/2, on its own."""
    predict, n = predictor(2), 20_000
    law = torch.zeros(8, dtype=torch.float64)
    for first in all_masks(3):
        for number, words in enumerate(itertools.product(range(2), repeat=3)):
            tokens, p = torch.tensor([words]), 1 / 8
            blank = predict(tokens, torch.ones(1, 3) > 0, torch.arange(3)).double().softmax(1)
            later = predict(tokens, ~first[None], torch.arange(3)).double().softmax(1)
            for i in range(3):
                p *= float((blank if first[i] else later)[i, words[i]])
            law[number] += p
    assert law.sum().item() == pytest.approx(1)
    start = torch.zeros(n, 3, dtype=torch.long)
    *_, (tokens, _) = diffusion.denoise(
        predict, start, torch.ones(n, 3) > 0, 2, "ancestral", 1.0, torch.Generator().manual_seed(1)
    )
    counts = (tokens * torch.tensor([4, 2, 1])).sum(1).bincount(minlength=8)
    assert float(((counts - n * law) ** 2 / (n * law)).sum()) < 24.3, "0.1 % of seven degrees of freedom"


def exact_bound(predict, x):
    """Mean over l, then over all states with l masks, of (L/l) sum_masked log p."""
    L, states, total = len(x), all_masks(len(x)), 0.0
    for mask in states[states.any(1)]:
        masked = int(mask.sum())
        where = mask.nonzero().squeeze(1)
        log_p = predict(x[None], mask[None], where).double().log_softmax(1)[torch.arange(masked), x[where]].sum()
        total += float(log_p) * L / masked / L / math.comb(L, masked)
    return total


def random_order_log_p(predict, x):
    """log of the mean over orders of the product of p(next word | words so far)."""
    p = 0.0
    for order in itertools.permutations(range(len(x))):
        mask, product = torch.ones(1, len(x), dtype=torch.bool), 1.0
        for i in order:
            product *= float(predict(x[None], mask, torch.tensor([i])).double().softmax(1)[0, x[i]])
            mask = mask.index_fill(1, torch.tensor(i), False)
        p += product / math.factorial(len(x))
    return math.log(p)


def test_the_estimator_has_the_exact_bound_as_its_mean_and_jensen_holds():
    predict, V, T = predictor(3), 3, 3
    captions = torch.tensor(list(itertools.product(range(V), repeat=T)))
    valid, generator = torch.ones_like(captions, dtype=torch.bool), torch.Generator().manual_seed(0)
    noise, shifts = torch.rand(400, 4, T, generator=generator), torch.rand(400, generator=generator)
    draws = torch.stack([
        diffusion.log_likelihood(predict, captions, valid, "monte-carlo", [draw] * len(captions))
        for draw in zip(noise, shifts.tolist(), strict=True)
    ])
    exact = torch.tensor([exact_bound(predict, x) for x in captions], dtype=torch.float64)
    error = draws.std(0) / 20
    assert ((draws.mean(0) - exact) / error).abs().max() < 4 and error.max() < 0.2 * exact.std()
    truth = torch.tensor([random_order_log_p(predict, x) for x in captions], dtype=torch.float64)
    assert truth.exp().sum().item() == pytest.approx(1)
    assert (exact <= truth + 1e-9).all() and (exact < truth - 1e-3).any()


def consistent_predictor(V=3, T=3):
    """Conditionals of one joint law, so that the order of revealing does not matter."""
    joint = torch.rand(*[V] * T, generator=torch.Generator().manual_seed(5)).double()
    joint /= joint.sum()

    def predict(tokens, mask, where):
        rows = []
        for flat in where.tolist():
            b, i = divmod(flat, T)
            table = joint[tuple(slice(None) if mask[b, j] else tokens[b, j] for j in range(T))]
            axis = int(mask[b, :i].sum())
            rows.append(table.movedim(axis, 0).reshape(V, -1).sum(1).log())
        return torch.stack(rows)

    return predict, joint


def test_the_bound_is_exact_for_a_model_whose_conditionals_agree():
    predict, joint = consistent_predictor()
    for x in torch.tensor(list(itertools.product(range(3), repeat=3)))[::4]:
        assert exact_bound(predict, x) == pytest.approx(math.log(joint[tuple(x)]), abs=1e-6)
        assert random_order_log_p(predict, x) == pytest.approx(math.log(joint[tuple(x)]), abs=1e-6)


def test_the_two_heuristics_are_what_they_say():
    predict, x = predictor(3), torch.tensor([[2, 0, 1, 0], [1, 1, 0, 0]])
    valid = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    parallel, pseudo = (diffusion.log_likelihood(predict, x, valid, rule) for rule in ("parallel", "leave-one-out"))
    for b, L in enumerate((4, 2)):
        logs = [
            sum(
                predict(x[b : b + 1], hidden[None] & valid[b : b + 1], torch.tensor([i])).log_softmax(1)[0, x[b, i]]
                for i, hidden in enumerate(masks[:L])
            )
            for masks in (torch.ones(4, 4) > 0, torch.eye(4) > 0)
        ]
        assert [float(parallel[b]), float(pseudo[b])] == pytest.approx([float(log) for log in logs], abs=1e-4)


def test_published_losses_of_mdlm_and_md4_are_ours():
    """MDLM: sigma'(t) / (exp(sigma(t)) - 1) with exp(-sigma) = alpha (log-linear: alpha = 1 - t). MD4, its Table of
    schedules: -alpha'/(1 - alpha) = (pi/2) tan(pi/2 (1 - t)) for cosine, and for geometric
    exp(-b)/(1 - exp(-b)) b log(b_max/b_min) with b = b_min^(1-t) b_max^t."""
    batch, logits = example(B=4)

    def published(name, t):
        if name == "linear":
            sigma, slope_of_sigma = -math.log(1 - t) if t < 1 else math.inf, 1 / (1 - t) if t < 1 else math.inf
            return slope_of_sigma / math.expm1(sigma)
        if name == "cosine":
            return math.pi / 2 * math.tan(math.pi / 2 * (1 - t))
        b = 1e-5 ** (1 - t) * 20**t
        return math.exp(-b) / -math.expm1(-b) * b * math.log(20 / 1e-5)

    for name in diffusion.SCHEDULES:
        view = diffusion.training_batch(batch, "mdc", 4, 5.0, (0.0, 1.0), name)
        ours = (diffusion.cross_entropy(logits.flatten(0, 1)[view["where"]], view["targets"]) * view["weight"]).sum()
        low, high = (diffusion.time_of(end, diffusion.SCHEDULES[name]) for end in (0.0, 1.0))
        theirs = 0.0
        for b in range(4):
            t = high - (high - low) * ((0.4 + b / 4) % 1)
            for i in view["mask"][b].nonzero().flatten().tolist():
                theirs -= float(logits[b, i].log_softmax(0)[batch["tokens"][b, i]]) * published(name, t) / 4 / 5
        assert float(ours) == pytest.approx(theirs, rel=1e-4), name


def test_contrastive_loss_of_two_processes_adds_up_to_that_of_one():
    image, text = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    whole = diffusion.contrastive_loss(image, text, image, text)
    parts = [diffusion.contrastive_loss(image[i : i + 3], text[i : i + 3], image, text, i) for i in (0, 3)]
    torch.testing.assert_close(sum(parts), whole)
    slow = -sum((image @ text.T).log_softmax(axis).diagonal().mean() for axis in (0, 1)) / 2
    torch.testing.assert_close(whole, slow)


def test_autoregression_stops_at_the_end():
    table = torch.tensor([[0.0, 9, 0], [0, 0, 9], [9.0, 0, 0]])
    states = list(diffusion.autoregress(lambda tokens, i: table[tokens if i else torch.tensor([0, 1])], 2, 6, eos=2))
    assert states[-1][0].tolist() == [[1, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2]] and len(states) == 3


def test_bad_arguments_are_refused():
    ones = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="order"):
        next(diffusion.denoise(None, ones, ones > 0, order="best"))
    with pytest.raises(ValueError, match="steps"):
        next(diffusion.denoise(None, ones, ones > 0, steps=0))
