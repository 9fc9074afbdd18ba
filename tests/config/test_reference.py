"""The reference files say what the classes say."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from anima_train.config.changes import at_resume, key_names
from anima_train.config.config import Config
from anima_train.config.reference import write_reference
from anima_train.core.settings import tables
from anima_train.data.settings import DatasetSettings, Directory

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = ("reference.toml", "reference_dataset.toml", "schema.json", "schema_dataset.json")
TABLES = {
    "reference.toml": [table for _, table in tables(Config) if table not in (DatasetSettings, Directory)],
    "reference_dataset.toml": [table for _, table in tables(DatasetSettings)],
}


@pytest.mark.parametrize("name", FILES)
def test_the_files_in_configs_are_up_to_date(tmp_path, name):
    written = write_reference(tmp_path)
    assert [path.name for path in written] == list(FILES)
    assert (tmp_path / name).read_text() == (CONFIGS / name).read_text(), "run `anima reference`"


@pytest.mark.parametrize("name", TABLES)
def test_every_key_is_there_with_its_meaning(name):
    text = (CONFIGS / name).read_text()
    prose = " ".join(line.removeprefix("# ") for line in text.splitlines())
    for table in TABLES[name]:
        for key, field in table.model_fields.items():
            assert f"# {key} = (" in text or f"#{key} = " in text or re.search(rf"[\[.]{key}\]", text)
            if key != "type":
                assert " ".join(field.description.split()) in prose


@pytest.mark.parametrize("root", [Config, DatasetSettings])
def test_every_key_has_a_description(root):
    for _, table in tables(root):
        for key, field in table.model_fields.items():
            has_choices = key == "type" and not field.is_required()
            assert has_choices or field.description, f"{table.__name__}.{key}"


def blocks(text):
    """(table header, its default lines uncommented) for each table shown; the first is the top of the file."""
    found = [("", [])]
    for line in text.splitlines():
        if re.match(r"#\[", line):
            found.append((line[1:], []))
        elif re.match(r"#\w", line):
            found[-1][1].append(line[1:])
        else:
            assert line == "" or line.startswith("# ")
    return found


def value_of(header, lines):
    """A table as TOML reads it."""
    table = tomllib.loads("\n".join([header, *lines]))
    for key in re.findall(r"\w+", header):
        table = table[key]
        table = table[0] if isinstance(table, list) else table
    return table


REQUIRED = {
    "": {"output_dir": "out", "dataset": {"directory": [{"path": "data"}]}, "epochs": 1},
    "[model]": {"type": "anima"},
    "[optimizer]": {"type": "adamw", "lr": 1e-4},
    "[sampling]": {"prompts": ["a"]},
}


def complete(header, lines):
    """A whole config with one table as the reference shows it."""
    data = {key: value for part in ("",) for key, value in REQUIRED[part].items()}
    data |= {header.strip("[]"): value for header, value in REQUIRED.items() if header}
    shown = value_of(header, lines)
    if header == "":
        return data | shown
    if header == "[[eval_datasets]]":
        return data | {"eval_datasets": [shown | {"name": "a", "config": "b"}]}
    if header == "[early_stopping]":  # needs what is evaluated
        sets = [{"name": "a", "config": "b"}]
        return data | {"eval_datasets": sets, "eval_every_n_steps": 1, "early_stopping": {"metric": "a/loss"} | shown}
    if header == "[preservation]":  # needs a LoRA
        return data | {"adapter": {"type": "lora"}, "preservation": shown}
    name, *inside = header.strip("[]").split(".")
    if name != "sampling":
        return data | {name: REQUIRED.get(header, {}) | shown}
    prompt = {"prompt": "a"}
    sampling = {"prompts": [prompt]}
    table = prompt if inside[:1] == ["prompts"] else sampling
    for part in inside[1:] if inside[:1] == ["prompts"] else inside:
        table = table.setdefault(part, {})
    table.update(shown)
    return data | {"sampling": sampling}


BLOCKS = blocks((CONFIGS / "reference.toml").read_text())


@pytest.mark.parametrize(("header", "lines"), BLOCKS, ids=[f"{header}{lines[:1]}" for header, lines in BLOCKS])
def test_uncommented_defaults_load_to_the_defaults(header, lines):
    shown = Config.model_validate(complete(header, lines))
    without = [line for line in lines if line.startswith("type = ")]
    assert shown == Config.model_validate(complete(header, without))


def test_all_uncommented_defaults_load_together():
    data = complete("", BLOCKS[0][1])
    del data["lr_scheduler"]  # which is shown as a table too
    for header, lines in BLOCKS[1:]:
        if header not in ("[[eval_datasets]]", "[early_stopping]", "[preservation]") and "." not in header:
            name = header.strip("[]")
            data[name] = REQUIRED.get(header, {}) | value_of(header, lines)
    Config.model_validate(data)


def test_uncommented_defaults_of_a_dataset_load_to_the_defaults():
    (_, top), (header, lines) = blocks((CONFIGS / "reference_dataset.toml").read_text())
    assert header == "[[directory]]"
    directory = {"directory": [{"path": "data"} | value_of(header, lines)]}
    shown = DatasetSettings.model_validate(tomllib.loads("\n".join(top)) | directory)
    assert shown == DatasetSettings.model_validate({"directory": [{"path": "data"}]})


@pytest.mark.parametrize("choice", [table for _, table in tables(Config) if "type" in table.model_fields])
def test_every_choice_is_shown(choice):
    kind = choice.model_fields["type"].default
    assert choice.model_fields["type"].is_required() or any(f'type = "{kind}"' in lines for _, lines in BLOCKS)


def fits(value, schema, definitions):
    """Whether a value fits a JSON schema, as far as our schemas go: types, choices, tables and their keys."""
    if "$ref" in schema:
        return fits(value, definitions[schema["$ref"].rpartition("/")[2]], definitions)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return any(fits(value, member, definitions) for member in schema[union])
    if "const" in schema:
        return value == schema["const"]
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        if not isinstance(value, dict):
            return False
        properties = schema.get("properties", {})
        return set(schema.get("required", ())) <= value.keys() <= properties.keys() and all(
            fits(value[key], properties[key], definitions) for key in value
        )
    if kind == "array":
        return isinstance(value, list) and all(fits(item, schema["items"], definitions) for item in value)
    types = {"string": str, "boolean": bool, "integer": int, "number": int | float, "null": type(None)}
    return isinstance(value, types[kind]) and (kind == "boolean" or not isinstance(value, bool))


RECIPES = sorted(path for path in CONFIGS.glob("*.toml") if not path.name.startswith("reference"))


@pytest.mark.parametrize("path", RECIPES, ids=[path.name for path in RECIPES])
def test_our_configs_fit_the_schema_that_editors_check_them_with(path):
    data = tomllib.loads(path.read_text())
    schema = json.loads((CONFIGS / ("schema.json" if "model" in data else "schema_dataset.json")).read_text())
    assert fits(data, schema, schema["$defs"])


@pytest.mark.parametrize(
    "change", [{"seed": "0"}, {"no_such_key": 1}, {"lr_scheduler": 3}, {"adapter": {"type": "lora", "rnk": 1}}]
)
def test_the_schema_refuses_what_the_loader_refuses(change):
    data = tomllib.loads((CONFIGS / "quickstart.toml").read_text())
    schema = json.loads((CONFIGS / "schema.json").read_text())
    assert fits(data, schema, schema["$defs"])
    assert not fits(data | change, schema, schema["$defs"])


def test_the_schema_has_the_descriptions():
    schema = json.loads((CONFIGS / "schema.json").read_text())
    assert schema["properties"]["seed"]["description"] == "Everything random follows from it."
    assert all("description" in entry for entry in schema["properties"].values())


def test_the_reference_says_what_may_not_change_when_a_run_is_resumed():
    """The sentence stands where `anima_train.config.changes` refuses the key, and nowhere else."""
    fixed = {name for name in key_names(Config) if at_resume(name) == "Fixed at --resume."}
    assert {"seed", "adapter.rank", "dataset.directory.num_repeats", "optimizer.betas"} <= fixed
    assert not {"epochs", "optimizer.lr", "sampling.seed", "eval_datasets.config.num_repeats"} & fixed
    assert at_resume("model.mlp_lr") == "At --resume neither from 0 nor to 0."
    for entry in (CONFIGS / "reference_dataset.toml").read_text().split("\n\n")[1:]:
        *comment, line = [line.removeprefix("# ") for line in entry.splitlines()]
        key = re.match(r"#?(\w+) = ", line)
        if key is not None:
            place = "dataset." if key[1] in DatasetSettings.model_fields else "dataset.directory."
            assert " ".join(comment).endswith("Fixed at --resume.") == (f"{place}{key[1]}" in fixed), key[1]
