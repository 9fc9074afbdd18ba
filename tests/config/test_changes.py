"""What may change when a run is resumed."""

import copy
import tomllib
from types import NoneType
from typing import get_args, get_origin

import pytest

from anima_train.config.changes import MAY_CHANGE, MAY_NOT_CHANGE, compare, key_names, refusal, why_not
from anima_train.config.config import Config
from anima_train.config.resolved import config_toml
from anima_train.core.settings import is_settings, members_of
from anima_train.optim.groups import COMPONENTS

RATES = [f"{component}_lr" for component in COMPONENTS if component != "base"]
EVAL = [{"name": "held out", "config": {"directory": [{"path": "data"}]}}]
SECRET = "0123456789abcdef"


@pytest.fixture
def resolved(project):
    """The resolved config of a project with some changes, as it is read back from the run's folder."""

    def resolve(changes=None):
        return tomllib.loads(config_toml(project.load(changes).config))

    return resolve


def lines(changes):
    return changes.allowed, changes.refused


def tables_in(field):
    """The settings classes that the value of a key, or an item of its list, may have."""
    members = members_of(field.annotation)
    items = [item for member in members if get_origin(member) is list for item in members_of(get_args(member)[0])]
    return list(filter(is_settings, [*members, *items]))


def decidable(table, prefix=""):
    """Every key that can be different: values, and those tables and items of lists that can be absent."""
    for key, field in table.model_fields.items():
        can_be_absent = NoneType in get_args(field.annotation) or get_origin(field.annotation) is list
        if not tables_in(field) or can_be_absent:
            yield prefix + key
        for inner in tables_in(field):
            yield from decidable(inner, f"{prefix}{key}.")


def test_somebody_has_decided_about_every_key():
    """Who adds a key says in `config/changes.py` whether it may change when a run is resumed."""
    undecided = []
    for name in decidable(Config):
        try:
            why_not(name)
        except KeyError:
            undecided.append(name)
    assert undecided == []


def test_a_key_nobody_has_decided_about_is_found():
    with pytest.raises(KeyError, match=r"optimizer\.nesterov"):
        why_not("optimizer.nesterov")


def test_decisions_are_about_keys_that_exist_and_are_made_once():
    names = set(key_names(Config))
    assert {entry.removesuffix(".*") for entry in (*MAY_CHANGE, *MAY_NOT_CHANGE)} <= names
    assert not MAY_CHANGE & MAY_NOT_CHANGE.keys()
    assert set(decidable(Config)) <= names


def test_the_same_configuration_has_no_changes(resolved):
    changes = {"eval_datasets": EVAL, "sampling": {"prompts": ["a cat"]}, "lr_scheduler": "cosine"}
    assert lines(compare(resolved(changes), resolved(changes))) == ([], [])


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        ({}, {"optimizer.lr": 5e-5}, "optimizer.lr: 0.0001 -> 5e-05"),
        ({}, {"epochs": 3}, "epochs: 1 -> 3"),
        ({}, {"max_steps": 100}, "max_steps: absent -> 100"),
        ({"model.mlp_lr": 1e-5}, {}, "model.mlp_lr: 1e-05 -> absent"),
        ({}, {"lr_scheduler": "cosine"}, 'lr_scheduler.type: "constant" -> "cosine"'),
        ({}, {"force_constant_lr": 1e-3}, "force_constant_lr: absent -> 0.001"),
        ({}, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 -> 2"),
        ({}, {"activation_checkpointing": True}, "activation_checkpointing: false -> true"),
        ({}, {"output_dir": "elsewhere"}, 'output_dir: "out" -> "elsewhere"'),
        ({}, {"sampling": {"prompts": ["a cat"]}}, "sampling: absent -> a table"),
        ({}, {"eval_datasets": EVAL}, "eval_datasets[0]: absent -> a table"),
        ({"ema": {}}, {"ema": {"decay": 0.99}}, "ema.decay: 0.999 -> 0.99"),
        (
            {"sampling": {"prompts": ["a cat"]}},
            {"sampling": {"prompts": ["a \x9bdog 猫"]}},
            'sampling.prompts[0].prompt: "a cat" -> "a \\x9bdog 猫"',
        ),
    ],
)
def test_what_may_change(resolved, before, now, line):
    assert lines(compare(resolved(before), resolved(now))) == ([line], [])


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        ({}, {"seed": 1}, "seed: 0 -> 1 (decides what each step sees)"),
        ({}, {"micro_batch_size_per_gpu": 2}, "micro_batch_size_per_gpu: 1 -> 2 (decides what each step sees)"),
        (
            {},
            {"dataset.directory.0.num_repeats": 2},
            "dataset.directory[0].num_repeats: 1.0 -> 2.0 (decides what each step sees)",
        ),
        (
            {},
            {"dataset.directory": [{"path": "data"}, {"path": "data"}]},
            "dataset.directory[1]: absent -> a table (decides what each step sees)",
        ),
        ({}, {"adapter.rank": 16}, "adapter.rank: 32 -> 16 (decides what is trained, and how it counts)"),
        ({}, {"adapter": {"type": "full"}}, 'adapter.type: "lora" -> "full" (decides what is trained, and how it'),
        ({}, {"model.dtype": "float32"}, 'model.dtype: "bfloat16" -> "float32" (decides what every step computes in)'),
        ({}, {"optimizer.type": "adamw_optimi"}, 'optimizer.type: "adamw" -> "adamw_optimi" (the optimizer\'s state'),
        ({}, {"optimizer.betas": [0.9, 0.95]}, "optimizer.betas: [0.9, 0.99] -> [0.9, 0.95] (the optimizer's state"),
        ({}, {"huber_delta": 0.1}, "huber_delta: absent -> 0.1 (decides what is minimised and measured"),
        ({}, {"model.shift": 3.0}, "model.shift: absent -> 3.0 (decides what is minimised and measured"),
        ({}, {"ema": {}}, "ema: absent -> a table (the average has to follow the weights from the first step on)"),
    ],
)
def test_what_may_not_change(resolved, before, now, line):
    allowed, refused = lines(compare(resolved(before), resolved(now)))
    assert allowed == []
    assert len(refused) == 1
    assert refused[0].startswith(line)


@pytest.mark.parametrize("key", RATES)
@pytest.mark.parametrize("other", [{}, {"optimizer.lr": 1e-5}])
def test_a_component_is_neither_frozen_nor_thawed(resolved, key, other):
    free, frozen = resolved(), resolved({f"model.{key}": 0.0, **other})
    for pair, line in (((free, frozen), "absent -> 0.0"), ((frozen, free), "0.0 -> absent")):
        changes = compare(*pair)
        assert [found.partition(" (")[0] for found in changes.refused] == [f"model.{key}: {line}"]
        assert [found.partition(":")[0] for found in changes.allowed] == list(other)


def test_a_component_is_not_thawed_by_the_rate_of_all(resolved):
    before = {"optimizer.lr": 0.0, "model.mlp_lr": 1e-4}
    changes = compare(resolved(before), resolved(before | {"optimizer.lr": 1e-4}))
    assert [line.partition(" (")[0] for line in changes.refused] == ["optimizer.lr: 0.0 -> 0.0001"]


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_rate_of_all_may_become_0_where_every_component_of_a_lora_has_its_own(resolved, adapter):
    """The rest of the model has no linear for a LoRA; it is trained with the whole model."""
    before = {"adapter": {"type": adapter}, **{f"model.{key}": 1e-4 for key in RATES}}
    changes = compare(resolved(before), resolved(before | {"optimizer.lr": 0.0}))
    assert (len(changes.allowed), len(changes.refused)) == ((1, 0) if adapter == "lora" else (0, 1))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"dataset.num_repeats": 1}),
        ({}, {"dataset.directory.0.resolutions": [1024]}),
        ({}, {"dataset.protected_tags": []}),
        ({"dataset.num_repeats": 2}, {"dataset.directory.0.num_repeats": 2}),
        ({"dataset.num_repeats": 2}, {"dataset.num_repeats": 3, "dataset.directory.0.num_repeats": 2}),
        ({}, {"adapter.alpha": 32.0}),
        ({}, {"model.transformer_dtype": "bfloat16"}),
    ],
)
def test_what_means_the_same_is_no_change(resolved, before, now):
    assert lines(compare(resolved(before), resolved(now))) == ([], [])


# Datasets in a resolved configuration, written when their options had no defaults of their own: only what was set.
WRITTEN_BEFORE = """
[dataset]
resolutions = [512]
num_repeats = 2.0
tag_dropout = 0.1
protected_tags = ["solo"]
max_bad_fraction = 0.01
[[dataset.directory]]
resolutions = [512, 1024]
path = "data"
hf_split = "train"
image_column = "image"
caption_column = "text"
natural_column = ""
mask_column = ""
[[dataset.directory]]
num_repeats = 1.0
crop_position = [0.5, 0.0]
tag_dropout = 0.0
path = "held"
hf_split = "train"
image_column = "image"
caption_column = "text"
natural_column = ""
mask_column = ""
[[eval_datasets]]
name = "held"
[eval_datasets.config]
num_repeats = 1.0
max_bad_fraction = 0.01
[[eval_datasets.config.directory]]
caption_mode = "nl"
path = "held"
hf_split = "train"
image_column = "image"
caption_column = "text"
natural_column = ""
mask_column = ""
"""


def test_datasets_as_an_older_version_wrote_them_are_the_same(project, resolved):
    (project.folder / "held").mkdir()
    changes = {
        "dataset.resolutions": [512],
        "dataset.num_repeats": 2,
        "dataset.protected_tags": ["solo"],
        "dataset.tag_dropout": 0.1,
        "dataset.directory": [
            {"path": "data", "resolutions": [512, 1024]},
            {"path": "held", "num_repeats": 1, "tag_dropout": 0, "crop_position": [0.5, 0]},
        ],
        "eval_datasets": [
            {"name": "held", "config": {"num_repeats": 1, "directory": [{"path": "held", "caption_mode": "nl"}]}}
        ],
    }
    now = resolved(changes)
    before = now | tomllib.loads(WRITTEN_BEFORE)
    assert lines(compare(before, now)) == ([], [])
    assert lines(compare(now, before)) == ([], [])
    # A default that is now written out is no difference, and a change holds where no directory has a key of its own.
    other = compare(before, resolved(changes | {"dataset.num_repeats": 3, "dataset.min_kept": 0.25}))
    assert lines(other) == ([], ["dataset.directory[0].num_repeats: 2.0 -> 3.0 (decides what each step sees)"])


def test_a_key_of_the_dataset_is_shown_where_it_holds(resolved):
    before = {"dataset.directory": [{"path": "data", "num_repeats": 2}, {"path": "data"}]}
    changes = compare(resolved(before), resolved(before | {"dataset.num_repeats": 3}))
    assert changes.refused == ["dataset.directory[1].num_repeats: 1.0 -> 3.0 (decides what each step sees)"]


@pytest.mark.parametrize(
    ("model", "licences"),
    [
        ({"type": "anima"}, "CircleStone Labs Non-Commercial License v1.2; NVIDIA Open Model License"),
        ({"type": "cosmos_predict2", "tiny_path": "tiny"}, "NVIDIA Open Model License"),
    ],
)
def test_the_licences_of_the_base_are_no_change_whether_written_or_not(resolved, model, licences):
    """Earlier versions wrote them into config.toml and states, later ones not, and now they are written again."""
    now = resolved({"model": model})
    assert now["metadata"]["license"] == licences
    without = now | {"metadata": {key: value for key, value in now["metadata"].items() if key != "license"}}
    for before in (now, without):
        assert lines(compare(before, now)) == ([], [])
    assert lines(compare(now, resolved({"model": model, "metadata.license": ""})))[0] != []


def with_default(data, table, location=()):
    """The location of every key in a resolved table that has a default, which an older version might not know."""
    for key, value in data.items():
        field = table.model_fields[key]
        if not field.is_required() and key != "type":
            yield (*location, key)
        items = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, item in items:
            if isinstance(item, dict) and (tables := list(tables_in(field))):
                inner = next(each for each in tables if item.keys() <= each.model_fields.keys())
                yield from with_default(item, inner, (*location, key) if index is None else (*location, key, index))


def test_a_key_that_an_older_version_did_not_have_counts_as_its_default(resolved):
    """For every key that a run leaves at its default."""
    now = resolved({"eval_datasets": EVAL, "sampling": {"prompts": ["a cat"]}, "lr_scheduler": "rex", "ema": {}})
    chosen = {
        "lr_scheduler",
        "eval_datasets",
        "sampling",
        "adapter",
        "ema",
        "path",
        "config",
        "epochs",
    }  # not at their defaults
    locations = [location for location in with_default(now, Config) if location[-1] not in chosen]
    assert len(locations) > 60
    for location in locations:
        before = copy.deepcopy(now)
        table = before
        for part in location[:-1]:
            table = table[part]
        del table[location[-1]]
        assert lines(compare(before, now)) == ([], []), location
        assert lines(compare(now, before)) == ([], []), location


@pytest.mark.parametrize("table", [(), ("dataset",), ("dataset", "directory", 0), ("adapter",), ("optimizer",)])
def test_a_key_that_this_version_does_not_have_is_shown_and_no_hindrance(resolved, table):
    before = resolved()
    inner = before
    for part in table:
        inner = inner[part]
    inner["old_key"] = 3
    changes = compare(before, resolved())
    assert changes.refused == []
    assert len(changes.allowed) == 1
    assert changes.allowed[0].endswith("old_key: 3 -> absent (not a key of this version)")


def test_secrets_are_not_shown(resolved):
    before, now = resolved(), resolved({"monitoring": {"enable_wandb": True, "wandb_api_key": SECRET}})
    assert "wandb_api_key" not in now["monitoring"]
    now["monitoring"]["wandb_api_key"] = SECRET
    changes = compare(before, now)
    assert "monitoring.enable_wandb: false -> true" in changes.allowed
    assert "monitoring.wandb_api_key: (not shown) -> (not shown)" in changes.allowed
    assert not any(SECRET in line for line in (*changes.allowed, *refusal(changes, "config.toml")))


def test_neither_side_is_changed(resolved):
    before, now = resolved(), resolved({"dataset.num_repeats": 2})
    copies = copy.deepcopy((before, now))
    compare(before, now)
    assert (before, now) == copies


def test_the_refusal_says_what_may_not_change_what_may_and_what_to_do(resolved):
    changes = compare(resolved(), resolved({"adapter.rank": 16, "optimizer.lr": 1e-3, "seed": 7}))
    assert refusal(changes, "out/cats/config.toml") == [
        "out/cats/config.toml: cannot resume: seed: 0 -> 7 (decides what each step sees)",
        "out/cats/config.toml: cannot resume: adapter.rank: 32 -> 16 (decides what is trained, and how it counts)",
        "may change: optimizer.lr: 0.0001 -> 0.001",
        "set back what may not change, or start another run with another run_name",
    ]
