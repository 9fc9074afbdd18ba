"""Files of other kinds in the place of a configuration: one message, with what to write."""

import tomllib

import pytest

from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError

KOHYA = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 2

[[datasets]]
resolution = "768,768"
batch_size = 2
  [[datasets.subsets]]
  image_dir = 'C:\\new'
  num_repeats = 3
  flip_aug = true
  keep_tokens = 1
  [[datasets.subsets]]
  image_dir = 'other'
  is_reg = true

[[datasets]]
resolution = [512, 1024]
  [[datasets.subsets]]
  image_dir = 'third'
  color_aug = true
"""


@pytest.mark.parametrize("is_main", [True, False])
def test_a_dataset_of_kohya_is_answered_with_ours_to_paste(project, is_main):
    path = project.write("kohya.toml", KOHYA)
    if is_main:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        (problem,) = caught.value.problems
    else:
        (problem,) = project.problems({"dataset": "kohya.toml"})
    first, *lines = problem.split("\n")
    assert "is a dataset of kohya's sd-scripts" in first
    assert "without batch_size, color_aug" in first
    assert len(lines) == 1
    shared = {"keep_first_n_tags": 2, "shuffle_tags": True}
    assert tomllib.loads("\n".join(lines)) == {
        "directory": [
            {"path": "C:\\new", "num_repeats": 3, "horizontal_flip": True, "shuffle_tags": True,
             "keep_first_n_tags": 1, "resolutions": [768]},
            {"path": "other", "role": "regularization", "resolutions": [768], **shared},
            {"path": "third", "resolutions": [[512, 1024]], **shared},
        ]
    }  # fmt: skip


def test_what_is_pasted_is_taken(project):
    one_size = (
        KOHYA.replace("C:\\new", "data").replace("'other'", "'data'").partition("[[datasets]]\nresolution = [5")[0]
    )
    project.write("kohya.toml", one_size)
    (problem,) = project.problems({"dataset": "kohya.toml"})
    project.write("ours.toml", problem.partition("\n")[2])
    loaded = project.load({"dataset": "ours.toml"})
    assert loaded.train.settings.resolutions == [768]
    assert [loaded.train.settings.options(index).num_repeats for index in (0, 1)] == [3, 1]
    assert loaded.train.settings.options(1).role == "regularization"


@pytest.mark.parametrize(
    "text", ["datasets = 3\n[general]\n", "datasets = [1, 'a']\n", "[[datasets]]\nsubsets = [3]\nresolution = 'x'\n"]
)
def test_a_broken_dataset_of_kohya_is_answered_too(project, text):
    project.write("kohya.toml", text)
    (problem,) = project.problems({"dataset": "kohya.toml"})
    assert 'directory = [{ path = "data"' in problem


def test_what_is_left_out_of_a_dataset_of_kohya_is_said_and_what_is_pasted_is_toml(project):
    subsets = "".join(f"  [[datasets.subsets]]\n  image_dir = 'n{number}'\n" for number in range(7))
    foreign = "".join(f"color_{letter} = 1\n" for letter in "abcdefg")
    project.write("kohya.toml", f"[[datasets]]\nresolution = 640\n{foreign}{subsets}")
    (problem,) = project.problems({"dataset": "kohya.toml"})
    first, *lines = problem.split("\n")
    assert "(without color_a, color_b, color_c, color_d, color_e, ...)" in first
    assert lines[1].endswith("]  # and 3 directories more, to be added")
    assert tomllib.loads("\n".join(lines))["directory"] == [{"path": f"n{number}"} for number in range(4)]


def test_a_training_of_kohya_with_a_section_called_general_is_no_dataset(project):
    path = project.write(
        "training.toml",
        "[general]\npretrained_model_name_or_path = 'a'\noutput_name = 'b'\n[training]\nmax_train_epochs = 3\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    first, *others = caught.value.problems
    assert "is a configuration of kohya's sd-scripts" in first
    assert any(problem.startswith("training.toml: output_name: ") for problem in others)


def test_a_main_file_and_a_dataset_in_each_others_place_are_one_message_each(project):
    project.config(name="other.toml")
    (problem,) = project.problems({"dataset": "other.toml"})
    assert problem.startswith("other.toml: is a main file; a dataset has resolutions, [[directory]]")
    path = project.write("dataset.toml", "resolutions = [512]\n[[directory]]\npath = 'data'\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: is a dataset; the main file, such as configs/style_lora.toml, names it")
