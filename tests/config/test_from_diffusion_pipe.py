"""docs/from_diffusion_pipe.md: its tables against the reading of configurations, its figures against our own code."""

import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anima_train.config.flags import flag_fault
from anima_train.core.errors import ConfigError
from anima_train.data.buckets import aspect_ratios, nearest, size_of
from anima_train.data.images import Crop, cover_and_crop, decode_mask, load_picture
from anima_train.objective.losses import Loss, downsample_2x
from anima_train.optim.groups import COMPONENTS, LearningRates, optimizer_groups

REPO = Path(__file__).parents[2]
TEXT = (REPO / "docs" / "from_diffusion_pipe.md").read_text(encoding="utf-8")
WORDS = " ".join(TEXT.split())
TABLES = {"Main file": "", "`[model]`": "model.", "`[adapter]`": "adapter.", "`[optimizer]`": "optimizer.",
          "`[monitoring]`": "monitoring.", "Dataset": "dataset.", "`[[directory]]`": "dataset.directory.0."
}  # fmt: skip
FILES = ("anima", "vae", "qwen", "adapter", "a", "t5")
BESIDE = {"monitoring.wandb_": {"monitoring": {"enable_wandb": True}}}


def rows():
    """(what is written, dotted name, value's TOML, verdict) of every row of the tables of keys."""
    for section in re.split(r"^### ", TEXT, flags=re.M)[1:]:
        heading, _, body = section.partition("\n")
        for written, verdict in re.findall(r"^\| `(.+?)` \| (taken|noted|refused)", body, re.M):
            yield pytest.param(TABLES[heading], written, verdict, id=f"{TABLES[heading]}{written}")


@pytest.fixture
def diffusion_pipe(project):
    """A project with the files that the rows name."""
    for name in FILES:
        project.write(f"{name}.safetensors", "")
    project.write("dataset.toml", "[[directory]]\npath = 'data'\n")
    return project


@pytest.mark.parametrize(("table", "written", "verdict"), list(rows()))
def test_each_key_is_taken_noted_or_refused_as_the_page_says(diffusion_pipe, table, written, verdict):
    ((key, value),) = tomllib.loads(written).items()
    changes = next((extra for start, extra in BESIDE.items() if f"{table}{key}".startswith(start)), {})
    shown = f"main.toml: {table}{key}".replace(".0.", "[0].")
    if verdict == "refused":
        (problem,) = diffusion_pipe.problems(changes | {f"{table}{key}": value})
        assert problem.startswith(f"{shown}: ")
        assert re.search(r"; |: |, write|use ", problem.removeprefix(f"{shown}: ")), problem  # what to do
        return
    loaded = diffusion_pipe.load(changes | {f"{table}{key}": value})
    about = [note for note in loaded.notes if note.startswith(f"{shown}: has no effect, as ")]
    without_sets = [note for note in about if note.endswith("there are no eval_datasets")]
    if verdict == "noted":
        assert len(about) == 1
    else:
        assert about == without_sets


def test_the_numbers_of_keys_are_those_of_the_tables():
    verdicts = [row.values[2] for row in rows()]
    taken, noted, refused = (verdicts.count(verdict) for verdict in ("taken", "noted", "refused"))
    assert f"{len(verdicts)} keys and values: {taken} taken, {noted} noted, {refused} refused" in WORDS


def test_each_flag_of_the_table_is_answered():
    theirs = (line.partition("|")[2].partition("|")[0] for line in TEXT.partition("## What differs")[0].split("\n"))
    flags = set(re.findall(r"--\w+", " ".join(theirs)))
    assert {"--config", "--deepspeed", "--regenerate_cache", "--resume_from_checkpoint"} <= flags
    assert [flag for flag in flags if flag_fault(flag, ["--set"]) is None] == []


def test_the_coarse_term_under_a_mask():
    errors = torch.randn(4, 16, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 1, 1, 128, 128)
    mask[..., :64] = 1
    errors = errors * (1 - mask)
    assert Loss(multiscale_weight=1.0)(errors, torch.zeros_like(errors), mask).tolist() == [0] * 4
    plain = downsample_2x(errors).square().mean().item() / 2
    assert f"would be {plain:.3f}" in WORDS


def test_the_share_of_images_in_another_bucket():
    aspects = [0.4 * (2.5 / 0.4) ** (step / 20_000) for step in range(20_001)]
    shares = {}
    for resolution in (512, 768, 1024):
        ratios = aspect_ratios(0.5, 2.0, 9)
        sizes = [size_of(resolution, ratio) for ratio in ratios]
        unrounded = [sizes[min(range(9), key=lambda n: abs(math.log(ratios[n] / each)))] for each in aspects]
        moved = [
            (min(each / here.aspect, here.aspect / each), min(each / theirs.aspect, theirs.aspect / each))
            for each, theirs in zip(aspects, unrounded, strict=True)
            if (here := nearest(each, sizes)) != theirs
        ]
        shares[resolution] = f"{len(moved) / len(aspects):.1%}".replace("%", " %")
        if resolution == 512:
            ours, theirs = (f"{np.mean(side):.1%}".replace("%", " %") for side in zip(*moved, strict=True))
    assert f"{shares[512]} get another of 9 buckets" in WORDS
    assert f"({shares[768]} at 768, {shares[1024]} at 1024), and keep {ours} of their area instead of {theirs}" in WORDS


def test_the_weights_of_coloured_masks(tmp_path):
    found = {}
    for name, colour in (
        ("red", (255, 0, 0)),
        ("green", (0, 255, 0)),
        ("blue", (0, 0, 255)),
        ("grey", (128, 128, 128)),
    ):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "mask.png")
        found[name] = decode_mask(tmp_path / "mask.png", (8, 8)).getpixel((0, 0)) / 255
    said = (
        f"red is {found['red']:.2f} instead of 1, green {found['green']:.2f} and blue {found['blue']:.2f} instead of 0"
    )
    assert said in WORDS
    assert found["grey"] == 128 / 255


def test_norms_do_not_decay():
    shapes = {"blocks.0.self_attn.q_norm.weight": (4,), "blocks.0.self_attn.q_proj.weight": (4, 4)}
    parameters = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    groups = optimizer_groups(parameters, LearningRates(dict.fromkeys(COMPONENTS, 1e-5)), 0.01)
    assert sorted((group["params"][0].ndim, group["weight_decay"]) for group in groups) == [(1, 0.0), (2, 0.01)]
    assert round(100 * (1 - (1 - 1e-5 * 0.01) ** 10_000), 1) == 0.1


def test_the_difference_between_lanczos_and_bicubic():
    means, most = [], 0.0
    for path in sorted((REPO / "examples" / "quickstart").glob("*.png")):
        filters = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC)
        ours, other = (np.asarray(cover_and_crop(load_picture(path), Crop(96, 96), each), float) for each in filters)
        assert np.array_equal(ours, np.asarray(cover_and_crop(load_picture(path), Crop(96, 96)), float))
        means.append(np.abs(ours - other).mean())
        most = max(most, np.abs(ours - other).max())
    assert f"differ by {np.mean(means):.1f} of 255 levels in the mean, and by up to {most:.0f}" in WORDS


def test_a_refused_key_without_a_hint_would_be_found(diffusion_pipe):
    with pytest.raises(ConfigError):
        diffusion_pipe.load({"zzzzzz": 1})
    (problem,) = diffusion_pipe.problems({"zzzzzz": 1})
    assert not re.search(r"; |: |, write|use ", problem.removeprefix("main.toml: zzzzzz: "))
