"""sample.py: published caption metrics, prompts, samplers, scores, records of the page, unreadable images."""

import base64
import contextlib
import io
import json
import random
import shutil
from dataclasses import asdict
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from data import UserError
from model import Config, build_model

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


def test_words_are_not_cut_at_vowel_signs():
    assert sample.split_words("बिल्ली चटाई पर॥ A man's_hat (2)! 你好？") == ["बिल्ली", "चटाई", "पर", "a", "man", "s_hat", "2", "你好"]


def test_published_scores_of_nlg_eval(photographs, capsys):
    example = json.loads((photographs / "caption-metrics" / "nlg-eval-example.json").read_text())
    sample.print_metrics(example["hypotheses"], example["references"])
    said = capsys.readouterr().out.splitlines()[-1].split()
    ours = dict(zip(said[::2], map(float, said[1::2]), strict=True))
    for name, theirs in (("BLEU-1", "Bleu_1"), ("BLEU-4", "Bleu_4"), ("ROUGE-L", "ROUGE_L"), ("CIDEr-D", "CIDEr")):
        assert ours[name] == pytest.approx(example["scores"][theirs], abs=1e-4)


def test_prompts_keep_their_words():
    spec = data.words_tokenizer("words:9", data.Counter({" dog": 5, " on": 4, "grass": 3}))
    tokenizer = data.load_tokenizer(spec)
    tokens = sample.read_prompt("a ___ dog on ___", tokenizer, 16)
    assert tokens[[1, 4, 5]].tolist() == [-1, -1, tokenizer.eot_token] and len(tokens) == 6
    assert tokenizer.decode(tokens[[0, 2, 3]].tolist()) == "a dog on"
    assert torch.equal(sample.read_prompt(" a  ___\tdog on ___\n", tokenizer, 16), tokens)  # as captions are cleaned
    for wrong in ("no blank", "___ " * 20):
        with pytest.raises(UserError, match="blanks"):
            sample.read_prompt(wrong, tokenizer, 16)


def make_model(objective="mdc"):
    """A model of random weights, its tokenizer and the tokenizer's specification."""
    torch.manual_seed(0)
    spec = data.words_tokenizer("words:9", data.Counter({" dog": 5, " on": 4, " red": 3}))
    tokenizer = data.load_tokenizer(spec)
    model = build_model(Config("tiny", 32, tokenizer.n_vocab, 16, tokenizer.eot_token, objective)).eval()
    if objective != "clip":
        torch.nn.init.normal_(model.decoder.head.weight, std=0.3)
    return model, tokenizer, spec


BLANK = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)


def look_at(model, tokenizer, **options):
    """States and record of a caption of five tokens, and the maps of each step [K,side,side]."""
    states = sample.caption_images(model, BLANK, 5, **options)
    kept, record = sample.watch(model, tokenizer, states)
    side = record["side"]
    maps = [np.frombuffer(base64.b64decode(step["maps"]), np.uint8).reshape(-1, side, side) for step in record["steps"]]
    return kept, json.loads(json.dumps(record)), maps


@pytest.mark.parametrize("objective", ["mdc", "ar"])
def test_the_record_says_where_the_model_looks_and_what_it_predicts(objective):
    model, tokenizer, _ = make_model(objective)
    keys = torch.zeros(2, 1, 16, 128)
    for number, block in enumerate(model.decoder.blocks):  # layer k looks at patch 3 + k whatever it reads
        keys[number, :, 3 + number] = 100.0
        torch.nn.init.zeros_(block.cross.q.weight)
        torch.nn.init.ones_(block.cross.q.bias)
    model.decoder.read = lambda features: [(key, torch.zeros_like(key)) for key in keys]
    kept, record, maps = look_at(model, tokenizer)
    plain = list(sample.caption_images(model, BLANK, 5))
    assert all(torch.equal(a, b) for one, two in zip(kept, plain, strict=True) for a, b in zip(one, two, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    expected = np.zeros(16)
    expected[[3, 4]] = 255  # the mean of the layers
    words = {int(word): text for word, text in record["words"].items()}
    assert record["causal"] == (objective == "ar") and len(record["steps"]) == len(kept) - 1
    for s, step in enumerate(record["steps"]):
        (before, after), tokens = (kept[s][1][0], kept[s + 1][1][0]), kept[s + 1][0][0]
        assert step["asked"] == ([s] if objective == "ar" else before.nonzero().flatten().tolist())
        later = [position for other in record["steps"][s + 1 :] for position in other["asked"]]
        written = [position for position in step["asked"] if position not in later]
        assert written == (before & ~after).nonzero().flatten().tolist()
        assert len(maps[s]) == len(step["asked"]) and (maps[s].reshape(-1, 16) == expected).all()
        for position, likely, chances in zip(step["asked"], step["likely"], step["chances"], strict=True):
            assert (np.diff(chances) <= 0).all() and 0 < sum(chances) <= 102
            assert all((words[word] is None) == (word == tokenizer.eot_token) for word in likely)
            if position in written:  # greedy: the word written is the likeliest
                assert likely[0] == tokens[position] == record["tokens"][position]


def test_probabilities_in_the_record_are_the_models():
    model, tokenizer, _ = make_model()
    kept, record, _ = look_at(model, tokenizer, temperature=1.0, generator=torch.Generator().manual_seed(0))
    memory = model.decoder.read(model.encode(BLANK))
    for (tokens, mask), step in zip(kept, record["steps"], strict=False):
        with torch.no_grad():
            best = model.decoder(memory, tokens, mask, torch.ones_like(mask)).softmax(-1).topk(5)
        assert step["likely"] == best.indices.tolist() and step["asked"] == mask[0].nonzero().flatten().tolist()
        np.testing.assert_allclose(np.array(step["chances"]) / 100, best.values.numpy(), atol=6e-3)
        for word in best.indices.flatten().tolist():
            expected = None if word == tokenizer.eot_token else tokenizer.decode([word])
            assert record["words"][str(word)] == expected


def test_a_step_that_has_nothing_left_to_ask_is_recorded():
    """The ancestral sampler takes all its steps, also after the last mask is gone."""
    kept, record, maps = look_at(*make_model()[:2], steps=40, order="ancestral", generator=torch.Generator())
    assert len(record["steps"]) == 40 and record["steps"][-1]["asked"] == [] and not kept[-1][1].any()
    assert [len(shown) for shown in maps] == [len(step["asked"]) for step in record["steps"]]


def test_the_record_of_a_prompt_has_no_end_among_its_words():
    """What fills a blank may not be an EOS: the record has the probabilities that the sampler saw."""
    model, tokenizer, _ = make_model()
    torch.nn.init.constant_(model.decoder.head.bias[tokenizer.eot_token], 100.0)
    prompt = sample.read_prompt("a ___ dog", tokenizer, 16)
    states = sample.caption_images(model, BLANK, len(prompt), prompt=prompt)
    kept, record = sample.watch(model, tokenizer, states)
    assert record["steps"][0]["asked"] == [1] and tokenizer.eot_token not in record["steps"][0]["likely"][0][:4]
    assert record["tokens"][-1] == tokenizer.eot_token and sum(record["steps"][0]["chances"][0]) > 0


def test_attention_of_many_patches_becomes_means():
    """12 x 12 patches: means of 2 x 2, the largest 255. What is uniform stays uniform."""
    model, tokenizer, spec = make_model()
    model = build_model(Config("tiny", 96, tokenizer.n_vocab, 16, tokenizer.eot_token)).eval()
    for block in model.decoder.blocks:
        torch.nn.init.zeros_(block.cross.q.weight)
    image = torch.randint(256, (1, 96, 96, 3), generator=torch.Generator().manual_seed(0)).byte()
    _, record = sample.watch(model, tokenizer, sample.caption_images(model, image, 3))
    assert record["side"] == 6
    assert [len(base64.b64decode(step["maps"])) for step in record["steps"]] == [3 * 36, 2 * 36, 36]
    assert set(base64.b64decode(record["steps"][0]["maps"])) == {255}


def test_captions_of_a_batch_are_those_of_its_images_alone():
    model, tokenizer, _ = make_model()
    images = torch.randint(256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(1)).byte()
    together = sample.captions_of(model, images, 5, tokenizer)
    assert together == [sample.captions_of(model, image[None], 5, tokenizer)[0] for image in images]
    *_, (tokens, mask) = sample.caption_images(model, images, 5)
    shown = [sample.show(tokenizer, *row) for row in zip(tokens, mask, strict=True)]
    assert shown == together and tokens.shape == (3, 5) and not mask.any()


def test_a_training_example_shows_what_is_masked():
    _, tokenizer, _ = make_model()
    tokens = torch.tensor([*tokenizer.encode_ordinary("a red dog"), *[tokenizer.eot_token] * 3])
    valid = torch.arange(len(tokens)) < len(tokens) - 2
    mask = tokens == tokenizer.encode_ordinary(" red")[0]
    batch = {"tokens": tokens[None], "mask": mask[None], "valid": valid[None]}
    text = sample.show_example(batch | {"t": torch.ones(1)}, tokenizer)
    assert text.endswith("  caption  a red dog\n  masked   a _ dog")
    assert sample.show_example(batch, tokenizer).endswith("  caption  a red dog"), "ar and clip mask nothing"


def greens(sheet):
    """Has the text below each of the twelve images green pixels?"""
    cells = np.array(sheet).reshape(3, 360, 4, 200, 3)[:, 192:].swapaxes(1, 2).reshape(12, -1, 3)
    return (cells == (0, 128, 0)).all(-1).any(1)


def test_the_report_judges_captions_of_shapes(shapes, tmp_path):
    val = data.open_split(shapes, "shapes", "val")
    torch.manual_seed(0)
    model = build_model(Config("tiny", 16, val.tokenizer.n_vocab, 16, val.tokenizer.eot_token)).eval()
    assert sample.report(model, val, val.lengths, tmp_path / "samples.png") == {"exact": 0.0}
    sheet = data.open_image(tmp_path / "samples.png")
    assert sheet.size == (4 * 200, 3 * 360), "twelve images"
    assert not greens(sheet).any()
    with mock.patch("sample.captions_of") as made:
        texts = [data.decode_caption(val.tokenizer, val.captions(i)[0]) for i in range(150)]
        made.side_effect = [[*texts[:5], "wrong", *texts[6:]]]
        assert sample.report(model, val, val.lengths, tmp_path / "samples.png") == {"exact": 149 / 150}
    assert np.flatnonzero(greens(data.open_image(tmp_path / "samples.png"))).tolist() == [0, 1, 2, 3, 4, *range(6, 12)]


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """call(objective, words...) -> the lines that sample.py prints about three drawings."""
    folder = tmp_path_factory.mktemp("sample")
    checkpoint = tmp_path_factory.mktemp("run") / "ckpt.pt"
    for seed in range(3):
        data.draw_shapes(seed, 32)[0].save(folder / f"{seed}.png")

    def run(objective, *words, source=folder):
        command = ["sample.py", "--ckpt", write_checkpoint(checkpoint, objective), source, *words]
        with mock.patch("sys.argv", [*map(str, command)]), contextlib.redirect_stdout(io.StringIO()) as said:
            sample.main()
        return [line.partition("\t")[2] for line in said.getvalue().splitlines() if "\t" in line] or said.getvalue()

    return run


def write_checkpoint(path, objective="mdc", **config):
    model, _, spec = make_model(objective)
    config = asdict(model.config) | config
    torch.save({"model": model.state_dict(), "config": config, "lengths": {5: 3, 7: 1}, "tokenizer": spec}, path)
    return path


def test_every_sampler_from_the_command_line(call):
    def blanks(*words):
        return [line.count("_") for line in call("mdc", "--trace", "--count", 1, *words)]

    assert blanks() == blanks("--order", "random") == [5, 4, 3, 2, 1, 0], "the median of the training captions"
    assert blanks("--steps", 2, "--prompt", "___ " * 8) == [8, 4, 0]
    falling = blanks("--order", "ancestral", "--steps", 3, "--prompt", "___ " * 12)
    assert len(falling) == 4 and falling[0] == 12 and falling[-1] == 0 and falling == sorted(falling)[::-1]
    assert call("mdc", "--temperature", 1) == call("mdc", "--temperature", 1)
    assert call("mdc", "--temperature", 1, "--seed", 1) != call("mdc", "--temperature", 1, "--seed", 2)
    assert all(text.startswith("a") and " on" in text for text in call("mdc", "--prompt", "a ___ on ___"))
    lines = call("ar", "--trace", "--count", 1)
    assert not any("_" in line for line in lines) and lines[0] == " 0  ", "what is not written yet has no place yet"


@pytest.mark.parametrize(
    "objective, columns",
    [
        ("mdc", "bound|+ length|per token"),
        ("ar", "log p|per token"),
        ("clip", "cosine"),
    ],
)
def test_scores_have_all_columns(call, objective, columns):
    said = call(objective, "--score", "a dog", "a red dog on")
    heads = [line.split("  ") for line in said.splitlines() if line.endswith("   caption")]
    assert [[name.strip() for name in head if name] for head in heads] == [[*columns.split("|"), "caption"]] * 3


def test_all_words_after_score_are_captions(call, tmp_path, monkeypatch):
    """Also those that name a file."""
    (tmp_path / "dog").mkdir()
    monkeypatch.chdir(tmp_path)
    said = call("mdc", "--score", "dog", "a cat")
    assert "  dog\n" in said and "  a cat\n" in said


def bad_folder(path):
    """Two sound images, one cut short, and files that operating systems leave."""
    (path / "inner").mkdir(parents=True)
    for name in ("a.png", "inner/b#1.png", "cut.png"):
        data.draw_shapes(0, 32)[0].save(path / name)
    (path / "cut.png").write_bytes((path / "cut.png").read_bytes()[:200])
    (path / "._a.png").write_bytes(bytes(200))
    (path / ".DS_Store").write_bytes(bytes(200))
    (path / "notes.txt").write_text("no image")
    return path


@pytest.mark.parametrize("words, printed", [((), 2), (("--batch-size", 1), 2), (("--score", "a dog"), 2)])
def test_images_that_cannot_be_read_are_named_and_skipped(tmp_path, capsys, words, printed):
    folder = bad_folder(tmp_path / "in")
    command = ["sample.py", "--ckpt", write_checkpoint(tmp_path / "ckpt.pt"), folder, *words]
    with mock.patch("sys.argv", [*map(str, command)]), pytest.raises(SystemExit) as end:
        sample.main()
    said = capsys.readouterr()
    assert end.value.code == 1
    assert said.err.splitlines() == [f"error: {folder}/cut.png: image data is broken"]
    names = [line.partition("\t")[0] for line in said.out.splitlines() if line.startswith(str(folder))]
    assert names == [f"{folder}/a.png", f"{folder}/inner/b#1.png"]


def test_a_page_leaves_out_images_that_cannot_be_read(tmp_path, capsys):
    folder = bad_folder(tmp_path / "in")
    command = ["sample.py", "--ckpt", write_checkpoint(tmp_path / "ckpt.pt"), folder, "--html", tmp_path / "page.html"]
    with mock.patch("sys.argv", [*map(str, command)]), pytest.raises(SystemExit) as end:
        sample.main()
    assert end.value.code == 1 and len(capsys.readouterr().err.splitlines()) == 1, "named once"
    text = (tmp_path / "page.html").read_text().partition("const DATA = ")[2].partition(";\n")[0]
    content = json.loads(text)
    assert [image["name"] for image in content["images"]] == [f"{folder}/a.png", f"{folder}/inner/b#1.png"]
    assert all(image["steps"] and image["tokens"] for image in content["images"])


def test_images_of_other_types_in_a_folder_are_named(tmp_path, call, capsys):
    (tmp_path / "in").mkdir()
    for name, form in (("a.png", "PNG"), ("b.bmp", "BMP"), ("c.jfif", "JPEG")):
        Image.new("RGB", (20, 20), "red").save(tmp_path / "in" / name, form)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    with pytest.raises(SystemExit) as end:
        call("mdc", source=tmp_path / "in")
    assert end.value.code == 1, "the others are captioned"
    assert capsys.readouterr().err == f"error: {tmp_path}/in/b.bmp: not a JPEG, PNG or WebP image\n"


def test_nothing_to_caption_is_an_error(tmp_path, call, capsys):
    folder = bad_folder(tmp_path / "in")
    with pytest.raises(SystemExit) as end:
        call("mdc", source=folder / "cut.png")
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "._a.png").write_bytes(bytes(200))
    with pytest.raises(UserError, match="empty: no images"):
        call("mdc", tmp_path / "empty")


def test_checkpoints_of_other_versions_are_refused(tmp_path):
    path = write_checkpoint(tmp_path / "ckpt.pt", pads="hidden")
    with pytest.raises(UserError, match="not a checkpoint of this version") as problem:
        sample.load_captioner(path)
    assert "\n" not in str(problem.value)


def test_metrics_of_the_test_split(shapes, tmp_path, capsys):
    shutil.copytree(shapes / "shapes" / "val", tmp_path / "shapes" / "test")
    spec = json.loads((tmp_path / "shapes" / "test" / "meta.json").read_text())["tokenizer"]
    tokenizer = data.load_tokenizer(spec)
    model = build_model(Config("tiny", 16, tokenizer.n_vocab, 16, tokenizer.eot_token))
    saved = {"model": model.state_dict(), "config": asdict(model.config), "lengths": {13: 1}, "tokenizer": spec}
    torch.save(saved, tmp_path / "ckpt.pt")
    words = ["--dataset", "shapes", "--data-dir", tmp_path, "--split", "test", "--count", 4, "--metrics"]
    with mock.patch("sys.argv", ["sample.py", "--ckpt", str(tmp_path / "ckpt.pt"), *map(str, words)]):
        sample.main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5 and said[-1].startswith("BLEU-1 0.") and "CIDEr-D" in said[-1]


def test_metrics_compare_with_the_words_of_another_tokenizer(shapes, call):
    """Those of the shards: the checkpoint has 60 tokens, the shards have more."""
    split = data.open_split(shapes, "shapes", "val")
    with mock.patch("sample.print_metrics") as metrics:
        call("mdc", "shapes", "--data-dir", shapes, "--count", 2, "--metrics", source="--dataset")
    (_, given), _ = metrics.call_args
    assert given == [[data.decode_caption(split.tokenizer, ids) for ids in split.captions(i)] for i in range(2)]


def test_a_split_without_images_is_an_error(shapes, tmp_path):
    """A small training set has no held-out images."""
    shutil.copytree(shapes / "shapes" / "train", tmp_path / "shapes" / "train")
    meta = json.loads((tmp_path / "shapes" / "train" / "meta.json").read_text())
    (tmp_path / "shapes" / "train" / "meta.json").write_text(json.dumps(meta | {"held_out": 0}))
    words = ["--ckpt", write_checkpoint(tmp_path / "ckpt.pt"), "--dataset", "shapes", "--data-dir", tmp_path]
    with mock.patch("sys.argv", ["sample.py", *map(str, words)]), pytest.raises(UserError, match="no val images"):
        sample.main()
