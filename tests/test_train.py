"""The scripts as a user runs them, on the smallest data set there is."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
import diffusion
import train
from data import Batches, UserError, open_split
from model import Captioner, Config

TINY = (
    "--dataset",
    "shapes",
    "--image-size",
    16,
    "--dtype",
    "float32",
    "--batch-size",
    8,
    "--lr",
    1e-3,
    "--warmup",
    2,
    "--device",
    "cpu",
    "--log-every",
    1,
    "--eval-every",
    0,
)


def losses(out):
    return [
        record["loss"]
        for record in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if "event" not in record
    ]


def final(out):
    return json.loads((out / "final.json").read_text())


def weights(out):
    return torch.load(out / "ckpt.pt", weights_only=True)["model"]


def word_shares(shapes):
    """How frequent each word is in the training captions, with one added to each; those words; the EOS."""
    split = open_split(shapes, "shapes", "train")
    words = np.concatenate([split.captions(i)[0] for i in range(len(split))])
    counts = np.bincount(words, minlength=split.tokenizer.n_vocab) + 1
    return counts / counts.sum(), words, split.tokenizer.eot_token


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """A run of six steps, its folder and its output."""
    import subprocess
    import sys

    out = tmp_path_factory.mktemp("out") / "run"
    command = [
        sys.executable,
        "train.py",
        *map(str, TINY),
        "--data-dir",
        str(shapes),
        "--out",
        str(out),
        "--steps",
        "6",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return out, done.stdout


def test_a_run_tells_and_leaves_what_it_promises(finished, shapes):
    out, said = finished
    for words in (
        "float32",
        "preset shapes",
        "masking ratio 0.",
        "caption ",
        "step      6/6",
        "exactly right",
        "next:",
        "python probe.py",
    ):
        assert words in said
    assert "warning" not in said
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert (
        last["event"] == "final" and 0 <= last["exact"] <= 1 and math.isfinite(last["val_loss"]) and last["gain_se"] > 0
    )
    assert (out / "samples.png").stat().st_size > 1000 and (out / "report.html").stat().st_size > 1000
    best = torch.load(out / "best.pt", weights_only=True)
    assert best["step"] == 6 and best["best"] == pytest.approx(last["val_loss"])
    share, words, _ = word_shares(shapes)
    entropy = -np.log(share[words]).mean()
    assert losses(out)[0] == pytest.approx(entropy, rel=0.15), "the first guess is how frequent a word is"


def test_a_resumed_run_equals_one_that_was_never_stopped(finished, shapes, tmp_path, script):
    out = tmp_path / "run"
    command = ("train.py", *TINY, "--data-dir", shapes, "--out", out, "--steps", 6, "--save-every", 2)
    stop = (
        "-c",
        "import sys, train; save = train.save_checkpoint\n"
        "def kill(path, checkpoint):\n    save(path, checkpoint)\n    if checkpoint['step'] == 4: sys.exit(9)\n"
        "train.save_checkpoint = kill; sys.argv = sys.argv[1:]; train.main()",
    )
    script(*command, launch=stop, expect=9)
    (out / "ckpt.pt").write_bytes(b"cut short while it was written")
    assert "cannot be read" in (said := script(*command).stdout) and "at step 2" in said
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(finished[0]).items())
    assert losses(out) == losses(finished[0])


def test_the_same_command_again_says_that_the_run_is_finished(finished, shapes, script):
    before = weights(finished[0])
    done = script("train.py", *TINY, "--data-dir", shapes, "--out", finished[0], "--steps", 6, "--workers", 1)
    assert "finished" in done.stdout and "next:" in done.stdout
    assert all(torch.equal(value, weights(finished[0])[name]) for name, value in before.items())
    done = script("train.py", *TINY, "--data-dir", shapes, "--out", finished[0], "--steps", 6, "--seed", 1, expect=2)
    assert "--seed was 0, now 1" in done.stderr and done.stderr.count("\n") == 1


def test_micro_batches_do_not_change_the_loss(finished, shapes, tmp_path, script):
    script("train.py", *TINY, "--data-dir", shapes, "--out", tmp_path / "run", "--steps", 6, "--micro-batch", 2)
    torch.testing.assert_close(losses(tmp_path / "run"), losses(finished[0]), atol=1e-5, rtol=0)


def numbers(value):
    """All numbers of a nested record but its times, in order."""
    if isinstance(value, dict):
        return [n for key in sorted(value) if key not in ("minutes", "machine") for n in numbers(value[key])]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, float | int) else []


EVERY_OBJECTIVE = """
import sys, train
import torch.distributed as dist
dist.init_process_group("gloo")
dist.init_process_group = dist.destroy_process_group = lambda *_, **__: None    # one group for all runs
out, *options = sys.argv[1:]
for objective in train.OBJECTIVES:
    several = ["--captions-per-image", "2" if objective in ("mdc", "ar") else "1"]
    sys.argv = ["train.py", *options, "--objective", objective, "--out", f"{out}/{objective}", *several]
    train.main()
"""


def test_the_number_of_processes_changes_nothing(shapes, tmp_path, script, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "every.py").write_text(EVERY_OBJECTIVE)
    options = ("--data-dir", shapes, *TINY, "--steps", 20)
    for world in (1, 2, 4):
        launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}")
        script(tmp_path / "every.py", tmp_path / str(world), *options, launch=launch)
    for objective in train.OBJECTIVES:
        one = tmp_path / "1" / objective
        for world in ("2", "4"):
            many = tmp_path / world / objective
            torch.testing.assert_close(losses(many), losses(one), atol=1e-5, rtol=0, msg=f"{objective}, {world}")
            assert numbers(final(many)) == pytest.approx(numbers(final(one)), abs=1e-4), f"{objective}, {world}"


LARGE_BLOCKS = """
import functools, model, os, pathlib, sys, torch, train
from torch._dynamo.testing import CompileCounterWithBackend
model.SIZES["tiny"] = (256, 2, 4, 8)  # 3 MB a block: more than DDP's first bucket
counter = CompileCounterWithBackend("aot_eager")  # which needs no C++ compiler
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend=counter)
train.main()
graphs = pathlib.Path(sys.argv[0]).with_name("graphs" + os.environ.get("RANK", "0"))
graphs.write_text(str(counter.frame_count))
"""


def test_compiled_blocks_do_the_same_in_two_processes_with_few_graphs(tmp_path, script, monkeypatch):
    """Captions of many lengths, blocks that DDP would cut, and validations in between, which are not compiled."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(data, "SHAPES_SAMPLES", {"train": 64, "val": 8})
    for split in ("train", "val"):
        data.prepare("shapes", split, tmp_path, image_size=16, tokenizer="words:8", workers=1)
    options = ("--data-dir", tmp_path, *TINY, "--eval-every", 2, "--steps", 5, "--max-tokens", 64)
    options += ("--tokenizer", "words:8")
    (tmp_path / "run.py").write_text(LARGE_BLOCKS)
    script(tmp_path / "run.py", *options, "--out", tmp_path / "plain")
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    compiled = ("--compile", "on", "--out", tmp_path / "compiled")
    said = script(tmp_path / "run.py", *options, *compiled, launch=run).stdout
    assert "torch.compile on" in said
    assert {(tmp_path / f"graphs{rank}").read_text() for rank in (0, 1)} <= {"3", "4"}
    torch.testing.assert_close(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), atol=1e-5, rtol=0)


def hurt(step, what):
    """Python arguments that run train.py and do `what` in the middle of a step of it."""
    return (
        "-c",
        "import os, sys, train; rate, done = train.get_lr, []\n"
        f"def get_lr(step, *rest):\n    if step == {step} and not done:\n        done.append(1)\n        {what}\n"
        "    return rate(step, *rest)\n"
        "train.get_lr = get_lr; sys.argv = sys.argv[1:]; train.run(train.main)",
    )


@pytest.mark.parametrize("number", [15, 2], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_step_saves_and_the_command_goes_on(number, finished, shapes, tmp_path, script):
    command = ("train.py", *TINY, "--data-dir", shapes, "--out", tmp_path / "run", "--steps", 6)
    said = script(*command, launch=hurt(2, f"os.kill(os.getpid(), {number})"), expect=128 + number).stdout
    assert "stopped after step 3" in said
    assert "at step 3" in script(*command).stdout and losses(tmp_path / "run") == losses(finished[0])
    assert all(torch.equal(value, weights(tmp_path / "run")[name]) for name, value in weights(finished[0]).items())


def test_a_killed_worker_is_restarted_and_a_signal_to_one_process_stops_both_after_the_same_step(
    finished, shapes, tmp_path, script, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out, once = tmp_path / "run", tmp_path / "once"
    first_time = f"os.environ['RANK'] == '1' and not os.path.exists('{once}')"
    what = f"{first_time} and [open('{once}', 'w'), os.kill(os.getpid(), 9)]"
    options = ("--data-dir", shapes, *TINY, "--steps", 6, "--save-every", 2, "--out", out)
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    (tmp_path / "killed.py").write_text("import sys; sys.argv.insert(0, '')\n" + hurt(4, what)[1])
    said = script(tmp_path / "killed.py", *options, launch=(*run, "--max-restarts=3")).stdout
    assert once.exists() and "at step 4" in said
    torch.testing.assert_close(losses(out), losses(finished[0]), atol=1e-5, rtol=0)
    (tmp_path / "stopped.py").write_text(
        "import sys; sys.argv.insert(0, '')\n" + hurt(3, "os.environ['RANK'] == '1' and os.kill(os.getpid(), 15)")[1]
    )
    said = script(tmp_path / "stopped.py", *options, "--fresh", launch=run, expect=1).stdout
    assert "stopped after step 4" in said and torch.load(out / "ckpt.pt", weights_only=True)["step"] == 4


def test_a_loss_that_is_not_finite_names_the_step_and_saves_nothing(shapes, tmp_path, script):
    command = ("train.py", *TINY, "--data-dir", shapes, "--out", tmp_path / "run", "--steps", 6, "--save-every", 2)
    said = script(*command, "--log-every", 99, launch=hurt(2, "return 1e38"), expect=2)
    assert "gradient of step 4" in said.stderr and said.stderr.count("\n") == 1
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 2


def test_a_full_disk_leaves_what_was_saved(finished, tmp_path, monkeypatch):
    before = (tmp_path / "ckpt.pt", (finished[0] / "ckpt.pt").read_bytes())
    before[0].write_bytes(before[1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left.*intact"):
        train.save_checkpoint(before[0], {})
    assert before[0].read_bytes() == before[1] and len([*tmp_path.iterdir()]) == 1


def test_benchmark_saves_nothing(shapes, tmp_path, script):
    command = ("train.py", *TINY, "--data-dir", shapes, "--out", tmp_path / "run", "--steps", 2)
    for kind in ("real", "repeat"):
        assert "of a matrix product" in script(*command, "--bench", kind).stdout
    assert not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize("objective", train.OBJECTIVES)
def test_one_batch_overfits(shapes, objective):
    split = open_split(shapes, "shapes", "train")
    torch.manual_seed(0)
    model = Captioner(Config("tiny", 16, split.tokenizer.n_vocab, 16, objective=objective))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4 if objective == "clip" else 1e-3)
    batch, loss = Batches(split, 4, 16, 16, 0)[0], torch.tensor(9.0)
    ratios = {"parallel": (1.0, 1.0), "bert": (0.6, 0.6)}.get(objective, (0.5, 1.0))
    for step in range(400):
        batch["noise"], batch["u"] = torch.rand(4, 16, generator=torch.Generator().manual_seed(step)), step * 0.618 % 1
        view = diffusion.training_batch(batch, objective, 4, 13.0, ratios)
        outputs = model(*(view[name] for name in ("images", "tokens", "mask", "valid", "rows", "where")))
        if objective == "clip":
            loss = diffusion.contrastive_loss(*outputs, *outputs)
        else:
            loss = (diffusion.cross_entropy(outputs, view["targets"]) * view["weight"]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.04 and step > 100:
            return
    raise AssertionError(f"the loss is still {loss.item()}")


def test_learning_rate_warms_up_and_ends_at_zero():
    assert train.get_lr(0, 1.0, 10, 100) == 0.1 and train.get_lr(9, 1.0, 10, 100) == 1.0 == train.get_lr(
        10, 1.0, 10, 100
    )
    assert train.get_lr(55, 1.0, 10, 100) == pytest.approx(0.5) and train.get_lr(100, 1.0, 10, 100) == pytest.approx(0)
    assert train.get_lr(0, 1.0, 0, 100) == 1.0
    late = [train.get_lr(step, 1.0, 10, 100, 30) for step in (29, 30, 39)]
    assert late == pytest.approx([0, 0.1 * train.get_lr(30, 1.0, 10, 100), train.get_lr(39, 1.0, 10, 100)])


def test_the_encoder_waits_until_its_start(shapes, tmp_path, script):
    out = tmp_path / "run"
    options = ("--steps", 4, "--save-every", 3, "--encoder-start", 3, "--warmup", 4)
    said = script("train.py", *TINY, "--data-dir", shapes, "--out", out, *options).stdout
    assert "never reaches its peak" in said, "a warm-up as long as the run is told"
    before, after = (torch.load(out / name, weights_only=True) for name in ("ckpt-previous.pt", "ckpt.pt"))
    torch.manual_seed(0)
    for name, value in train.Captioner(train.Config(**before["config"])).state_dict().items():
        assert torch.equal(value, before["model"][name]) == name.startswith("encoder."), name
        assert torch.equal(value, after["model"][name]) == (name == "encoder.pos_embed"), name
    assert after["seconds"] > before["seconds"] > 0
    late = script("train.py", *TINY, "--data-dir", shapes, "--out", out, *options[:2], "--encoder-start", 4, expect=2)
    assert "learn nothing" in late.stderr


def test_the_batch_is_split_exactly_or_refused_with_the_numbers():
    assert train.split_batch(64, 2, None) == 1 and train.split_batch(64, 2, 8) == 4 and train.split_batch(8, 1, 64) == 1
    with pytest.raises(UserError, match="64.*3"):
        train.split_batch(64, 3, None)
    with pytest.raises(UserError, match="64.*2 processes.*5"):
        train.split_batch(64, 2, 5)


def test_every_preset_is_complete():
    for name in (*train.PRESETS, "anything"):
        args, preset = train.parse_args(["--dataset", name])
        assert all(getattr(args, key) == value for key, value in preset.items()) and bool(args.steps) != bool(
            args.epochs
        )
    args, _ = train.parse_args(["--epochs", "2"])
    assert args.steps is None and args.epochs == 2


def test_fine_tuning_starts_from_the_weights(finished, shapes, tmp_path, script):
    script(
        "train.py",
        *TINY,
        "--data-dir",
        shapes,
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        "--lr",
        0,
        "--init",
        finished[0] / "ckpt.pt",
        "--max-tokens",
        20,
        "--t-min",
        0,
    )
    tuned = weights(tmp_path / "run")
    assert all(
        torch.equal(value, tuned[name]) for name, value in weights(finished[0]).items() if name != "decoder.positions"
    )
    assert torch.equal(tuned["decoder.positions"][:16], weights(finished[0])["decoder.positions"])


def test_fine_tuning_refuses_another_model(finished):
    saved = torch.load(finished[0] / "ckpt.pt", weights_only=True)
    for changed in ({"size": "S/16"}, {"image_size": saved["config"]["image_size"] * 2}, {"objective": "clip"}):
        with torch.device("meta"):
            model = Captioner(Config(**saved["config"] | changed))
        with pytest.raises(UserError, match="this run has to be the same"):
            train.start_from(finished[0] / "ckpt.pt", model, saved["tokenizer"])
    with pytest.raises(UserError, match="this run has to be the same"):
        train.start_from(finished[0] / "ckpt.pt", Captioner(Config(**saved["config"])), {"name": "gpt2"})


def test_pads_that_are_tokens(shapes, tmp_path, script):
    out = tmp_path / "run"
    script("train.py", *TINY, "--data-dir", shapes, "--out", out, "--steps", 2, "--pads", "eos")
    per_token = final(out)["val_loss"]
    ckpt = ("sample.py", "--ckpt", out / "ckpt.pt", "--dataset", "shapes", "--data-dir", shapes, "--count", 2)
    said = script(*ckpt, "--prompt", "a ___ red ___ at the").stdout
    assert all(re.fullmatch(r"a.* red.* at the", line.split("\t")[1]) for line in said.splitlines())
    said = script(*ckpt, "--score", "a small red cross", "a", "--draws", 2).stdout
    rows = [line.split() for line in said.splitlines() if line.endswith(("cross", " a"))]
    assert len(rows) == 4 and all(row[0] == row[3] for row in rows), "the length would count twice"
    share, words, eos = word_shares(shapes)
    nats = -np.log(share[words]).sum() * 13 / len(words) - 3 * np.log(share[eos])
    assert per_token == pytest.approx(nats / 13, rel=0.15), "nats of all 16 positions, a token of 13"


def test_recall_counts_images_of_one_caption_as_right_and_ties_as_wrong():
    def recall(image, text, number):
        figures = diffusion.recall(image, text, torch.tensor(number))
        return [figures[f"{way}_r1"] for way in ("image_to_text", "text_to_image")]

    eye = torch.eye(4)
    assert recall(eye[[0, 0, 1, 2]], eye[[0, 0, 1, 2]], [0, 0, 1, 2]) == [1.0, 1.0]
    assert recall(eye[[1, 1, 1, 2]], eye[[0, 0, 1, 2]], [0, 0, 1, 2])[0] == 0.5
    assert recall(torch.ones(4, 4), eye, [0, 1, 2, 3]) == [0.0, 0.0], "a collapsed model is never right"


def test_captions_from_files_and_shards(finished, shapes, tmp_path, script):
    from data import draw_shapes

    draw_shapes(1, 40)[0].save(tmp_path / "a b.png")
    draw_shapes(2, 40)[0].save(tmp_path / "c.jpg")
    ckpt = ("--ckpt", finished[0] / "ckpt.pt")
    lines = script(
        "sample.py", *ckpt, tmp_path, "--trace", "--length", 5
    ).stdout.splitlines()
    assert len(lines) == 2 * 6 and lines[0].endswith("0  _ _ _ _ _")
    one = script(
        "sample.py", *ckpt, "--dataset", "shapes", "--data-dir", shapes, "--count", 5, "--batch-size", 2
    ).stdout
    two = script("sample.py", *ckpt, "--dataset", "shapes", "--data-dir", shapes, "--count", 5).stdout
    assert one == two and len(one.splitlines()) == 5


def test_probe_reports_the_floor(finished, shapes, script):
    said = script(
        "probe.py", "--ckpt", finished[0] / "ckpt.pt", "--dataset", "shapes", "--data-dir", shapes, "--limit", 60
    ).stdout
    assert "random init" in said and "background" in said
    record = json.loads((finished[0] / "probe.jsonl").read_text())
    assert set(record["results"]["shape"]) == {"trained", "random"}


@pytest.mark.parametrize(
    "command, words",
    [
        (("train.py", "--dataset", "nothing"), "python data.py --dataset nothing"),
        (("train.py", "--batch-size", 0), "--batch-size 0"),
        (("train.py", "--steps", -1), "--steps -1"),
        (("train.py", "--objective", "clip", "--captions-per-image", 2), "--captions-per-image 1"),
        (("train.py", "--crop-scale", 1.5), "--crop-scale 1.5"),
        (("train.py", "--seed", -1), "--seed -1"),
        (("train.py", "--seed", 1 << 64), "below 2^63"),
        (("train.py", "--epochs", "inf"), "--epochs inf"),
        (("train.py", "--init", "nope.pt"), "--init nope.pt: no such file"),
        (("train.py", "--stepz", 3), "--stepz"),
        (("train.py", "--objective", "gpt"), "--objective"),
        (("data.py", "--dataset", "../x", "--source", "README.md"), "--dataset ../x"),
        (("data.py", "--dataset", "x", "--source", "README.md", "--image-size", -5), "--image-size -5"),
        (("sample.py", "--ckpt", "nowhere.pt", "assets"), "no checkpoint at nowhere.pt"),
        (("sample.py", "--ckpt", "README.md", "assets"), "not a checkpoint"),
        (("probe.py", "--ckpt", "nowhere.pt", "--dataset", "shapes"), "no checkpoint"),
        (("data.py", "--dataset", "x", "--source", "nowhere/*.tar"), "nowhere/*.tar"),
        (("data.py", "--dataset", "x"), "--source"),
        (("data.py", "--dataset", "x", "y", "--source", "assets"), "several are for --stats"),
        (("data.py", "--dataset", "x", "--source", "assets", "--tokenizer", "words:many"), "words:many"),
    ],
)
def test_a_mistake_gets_one_line(command, words, script, tmp_path):
    where = ("--data-dir", tmp_path) if command[0] != "sample.py" else ()
    if command[0] == "train.py":
        where += ("--out", tmp_path / "out")
    done = script(*command, *where, expect=2)
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, script):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Evil()}))
    assert "not a checkpoint" in script("sample.py", "--ckpt", tmp_path / "evil.pt", "assets", expect=2).stderr
    assert not (tmp_path / "pwned").exists()
