"""Settings that change nothing with this data or in a run of this length: each gets one note, and none else does."""

import logging

import pytest
from PIL import Image

from anima_train.config.load import load_config
from anima_train.config.plan_notes import plan_notes, plan_warnings
from anima_train.training.build import plan_run
from anima_train.training.prepare import scan_all


@pytest.fixture
def notes_of(trainer):
    """The notes of a run of 6 images, 6 steps an epoch, with these keys."""

    def run(**changes):
        loaded = load_config(trainer.config(**changes), [])
        scans = scan_all((loaded.train, *loaded.evals), loaded.config.seed, write=False)
        plan, schedule = plan_run(loaded.config, scans["train"].samples, 1)
        evaluated = [sample for name, scan in scans.items() if name != "train" for sample in scan.samples]
        return plan_notes(loaded.config, plan, schedule, evaluated)

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
        ({"warmup_steps": 3, "lr_scheduler": "cosine"}, []),
        ({"warmup_steps": 4}, ["lr_scheduler: has no effect, as warmup_steps = 4 takes all of the 4 steps"]),
        ({"lr_scheduler": {"type": "cosine_with_restarts", "num_cycles": 5}},
         ["lr_scheduler.num_cycles: has no effect, as 5 cycles in 4 steps after the warmup: none has a second step"]),
        ({"lr_scheduler": {"type": "wsd", "decay_fraction": 0.2}},
         ["lr_scheduler.decay_fraction: has no effect, as the decay is shorter than a step"]),
        ({"lr_scheduler": {"type": "wsd", "decay_fraction": 0.25}}, []),
        ({"model": {"multiscale_loss_weight": 0.5}},
         ["model.multiscale_loss_weight: has no effect, as all images have fewer pixels than 922 x 922"]),
        ({"micro_batch_size_per_gpu": [[96, 2], [1024, 1]]},
         ["micro_batch_size_per_gpu: has no effect, as no resolution is nearest to that of [1024, 1]"]),
    ],
)  # fmt: skip
def test_what_never_happens_in_a_run_is_noted_and_nothing_else(notes_of, changes, expected):
    assert notes_of(**changes) == expected


def test_a_warmup_longer_than_the_run_is_a_warning(trainer):
    said = "the learning rate rises to 1% of lr, and no more; write a twentieth of the steps"
    for steps, warned in ((4, []), (400, [f"warmup_steps: 400 is longer than the run of 4 steps: {said}"])):
        config = load_config(trainer.config(warmup_steps=steps), []).config
        assert list(plan_warnings(config, 4)) == warned


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"shuffle_tags": True, "protected_tags": ["a tag", "no_such_tag"]},
         ["protected_tags: has no effect, as no caption has no_such_tag"]),
        ({"shuffle_tags": True, "keep_first_n_tags": 3},
         ["shuffle_tags: has no effect, as keep_first_n_tags is 3, and no caption has more than 3 tags"]),
        ({"tag_dropout": 0.5, "keep_first_n_tags": 2}, []),
        ({"alpha_as_mask": True}, ["alpha_as_mask: has no effect, as no image has an alpha channel"]),
    ],
)  # fmt: skip
def test_what_no_image_or_caption_has_is_noted(notes_of, tmp_path, keys, expected):
    folder = tmp_path / "own"
    folder.mkdir()
    Image.new("RGB", (96, 96)).save(folder / "a.png")
    (folder / "a.txt").write_text("a tag, hat, b\nA girl in a hat, waving, stands by the sea.")
    found = notes_of(dataset={"directory": [{"path": str(folder), **keys}]})
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
