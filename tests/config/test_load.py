"""Every mistake at once, in the user's words; and what a correct config becomes."""

import datetime
import itertools
import math
import os
import shutil
import time
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import tomli_w

from anima_train.config.config import Config
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError
from anima_train.core.settings import is_settings, members_of, type_name
from anima_train.data.settings import DatasetSettings

EXAMPLES = Path(__file__).parents[1] / "data_files" / "diffusion_pipe"


def every_key(root, path, choice=None):
    """(key path, field, what must be set besides) for every key below a settings class."""
    choice = choice or {}
    for name, field in root.model_fields.items():
        yield f"{path}{name}", field, choice
        members = members_of(field.annotation)
        is_list = get_origin(members[0]) is list
        tables = [m for m in (members_of(get_args(members[0])[0]) if is_list else members) if is_settings(m)]
        for table in tables:
            inside = f"{path}{name}.0" if is_list else f"{path}{name}"
            if table is DatasetSettings:
                continue  # swept on its own, as its messages name its own file
            given = {inside: {"type": type_name(table)}} if len(tables) > 1 else {}
            yield from every_key(table, f"{inside}.", choice | given)


def accepted(annotation):
    """Python types of the TOML values that a key takes."""
    for member in members_of(annotation):
        if get_origin(member) is Literal:
            yield from map(type, get_args(member))
        elif is_settings(member):
            yield from (dict, str)  # text where a name or a path is short for a table; elsewhere it is wrong too
        else:
            yield get_origin(member) or member
            if member is float:
                yield int


VALUES = [datetime.date(2020, 1, 2), "1e-4", True, 3, 1.5, math.inf, math.nan, [[[]]], {"no such key": 1}]
MAIN_KEYS = list(every_key(Config, ""))
DATASET_KEYS = list(every_key(DatasetSettings, ""))


def wrong_values(field):
    types = set(accepted(field.annotation))
    return [v for v in VALUES if type(v) not in types or (isinstance(v, float) and not math.isfinite(v))]


def names(problem, file, key):
    """Whether a problem is that of a key: of its path, or of something inside."""
    path = key.replace(".0", "[0]")
    return any(problem.startswith(f"{file}: {path}{after}") for after in (":", ".", "["))


@pytest.mark.parametrize(("key", "field", "given"), MAIN_KEYS, ids=[key for key, *_ in MAIN_KEYS])
def test_no_key_of_the_main_file_takes_a_value_of_another_type(project, key, field, given):
    lists = {
        "eval_datasets": [{"name": "a", "config": {"directory": [{"path": "data"}]}}],
        "sampling": {"prompts": [{"prompt": "a"}]},
    }
    given = lists | given
    for value in wrong_values(field):
        changes = given | {key: value}
        if key.endswith(".type"):
            changes |= {key.rpartition(".")[0]: {"lr": 1.0} if key.startswith("optimizer") else {}}
            changes[key] = changes.pop(key)  # after its table
        problems = project.problems(changes)
        assert any(names(problem, "main.toml", key) for problem in problems), (value, problems)


@pytest.mark.parametrize(("key", "field", "given"), DATASET_KEYS, ids=[key for key, *_ in DATASET_KEYS])
@pytest.mark.parametrize("inline", [True, False], ids=["inline", "file"])
def test_no_key_of_a_dataset_takes_a_value_of_another_type(project, key, field, given, inline):
    assert not given
    for value in wrong_values(field):
        if inline:
            problems = project.problems({f"dataset.{key}": value})
            file = "main.toml: dataset."
        else:
            project.config({key: value}, "sets/dataset.toml", {"directory": [{"path": "data"}]})
            problems = project.problems({"dataset": "sets/dataset.toml"})
            file = "sets/dataset.toml: "
        path = key.replace(".0", "[0]")
        assert any(problem.startswith(f"{file}{path}{after}") for problem in problems for after in ":.["), (
            value,
            problems,
        )


@pytest.mark.parametrize("table", sorted({key.rpartition(".")[0] for key, *_ in MAIN_KEYS}))
def test_no_table_swallows_an_unknown_key(project, table):
    given = {
        "eval_datasets": [{"name": "a", "config": {"directory": [{"path": "data"}]}}],
        "sampling": {"prompts": [{"prompt": "a"}]},
    }
    if table.rpartition(".")[2] in (types := {"lr_scheduler": "cosine", "sampler": "heun", "schedule": "beta"}):
        given[table] = {"type": types[table.rpartition(".")[2]]}
    if table == "early_stopping":  # which needs something to watch
        given[table] = {"metric": "a/loss"}
    if table == "preservation":  # which needs a LoRA
        given["adapter"] = {"type": "lora"}
    path = f"{table}.zzzzzz" if table else "zzzzzz"
    (problem,) = project.problems(given | {path: 1})
    assert problem.partition("; ")[0] == f"main.toml: {path.replace('.0', '[0]')}: unknown key"


def test_the_sweep_sees_every_settings_class():
    swept = {key for key, *_ in MAIN_KEYS}
    assert {"seed", "model.llm_adapter_lr", "adapter.rank", "optimizer.betas", "lr_scheduler.power"} <= swept
    assert {"monitoring.wandb_api_key", "eval_datasets.0.name"} <= swept
    assert {"directory.0.path", "directory.0.min_ar", "max_bad_fraction"} <= {key for key, *_ in DATASET_KEYS}


def test_every_mistake_is_reported_at_once(project):
    project.write("data/cats/a.txt", "")
    project.write(
        "dataset.toml",
        """
        resolutions = ["512"]
        shuffle_tags = true
        [[directory]]
        path = "data/cats"
        min_arr = 0.5
        [[directory]]
        mask_path = "masks"
        """,
    )
    project.write("other.toml", "[[directory]]\npath = 'data/catz'\n")
    project.write(
        "main.toml",
        """
        output_dir = "out"
        dataset = "dataset.toml"
        epochs = "3"
        seed = true
        learning_rate = 1e-4
        huber_delta = 1.0
        pseudo_huber_c = 1.0
        lr_scheduler = "cosin"
        micro_batch_size_per_gpu = [[512, "4"]]
        eval_datasets = [{ name = "held out", config = "other.toml" }, { name = "b", config = "zoo.toml" }]
        [model]
        type = "anima"
        dtype = "fp16"
        shift = 3.0
        flux_shift = true
        lr = 1e-4
        [adapter]
        type = "oft"
        [optimizer]
        type = "adamw"
        betas = [0.9]
        [monitoring]
        enable_wandb = "yes"
        """,
    )
    with pytest.raises(ConfigError) as caught:
        load_config(Path("main.toml"), ["adapter.rank=x", "seed_=1"])
    assert sorted(caught.value.problems) == sorted(
        [
            "--set adapter.rank: the value is not TOML; text needs quotes: --set 'adapter.rank=\"x\"'",
            "--set seed_: unknown key; did you mean seed?",
            'main.toml: epochs: found "3" (text), expected an integer',
            "main.toml: seed: found true, expected an integer",
            "main.toml: learning_rate: unknown key; it is called lr, in [optimizer]",
            "main.toml: pseudo_huber_c: chooses another loss than huber_delta; keep one",
            'main.toml: lr_scheduler: found "cosin" (text), expected one of "constant", "linear", "cosine", '
            '"cosine_with_restarts", "polynomial", "wsd", "rex"; did you mean "cosine"?',
            'main.toml: micro_batch_size_per_gpu[0][1]: found "4" (text), expected an integer',
            'main.toml: model.dtype: found "fp16", which overflows in this model and trains to NaN; use "bfloat16"',
            "main.toml: model.flux_shift: excludes shift, which moves t too; keep one",
            "main.toml: model.lr: unknown key; it belongs in [optimizer]",
            'main.toml: adapter.type: found "oft", which is not supported yet; write "lora"',
            "main.toml: optimizer.lr: missing, and required",
            "main.toml: optimizer.betas: found [0.9] (a list), expected a list of 2 or more",
            'main.toml: monitoring.enable_wandb: found "yes" (text), expected true or false',
            'dataset.toml: resolutions[0]: found "512" (text), expected an integer or a list',
            "dataset.toml: directory[0].min_arr: unknown key; did you mean min_ar?",
            "dataset.toml: directory[1].path: missing, and required; set one of path and hf_dataset",
            'other.toml: directory[0].path: "data/catz" does not exist; did you mean "data/cats"?',
            'main.toml: eval_datasets[1].config: "zoo.toml" does not exist',
        ]
    )


def test_an_empty_file_lacks_everything_that_is_required(project):
    project.write("main.toml", "")
    with pytest.raises(ConfigError) as caught:
        load_config(Path("main.toml"))
    assert sorted(caught.value.problems) == [
        "main.toml: dataset: missing, and required",
        "main.toml: max_steps: neither epochs nor max_steps is set; set at least one",
        "main.toml: model: missing, and required",
        "main.toml: optimizer: missing, and required",
        "main.toml: output_dir: missing, and required",
    ]


POLICIES = 'expected true or false or "selective", "offload" or "unsloth"'


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("epochs", "3", 'found "3" (text), expected an integer'),
        ("epochs", True, "found true, expected an integer"),
        ("epochs", 3.0, "found 3.0 (a number), expected an integer"),
        ("epochs", 0, "found 0 (an integer), expected at least 1"),
        ("warmup_steps", -1, "found -1 (an integer), expected at least 0"),
        ("warmup_steps", 0.1, "found 0.1 (a number), expected an integer"),
        ("output_dir", 3, "found 3 (an integer), expected text in quotes"),
        ("output_dir", "", 'found "" (text), expected text of 1 or more characters'),
        ("optimizer.lr", "1e-4", 'found "1e-4" (text), expected a number'),
        ("optimizer.lr", math.inf, "found inf (a number), expected a finite number"),
        ("optimizer.lr", -math.inf, "found -inf (a number), expected a finite number"),
        ("optimizer.lr", math.nan, "found nan (a number), expected a finite number"),
        ("optimizer.lr", True, "found true, expected a number"),
        ("optimizer.lr", -1e-4, "found -0.0001 (a number), expected at least 0"),
        ("optimizer.betas", 0.9, "found 0.9 (a number), expected a list"),
        ("optimizer", "adamw", 'found "adamw" (text), expected a table'),
        ("uncond_fraction", 1.5, "found 1.5 (a number), expected at most 1"),
        ("activation_checkpointing", 1, f"found 1 (an integer), {POLICIES}"),
        ("seed", datetime.date(2020, 1, 2), 'found "2020-01-02" (date), expected an integer'),
        ("save_dtype", "int4", 'found "int4" (text), expected "bfloat16" or "float32"'),
        ("model.timestep_sample_method", 3, 'found 3 (an integer), expected "logit_normal" or "uniform"'),
        ("model", [], "found [] (a list), expected a table"),
        ("dataset", 3, "found 3 (an integer), expected text in quotes or a table"),
        ("eval_datasets", {}, "found a table, expected a list"),
        ("monitoring.wandb_api_key", 1234, "found an integer, expected text in quotes"),
        ("run_name", "x" * 100 + "\n", f'found "{"x" * 100}\\n", expected a plain name without any of '
         '/ \\ : * ? " < > |'),
        ("adapter.rank", {}, "found a table, expected an integer"),
        ("dataset.resolutions", [512.0], None),
        ("dataset.resolutions", ["512"], None),
    ],
)  # fmt: skip
def test_a_wrong_value_is_shown_with_what_was_expected(project, key, value, text):
    (problem,) = project.problems({key: value})
    assert problem.startswith(f"main.toml: {key}")
    if text is not None:
        assert problem == f"main.toml: {key}: {text}"


def test_long_values_are_shortened(project):
    (problem,) = project.problems({"epochs": "x" * 10_000})
    assert len(problem) < 120


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        [],
        [[512]],
        [[512, 0]],
        [[0, 4]],
        [[512, 4, 1]],
        [[]],
        "4",
        [[512, 4.0]],
        [[512, True]],
        4.0,
        [512, 4],
        {},
    ],
)
@pytest.mark.parametrize("key", ["micro_batch_size_per_gpu", "eval_micro_batch_size_per_gpu"])
def test_bad_batch_sizes_are_refused_once_and_by_name(project, key, value):
    problems = project.problems({key: value})
    assert problems
    assert all(problem.startswith(f"main.toml: {key}") for problem in problems)
    assert all("[list" not in problem and ".int" not in problem for problem in problems)


def test_a_resolution_with_two_batch_sizes_is_refused(project):
    assert project.problems({"micro_batch_size_per_gpu": [[512, 4], [512, 2]]}) == [
        "main.toml: micro_batch_size_per_gpu: found [[512, 4], [512, 2]] (a list), expected each resolution once"
    ]


OPTIMIZERS = '"adamw", "adamw_optimi", "adamw8bit", "schedule_free", "prodigy", "lion", "adafactor", "muon"'


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"optimizer.type": "adamww"},
            f'optimizer.type: found "adamww" (text), expected one of {OPTIMIZERS}; did you mean "adamw"?',
        ),
        ({"optimizer.type": 3}, f"optimizer.type: found 3 (an integer), expected one of {OPTIMIZERS}"),
        ({"optimizer.type": "AdamW8bitKahan"},
         'optimizer.type: found "AdamW8bitKahan", which is not one of ours: write "adamw8bit", which compensates '
         "bfloat16 weights"),
        ({"optimizer": {"type": "CAME", "lr": 1.0}},
         'optimizer.type: found "CAME", which is not one of ours: write "adafactor", which takes as little memory'),
        ({"optimizer.type": "Lione"},
         f'optimizer.type: found "Lione" (text), expected one of {OPTIMIZERS}; did you mean "lion"?'),
        ({"optimizer": {"type": "Lion", "lr": 1.0, "foreach": False}},
         'optimizer.foreach: unknown key; "lion" has lr, weight_decay, rounding, gradient_release, betas'),
        ({"optimizer": {"type": "Lion", "lr": 1.0, "momentum": 0.9}},
         'optimizer.momentum: unknown key of type "lion"; only "muon" has it'),
        ({"optimizer": {"lr": 1.0}}, f"optimizer.type: missing; expected one of {OPTIMIZERS}"),
        ({"adapter.type": "oft"}, 'adapter.type: found "oft", which is not supported yet; write "lora"'),
        ({"adapter.type": "Lora"}, 'adapter.type: found "Lora" (text), expected one of "lora", "lokr", "loha", "full"; '
         'did you mean "lora"?'),
        ({"adapter": {"type": "full", "rank": 4}},
         'adapter.rank: unknown key of type "full"; only "lora" and "lokr" and "loha" have it'),
        ({"lr_scheduler": {"type": "linear", "power": 2.0}},
         'lr_scheduler.power: unknown key of type "linear"; only "polynomial" has it'),
        ({"lr_scheduler": {"type": "polynomial", "power": "2"}},
         'lr_scheduler.power: found "2" (text), expected a number'),
        ({"lr_scheduler": {"type": "polynomial", "polynomial": 1}},
         'lr_scheduler.polynomial: unknown key; "polynomial" has min_factor, power'),
        ({"lr_scheduler": {"power": 2.0}},
         'lr_scheduler.type: missing; expected one of "constant", "linear", "cosine", "cosine_with_restarts", '
         '"polynomial", "wsd", "rex"'),
        ({"optimizer.adamw": 1}, 'optimizer.adamw: unknown key; "adamw" has lr, weight_decay, betas, eps'),
        ({"model.type": "Anima-2B"}, 'model.type: found "Anima-2B"; write "anima"'),
        ({"model.type": "anima_preview"}, 'model.type: found "anima_preview"; write "anima"'),
        ({"model.type": "Cosmos-Predict2"}, 'model.type: found "Cosmos-Predict2"; write "cosmos_predict2"'),
        ({"model.t5_path": "a"}, 'model.t5_path: unknown key of type "anima"; only "cosmos_predict2" has it'),
    ],
)  # fmt: skip
def test_choices_are_named_as_the_user_wrote_them(project, changes, problem):
    assert project.problems(changes) == [f"main.toml: {problem}"]


def test_a_secret_is_in_no_message(project):
    problems = project.problems({"monitoring.wandb_api_key": ["hunter2"], "epochs": "1"}, ["monitoring.x=1"])
    assert "hunter2" not in "\n".join(problems)


def test_keys_that_could_move_the_cursor_are_escaped(project):
    project.write("main.toml", '"a\\u001b[2J" = 1\n')
    with pytest.raises(ConfigError) as caught:
        load_config(Path("main.toml"))
    assert 'main.toml: "a\\u001b[2J": unknown key' in caught.value.problems
    assert all(problem.isprintable() for problem in caught.value.problems)


def test_every_missing_path_is_reported(project):
    project.write("models/anima.safetensors", "")
    found = project.problems(
        {
            "model.transformer_path": "models/anma.safetensors",
            "model.vae_path": "",
            "model.llm_path": "hf://no",
            "model.tokenizer_path": "~nobody/x",
            "dataset.directory": [{"path": "data", "mask_path": "dada"}, {"path": "main.toml"}],
            "eval_datasets": [{"name": "a", "config": "data"}],
            "output_dir": "models/anima.safetensors",
            "cache_dir": "main.toml",
        }
    )
    assert [problem.removeprefix("main.toml: ").partition(" ")[0] for problem in found] == [
        "model.transformer_path:",
        "model.vae_path:",
        "model.llm_path:",
        "model.tokenizer_path:",
        "dataset.directory[0].mask_path:",
        "dataset.directory[1].path:",
        "eval_datasets[0].config:",
        "output_dir:",
        "cache_dir:",
    ]
    assert found[4].endswith('"dada" does not exist; did you mean "data"?')
    assert found[5].endswith('"main.toml" is a file, expected a folder')
    assert found[6].endswith('"data" is a folder, expected a file')
    assert found[0].endswith('"models/anma.safetensors" does not exist; did you mean "models/anima.safetensors"?')
    assert "expected hf://owner/name[@revision]/path" in found[2]


def test_a_broken_dataset_file_is_named_itself(project):
    project.write("sets/dataset.toml", "a = = 1")
    (problem,) = project.problems({"dataset": "sets/dataset.toml", "eval_datasets": []})
    assert problem == "sets/dataset.toml: line 1: invalid value\n  a = = 1\n      ^"


@pytest.mark.parametrize("kind", ["flux", "wan", "cosmos", "s", ""])
def test_another_model_is_one_message_and_names_the_slots_of_anima(project, kind):
    keys = {"type": kind, "diffusers_path": "x", "clip_path": "y", "v_pred": True, "text_encoders": [{"path": "z"}]}
    assert project.problems({"model": keys}) == [
        f'main.toml: model.type: found "{kind}", but only Anima and Cosmos-Predict2 are trained here: write "anima", '
        'and its files as transformer_path, vae_path and llm_path (absent ones are downloaded), or "cosmos_predict2"'
    ]


def test_one_file_used_twice_is_reported_once(project):
    project.write("dataset.toml", "frame_buckets = [1]\nresolution = 512\n[[directory]]\npath = 'dta'\n")
    changes = {"dataset": "dataset.toml", "eval_datasets": [{"name": "a", "config": "dataset.toml"}]}
    assert project.problems(changes) == ["dataset.toml: resolution: unknown key; it is called resolutions, a list, in "
                                         "the dataset"]  # fmt: skip
    project.write("dataset.toml", "frame_buckets = [1]\n[[directory]]\npath = 'data'\n")
    assert project.load(changes).notes == ("dataset.toml: frame_buckets: has no effect, as videos are not trained",)


@pytest.mark.parametrize("inline", [True, False])
def test_a_dataset_follows_the_same_rules_in_a_file_and_inline(project, inline):
    table = {"resolutions": [512], "directory": [{"path": "data", "num_repeats": 2}, {"path": "data"}]}
    value = table if inline else "sets/dataset.toml"
    project.write("sets/dataset.toml", tomli_w.dumps(table))
    loaded = project.load({"dataset": value, "eval_datasets": [{"name": "held out", "config": value}]})
    (held_out,) = loaded.evals
    assert (loaded.train.name, held_out.name) == ("train", "held out")
    assert loaded.train.settings == held_out.settings == DatasetSettings.model_validate(table)
    assert loaded.train.folders == (Path("data"), Path("data"))
    assert loaded.config.dataset == loaded.train.settings
    assert loaded.config.eval_datasets[0].config == held_out.settings


def test_paths_are_looked_up_beside_the_file_that_names_them(project):
    for name in ("project/sets/cats/a.txt", "project/sets/masks/a.txt", "project/vae.safetensors", "here/a.txt"):
        project.write(name, "")
    project.write(
        "project/sets/dataset.toml", "[[directory]]\npath = 'cats'\nmask_path = 'masks'\n[[directory]]\npath = 'here'\n"
    )
    path = project.config({"dataset": "sets/dataset.toml", "model.vae_path": "vae.safetensors"}, "project/main.toml")
    loaded = load_config(path.relative_to(project.folder))
    assert loaded.train.folders == (Path("project/sets/cats"), Path("here"))
    assert loaded.train.masks == (Path("project/sets/masks"), None)
    assert loaded.config.model.vae_path == "project/vae.safetensors"
    assert loaded.config.model.llm_path is None


def test_caches_lie_beside_the_data_or_in_cache_dir(project):
    assert [cache.folder for cache in project.load().train.caches] == [Path("data/.anima_cache")]
    loaded = project.load({"cache_dir": "caches"})
    assert [cache.folder for cache in loaded.train.caches] == [Path("caches")]


def test_the_resolved_config_loads_to_itself_from_anywhere_in_the_same_project(project):
    for name in ("project/sets/cats/a.txt", "project/vae.safetensors"):
        project.write(name, "")
    project.write("project/sets/dataset.toml", "[[directory]]\npath = 'cats'\nresolutions = [512]\n")
    changes = {
        "dataset": "sets/dataset.toml",
        "eval_datasets": [{"name": "a", "config": "sets/dataset.toml"}],
        "model.vae_path": "vae.safetensors",
        "lr_scheduler": {"type": "wsd", "decay_fraction": 0.5},
        "run_name": "run",
    }
    first = load_config(project.config(changes, "project/main.toml").relative_to(project.folder))
    resolved = project.write("out/run/config.toml", tomli_w.dumps(first.config.model_dump(exclude_none=True)))
    second = load_config(resolved)
    assert second.config == first.config
    assert second.train.folders == first.train.folders


def test_the_home_folder_is_resolved_in_folders_that_are_made(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project.folder))
    config = project.load({"output_dir": "~/out", "cache_dir": "~/cache", "model.tiny_path": "~/tiny"}).config
    assert (config.output_dir, config.cache_dir, config.model.tiny_path) == tuple(
        str(project.folder / name) for name in ("out", "cache", "tiny")
    )


def test_references_to_the_hub_are_left_alone(project):
    reference = "hf://circlestone-labs/Anima/split_files/vae/qwen_image_vae.safetensors"
    assert project.load({"model.vae_path": reference}).config.model.vae_path == reference


def test_a_run_is_named_after_the_config_and_the_time(project):
    first, second = project.load().run_name, project.load({"run_name": "mine"}).run_name
    assert first.startswith("main-20")
    assert len(first) == len("main-20260101-000000")
    assert second == "mine"


def test_the_same_directory_can_stand_twice(project):
    loaded = project.load({"dataset.directory": [{"path": "data"}, {"path": "data", "resolutions": [512]}]})
    assert len(loaded.train.folders) == 2


def test_a_diffusion_pipe_config_runs_with_only_its_paths_changed(project):
    for name in ("diffusion_pipe_main.toml", "diffusion_pipe_dataset.toml"):
        shutil.copy(EXAMPLES / name, name)
    for name in ("anima-preview.safetensors", "qwen_image_vae.safetensors", "qwen_3_06b_base.safetensors"):
        project.write(f"elsewhere/models/{name}", "")
    for name in ("style", "style_masked/masks"):
        os.makedirs(f"elsewhere/data/{name}")
    for name in ("diffusion_pipe_main.toml", "diffusion_pipe_dataset.toml"):
        text = Path(name).read_text()
        project.write(name, text.replace("'models/", "'elsewhere/models/").replace("'data/", "'elsewhere/data/"))

    loaded = load_config(Path("diffusion_pipe_main.toml"))

    assert [note.split(": ")[:2] for note in loaded.notes] == [
        ["diffusion_pipe_main.toml", key]
        for key in (
            "pipeline_stages", "eval_gradient_accumulation_steps", "partition_method", "steps_per_print",
            "video_clip_mode",
        )
    ] + [["diffusion_pipe_dataset.toml", "frame_buckets"]]  # fmt: skip
    config = loaded.config
    assert config.micro_batch_size_per_gpu == [[512, 4], [1024, 1]]
    assert config.eval_batch_sizes() == 1
    assert config.learning_rates().by_component == {
        "self_attn": 2e-5, "cross_attn": 2e-5, "mlp": 2e-5, "mod": 1e-5, "llm_adapter": 0, "base": 2e-5
    }  # fmt: skip
    assert config.timesteps().sigmoid_scale == 1.3
    assert loaded.train.masks == (None, Path("elsewhere/data/style_masked/masks"))
    assert [loaded.train.settings.options(index).num_repeats for index in (0, 1)] == [2, 0.5]
    assert [loaded.train.settings.options(index).resolutions for index in (0, 1)] == [[512, 1024], [512]]


def test_a_diffusion_pipe_config_without_its_paths_has_no_other_problem(project):
    for name in ("diffusion_pipe_main.toml", "diffusion_pipe_dataset.toml"):
        shutil.copy(EXAMPLES / name, name)
    with pytest.raises(ConfigError) as caught:
        load_config(Path("diffusion_pipe_main.toml"))
    keys = [problem.split(": ")[1] for problem in caught.value.problems]
    assert keys == [
        "model.transformer_path", "model.vae_path", "model.llm_path",
        "directory[0].path", "directory[1].path", "directory[1].mask_path",
    ]  # fmt: skip


def test_every_subset_of_two_mistakes_is_reported_whole(project):
    mistakes = {
        "max_steps": "3",
        "seed": -1,
        "pseudo_huber_c": 0.0,
        "model.flux_shif": True,
        "optimizer.lr": "x",
        "adapter.rank": 0,
        "dataset.resolutions": [],
        "monitoring.tensorboard": 0,
    }
    for first, second in itertools.combinations(mistakes, 2):
        problems = project.problems({first: mistakes[first], second: mistakes[second]})
        assert sorted(problem.split(": ")[1] for problem in problems) == sorted([first, second])


# What a directory is


def directory_of(project, keys, **more):
    """A loaded dataset with this one directory."""
    loaded = project.load({"dataset.directory": [keys], **more})
    return loaded.train


@pytest.mark.parametrize("name", ["x.parquet", "table"])
def test_a_dataset_on_this_machine_is_found_as_a_folder_is(project, name):
    if name == "table":
        (project.folder / "table").mkdir()
    else:
        project.write(name, "")
    train = directory_of(project, {"hf_dataset": name})
    assert train.folders == (Path(name),)
    assert train.settings.directory[0].hf_dataset == name
    assert train.caches[0].folder == (Path(name) if name == "table" else Path()) / ".anima_cache"


def test_a_dataset_is_looked_for_beside_its_file_too(project):
    project.write("sets/x.parquet", "")
    project.write("sets/dataset.toml", '[[directory]]\nhf_dataset = "x.parquet"\n')
    loaded = project.load({"dataset": "sets/dataset.toml"})
    assert loaded.train.folders == (Path("sets/x.parquet"),)


def test_a_dataset_of_the_hub_has_its_cache_in_the_output_folder(project):
    train = directory_of(project, {"hf_dataset": "owner/some-name_1.0"}, offline=True)
    assert train.folders == (Path("owner/some-name_1.0"),)
    assert train.caches[0].folder == Path("out/.anima_cache")
    assert train.offline
    assert not directory_of(project, {"hf_dataset": "owner/name"}).offline
    train = directory_of(project, {"hf_dataset": "owner/name"}, cache_dir="elsewhere")
    assert train.caches[0].folder == Path("elsewhere")


@pytest.mark.parametrize("name", ["name", "a/b/c", "gone.parquet", "owner/na me", "/owner/name"])
def test_what_is_neither_here_nor_a_name_on_the_hub_is_refused(project, name):
    assert project.problems({"dataset.directory": [{"hf_dataset": name}]}) == [
        f'main.toml: dataset.directory[0].hf_dataset: "{name}" is neither here nor owner/name, as on the Hub'
    ]


def test_a_directory_is_one_thing(project):
    tables = [
        {"path": "data", "hf_dataset": "owner/name"},
        {},
        {"hf_dataset": "owner/name", "mask_path": "data"},
        {"path": "data", "hf_split": "test", "caption_column": "prompt", "mask_column": "mask"},
    ]
    key = "main.toml: dataset.directory"
    problems = project.problems({"dataset.directory": tables})
    assert problems[0] == f"{key}[0].path: excludes hf_dataset; set one of path and hf_dataset"
    assert problems[1] == f"{key}[1].path: missing, and required; set one of path and hf_dataset"
    assert problems[2] == f"{key}[2].mask_path: excludes hf_dataset; name the column of its masks in mask_column"
    assert problems[3:] == [
        f"{key}[3].{name}: needs hf_dataset, which is not set" for name in ("hf_split", "caption_column", "mask_column")
    ]


def test_keys_of_folders_have_no_effect_on_a_dataset(project):
    keys = ("recursive", "kohya_folders", "tars", "captions_per_line")
    loaded = project.load({"dataset.directory": [{"hf_dataset": "owner/name", **dict.fromkeys(keys, True)}]})
    assert [note for note in loaded.notes if "hf_dataset" in note] == [
        f"main.toml: dataset.directory[0]: {key} has no effect, because hf_dataset is no folder" for key in keys
    ]


def test_a_path_may_be_an_archive(project):
    project.write("x.tar", "")
    project.write("masks.TAR", "")
    train = directory_of(project, {"path": "x.tar", "mask_path": "masks.TAR"})
    assert train.folders == (Path("x.tar"),)
    assert train.masks == (Path("masks.TAR"),)
    assert train.caches[0].folder == Path(".anima_cache")


def test_a_path_that_is_neither_folder_nor_archive_is_refused(project):
    project.write("x.zip", "")
    (project.folder / "folder.tar").mkdir()
    assert directory_of(project, {"path": "folder.tar"}).folders == (Path("folder.tar"),)
    first, second = project.problems({"dataset.directory": [{"path": "x.zip"}, {"path": "gone.tar"}]})
    assert first.startswith('main.toml: dataset.directory[0].path: "x.zip" is a file')
    assert second.startswith('main.toml: dataset.directory[1].path: "gone.tar" does not exist')


@pytest.mark.parametrize(
    ("written", "meant"),
    [("AdamW", "adamw"), ("AdamW_Optimi", "adamw_optimi"), ("AdamW8bit", "adamw8bit"), ("Prodigy", "prodigy"),
     ("Schedule-Free", "schedule_free"), ("MUON", "muon"), ("Adafactor", "adafactor")],
)  # fmt: skip
def test_an_optimizer_has_its_name_in_any_spelling(project, written, meant):
    loaded = project.load({"optimizer": {"type": written, "lr": 1e-4}})
    assert loaded.config.optimizer.type == meant


def test_twenty_thousand_unknown_keys_are_all_named_within_seconds(tmp_path):
    path = tmp_path / "many.toml"
    path.write_text("".join(f"unknown_key_{number} = {number}\n" for number in range(20_000)))
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert time.process_time() - started < 20  # it took minutes where each key was compared with all there are
    assert sum("unknown key" in problem for problem in caught.value.problems) == 20_000


@pytest.mark.parametrize("key", ["output_dir", "cache_dir", "model.tiny_path", "dataset.directory"])
def test_a_name_that_no_disk_takes_is_refused(project, key):
    name = "n" * 300
    (problem,) = project.problems({key: [{"path": name}] if key == "dataset.directory" else name})
    assert "more than 255 bytes" in problem or "File name too long" in problem


def test_a_run_named_by_its_config_has_a_name_with_room_for_what_is_added(trainer):
    config = trainer.config(run_name=None)
    config = config.rename(config.with_name("n" * 250 + ".toml"))
    assert len(load_config(config).run_name) < 150
