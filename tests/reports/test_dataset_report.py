"""The page that `anima check` writes: its numbers against independent counts, its text harmless, its form valid."""

import base64
import difflib
import io
import os
import random
import re
import shutil
import string
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from anima_train.cli.check_report import Checked, make_report
from anima_train.cli.main import COMMANDS, application
from anima_train.config.ladder import Rung
from anima_train.config.load import load_config
from anima_train.config.memory_advice import memory_suggestions
from anima_train.config.model_files import build_model_spec
from anima_train.core.errors import DataError
from anima_train.data.buckets import Size, aspect_ratios, nearest, size_of
from anima_train.data.cache import Cache
from anima_train.data.images import Crop, cover_box
from anima_train.data.samples import Picture, Sample
from anima_train.data.settings import DirectoryOptions
from anima_train.model.dit import TransformerShape
from anima_train.model.text import MAX_TOKENS, load_tokenizers, tokenize
from anima_train.model.tiny import tiny_paths
from anima_train.optim.optimizers import AdamW, AdamWKahan
from anima_train.reports.captions import one_edit, tokenized, typos
from anima_train.reports.charts import HEIGHT, WIDTH
from anima_train.reports.check import summary
from anima_train.reports.dataset import thumbnail
from anima_train.reports.dataset_page import findings, histogram, length_rows, render
from anima_train.training.build import plan_run
from anima_train.training.costs import Measured, ModelStats, estimated_seconds, gradient_and_state_bytes, memory_cost
from anima_train.training.ladder import Budget, Choice
from anima_train.training.memory import MicroBatchShape
from anima_train.training.prepare import scan_all
from tests.reports.page import Page

SIZES = {"a": (200, 200), "b": (300, 200), "c": (200, 300), "d": (310, 190), "e": (200, 210), "f": (100, 140)}
LONG = ", ".join(f"tag number {number}" for number in range(400))
CAPTIONS = {
    "a": "smiling girl, blue sky",
    "b": "smiling girl, blue sky, <script>alert(1)</script>",
    "c": "smiling girl, 青空 {}",
    "d": "smilnig girl, \x1b[31mred\x1b[0m",
    "e": f"smiling girl, end</s>, {LONG}",
    "f": "blue sky & more",
    "twin": "smiling girl",
}


def make_dataset(folder):
    folder.mkdir(parents=True)
    for number, (name, size) in enumerate(SIZES.items()):
        Image.effect_noise(size, 50 + number).convert("RGB").save(folder / f"{name}.png")
    shutil.copy(folder / "a.png", folder / "twin.png")
    (folder / "broken.png").write_bytes((folder / "b.png").read_bytes()[:500])
    Image.new("RGB", (20, 20)).save(folder / "speck.png")
    for name, caption in CAPTIONS.items():
        (folder / f"{name}.txt").write_text(caption)
    (folder / "masks").mkdir()
    Image.new("L", SIZES["a"], 255).save(folder / "masks" / "a.png")


def anima(*arguments):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # Accelerate keeps one configuration per process, and a person starts a new one
    result = CliRunner().invoke(application(COMMANDS, "anima"), [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def write_config(folder, tiny, data, **changes):
    config = {
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
        "max_steps": 7,
        "micro_batch_size_per_gpu": 2,
        "uncond_fraction": 0.1,
        "dataset": {"resolutions": [128, 192], "max_bad_fraction": 0.5, "directory": [data]},
        "model": {"type": "anima", "tiny_path": str(tiny), "llm_adapter_lr": 0},
        "adapter": {"type": "lora", "rank": 2},
        "optimizer": {"type": "adamw", "lr": 1e-3},
    }
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps({key: value for key, value in (config | changes).items() if value is not None}))
    return path


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The folder of a run that was checked: with run.toml, data/, tiny/, cache/ and out/check_run.html."""
    folder = tmp_path_factory.mktemp("checked")
    make_dataset(folder / "data")
    data = {"path": str(folder / "data"), "mask_path": str(folder / "data" / "masks")}
    anima("check", write_config(folder, folder / "tiny", data))
    return folder


@pytest.fixture(scope="module")
def html(checked):
    return (checked / "out" / "check_run.html").read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_page_needs_nothing_from_elsewhere(html, page):
    assert not re.search(r"https?://|<script|<link|<iframe|@import|url\(", html, re.IGNORECASE)
    assert all(attrs["href"].startswith("data:image/jpeg;base64,") for attrs in page.all("image"))


def test_captions_are_text_and_not_markup(html, page):
    assert "<script>alert(1)</script>" in page.text
    assert "&lt;script&gt;" in html


def test_terminal_escapes_are_shown_and_not_obeyed(html, page):
    assert all(letter.isprintable() or letter == "\n" for letter in html)
    assert r"\x1b[31mred" in page.text


def test_images_that_are_not_used_are_listed_with_the_reason(page):
    assert "7 of 9 images are used" in page.text
    assert re.search(r"cannot be used: 1\b", page.text)
    assert re.search(r"broken\.png: trunc", page.text)
    assert re.search(r"speck\.png: 20x20 is smaller", page.text)


def test_duplicates_are_listed(checked, page):
    assert "data/a.png = data/twin.png" in page.text
    assert str(checked) not in page.text


def test_bucket_counts_equal_an_independent_count(page):
    expected = Counter()
    for name in CAPTIONS:
        width, height = SIZES[name.replace("twin", "a")]
        for side in (128, 192):
            expected[nearest(width / height, [size_of(side, r) for r in aspect_ratios(0.5, 2, 9)]), side] += 1
    for (size, side), number in expected.items():
        assert re.search(rf"{size} \({side} px\)\W+{number}\W", page.text)
    assert len(re.findall(r"\d+x\d+ \(\d+ px\)", page.text)) == len(expected)


def test_crops_are_drawn_where_images_are_cropped(page):
    drawn, expected = [], []
    for rect in page.all("rect", **{"class": "crop"}):
        left, top, width, height = (float(rect[key]) for key in ("x", "y", "width", "height"))
        drawn.append((left, top, left + width, top + height))
    for name in CAPTIONS:
        width, height = SIZES[name.replace("twin", "a")]
        for side in (128, 192):
            size = nearest(width / height, [size_of(side, r) for r in aspect_ratios(0.5, 2, 9)])
            expected.append(cover_box((width, height), Crop(size.width, size.height)))
    assert len(drawn) == len(expected)
    for one, other in zip(sorted(drawn), sorted(expected), strict=True):
        assert one == pytest.approx(other)


def test_thumbnails_are_pictures(page):
    for attrs in page.all("image"):
        picture = Image.open(io.BytesIO(base64.b64decode(attrs["href"].partition(",")[2])))
        assert max(picture.size) <= 160
        ratio = int(attrs["width"]) / int(attrs["height"])
        assert picture.width / picture.height == pytest.approx(ratio, rel=0.02)


def test_truncated_captions_and_unreadable_characters_are_counted(checked, page):
    paths = tiny_paths(checked / "tiny")
    tokenizers = load_tokenizers(paths.tokenizer, paths.t5_tokenizer)
    lengths = [len(each(CAPTIONS["e"])["input_ids"]) for each in (tokenizers.qwen, tokenizers.t5)]
    assert f"loses {max(lengths) - MAX_TOKENS:,} tokens: smiling girl, end</s>" in " ".join(page.text.split())
    assert f"such as e.png ({max(lengths) - MAX_TOKENS:,} tokens)" in page.text  # among the warnings, by its file
    for letter in "青空":
        assert f"{letter} (U+{ord(letter):04X})" in page.text
    assert "special token: 1" in page.text
    assert "</s> in: smiling girl, end</s>" in " ".join(page.text.split())


def test_tags_are_counted_and_the_mistyped_one_is_found(page):
    assert re.search(r"smiling girl\W+5\W", page.text)
    assert re.search(r"blue sky\W+2\W", page.text)
    assert "smilnig girl (1): smiling girl (5)?" in page.text


def test_exposures_are_those_of_the_planned_steps(checked, page):
    loaded = load_config(checked / "run.toml", [])
    plan, _ = plan_run(
        loaded.config, scan_all((loaded.train, *loaded.evals), loaded.config.seed, write=False)["train"].samples, 1
    )
    seen = Counter(dict.fromkeys(range(len(plan.samples)), 0))
    for step in plan.epoch(0)[:7]:
        seen.update(ref.sample for batch in step.micro_batches for ref in batch.refs)
    rows = re.findall(r"(\d+) times\s+(\d+)", page.text)
    assert {int(times): int(number) for times, number in rows} == Counter(seen.values())


def test_learning_rate_is_drawn_over_all_steps(checked):
    report = report_of(checked / "run.toml", [])
    page = Page(render(replace(report, curve=[(0, 0.0), (5, 1.0), (10, 0.5)])))
    assert page.all("polyline")[0]["points"] == f"0.00,{HEIGHT}.00 {WIDTH / 2:.2f},0.00 {WIDTH}.00,{HEIGHT / 2:.2f}"
    first, last = Page(render(report)).all("polyline")[0]["points"].split()[:: len(report.curve) - 1]
    assert (first, last) == ("0.00,0.00", f"{WIDTH}.00,0.00")  # constant
    assert [step for step, _ in report.curve] == list(range(7))


def test_same_input_gives_the_same_bytes(checked, html, tmp_path):
    anima("check", checked / "run.toml", "--html", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == html


def test_no_html_writes_nothing_and_still_sums_up(checked, html):
    shutil.rmtree(checked / "out")
    text = anima("check", checked / "run.toml", "--no-html")
    assert "captions of train: 7 different, 1 cut off" in text
    assert not (checked / "out").exists()


@pytest.mark.parametrize("adapter_lr", [0, pytest.param(1e-5, marks=pytest.mark.slow)])
def test_disk_for_the_cache_is_what_the_cache_takes(checked, tmp_path, adapter_lr):
    model = {"type": "anima", "tiny_path": str(checked / "tiny"), "llm_adapter_lr": adapter_lr}
    data = {"path": str(checked / "data"), "mask_path": str(checked / "data" / "masks")}
    path = write_config(tmp_path, checked / "tiny", data, model=model)
    text = anima("check", path, "--no-html")
    anima("cache", path)
    tensors = [load_file(path) for path in (tmp_path / "cache").rglob("*.safetensors")]
    num_bytes = sum(tensor.nbytes for entry in tensors for tensor in entry.values())
    number = sum(map(int, re.findall(r"(\d+) (?:latents|masks|captions)\b", text.partition("cache: ")[2])))
    assert number == len(tensors)
    assert f"{num_bytes / 1024:.1f} KiB in all" in text


@pytest.mark.parametrize("moments", ["float32", "bfloat16", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizer_bytes_are_those_of_the_optimizer(moments, dtype):
    settings = AdamW(lr=1e-3) if moments is None else AdamWKahan(lr=1e-3, moments_dtype=moments)
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=getattr(torch, dtype)))
    optimizer = settings.build([{"params": [weight], "lr": 1e-3, "weight_decay": 0.0}])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = [tensor for tensor in optimizer.state[weight].values() if tensor.ndim]
    num_bytes = weight.grad.nbytes + sum(tensor.nbytes for tensor in state)
    assert gradient_and_state_bytes(settings, dtype) * weight.numel() == num_bytes


def test_memory_of_the_real_model_is_what_was_measured_elsewhere(checked):
    shape = TransformerShape(28, 2048, 128, 16, 1024, 256)
    facts = ModelStats(shape, num_weights=1_956_000_000, num_trained=69_300_000)
    loaded = load_config(checked / "run.toml", [])
    cost = memory_cost(loaded.config, facts, Size(1024, 1024), 1)
    assert cost.weights / 2**30 == pytest.approx(3.64, abs=0.01)
    assert cost.trained / 2**30 == pytest.approx(1.03, abs=0.01)  # rank 32 with AdaLN
    three = memory_cost(loaded.config, facts, Size(1024, 1024), 3)
    assert three.activations == pytest.approx(3 * cost.activations)


def test_activations_are_those_of_all_blocks_and_what_one_computes_again(checked):
    """`scripts/benchmark.py counts` counts 11.64, 6.27 and 0.49 GiB, and 26.6 values of 16 MiB are all of a block."""
    facts = ModelStats(TransformerShape(28, 2048, 128, 16, 1024, 256), 1_956_000_000, 69_300_000)
    block, temporary = 26.6 * 2**24, 6 * 2**24

    def found(policy, *changes):
        config = load_config(checked / "run.toml", [f"activation_checkpointing={policy}", *changes]).config
        return memory_cost(config, facts, Size(1024, 1024), 1)

    for policy, counted, again in [
        ("false", 11.64 * 2**30, 0),
        ('"selective"', 6.27 * 2**30, block - 14.3 * 2**24),
        ("true", 0.49 * 2**30, block - 1.1 * 2**24),
        ('"offload"', 0.05 * 2**30, block - 0.1 * 2**24),
    ]:
        assert found(policy).activations == pytest.approx(counted + again + temporary, rel=0.02), policy
    full = found("true", 'adapter={type="full"}').activations
    assert full == pytest.approx(found("true").activations, rel=0.1)


def test_copies_of_float32_weights_count_where_they_are_kept(checked):
    facts = ModelStats(TransformerShape(2, 64, 16, 16, 64, 16), num_weights=1000, num_trained=10)
    whole = 'adapter={type="full"}'

    def num_bytes(*changes):
        config = load_config(checked / "run.toml", ['model.transformer_dtype="float32"', *changes]).config
        return memory_cost(config, facts, Size(64, 64), 1).weights

    assert num_bytes() == num_bytes(whole, "activation_checkpointing=true") == 1000 * (4 + 2)
    assert num_bytes("activation_checkpointing=true") == num_bytes('model.dtype="float32"') == 1000 * 4


@pytest.mark.parametrize(
    ("dtype", "optimizer", "num_bytes"), [("float32", "adamw", 16), ("bfloat16", "adamw_optimi", 14)]
)
def test_a_lora_costs_the_bytes_of_its_own_dtype(checked, dtype, optimizer, num_bytes):
    """Weight, gradient and two moments, and for Kahan what rounding took: 4 * 4, or 2 + 2 + 2 * 4 + 2."""
    changes = [f"adapter.dtype='{dtype}'", f"optimizer.type='{optimizer}'"]
    config = load_config(checked / "run.toml", changes).config
    facts = ModelStats(TransformerShape(2, 64, 16, 16, 64, 16), 1000, num_trained=10)
    assert memory_cost(config, facts, Size(64, 64), 1).trained == 10 * num_bytes


@pytest.mark.parametrize(("repeats", "lacks"), [(1, 1), (1.5, 0), (2, 2), (3, 0)])
def test_short_batches_count_what_the_first_epoch_shows(checked, tmp_path, repeats, lacks):
    (tmp_path / "two").mkdir()
    for number in range(2):
        Image.new("RGB", (128, 128), (90 * number, 0, 0)).save(tmp_path / "two" / f"{number}.png")
    data = {"path": str(tmp_path / "two"), "resolutions": [128], "num_repeats": repeats}
    text = anima("check", write_config(tmp_path, checked / "tiny", data, micro_batch_size_per_gpu=3))
    page = Page((tmp_path / "out" / "check_run.html").read_text())
    assert re.search(rf"128x128 +2 +3 +{lacks}\n", text)
    assert (f"128x128: {lacks} of 3" in page.text) == (lacks > 0)


def test_a_set_without_captions_gets_a_page(checked, tmp_path):
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (128, 128), "red").save(tmp_path / "bare" / "only.png")
    path = write_config(tmp_path, checked / "tiny", {"path": str(tmp_path / "bare")}, max_steps=1)
    anima("check", path)
    page = Page((tmp_path / "out" / "check_run.html").read_text())
    assert "1 of 1 images are used" in page.text
    assert "Tags: 0 different" in page.text


def test_damage_that_only_shows_in_the_pixels_is_listed(checked, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    Image.effect_noise((200, 200), 60).convert("RGB").save(folder / "good.jpg")
    Image.effect_noise((200, 200), 70).convert("RGB").save(folder / "bad.jpg")
    os.truncate(folder / "bad.jpg", 3000)
    anima("check", write_config(tmp_path, checked / "tiny", {"path": str(folder)}))
    page = Page((tmp_path / "out" / "check_run.html").read_text())
    assert re.search(r"damaged while .*: 1\b", page.text)
    assert re.search(r"bad\.jpg: trunc", page.text)


def test_a_refused_dataset_gets_a_page_with_the_reason_and_every_file(checked, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (200, 200), (number, 0, 0)).save(folder / f"good{number}.png")
    for number in range(30):
        (folder / f"shot {number}.png").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(folder / "speck.png")
    path = write_config(tmp_path, checked / "tiny", {"path": str(folder)})
    with pytest.raises(DataError) as caught:
        anima("check", path)
    page = Page((tmp_path / "out" / "check_run.html").read_text(encoding="utf-8"))
    assert page.text.index("30 images of 34 cannot be used") < page.text.index("shot 0.png: zero bytes")
    assert all(f"data/shot {number}.png: zero bytes" in page.text for number in range(30))
    assert "speck.png: 9x9 is smaller" in page.text
    assert "good2.png" in page.text  # among those without a caption
    assert str(tmp_path) not in page.text
    assert caught.value.where == f"on {tmp_path / 'out' / 'check_run.html'}"


def test_lengths_equal_those_of_tokenize(checked):
    paths = tiny_paths(checked / "tiny")
    tokenizers = load_tokenizers(paths.tokenizer, paths.t5_tokenizer)
    found = tokenized(tokenizers, ["", *CAPTIONS.values()])
    for caption, length in found.lengths.items():
        tokens = tokenize(tokenizers, caption)
        assert (len(tokens.qwen_ids), len(tokens.t5_ids)) == (min(length.qwen, MAX_TOKENS), min(length.t5, MAX_TOKENS))
        assert length.qwen == len(tokenizers.qwen(caption)["input_ids"])
        assert length.t5 == len(tokenizers.t5(caption)["input_ids"])


def edits(tag, letters):
    """Every text one edit away, made by making it."""
    for place in range(len(tag) + 1):
        for letter in letters:
            yield tag[:place] + letter + tag[place:]
            if place < len(tag):
                yield tag[:place] + letter + tag[place + 1 :]
        if place < len(tag):
            yield tag[:place] + tag[place + 1 :]
        if place + 1 < len(tag):
            yield tag[:place] + tag[place + 1] + tag[place] + tag[place + 2 :]


def test_every_single_edit_is_a_typo_and_no_more_than_one():
    tag = "open mouth"
    for wrong in set(edits(tag, "aeo ")) - {tag}:
        assert [typo.meant for typo in typos({tag: 9, wrong: 1})] == [tag], wrong
    for wrong in ("oben moudh", "open mou", "closed mouth", "mouth open"):
        assert list(typos({tag: 9, wrong: 1})) == []


def test_one_edit_agrees_with_the_edits_themselves():
    source = random.Random(0)
    words = ["".join(source.choices("ab", k=source.randint(1, 5))) for _ in range(60)]
    for word in words:
        for other in words:
            if word != other:
                assert one_edit(word, other) == (other in set(edits(word, "ab"))), (word, other)


@pytest.mark.parametrize("pair", [("2girls", "3girls"), ("short", "shorts")])
def test_numbers_and_equals_are_no_typos(pair):
    number = 9 if any(letter.isdigit() for letter in pair[0]) else 1
    assert list(typos({pair[0]: number, pair[1]: 1})) == []


@pytest.mark.slow
def test_typos_are_found_fast_among_100_000_tags():
    source = random.Random(1)
    tags = {"".join(source.choices(string.ascii_lowercase, k=12)): 3 + number % 50 for number in range(100_000)}
    wrong = next(iter(tags))[:-1]
    started = time.perf_counter()
    found = list(typos({**tags, wrong: 1}))
    assert time.perf_counter() - started < 20
    assert wrong in {typo.tag for typo in found}
    assert all(difflib.SequenceMatcher(None, typo.tag, typo.meant).ratio() > 0.8 for typo in found)


def test_histogram_counts_every_length_once():
    lengths = [0, 1, 32, 33, 511, 512, 513, 900]
    rows = histogram(lengths)
    assert rows[:2] == [("0 to 32", 3), ("33 to 64", 1)]
    assert rows[-2:] == [("481 to 512", 2), ("over 512", 2)]
    assert sum(number for _, number in rows) == len(lengths)


# Kinds of captions


def test_captions_of_tags_and_of_sentences_are_counted_and_named(missing):
    sentence = "A girl in a hat stands by the sea, waving."
    captions = ["1girl, hat", sentence, f"1girl, hat\n{sentence}", "", f"{sentence} 1girl, hat"]
    _, report = missing((captions, {}))
    kinds = {kind: [os.path.basename(name) for name in files] for kind, files in report.sets[0].kinds.items()}
    assert kinds == {"tags": ["0.png"], "sentences": ["1.png"], "both": ["2.png", "4.png"]}
    assert "images of train by their captions: 1 of tags, 1 of sentences, 2 of tags and sentences" in summary(report)


def test_a_caption_is_shown_as_written_and_as_the_model_is_given_it(tmp_path):
    folder = Path(captioned(tmp_path / "data", ["a, b, c, d, e"]))
    picture = Picture(folder / "0.png", folder / "0.png", "", 128, 128, ("a, b, c, d, e",))
    options = DirectoryOptions(shuffle_tags=True, trigger_word="mia")
    sample = Sample("0/0.png@64", picture, Size(64, 64), 64, 0, options, Cache(tmp_path))
    shown = thumbnail(sample, seed=0)
    assert shown.written == "a, b, c, d, e"
    assert shown.given == [sample.caption(0, repeat).text for repeat in range(3)]
    assert thumbnail(sample, seed=None).given == ["mia, a, b, c, d, e"]
    assert thumbnail(replace(sample, options=DirectoryOptions()), seed=0).given == []


def mask_of(path, width, height, right):
    """A mask that leaves this share of the image, at its left."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, round(width * right), height))
    mask.save(path)


def test_a_mask_is_drawn_over_its_picture_and_what_it_leaves_is_told(checked, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (160, 160), "yellow").save(folder / "half.png")
    mask_of(folder / "half-masklabel.png", 160, 160, 0.25)
    Image.new("RGB", (320, 160), "yellow").save(folder / "wide.png")  # its right and left quarter are cut off
    mask_of(folder / "wide-masklabel.png", 320, 160, 0.5)
    Image.new("RGB", (160, 170), "yellow").save(folder / "whole.png")
    alpha = Image.new("RGBA", (160, 165), "yellow")
    alpha.putalpha(0)
    alpha.save(folder / "clear.png")
    dataset = {
        "resolutions": [160], "num_ar_buckets": 1, "min_ar": 1, "max_ar": 1, "min_kept": 0.1,
        "directory": [{"path": str(folder), "alpha_as_mask": True}],
    }  # fmt: skip
    path = write_config(tmp_path, checked / "tiny", {}, dataset=dataset)
    found = report_of(path, [], max_thumbnails=9)
    pictures = {each.name: each for bucket in found.sets[0].buckets for each in bucket.thumbnails}
    shares = {"half.png": 0.25, "wide.png": 0.5, "whole.png": None, "clear.png": 0.0}
    assert {name: each.mask_leaves for name, each in pictures.items()} == {
        name: share if share is None else pytest.approx(share, abs=0.01) for name, share in shares.items()
    }
    for name, x, is_trained in [
        ("half.png", 0.1, True), ("half.png", 0.4, False), ("wide.png", 0.45, True), ("wide.png", 0.6, False),
        ("whole.png", 0.9, True), ("clear.png", 0.5, False),
    ]:  # fmt: skip
        image = Image.open(io.BytesIO(base64.b64decode(pictures[name].jpeg)))
        red, green, blue = image.getpixel((round(x * image.width), image.height // 2))
        assert (red > 200 and green > 200) == is_trained, name
        assert (blue > 150) == (not is_trained or name == "clear.png"), name
    text = " ".join(Page(render(found)).text.split())
    assert "4 of 4 images are used, 3 of them with a mask." in text
    assert "half.png 160 x 160, 100%, its mask leaves 25% to train" in text
    assert "clear.png 160 x 165, 100%, its mask leaves 0% to train" in text
    assert text.count("its mask leaves") == 3


def test_captions_are_whole_on_the_page(checked, tmp_path):
    long = ", ".join(f"tag{number}" for number in range(300)) + "\nA sentence <b>in</b> a second line."
    data = {"path": captioned(tmp_path / "data", [long]), "shuffle_tags": True}
    found = report_of(write_config(tmp_path, checked / "tiny", data), [], max_thumbnails=9)
    html = render(found)
    assert len(found.sets[0].buckets) == 2
    first, *_ = found.sets[0].buckets[0].thumbnails
    for text in (long, *first.given):
        lines = [line.replace("<", "&lt;").replace(">", "&gt;") for line in text.split("\n")]
        assert f"<span>{'<br>'.join(lines)}" in " ".join(html.split()).replace("<br> ", "<br>")
    assert len(first.given) == 3
    assert html.count('<details class="clamped">') >= 8


def test_warnings_come_first_and_point_to_their_lists(checked, page):
    text = " ".join(page.text.split())
    start = text.index("Warnings: ")
    assert "Settings" not in text[text.rindex("Check of run.toml") : start]
    warnings = text[start : text.index("Settings")]
    for words in (
        "in the dataset more than once",
        "1 image cannot be used; the list is below", "1 image is skipped; the list is below",
        "and loses its end", "2 images without smiling girl, which begins most captions",
    ):  # fmt: skip
        assert words in warnings, words
    assert warnings.count("loses its end") == 1
    assert "cut off" not in warnings


def test_a_set_without_faults_has_no_warnings(checked, tmp_path):
    data = {"path": captioned(tmp_path / "data", ["1girl, hat", "1girl, sea"])}
    found = report_of(write_config(tmp_path, checked / "tiny", data), [])
    assert list(findings(found)) == []
    assert "No warnings." in render(found)
    assert "<section" not in render(found)


def test_a_setting_without_effect_is_noted_on_the_page(checked, tmp_path):
    data = {"path": captioned(tmp_path / "data", ["1girl, hat"])}
    found = report_of(write_config(tmp_path, checked / "tiny", data, save_every_n_steps=500), [])
    assert any(note.startswith("save_every_n_steps: has no effect") for note in found.notes)


@pytest.mark.parametrize(("epochs", "max_steps"), [(3, None), (3, 4), (None, 4), (1, 900)])
def test_steps_follow_from_the_images_as_the_plan_has_them(checked, tmp_path, epochs, max_steps):
    """Five images at two resolutions, shown three times each, two at once, two micro-batches to a step."""
    data = {"path": captioned(tmp_path / "data", [None] * 5), "num_repeats": 3}
    path = write_config(
        tmp_path, checked / "tiny", data, epochs=epochs, max_steps=max_steps, gradient_accumulation_steps=2
    )
    rows = dict(length_rows(report_of(path, []).length))
    steps = 8 * epochs if epochs else max_steps  # 2 resolutions x 8 micro-batches of 15 images, in pairs
    assert rows["images"] == "5"
    assert rows["samples"].startswith("10,")
    assert rows["shown in the first epoch"].startswith("30,")
    assert rows["micro-batches"].startswith("16,")
    assert rows["steps in the first epoch"] == "8, each of 2 micro-batches"
    is_cut = (max_steps is not None and max_steps < steps) or epochs is None
    ending = "max_steps, about 0.5 epochs" if is_cut else f"{epochs} epoch{'s' if epochs > 1 else ''}"
    assert rows["steps in all"] == f"{min(steps, max_steps or steps)} ({ending})"


def test_memory_is_shown_against_the_device_with_what_was_chosen(checked):
    settings = ["activation_checkpointing = true"]
    loaded = load_config(checked / "run.toml", [])
    config = load_config(checked / "run.toml", settings).config
    shape = MicroBatchShape(192, Size(192, 192), 2)
    ladder = [Rung(loaded.config, {}), Rung(config, {"activation_checkpointing": True})]
    choice = Choice("auto", shape, ladder, [90 * 2**30, 6 * 2**30], Budget(2**34, "x", "a card with 16.0 GiB"), 1)
    found = replace(report_of(checked / "run.toml", []), memory=choice, device_bytes=2**34)
    page = Page(render(found))
    text = " ".join(page.text.split())
    assert "Memory about 6.0 GiB (an estimate) for 2 images of 192x192 at once, on a card with 16.0 GiB" in text
    assert 'memory = "auto" sets activation_checkpointing = true (about 40 % more work)' in text
    assert "38 % of the device." in text
    assert "6 GiB 6.0 GiB too small 8 GiB 6.0 GiB activation_checkpointing = true" in text
    assert {"style": "width:37.5%"}.items() <= page.all("div", **{"class": "bar"})[0].items()
    tight = replace(found, memory=replace(choice, index=0), device_bytes=2**34)
    assert any(line.startswith("memory may run out: about 90.0 GiB") for line in findings(tight))
    assert (len(tight.memory.warnings), found.memory.warnings) == (1, [])
    assert "562 % of the device." in " ".join(Page(render(tight)).text.split())


def test_a_page_names_the_folder_of_the_data_and_what_is_in_it(checked, tmp_path):
    """As docs/security.md says; nothing of the folders above it."""
    folder = tmp_path / "zxabove" / "zxown"
    captioned(folder / "zxinside", ["1girl, hat"] * 4 + ["hat"])
    (folder / "zxinside" / "zxbroken.png").write_bytes(b"none")
    masks = tmp_path / "zxabove" / "zxmasks"
    masks.mkdir()
    mask_of(masks / "1.png", 128, 128, 0.5)
    data = {"path": str(folder), "recursive": True, "mask_path": str(masks)}
    sampling = {"judge": f"clip:{folder}", "prompts": ["a"]}
    config = write_config(tmp_path, checked / "tiny", data, sampling=sampling)
    html = render(report_of(config, [], max_thumbnails=9))
    assert "previews are scored by clip:zxown, each time" in html
    assert not re.search(f"zxabove|{re.escape(str(tmp_path))}|{re.escape(tmp_path.name)}", html)
    assert "zxown/zxinside/zxbroken.png: not an image" in html
    assert "zxown/zxinside/4.png" in html  # without the first tag of the others


def test_a_set_with_the_longest_names_fits_a_telephone_and_a_desktop(checked, tmp_path, laid_out):
    folder = tmp_path / "data" / ("f" * 250)
    names = ["n" * 240, "<script>x<", "\u202eمرحبا بالعالم", "😀" * 50, "a b " * 50, "broken"]
    captioned(folder, [])
    for number, name in enumerate(names):
        Image.new("RGB", (128, 90 + 40 * number), (40 * number, 9, 9)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{'W' * 300}, {'مرحبا ' * 60}, {LONG * number}")
    mask_of(folder / f"{names[1]}-masklabel.png", 128, 130, 0.5)
    (folder / "broken.png").write_bytes(b"none")
    config = {"path": str(folder), "shuffle_tags": True, "trigger_word": "w" * 90}
    held = {"directory": [{"path": str(folder)}], "max_bad_fraction": 0.5}
    path = write_config(tmp_path, checked / "tiny", config, eval_datasets=[{"name": "h" * 90, "config": held}])
    found = report_of(path, [], max_thumbnails=40)
    assert sum(len(bucket.thumbnails) for each in found.sets for bucket in each.buckets) == 15
    for width, page in laid_out(render(found)).items():
        assert page["scroll"] == page["width"] == int(width), width
        assert page["cut"] == [], width
        assert page["smallest"] > 9, width  # pixels


# Measured costs


def report_of(path, measured, max_thumbnails=0):
    """The report of a config in which these buckets were measured."""
    loaded = load_config(path, [])
    spec = build_model_spec(loaded.config, torch.device("cpu"))
    scans = scan_all((loaded.train, *loaded.evals), loaded.config.seed, write=False)
    return make_report("x", Checked.of(loaded, spec, scans), max_thumbnails, measured)


@pytest.mark.parametrize("max_steps", [3, 7, 40])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_duration_is_that_of_all_planned_steps(checked, tmp_path, max_steps, accumulation):
    """Where a step takes a second and a millisecond for each image token, so that every step's time is known."""
    data = {"path": str(checked / "data"), "num_repeats": 3}
    path = write_config(tmp_path, checked / "tiny", data, max_steps=max_steps, gradient_accumulation_steps=accumulation)

    def seconds(num_tokens):
        return 1 + num_tokens / 1000

    ends = [(Size(16, 16), 1), (Size(1024, 1024), 9)]
    measured = [Measured(size, batch, seconds(size.num_tokens * batch * accumulation), 1) for size, batch in ends]
    loaded = load_config(path, [])
    plan, schedule = plan_run(
        loaded.config, scan_all((loaded.train, *loaded.evals), loaded.config.seed, write=False)["train"].samples, 1
    )
    steps = [step for epoch in range(max_steps) for step in plan.epoch(epoch)][:max_steps]
    expected = sum(
        seconds(sum(len(batch.refs) * batch.size.num_tokens for batch in step.micro_batches)) for step in steps
    )
    assert schedule.num_steps == max_steps == len(steps)
    assert report_of(path, measured).run_seconds == pytest.approx(expected)


def test_duration_is_unknown_without_measurements_and_constant_beyond_them():
    one, ran_out = Measured(Size(64, 64), 1, 2.0, 1), Measured(Size(128, 128), 1, None, 1)
    assert estimated_seconds([], 1, 10, 160) is None
    assert estimated_seconds([one, ran_out], 1, 10, 160) is None
    assert estimated_seconds([one], 1, 10, 100) == estimated_seconds([one], 1, 10, 900) == 20
    steep = [one, Measured(Size(128, 128), 1, 200.0, 1)]  # a line through both is below 0 at few tokens
    assert estimated_seconds(steep, 1, 10, 10) == 20


def test_measured_buckets_replace_their_estimates(checked):
    before = report_of(checked / "run.toml", [])
    first, *others = before.sets[0].buckets
    measured = Measured(first.size, first.batch_size, 1.25, 3 * 2**30)
    found = report_of(checked / "run.toml", [measured])
    text, page = "\n".join(summary(found)), Page(render(found)).text
    assert f"measured {first.size}, batch 2: 1.25 s a step, 3.0 GiB of memory at most" in text
    assert "the whole run: about 8.8 s in one process" in text  # 7 steps
    assert "(an estimate)" not in text
    assert "The whole run: about 8.8 s in one process" in page
    costs, estimates = page.split("Memory and time of a step, measured")[1].split("Memory of the device, an estimate")
    assert re.search(rf"{first.size}\W+2\W+3\.0 GiB\W+1\.25 s", costs)
    estimates = estimates.partition("None of these was measured")[0]
    assert [str(bucket.size) in estimates for bucket in (first, *others)] == [False] + [True] * len(others)
    said = " ".join(page.split())
    assert "x 26.6 for each block; with activation_checkpointing 26.6 for the block that is computed again" in said
    assert 'for each other one 14.3 ("selective"), 1.1 (true) or 0.1 ("offload")' in said
    assert "measured" not in Page(render(before)).text.replace("None of these was measured", "")


def test_memory_that_ran_out_comes_with_what_to_change(checked):
    first, *_, last = report_of(checked / "run.toml", []).sets[0].buckets
    measured = [Measured(first.size, 2, 1.0, 2**30), Measured(last.size, 2, None, 5 * 2**30)]
    found = report_of(checked / "run.toml", measured)
    text, page = "\n".join(summary(found)), Page(render(found)).text
    assert (
        f"measured {last.size}, batch 2: out of memory with 5.0 GiB in use; what to change, in order of cost: " in text
    )
    assert "micro_batch_size_per_gpu below 2 at resolution 192" in text
    number = len(found.sets[0].buckets[-1].savings)
    assert f"{last.size} needs too much memory; what to change, in order of cost: {number}" in page
    assert f"{first.size} needs" not in page
    assert "whole run" not in text + page


def test_savings_name_only_what_would_help_that_of_least_cost_first(checked):
    def keys(*changes, batch_size=4, **where):
        config = load_config(checked / "run.toml", changes).config
        advice = memory_suggestions(config, 1024, batch_size, **{"has_text_encoder": False, **where})
        names = [line.split(" below")[0].split(" (")[0] for line in advice]
        return [name if name.startswith("activation") else name.split(" = ")[0] for name in names]

    bfloat16 = 'model.dtype="bfloat16"'
    batch, less = "micro_batch_size_per_gpu", "a resolution"
    checkpointing = [f"activation_checkpointing = {policy}" for policy in ('"selective"', "true", '"offload"')]
    lora = ['adapter={type="lora", rank=4}', bfloat16]
    selective, *more = checkpointing
    more, last = ["checkpointed_blocks", *more], ["model.transformer_dtype", less]
    assert keys(*lora) == [batch, selective, *more, *last]
    assert keys(*lora, selective, batch_size=1) == [*more, *last]
    instead = [f"{key}, without checkpointed_blocks" for key in more[1:]]
    assert keys(*lora, selective, "checkpointed_blocks = 1", batch_size=1) == [*instead, *last]
    assert keys(*lora, checkpointing[1], batch_size=1) == [*more[2:], *last]
    assert keys(*lora, checkpointing[2], 'model.transformer_dtype="int8"', batch_size=1) == [less]
    assert keys(*lora, 'activation_checkpointing = "unsloth"', batch_size=1) == last
    assert keys(*lora, is_evaluation=True) == ["eval_micro_batch_size_per_gpu", *last]
    assert keys(*lora, 'model.transformer_dtype="float32"', batch_size=1, has_text_encoder=True) == [
        "no model.transformer_dtype", "model.text_encoder_device", selective, *more, less,
    ]  # fmt: skip
    assert keys(lora[0], 'model.dtype="float32"', batch_size=1)[0] == "model.dtype"

    whole = ['adapter={type="full"}', bfloat16, "model.llm_adapter_lr=1e-5"]
    kahan = 'optimizer={type="adamw_optimi", lr=1e-5}'
    everything = [batch, selective, *more, "optimizer.moments_dtype", "model.llm_adapter_lr", less, "adapter.type"]
    assert keys(*whole, kahan) == everything
    assert keys(*whole) == [key for key in everything if "moments" not in key]
    kept = keys(*whole, 'model.transformer_dtype="float32"', batch_size=1)
    assert kept[4] == "no model.transformer_dtype, and optimizer.type"


# Trigger words


def captioned(folder, captions):
    """A folder with an image for each caption; None writes none."""
    folder.mkdir(parents=True)
    for number, caption in enumerate(captions):
        Image.new("RGB", (128, 128), (number, number * 7 % 256, 50)).save(folder / f"{number}.png")
        if caption is not None:
            (folder / f"{number}.txt").write_text(caption)
    return str(folder)


@pytest.fixture
def missing(checked, tmp_path):
    """Check folders given by their captions: (directory, word, whether it is set, numbers of the images)."""

    def run(*directories, **changes):
        tables = [
            {"path": captioned(tmp_path / str(index), captions), **keys}
            for index, (captions, keys) in enumerate(directories)
        ]
        dataset = {"resolutions": [64, 128], "directory": tables}
        path = write_config(tmp_path, checked / "tiny", {}, dataset=dataset, **changes)
        found = report_of(path, [])
        lists = [
            (item.directory, item.word, item.is_set, [int(os.path.basename(name)[:-4]) for name in item.images])
            for item in found.sets[0].missing
        ]
        return lists, found

    return run


def test_images_without_the_trigger_word_are_those_without_a_caption(missing):
    captions = ["smiling, hat", "", None, "sks, hat", "  \n"]
    keys = {"trigger_word": "sks", "caption_prefix": "photo, ", "cache_shuffle_num": 3}
    found, report = missing((captions, keys), (captions[:1] * 4, {"trigger_word": "a, b"}))
    assert found == [(0, "sks", True, [1, 2, 4])]
    assert "trigger words of train: 3 images of directory[0] without the trigger word sks" in summary(report)
    page = Page(render(report)).text
    assert re.search(r"directory\[0\]: images without the trigger word sks: 3\s+0/1\.png\s+0/2\.png", page)


def test_a_trigger_word_may_stand_in_the_prefix(missing):
    assert missing((["", "smile"], {"trigger_word": "sks", "caption_prefix": "photo, sks, "}))[0] == []


def test_images_without_the_first_tag_of_most_captions_are_found(missing):
    captions = ["alice, hat", "Alice, hat", "alice", "hat , alice ,tree", "alicex, hat", None, " alice, sea"]
    found, report = missing((captions, {}), (["bob, hat"] * 3 + ["hat"], {}), (["x"] * 5, {}))
    assert found == [(0, "alice", False, [1, 4, 5]), (1, "bob", False, [3])]
    assert (
        "trigger words of train: 3 images of directory[0] without alice, which begins most captions of this folder; "
        "1 image of directory[1] without bob, which begins most captions of this folder"
    ) in "\n".join(summary(report))
    assert "directory[1]: images without bob, which begins most captions of this folder: 1" in Page(render(report)).text


@pytest.mark.parametrize(
    "captions",
    [
        ["alice, hat", "alice, sea", "tree"],  # three images
        ["alice, hat", "alice, sea", "tree", None],  # three captions
        ["alice, hat", "alice, sea", "tree", "hat, sea", "sea"],  # fewer than half
        [None] * 5,
        ["A sentence that goes on for longer than any tag would, and on"] * 3 + ["hat"],
    ],
)
def test_no_word_is_guessed_from_too_little(missing, captions):
    found, report = missing((captions, {}))
    assert found == []
    assert "trigger words" not in "\n".join(summary(report))


@pytest.mark.parametrize("number", [0, 1, 5])
def test_shuffled_captions_are_judged_by_their_first_tag_in_the_file(missing, number):
    captions = [f"alice, {', '.join(f'{letter}{image}' for letter in 'abcdefgh')}" for image in range(6)] + ["hat, sea"]
    assert missing((captions, {"cache_shuffle_num": number}))[0] == [(0, "alice", False, [6])]


def test_tags_are_separated_by_the_delimiter_too(missing):
    captions = ["alice | hat"] * 4 + ["hat | alice", "hat"]
    keys = {"cache_shuffle_delimiter": " | ", "cache_shuffle_num": 1}
    assert missing((captions, keys))[0] == [(0, "alice", False, [5])]


def test_evaluation_sets_need_no_trigger_word(missing, tmp_path):
    config = {"directory": [{"path": captioned(tmp_path / "held_out", ["alice, hat"] * 4 + ["hat"])}]}
    found, report = missing((["x"] * 5, {}), eval_datasets=[{"name": "held_out", "config": config}])
    assert found == []
    assert report.sets[1].missing == []
