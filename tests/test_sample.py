"""sample.py: published caption metrics, prompts as written, every sampler, and what the page says of the model."""

import base64
import contextlib
import io
import json
import random
from dataclasses import asdict
from unittest import mock

import numpy as np
import pytest
import torch

import data
import sample
from data import UserError
from model import Captioner, Config

WORDS = "a the dog cat runs sits on in red big grass , near".split()


def corpus(n, seed):
    rng = random.Random(seed)

    def caption(least):
        return [rng.choice(WORDS) for _ in range(rng.randint(least, 12))]

    made = [caption(0 if i == 0 else 1) for i in range(n)]
    return made, [[caption(1) for _ in range(rng.randint(1, 5))] for _ in range(n)]


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_pycocoevalcaps(seed):
    bleu, cider, rouge = (
        pytest.importorskip(f"pycocoevalcap.{name}") for name in ("bleu.bleu", "cider.cider", "rouge.rouge")
    )
    made, given = corpus(30, seed)
    made[3] = list(given[3][0])
    hypotheses = {i: [" ".join(words)] for i, words in enumerate(made)}
    references = {i: [" ".join(words) for words in many] for i, many in enumerate(given)}
    expected = bleu.Bleu(4).compute_score(references, hypotheses, verbose=0)[0]
    assert sample.bleu(made, given) == pytest.approx(expected, abs=1e-6)
    expected = cider.Cider().compute_score(references, hypotheses)[0]
    assert sample.cider_d(made, given) == pytest.approx(expected, abs=1e-6)
    expected = rouge.Rouge().compute_score(references, hypotheses)[0]
    assert sum(map(sample.rouge_l, made, given)) / 30 == pytest.approx(expected, abs=1e-6)


def test_published_scores_of_nlg_eval(photographs, tmp_path, script):
    example = json.loads((photographs / "caption-metrics" / "nlg-eval-example.json").read_text())
    for name, values in (("made", example["hypotheses"]), ("given", example["references"])):
        (tmp_path / name).write_text(json.dumps({str(i): value for i, value in enumerate(values)}))
    said = script("sample.py", "--score-files", tmp_path / "made", tmp_path / "given").stdout.splitlines()
    count = len(example["hypotheses"])
    assert said[0] == f"{count:,} captions made, references given for {count:,} images"
    said = said[1].split()
    ours = dict(zip(said[::2], map(float, said[1::2]), strict=True))
    for name, theirs in (("BLEU-1", "Bleu_1"), ("BLEU-4", "Bleu_4"), ("ROUGE-L", "ROUGE_L"), ("CIDEr-D", "CIDEr")):
        assert ours[name] == pytest.approx(example["scores"][theirs], abs=1e-4)
    for wrong in ({}, {str(i): "a text, not a list" for i in range(len(example["hypotheses"]))}):
        (tmp_path / "given").write_text(json.dumps(wrong))
        said = script("sample.py", "--score-files", tmp_path / "made", tmp_path / "given", expect=2).stderr
        assert "every image of the first" in said


def test_prompts_keep_their_words():
    spec = data.words_tokenizer("words:9", data.Counter({" dog": 5, " on": 4, "grass": 3}))
    tokenizer = data.load_tokenizer(spec)
    tokens, mask = sample.read_prompt("a ___ dog on ___", tokenizer, 16)
    assert mask.tolist() == [False, True, False, False, True, False] and tokens[-1] == tokenizer.eot_token
    assert tokenizer.decode(tokens[[0, 2, 3]].tolist()) == "a dog on"
    for wrong in ("no blank", "___ " * 20):
        with pytest.raises(UserError, match="blanks"):
            sample.read_prompt(wrong, tokenizer, 16)


def make_model(objective="mdc", **options):
    """A model of random weights, and its tokenizer."""
    torch.manual_seed(0)
    spec = data.words_tokenizer("words:9", data.Counter({" dog": 5, " on": 4, " red": 3}))
    tokenizer = data.load_tokenizer(spec)
    model = Captioner(
        Config("tiny", 32, tokenizer.n_vocab, 16, tokenizer.eot_token, objective=objective, **options)
    ).eval()
    if objective != "clip":
        torch.nn.init.normal_(model.decoder.head.weight, std=0.3)
    return model, tokenizer, spec


def look_at(model, tokenizer, budget=1 << 20, **options):
    """The notes of a caption of five tokens: tokens, rows [P,13], maps [layers,P,side,side]."""
    states = sample.caption_images(model, torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.tensor([5]), **options)
    kept, note = sample.watch(model, tokenizer, states, budget)
    rows = np.frombuffer(base64.b64decode(note["rows"]), np.int16).reshape(-1, 13)
    maps = np.frombuffer(base64.b64decode(note["maps"]), np.uint8).reshape(-1, len(rows), note["side"], note["side"])
    return kept, note, rows, maps


@pytest.mark.parametrize("objective", ["mdc", "ar"])
def test_the_page_says_where_the_model_looks_and_what_it_thinks(objective):
    model, tokenizer, _ = make_model(objective)
    keys = torch.zeros(2, 1, 16, 128)
    for number, block in enumerate(model.decoder.blocks):  # layer k looks at patch 3 + k whatever it reads
        keys[number, :, 3 + number] = 100.0
        torch.nn.init.zeros_(block.cross.q.weight)
        torch.nn.init.ones_(block.cross.q.bias)
    model.decoder.read = lambda features: [(key, torch.zeros_like(key)) for key in keys]
    kept, note, rows, maps = look_at(model, tokenizer)
    plain = list(sample.caption_images(model, torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.tensor([5])))
    assert all(torch.equal(a, b) for one, two in zip(kept, plain, strict=True) for a, b in zip(one, two, strict=True))
    assert not any(len(module._forward_hooks) for module in model.modules()), "the model is left as it was"
    for layer, patches in enumerate(([3, 4], [3], [4])):
        expected = np.zeros(16)
        expected[patches] = 255
        assert (maps[layer].reshape(-1, 16) == expected).all(), "mean of layers, then each"
    steps = len(kept) - 1
    asked = [(s, i) for s in range(steps) for i in ([s] if objective == "ar" else kept[s][1][0].nonzero().flatten())]
    assert [tuple(row[:2]) for row in rows] == asked
    words = np.array([tokenizer.eot_token if text is None else -1 for text in note["words"]])
    for row in rows:
        (tokens, mask), i = kept[row[0] + 1], row[1]
        if not mask[0, i]:  # greedy: the word written is the likeliest
            assert row[2] == note["tokens"][i] and row[7] == row[8] == max(row[8:])
            assert (words[row[2]] == tokenizer.eot_token) == (tokens[0, i] == tokenizer.eot_token)
        assert (np.diff(row[8:]) <= 0).all() and 0 < row[8:].sum() <= 1002


def test_probabilities_on_the_page_are_the_models():
    model, tokenizer, _ = make_model()
    kept, note, rows, _ = look_at(model, tokenizer, temperature=1.0, generator=torch.Generator().manual_seed(0))
    kv = model.decoder.read(model.encode(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)))
    for s in range(note["steps"]):
        tokens, mask = kept[s]
        with torch.no_grad():
            chance = model.decoder(kv, tokens, mask, torch.ones_like(mask))[0].softmax(-1)
        for row in rows[rows[:, 0] == s]:
            best = chance[row[1]].topk(5)
            np.testing.assert_allclose(row[8:] / 1000, best.values.numpy(), atol=6e-4)
            texts = [
                None if word == tokenizer.eot_token else tokenizer.decode([word]) for word in best.indices.tolist()
            ]
            assert [note["words"][word] for word in row[2:7]] == texts
            if not kept[s + 1][1][0, row[1]]:
                assert row[7] / 1000 == pytest.approx(float(chance[row[1], kept[s + 1][0][0, row[1]]]), abs=6e-4)


def test_a_page_that_would_be_too_large_keeps_the_mean_of_layers():
    model, tokenizer, _ = make_model()
    whole, mean, coarse = (look_at(model, tokenizer, budget)[3] for budget in (15 * 3 * 16, 15 * 16, 15 * 4))
    assert whole.shape == (3, 15, 4, 4) and mean.shape == (1, 15, 4, 4) and coarse.shape == (1, 15, 2, 2)
    assert (whole[0] == mean[0]).all() and (coarse.reshape(15, 4).max(1) == 255).all()


def test_captions_end_where_they_should():
    """A caption shorter than others of its batch is the one it is alone: what follows its end is EOS."""
    for pads in ("hidden", "eos"):
        model, tokenizer, _ = make_model(pads=pads)
        images = torch.randint(256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(1)).byte()
        lengths = torch.tensor([2, 7, 5])
        together = sample.captions_of(model, images, lengths, tokenizer)
        alone = [sample.captions_of(model, images[i : i + 1], lengths[i : i + 1], tokenizer)[0] for i in range(3)]
        assert together == alone
        *_, (tokens, mask) = sample.caption_images(model, images, lengths)
        shown = [sample.show(tokenizer, *row) for row in zip(tokens, mask, strict=True)]
        assert shown == together and not mask.any()


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """call(objective, words...) -> the lines that sample.py prints about two drawings."""
    folder = tmp_path_factory.mktemp("sample")
    for seed in range(2):
        data.draw_shapes(seed, 32)[0].save(folder / f"{seed}.png")

    def run(objective, *words):
        model, _, spec = make_model(objective)
        torch.save(
            {
                "model": model.state_dict(),
                "config": asdict(model.config),
                "options": {"ratios": (0.5, 1.0)},
                "lengths": {5: 3, 7: 1},
                "tokenizer": spec,
            },
            folder / "ckpt.pt",
        )
        command = ["sample.py", "--ckpt", folder / "ckpt.pt", folder, *words]
        with mock.patch("sys.argv", [*map(str, command)]), contextlib.redirect_stdout(io.StringIO()) as said:
            sample.main()
        return [line.partition("\t")[2] for line in said.getvalue().splitlines() if "\t" in line] or said.getvalue()

    return run


def test_every_sampler_from_the_command_line(call):
    def blanks(*words):
        return [line.count("_") for line in call("mdc", "--trace", "--count", 1, *words)]

    assert blanks() == blanks("--order", "random") == [5, 4, 3, 2, 1, 0], "the median of the training captions"
    assert blanks("--steps", 2, "--length", 8) == [8, 4, 0]
    falling = blanks("--order", "ancestral", "--steps", 3, "--length", 12)
    assert len(falling) == 4 and falling[0] == 12 and falling[-1] == 0 and falling == sorted(falling)[::-1]
    left_to_right = call("mdc", "--trace", "--count", 1, "--order", "left-to-right")
    assert not any("_" in line.rstrip(" _") for line in left_to_right), "masks are at the end only"
    assert call("mdc", "--length", "draw", "--temperature", 1) == call("mdc", "--length", "draw", "--temperature", 1)
    assert call("mdc", "--temperature", 1, "--seed", 1) != call("mdc", "--temperature", 1, "--seed", 2)
    assert all(text.startswith("a") and " on" in text for text in call("mdc", "--prompt", "a ___ on ___"))
    lines = call("ar", "--trace", "--count", 1)
    assert not any("_" in line for line in lines) and lines[0] == " 0  ", "what is not written yet has no place yet"


@pytest.mark.parametrize(
    "objective, columns",
    [
        ("mdc", "bound|a token|gain|+ length|trained t|parallel|leave 1 out"),
        ("ar", "log p|a token|gain"),
        ("clip", "cosine"),
    ],
)
def test_scores_have_all_columns(call, objective, columns):
    said = call(objective, "--score", "a dog", "a red dog on", "--draws", 3)
    heads = [line.split("  ") for line in said.splitlines() if line.endswith("   caption")]
    assert [[name.strip() for name in head if name] for head in heads] == [[*columns.split("|"), "caption"]] * 2


def test_an_image_to_score_that_is_not_there_is_no_caption(call):
    with pytest.raises(UserError, match="nowhere.jpg: no such file"):
        call("mdc", "--score", "a dog", "nowhere.jpg")
