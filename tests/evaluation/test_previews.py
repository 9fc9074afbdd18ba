"""Previews are the pictures that the weights of that step draw, and the training does not notice them."""

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from anima_train.cli.main import COMMANDS, application
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError
from anima_train.evaluation.previews import Previews

SAMPLING = {
    "every_n_steps": 2,
    "width": 96,
    "height": 64,
    "steps": 3,
    "prompts": ["red circle, (flat color:1.3)", {"prompt": "1girl", "seed": 7, "negative_prompt": "bad", "cfg": 2.0}],
}


def pictures(run):
    return sorted((run.path / "samples").glob("*.png"))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("adapter_lr", [0, 1e-3])
def test_training_is_bitwise_the_same_with_previews(trainer, adapter_lr):
    keys = {"adapter": {"dropout": 0.3}, "model": {"llm_adapter_lr": adapter_lr}, "uncond_fraction": 0.2}
    plain = trainer("plain", **keys)
    watched = trainer("watched", sampling=SAMPLING, **keys)
    assert watched.losses == plain.losses
    assert all(torch.equal(tensor, watched.weights[name]) for name, tensor in plain.weights.items())
    names = [path.name for path in pictures(watched)]
    assert names == [f"s{step:06d}_{number:02d}.png" for step in (0, 2, 4) for number in (0, 1)]


@pytest.mark.parametrize("adapter_lr", [0, pytest.param(1e-2, marks=pytest.mark.slow)])
def test_the_last_preview_is_what_the_saved_lora_draws(trainer, tmp_path, adapter_lr):
    keys = {"model": {"llm_adapter_lr": adapter_lr}, "optimizer": {"lr": 3e-2}}
    run = trainer(sampling=SAMPLING, **keys)
    arguments = ["sample", str(trainer.folder / "run.toml"), "--lora", str(run.path / "weights" / "run.safetensors")]
    arguments += ["--prompt", SAMPLING["prompts"][0], "--size", "96x64", "--steps", "3", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(application(COMMANDS, "anima"), arguments)
    assert result.exception is None, result.output
    (drawn,) = (tmp_path / "out").glob("*.png")
    last, first = run.path / "samples" / "s000004_00.png", run.path / "samples" / "s000000_00.png"
    assert np.abs(pixels(drawn) - pixels(last)).max() <= 1
    assert np.abs(pixels(first) - pixels(last)).max() > 1  # something was learned


def test_a_preview_that_fails_is_a_warning(trainer, capfd):
    plain = trainer("plain")
    (trainer.folder / "runs" / "watched").mkdir(parents=True)
    (trainer.folder / "runs" / "watched" / "samples").write_text("no folder")
    watched = trainer("watched", sampling=SAMPLING)
    assert watched.losses == plain.losses
    output = capfd.readouterr()
    assert "step 2: no preview (" in output.out + output.err


def test_a_preview_that_is_gone_before_the_trackers_get_it_is_a_warning(trainer, monkeypatch, capfd):
    plain = trainer("plain")
    real = Previews.pictures

    def pictures_of_removed_files(previews, paths):
        for path in paths:
            path.unlink()
        return real(previews, paths)

    monkeypatch.setattr(Previews, "pictures", pictures_of_removed_files)
    assert trainer("watched", sampling=SAMPLING).losses == plain.losses
    output = capfd.readouterr()
    assert "step 2: no preview ([Errno 2] No such file or directory" in output.out + output.err


def test_trackers_get_the_pictures(trainer):
    run = trainer(sampling=SAMPLING, monitoring={"tensorboard": True})
    events = EventAccumulator(str(next(run.path.rglob("events.out.tfevents*")).parent), {"images": 0}).Reload()
    assert sorted(events.Tags()["images"]) == ["preview/0", "preview/1"]
    assert [image.step for image in events.Images("preview/0")] == [0, 2, 4]


@pytest.mark.slow
def test_wandb_gets_the_pictures_offline(trainer, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = trainer(sampling=SAMPLING, monitoring={"enable_wandb": True})
    media = [path.relative_to(run.path / "wandb") for path in run.path.rglob("media/images/preview/*.png")]
    assert sorted({(path.name.split("_")[0], int(path.name.split("_")[1])) for path in media}) == [
        (number, step) for number in "01" for step in (0, 2, 4)
    ]


@pytest.mark.slow
def test_one_of_two_processes_draws(trainer, error):
    keys = {"sampling": {**SAMPLING, "before_first_step": False}, "max_steps": 2}
    one = trainer("one", gradient_accumulation_steps=2, **keys)
    two = trainer.processes(2, "two", **keys)
    assert error(torch.tensor(two.losses), torch.tensor(one.losses)) < 1e-5
    assert [path.name for path in pictures(two)] == ["s000002_00.png", "s000002_01.png"]
    assert np.abs(pixels(pictures(two)[0]) - pixels(pictures(one)[0])).max() <= 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompts": []}, "sampling.prompts"),
        ({"prompts": [{"prompt": "a", "with": 64}]}, "sampling.prompts[0].with: unknown key; did you mean width?"),
        ({"sampler": "eulr"}, 'did you mean "euler"?'),
        ({"every_n_steps": None, "before_first_step": False}, "are never drawn; set every_n_steps or every_n_epochs"),
        ({"width": 100}, "sampling.width: found 100"),
    ],
)
def test_wrong_settings_are_refused_with_their_key(trainer, changes, expected):
    sampling = {key: value for key, value in {**SAMPLING, **changes}.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        trainer(sampling=sampling)
    assert expected in str(caught.value)


def test_an_impossible_prompt_stops_the_run_before_it_starts(trainer):
    with pytest.raises(ConfigError, match="weight"):
        trainer(sampling={**SAMPLING, "prompts": ["(a:1e999)"]})


def test_keys_of_all_prompts_hold_where_a_prompt_has_none(trainer):
    prompts = load_config(trainer.config(sampling=SAMPLING)).config.sampling.prompts
    assert [(request.width, request.steps, request.seed, request.cfg) for request in prompts] == [
        (96, 3, 0, 4.0),
        (96, 3, 7, 2.0),
    ]


def test_a_run_without_evaluation_sets_logs_the_norms_of_its_update_with_previews(trainer):
    run = trainer(sampling=SAMPLING)
    assert [(line["step"], line["update_norm/mlp"] > 0) for line in run.evaluations] == [
        (0, False),
        (2, True),
        (4, True),
    ]
