"""Whole runs on the tiny model, through exactly the code of real ones."""

import gc
import json
import math
import shutil
import sys
import threading
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from anima_train.core.errors import ConfigError, DataError, ModelFileError
from anima_train.evaluation import evaluate as evaluate_module
from anima_train.model.file_kinds import identify
from anima_train.model.llm_adapter import LLMAdapter
from anima_train.model.safetensors_io import open_header
from anima_train.model.tiny import tiny_paths, write_tiny
from anima_train.training import prepare as prepare_module
from anima_train.training import saving as saving_module
from anima_train.training import tasks as tasks_module
from anima_train.training import train as train_module

DATA_FILES = Path(__file__).parents[1] / "data_files" / "diffusion_pipe"


def same_weights(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def dropout_run(trainer_in, tmp_path_factory):
    """A run with dropout, which draws from a generator in each step; tests only read it."""
    torch.manual_seed(1)
    return trainer_in(tmp_path_factory.mktemp("dropout_run"))(adapter={"dropout": 0.3})


def test_metrics_have_one_object_a_step(plain_run):
    assert [line["step"] for line in plain_run.metrics] == [1, 2, 3, 4]
    for line in plain_run.metrics:
        assert line["loss"] > 0
        assert line["lr"] == 1e-3
        assert line["grad_norm"] > 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"force_constant_lr": 3e-4}, [3e-4, 3e-4]),
        ({"model": {"self_attn_lr": 2e-4, "cross_attn_lr": 1e-4, "mlp_lr": 0, "mod_lr": 1e-4}}, [2e-4, 2e-4]),
        ({"model": {"mod_lr": 4e-3}, "lr_scheduler": "linear"}, [4e-3, 2e-3]),
    ],
)
def test_the_rate_in_the_metrics_is_one_that_is_used(trainer, changes, expected):
    found = trainer(**changes, max_steps=2).metrics
    assert [line["lr"] for line in found] == expected
    assert all(line["lr"] in [line[key] for key in line if key.startswith("lr/")] for line in found)


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(trainer, plain_run):
    first, again, other = plain_run, trainer("b"), trainer("c", seed=1)
    assert same_weights(first.weights, again.weights)
    assert first.losses == again.losses
    assert not same_weights(first.weights, other.weights)


def test_nothing_depends_on_the_global_generators(trainer, dropout_run):
    torch.manual_seed(2)
    assert same_weights(dropout_run.weights, trainer("b", adapter={"dropout": 0.3}).weights)


def test_frozen_llm_adapter_is_not_in_memory_nor_in_the_file(trainer, monkeypatch):
    seen = []

    def spy(*arguments):
        seen.append(sum(type(thing) is LLMAdapter for thing in gc.get_objects()))
        return real(*arguments)

    real = train_module.compute_loss
    gc.collect()
    monkeypatch.setattr(train_module, "compute_loss", spy)
    run = trainer(model={"llm_adapter_lr": 0})
    assert seen == [0] * 4
    assert not any("llm_adapter" in key for key in run.weights)
    assert run.manifest["llm_adapter_trained"] is False


def test_trained_llm_adapter_is_in_the_file_with_its_own_rate(trainer):
    run = trainer(model={"llm_adapter_lr": 1e-5})
    keys = [key for key in run.weights if "llm_adapter" in key]
    assert len(keys) == 2 * 2 * 10
    assert any(run.weights[key].any() for key in keys if "lora_B" in key)
    assert run.metrics[0]["lr/llm_adapter"] == 1e-5
    assert run.metrics[0]["lr/self_attn"] == 1e-3
    assert run.manifest["llm_adapter_trained"] is True


def test_cached_adapter_output_gives_the_same_losses_as_running_the_adapter(trainer, plain_run):
    """The adapter runs live at a learning rate too small to move it; frozen, its output is cached."""
    live = trainer("live", model={"llm_adapter_lr": 1e-30})
    assert plain_run.manifest["llm_adapter_trained"] is False
    assert live.losses == pytest.approx(plain_run.losses, rel=1e-5)


def test_frozen_components_are_not_in_the_file(trainer):
    run = trainer(model={"mod_lr": 0, "mlp_lr": 0, "self_attn_lr": 1e-4})
    assert not any(".mlp." in key or "adaln" in key for key in run.weights)
    assert run.metrics[0]["lr/self_attn"] == 1e-4
    assert run.metrics[0]["lr/cross_attn"] == 1e-3
    assert run.manifest["trained"] == ["self_attn", "cross_attn"]


def test_full_fine_tune_saves_every_key_with_the_adapter(trainer, tiny):
    run = trainer(adapter=None, optimizer={"lr": 1e-4})
    path = run.path / "weights" / "run.safetensors"
    base = open_header(tiny_paths(tiny).transformer)
    saved = open_header(path)
    assert identify(saved) == "transformer"
    assert saved.entries.keys() == base.entries.keys()
    # It trains again from there, and the frozen adapter came through as it was.
    again = trainer(
        "again", adapter=None, optimizer={"lr": 1e-4},
        model={
            "tiny_path": None, "transformer_path": str(path), "vae_path": str(tiny_paths(tiny).vae),
            "llm_path": str(tiny_paths(tiny).llm),
        },
    )  # fmt: skip
    key = "net.llm_adapter.embed.weight"
    assert torch.equal(again.weights[key], run.weights[key])
    assert not torch.equal(again.weights["net.x_embedder.proj.1.weight"], run.weights["net.x_embedder.proj.1.weight"])


def test_full_fine_tune_of_frozen_components_leaves_them_as_they_were(trainer, tiny):
    base = load_file(tiny_paths(tiny).transformer)
    run = trainer(adapter=None, optimizer={"lr": 1e-3}, model={"mlp_lr": 0, "dtype": "bfloat16"})
    for key, value in run.weights.items():
        frozen = ".mlp." in key or "llm_adapter" in key
        if frozen or value.ndim > 1:
            assert torch.equal(value, base[key]) == frozen, key


def test_one_step_over_a_set_is_the_same_in_one_batch_or_accumulated(trainer, images_drawer, tmp_path, error):
    folder = images_drawer(tmp_path / "same_size", [(96, 96)] * 4)
    changes = {"dataset": {"directory": [{"path": str(folder)}]}, "max_steps": 2}
    whole = trainer("whole", micro_batch_size_per_gpu=4, **changes)
    parts = trainer("parts", micro_batch_size_per_gpu=1, gradient_accumulation_steps=4, **changes)
    uneven = trainer("uneven", micro_batch_size_per_gpu=3, gradient_accumulation_steps=2, **changes)
    for other in (parts, uneven):
        assert other.losses == pytest.approx(whole.losses, rel=1e-5)
        for key, value in whole.weights.items():
            assert error(other.weights[key], value) < 1e-3, key


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(trainer, error):
    changes = {"adapter": {"dropout": 0.2}, "uncond_fraction": 0.3, "epochs": 2, "max_steps": None}
    one = trainer("one", gradient_accumulation_steps=2, micro_batch_size_per_gpu=2, **changes)
    two = trainer.processes(2, "two", micro_batch_size_per_gpu=2, **changes)
    assert [line["examples"] for line in two.metrics] == [line["examples"] for line in one.metrics]
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    for line, other in zip(one.metrics, two.metrics, strict=True):
        found, expected = ([number for entry in each["loss_by_t"] for number in entry] for each in (other, line))
        assert found == pytest.approx(expected, rel=1e-5)
    assert (two.path / "seen.json").read_text() == (one.path / "seen.json").read_text()
    for key, value in one.weights.items():
        assert error(two.weights[key], value) < 1e-3, key


@pytest.mark.slow
def test_padding_of_a_short_step_changes_nothing(trainer, error):
    # Three buckets and so three micro-batches an epoch: in every second step one process has padding alone.
    changes = {"epochs": 2, "max_steps": None, "micro_batch_size_per_gpu": 3}
    one = trainer("one", gradient_accumulation_steps=2, **changes)
    two = trainer.processes(2, "two", **changes)
    assert [line["examples"] for line in two.metrics] == [line["examples"] for line in one.metrics]
    assert len(one.metrics) == 4
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in two.metrics] == pytest.approx([line[name] for line in one.metrics], rel=1e-6)
    for line, other in zip(one.metrics, two.metrics, strict=True):
        assert [(place, number) for place, _, number in other["loss_by_t"]] == [
            (place, number) for place, _, number in line["loss_by_t"]
        ]
    for key, value in one.weights.items():
        assert error(two.weights[key], value) < 1e-6, key


@pytest.mark.parametrize("adapter", ["lora", "full", pytest.param("lora on int8", marks=pytest.mark.slow)])
def test_resume_is_bitwise(trainer, adapter):
    changes = {"max_steps": 6, "uncond_fraction": 0.2, "checkpoint_every_n_steps": 2, "warmup_steps": 3}
    changes |= {"optimizer": {"type": "adamw_optimi"}, "model": {"dtype": "bfloat16"}, "lr_scheduler": "cosine"}
    changes["adapter"] = {"dropout": 0.2, "dtype": "bfloat16"} if adapter != "full" else None
    if adapter == "lora on int8":
        changes["model"] = {"dtype": "bfloat16", "transformer_dtype": "int8"}
    whole = trainer("whole", **changes)
    shutil.copytree(whole.path, whole.path.parent / "stopped")
    stopped = whole.path.parent / "stopped"
    shutil.rmtree(stopped / "checkpoints" / "step-000006")
    shutil.rmtree(stopped / "weights")
    resumed = trainer("stopped", resume=True, **changes)
    assert same_weights(resumed.weights, whole.weights)
    assert [line["step"] for line in resumed.metrics] == [1, 2, 3, 4, 5, 6]
    assert resumed.losses == whole.losses


def test_a_line_that_a_kill_has_cut_off_does_not_stop_a_resume(trainer):
    whole = trainer("whole", max_steps=4, checkpoint_every_n_steps=2)
    cut = trainer.folder / "runs" / "cut"
    shutil.copytree(whole.path, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    lines = (whole.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:2]) + '{"step": 3, "lo')
    resumed = trainer("cut", max_steps=4, checkpoint_every_n_steps=2, resume=True)
    assert resumed.losses == whole.losses


def test_resume_on_other_data_or_another_base_is_refused(trainer, images_drawer, tmp_path):
    trainer(checkpoint_every_n_steps=2)
    folder = images_drawer(tmp_path / "other", [(96, 96)])
    with pytest.raises(DataError, match=r"the dataset has changed since: .*5 removed: "):
        trainer(resume=True, max_steps=6, dataset={"directory": [{"path": str(folder)}]})
    write_tiny(tmp_path / "another", seed=1)
    with pytest.raises(ModelFileError, match="the transformer file's SHA-256 was"):
        trainer(resume=True, max_steps=6, model={"tiny_path": str(tmp_path / "another")})


def test_evaluation_is_equal_for_equal_weights_and_never_drops_out(trainer, pictures):
    dataset = {"resolutions": [96], "directory": [{"path": str(pictures)}]}
    evaluation = {
        "eval_datasets": [{"name": "held", "config": dataset}],
        "eval_every_n_steps": 2,
        "uncond_fraction": 0.5,
        "adapter": {"dropout": 0.5},
        "optimizer": {"lr": 1e-12},
    }
    run = trainer(**evaluation)
    assert [line["step"] for line in run.evaluations] == [0, 2, 4]
    names = {f"held/loss_quantile_{tenth / 10:.2f}" for tenth in range(1, 10)}
    assert names <= run.evaluations[0].keys()
    for line in run.evaluations:
        assert line["held/loss"] == pytest.approx(run.evaluations[0]["held/loss"], rel=1e-6)
        assert line["held/difference_from_base"] == pytest.approx(0, abs=1e-6)
        mean = sum(line[name] for name in names) / 9
        assert line["held/loss"] == pytest.approx(mean, rel=1e-6)
    other_batches = trainer("other", eval_micro_batch_size_per_gpu=3, max_steps=1, **evaluation)
    assert other_batches.evaluations[0]["held/loss"] == pytest.approx(run.evaluations[0]["held/loss"], rel=1e-5)


def test_evaluation_changes_nothing_in_training(trainer, dropout_run, images_drawer, tmp_path):
    held = images_drawer(tmp_path / "held", [(96, 96)])
    dataset = {"resolutions": [96], "directory": [{"path": str(held)}]}
    watched = trainer(
        "watched", adapter={"dropout": 0.3}, eval_datasets=[{"name": "held", "config": dataset}], eval_every_n_steps=1
    )
    assert len(watched.evaluations) == 5
    assert same_weights(dropout_run.weights, watched.weights)


def test_recomputing_activations_changes_nothing(trainer, dropout_run):
    recomputed = trainer("recomputed", adapter={"dropout": 0.3}, activation_checkpointing=True)
    assert same_weights(dropout_run.weights, recomputed.weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"dtype": "bfloat16"}},
        {"model": {"dtype": "bfloat16", "transformer_dtype": "float32"}},
        {"model": {"dtype": "bfloat16"}, "adapter": {"dtype": "bfloat16"}, "optimizer": {"type": "adamw_optimi"}},
        {"model": {"timestep_sample_method": "uniform", "flux_shift": True}, "huber_delta": 0.1},
        {"pseudo_huber_c": 0.1, "lr_scheduler": {"type": "wsd", "decay_fraction": 0.5}, "gradient_clipping": 0.0},
        {"uncond_fraction": 1.0, "model": {"shift": 3.0, "multiscale_loss_weight": 0.5}},
        {"force_constant_lr": 1e-4, "smooth_l1_beta": 0.2, "x_axis_examples": True},
    ],
)
def test_settings_train_to_a_loss_of_their_own(trainer, plain_run, changes):
    changed = trainer("changed", **changes)
    assert all(0 < loss < 100 for loss in changed.losses)
    assert changed.losses != plain_run.losses or changed.metrics[0]["lr/mlp"] != plain_run.metrics[0]["lr/mlp"]


def test_saves_at_every_n_steps_and_at_the_end(trainer):
    run = trainer(save_every_n_steps=2, save_dtype="bfloat16")
    assert sorted(path.name for path in (run.path / "weights").iterdir()) == [
        "run-s000002.safetensors",
        "run.safetensors",
    ]
    assert {value.dtype for value in run.weights.values()} == {torch.bfloat16}
    assert all(key.startswith("diffusion_model.") for key in run.weights)
    assert not any("alpha" in key for key in run.weights)
    assert run.metadata()["ss_steps"] == "4"
    assert run.metadata()["modelspec.sai_model_spec"] == "1.0.1"


def test_nothing_saved_names_a_folder_of_this_machine(plain_run):
    folder = plain_run.path.parents[1].name
    assert folder not in json.dumps(plain_run.metadata())
    assert folder not in json.dumps(plain_run.manifest)


def test_resolved_config_runs_again(trainer, plain_run):
    trainer.base = tomllib.loads((plain_run.path / "config.toml").read_text())
    again = trainer("second", run_name="second", output_dir=str(trainer.folder / "runs"))
    assert same_weights(plain_run.weights, again.weights)


def test_run_folder_of_another_run_is_refused(trainer, plain_run):
    shutil.copytree(plain_run.path, trainer.folder / "runs" / "run")
    with pytest.raises(ConfigError, match="already holds a run"):
        trainer()


def test_second_start_encodes_nothing_and_a_changed_image_only_itself(trainer, images_drawer, tmp_path, capsys):
    folder = images_drawer(tmp_path / "own", [(96, 96), (128, 80), (80, 128)])
    dataset = {"directory": [{"path": str(folder)}]}

    def added(name):
        trainer(name, dataset=dataset)
        lines = capsys.readouterr().out.splitlines()
        return next(line for line in lines if line.startswith("cache:") and line.endswith("added"))

    assert added("a") == "cache: 3 latents, 0 masks and 3 texts added"
    assert added("b") == "cache: 0 latents, 0 masks and 0 texts added"
    Image.new("RGB", (100, 100), "green").save(folder / "image1.png")
    assert added("c") == "cache: 1 latents, 0 masks and 0 texts added"
    (folder / "image2.txt").write_text("another caption")
    assert added("d") == "cache: 0 latents, 0 masks and 1 texts added"


def test_mask_keeps_what_it_hides_out_of_the_loss(trainer, images_drawer, tmp_path):
    folder = images_drawer(tmp_path / "own", [(96, 96)] * 2)
    masks = tmp_path / "masks"
    masks.mkdir()
    for number, value in enumerate((0, 255)):
        Image.new("L", (96, 96), value).save(masks / f"image{number}.png")
    directory = {"path": str(folder), "mask_path": str(masks)}
    masked = trainer("masked", epochs=1, max_steps=None, dataset={"directory": [directory]})
    plain = trainer("plain", epochs=1, max_steps=None, dataset={"directory": [{"path": str(folder)}]})
    assert min(masked.losses) == 0
    assert max(masked.losses) in [pytest.approx(loss, rel=0.2) for loss in plain.losses]


def test_damaged_image_is_skipped_and_too_many_stop(trainer, images_drawer, tmp_path, capsys):
    folder = images_drawer(tmp_path / "own", [(96, 96)] * 4)
    whole = (folder / "image2.png").read_bytes()
    (folder / "image2.png").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match="1 image of 4 cannot be used"):
        trainer("strict", dataset={"directory": [{"path": str(folder)}]})
    assert "image2.png: truncated" in (trainer.folder / "runs" / "strict" / "lists.txt").read_text()
    run = trainer(
        "lenient", epochs=1, max_steps=None,
        dataset={"directory": [{"path": str(folder)}], "max_bad_fraction": 0.5},
    )  # fmt: skip
    assert run.metrics[-1]["examples"] == 3
    assert "image2.png" in capsys.readouterr().out
    for name in ("warnings.jsonl", "report.html", "lists.txt"):  # what is left to be looked at in the end
        assert "image2.png: truncated" in (run.path / name).read_text()


def test_image_that_changes_after_the_scan_is_skipped(trainer, images_drawer, tmp_path, monkeypatch):
    folder = images_drawer(tmp_path / "own", [(96, 96)] * 4)
    real = prepare_module.scan_all

    def scan_then_change(datasets, seed, write):
        scans = real(datasets, seed, write)
        Image.new("RGB", (96, 96), "white").save(folder / "image1.png")
        (folder / "image3.png").unlink()
        return scans

    contents = {name: (folder / name).read_bytes() for name in ("image1.png", "image3.png")}
    changes = {
        "epochs": 1,
        "max_steps": None,
        "dataset": {"directory": [{"path": str(folder)}], "max_bad_fraction": 0.5},
    }
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "scan_all", scan_then_change)
        assert trainer(**changes).metrics[-1]["examples"] == 2
    assert len(list((folder / ".anima_cache" / "latent").rglob("*.safetensors"))) == 2
    for name, content in contents.items():  # what was skipped for one run is tried again by the next
        (folder / name).write_bytes(content)
    assert trainer("again", **changes).metrics[-1]["examples"] == 4


@pytest.mark.parametrize(
    ("slot", "given"), [("vae_path", "transformer"), ("llm_path", "vae"), ("transformer_path", "llm")]
)
def test_file_in_the_wrong_slot_is_named(trainer, tiny, slot, given):
    paths = tiny_paths(tiny)
    model = {
        "tiny_path": None,
        "transformer_path": str(paths.transformer),
        "vae_path": str(paths.vae),
        "llm_path": str(paths.llm),
    }
    model[slot] = str(getattr(paths, given))
    with pytest.raises(ModelFileError, match=f"model.{slot}: expects .* looks like"):
        trainer(model=model)


def test_files_in_all_wrong_slots_are_named_in_one_report(trainer, tiny):
    paths = tiny_paths(tiny)
    given = {"transformer_path": paths.vae, "vae_path": paths.llm, "llm_path": paths.transformer}
    with pytest.raises(ModelFileError) as caught:
        trainer(model={"tiny_path": None, **{slot: str(path) for slot, path in given.items()}})
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"model.{slot}" for slot in given]


def test_anima_without_adapter_needs_llm_adapter_path(trainer, plain_run, tiny, tmp_path):
    weights = load_file(tiny_paths(tiny).transformer)
    bare = {key: value for key, value in weights.items() if "llm_adapter" not in key}
    adapter = {key.removeprefix("net."): value for key, value in weights.items() if "llm_adapter" in key}
    save_file(bare, tmp_path / "bare.safetensors")
    save_file(adapter, tmp_path / "adapter.safetensors")
    paths = tiny_paths(tiny)
    model = {"tiny_path": None, "vae_path": str(paths.vae), "llm_path": str(paths.llm)}
    model["transformer_path"] = str(tmp_path / "bare.safetensors")
    with pytest.raises(ModelFileError, match="no LLM adapter"):
        trainer("without", model=model)
    given = trainer("given", model={**model, "llm_adapter_path": str(tmp_path / "adapter.safetensors")})
    assert same_weights(given.weights, plain_run.weights)


def test_missing_tokenizer_offline_says_what_to_put_where(trainer, tiny, tmp_path):
    paths = tiny_paths(tiny)
    alone = tmp_path / "alone" / "a" / "b" / "c"
    alone.mkdir(parents=True)
    shutil.copy(paths.llm, alone)
    model = {"tiny_path": None, "transformer_path": str(paths.transformer), "vae_path": str(paths.vae)}
    with pytest.raises(ModelFileError, match="tokenizer_path"):
        trainer(offline=True, model={**model, "llm_path": str(alone / paths.llm.name)})


def test_tensorboard_files_are_written(trainer):
    run = trainer(monitoring={"tensorboard": True})
    assert list(run.path.rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_accelerate_launch_trains(trainer, command):
    config = trainer.config()
    result = command([sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "anima_train", str(config)])
    assert result.returncode == 0, result.stderr
    assert (trainer.folder / "runs" / "run" / "weights" / "run.safetensors").is_file()


def test_wandb_is_written_when_asked_for_and_the_key_nowhere(trainer, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "")
    key = "5ec4e7" + "0" * 34
    run = trainer(monitoring={"enable_wandb": True, "wandb_api_key": key, "wandb_tracker_name": "project"})
    assert list(run.path.glob("wandb/offline-run-*/*.wandb"))
    holders = [path for path in run.path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert holders == []


@pytest.mark.slow
def test_diffusion_pipe_pair_runs_with_only_its_paths_changed(trainer, images_drawer, tiny, tmp_path):
    paths = tiny_paths(tiny)
    style = images_drawer(tmp_path / "style", [(96, 96), (128, 80)])
    masked = images_drawer(tmp_path / "masked", [(96, 96), (80, 128)])
    (masked / "masks").mkdir()
    for number in range(2):
        Image.new("L", (96, 96), 128).save(masked / "masks" / f"image{number}.png")
    main, dataset = tmp_path / "main.toml", tmp_path / "diffusion_pipe_dataset.toml"
    replacements = {
        "runs/my_style": str(tmp_path / "runs"),
        "diffusion_pipe_dataset.toml": str(dataset),
        "models/anima-preview.safetensors": str(paths.transformer),
        "models/qwen_image_vae.safetensors": str(paths.vae),
        "models/qwen_3_06b_base.safetensors": str(paths.llm),
        "data/style_masked": str(masked),
        "'data/style'": f"'{style}'",
    }
    for source, target in (("diffusion_pipe_main.toml", main), ("diffusion_pipe_dataset.toml", dataset)):
        text = (DATA_FILES / source).read_text()
        for old, new in replacements.items():
            text = text.replace(old, new)
        target.write_text(text)
    # 512 and 1024 pixels and 40 epochs are what the pair says; a shorter run and smaller images come from the line.
    run = trainer.run(main, ["max_steps=2", 'run_name="pair"', "eval_before_first_step=false"])
    assert len(run.metrics) == 2
    assert run.metrics[0]["lr/mod"] == pytest.approx(1e-5 / 100)
    assert run.metrics[0]["lr/self_attn"] == pytest.approx(2e-5 / 100)
    assert all(value.dtype == torch.bfloat16 for value in run.weights.values())


def test_command_line_prints_errors_without_a_traceback(trainer, command):
    config = trainer.config(max_steps=None, epochz=3)
    result = command([sys.executable, "-m", "anima_train", str(config)])
    assert result.returncode == 2
    assert "epochz: unknown key; did you mean epochs?" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_optional_libraries_are_not_imported_unless_used(command):
    """Not bitsandbytes: where it is installed, diffusers imports it."""
    code = (
        "import pkgutil, sys, anima_train; "
        "everything = pkgutil.walk_packages(anima_train.__path__, 'anima_train.'); "
        "[__import__(module.name) for module in everything if module.name not in "
        "('anima_train.__main__', 'anima_train.optim.prodigy')]; "
        "assert 'anima_train.training.train' in sys.modules; "
        "print([name for name in ('prodigyplus', 'wandb', 'matplotlib', 'tensorboard', 'datasets') "
        "if name in sys.modules])"
    )
    assert command([sys.executable, "-c", code]).stdout.strip() == "[]"


def test_text_encoder_of_another_size_is_refused(trainer, tiny, tmp_path):
    weights = load_file(tiny_paths(tiny).transformer)
    adapter = {key.removeprefix("net."): value for key, value in weights.items() if "llm_adapter" in key}
    for key in list(adapter):
        if "cross_attn.k_proj" in key or "cross_attn.v_proj" in key:
            adapter[key] = torch.zeros(adapter[key].shape[0], 48)
    save_file(adapter, tmp_path / "adapter.safetensors")
    with pytest.raises(ModelFileError, match="gives states of width 64, and the LLM adapter reads 48"):
        trainer(model={"llm_adapter_path": str(tmp_path / "adapter.safetensors")})


def test_an_evaluation_that_is_not_finite_is_told_and_its_state_is_not_the_best(trainer, images_drawer, caplog):
    """One update this large, and the model gives nothing finite any more."""
    held = images_drawer(trainer.folder / "held", [(96, 96)])
    sets = [{"name": "held", "config": {"resolutions": [96], "directory": [{"path": str(held)}]}}]
    each_step = {"eval_every_n_steps": 1, "checkpoint_every_n_steps": 1, "max_steps": 1}
    run = trainer(eval_datasets=sets, optimizer={"lr": 1e25, "weight_decay": 0.0}, **each_step)
    assert "the loss of the evaluation set held is not finite" in caplog.text
    assert not math.isfinite(run.evaluations[-1]["held/loss"])
    manifest = json.loads((run.path / "checkpoints" / "step-000001" / "state.json").read_text())
    assert manifest["score"] is None
    assert (run.path / "report.html").exists()


def test_a_set_that_does_not_decide_which_state_is_best_does_not_say_so(trainer, images_drawer, monkeypatch, caplog):
    def set_of(role, size):
        folder = images_drawer(trainer.folder / role, [size])
        return {"name": role, "role": role, "config": {"resolutions": [64], "directory": [{"path": str(folder)}]}}

    def evaluate(model, eval_set, *rest):
        found = evaluate_module.evaluate(model, eval_set, *rest)
        return replace(found, losses=found.losses * math.nan) if eval_set.name == "retention" else found

    monkeypatch.setattr(tasks_module, "evaluate", evaluate)
    sets = [set_of("validation", (70, 90)), set_of("retention", (88, 66))]
    run = trainer(eval_datasets=sets, eval_every_n_steps=1, checkpoint_every_n_steps=1, max_steps=1)
    warnings = {record.getMessage() for record in caplog.records if record.name == tasks_module.__name__}
    assert "the loss of the evaluation set retention is not finite" in warnings
    assert not any("as the best" in warning for warning in warnings)
    manifest = json.loads((run.path / "checkpoints" / "step-000001" / "state.json").read_text())
    assert manifest["score"] in [line.get("validation/loss") for line in run.evaluations if line["step"] == 1]


def test_what_weights_say_of_captions_is_made_once_and_not_by_the_steps(trainer, monkeypatch):
    threads = []

    def data_metadata(*arguments):
        threads.append(threading.current_thread().name)
        return {"modelspec.trigger_phrase": "xyz"}

    monkeypatch.setattr(saving_module, "data_metadata", data_metadata)
    run = trainer(save_every_n_steps=1, max_steps=2)
    assert threads == ["writer"]
    assert run.metadata()["modelspec.trigger_phrase"] == "xyz"


def test_a_lora_that_masks_kept_from_learning_asks_about_them(trainer, images_drawer, caplog):
    folder = images_drawer(trainer.folder / "seen", [(96, 96)])
    masks = trainer.folder / "masks"
    masks.mkdir()
    Image.new("L", (96, 96), 0).save(masks / "image0.png")
    dataset = {"directory": [{"path": str(folder), "mask_path": str(masks)}]}
    trainer(dataset=dataset, max_steps=1)
    assert "images whose mask is all black: nothing of them is trained (white is trained): 1" in caplog.text
    assert "every lora_B in it is zero; do the masks leave anything to train (white is)?" in caplog.text
