"""Settings that change nothing are noted."""

import importlib.util

import pytest

EVAL = [{"name": "a", "config": {"directory": [{"path": "data"}]}}]
NO_SETS = "there are no eval_datasets"


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({}, []),
        ({"eval_every_n_steps": 5}, [("eval_every_n_steps", NO_SETS)]),
        ({"eval_every_n_epochs": 5, "eval_datasets": []}, [("eval_every_n_epochs", NO_SETS)]),
        (
            {"eval_before_first_step": True, "eval_micro_batch_size_per_gpu": 1},
            [("eval_before_first_step", NO_SETS), ("eval_micro_batch_size_per_gpu", NO_SETS)],
        ),
        (
            {
                "eval_datasets": EVAL,
                "eval_every_n_steps": 5,
                "eval_before_first_step": True,
                "eval_micro_batch_size_per_gpu": 1,
            },
            [],
        ),
        ({"keep_last": 2}, [("keep_last", "no training state is saved without checkpoint_every_n_...")]),
        ({"keep_last": 2, "checkpoint_every_n_steps": 5}, []),
        (
            {"monitoring": {"wandb_api_key": "x", "wandb_run_name": "y", "wandb_tracker_name": ""}},
            [
                ("monitoring.wandb_api_key", "enable_wandb is false"),
                ("monitoring.wandb_run_name", "enable_wandb is false"),
            ],
        ),
        ({"monitoring": {"enable_wandb": True, "wandb_api_key": "x"}}, []),
        (
            {"x_axis_examples": True, "monitoring.tensorboard": False},
            [("x_axis_examples", "there are neither TensorBoard nor W&B curves")],
        ),
        ({"x_axis_examples": True}, []),
        (
            {"metadata": {"level": "minimal", "author": "me", "tag_frequencies": True}},
            [("metadata.tag_frequencies", 'level is "minimal"')],
        ),
        ({"metadata": {"level": "none", "tags": ["a"]}}, [("metadata.tags", 'level is "none"')]),
        (
            {"optimizer": {"type": "muon", "lr": 1e-4, "eps": 1e-7, "momentum": 0.9}},
            [("optimizer.eps", "an adapter has matrices alone, for which muon has momentum")],
        ),
        ({"adapter": {"type": "full"}, "optimizer": {"type": "muon", "lr": 1e-4, "eps": 1e-7}}, []),
        (
            {"force_constant_lr": 1e-3, "model.mlp_lr": 1e-5, "model.mod_lr": 0},
            [(key, "force_constant_lr takes its place") for key in ("optimizer.lr", "model.mlp_lr")],
        ),
        (
            {"sampling": {"seed": 3, "cfg": 2.0, "prompts": [{"prompt": "a", "seed": 4}, {"prompt": "b", "seed": 5}]}},
            [("sampling.seed", "every prompt has its own")],
        ),
        ({"save_every_n_epochs": 2, "save_every_n_steps": 3}, []),
    ],
)
def test_keys_without_effect_are_noted(project, changes, notes):
    assert project.load(changes).notes == tuple(f"main.toml: {key}: has no effect, as {why}" for key, why in notes)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"ar_buckets": [1.5], "min_ar": 0.4}, ["min_ar"]),
        ({"enable_ar_bucket": False, "num_ar_buckets": 5, "max_ar": 3.0}, ["num_ar_buckets", "max_ar"]),
        ({"size_buckets": [[512, 512]], "resolutions": [512], "ar_buckets": [1.5]}, ["resolutions", "ar_buckets"]),
        ({"cache_shuffle_delimiter": "; "}, ["cache_shuffle_delimiter"]),
        ({"cache_shuffle_delimiter": "; ", "cache_shuffle_num": 2}, []),
        ({"min_ar": 0.4, "max_ar": 3.0, "num_ar_buckets": 5, "resolutions": [512]}, []),
        ({"protected_tags": ["a"], "shuffle_tags": True}, ["protected_tags"]),
    ],
)
def test_keys_of_a_dataset_without_effect_are_noted(project, changes, keys):
    for table in ("dataset.", "dataset.directory.0."):
        notes = project.load({f"{table}{key}": value for key, value in changes.items()}).notes
        assert len(notes) == len(keys)
        assert all(note.startswith("main.toml: dataset.directory[0]: ") and "has no effect" in note for note in notes)
        assert all(any(key in note for note in notes) for key in keys)


@pytest.mark.parametrize(
    ("shared", "keys", "notes"),
    [
        ({"recursive": True, "tars": True}, {}, ["recursive", "tars"]),
        ({"caption_mode": "nl"}, {"caption_column": "tags", "natural_column": "prose"}, ["caption_column"]),
        ({}, {"natural_column": "prose"}, ["natural_column"]),
        ({"caption_mode": "mixed"}, {"caption_column": "tags", "natural_column": "prose"}, []),
    ],
)
def test_keys_that_a_table_does_not_use_are_noted(project, shared, keys, notes):
    dataset = {**shared, "directory": [{"hf_dataset": "owner/name", **keys}]}
    found = project.load({"dataset": dataset}).notes
    assert [note.removeprefix("main.toml: dataset.directory[0]: ").partition(" ")[0] for note in found] == notes


def test_a_dataset_that_is_read_twice_is_noted_once(project):
    project.write("dataset.toml", "cache_shuffle_delimiter = '; '\n[[directory]]\npath = 'data'\n")
    changes = {"dataset": "dataset.toml", "eval_datasets": [{"name": "a", "config": "dataset.toml"}]}
    (note,) = project.load(changes).notes
    assert note.startswith("dataset.toml: directory[0]: cache_shuffle_delimiter has no effect")


FULL = {"adapter": {"type": "full"}}
HALF = {"adapter": {"type": "lora", "dtype": "bfloat16"}}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, []),
        (HALF, ["optimizer.type"]),
        (FULL, ["optimizer.type"]),
        (FULL | {"model.transformer_dtype": "float32"}, []),
        (FULL | {"optimizer.type": "adamw_optimi"}, []),
        ({"optimizer.type": "AdamW8bit"}, ["optimizer.type"]),
        (FULL | {"optimizer.type": "AdamW8bit"}, []),
        ({"optimizer": {"type": "adamw_optimi", "lr": 1e-4, "moments_dtype": "8bit"}}, ["optimizer.type"]),
        ({"optimizer": {"type": "adamw_optimi", "lr": 1e-4, "rounding": "stochastic"}}, ["optimizer.rounding"]),
        (HALF | {"optimizer": {"type": "adamw_optimi", "lr": 1e-4, "rounding": "stochastic"}}, []),
        (
            {"optimizer": {"type": "lion", "lr": 1e-4, "gradient_release": True}, "gradient_clipping": 0.0},
            ["optimizer.gradient_release"],
        ),
        ({"optimizer.type": "schedule_free", "warmup_steps": 5}, []),
        ({"optimizer.type": "schedule_free", "lr_scheduler": "cosine"}, ["lr_scheduler"]),
        ({"optimizer": {"type": "prodigy", "lr": 1.0}}, ["gradient_clipping"]),
        ({"optimizer": {"type": "prodigy", "lr": 1.0}, "gradient_clipping": 0.0, "model.mod_lr": 0}, []),
        ({"optimizer": {"type": "prodigy", "lr": 1.0}, "gradient_clipping": 0.0, "model.mod_lr": 1e-5}, ["model"]),
    ],
)
def test_what_one_may_not_expect_of_an_optimizer_is_noted(project, changes, keys):
    assert [note.split(": ")[1] for note in project.load(changes).notes] == keys


def test_an_optimizer_whose_library_is_missing_is_refused_with_the_command(project, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    assert project.problems({"optimizer.type": "adamw8bit"}) == [
        "main.toml: optimizer.type: adamw8bit needs bitsandbytes, which is not installed: pip install "
        '"anima-train[optimizers]"'
    ]
    project.load({"optimizer.type": "adamw_optimi"})


FULL = {"type": "full"}
ADAM = {"type": "adamw_optimi"}


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"optimizer.lr": 1e-3}, ""),
        ({"optimizer.lr": 2e-3}, "optimizer.lr: 0.002 is much for an adapter, which may forget all or end in NaN; "
                                 "write 2e-5 to 1e-3"),
        ({"optimizer.lr": 1.0},
         'optimizer.lr: 1 is for type = "prodigy", which finds the rate; adamw wants 2e-5 to 1e-3'),
        ({"model.mlp_lr": 0.01}, "model.mlp_lr: 0.01 is much for an adapter"),
        ({"optimizer": ADAM | {"lr": 2e-5}, "adapter": FULL}, ""),
        ({"optimizer": ADAM | {"lr": 1e-4}, "adapter": FULL},
         "optimizer.lr: 0.0001 is much for a full fine-tune, which may "
         "forget all or end in NaN; write 1e-6 to 2e-5, or add [adapter] for a LoRA"),
        ({"optimizer": ADAM | {"lr": 1e-6}, "adapter": FULL, "force_constant_lr": 1e-3}, "force_constant_lr: 0.001 is"),
        ({"optimizer": {"type": "schedule_free", "lr": 5e-3}}, ""),
        ({"optimizer": {"type": "prodigy", "lr": 1.0}}, ""),
        ({"optimizer": {"type": "prodigy", "lr": 1e-4}},
         "optimizer.lr: 0.0001 is a factor on the rate that prodigy finds"),
    ],
)  # fmt: skip
def test_an_unusual_learning_rate_is_a_warning(project, changes, warned):
    if changes.get("optimizer", {}).get("type") == "prodigy" and importlib.util.find_spec("prodigyplus") is None:
        pytest.skip("prodigy-plus-schedule-free is not installed")
    warnings = project.load(changes).warnings
    assert len(warnings) == bool(warned)
    assert all(each.startswith(f"main.toml: {warned}") for each in warnings)
