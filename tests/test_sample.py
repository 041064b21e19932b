"""sample.py: the caption metrics are the published ones, and prompts and blanks are read as written."""

import json
import random

import pytest

import data
import sample
from data import UserError

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
    del hypotheses[0], references[0]  # pycocoevalcap's ROUGE-L divides by the length of an empty caption
    expected = rouge.Rouge().compute_score(references, hypotheses)[0]
    assert sample.rouge_l(made[1:], given[1:]) == pytest.approx(expected, abs=1e-6)


def test_published_scores_of_nlg_eval(photographs, tmp_path, script):
    example = json.loads((photographs / "caption-metrics" / "nlg-eval-example.json").read_text())
    for name, values in (("made", example["hypotheses"]), ("given", example["references"])):
        (tmp_path / name).write_text(json.dumps({str(i): value for i, value in enumerate(values)}))
    said = script("sample.py", "--score-files", tmp_path / "made", tmp_path / "given").stdout.split()
    ours = dict(zip(said[::2], map(float, said[1::2]), strict=True))
    for name, theirs in (("BLEU-1", "Bleu_1"), ("BLEU-4", "Bleu_4"), ("ROUGE-L", "ROUGE_L"), ("CIDEr-D", "CIDEr")):
        assert ours[name] == pytest.approx(example["scores"][theirs], abs=1e-4)
    (tmp_path / "given").write_text("{}")
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
