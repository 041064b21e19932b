"""model.py: what the decoder may see, and that the encoder is timm's."""

import ast
import math

import pytest
import torch
import torch.nn.functional as F
from bench import import_timm
from conftest import ROOT
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import diffusion
from model import SIZES, Config, attend, build_model, flops, sincos
from sample import caption_images, score_captions


def make_model(objective="mdc", vocab_size=50, max_tokens=12, std=1.0):
    """A tiny model whose head has random weights, for at the start all its logits are zero."""
    torch.manual_seed(0)
    model = build_model(Config("tiny", 16, vocab_size, max_tokens, vocab_size - 1, objective)).eval()
    if objective != "clip":
        torch.nn.init.normal_(model.decoder.head.weight, std=std)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def causal():
    return make_model("ar")


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


def flat(mask):
    """The flat positions of a mask, as training finds them on the CPU."""
    return mask.flatten().nonzero().squeeze(1)


# ---- what the decoder sees
@pytest.mark.parametrize("objective", ["mdc", "ar"])
def test_pads_change_nothing_and_logits_come_in_row_major_order(objective, batch, request):
    model = request.getfixturevalue("model" if objective == "mdc" else "causal")
    logits = model(**batch)
    assert logits.shape == (batch["mask"].sum(), 50)
    alone = []
    for row, length in enumerate(batch["valid"].sum(1)):
        caption = {name: batch[name][row : row + 1, :length] for name in ("tokens", "mask", "valid")}
        alone.append(model(batch["images"][row : row + 1], **caption))
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-4, rtol=0)
    other = batch | {"tokens": torch.where(batch["valid"], batch["tokens"], 49 - batch["tokens"])}
    assert torch.equal(model(**other), logits)


@pytest.mark.parametrize("objective", ["mdc", "ar"])
def test_positions_that_are_passed_are_those_that_are_found(objective, batch, request):
    model = request.getfixturevalue("model" if objective == "mdc" else "causal")
    assert torch.equal(model(**batch, where=flat(batch["mask"])), model(**batch))


def test_the_mask_hides_its_token_and_nothing_else_does(model, batch):
    """The mask alone hides: a masked token has no influence, and what is not masked is seen, whatever its id."""
    mask = batch["mask"]
    changed = batch | {"tokens": torch.where(mask, 49 - batch["tokens"], batch["tokens"])}
    assert torch.equal(model(**changed), model(**batch)), "a masked token leaks into the logits"

    rows, columns = (batch["valid"] & ~mask).nonzero(as_tuple=True)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        seen = batch["tokens"].clone()
        seen[row, column] = 49 - seen[row, column]
        before, after = model(**batch), model(**batch | {"tokens": seen})
        own = mask.nonzero()[:, 0] == row
        assert not own.any() or not torch.allclose(before[own], after[own]), "a token that is shown is not seen"
        assert torch.equal(before[~own], after[~own]), "a caption sees another one"


def test_the_mask_token_is_an_input_and_never_predicted(model, batch):
    assert model.decoder.mask_id == 50 and model.decoder.embed.num_embeddings == 51
    assert model.decoder.head.out_features == 64, "columns are added for speed"
    assert model(**batch).shape[-1] == 50, "and cut off again; [MASK] has no output column"
    states = list(caption_images(model, batch["images"], 7, temperature=50.0))
    assert states[-1][0].max() < 50 and not states[-1][1].any()
    with torch.no_grad():
        before = model(**batch)
        kept = model.decoder.embed.weight[50].clone()
        model.decoder.embed.weight[50] += 1
        assert not torch.allclose(model(**batch), before), "a masked position is not fed the embedding of [MASK]"
        model.decoder.embed.weight[50] = kept


def test_no_logit_of_the_causal_decoder_depends_on_its_own_token_or_a_later_one(causal, batch):
    everything = batch | {"mask": torch.ones_like(batch["mask"]), "valid": torch.ones_like(batch["valid"])}
    before = causal(**everything).view(3, 8, 50)
    for j in range(8):
        changed = everything["tokens"].index_fill(1, torch.tensor(j), 0)
        after = causal(**everything | {"tokens": changed}).view(3, 8, 50)
        assert torch.equal(before[:, : j + 1], after[:, : j + 1]), f"token {j} is seen too early"
        for i in range(j + 1, 8):
            assert not torch.allclose(before[0, i], after[0, i]), f"position {i} does not see token {j}"


def test_the_mask_only_chooses_among_the_logits_of_the_causal_decoder(causal, batch):
    everything = causal(**batch | {"mask": batch["valid"]})
    torch.testing.assert_close(causal(**batch), everything[batch["mask"][batch["valid"]]], atol=1e-5, rtol=1e-5)


def test_image_read_once_is_the_image_read_every_time(model, causal, batch):
    for one in (model, causal):
        memory = one.decoder.read(one.encode(batch["images"]))
        for _ in range(2):
            assert torch.equal(one.decoder(memory, batch["tokens"], batch["mask"], batch["valid"]), one(**batch))
        other = one(**batch | {"images": batch["images"].flip(0)})
        assert not torch.allclose(other, one(**batch)), "the image does not matter"


def test_attention_by_hand_is_attention():
    q, k, v = torch.randn(3, 2, 5, 16).unbind(0)
    causal = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, -torch.inf)
    pads = torch.zeros(2, 1, 1, 5).masked_fill(torch.tensor([False, False, True, False, True]), -torch.inf)
    heads = [x.view(2, 5, 2, 8).transpose(1, 2) for x in (q, k, v)]
    for bias in (None, causal, pads):
        expected = F.scaled_dot_product_attention(*heads, bias).transpose(1, 2).reshape(2, 5, 16)
        torch.testing.assert_close(attend(q, k, v, 2, bias), expected)


def test_products_of_positions_depend_on_their_distance_only():
    table = sincos(torch.arange(12), 32)
    products = table @ table.T
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], atol=1e-4, rtol=0)
    assert (products[0, 1:] < products[0, 0] - 0.5).all(), "neighbours look alike"


# ---- likelihoods
def test_log_p_of_all_captions_sums_to_one_left_to_right():
    """Chain rule by enumeration: three words, of which word 2 ends a caption, at most three tokens."""
    model = make_model("ar", vocab_size=3, max_tokens=3, std=0.3)
    features = model.encode(torch.randint(256, (1, 16, 16, 3), dtype=torch.uint8))
    ended = [[2]]
    ended += [[a, 2] for a in range(2)]
    ended += [[a, b, c] for a in range(2) for b in range(2) for c in range(3)]
    scores = score_captions(model, features.expand(len(ended), -1, -1), ended)
    assert scores.exp().sum().item() == pytest.approx(1, abs=1e-5) and scores.std() > 0.1


def test_left_to_right_captions_are_made_of_the_likeliest_words(causal, batch):
    """Word after word is the best one of the logits that training sees, up to the end of the caption."""
    *_, (words, mask) = caption_images(causal, batch["images"], None)
    everything = torch.ones_like(words, dtype=torch.bool)
    best = causal(batch["images"], words, everything, everything).view(*words.shape, 50).argmax(-1)
    ended = (words == 49).cumsum(1) - (words == 49).long() > 0
    assert torch.equal(words[~ended & ~mask], best[~ended & ~mask]) and (words[ended] == 49).all()
    assert (~ended & ~mask).sum() > 6, "too few words to tell"


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


# ---- CLIP
def test_contrastive_models_compare_unit_vectors(batch):
    model = make_model("clip")
    features = model.encode(batch["images"])
    image, text = model(batch["images"], batch["tokens"], batch["valid"])
    torch.testing.assert_close(image, model.embed_images(features))
    torch.testing.assert_close(text, model.embed_texts(batch["tokens"], batch["valid"]))
    torch.testing.assert_close(torch.stack([image, text]).norm(dim=2), torch.ones(2, 3))
    assert model.log_scale.exp().item() == pytest.approx(1 / 0.07)
    captions = [batch["tokens"][i, : batch["valid"][i].sum()].tolist() for i in range(3)]
    torch.testing.assert_close(score_captions(model, features, captions).float(), (image * text).sum(1))


def test_pads_change_no_embedding_of_a_text(batch):
    model = make_model("clip")
    texts = model.embed_texts(batch["tokens"], batch["valid"])
    other = torch.where(batch["valid"], batch["tokens"], 49 - batch["tokens"])
    assert torch.equal(model.embed_texts(other, batch["valid"]), texts)
    for row, length in enumerate(batch["valid"].sum(1)):
        part = [batch[name][row : row + 1, :length] for name in ("tokens", "valid")]
        torch.testing.assert_close(model.embed_texts(*part)[0], texts[row], atol=1e-5, rtol=0)


# ---- training
def test_first_loss_is_log_vocabulary(batch):
    model = build_model(Config("tiny", 16, 50, 12, eos=49))
    loss = diffusion.cross_entropy(model(**batch), batch["tokens"][batch["mask"]])
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(50)))


def test_a_batch_without_masked_words_trains_nothing_but_breaks_nothing(batch):
    model = build_model(Config("tiny", 16, 50, 12, eos=49))
    none = torch.zeros_like(batch["mask"])
    images, tokens, valid = batch["images"], batch["tokens"], batch["valid"]
    loss = diffusion.mdc_loss(model, images, tokens, none, valid, flat(none), torch.full((3,), 0.5))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_blocks_compile_into_three_graphs_whatever_the_lengths():
    """One for all blocks of the encoder, one for those of the decoder at its first lengths, one for all others."""
    torch._dynamo.reset()
    counter, B = CompileCounter(), 4
    model = build_model(Config("S/16", 16, 50, 32, eos=49))
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        block.compile(backend=counter)
    for longest in (5, 12, 20, 32, 5, 26, 12):
        T = math.ceil(longest / 8) * 8
        valid = torch.arange(T) < torch.tensor([longest, 2, longest - 1, longest // 2])[:, None]
        images, tokens = torch.zeros(B, 16, 16, 3, dtype=torch.uint8), torch.zeros(B, T, dtype=torch.long)
        diffusion.mdc_loss(model, images, tokens, valid, valid, flat(valid), torch.ones(B)).backward()
    assert counter.frame_count == 3
    torch._dynamo.reset()


# ---- sizes
@pytest.mark.parametrize("objective", ["mdc", "clip"])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, objective):
    with torch.device("meta"):
        model = build_model(Config(size, 224, 1000, 64, objective=objective))
    text = model.decoder if objective == "mdc" else model.text
    assert len(text.blocks) * 2 == len(model.encoder.blocks) == SIZES[size].depth


def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match="20.*patch size of tiny, 8"):
        build_model(Config("tiny", 20, 50, 12))


@pytest.mark.parametrize(("size", "objective"), [("tiny", "mdc"), ("B/32", "mdc"), ("tiny", "clip")])
def test_operations_are_those_that_are_counted(size, objective):
    """Of a forward pass without pads and with all logits, but for what flops neglects: attention among T words, and
    CLIP's two projections of an image and a text."""
    B, T, D = 2, 3, SIZES[size].width
    config = Config(size, 64, 64, 12, eos=49, objective=objective)
    model, ones = build_model(config), torch.ones(B, T, dtype=torch.bool)
    inputs = [torch.zeros(B, 64, 64, 3, dtype=torch.uint8), torch.zeros(B, T, dtype=torch.long), ones]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs) if objective == "clip" else model(*inputs, ones)
    among_words = 4 * B * T * T * D * SIZES[size].decoder_depth
    projections = 4 * B * D**2 if objective == "clip" else 0
    predicted = 0 if objective == "clip" else B * T
    assert 3 * (counter.get_total_flops() - among_words - projections) == flops(config, B, B * T, predicted)


def test_timm_takes_the_encoder():
    try:
        timm = import_timm()
    except ImportError as problem:
        pytest.skip(f"no timm here ({problem}); pip install --no-deps timm")
    torch.manual_seed(0)
    ours = build_model(Config("B/16", 224, 100, 16)).encoder.eval()
    theirs = timm.create_model(
        "vit_base_patch16_224", class_token=False, global_pool="avg", fc_norm=False, num_classes=0
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.forward_features(images), atol=1e-4, rtol=0)
        torch.testing.assert_close(ours(images).mean(1), theirs(images), atol=1e-4, rtol=0)


# ---- the six scripts
SCRIPTS = ("model", "diffusion", "data", "sample", "train", "probe")


def imports_of(source):
    """Names of the modules that a program imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("number", range(len(SCRIPTS)), ids=SCRIPTS)
def test_a_script_imports_earlier_ones_only(number):
    """Each can be read by those who have read the ones before it."""
    source = (ROOT / f"{SCRIPTS[number]}.py").read_text()
    ours = imports_of(source) & set(SCRIPTS)
    assert ours <= set(SCRIPTS[:number]), f"{SCRIPTS[number]}.py imports {ours - set(SCRIPTS[:number])}"


def test_imports_are_found_wherever_they_stand():
    assert imports_of("import a.b, c\ndef f():\n    from train import g") == {"a", "c", "train"}
