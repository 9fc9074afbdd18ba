"""Runs that log the norms of their updates, whatever keeps the weights."""

import pytest

FULL = {"adapter": None, "optimizer": {"type": "adamw", "lr": 1e-3}}
STEPS = {"max_steps": 4, "gradient_accumulation_steps": 2}


@pytest.fixture
def held(images_drawer, tmp_path):
    directory = {"path": str(images_drawer(tmp_path / "held", [(96, 96)] * 2))}
    return {
        "eval_datasets": [{"name": "held", "config": {"resolutions": [96], "directory": [directory]}}],
        "eval_every_n_steps": 2, "eval_before_first_step": False,
    }  # fmt: skip


def norms_of(run):
    found = [
        {key: each for key, each in line.items() if key.startswith(("update", "share"))} for line in run.evaluations
    ]
    assert all(line["update_norm_relative/mlp"] > 0 for line in found)
    return found


def test_a_run_logs_the_norm_of_what_it_saves(trainer, held):
    run = trainer(max_steps=2, **held)
    (found,) = norms_of(run)
    pairs = {key.partition(".lora_")[0]: key for key in run.weights if "lora_A" in key and ".mlp" in key}
    updates = [
        run.weights[key.replace("lora_A", "lora_B")].double() @ run.weights[key].double() for key in pairs.values()
    ]
    expected = sum(float(update.square().sum()) for update in updates) ** 0.5
    assert found["update_norm/mlp"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_whole_model_is_measured_alike_swapped_and_resumed(trainer, held):
    plain = trainer("plain", **STEPS, **FULL, **held)
    saves = {"checkpoint_every_n_steps": 2}
    trainer("swapped", **STEPS | {"max_steps": 2}, **saves, **FULL, **held, blocks_to_swap=2)
    swapped = trainer("swapped", resume=True, **STEPS, **saves, **FULL, **held, blocks_to_swap=2)
    assert norms_of(swapped) == norms_of(plain)
    assert norms_of(plain)[-1]["share_moved_in_run/mlp"] > 0.5


@pytest.mark.slow
def test_a_whole_model_that_is_divided_is_measured_as_one_that_is_not(trainer, held):
    one = trainer("one", **STEPS, **FULL, **held)
    two = trainer.processes(2, "two", sharding="fsdp2", **STEPS | {"gradient_accumulation_steps": 1}, **FULL, **held)
    for found, expected in zip(norms_of(two), norms_of(one), strict=True):
        assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
def test_beside_weights_of_a_byte_a_value_the_update_is_as_large(trainer, held):
    rates = {"optimizer": {"type": "adamw", "lr": 1e-3}}
    (plain,) = norms_of(trainer("plain", max_steps=2, **rates, **held))
    bytes_of = {"model": {"transformer_dtype": "int8"}, "blocks_to_swap": 2}
    (quantized,) = norms_of(trainer("int8", max_steps=2, **rates, **bytes_of, **held))
    assert quantized.keys() == plain.keys()
    ratios = [
        {
            key.rpartition("/")[2]: found[key] / found[key.replace("_relative", "")]
            for key in found
            if "_relative" in key
        }
        for found in (quantized, plain)
    ]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)  # 1 / the norm of the base
