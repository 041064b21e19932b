"""Speed against what one would write or pick instead, both in the same run. By hand; pytest does not collect it.

    python tests/bench.py                  # every row
    python tests/bench.py probe sampling   # these

Prints a table and one JSON line a row. Ratios hold on a noisy machine, seconds do not.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import diffusion  # noqa: E402
import probe  # noqa: E402
import sample  # noqa: E402
from model import Captioner, Config  # noqa: E402


def seconds(function):
    """(result, wall-clock seconds) of a call."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def bench_probe():
    """The sweep of 45 strengths on 10,000 x 384 features, 10 classes: ours at once, scikit-learn one after the other.

    The features have correlated axes of very different variance, as features have, and classes that overlap.
    """
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(384, 384, generator=generator, dtype=torch.float64))[0]
    centres = torch.randn(10, 384, generator=generator, dtype=torch.float64) * 0.12
    spread = torch.arange(1, 385).double() ** -0.7

    def draw(n):
        labels = torch.randint(10, (n,), generator=generator)
        noise = torch.randn(n, 384, generator=generator, dtype=torch.float64)
        return ((noise + centres[labels]) * spread) @ mix, labels

    (x, y), (test, answers) = draw(10_000), draw(10_000)
    x, test = probe.standardize(x, test)
    ours, our_time = seconds(lambda: probe.fit_logistic(x, y, 10, probe.STRENGTHS))
    accuracy = np.array([float(((test @ w[:-1] + w[-1]).argmax(1) == answers).double().mean()) for w in ours])

    def one_by_one():
        models = (LogisticRegression(C=C, tol=1e-6, max_iter=10_000) for C in probe.STRENGTHS)
        return np.array([model.fit(x.numpy(), y.numpy()).score(test.numpy(), answers.numpy()) for model in models])

    theirs, their_time = seconds(one_by_one)
    return {
        "ours_s": our_time,
        "scikit_learn_s": their_time,
        "ratio": their_time / our_time,
        "best_accuracy": [float(accuracy.max()), float(theirs.max())],
        "largest_difference": float(np.abs(accuracy - theirs).max()),
    }


def bench_sampling():
    """Captions of 16 tokens by an S/16 at 224 px: batches of 32 with the image read once, against one image at a time
    with encoder and decoder run at every step."""
    torch.manual_seed(0)
    model = Captioner(Config("S/16", 224, 50257, 64)).eval()
    torch.nn.init.normal_(model.decoder.head.weight, std=0.02)
    images = torch.randint(256, (32, 224, 224, 3), dtype=torch.uint8)
    lengths = torch.full((32,), 16)

    def naive(count):
        for image in images[:count]:
            tokens, mask = torch.zeros(1, 16, dtype=torch.long), torch.ones(1, 16, dtype=torch.bool)

            def predict(tokens, mask, where, image=image):
                return model(image[None], tokens, mask, torch.ones_like(mask)).flatten(0, 1)[where]

            list(diffusion.denoise(predict, tokens, mask))

    with torch.no_grad():
        _, our_time = seconds(lambda: sample.final(sample.caption_images(model, images, lengths)))
        _, their_time = seconds(lambda: naive(4))
    return {"ours_per_s": 32 / our_time, "naive_per_s": 4 / their_time, "ratio": 8 * their_time / our_time}


def main():
    rows = {name.removeprefix("bench_"): row for name, row in globals().items() if name.startswith("bench_")}
    for name in sys.argv[1:] or rows:
        figures = rows[name]()
        print(f"{name:12}" + "  ".join(f"{key} {value}" for key, value in figures.items()))
        print(json.dumps({"row": name, "threads": torch.get_num_threads()} | figures), flush=True)


if __name__ == "__main__":
    main()
