"""The sweep of 45 strengths against scikit-learn's, side by side. By hand; pytest does not collect it.

    python tests/bench_probe.py                                              # 10,000 x 384 made features, 10 classes
    python tests/bench_probe.py --images 3000 --width 128                    # a minute
    python tests/bench_probe.py --features out/.../features/A.pt B.pt        # features that probe.py has cached

Ours starts each strength from the solution before it, along scaled principal axes; scikit-learn starts each from zero
(lbfgs, tol 1e-6, at most 10,000 iterations). The accuracy of the minibatch solver stands beside both. Prints a table and
one JSON line. On a busy machine compare the processor's seconds (of all threads), not the clock's, with one thread each
(OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1): waiting threads cost processor time too.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import probe  # noqa: E402


def made_features(n, D, classes=10):
    """Correlated axes of very different variance, as features have them, and classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]
    centres = torch.randn(classes, D, generator=generator, dtype=torch.float64) * 0.12
    spread = torch.arange(1, D + 1).double() ** -0.7
    for _ in range(2):
        labels = torch.randint(classes, (n,), generator=generator)
        noise = torch.randn(n, D, generator=generator, dtype=torch.float64)
        yield ((noise + centres[labels]) * spread) @ mix, labels


def seconds(function):
    """Result of a call, wall-clock seconds, processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    return function(), time.perf_counter() - wall, time.process_time() - processor


def main():
    from sklearn.linear_model import LogisticRegression

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", nargs=2, metavar="FILE", help="of the training and of the test images")
    parser.add_argument("--images", type=int, default=10_000, help="made features: training and test images, each")
    parser.add_argument("--width", type=int, default=384, help="made features: numbers of an image")
    args = parser.parse_args()
    if args.features:
        train, held = (torch.load(file, weights_only=True) for file in args.features)
        x, test = train["features"], held["features"]
        y, answers = probe.number_classes(train["labels"], held["labels"])
    else:
        (x, y), (test, answers) = made_features(args.images, args.width)
    mean, deviation = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x, test = ((z - mean).double() / deviation for z in (x, test))
    axes = torch.linalg.eigh(x.T @ x).eigenvectors  # as in linear_probe; the objective does not change
    x, test = x @ axes, test @ axes
    classes = int(y.max()) + 1
    probe.fit_logistic(x[:100], y[:100], classes, [1.0])  # the first use of an optimizer imports for seconds
    ours, *our_times = seconds(lambda: probe.fit_logistic(x, y, classes, probe.STRENGTHS))
    our_accuracy = np.array([probe.figures_of(w, test, answers)["top1"] for w in ours])
    print(f"{len(x):,} x {x.shape[1]}, {classes} classes: ours {our_times[0]:.1f} s ({our_times[1]:.1f} of processor)")
    print(f"{'C':>10}{'ours %':>10}{'theirs %':>10}{'their s':>10}{'steps':>8}")
    times, accuracy = np.zeros(2), []
    for C, own in zip(probe.STRENGTHS, our_accuracy, strict=True):
        model = LogisticRegression(C=C, tol=1e-6, max_iter=10_000)
        _, *spent = seconds(lambda model=model: model.fit(x.numpy(), y.numpy()))
        times += spent
        accuracy.append(model.score(test.numpy(), answers.numpy()))
        print(f"{C:10.2g}{100 * own:10.2f}{100 * accuracy[-1]:10.2f}{spent[0]:10.2f}{model.n_iter_[0]:8}", flush=True)
    probe.EXACT = 0
    fast = probe.linear_probe(x.float(), y, test.float(), answers)
    row = {
        "row": "probe",
        "threads": torch.get_num_threads(),
        "ours_s": our_times,
        "scikit_learn_s": times.tolist(),
        "ratio": (times / our_times).tolist(),
        "best_accuracy": [float(our_accuracy.max()), max(accuracy)],
        "minibatch_accuracy": fast["top1"],
        "largest_difference": float(np.abs(our_accuracy - accuracy).max()),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
