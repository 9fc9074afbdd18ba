"""Settings that save memory, together: each pair that people combine trains, saves and resumes on the same bits."""

import pytest
import torch

from anima_train.model import block_swap

STEPS = 4
CHECKPOINTING = {"activation_checkpointing": True}
SWAP = {"blocks_to_swap": 2}
INT8 = {"model": {"transformer_dtype": "int8", "dtype": "bfloat16"}}
BFLOAT16 = {"model": {"dtype": "bfloat16"}}
RELEASE = {"adapter": None, "gradient_clipping": 0.0, "optimizer": {"type": "adamw_optimi", "lr": 1e-3}}


def released(**changes):
    return RELEASE | {"optimizer": RELEASE["optimizer"] | {"gradient_release": True, **changes}}


# Name -> settings, and those that may differ between the first part of the run and the second.
COMBINATIONS = {
    "int8, checkpointing": (INT8 | CHECKPOINTING, {}),
    "int8, checkpointing, swap": (INT8 | CHECKPOINTING | SWAP, {}),
    "int8, selective, swap begun at the resume": (INT8 | {"activation_checkpointing": "selective"}, SWAP),
    "selective, a checkpointed block, swap": (
        {"activation_checkpointing": "selective", "checkpointed_blocks": 1} | SWAP,
        {"checkpointed_blocks": 2},
    ),
    "float8, offload, swap": (
        {"model": {"transformer_dtype": "float8", "dtype": "bfloat16"}, "activation_checkpointing": "offload"} | SWAP,
        {},
    ),
    "full, release, kahan": (BFLOAT16 | released(rounding="kahan"), {}),
    "full, release, stochastic, checkpointing": (BFLOAT16 | released(rounding="stochastic") | CHECKPOINTING, {}),
    "full, release, 8 bit, swap": (BFLOAT16 | released(moments_dtype="8bit") | CHECKPOINTING | SWAP, {}),
    "full, kahan, moments on the host, release begun at the resume": (
        BFLOAT16 | RELEASE | {"optimizer": RELEASE["optimizer"] | {"moments_device": "cpu"}},
        released(moments_device="cpu"),
    ),
    "lora, svd, chosen modules, swap": (
        SWAP
        | CHECKPOINTING
        | {"adapter": {"init": "svd", "target_modules": "attention", "rank_pattern": {".*q_proj": 2}}},
        {},
    ),
    "t-lora, int8, selective, swap": (
        INT8 | SWAP | {"activation_checkpointing": "selective", "adapter": {"min_rank": 2, "init": "orthogonal"}},
        {},
    ),
    "dora, selective, swap": (
        SWAP | {"activation_checkpointing": "selective", "adapter": {"use_dora": True, "alpha": 2.0}},
        {},
    ),
    "lokr, int8, selective, swap": (
        INT8 | SWAP | {"activation_checkpointing": "selective", "adapter": {"type": "lokr", "decompose_factor": 2}},
        {},
    ),
    "loha, bfloat16, checkpointing, swap": (BFLOAT16 | SWAP | CHECKPOINTING | {"adapter": {"type": "loha"}}, {}),
    "lora, prodigy, int8": (INT8 | {"optimizer": {"type": "prodigy"}, "gradient_clipping": 0.0}, {}),
    "lora, schedule-free, swap": (SWAP | {"optimizer": {"type": "schedule_free", "lr": 1e-3}}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINATIONS)
def test_settings_that_save_memory_train_save_and_resume_together(trainer, monkeypatch, name):
    monkeypatch.setattr(block_swap, "MAX_BUFFERS", 1)  # the tiny model has two blocks: each comes anew
    settings, later = COMBINATIONS[name]
    changes = {"checkpoint_every_n_steps": 2, "max_steps": STEPS, **settings}
    whole = trainer("whole", **changes)
    trainer("parted", **changes | {"max_steps": 2})
    parted = trainer("parted", resume=True, **changes | later)
    assert len(whole.losses) == STEPS
    assert parted.losses == whole.losses
    assert parted.weights.keys() == whole.weights.keys()
    assert all(torch.equal(parted.weights[key], tensor) for key, tensor in whole.weights.items())


@pytest.mark.slow
def test_two_processes_train_on_weights_of_a_byte_as_one_does(trainer):
    """Each has its own copy of the quantised weights, and they are the same."""
    changes = {"max_steps": 3, **INT8}
    one = trainer("one", gradient_accumulation_steps=2, **changes)
    two = trainer.processes(2, "two", **changes)
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
