"""What only a GPU does: fused attention, compiled blocks, copies beside the work. Skips where there is none."""

import json

import pytest
import torch

import train
from data import Batches, open_split
from model import Config, attend, build_model
from sample import caption_images, score_captions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that CUDA can use")
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact_products():
    """Products of float32 matrices without TF32, so that results can be compared with the CPU's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def make_model(words, objective="mdc"):
    torch.manual_seed(0)
    model = build_model(Config("tiny", 16, words, 16, eos=words - 1, objective=objective))
    if objective != "clip":
        torch.nn.init.normal_(model.decoder.head.weight, std=0.1)
    return model


def make_batches(shapes, objective="mdc", count=1):
    """The vocabulary, and batches as train.py's loader makes them, each of another number of words, the second short."""
    split = open_split(shapes, "shapes", "train")
    batches = []
    for item in range(count):
        batch = Batches(split, 8, 16, 16, 0)[item]
        batch["valid"][0, 13 - item :] = False
        if item == 1:  # 8 tokens instead of 16: compiled blocks meet another shape
            batch |= {name: batch[name][:, :8].contiguous() for name in ("tokens", "valid", "noise")}
        batches.append(train.add_masks(batch, objective, (0.5, 1.0), "linear"))
    return split.tokenizer.n_vocab, batches


def to_device(batch, device):
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def loss_of(model, batch, objective):
    scale = model.log_scale.exp() if objective == "clip" else None
    return train.step_loss(model, batch, objective, "linear", scale, train.Processes()) / 104


@pytest.mark.parametrize("seen", [None, [True, True, False, True, False]])
def test_attention_is_the_cpus(seen):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 64)
    bias = seen and torch.zeros(2, 1, 1, 5).masked_fill(~torch.tensor(seen), -torch.inf)
    expected = attend(q, k, v, 2, bias)
    found = attend(q.to(GPU), k.to(GPU), v.to(GPU), 2, bias if seen is None else bias.to(GPU))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("queries", "keys", "seen"), [(196, 196, None), (16, 196, None), (16, 16, 11), (64, 64, 57)])
def test_attention_in_bfloat16_has_the_results_and_gradients_of_float32(queries, keys, seen):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, queries, 128), torch.randn(2, keys, 128), torch.randn(2, keys, 128)
    bias = seen and torch.zeros(2, 1, 1, keys).masked_fill(torch.arange(keys) >= seen, -torch.inf)
    found = []
    for device, dtype in ((torch.device("cpu"), torch.float32), (GPU, torch.bfloat16)):
        inputs = [x.to(device, dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, 2, bias if seen is None else bias.to(device))
        (out.float() ** 2).sum().div(2).backward()
        found.append([out.detach().float().cpu(), *(x.grad.float().cpu() for x in inputs)])
    torch.testing.assert_close(*found, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("objective", ["mdc", "ar", "clip"])
def test_losses_and_gradients_are_the_cpus(shapes, objective, compiled):
    words, batches = make_batches(shapes, objective, 3)
    torch._dynamo.reset()
    results = []
    for device in (torch.device("cpu"), GPU):
        model = make_model(words, objective).to(device)
        if compiled and device == GPU:
            train.compile_blocks(model)
        total = torch.zeros((), device=device)
        for batch in batches:
            total += loss_of(model, to_device(batch, device), objective)
        total.backward()
        grown = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        results.append((total.detach().cpu(), grown))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("objective", ["mdc", "ar", "clip"])
def test_a_step_never_waits_for_the_gpu(shapes, objective):
    """After the batch is on its way nothing in the step asks the device for a number."""
    words, batches = make_batches(shapes, objective, count=3)
    model = make_model(words, objective).to(GPU)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batches = [to_device({name: value.pin_memory() for name, value in batch.items()}, GPU) for batch in batches]
    for number, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if number else "default")       # the first one sets things up
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(model, batch, objective)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("objective", ["mdc", "ar"])
def test_captions_are_the_cpus(shapes, objective):
    torch.manual_seed(0)
    images = torch.randint(256, (4, 16, 16, 3), dtype=torch.uint8)
    model = make_model(200, objective).eval()
    ends = []
    for device in (torch.device("cpu"), GPU):
        *_, (tokens, _) = caption_images(model.to(device), images, 9)
        ends.append(tokens.cpu())
    assert torch.equal(*ends)


@pytest.mark.parametrize("objective", ["mdc", "ar", "clip"])
def test_scores_are_the_cpus(objective):
    torch.manual_seed(0)
    images = torch.randint(256, (3, 16, 16, 3), dtype=torch.uint8)
    captions = [[5, 6, 7, 199], [8, 199], [9, 10, 11, 12, 13, 199]]
    model = make_model(200, objective).eval()
    found = []
    for device in (torch.device("cpu"), GPU):
        with torch.no_grad():
            features = model.to(device).encode(images.to(device))
        found.append(score_captions(model, features, captions, draws=4))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_a_run_trains_resumes_captions_and_probes(shapes, tmp_path, script):
    """The loop with its loader processes, pinned memory, bfloat16 and compiled blocks; then the other two scripts."""
    out = tmp_path / "run"
    command = ("train.py", "--dataset", "shapes", "--data-dir", shapes, "--image-size", 16, "--batch-size", 32,
               "--device", "cuda", "--workers", 2, "--steps", 60, "--warmup", 10, "--log-every", 1, "--out", out)
    stop = ("-c", "import sys, train; save = train.save_checkpoint\n"
            "def kill(path, checkpoint):\n    save(path, checkpoint)\n    if checkpoint['step'] == 40: sys.exit(9)\n"
            "train.save_checkpoint = kill; sys.argv = sys.argv[1:]; train.main()")
    script(*command, "--save-every", 40, launch=stop, expect=9)
    said = script(*command, "--save-every", 40).stdout
    assert "at step 40" in said and "compile=on" in said
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "event" not in record]
    assert len(losses) == 60 and losses[-1] < 0.8 * losses[0]
    ckpt = ("--ckpt", out / "ckpt.pt", "--data-dir", shapes, "--device", "cuda", "--dataset", "shapes")
    assert len(script("sample.py", *ckpt, "--split", "val", "--count", 2).stdout.splitlines()) >= 2
    assert "random" in script("probe.py", *ckpt, "--limit", 60).stdout


def test_more_processes_than_gpus_is_one_line(shapes, tmp_path, script):
    count = torch.cuda.device_count() + 1
    launch = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
              f"--nproc_per_node={count}")
    failed = script("train.py", "--device", "cuda", "--data-dir", shapes, "--image-size", 16, "--steps", 2, "--out",
                    tmp_path / "run", launch=launch, expect=1)
    assert f"only {count - 1} GPUs" in failed.stderr
