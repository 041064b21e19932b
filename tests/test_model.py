"""model.py: what the decoder may see, and that the encoder is timm's."""

import math

import pytest
import torch
import torch.nn.functional as F
from bench import import_timm
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import diffusion
from model import SIZES, Captioner, Config, attend, flops
from sample import caption_images, score_captions


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Captioner(Config("tiny", 16, 50, 12, eos=49)).eval()
    torch.nn.init.normal_(model.decoder.head.weight)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([7, 3, 5])
    valid = torch.arange(8) < lengths[:, None]
    return {
        "images": torch.randint(256, (3, 16, 16, 3), dtype=torch.uint8, generator=generator),
        "tokens": torch.randint(50, (3, 8), generator=generator),
        "valid": valid,
        "mask": (torch.rand(3, 8, generator=generator) < 0.5) & valid,
    }


def test_pads_change_nothing(model, batch):
    logits = model(**batch)
    for row, length in enumerate(batch["valid"].sum(1)):
        alone = model(
            **{
                name: value[row : row + 1] if name == "images" else value[row : row + 1, :length]
                for name, value in batch.items()
            }
        )
        torch.testing.assert_close(logits[row, :length], alone[0], atol=1e-4, rtol=0)
    other = batch | {"tokens": torch.where(batch["valid"], batch["tokens"], 49 - batch["tokens"])}
    assert torch.equal(model(**other), logits)


def test_flat_positions_are_the_padded_ones(model, batch):
    where = batch["mask"].flatten().nonzero().squeeze(1)
    rows = batch["valid"].flatten().nonzero().squeeze(1)
    torch.testing.assert_close(model(**batch, rows=rows, where=where), model(**batch).flatten(0, 1)[where])


def test_captions_of_one_image_get_what_each_would_get_alone(model, batch):
    """An image read once for several captions: the same logits and gradients as with the image repeated."""
    captions = {name: batch[name].repeat_interleave(2, 0).roll(1, 0) for name in ("tokens", "valid", "mask")}
    gradients = []
    for images in (batch["images"], batch["images"].repeat_interleave(2, 0)):
        model.zero_grad()
        gradients.append([logits := model(images, **captions)])
        logits[captions["valid"]].log_softmax(-1)[:, 7].sum().backward()
        gradients[-1] += [p.grad for p in model.parameters() if p.grad is not None]
    for few, many in zip(*gradients, strict=True):
        torch.testing.assert_close(few, many, atol=1e-4, rtol=1e-4)


def test_the_mask_hides_its_token_and_nothing_else_does(model, batch):
    changed = batch | {"tokens": torch.where(batch["mask"], 49 - batch["tokens"], batch["tokens"])}
    assert torch.equal(model(**changed), model(**batch)), "a masked token leaks into the logits"
    shown = batch | {"mask": torch.zeros_like(batch["mask"])}
    assert not torch.allclose(model(**shown), model(**batch))
    assert model(**batch).shape[-1] == 50, "[MASK] has an output column"


@pytest.fixture(scope="module")
def causal():
    torch.manual_seed(0)
    model = Captioner(Config("tiny", 16, 50, 12, eos=49, objective="ar")).eval()
    torch.nn.init.normal_(model.decoder.head.weight)
    return model


def test_no_logit_of_the_causal_decoder_depends_on_its_own_token_or_a_later_one(causal, batch):
    def logits(tokens):
        inputs, mask = diffusion.shift_right(tokens)
        return causal(**batch | {"tokens": inputs, "mask": mask})

    for j in range(7):
        changed = batch["tokens"].index_fill(1, torch.tensor(j), 0)
        before, after = logits(batch["tokens"])[:1], logits(changed)[:1]
        assert torch.equal(before[:, : j + 1], after[:, : j + 1]), f"token {j} is seen too early"
        assert j == 6 or not torch.allclose(before[:, j + 1 : 7], after[:, j + 1 : 7]), f"token {j} is not seen"


def test_cached_left_to_right_decoding_is_the_uncached(causal, batch):
    kv = causal.decoder.read(causal.encode(batch["images"]))
    caches = [[] for _ in causal.decoder.blocks]
    for i in range(6):
        cached = causal.decoder.next_word(kv, batch["tokens"][:, i - 1], i, caches)
        inputs, mask = diffusion.shift_right(batch["tokens"][:, : i + 1])
        whole = causal.decoder(kv, inputs, mask, torch.ones_like(mask))[:, i]
        torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)
    words = [list(caption_images(causal, batch["images"], None))[-1][0] for _ in range(2)]
    assert torch.equal(*words)


def test_log_p_of_all_captions_sums_to_one_left_to_right():
    """Chain rule by enumeration: three words, of which word 2 ends a caption, at most three tokens."""
    torch.manual_seed(0)
    model = Captioner(Config("tiny", 16, 3, 3, eos=2, objective="ar")).eval()
    torch.nn.init.normal_(model.decoder.head.weight, std=0.3)
    features = model.encode(torch.randint(256, (1, 16, 16, 3), dtype=torch.uint8))
    ended = [[2]] + [[a, 2] for a in range(2)] + [[a, b, c] for a in range(2) for b in range(2) for c in range(3)]
    scores = score_captions(model, features.expand(len(ended), -1, -1), ended)
    assert scores.exp().sum().item() == pytest.approx(1, abs=1e-5) and scores.std() > 0.1


def test_score_does_not_depend_on_the_other_captions(model, causal):
    images = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    captions = [[1, 2, 3, 4, 5, 49], [7, 49]]
    for one in (model, causal):
        features = one.encode(images)
        for rule in ("monte-carlo", "parallel", "leave-one-out"):
            both = score_captions(one, features, captions, rule)
            alone = [score_captions(one, features[i : i + 1], captions[i : i + 1], rule) for i in range(2)]
            torch.testing.assert_close(both, torch.cat(alone), atol=1e-3, rtol=1e-4)


def test_captions_of_an_item_share_their_masks_and_those_of_others_do_not(model):
    """Two captions can be compared with few masks, and the noise of the masks averages out over items."""
    features = model.encode(torch.randint(256, (1, 16, 16, 3), dtype=torch.uint8)).expand(3, -1, -1)
    scores = score_captions(model, features, [[1, 2, 3, 4, 5, 49]] * 3, draws=2, items=[4, 4, 5])
    assert abs(scores[0] - scores[1]) < 1e-3 < 1e-2 < abs(scores[0] - scores[2])


def test_clip_scores_are_cosines(batch):
    model = Captioner(Config("tiny", 16, 50, 12, eos=49, objective="clip")).eval()
    features = model.encode(batch["images"])
    image, text = model.match(features, batch["tokens"], batch["valid"])
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(image.norm(dim=1), torch.full((3,), 1 / 0.07))
    captions = [batch["tokens"][i, : batch["valid"][i].sum()].tolist() for i in range(3)]
    torch.testing.assert_close(score_captions(model, features, captions).float(), (image * text).sum(1) * 0.07)


def test_image_read_once_is_the_image_read_every_time(model, batch):
    kv = model.decoder.read(model.encode(batch["images"]))
    for _ in range(2):
        assert torch.equal(model.decoder(kv, batch["tokens"], batch["mask"], batch["valid"]), model(**batch))
    assert not torch.allclose(model(**batch | {"images": batch["images"].flip(0)}), model(**batch)), (
        "the image does not matter"
    )


def test_attention_by_hand_is_attention():
    q, k, v = torch.randn(3, 2, 5, 16).unbind(0)
    bias = torch.zeros(2, 1, 1, 5).masked_fill(torch.tensor([False, False, True, False, True]), -torch.inf)
    heads = [x.view(2, 5, 2, 8).transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads, bias).transpose(1, 2).reshape(2, 5, 16)
    torch.testing.assert_close(attend(q, k, v, 2, bias), expected)


def test_first_loss_is_log_vocabulary(batch):
    model = Captioner(Config("tiny", 16, 50, 12, eos=49))
    where = batch["mask"].flatten().nonzero().squeeze(1)
    loss = diffusion.cross_entropy(model(**batch, where=where), batch["tokens"].flatten()[where])
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(50)))


def test_losses_without_float32_logits_are_cross_entropy(model, batch):
    """Losses and gradients of the head that forgets its logits, against logits and F.cross_entropy in float32."""
    where, gradients = batch["mask"].flatten().nonzero().squeeze(1), []
    targets, weight = batch["tokens"].flatten()[where], torch.rand(len(where))
    for kept in (True, False):
        if kept:
            losses = diffusion.cross_entropy(model(**batch, where=where), targets)
        else:
            torch.testing.assert_close(model(**batch, where=where, targets=targets), losses)
            losses = model(**batch, where=where, targets=targets)
        model.zero_grad()
        (losses * weight).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        losses = diffusion.cross_entropy(model(**batch, where=where), targets)
        rounded = model(**batch, where=where, targets=targets)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, losses, atol=0.2, rtol=0.01)       # logits of about 20, 8 bits each


def test_the_head_works_through_many_rows_a_few_at_a_time():
    K, D, V = 10, 3, 300_000  # 2^20 / V: four rows at a time
    x, weight, bias = torch.randn(K, D), torch.randn(V, D), torch.randn(V)
    targets, slope, found = torch.randint(V, (K,)), torch.rand(K), []
    for head in (
        lambda x, weight, bias: diffusion.LinearCrossEntropy.apply(x, weight, bias, targets),
        lambda x, weight, bias: diffusion.cross_entropy(x @ weight.T + bias, targets),
    ):
        inputs = [value.clone().requires_grad_() for value in (x, weight, bias)]
        losses = head(*inputs)
        (losses * slope).sum().backward()
        found.append([losses.detach(), *(value.grad for value in inputs)])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)  # sums of 300,000 terms


def test_blocks_compile_into_three_graphs_whatever_the_lengths():
    """One for all blocks of the encoder, one for those of the decoder at its first lengths, one for all others."""
    torch._dynamo.reset()
    counter, B = CompileCounter(), 4
    model = Captioner(Config("S/16", 16, 50, 32, eos=49))
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        block.compile(backend=counter)
    for longest in (5, 12, 20, 32, 5, 26, 12):
        T = -(-longest // 8) * 8
        valid = torch.arange(T) < torch.tensor([longest, 2, longest - 1, longest // 2])[:, None]
        images, tokens = torch.zeros(B, 16, 16, 3, dtype=torch.uint8), torch.zeros(B, T, dtype=torch.long)
        where = valid.flatten().nonzero().squeeze(1)
        model(images, tokens, valid, valid, where, where, tokens.flatten()[where]).sum().backward()
    assert counter.frame_count == 3
    torch._dynamo.reset()


def test_a_batch_without_masked_words_trains_nothing_but_breaks_nothing(batch):
    model = Captioner(Config("tiny", 16, 50, 12, eos=49))
    none = torch.zeros(0, dtype=torch.long)
    model(**batch | {"mask": torch.zeros_like(batch["mask"])}, where=none, targets=none).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    with torch.device("meta"):
        model = Captioner(Config(size, 224, 1000, 64))
    assert len(model.decoder.blocks) * 2 == len(model.encoder.blocks)


@pytest.mark.parametrize(("size", "objective"), [("tiny", "mdc"), ("B/32", "mdc"), ("tiny", "clip")])
def test_operations_are_those_that_are_counted(size, objective):
    """Of a forward pass without pads and with all logits, but for what flops neglects: attention among T words, and
    CLIP's two projections of an image and a text."""
    B, T, config = 2, 3, Config(size, 64, 50, 12, eos=49, objective=objective)
    model, ones = Captioner(config), torch.ones(B, T, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(B, 64, 64, 3, dtype=torch.uint8), torch.zeros(B, T, dtype=torch.long), ones, ones)
    among_words = 4 * B * T * T * SIZES[size][0] * len(model.decoder.blocks)
    projections = 4 * B * SIZES[size][0] ** 2 if objective == "clip" else 0
    predicted = 0 if objective == "clip" else B * T
    assert 3 * (counter.get_total_flops() - among_words - projections) == flops(config, B, B * T, predicted)


def test_timm_takes_the_encoder():
    try:
        timm = import_timm()
    except ImportError as problem:
        pytest.skip(f"no timm here ({problem}); pip install --no-deps timm")
    torch.manual_seed(0)
    ours = Captioner(Config("B/16", 224, 100, 16)).encoder.eval()
    theirs = timm.create_model(
        "vit_base_patch16_224", class_token=False, global_pool="avg", fc_norm=False, num_classes=0
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.forward_features(images), atol=1e-4, rtol=0)
        torch.testing.assert_close(ours(images).mean(1), theirs(images), atol=1e-4, rtol=0)
