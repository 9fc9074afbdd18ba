"""Runs whose blocks are swapped: everything a run does is bit for bit what it does without."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from anima_train.adapters.full import Full
from anima_train.adapters.lora import Lora
from anima_train.config.load import load_config
from anima_train.config.model_files import build_model_spec
from anima_train.core.errors import ConfigError
from anima_train.data.buckets import Size
from anima_train.model import block_swap
from anima_train.model.dit import TransformerShape
from anima_train.training.build import check_blocks
from anima_train.training.costs import ModelStats, memory_cost

FULL = {"adapter": None, "optimizer": {"type": "adamw", "lr": 1e-3}}
SAVES = {"checkpoint_every_n_steps": 2, "gradient_accumulation_steps": 2}


@pytest.fixture
def one_buffer(monkeypatch):
    """The tiny model has two blocks: with one buffer each of them has to come anew."""
    monkeypatch.setattr(block_swap, "MAX_BUFFERS", 1)


def evaluated(images_drawer, folder):
    images = images_drawer(folder / "held", [(96, 96)] * 2)
    held = {"resolutions": [96], "directory": [{"path": str(images)}]}
    return {"eval_datasets": [{"name": "held", "config": held}], "eval_every_n_steps": 2}


def without_time(lines):
    return [{key: value for key, value in line.items() if "second" not in key and "time" not in key} for line in lines]


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.usefixtures("one_buffer")
def test_a_lora_with_its_average_and_evaluations_is_the_same(trainer, images_drawer, tmp_path):
    changes = SAVES | {"ema": {"decay": 0.9}} | evaluated(images_drawer, tmp_path)
    plain, swapped = trainer("plain", **changes), trainer("swapped", **changes, blocks_to_swap=2)
    assert swapped.losses == plain.losses
    assert without_time(swapped.evaluations) == without_time(plain.evaluations)
    assert equal(swapped.weights, plain.weights)


def state_of(run, step):
    folder = run.path / "checkpoints" / f"step-{step:06d}"
    return {
        f"{path.stem}.{name}": each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()
    }


@pytest.mark.usefixtures("one_buffer")
def test_a_full_finetune_is_the_same_saved_and_resumed(trainer):
    plain = trainer("plain", **SAVES, **FULL)
    trainer("swapped", **SAVES, **FULL, blocks_to_swap=2, max_steps=2)
    swapped = trainer("swapped", resume=True, **SAVES, **FULL, blocks_to_swap=2)
    assert swapped.losses == plain.losses
    assert equal(swapped.weights, plain.weights)
    assert equal(state_of(swapped, 4), state_of(plain, 4))


@pytest.mark.slow
@pytest.mark.usefixtures("one_buffer")
def test_blocks_may_be_swapped_from_a_resume_on_and_kahans_weights_are_the_same(trainer):
    changes = SAVES | FULL | {"optimizer": {"type": "adamw_optimi", "lr": 1e-3}, "model": {"dtype": "bfloat16"}}
    plain = trainer("plain", **changes)
    trainer("swapped", **changes, max_steps=2)
    swapped = trainer("swapped", resume=True, **changes, blocks_to_swap=2, activation_checkpointing=True)
    assert swapped.losses == plain.losses
    assert equal(state_of(swapped, 4), state_of(plain, 4))


@pytest.mark.slow
def test_two_processes_that_swap_train_as_two_that_do_not(trainer):
    plain = trainer.processes(2, "plain", max_steps=3)
    swapped = trainer.processes(2, "swapped", max_steps=3, blocks_to_swap=2)
    assert swapped.losses == plain.losses
    assert equal(swapped.weights, plain.weights)


def test_more_blocks_than_there_are_or_a_model_trained_by_several_processes_are_refused(trainer):
    spec = build_model_spec(load_config(trainer.config(), []).config, torch.device("cpu"))
    check_blocks(2, 0, Lora(), spec, 4)
    check_blocks(2, 0, Full(), spec, 1)
    check_blocks(0, 2, Full(), spec, 4)
    with pytest.raises(
        ConfigError, match=r"blocks_to_swap: found 3, and the transformer has 2 blocks; write 2 or less"
    ):
        check_blocks(3, 0, Lora(), spec, 1)
    with pytest.raises(ConfigError, match=r"checkpointed_blocks: found 3, and the transformer has 2 blocks"):
        check_blocks(0, 3, Lora(), spec, 1)
    with pytest.raises(ConfigError, match=r"blocks_to_swap: found 1 in a full fine-tune by 2 processes"):
        check_blocks(1, 0, Full(), spec, 2)


def test_the_estimate_of_the_weights_is_less_by_what_is_saved(trainer):
    shape = TransformerShape(28, 2048, 128, 16, 1024, 256)
    stats = ModelStats(shape, num_weights=1_956_000_000, num_trained=69_300_000)

    def weights(number, dtype):
        config = load_config(trainer.config(model={"dtype": dtype}, blocks_to_swap=number), []).config
        return memory_cost(config, stats, Size(1024, 1024), 1).weights

    for dtype, num_bytes in (("bfloat16", 2), ("float32", 4)):
        block = 62_914_560 * num_bytes  # 14 width^2 for products of the width, 2 x 2048 x 1024 for those of the text
        block += 4 * 128 * num_bytes  # norms
        assert [weights(0, dtype) - weights(number, dtype) for number in (2, 9, 28)] == [0, 7 * block, 26 * block]


def test_what_saves_nothing_or_cannot_be_is_told(trainer, caplog):
    (note,) = load_config(trainer.config(blocks_to_swap=2), []).notes
    assert note.endswith("blocks_to_swap: has no effect, as the weights of 2 swapped blocks are always on the device")
    assert load_config(trainer.config(blocks_to_swap=3), []).notes == ()
    with pytest.raises(ConfigError, match="ema: follows weights on the device, where blocks_to_swap does not keep"):
        load_config(trainer.config(**FULL, blocks_to_swap=2, ema={}), [])
    with caplog.at_level(logging.INFO):
        trainer(blocks_to_swap=2, max_steps=1)
    (line,) = [record.getMessage() for record in caplog.records if "blocks_to_swap: the weights" in record.getMessage()]
    assert line.startswith("blocks_to_swap: the weights of 2 blocks wait in ")
    assert line.endswith("; on a CPU that saves nothing, and costs time")


def test_too_many_blocks_are_refused_before_anything_is_cached(trainer, monkeypatch):
    monkeypatch.setattr("anima_train.training.prepare.fill_cache", lambda *_: pytest.fail("caching"))
    with pytest.raises(ConfigError, match="has 2 blocks"):
        trainer(blocks_to_swap=3)


@pytest.mark.slow
@pytest.mark.usefixtures("one_buffer")
@pytest.mark.parametrize(
    "optimizer",
    [
        {"type": "adamw_optimi", "lr": 1e-3, "gradient_release": True},
        {"type": "adamw8bit", "lr": 1e-3, "gradient_release": True, "moments_device": "cpu", "rounding": "stochastic"},
        {"type": "muon", "lr": 1e-3},
        {"type": "adafactor", "lr": 1e-3},
        {"type": "lion", "lr": 1e-4},
    ],
    ids=lambda optimizer: f"{optimizer['type']}{', released' if optimizer.get('gradient_release') else ''}",
)
def test_a_full_finetune_in_bfloat16_is_the_same_with_every_optimizer_that_looks_at_one_weight_at_a_time(
    trainer, optimizer
):
    changes = {"adapter": None, "model": {"dtype": "bfloat16"}, "optimizer": optimizer, "gradient_clipping": 0.0}
    changes |= {"checkpoint_every_n_steps": 2}
    plain = trainer("plain", **changes)
    trainer("swapped", **changes, blocks_to_swap=2, max_steps=2)
    swapped = trainer("swapped", resume=True, **changes, blocks_to_swap=2)
    assert swapped.losses == plain.losses
    assert equal(swapped.weights, plain.weights)
    assert equal(state_of(swapped, 4), state_of(plain, 4))


def test_an_optimizer_that_looks_at_all_weights_at_once_is_refused(trainer):
    for name in ("prodigy", "schedule_free"):
        path = trainer.config(adapter=None, optimizer={"type": name, "lr": 1.0}, blocks_to_swap=2)
        with pytest.raises(ConfigError, match=f"{name} excludes blocks_to_swap in a full fine-tune"):
            load_config(path, [])
