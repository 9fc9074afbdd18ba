"""Options that exclude each other, and what the rooms below are given."""

import pytest

from anima_train.config.config import Config

EVAL = {"eval_datasets": [{"name": "a", "config": {"directory": [{"path": "data"}]}}]}
FROZEN = {f"model.{name}_lr": 0.0 for name in ("self_attn", "cross_attn", "mlp", "mod", "llm_adapter")}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"epochs": None}, "max_steps: neither epochs nor max_steps is set; set at least one"),
        (
            {"huber_delta": 1.0, "smooth_l1_beta": 1.0},
            "smooth_l1_beta: chooses another loss than huber_delta; keep one",
        ),
        (
            {"smooth_l1_beta": 1.0, "pseudo_huber_c": 1.0},
            "pseudo_huber_c: chooses another loss than smooth_l1_beta; keep one",
        ),
        (
            {"model.shift": 3.0, "model.flux_shift": True},
            "model.flux_shift: excludes shift, which moves t too; keep one",
        ),
        (
            {"model.timestep_sample_method": "uniform", "model.sigmoid_scale": 1.3},
            'model.sigmoid_scale: has no effect with timestep_sample_method = "uniform"; remove it',
        ),
        (
            {"model.tiny_path": "tiny", "model.vae_path": "data", "model.llm_path": "data"},
            "model.tiny_path: replaces vae_path, llm_path, which would have no effect; keep one",
        ),
        (
            {"model.dtype": "float32", "model.transformer_dtype": "bfloat16"},
            'model.transformer_dtype: found "bfloat16", which needs dtype = "bfloat16"; remove it',
        ),
        (
            {"checkpointed_blocks": 3},
            'checkpointed_blocks: needs activation_checkpointing = "selective", which is for the other blocks; set it, '
            "or remove this key",
        ),
        (
            {"checkpointed_blocks": 3, "activation_checkpointing": True},
            "checkpointed_blocks: with activation_checkpointing = true all blocks are checkpointed anyway; write "
            '"selective" there, for the others, or remove this key',
        ),
        (
            {"model.transformer_dtype": "nf4"},
            'model.transformer_dtype: found "nf4", which saves 0.85 GiB more than "int8", and is slower; use "int8"',
        ),
        (
            {"model.transformer_dtype": "float8_e5m2"},
            'model.transformer_dtype: found "float8_e5m2", which has two bits for the digits of a weight; use "int8" '
            'or "float8"',
        ),
        (
            {"model.transformer_dtype": "int8", "adapter": {"type": "full"}},
            'adapter: found "full", the whole model, with model.transformer_dtype = "int8", whose steps are too coarse '
            "for updates; remove that, or train a LoRA",
        ),
        (
            {"model.transformer_dtype": "float8", "adapter": None},
            'adapter: found "full", the whole model, with model.transformer_dtype = "float8", whose steps are too '
            "coarse for updates; remove that, or train a LoRA",
        ),
        (
            {"model.max_caption_tokens": 225},
            "model.max_caption_tokens: found 225, expected 512 to 32768: captions are padded to 512 anyway, so that "
            "less would only cut them off, and Qwen3 reads no more",
        ),
        (
            {"model.max_caption_tokens": 32769},
            "model.max_caption_tokens: found 32769, expected 512 to 32768: captions are padded to 512 anyway, so "
            "that less would only cut them off, and Qwen3 reads no more",
        ),
        (
            {"model.text_encoder_nf4": True, "model.text_encoder_fp8": True},
            "model.text_encoder_fp8: excludes text_encoder_nf4; keep one",
        ),
        (
            {"deterministic": True, "attention": "cudnn"},
            'attention: found "cudnn", which torch does not allow with deterministic = true; use "auto"',
        ),
        (
            {"force_constant_lr": 1e-5, "warmup_steps": 10, "lr_scheduler": "cosine"},
            "force_constant_lr: excludes lr_scheduler and warmup_steps; remove them or this",
        ),
        (
            {"force_constant_lr": 1e-5, "warmup_steps": 10},
            "force_constant_lr: excludes warmup_steps; remove it or this",
        ),
        (
            EVAL | {"eval_before_first_step": False},
            "eval_before_first_step: found false, so eval_datasets are never evaluated; set eval_every_n_epochs or "
            "eval_every_n_steps or eval_every_n_examples",
        ),
        (
            {"eval_datasets": EVAL["eval_datasets"] * 2},
            'eval_datasets: two sets are called "a", and would share a curve',
        ),
        (
            {"metadata.thumbnail": True},
            "sampling: missing, from whose previews metadata.thumbnail is taken; add it, or remove thumbnail",
        ),
        (
            {"eval_datasets": [EVAL["eval_datasets"][0] | {"name": "train"}]},
            'eval_datasets: found the name "train", which is that of samples that are trained',
        ),
        (
            {"eval_datasets": [EVAL["eval_datasets"][0] | {"name": "evaluation"}]},
            'eval_datasets: found the name "evaluation", which is that of what all sets say together',
        ),
        (
            {"keep_last": 5},
            "keep_last: has no effect, as no training state is saved; set checkpoint_every_n_epochs or "
            "checkpoint_every_n_steps or checkpoint_every_n_minutes",
        ),
        (FROZEN, "optimizer: lr is 0 for every component that could be trained; nothing would be"),
        ({"optimizer.lr": 0}, "optimizer: lr is 0 for every component that could be trained; nothing would be"),
        (
            {"optimizer.lr": 0.0, "adapter": {"type": "full"}},
            "optimizer: lr is 0 for every component that could be trained; nothing would be",
        ),
        (
            {"optimizer": {"type": "adamw_optimi", "lr": 1e-6, "gradient_release": True}},
            "optimizer: gradient_release excludes gradient_clipping (it is 1): the norm is known only after the last "
            "update; set gradient_clipping = 0, or remove gradient_release",
        ),
        (
            {
                "optimizer": {"type": "adamw8bit", "lr": 1e-6, "gradient_release": True},
                "gradient_clipping": 0.0,
                "gradient_accumulation_steps": 2,
            },
            "optimizer: gradient_release excludes gradient_accumulation_steps (it is 2): a gradient is gone before the "
            "next micro-batch; set 1 and a larger micro_batch_size_per_gpu, or remove gradient_release",
        ),
        (
            {"optimizer": {"type": "Schedule_Free", "lr": 1e-3}, "ema": {"decay": 0.9}},
            "ema: excludes a schedule-free optimizer, which has an average of its own; remove [ema]",
        ),
    ],
)
def test_contradictory_options_are_refused(project, changes, problem):
    changes = {key: project.absent if value is None else value for key, value in changes.items()}
    assert project.problems(changes) == [f"main.toml: {problem}"]
    # ... together with mistakes anywhere else
    elsewhere = {"seed": "x", "monitoring.tensorboard": 1, "optimizer.weight_decay": -1, "model.mlp": 1}
    both = project.problems(changes | elsewhere)
    if not problem.startswith(("optimizer:", "ema:", "adapter:")):  # judged by the values that are wrong here
        assert f"main.toml: {problem}" in both
    assert len(both) >= 4


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 5},
        {"epochs": None, "max_steps": 5},
        {"force_constant_lr": 1e-5, "lr_scheduler": "constant"},
        {"model.timestep_sample_method": "uniform", "model.shift": 3.0},
        {"model.tiny_path": "tiny", "model.llm_adapter_path": "data"},
        {"model.dtype": "float32", "model.transformer_dtype": "float32"},
        {"model.transformer_dtype": "float32"},
        {"model.transformer_dtype": "int8"},
        {"model.transformer_dtype": "float8_e4m3fn", "model.text_encoder_fp8": True},
        {"model.dtype": "float32", "model.transformer_dtype": "int8", "model.text_encoder_nf4": True},
        {"optimizer.lr": 0, "model.mod_lr": 1e-5},
        FROZEN | {"adapter": {"type": "full"}},
        {"keep_last": 5, "checkpoint_every_n_minutes": 0.5},
        EVAL | {"eval_before_first_step": False, "eval_every_n_examples": 3},
        {"save_every_n_epochs": 1, "save_every_n_steps": 10, "save_every_n_minutes": 1},
        {"optimizer": {"type": "lion", "lr": 1e-6, "gradient_release": True}, "gradient_clipping": 0.0},
    ],
)
def test_options_that_go_together_are_accepted(project, changes):
    project.load({key: project.absent if value is None else value for key, value in changes.items()})


@pytest.mark.parametrize("key", ["dtype", "transformer_dtype"])
@pytest.mark.parametrize("name", ["float16", "fp16", "half"])
def test_half_precision_is_refused_with_the_reason(project, key, name):
    assert project.problems({f"model.{key}": name}) == [
        f'main.toml: model.{key}: found "{name}", which overflows in this model and trains to NaN; use "bfloat16"'
    ]


def test_half_precision_is_not_offered_as_a_choice(project):
    (problem,) = project.problems({"model.dtype": "float61"})
    assert problem == 'main.toml: model.dtype: found "float61" (text), expected "bfloat16" or "float32"'


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "C:", "a*", "a?", 'a"b', "<a>", "a|b", "a\nb", "\x9b"])
def test_a_run_name_makes_one_folder(project, name):
    (problem,) = project.problems({"run_name": name})
    assert problem.startswith("main.toml: run_name: found ")
    assert problem.isprintable()


def test_a_run_name_leaves_room_for_suffixes(project):
    assert project.load({"run_name": "画" * 50}).run_name == "画" * 50
    assert project.problems({"run_name": "画" * 51}) == [
        "main.toml: run_name: found a name of 153 bytes, expected at most 150"
    ]


@pytest.mark.parametrize("value", ["cosine", {"type": "cosine"}])
def test_a_schedule_can_be_a_name_or_a_table(project, value):
    assert project.load({"lr_scheduler": value}).config.lr_scheduler.type == "cosine"


def test_components_have_their_own_rate_or_the_optimizers(project):
    config = project.load({"model.mod_lr": 1e-5, "model.llm_adapter_lr": 0, "optimizer.lr": 2e-5}).config
    assert config.learning_rates().by_component == {
        "self_attn": 2e-5, "cross_attn": 2e-5, "mlp": 2e-5, "mod": 1e-5, "llm_adapter": 0, "base": 2e-5
    }  # fmt: skip


def test_a_forced_rate_leaves_frozen_components_frozen(project):
    config = project.load({"model.mod_lr": 1e-5, "model.llm_adapter_lr": 0, "force_constant_lr": 3e-5}).config
    assert config.learning_rates().by_component == {
        "self_attn": 3e-5, "cross_attn": 3e-5, "mlp": 3e-5, "mod": 3e-5, "llm_adapter": 0, "base": 3e-5
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kind", "parameter"),
    [
        ({}, "mse", 0.0),
        ({"huber_delta": 0.1}, "huber", 0.1),
        ({"smooth_l1_beta": 0.2}, "smooth_l1", 0.2),
        ({"pseudo_huber_c": 0.3}, "pseudo_huber", 0.3),
    ],
)
def test_the_loss_is_the_one_that_was_chosen(project, changes, kind, parameter):
    loss = project.load(changes | {"model.multiscale_loss_weight": 0.5}).config.loss()
    assert (loss.kind, loss.parameter, loss.multiscale_weight) == (kind, parameter, 0.5)


def test_the_distribution_of_t_is_the_one_that_was_chosen(project):
    timesteps = project.load({"model.sigmoid_scale": 1.3, "model.shift": 3.0}).config.timesteps()
    assert (timesteps.method, timesteps.sigmoid_scale, timesteps.shift, timesteps.flux_shift) == (
        "logit_normal", 1.3, 3.0, False
    )  # fmt: skip


def test_evaluation_takes_the_training_batch_size_unless_it_has_its_own(project):
    assert project.load({"micro_batch_size_per_gpu": [[512, 4]]}).config.eval_batch_sizes() == [[512, 4]]
    own = project.load({"micro_batch_size_per_gpu": 4, "eval_micro_batch_size_per_gpu": 2}).config
    assert (own.micro_batch_size_per_gpu, own.eval_batch_sizes()) == (4, 2)


def test_a_config_cannot_be_changed(project):
    config = project.load().config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_the_secret_is_not_in_the_configs_text(project):
    config = project.load({"monitoring": {"enable_wandb": True, "wandb_api_key": "hunter2"}}).config
    assert config.monitoring.wandb_api_key == "hunter2"
    assert "hunter2" not in repr(config)
    assert isinstance(config, Config)
