"""The settings at the top of pages: those of the configuration, and nothing where there are none."""

import tomllib

import pytest
import tomli_w

from anima_train.config.load import load_config
from anima_train.config.resolved import plain
from anima_train.reports.key_settings import key_settings

LORA = {
    "output_dir": "runs", "max_steps": 9, "gradient_accumulation_steps": 3, "warmup_steps": 2, "uncond_fraction": 0.05,
    "micro_batch_size_per_gpu": [[512, 4], [1024, 1]], "huber_delta": 0.5, "activation_checkpointing": "selective",
    "lr_scheduler": {"type": "cosine", "min_factor": 0.1}, "seed": 8,
    "dataset": {"resolutions": [512, 768], "directory": [{"path": "."}]},
    "model": {"type": "anima", "tiny_path": "tiny", "llm_adapter_lr": 0, "mlp_lr": 5e-5, "mod_lr": 2e-5, "shift": 3.0,
              "transformer_dtype": "int8"},
    "adapter": {"type": "lora", "rank": 24, "alpha": 12, "dropout": 0.25, "dtype": "bfloat16"},
    "optimizer": {"type": "adamw_optimi", "lr": 2e-5, "betas": [0.9, 0.95]},
}  # fmt: skip


def rows_of(folder, **changes):
    path = folder / "run.toml"
    config = {key: value for key, value in {**LORA, **changes}.items() if value is not None}
    path.write_text(tomli_w.dumps(config))
    return dict(key_settings(plain(load_config(path, []).config)))


def test_a_lora_tells_its_sizes_rates_and_optimizer(tmp_path):
    rows = rows_of(tmp_path)
    optimizer = rows.pop("optimizer")
    assert rows == {
        "trained": "LoRA, rank 24, alpha 12, dtype bfloat16, dropout 0.25",
        "learning rate": "2e-05, mlp 5e-05, llm_adapter frozen",
        "schedule": "cosine (min_factor 0.1), warmup of 2 steps",
        "batch": "[resolution, images] = [[512, 4], [1024, 1]] at once, 3 times in a step",
        "resolutions": "512, 768",
        "noise levels": "logit_normal (shift 3)",
        "computation": "bfloat16, weights int8, activation_checkpointing selective",
        "loss": "huber_delta 0.5",
        "without a caption": "5 % of the samples",
        "seed": "8",
    }
    assert optimizer.startswith("adamw_optimi (")
    assert "betas [0.9, 0.95]" in optimizer


def test_sizes_that_a_whole_factor_does_not_have_are_not_told(tmp_path):
    adapter = {"type": "lokr", "full_matrix": True, "decompose_factor": 4}
    assert rows_of(tmp_path, adapter=adapter)["trained"] == "LoKr, dtype float32, decompose_factor 4, full_matrix true"


def test_sizes_among_the_resolutions_keep_their_brackets(tmp_path):
    for resolutions, shown in (([[1280, 704]], "[1280, 704]"), ([512, [704, 1280]], "512, [704, 1280]")):
        dataset = {"resolutions": resolutions, "directory": [{"path": "."}]}
        assert rows_of(tmp_path, dataset=dataset)["resolutions"] == shown


def test_a_full_fine_tune_says_that_all_weights_are_trained(tmp_path):
    model = {"type": "anima", "tiny_path": "tiny", "cross_attn_lr": 0, "mlp_lr": 1e-4}
    changes = {"force_constant_lr": 7e-6, "lr_scheduler": None, "warmup_steps": None, "uncond_fraction": 0.0}
    rows = rows_of(tmp_path, adapter={"type": "full"}, model=model, **changes)
    assert rows["trained"] == "all weights (full)"
    assert rows["learning rate"] == "7e-06 (force_constant_lr), cross_attn frozen"
    assert "without a caption" not in rows


@pytest.mark.parametrize("value", ["3", "'x'", "true", "[[1], 'a']", "{a = 1}", "nan", "1979-05-27", "0"])
def test_whatever_stands_in_a_config_there_are_rows(value):
    """A run's file may be edited by hand."""
    keys = [
        *(key for key, of in LORA.items() if not isinstance(of, dict)),
        "adapter.type",
        "optimizer.lr",
        "model.shift",
    ]
    keys += ["adapter.rank", "model.mlp_lr", "dataset.resolutions", "lr_scheduler.type", "model.timestep_sample_method"]
    for key in keys:
        key_settings(tomllib.loads(f"{key} = {value}"))
    assert key_settings({}) == []
