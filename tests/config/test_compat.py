"""Keys of other trainers: noted, refused for now, or translated."""

import re
import tomllib
from pathlib import Path

import pytest

from anima_train.config.compat import DATASET, FOREIGN, MAIN
from anima_train.config.config import Config
from anima_train.core.settings import tables


@pytest.mark.parametrize("key", MAIN.ignored)
def test_a_key_without_meaning_gets_one_note(project, key):
    loaded = project.load({key: 1})
    assert loaded.notes == (f"main.toml: {key}: has no effect, as {MAIN.ignored[key]}",)


def test_a_video_key_gets_one_note_where_it_stands(project):
    loaded = project.load({"dataset.directory.0.frame_buckets": [1, 33], "dataset.frame_buckets": [1]})
    assert loaded.notes == (
        "main.toml: dataset.frame_buckets: has no effect, as videos are not trained",
        "main.toml: dataset.directory[0].frame_buckets: has no effect, as videos are not trained",
    )


@pytest.mark.parametrize("model", [{"type": "anima"}, {"type": "cosmos_predict2", "tiny_path": "tiny"}])
def test_a_key_that_says_off_is_as_if_it_were_absent(project, model):
    for key, off in MAIN.off.items():
        without, given = (project.load({"model": dict(model)} | more) for more in ({}, {key: off}))
        assert (given.config, given.notes) == (without.config, ())


VALUES = [(key, value, text) for key, values in MAIN.not_yet.items() for value, text in values.items()]


@pytest.mark.parametrize(("key", "value", "text"), VALUES)
def test_a_value_for_later_is_refused_as_that(project, key, value, text):
    written = value.upper()
    assert project.problems({key: written}) == [
        f'main.toml: {key}: found "{written}", which is not supported yet; {text}'
    ]


@pytest.mark.parametrize("key", MAIN.instead)
def test_the_values_of_other_trainers_are_refused_with_ours(project, key):
    for value, text in MAIN.instead[key].items():
        written = value.upper().replace("_", "-")
        assert MAIN.value_fault(key, value) == f'found "{value}", which is not one of ours: {text}'
        assert MAIN.value_fault(key, written) == f'found "{written}", which is not one of ours: {text}'
    (problem,) = project.problems({key: written})
    assert problem == f"main.toml: {key}: {MAIN.value_fault(key, written)}"


@pytest.mark.parametrize("key", MAIN.instead)
def test_no_value_of_ours_is_taken_for_one_of_other_trainers(key):
    field = Config
    for name in key.split("."):
        field = field.model_fields[name].annotation if isinstance(field, type) else field
    ours = {str(each) for each in re.findall(r"'(\w+)'", str(field))}
    assert not ours & MAIN.instead[key].keys()


@pytest.mark.parametrize("written", ["torch.optim.SGD", "pytorch_optimizer.CAME", "bitsandbytes.optim.PagedAdamW8bit"])
def test_a_class_of_another_library_is_known_by_its_name(project, written):
    (problem,) = project.problems({"optimizer.type": written})
    assert problem.startswith(f'main.toml: optimizer.type: found "{written}", which is not one of ours: write "')


@pytest.mark.parametrize("place", ["", "model.", "dataset.", "dataset.directory.0."])
def test_each_foreign_key_names_ours_wherever_it_stands(project, place):
    shown = place.replace(".0", "[0]")
    problems = project.problems({f"{place}{key}": 1 for key in FOREIGN})
    if not place:  # so many of kohya's make the file one of kohya's
        assert "kohya" in problems.pop(0)
    assert problems == [f"main.toml: {shown}{key}: unknown key; {text}" for key, text in FOREIGN.items()]


def test_every_documented_key_of_kohya_in_the_example_has_a_hint(project):
    example = tomllib.loads((DATA / "kohya.toml").read_text(encoding="utf-8"))
    problems = project.problems(example)
    assert problems[0].startswith("main.toml: is a configuration of kohya's sd-scripts")
    ours = {key for _, key in OURS}
    for key in example.keys() - ours:
        (problem,) = [each for each in problems if each.startswith(f"main.toml: {key}: ")]
        assert "unknown key; " in problem
        assert "did you mean" not in problem


def test_the_sections_of_kohyas_files_are_looked_into(project):
    sections = {"model_arguments": {"qwen3": "x"}, "training_arguments": {"network_dim": 4, "max_train_epochs": 1}}
    assert project.problems(sections)[1:] == [
        f"main.toml: {key}: unknown key; {FOREIGN[key]}" for key in ("qwen3", "network_dim", "max_train_epochs")
    ]


DATA = Path(__file__).parents[1] / "data_files"
OURS = {(place, key) for place, table in tables(Config) for key in table.model_fields}


def test_no_foreign_name_is_one_of_ours():
    ours = {key for place, key in OURS if "sampling" not in place}  # steps are a picture's there
    assert not {*FOREIGN, *MAIN.ignored, *DATASET.ignored} & ours


def test_the_key_of_musubi_for_some_blocks_is_ours_for_some_blocks(project):
    said = 'it is called checkpointed_blocks, with activation_checkpointing = "selective"'
    assert project.problems({"blocks_to_checkpoint": 9}) == [f"main.toml: blocks_to_checkpoint: unknown key; {said}"]
    project.load({"checkpointed_blocks": 9, "activation_checkpointing": "selective"})


def test_every_name_of_ours_that_is_promised_exists():
    promised = [re.match(r"it is called (\w+)(?:, (in \[\w+\]))?", text) for text in FOREIGN.values()]
    for match in filter(None, promised):
        name, place = match.groups()
        assert name in {key for where, key in OURS if place in (None, where)}, match[0]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("resolutions", "; it belongs in the dataset"),
        ("model.resolutions", "; it belongs in the dataset"),
        ("lr", "; it belongs in [optimizer]"),
        ("rank", "; it belongs in [adapter]"),
        ("dtype", "; it belongs in [model] or in [adapter]"),
        ("optimizer.dtype", "; it belongs in [model] or in [adapter]"),
        ("monitoring.epochs", "; it belongs at the top of the file, above the first [table]"),
        ("optimizer.model", "; it belongs at the top of the file, above the first [table]"),
        ("dataset.epochs", "; it belongs in the main file"),
        ("dataset.path", "; it belongs in [[directory]]"),
        ("dataset.directory.0.max_bad_fraction", "; it belongs outside of [[directory]]"),
        ("adapter.rnak", "; did you mean rank?"),
        ("adapter.Rank", "; did you mean rank?"),
        ("max-steps", "; did you mean max_steps?"),
        ("Learning-Rate", "; it is called lr, in [optimizer]"),
        ("guidance_scale", "; it is called cfg, in [sampling]"),
        ("sigmoid_scal", "; did you mean sigmoid_scale, in [model]?"),
        ("eval_dataset", "; did you mean eval_datasets?"),
        ("zzzzzz", ""),
        ("attn_mode", "; it is called attention"),
        ("attn_method", ""),  # far from caption_mode, though most letters are in it
        ("batch_size_per_gpu", "; did you mean micro_batch_size_per_gpu?"),
        ("num_buckets", "; did you mean num_ar_buckets, in [dataset]?"),
        ("type", "; it belongs in [lr_scheduler] or in [model] or in [adapter] or in [optimizer]"),
    ],
)
def test_an_unknown_key_gets_the_most_likely_suggestion(project, key, hint):
    assert project.problems({key: 1}) == [f"main.toml: {key.replace('.0', '[0]')}: unknown key{hint}"]


def test_a_rank_beside_full_fine_tuning_is_explained(project):
    assert project.problems({"adapter": {"type": "full", "rank": 4, "rnak": 4}}) == [
        'main.toml: adapter.rank: unknown key of type "full"; only "lora" and "lokr" and "loha" have it',
        "main.toml: adapter.rnak: unknown key; did you mean rank?",
    ]
