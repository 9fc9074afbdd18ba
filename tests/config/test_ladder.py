"""The ladder: what it may set, in which order, and what it never touches."""

import tomllib

import pytest

from anima_train.adapters.full import Full
from anima_train.config.config import Config
from anima_train.config.ladder import CHANGE_RESULTS, LADDER_KEYS, rungs
from anima_train.config.load import load_config
from anima_train.config.resolved import config_toml

POLICY, SOME = "activation_checkpointing", "checkpointed_blocks"


@pytest.fixture
def ladder(project):
    """Gives the settings of each rung of a config."""

    def climb(changes=None, **options):
        return [dict(rung.settings) for rung in rungs(project.load(changes).config, 28, **options)]

    return climb


def test_auto_saves_activations_first_and_never_changes_results(ladder):
    found = ladder()
    between = [{POLICY: "selective", SOME: number} for number in (4, 8, 12, 16, 20, 24)]
    assert found[:10] == [{}, {POLICY: "selective"}, *between, {POLICY: True}, {POLICY: "offload"}]
    assert not any(key in CHANGE_RESULTS for settings in found for key in settings)
    assert found == ladder({"memory": "auto"})


@pytest.mark.parametrize("memory", ["auto", "fast", "low"])
@pytest.mark.parametrize("policy", [False, True, "selective", "offload"])
def test_what_is_written_stays(ladder, project, memory, policy):
    changes = {"memory": memory, POLICY: policy}
    assert all(POLICY not in settings for settings in ladder(changes))
    config = project.load(changes).config
    assert {rung.config.activation_checkpointing for rung in rungs(config, 28)} == {policy}


def test_blocks_between_selective_and_all_are_checkpointed_only_where_the_others_are_selective(ladder, project):
    assert [settings.get(SOME) for settings in ladder({POLICY: "selective"})][:7] == [None, 4, 8, 12, 16, 20, 24]
    for policy in (False, True, "offload"):
        assert all(SOME not in settings for settings in ladder({POLICY: policy}))
    written = {POLICY: "selective", SOME: 3}
    assert all(SOME not in settings for settings in ladder(written))
    assert {rung.config.checkpointed_blocks for rung in rungs(project.load(written).config, 28)} == {3}


def test_no_batch_size_is_ever_chosen():
    assert not [key for key in LADDER_KEYS if "batch" in key or "accumulation" in key]


@pytest.mark.parametrize("memory", ["auto", "fast", "low"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_every_rung_is_a_config_that_differs_in_its_settings_alone(project, memory, adapter):
    config = project.load({"memory": memory, "adapter.type": adapter}).config
    assert isinstance(config.adapter, Full) == (adapter == "full")
    found = rungs(config, 28)
    assert len(found) > 1
    before = config.model_dump()
    for rung in found:
        after = rung.config.model_dump()
        for key, value in rung.settings.items():
            table, _, name = key.rpartition(".")
            assert (after[table] if table else after)[name] == value
            (after[table] if table else after)[name] = (before[table] if table else before)[name]
        assert after == before
        assert Config.model_validate(rung.config.model_dump()) == rung.config


def test_low_begins_with_checkpointing(ladder):
    assert all(settings[POLICY] in (True, "offload") for settings in ladder({"memory": "low"}))


def test_a_ladder_whose_keys_are_all_written_has_one_rung(project):
    written = {key: value for key, value in Config.model_fields.items() if key in LADDER_KEYS}
    changes = {key: field.default for key, field in written.items()}
    found = rungs(project.load(changes | {"model.transformer_dtype": "bfloat16"}).config, 28)
    assert [dict(rung.settings) for rung in found] == [{}]


def test_the_config_of_a_run_leaves_free_what_was_not_written(project):
    """Else the ladder would do nothing when it is run again."""
    config = project.load().config
    again = project.write("again.toml", config_toml(config))
    assert [rung.settings for rung in rungs(load_config(again).config, 28)] == [
        rung.settings for rung in rungs(config, 28)
    ]
    assert tomllib.loads(config_toml(project.load({POLICY: False}).config))[POLICY] is False
