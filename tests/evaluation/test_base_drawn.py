"""Sets of captions alone: the base model draws their pictures once, and what is forgotten is measured on them."""

import json
import shutil

import pytest
import tomli_w
from PIL import Image

from anima_train.config.base_drawn import SHIPPED_CAPTIONS, read_captions
from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError, DataError, NumericError
from anima_train.evaluation import base_drawn as module
from anima_train.model.tiny import write_tiny
from anima_train.training.train import run_training

CAPTIONS = {"manner": ["ink, a fox (animal)", "oil painting of a hill"], "the sign": ['a sign that says "OPEN"']}
PICTURES = {"width": 96, "height": 64, "steps": 2}


@pytest.fixture
def known(tmp_path):
    """An evaluation set of three captions."""
    path = tmp_path / "captions.toml"
    path.write_text(tomli_w.dumps(CAPTIONS))
    return {"name": "known", "role": "retention", "captions": str(path), "pictures": PICTURES, "quantiles": [0.5]}


def drawn_by(trainer):
    """The folder of the pictures, and the times at which these were written."""
    (folder,) = (trainer.folder / "runs" / "base_drawn").iterdir()
    return folder, {path: path.stat().st_mtime_ns for path in sorted(folder.glob("*/????.png"))}


def test_what_is_forgotten_is_measured_on_what_the_base_draws_once(trainer, known, capsys):
    run = trainer("one", eval_datasets=[known], eval_every_n_steps=2)
    assert "dataset known: the base model draws 3 pictures into " in capsys.readouterr().out
    folder, times = drawn_by(trainer)
    assert [path.relative_to(folder).as_posix() for path in times] == [
        "manner/0000.png", "manner/0001.png", "the sign/0000.png",
    ]  # fmt: skip
    assert {path.with_suffix(".txt").read_text() for path in times} == {
        f"{caption}\n" for captions in CAPTIONS.values() for caption in captions
    }
    for path in times:
        with Image.open(path) as image:
            assert image.size == (96, 64)
    assert len({path.read_bytes() for path in times}) == 3
    assert not (folder / "unfinished").exists()
    end = run.evaluations[-1]
    assert end["step"] == 4
    assert end["known/drift"] > 0
    assert {"known/difference_from_base_of_manner", "known/difference_from_base_of_the sign"} <= end.keys()

    again = trainer("two", eval_datasets=[known], eval_every_n_steps=2)
    assert drawn_by(trainer)[1] == times
    assert again.evaluations == run.evaluations
    assert "draws" not in capsys.readouterr().out
    plain = trainer("plain")
    assert plain.losses == run.losses


@pytest.mark.slow
def test_a_drawing_that_was_interrupted_goes_on_and_another_base_draws_anew(trainer, known, tmp_path, monkeypatch):
    whole = trainer("whole", eval_datasets=[known])
    folder, times = drawn_by(trainer)
    content = {path: path.read_bytes() for path in times}
    shutil.rmtree(folder)
    real = module.sample

    def breaking(spec, cells, scratch):
        for number, made in enumerate(real(spec, cells, scratch)):
            if number == 1:
                raise NumericError("broken")
            yield made

    with monkeypatch.context() as patch:
        patch.setattr(module, "sample", breaking)
        with pytest.raises(NumericError):
            trainer("broken", eval_datasets=[known])
    (first,) = drawn_by(trainer)[1].items()
    again = trainer("again", eval_datasets=[known])
    assert drawn_by(trainer)[1][first[0]] == first[1]
    assert {path: path.read_bytes() for path in content} == content
    assert again.evaluations == whole.evaluations

    other = write_tiny(tmp_path / "other", seed=1)
    files = {"tiny_path": None, "llm_adapter_lr": 0, "dtype": "float32"}
    for name in ("transformer", "vae", "llm", "tokenizer", "t5_tokenizer"):
        files[f"{name}_path"] = str(getattr(other, name))
    trainer("named", eval_datasets=[known], model=files)
    assert len(list((trainer.folder / "runs" / "base_drawn").iterdir())) == 2
    new = next(path for path in (trainer.folder / "runs" / "base_drawn").iterdir() if path != folder)
    before = {path.name: path.read_bytes() for path in new.glob("manner/*.png")}
    write_tiny(tmp_path / "other", seed=2)  # the same paths, other weights
    trainer("changed", eval_datasets=[known], model=files)
    assert all(before[path.name] != path.read_bytes() for path in new.glob("manner/*.png"))


def test_other_captions_or_sizes_are_another_set(trainer, known, tmp_path):
    folders = set()
    for change in ({}, {"pictures": PICTURES | {"seed": 5}}, {"pictures": PICTURES | {"width": 64}}):
        (dataset,) = load_config(trainer.config(eval_datasets=[known | change])).evals
        folders.add(dataset.drawn.folder)
    (tmp_path / "captions.toml").write_text(tomli_w.dumps(CAPTIONS | {"manner": ["ink"]}))
    folders.add(load_config(trainer.config(eval_datasets=[known])).evals[0].drawn.folder)
    assert len(folders) == 4


def test_a_dry_run_draws_nothing_and_says_what_the_run_would(trainer, known, capsys):
    config = load_config(trainer.config(eval_datasets=[known]))
    run_training(config, dry_run=True)
    assert "dataset known: the base model draws 3 pictures first, 96x64 in 2 steps, into " in capsys.readouterr().out
    assert not (trainer.folder / "runs" / "base_drawn").exists()


def test_wrong_images_are_told_before_anything_is_drawn(trainer, known, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        trainer(eval_datasets=[known], dataset={"directory": [{"path": str(tmp_path / "empty")}]})
    assert not (trainer.folder / "runs" / "base_drawn").exists()


def test_the_resolved_configuration_is_the_same_set(trainer, known):
    run = trainer(eval_datasets=[known])
    (first,) = load_config(trainer.folder / "run.toml").evals
    (second,) = load_config(run.path / "config.toml").evals
    assert first.drawn.folder == second.drawn.folder
    assert first.settings == second.settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": None}, "captions: missing, as config is; set one of them"),
        ({"config": {"directory": [{"path": "."}]}}, "captions: excludes config; keep one"),
        ({"role": "validation"}, 'captions: is for what is to be kept: add role = "retention"'),
        ({"captions": "nowhere.toml"}, 'captions: "nowhere.toml" does not exist'),
        ({"pictures": {"width": 100}}, "pictures.width"),
    ],
)
def test_what_contradicts_is_refused(trainer, known, change, message):
    entry = {key: value for key, value in (known | change).items() if value is not None}
    with pytest.raises(ConfigError) as refused:
        load_config(trainer.config(eval_datasets=[entry]))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no captions"),
        ("manner = 3", "manner: found 3 (an integer), expected a list of captions for a kind"),
        ('manner = ["ink", " "]', "manner: found"),
        ("manner = []", "manner: found []"),
        ('"a/b" = ["ink"]', "'a/b' is no name of a kind"),
        ('manner = ["ink", "oil", "ink"]', "'ink' stands there twice"),
        ('manner = ["a fox <lora:x:1>"]', 'found "<lora:x:1>", which is not read in a prompt; remove it'),
        ('manner = ["a fox --w 512"]', 'found "--w" in the prompt, where no options are read; remove it'),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "captions.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_captions(path, "captions.toml")
    assert message in str(refused.value).replace('"a/b"', "'a/b'").replace('"ink"', "'ink'")
    assert str(refused.value).startswith("captions.toml: ")


def test_the_shipped_captions_are_of_several_kinds_and_can_be_prompts():
    captions = read_captions(SHIPPED_CAPTIONS, "shipped")
    assert len(captions) >= 4
    texts = [text for each in captions.values() for text in each]
    assert len(texts) == len(set(texts)) >= 24
    assert not any("\\" in text or "_" in text for text in texts)


@pytest.mark.slow
def test_two_processes_measure_the_same_on_what_one_of_them_draws(trainer, known):
    one = trainer("one", eval_datasets=[known], gradient_accumulation_steps=2)
    shutil.rmtree(trainer.folder / "runs" / "base_drawn")
    two = trainer.processes(2, "two", eval_datasets=[known])
    first, second = one.evaluations[0], two.evaluations[0]
    assert json.dumps(sorted(first)) == json.dumps(sorted(second))
    assert second["known/loss"] == pytest.approx(first["known/loss"], rel=1e-5)
