"""The pages: what a browser shows of a caption is what `--trace` prints, and no text in them ever becomes markup."""

import contextlib
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser
from unittest import mock
from xml.etree import ElementTree

import pytest
import torch

import data
import sample
from model import SIZES, Config, Size, build_model

HOSTILE = "<img src=x onerror=document.title=1>&amp;.png"
PIECES = ["</script>", "<script>", "<b>", " dog", " &amp;"]


@pytest.fixture(scope="session")
def browse():
    """Open a file in a browser: browse(path, "#step=end") -> the document after its script has run, parsed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("no Chromium here")

    def call(path, fragment=""):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
        done = subprocess.run([*command, path.as_uri() + fragment], capture_output=True, text=True, timeout=120)
        return Document(done.stdout)

    return call


class Document(HTMLParser):
    """The texts of a document by the class of the element, or its id, or its tag; its attributes; its tags."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.tags, self.attributes, self.open = {}, Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] += 1
        self.attributes += attributes.items()
        if tag not in ("meta", "link", "img", "input"):
            self.open.append((attributes.get("class") or attributes.get("id") or tag).split()[0])
            self.texts.setdefault(self.open[-1], []).append("")

    def handle_endtag(self, tag):
        if self.open:
            self.open.pop()

    def handle_data(self, text):
        for name in self.open:
            self.texts[name][-1] += text

    def fetches(self):
        """What the document would load."""
        return [value for name, value in self.attributes if name in ("src", "href", "srcset") and value[:5] != "data:"]


def write_checkpoint(path, size="tiny", side=16, objective="mdc"):
    """A model with random weights whose words are those that could break a page."""
    torch.manual_seed(0)
    spec = data.words_tokenizer("words:9", Counter(dict.fromkeys(PIECES, 1)))
    config = Config(size, side, data.load_tokenizer(spec).n_vocab, 64, data.load_tokenizer(spec).eot_token)
    config.objective = objective
    model = build_model(config)
    if objective != "clip":
        torch.nn.init.normal_(model.decoder.head.weight, std=0.1)
        torch.nn.init.constant_(model.decoder.head.bias[256 : 256 + len(PIECES)], 100.0)
        model.decoder.head.bias.data[256 + spec["pieces"].index("</script>")] += 5  # so that it occurs
    torch.save(
        {
            "model": model.state_dict(),
            "config": asdict(config),
            "lengths": {9: 1},
            "tokenizer": spec,
        },
        path,
    )
    return path


@pytest.fixture(scope="module", params=["mdc", "ar"])
def page(request, tmp_path_factory):
    """A page of two images, and what --trace printed of each."""
    folder = tmp_path_factory.mktemp("page")
    for objective in ("mdc", "ar"):
        write_checkpoint(folder / f"{objective}.pt", objective=objective)
    for seed, name in enumerate((HOSTILE, "plain.jpg")):
        data.draw_shapes(seed, 64)[0].save(folder / name)
    words = ["--ckpt", folder / f"{request.param}.pt", folder / HOSTILE, folder / "plain.jpg"]
    traces = [[]]
    for line in run_main(*words, "--trace", "--html", folder / "page.html").splitlines():
        number, text = re.fullmatch(r"(?:( ?\d+)  )?(.*)", line.split("\t")[1]).groups()
        traces[-1].append(text)
        if number is None:  # the caption itself comes last
            traces.append([])
    return folder / "page.html", traces[:2]


def run_main(*words):
    """What sample.py prints; its UserErrors pass."""
    with mock.patch("sys.argv", ["sample.py", *map(str, words)]), contextlib.redirect_stdout(io.StringIO()) as said:
        sample.main()
    return said.getvalue()


@pytest.mark.parametrize("step", [0, 4, "end"])
def test_the_page_shows_what_trace_prints(page, browse, step):
    path, traces = page
    document = browse(path, f"#step={step}")
    texts = [text for text in document.texts["sr"] if text != "Denoising step"]
    assert texts == [trace[-1 if step == "end" else min(step, len(trace) - 1)] for trace in traces]
    if step == "end":
        assert all("</script>" in text for text in texts)
        words = "".join(text.rstrip("0123456789") for text in document.texts["token"])
        assert words.replace(" ", "") == "".join(texts).replace(" ", "")


def test_texts_are_no_markup_and_nothing_is_fetched(page, browse):
    path, traces = page
    document = browse(path)
    assert document.texts["h2"] == [str(path.parent / HOSTILE), str(path.parent / "plain.jpg")]
    assert document.texts["title"] == ["Captions appearing, word by word"]
    assert document.tags["img"] == len(traces) and document.tags["script"] == 1 and not document.tags["b"]
    assert not document.fetches() and not re.search(r"@import|url\(|fetch\(|https?://", path.read_text())


@pytest.mark.parametrize("length", [13, 64])
def test_a_page_of_eight_photographs_is_small(tmp_path, monkeypatch, length):
    """Six layers that look at 14 x 14 patches, as B/16's do; one image, times eight."""
    monkeypatch.setitem(SIZES, "thin", Size(24, 12, 6, 16, 6))
    model, _ = sample.load_captioner(write_checkpoint(tmp_path / "big.pt", "thin", 224))
    image = data.draw_shapes(0, 224)[0]
    states = sample.caption_images(model, torch.tensor(data.crop_square(image, 224))[None], length)
    tokenizer = data.load_tokenizer(data.words_tokenizer("words:9", Counter(dict.fromkeys(PIECES, 1))))
    _, record = sample.watch(model, tokenizer, states)
    picture = sample.data_uri(data.crop_square(image, 224))
    content = {"images": [{"picture": picture} | record] * 8}
    sample.write_page("page.html", tmp_path / "page.html", content)
    assert (tmp_path / "page.html").stat().st_size < 2e6
    assert record["side"] == 7 and len(record["steps"]) == length


@pytest.mark.parametrize("objective", ["mdc", "clip"])
def test_the_report_shows_every_record(tmp_path, browse, objective):
    training = [
        {"step": 10 * i, "loss": 5 / i, "lr": 1e-3, "grad_norm": 1.0, "images_per_s": 9.0, "data_wait": 0.01}
        for i in range(1, 3000)
    ]
    evaluations = []
    for step in (10_000, 20_000):
        record = {"step": step, "event": "eval", "val_loss": 1.0}
        if objective == "mdc":
            record |= {"wrong_image": 1.0, "wrong_image_se": 0.1, "visual_gain": 1.9007, "visual_gain_se": 0.0078}
            record |= {"by_ratio": [None] * 5 + [0.1] * 5}
            record |= {"by_position": [[0.5, 0.1, 9], [0.2, None, 1], None], "captions": [f"{HOSTILE} {step}"] * 8}
        evaluations.append(record)
    final = evaluations[-1] | {"event": "final", "exact": 0.5, "minutes": 3.0}
    images = [sample.data_uri(data.crop_square(data.draw_shapes(i, 32)[0], 32)) for i in range(8)]
    content = {
        "title": HOSTILE,
        "command": "python train.py </script>",
        "machine": "here",
        "images": images,
        "records": training + evaluations + [final],
        "given": ["<b>given</b>"] * 8,
    }
    sample.write_page("report.html", tmp_path / "report.html", content)
    document = browse(tmp_path / "report.html")
    assert document.texts["title"] == [HOSTILE] * 2, "the title and the heading"
    assert document.texts["command"] == ["python train.py </script>"]
    assert document.tags["svg"] == {"mdc": 7, "clip": 4}[objective]
    assert ("1.901 ± 0.008visual gain, nats per caption" in document.texts["li"]) == (objective == "mdc")
    assert not document.fetches() and document.tags["script"] == 1
    if objective == "mdc":
        assert document.texts["figcaption"] == [f"{HOSTILE} 20000given: <b>given</b>"] * 8
        assert document.tags["img"] == 8 and "<b>" not in document.texts["b"]
        assert document.tags["circle"] == 2 and "10,000" in document.texts["text"]
        assert all(len(value) < 10_000 for name, value in document.attributes if name == "d"), "thinned out"


def test_a_page_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(TypeError):
        sample.write_page("page.html", path, {"images": object()})
    assert path.read_text() == "old"
    sample.write_page("page.html", path, {"text": "</script> \u2028"})
    found = re.search(r"const DATA = (.*);\n", path.read_text()).group(1)
    assert json.loads(found) == {"text": "</script> \u2028"} and "<" not in found


@pytest.mark.parametrize(
    "words, message",
    [
        (("mdc.pt", "plain.jpg", "--html", "nowhere/page.html"), "page.html: expected FOLDER/NAME.html"),
        (("mdc.pt", "--html", "plain.jpg", "plain.jpg"), "plain.jpg: expected FOLDER/NAME.html"),
        (("mdc.pt", "plain.jpg", "--html", "page.html", "--score", "a dog"), "--score (without --html,"),
        (("mdc.pt", "plain.jpg", "--metrics"), "--dataset NAME (for --metrics)"),
        (("mdc.pt", "plain.jpg", "--dataset", "shapes"), "expected images or --dataset NAME"),
        (("mdc.pt", "plain.jpg", "--device", "meta:oops"), "or meta:oops is not available"),
        (("mdc.pt", "plain.jpg", "--prompt", "___ " * 64), "at most 63 tokens"),
        (("mdc.pt", "plain.jpg", "--prompt", ""), "expected blanks"),
        (("mdc.pt", "plain.jpg", "--score", "a dog " * 64), "at most 63 tokens"),
        (("nowhere.pt", "plain.jpg"), "no checkpoint at"),
        (("ar.pt", "plain.jpg", "--prompt", "a ___"), "ar has no --prompt, --length, --steps or --order"),
        (("ar.pt", "plain.jpg", "--steps", "3"), "ar has no --prompt, --length, --steps or --order"),
        (("clip.pt", "plain.jpg", "--html", "page.html"), "clip can only --score"),
        (("mdc.pt",), "expected images or --dataset NAME"),
        (("mdc.pt", "plain.jpg", "--count", "0"), "expected a whole number above 0"),
        (("mdc.pt", "plain.jpg", "--temperature", "-1"), "expected a number, not negative"),
    ],
)
def test_mistakes_get_one_line(page, words, message):
    folder = page[0].parent
    write_checkpoint(folder / "clip.pt", objective="clip")
    paths = [folder / word if "." in word or "/" in word else word for word in words]
    with pytest.raises(data.UserError, match=re.escape(message)) as problem:
        run_main("--ckpt", *paths)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("name, message", [("nowhere.jpg", "No such file"), ("mdc.pt", "not a JPEG")])
def test_a_file_that_is_no_image_gets_one_line(page, name, message, capsys):
    folder = page[0].parent
    with pytest.raises(SystemExit) as end:
        run_main("--ckpt", folder / "mdc.pt", folder / name)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and f"{name}: {message}" in said


def test_figures(tmp_path):
    figures = pytest.importorskip("figures")
    pytest.importorskip("matplotlib").use("Agg")
    figures.draw_method(tmp_path / "method.svg")
    root = ElementTree.parse(tmp_path / "method.svg").getroot()
    fills = Counter(element.get("fill") for element in root.iter("{http://www.w3.org/2000/svg}rect"))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert fills["#2f6fde"] + fills["#f1f3f6"] == 5 * 13 and texts.count("1.82") == 1, "1/0.55"
    shown = sum(text in (*root[0].text.split(), "end") for text in texts)
    assert shown == 13 + fills["#f1f3f6"], "a word is shown above, and where it is not masked"
    seeds = [[[0.5, 0.1, 900], [0.2, 0.1, 800], [9.0, 9.0, 2]], [[0.6, 0.1, 900], [0.3, 0.1, 800], [9.0, 9.0, 2]]]
    runs = {"mdc": seeds, "ar": [[[0.4, 0.1, 900]]]}
    figures.draw_positions({"shapes": runs, "photographs": runs}, tmp_path / "positions.png")
    assert data.open_image(tmp_path / "positions.png").size[0] > 500
