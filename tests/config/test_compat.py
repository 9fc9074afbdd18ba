"""Keys of other trainers: noted, refused for now, or translated."""

import re

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


KEYS = [(key, off) for key, off in MAIN.off.items()]
KEYS += [(f"dataset.{key}", off) for key, off in DATASET.off.items()]
KEYS += [(f"dataset.directory.0.{key}", off) for key, off in DATASET.off.items()]


@pytest.mark.parametrize(("key", "off"), KEYS)
def test_a_key_for_later_is_accepted_only_where_it_says_off(project, key, off):
    if off is not None:
        assert project.load({key: off}).notes == ()
    path = key.replace(".0", "[0]")
    for value in (True, False, 0, 1, 0.5, "x", "", [1], {"a": 1}):
        if value == off and isinstance(value, bool) == isinstance(off, bool):
            continue
        assert project.problems({key: value}) == [f"main.toml: {path}: not supported yet; remove it"]


VALUES = [(key, value) for key, values in MAIN.not_yet.items() for value in values]


@pytest.mark.parametrize(("key", "value"), VALUES)
def test_a_value_for_later_is_refused_as_that(project, key, value):
    for written in (value, value.upper()):
        assert project.problems({key: written}) == [f'main.toml: {key}: found "{written}", which is not supported yet']


@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.parametrize("place", ["", "model.", "dataset.", "dataset.directory.0."])
def test_a_foreign_key_names_ours_wherever_it_stands(project, key, place):
    (problem,) = project.problems({f"{place}{key}": 1})
    assert problem == f"main.toml: {place}{key}: unknown key; {FOREIGN[key]}".replace(".0", "[0]")


OURS = {(place, key) for place, table in tables(Config) for key in table.model_fields}


def test_no_foreign_name_is_one_of_ours():
    ours = {key for place, key in OURS if "sampling" not in place}  # steps are a picture's there
    assert not {*FOREIGN, *MAIN.ignored, *DATASET.ignored} & ours


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
        ("sigmoid_scal", "; did you mean sigmoid_scale, in [model]?"),
        ("eval_dataset", "; did you mean eval_datasets?"),
        ("zzzzzz", ""),
        ("type", "; it belongs in [lr_scheduler] or in [model] or in [adapter] or in [optimizer]"),
    ],
)
def test_an_unknown_key_gets_the_most_likely_suggestion(project, key, hint):
    assert project.problems({key: 1}) == [f"main.toml: {key.replace('.0', '[0]')}: unknown key{hint}"]


def test_a_rank_beside_full_fine_tuning_is_explained(project):
    assert project.problems({"adapter": {"type": "full", "rank": 4, "rnak": 4}}) == [
        'main.toml: adapter.rank: unknown key of type "full"; only "lora" has it',
        "main.toml: adapter.rnak: unknown key; did you mean rank?",
    ]
