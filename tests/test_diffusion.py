"""The mathematics of diffusion.py: identities, not shapes."""

import ast
import inspect
import itertools
import math
import re

import pytest
import torch
from conftest import ROOT

import diffusion
import train

EXACT = ("linear", "cosine")  # the schedules whose weights follow from their masking ratios


def all_masks(length):
    return torch.tensor(list(itertools.product([False, True], repeat=length)))


def slope(ratio, t, step=1e-6):
    return (ratio(t + step) - ratio(t - step)) / (2 * step)


# ---- schedules, times and masks
@pytest.mark.parametrize("name", diffusion.SCHEDULES)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.73, 0.999])
def test_every_position_carries_the_same_expected_weight(name, t):
    """By enumeration of all masks of four tokens: -alpha'_t, which is 1 at every t in the linear schedule."""
    masks, t = all_masks(4), torch.tensor(t, dtype=torch.float64)
    ratio, weight = diffusion.SCHEDULES[name](t)
    probability = torch.where(masks, ratio, 1 - ratio).prod(1)
    expected = (probability[:, None] * weight * masks).sum(0)
    if name in EXACT:
        alpha_slope = -slope(lambda t: diffusion.SCHEDULES[name](t)[0], t)
        torch.testing.assert_close(expected, -alpha_slope.expand(4), rtol=1e-6, atol=1e-9)
    if name == "linear":
        torch.testing.assert_close(expected, torch.ones(4, dtype=torch.float64))
    if name == "unweighted":
        torch.testing.assert_close(expected, t.expand(4))


@pytest.mark.parametrize("name", EXACT)
def test_a_token_weighs_one_on_average_over_all_times(name):
    n = 4000
    for low, high in ((0.0, 1.0), (0.3, 0.9)):
        t = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
        ratio, weight = diffusion.SCHEDULES[name](t)
        ends = [float(diffusion.SCHEDULES[name](torch.tensor(end, dtype=torch.float64))[0]) for end in (low, high)]
        expected = (ends[1] - ends[0]) / (high - low)  # alpha(low) - alpha(high)
        assert (ratio * weight).mean().item() == pytest.approx(expected, rel=1e-6)
        assert low > 0 or expected == pytest.approx(1)


def test_schedules_mask_nothing_at_first_and_everything_at_last():
    for name, schedule in diffusion.SCHEDULES.items():
        ratio, _ = schedule(torch.linspace(0, 1, 101, dtype=torch.float64))
        assert ratio[0].item() == pytest.approx(0, abs=1e-12) and ratio[-1].item() == pytest.approx(1), name
        assert (ratio.diff() > 0).all(), name
    halfway = diffusion.cosine(torch.tensor(0.5))[0]
    assert halfway.item() == pytest.approx(math.sqrt(0.5)), "half of the time above 71 %"


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_weights_are_finite_at_all_times_that_can_come_out(name):
    for u in (0.0, 0.5, 1 - 2**-53):
        t = diffusion.stratified_times(u, torch.arange(8) / 8, 0.0, 1.0)
        _, weight = diffusion.SCHEDULES[name](t.float())
        assert weight.isfinite().all() and (weight >= -1e-6).all()


def random_batch(B=40_000, T=4, u=0.3):
    """What data.Batches gives for captions of four tokens."""
    return {
        "tokens": torch.zeros(B, T, dtype=torch.long),
        "valid": torch.ones(B, T, dtype=torch.bool),
        "noise": torch.rand(B, T, generator=torch.Generator().manual_seed(0)),
        "u": torch.tensor(u, dtype=torch.float64),
        "strata": torch.arange(B, dtype=torch.float64) / B,
    }


RANGES = [(0.0, 1.0), (0.5, 1.0), (0.2, 0.6)]
POINTS = [(0.3, 0.3), (1.0, 1.0)]  # of bert and parallel, which are linear


@pytest.mark.parametrize(
    ("name", "times"), [("linear", times) for times in RANGES + POINTS] + [("cosine", times) for times in RANGES]
)
def test_a_token_of_a_training_batch_weighs_one_on_average(name, times):
    """As train.py masks, in any range of times."""
    batch = train.add_masks(random_batch(), "mdc", times, name)
    ratio, weight = diffusion.SCHEDULES[name](batch["t"])
    mean = (weight[:, None] * batch["mask"]).mean().item()
    low, high = (diffusion.SCHEDULES[name](torch.tensor(t, dtype=torch.float64))[0].item() for t in times)
    expected = 1 if low == high else (high - low) / (times[1] - times[0])
    assert mean == pytest.approx(expected, abs=0.03) and (name != "linear" or expected == pytest.approx(1))
    assert low - 1e-4 < ratio.min() and ratio.max() < high + 1e-4


def test_times_are_stratified_and_never_zero():
    strata = torch.arange(16, dtype=torch.float64) / 16
    for u in (0.0, 0.3, 0.999):
        t = diffusion.stratified_times(u, strata, 0.0, 1.0)
        assert (t > 0).all() and (t <= 1).all()
        assert sorted(((1 - t) * 16 + 1e-6).floor().long().tolist()) == list(range(16)), "one in each slice"
    t = diffusion.stratified_times(0.3, strata)
    assert (t > 0.5).all() and (t <= 1).all()
    parts = [diffusion.stratified_times(0.3, strata[start::4]) for start in range(4)]
    assert torch.equal(torch.stack(parts, 1).flatten(), t), "a time depends on the place in the global batch only"


def test_share_of_masked_tokens_is_the_ratio():
    noise = torch.rand(4, 50_000, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(4, 50_000, dtype=torch.bool)
    valid[:, 40_000:] = False
    ratio = torch.tensor([0.1, 0.5, 0.9, 1.0])
    mask = diffusion.mask_tokens(noise, valid, ratio)
    assert not mask[:, 40_000:].any(), "a pad was masked"
    torch.testing.assert_close(mask[:, :40_000].float().mean(1), ratio, atol=0.01, rtol=0)
    assert mask[3, :40_000].all(), "at ratio 1 everything is masked"


# ---- losses
def example(B=6, T=5, V=7, seed=0):
    """A batch of data.Batches without images, and logits of every position."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 1, 3, 4, 2, 5])[:B]
    batch = {
        "images": torch.arange(B),  # the captions' numbers, by which `table_model` finds their logits
        "tokens": torch.randint(V, (B, T), generator=generator),
        "valid": torch.arange(T) < lengths[:, None],
        "noise": torch.rand(B, T, generator=generator),
        "u": torch.tensor(0.4, dtype=torch.float64),
        "strata": torch.arange(B, dtype=torch.float64) / B,
    }
    return batch, torch.randn(B, T, V, dtype=torch.float64, generator=generator)


def table_model(logits):
    """A model that looks its logits up."""

    def model(images, tokens, mask, valid, where):
        assert torch.equal(where, mask.flatten().nonzero().squeeze(1)) and not (mask & ~valid).any()
        return logits[images].flatten(0, 1)[where]

    return model


def loss_of(batch, logits, objective="mdc", times=(0.5, 1.0), schedule="linear"):
    """As a training step computes it, before it is divided by a constant."""
    batch = train.add_masks(dict(batch), objective, times, schedule)
    return train.step_loss(table_model(logits), batch, objective, schedule, None, train.Processes())


def minus_log_p(logits, token):
    return -math.log(math.exp(logits[token]) / sum(math.exp(x) for x in logits))


def test_loss_equals_the_equation_written_as_loops():
    batch, logits = example()
    slow = 0.0
    for b in range(6):
        t = 1.0 - 0.5 * ((0.4 + b / 6) % 1)
        for i in range(int(batch["valid"][b].sum())):
            if batch["noise"][b, i] < t:
                slow += 1 / t * minus_log_p(logits[b, i], batch["tokens"][b, i])
    assert float(loss_of(batch, logits)) == pytest.approx(slow, rel=1e-5)


def test_losses_of_the_neighbours_equal_their_equations_written_as_loops():
    batch, logits = example()
    slow = {"ar": 0.0, "parallel": 0.0, "bert": 0.0}
    for b in range(6):
        for i in range(int(batch["valid"][b].sum())):
            nll = minus_log_p(logits[b, i], batch["tokens"][b, i])
            slow["ar"] += nll
            slow["parallel"] += nll
            if batch["noise"][b, i] < 0.6:
                slow["bert"] += nll / 0.6
    for objective, times in (("ar", (0.5, 1.0)), ("parallel", (1.0, 1.0)), ("bert", (0.6, 0.6))):
        assert float(loss_of(batch, logits, objective, times)) == pytest.approx(slow[objective], rel=1e-5), objective


def test_loss_of_a_batch_is_the_sum_over_any_parts():
    batch, logits = example()
    whole = loss_of(batch, logits)
    for parts in ([[0, 2, 4], [1, 3, 5]], [[0], [1, 2], [3, 4, 5]]):
        losses = []
        for rows in map(torch.tensor, parts):
            part = {name: value[rows] if value.ndim else value for name, value in batch.items()}
            losses.append(loss_of(part, logits))
        torch.testing.assert_close(sum(losses), whole)


def test_nothing_masked_gives_zero_loss_and_zero_gradient():
    batch, logits = example()
    logits.requires_grad_()
    loss = loss_of(batch | {"noise": torch.ones(6, 5)}, logits)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros(6, 5, 7, dtype=torch.float64))


def test_losses_are_in_float32_whatever_the_logits_are():
    logits, targets = torch.randn(9, 5) * 10, torch.randint(5, (9,))
    losses = diffusion.cross_entropy(logits.bfloat16(), targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, diffusion.cross_entropy(logits.bfloat16().float(), targets), atol=0, rtol=0)


def test_published_losses_of_mdlm_and_md4_are_ours():
    """MDLM: sigma'(t) / (exp(sigma(t)) - 1) with exp(-sigma) = alpha (log-linear: alpha = 1 - t). MD4, its Table of
    schedules: -alpha'/(1 - alpha) = (pi/2) tan(pi/2 (1 - t)) for cosine."""
    batch, logits = example(B=4)

    def published(name, t):
        if name == "linear":
            sigma, slope_of_sigma = -math.log(1 - t), 1 / (1 - t)
            return slope_of_sigma / math.expm1(sigma)
        return math.pi / 2 * math.tan(math.pi / 2 * (1 - t))

    for name in EXACT:
        ours = loss_of(batch, logits, times=(0.0, 1.0), schedule=name)
        theirs = 0.0
        for b in range(4):
            t = 1 - (0.4 + b / 4) % 1
            ratio = t if name == "linear" else math.cos(math.pi / 2 * (1 - t))
            for i in range(int(batch["valid"][b].sum())):
                if batch["noise"][b, i] < ratio:
                    theirs += published(name, t) * minus_log_p(logits[b, i], batch["tokens"][b, i])
        assert float(ours) == pytest.approx(theirs, rel=1e-4), name


def test_contrastive_loss_of_two_processes_adds_up_to_that_of_one():
    image, text = torch.randn(2, 6, 4, dtype=torch.float64).unbind(0)
    scale = 3.0
    whole = diffusion.clip_loss(image, text, image, text, scale)
    parts = [diffusion.clip_loss(image[i : i + 3], text[i : i + 3], image, text, scale, i) for i in (0, 3)]
    torch.testing.assert_close(sum(parts), whole)
    slow = -sum((scale * image @ text.T).log_softmax(axis).diagonal().sum() for axis in (0, 1)) / 2
    torch.testing.assert_close(whole, slow)


def without_docstring(source):
    """A function as text without its docstring; code and comments as they are."""
    lines, function = source.splitlines(), ast.parse(source).body[0]
    first, *rest = function.body
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and rest:
        del lines[first.lineno - 1 : first.end_lineno]
    return [line.rstrip() for line in lines if line.strip()]


def test_the_step_in_the_readme_is_the_step_in_the_code():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(def mdc_loss\(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, "README.md shows the function once, in a python block that begins with it"
    assert without_docstring(blocks[0]) == without_docstring(inspect.getsource(diffusion.mdc_loss))


# ---- samplers
def predictor(V=5):
    """Logits that depend on everything that is visible, so that the order of revealing matters."""
    table = torch.randn(64, V, generator=torch.Generator().manual_seed(3)) * 2

    def predict(tokens, mask):
        seen = (torch.where(mask, 0, tokens + 1) * torch.arange(1, tokens.shape[1] + 1)).sum(1)
        rows, columns = mask.nonzero(as_tuple=True)
        return table[(seen[rows] * 7 + columns) % 64]

    return predict


def at(predict, tokens, mask, position):
    """Log-probabilities [V] of the word at one masked position of one caption [1,T]."""
    place = int(mask[0, :position].sum())
    return predict(tokens, mask)[place].double().log_softmax(0)


@pytest.mark.parametrize("order", diffusion.ORDERS)
@pytest.mark.parametrize("steps", [None, 1, 3])
def test_sampler_reveals_for_good_and_never_masks(order, steps):
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, False], [False] * 6])
    given = torch.arange(18).view(3, 6) % 5
    generator = torch.Generator().manual_seed(0)
    states = list(diffusion.denoise(predictor(), given, mask, steps, order, 1.0, generator))
    assert len(states) - 1 == (steps or 6) and not states[-1][1].any()
    exact = steps is None and order != "ancestral"  # ancestral sampling may reveal none or several in a step
    for (tokens, before), (later, after) in itertools.pairwise(states):
        assert torch.equal(tokens[~before], later[~before]), "a revealed token changed"
        assert not (after & ~before).any(), "a token was masked again"
        if exact:
            assert (before.sum(1) - after.sum(1)).tolist() == before.any(1).long().tolist(), "not one token a step"
    assert torch.equal(states[-1][0][~mask], given[~mask]) and states[-1][0].max() < 5


def test_words_under_the_masks_have_no_influence():
    given, mask = torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 6, dtype=torch.bool)
    *_, (one, _) = diffusion.denoise(predictor(), given, mask)
    *_, (two, _) = diffusion.denoise(predictor(), given + 4, mask)
    assert torch.equal(one, two)


def test_confidence_order_takes_the_most_confident_first():
    logits = torch.tensor([[0.0, 1.0], [0.0, 3.0], [2.0, 0.0]])
    start = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)
    states = list(diffusion.denoise(lambda tokens, mask: logits[mask[0]], *start))
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


PAIRS_OF_WORDS = list(itertools.product(range(2), repeat=3))  # captions of three tokens, two words


def check_law(tokens, law):
    """Chi-squared of captions [n,3] of two words against the law of PAIRS_OF_WORDS."""
    n = len(tokens)
    assert law.sum().item() == pytest.approx(1)
    counts = (tokens * torch.tensor([4, 2, 1])).sum(1).bincount(minlength=8)
    assert float(((counts - n * law) ** 2 / (n * law)).sum()) < 24.3, "0.1 % of seven degrees of freedom"


def sampled(predict, steps, order, n=20_000):
    start = torch.zeros(n, 3, dtype=torch.long), torch.ones(n, 3, dtype=torch.bool)
    *_, (tokens, _) = diffusion.denoise(predict, *start, steps, order, 1.0, torch.Generator().manual_seed(1))
    return tokens


def test_random_order_is_one_position_at_a_time_in_any_order():
    """Empirical joint law of the sampler against its enumeration over the orders of three positions, two words each."""
    predict, law = predictor(2), torch.zeros(8, dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        for number, words in enumerate(PAIRS_OF_WORDS):
            p, tokens, mask = 1 / 6, torch.tensor([words]), torch.ones(1, 3, dtype=torch.bool)
            for i in order:
                p *= math.exp(at(predict, tokens, mask, i)[words[i]])
                mask = mask.index_fill(1, torch.tensor(i), False)
            law[number] += p
    check_law(sampled(predict, None, "random"), law)


def test_ancestral_sampling_follows_its_transition_law():
    """Two steps, t = 1 -> 1/2 -> 0: each of three positions is revealed first with probability 1/2, on its own."""
    predict, law = predictor(2), torch.zeros(8, dtype=torch.float64)
    blank = torch.ones(1, 3, dtype=torch.bool)
    for first in all_masks(3):
        for number, words in enumerate(PAIRS_OF_WORDS):
            tokens, p = torch.tensor([words]), 1 / 8
            for i in range(3):
                p *= math.exp(at(predict, tokens, blank if first[i] else ~first[None], i)[words[i]])
            law[number] += p
    check_law(sampled(predict, 2, "ancestral"), law)


def causal_predictor(V=2):
    """Logits of a position that depend on the tokens before it only, whatever the mask."""
    table = torch.randn(64, V, generator=torch.Generator().manual_seed(4)) * 2

    def predict(tokens, mask):
        before = ((tokens + 1) * 3 ** torch.arange(tokens.shape[1])).cumsum(1).roll(1, 1)
        before[:, 0] = 0
        rows, columns = mask.nonzero(as_tuple=True)
        return table[before[rows, columns] % 64]

    return predict


def test_autoregression_draws_word_after_word():
    """Its law is the product of the conditionals, which "parallel" scores exactly. No word ends a caption here."""
    predict, captions = causal_predictor(), torch.tensor(PAIRS_OF_WORDS)
    law = torch.zeros(8, dtype=torch.float64)
    for number, words in enumerate(PAIRS_OF_WORDS):
        tokens = torch.tensor([words])
        for i in range(3):
            one = torch.arange(3)[None] == i
            law[number] += predict(tokens, one)[0].double().log_softmax(0)[words[i]]
    scores = diffusion.log_likelihood(predict, captions, torch.ones(8, 3, dtype=torch.bool), "parallel")
    torch.testing.assert_close(scores, law, atol=1e-5, rtol=0)
    generator = torch.Generator().manual_seed(1)
    *_, (tokens, _) = diffusion.autoregress(predict, 20_000, 3, eos=2, temperature=1.0, generator=generator)
    check_law(tokens, law.exp())


def test_autoregression_stops_at_the_end():
    table = torch.tensor([[0.0, 9, 0], [0, 0, 9], [9.0, 0, 0]])

    def predict(tokens, mask):  # after 0 comes 1, after 1 the end, 2; the first words are 0 and 1
        rows, columns = mask.nonzero(as_tuple=True)
        before = torch.where(columns > 0, tokens[rows, columns - 1], torch.tensor([2, 0])[rows])
        return table[before]

    states = list(diffusion.autoregress(predict, 2, 6, eos=2))
    assert states[-1][0].tolist() == [[0, 1, 2, 2, 2, 2], [1, 2, 2, 2, 2, 2]] and len(states) == 4
    for number, (tokens, mask) in enumerate(states):
        assert mask.tolist() == [[i >= number for i in range(6)]] * 2
        assert torch.equal(tokens[~mask], states[-1][0][~mask]), "a written word changed"


# ---- likelihood
def exact_bound(predict, x):
    """Mean over l, then over all states with l masks, of (L/l) sum_masked log p."""
    L, states, total = len(x), all_masks(len(x)), 0.0
    for mask in states[states.any(1)]:
        masked = int(mask.sum())
        log_p = sum(float(at(predict, x[None], mask[None], i)[x[i]]) for i in mask.nonzero().flatten().tolist())
        total += log_p * L / masked / L / math.comb(L, masked)
    return total


def random_order_log_p(predict, x):
    """log of the mean over orders of the product of p(next word | words so far)."""
    p = 0.0
    for order in itertools.permutations(range(len(x))):
        mask, product = torch.ones(1, len(x), dtype=torch.bool), 1.0
        for i in order:
            product *= math.exp(at(predict, x[None], mask, i)[x[i]])
            mask = mask.index_fill(1, torch.tensor(i), False)
        p += product / math.factorial(len(x))
    return math.log(p)


def test_the_estimator_has_the_exact_bound_as_its_mean_and_jensen_holds():
    predict, V, T = predictor(3), 3, 3
    captions = torch.tensor(list(itertools.product(range(V), repeat=T)))
    valid, generator = torch.ones_like(captions, dtype=torch.bool), torch.Generator().manual_seed(0)
    draws = []
    for _ in range(400):
        noise = torch.rand(1, 4, T, generator=generator).expand(len(captions), -1, -1)
        u = torch.rand(1, generator=generator).expand(len(captions))
        draws.append(diffusion.log_likelihood(predict, captions, valid, "monte-carlo", noise, u))
    draws = torch.stack(draws)
    exact = torch.tensor([exact_bound(predict, x) for x in captions], dtype=torch.float64)
    error = draws.std(0) / 20
    assert ((draws.mean(0) - exact) / error).abs().max() < 4 and error.max() < 0.2 * exact.std()
    truth = torch.tensor([random_order_log_p(predict, x) for x in captions], dtype=torch.float64)
    assert truth.exp().sum().item() == pytest.approx(1)
    assert (exact <= truth + 1e-9).all() and (exact < truth - 1e-3).any()


@pytest.mark.parametrize("u", [0.0, 0.37, 0.999])
def test_as_many_draws_as_tokens_hit_every_number_of_masks_once(u):
    valid = torch.arange(9)[None] < 6
    masks, weights = diffusion.scoring_masks("monte-carlo", valid, torch.rand(1, 6, 12), torch.tensor([u]).double())
    masks, weights = masks[0], weights[0]
    count = masks.sum(1)
    assert masks.shape == (6, 9) and not masks[:, 6:].any() and sorted(count.tolist()) == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(weights * count, torch.ones(6), check_dtype=False)  # L / (l S) with S = L


def test_scores_do_not_depend_on_pads_or_other_captions():
    predict, lengths = predictor(3), (4, 2, 3)
    x = torch.tensor([[2, 0, 1, 0], [1, 1, 0, 2], [0, 2, 2, 1]])
    valid = torch.arange(4) < torch.tensor(lengths)[:, None]
    noise, u = torch.rand(3, 5, 4), torch.rand(3)

    def blind_to_pads(valid):
        return lambda tokens, mask: predict(tokens.masked_fill(~valid, -1), mask)  # -1 adds nothing to what is seen

    for rule in ("monte-carlo", "parallel", "leave-one-out"):
        together = diffusion.log_likelihood(blind_to_pads(valid), x, valid, rule, noise, u)
        for b, L in enumerate(lengths):
            part = valid[b : b + 1, :L]
            draw = noise[b : b + 1, :, :L], u[b : b + 1]
            alone = diffusion.log_likelihood(blind_to_pads(part), x[b : b + 1, :L], part, rule, *draw)
            assert together[b].item() == pytest.approx(alone.item(), abs=1e-6), rule


def consistent_predictor(V=3, T=3):
    """Conditionals of one joint law, so that the order of revealing does not matter."""
    joint = torch.rand(*[V] * T, generator=torch.Generator().manual_seed(5)).double()
    joint /= joint.sum()

    def predict(tokens, mask):
        rows = []
        for b, i in mask.nonzero().tolist():
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
    for rule, masks in (("parallel", torch.ones(4, 4) > 0), ("leave-one-out", torch.eye(4) > 0)):
        scores = diffusion.log_likelihood(predict, x, valid, rule)
        for b, L in enumerate((4, 2)):
            slow = 0.0
            for i in range(L):
                slow += float(at(predict, x[b : b + 1], masks[i][None] & valid[b : b + 1], i)[x[b, i]])
            assert float(scores[b]) == pytest.approx(slow, abs=1e-4), rule


def test_visual_gain_is_zero_for_equal_images_and_at_most_log_of_their_number():
    M = 9
    torch.testing.assert_close(diffusion.visual_gain(torch.full((4, M), -3.0)), torch.zeros(4))
    scores = torch.randn(1000, M, dtype=torch.float64) * 50
    gain = diffusion.visual_gain(scores)
    assert (gain <= math.log(M) + 1e-9).all() and (gain < 0).any() and (gain > 0).any()
    certain = torch.full((1, M), -1000.0).index_fill(1, torch.tensor(0), 0)
    assert diffusion.visual_gain(certain).item() == pytest.approx(math.log(M), abs=1e-6)
    slow = scores[:, 0] - scores.exp().mean(1).log()
    kept = slow.isfinite()
    torch.testing.assert_close(gain[kept], slow[kept])
    moved = diffusion.visual_gain(scores + torch.randn(1000, 1, dtype=torch.float64))
    torch.testing.assert_close(moved, gain)  # how likely a caption is with any image does not matter


def test_bad_arguments_are_refused():
    ones = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="order"):
        next(diffusion.denoise(None, ones, ones > 0, order="best"))
