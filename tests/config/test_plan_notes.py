"""Settings that change nothing with this data or in a run of this length: each gets one note, and none else does."""

import logging
import tarfile
from dataclasses import replace

import pytest
import torch
from PIL import Image

from anima_train.config.load import load_config
from anima_train.config.model_files import build_model_spec
from anima_train.config.plan_notes import plan_notes, plan_warnings
from anima_train.evaluation.base_drawn import split_undrawn
from anima_train.training.build import plan_run
from anima_train.training.prepare import scan_all


@pytest.fixture
def notes_of(trainer):
    """The notes of a run of 6 images, 6 steps an epoch, with these keys."""

    def run(**changes):
        loaded = load_config(trainer.config(**changes), [])
        scans = scan_all(split_undrawn(loaded.datasets)[0], loaded.config.seed, write=False)
        plan, schedule = plan_run(loaded.config, scans["train"].samples, 1)
        evals = {name: scan.samples for name, scan in scans.items() if name != "train"}
        spec = build_model_spec(loaded.config, torch.device("cpu"))
        return plan_notes(loaded.config, spec, plan, schedule, evals)

    return run


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"save_every_n_steps": 4}, []),
        ({"save_every_n_steps": 5}, ["save_every_n_steps: has no effect, as the run ends before, after 4 steps"]),
        ({"save_every_n_examples": 5},
         ["save_every_n_examples: has no effect, as the run ends before, after 4 images"]),
        ({"checkpoint_every_n_epochs": 1},
         ["checkpoint_every_n_epochs: has no effect, as the run ends before, after 0 epochs"]),
        ({"max_steps": 12, "checkpoint_every_n_epochs": 2}, []),
        ({"save_every_n_steps": 2, "save_every_n_epochs": 3},
         ["save_every_n_epochs: has no effect, as the run ends before, after 0 epochs"]),
        ({"sampling": {"every_n_steps": 9, "prompts": ["a"], "width": 64, "height": 64}},
         ["sampling.every_n_steps: has no effect, as the run ends before, after 4 steps"]),
        ({"warmup_steps": 2, "lr_scheduler": "cosine"}, []),
        ({"warmup_steps": 4}, ["lr_scheduler: has no effect, as warmup_steps = 4 takes all of the 4 steps"]),
        ({"lr_scheduler": {"type": "cosine_with_restarts", "num_cycles": 5}},
         ["lr_scheduler.num_cycles: has no effect, as 5 cycles in 4 steps: none has a second step"]),
        ({"lr_scheduler": {"type": "cosine_with_restarts", "num_cycles": 3}}, []),
        ({"max_steps": 10, "warmup_steps": 5, "lr_scheduler": {"type": "wsd", "decay_fraction": 0.2}},
         ["lr_scheduler.decay_fraction: has no effect, as of 5 steps after the warmup the decay takes no more than "
          "one, which begins at the peak"]),
        ({"max_steps": 10, "warmup_steps": 5, "lr_scheduler": {"type": "wsd", "decay_fraction": 0.21}}, []),
        ({"lr_scheduler": "rex", "warmup_steps": 3},
         ["lr_scheduler: has no effect, as there is only 1 step after the warmup"]),
        ({"lr_scheduler": {"type": "linear", "min_factor": 1.0}}, ["lr_scheduler: has no effect, as min_factor is 1"]),
        ({"eval_every_n_steps": 9}, []),  # told when the configuration is read
        ({"model": {"multiscale_loss_weight": 0.5}},
         ["model.multiscale_loss_weight: has no effect, as all images have fewer pixels than 922 x 922"]),
        ({"micro_batch_size_per_gpu": [[96, 2], [1024, 1]]},
         ["micro_batch_size_per_gpu: has no effect, as no resolution is nearest to that of [1024, 1]"]),
    ],
)  # fmt: skip
def test_what_never_happens_in_a_run_is_noted_and_nothing_else(notes_of, changes, expected):
    assert notes_of(**changes) == expected


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (2, []),
        (4, ["early_stopping: has no effect, as the run has 2 evaluations, and patience waits for 2 after the best "
             "one"]),
        (5, [*(f"{key}: has no effect, as the run ends before the first evaluation of what it has trained"
               for key in ("keep_best", "early_stopping", "forgetting_budget")),
             "eval_every_n_steps: has no effect, as the run ends before, after 4 steps"]),
    ],
)  # fmt: skip
def test_what_too_few_evaluations_are_to_decide_is_noted(notes_of, pictures, every, expected):
    known = {"name": "a", "role": "retention", "captions": {"manner": ["ink"]}}
    rule = {"early_stopping": {"metric": "a/loss", "patience": 2}, "keep_best": "a/loss", "forgetting_budget": 0.1}
    assert notes_of(eval_datasets=[known], eval_every_n_steps=every, **rule) == expected


@pytest.mark.parametrize(
    ("every", "patience", "looks"),
    [
        ({"steps": 6, "epochs": 1}, 3, "3 evaluations"),  # both after the same steps
        ({"steps": 6, "epochs": 1}, 2, None),
        ({"steps": 9, "epochs": 1}, 4, "4 evaluations"),
        ({"steps": 6, "examples": 9}, 4, "at most 4 evaluations"),
    ],
)
def test_evaluations_are_counted_by_their_steps(notes_of, every, patience, looks):
    known = {"name": "a", "role": "retention", "captions": {"manner": ["ink"]}}
    due = {f"eval_every_n_{unit}": number for unit, number in every.items()}
    notes = notes_of(
        eval_datasets=[known], max_steps=12, early_stopping={"metric": "a/loss", "patience": patience}, **due
    )
    assert notes == ([] if looks is None else [
        f"early_stopping: has no effect, as the run has {looks}, and patience waits for {patience} after the best one"
    ])  # fmt: skip


def test_captions_that_are_trained_and_are_not_to_change_are_warned_of(trainer, pictures):
    (pictures / "image2.txt").write_text("a hill")
    sets = [{"name": "a", "role": "retention", "captions": {"manner": ["ink", "a hill"]}}]
    for kept, key in (({"captions": {"b": ["a hill"]}}, "captions"),
                      ({"on": "class_caption", "class_caption": "a hill"}, "class_caption")):  # fmt: skip
        loaded = load_config(trainer.config(eval_datasets=sets, preservation=kept))
        samples = scan_all((loaded.train,), 0, write=False)["train"].samples
        assert [warning.partition(";")[0] for warning in plan_warnings(loaded.config, samples, 4)] == [
            f'{place}: 1 caption of a training image is among what is not to change, such as "a hill"'
            for place in ("eval_datasets a: captions", f"preservation.{key}")
        ]


def test_images_for_regularization_alone_are_a_warning(trainer, pictures):
    loaded = load_config(trainer.config(dataset={"directory": [{"path": str(pictures), "role": "regularization"}]}))
    samples = scan_all((loaded.train,), 0, write=False)["train"].samples
    (warning,) = plan_warnings(loaded.config, samples, 4)
    assert warning.startswith('dataset: every image has role = "regularization": there is nothing new to learn')
    preserved = [replace(sample, is_preserved=True) for sample in samples]
    assert list(plan_warnings(loaded.config, [*samples, *preserved], 4)) == [warning]
    assert list(plan_warnings(loaded.config, preserved, 4)) == []


def test_a_warmup_longer_than_the_run_is_a_warning(trainer):
    config = load_config(trainer.config(warmup_steps=400), []).config
    said = "the learning rate rises to {} of lr, and no more; write warmup_steps = {}"
    for num_steps, *numbers in ((4, "1%", 1), (300, "75%", 15)):
        (warning,) = plan_warnings(config, [], num_steps)
        assert warning == f"warmup_steps: 400 is longer than the run of {num_steps} steps: {said.format(*numbers)}"
    assert not list(plan_warnings(config, [], 400))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"tag_dropout": 0.1, "protected_tags": ["a tag", "no_such_tag"]},
         ["protected_tags: has no effect, as no caption has no_such_tag"]),
        ({"shuffle_tags": True, "keep_first_n_tags": 2},
         ["shuffle_tags: has no effect, as no caption has two tags that may change places"]),
        ({"tag_dropout": 0.001, "keep_first_n_tags": 1}, []),
        ({"tag_dropout": 0.001, "keep_first_n_tags": 3},
         ["tag_dropout: has no effect, as no caption has a tag that may be left out"]),
        ({"shuffle_tags": True, "keep_tokens_separator": "|||"},
         ["keep_tokens_separator: has no effect, as no caption holds it"]),
        ({"cache_shuffle_num": 2, "cache_shuffle_delimiter": "; "},
         ["cache_shuffle_num: has no effect, as no caption has two tags that may change places"]),
        ({"trigger_word": "a tag"}, ["trigger_word: has no effect, as every caption begins with it, or is empty"]),
        ({"trigger_word": "mia", "caption_prefix": "art, "}, []),
        ({"replace_underscores": True, "unescape_parentheses": True},
         [r"unescape_parentheses: has no effect, as no caption holds \( or \)",
          "replace_underscores: has no effect, as no tag has an underscore to replace"]),
        ({"caption_mode": "mixed", "nl_weight": 0.3},
         ["nl_weight: has no effect, as no image has captions of both kinds"]),
        ({"caption_mode": "mixed", "caption_shares": {"tags": 1, "nl": 1}},
         ["caption_shares: has no effect, as no image has captions of both kinds"]),
        ({"captions_per_line": True}, []),
        ({"recursive": True, "tars": True, "kohya_folders": True},
         ["recursive: has no effect, as no image lies in a sub-folder",
          "kohya_folders: has no effect, as no image lies in a sub-folder named as 10_name",
          "tars: has no effect, as no image lies in a .tar of the folder"]),
        ({"no_upscale": True, "crop_position": "top"},
         ["no_upscale: has no effect, as no image is smaller than its bucket",
          "crop_position: has no effect, as no image is cut along that side"]),
        ({"ar_buckets": [1.5, 0.7], "resolutions": [128], "no_upscale": True, "crop_position": "top"}, []),
        ({"horizontal_flip": True, "num_repeats": 2, "min_kept": 0.1}, []),
        ({"tag_dropout": 0.5, "keep_first_n_tags": 2}, []),
        ({"alpha_as_mask": True}, ["alpha_as_mask: has no effect, as no image has an alpha channel"]),
    ],
)  # fmt: skip
def test_what_no_image_or_caption_has_is_noted(notes_of, tmp_path, keys, expected):
    folder = tmp_path / "own"
    folder.mkdir()
    Image.new("RGB", (96, 96)).save(folder / "a.png")
    (folder / "a.txt").write_text("a tag, hat, b\nA girl in a hat, waving, stands by the sea.")
    found = notes_of(dataset={"resolutions": [96], "directory": [{"path": str(folder), **keys}]})
    assert found == [f"directory[0].{line}" for line in expected]


def test_a_mask_less_normalisation_is_noted_where_the_folder_of_masks_is_empty(notes_of, tmp_path, pictures):
    (tmp_path / "masks").mkdir()
    directory = {"path": str(pictures), "mask_path": str(tmp_path / "masks")}
    (note,) = notes_of(dataset={"directory": [directory]}, normalize_masked_loss=True)
    assert note == "normalize_masked_loss: has no effect, as no image has a mask"


def test_masks_beside_their_images_are_masks_for_it_too(notes_of, tmp_path):
    for name in ("a.png", "a_mask.png"):
        Image.new("RGB", (96, 96), "white").save(tmp_path / name)
    assert notes_of(dataset={"directory": [{"path": str(tmp_path)}]}, normalize_masked_loss=True) == []


def test_notes_are_told_at_the_start_of_a_run(trainer, caplog):
    caplog.set_level(logging.INFO)
    trainer(max_steps=1, save_every_n_steps=7)
    assert "note: save_every_n_steps: has no effect, as the run ends before, after 1 step" in caplog.text


def test_a_rate_that_no_component_takes_is_noted(trainer):
    rates = {f"{name}_lr": 1e-4 for name in ("self_attn", "cross_attn", "mlp", "mod", "llm_adapter")}
    noted = load_config(trainer.config(model=rates), []).notes
    assert any("optimizer.lr: has no effect" in note for note in noted)
    assert not any("optimizer.lr" in note for note in load_config(trainer.config(), []).notes)


def test_folders_and_lines_that_are_there_are_not_noted(notes_of, tmp_path):
    with tarfile.open(tmp_path / "some.tar", "w"):
        pass
    for name in ("x/a.png", "20_y/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (96, 96), (len(name), 0, 0)).save(tmp_path / name)
    (tmp_path / "x" / "a.txt").write_text("one\ntwo")
    keys = {"recursive": True, "kohya_folders": True, "captions_per_line": True}
    assert notes_of(dataset={"resolutions": [96], "directory": [{"path": str(tmp_path), **keys}]}) == []
    keys = {"recursive": False, "kohya_folders": True, "tars": True}  # kohya's folders are searched without the other
    (note,) = notes_of(dataset={"resolutions": [96], "directory": [{"path": str(tmp_path), **keys}]})
    assert note == "directory[0].tars: has no effect, as no image lies in a .tar of the folder"


def test_images_in_an_archive_in_the_folder_are_what_tars_is_for(notes_of, tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "inside/b.png")
    (tmp_path / "a.png").unlink()
    dataset = {"resolutions": [96], "directory": [{"path": str(tmp_path), "tars": True}]}
    assert notes_of(dataset=dataset) == []
    dataset = {
        "resolutions": [96],
        "directory": [{"path": str(tmp_path / "some.tar"), "tars": True, "recursive": True}],
    }
    assert [note.partition(":")[0] for note in notes_of(dataset=dataset)] == [
        "directory[0].recursive", "directory[0].tars",
    ]  # fmt: skip


def test_a_key_of_the_dataset_is_noted_once_and_only_if_no_directory_uses_it(notes_of, tmp_path):
    for name, caption in (("a", "one, two"), ("b", "alone")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (96, 96), (len(caption), 0, 0)).save(tmp_path / name / "x.png")
        (tmp_path / name / "x.txt").write_text(caption)
    directories = [{"path": str(tmp_path / "a")}, {"path": str(tmp_path / "b")}]
    assert notes_of(dataset={"resolutions": [96], "shuffle_tags": True, "directory": directories}) == []
    (note,) = notes_of(dataset={"resolutions": [96], "alpha_as_mask": True, "directory": directories})
    assert note == "alpha_as_mask: has no effect, as no image has an alpha channel"
    directories[1]["shuffle_tags"] = True
    (note,) = notes_of(dataset={"resolutions": [96], "directory": directories})
    assert note.startswith("directory[1].shuffle_tags: has no effect")


def test_what_an_evaluation_does_not_use_is_noted(notes_of, pictures):
    def notes(**keys):
        dataset = {"resolutions": [96], "caption_mode": "mixed", "directory": [{"path": str(pictures), **keys}]}
        return notes_of(eval_datasets=[{"name": "held out", "config": dataset}])

    (note,) = notes(nl_weight=0.2)
    assert note == (
        "evaluation set held out: directory[0].nl_weight: has no effect, as each image is measured with its first "
        "caption, which is the same without it"
    )
    assert notes(trigger_word="mia") == []
    assert notes(shuffle_tags=True) == []  # told when the configuration is read
    sizes = {"micro_batch_size_per_gpu": 2, "eval_micro_batch_size_per_gpu": [[96, 2], [512, 1]]}
    evals = [{"name": "a", "config": {"resolutions": [96], "directory": [{"path": str(pictures)}]}}]
    assert notes_of(eval_datasets=evals, **sizes) == [
        "eval_micro_batch_size_per_gpu: has no effect, as no resolution is nearest to that of [512, 1]"
    ]


def test_what_does_nothing_with_these_files_or_on_this_device_is_noted(notes_of):
    as_float32 = {"dtype": "bfloat16", "transformer_dtype": "float32"}
    (note,) = notes_of(model=as_float32)
    assert note.startswith("model.transformer_dtype: has no effect, as the file holds bfloat16, an adapter leaves")
    assert notes_of(model=as_float32, adapter=None) == []
    (note,) = notes_of(model={"text_encoder_device": "cpu"})
    assert note == "model.text_encoder_device: has no effect, as training is on the CPU, too"
    (note,) = notes_of(adapter=None, optimizer={"type": "adamw_optimi", "moments_device": "cpu"})
    assert note == "optimizer.moments_device: has no effect, as training is on the CPU, too"


def test_dropping_captions_that_are_empty_is_noted(notes_of, tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "a.png")
    dataset = {"resolutions": [96], "directory": [{"path": str(tmp_path)}]}
    assert notes_of(dataset=dataset, uncond_fraction=0.1) == [
        "uncond_fraction: has no effect, as every caption is empty"
    ]
    dataset["directory"][0]["caption_prefix"] = "art"
    assert notes_of(dataset=dataset, uncond_fraction=0.1) == []
