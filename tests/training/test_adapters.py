"""Runs with each adapter and its settings: what is told and saved, and that they resume on the same bits."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from anima_train.adapters.applied import read_any
from anima_train.adapters.parts import read_adapter
from anima_train.adapters.read import read_lora
from anima_train.checkpoint.training_state import saved_states
from anima_train.cli.main import COMMANDS, application
from anima_train.config.load import load_config
from anima_train.config.model_files import build_model_spec, find_model_files
from anima_train.config.model_part import load_model_part
from anima_train.core.errors import ConfigError, ModelFileError
from anima_train.model.tiny import tiny_paths
from anima_train.optim.groups import GroupRow
from anima_train.tools.verify import verify
from anima_train.training.dry_run import describe_run
from anima_train.training.prepare import scan_all
from anima_train.training.summary import lr_text

CHOSEN = {
    "rank": 4, "alpha": 2.0, "target_modules": "attention+mlp", "exclude_modules": ["blocks[.]0[.]cross_attn[.].*"],
    "rank_pattern": {".*layer1": 6}, "alpha_pattern": {".*layer2": 8.0}, "lr_pattern": {".*q_proj": 2e-3},
    "use_rslora": True, "b_lr_ratio": 4.0, "init": "svd", "min_rank": 2, "alpha_rank_scale": 2.0,
}  # fmt: skip
ADAPTERS = {
    "lora, chosen modules": CHOSEN,
    "dora": {"rank": 2, "use_dora": True, "dtype": "bfloat16", "alpha": 1.0},
    "lokr": {"type": "lokr", "rank": 2, "decompose_factor": 2, "alpha": 1.0, "dropout": 0.1},
    "loha": {"type": "loha", "rank": 2, "dtype": "bfloat16"},
}


def states(changes):
    return {"checkpoint_every_n_steps": 1, "keep_last": 9, "max_steps": 3, **changes}


@pytest.fixture(scope="module", params=ADAPTERS)
def whole(request, trainer_in, tmp_path_factory):
    """The settings of an adapter, and a run with them."""
    folder = tmp_path_factory.mktemp("whole")
    return ADAPTERS[request.param], trainer_in(folder)("run", **states({"adapter": ADAPTERS[request.param]}))


def test_a_run_that_is_stopped_and_resumed_has_the_same_bits(whole, trainer):
    settings, run = whole
    trainer("run", **states({"adapter": settings, "max_steps": 1}))
    parted = trainer("run", resume=True, **states({"adapter": settings}))
    assert parted.losses == run.losses
    assert parted.weights.keys() == run.weights.keys()
    assert all(torch.equal(parted.weights[key], tensor) for key, tensor in run.weights.items())


def test_the_file_says_what_it_is(whole):
    settings, run = whole
    found = json.loads(run.metadata()["ss_network_args"])
    assert found.get("algo", "lora") == settings.get("type", "lora")
    kohya = "lycoris.kohya" if "algo" in found else "networks.lora_anima"
    assert run.metadata()["ss_network_module"] == kohya
    assert found.get("min_rank") == settings.get("min_rank")
    assert run.metadata()["modelspec.architecture"] == "anima/lora"  # of a depth that is none of those known


def test_the_weights_of_a_state_are_no_file_to_merge(whole):
    _, run = whole
    with pytest.raises(ModelFileError, match="belongs to a training state; give the file in the run's folder"):
        read_adapter(saved_states(run.path / "checkpoints")[-1] / "weights.safetensors")


def test_lengths_of_rows_are_never_rounded(trainer, tiny):
    settings = {"adapter": {"rank": 4, "use_dora": True}, "optimizer": {"lr": 1e-3}, "max_steps": 4}
    exact, rounded = trainer("exact", **settings), trainer("rounded", save_dtype="bfloat16", **settings)
    weights = {name.removeprefix("net."): tensor for name, tensor in load_file(tiny_paths(tiny).transformer).items()}
    files = [read_adapter(run.path / "weights" / f"{run.path.name}.safetensors") for run in (exact, rounded)]
    for name in files[0].changes:
        changes = [file.change(name, weights[name]) for file in files]
        assert float((changes[1] - changes[0]).norm()) < 0.02 * float(changes[0].norm()), name


def test_what_was_saved_is_compared_with_the_base(whole, tmp_path):
    _, run = whole
    (tmp_path / "p.toml").write_text("[[prompt]]\nprompt = 'a'\nwidth = 32\nheight = 32\nsteps = 1\n")
    arguments = [
        "compare", run.path, "--prompts", tmp_path / "p.toml", "--strengths", "0.5,1", "--out", tmp_path, "--json"
    ]  # fmt: skip
    result = CliRunner().invoke(application(COMMANDS, "anima"), list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    found = [(each["checkpoint"], each["strength"]) for each in json.loads(result.stdout)["pictures"]]
    assert found == [("base", None), ("final", 0.5), ("final", 1)]


def test_the_state_of_what_is_no_plain_lora_is_not_drawn_with(whole):
    settings, run = whole
    state = saved_states(run.path / "checkpoints")[-1] / "weights.safetensors"
    files = find_model_files(load_model_part(run.path / "config.toml"))
    if settings.get("type", "lora") == "lora" and not settings.get("use_dora"):
        assert read_any(state, files).changes
    else:
        with pytest.raises(ModelFileError, match="belongs to a training state; give the file in the run's folder"):
            read_any(state, files)


@pytest.mark.parametrize(("name", "part"), [
    ("lokr", "lokr_w2 and lokr_w2_a"), ("loha", "hada_w2_a"), ("dora", "lora_B")
])  # fmt: skip
def test_what_changes_nothing_is_told_in_the_words_of_its_file(trainer, caplog, name, part):
    trainer("run", adapter=ADAPTERS[name], optimizer={"lr": 1e-60}, max_steps=1)
    assert f"run.safetensors changes nothing: every {part} in it is zero; is the learning rate too low?" in caplog.text


def test_the_way_to_begin_with_weights_is_told_for_each_kind(whole, trainer):
    settings, run = whole
    file = run.path / "weights" / "run.safetensors"
    is_plain = settings.get("type", "lora") == "lora" and not settings.get("use_dora")
    way = "write, in [adapter], init_from_existing = " if is_plain else f"merge them into its base, anima merge {file} "
    with pytest.raises(ConfigError, match=re.escape(f"to begin another run with them {way}")):
        trainer("other", resume=file, adapter=settings)


def test_comfyui_uses_every_key_of_what_was_saved(whole):
    _, run = whole
    files = find_model_files(load_model_part(run.path / "config.toml"))
    found = verify(run.path / "weights" / "run.safetensors", files.transformer)
    assert found.is_good_for("ComfyUI")
    assert not found.programs["ComfyUI"].ignored


@pytest.fixture(scope="module")
def chosen(trainer_in, tmp_path_factory):
    return trainer_in(tmp_path_factory.mktemp("chosen"))("run", **states({"adapter": CHOSEN, "max_steps": 1}))


def test_the_choice_of_modules_is_saved(chosen):
    modules = {key.removeprefix("diffusion_model.").split(".lora_")[0] for key in chosen.weights}
    assert len(modules) == 2 * (4 + 4 + 2) - 4
    assert not any("adaln" in name or name.startswith("blocks.0.cross_attn") for name in modules)
    assert {len(tensor) for key, tensor in chosen.weights.items() if "lora_A" in key} == {4, 6}


def test_the_choice_of_modules_is_told_at_the_start_and_by_check(trainer, capsys):
    path = trainer.config(
        "run", adapter={"target_modules": ".*[.]self_attn[.]q_proj", "rank_pattern": {".*[.]1[.].*": 8}}
    )
    text = "adapter: 2 of 32 linears: blocks.*.self_attn.q_proj (2)"
    loaded = load_config(path)
    spec = build_model_spec(loaded.config, torch.device("cpu"))
    lines = describe_run(loaded, spec, scan_all((loaded.train,), 0, write=False), num_processes=1)
    assert text in lines
    assert "adapter: ranks (and the number of linears): 4 (1), 8 (1)" in lines
    trainer.run(path)
    assert text in capsys.readouterr().out


def test_a_training_state_tells_the_scale_of_each_module(chosen):
    (state,) = saved_states(chosen.path / "checkpoints")
    weights = {
        key.removeprefix("diffusion_model.").removesuffix(".weight"): tensor for key, tensor in chosen.weights.items()
    }
    modules = {name.rpartition(".")[0] for name in weights}
    shapes = {name: (len(weights[f"{name}.lora_B"]), weights[f"{name}.lora_A"].shape[1]) for name in modules}
    for name, update in read_lora(state / "weights.safetensors", shapes).items():
        rank = 6 if name.endswith("layer1") else 4
        assert update.scale == (8.0 if name.endswith("layer2") else 2.0) / rank * rank**0.5
        assert torch.equal(update.up * update.scale, weights[f"{name}.lora_B"])


def test_learning_rates_of_modules_may_change_at_the_resume_and_modules_may_not(trainer):
    changes = states({"adapter": CHOSEN, "max_steps": 1})
    trainer("run", **changes)
    with pytest.raises(ConfigError, match=r"adapter\.rank_pattern: .*layer1.* 6.* -> .* 7"):
        trainer(
            "run", resume=True, **changes | {"adapter": {**CHOSEN, "rank_pattern": {".*layer1": 7}}, "max_steps": 2}
        )
    faster = {**CHOSEN, "lr_pattern": {".*k_proj": 5e-3, ".*q_proj": 2e-3}, "b_lr_ratio": 2.0}
    assert len(trainer("run", resume=True, **changes | {"adapter": faster, "max_steps": 2}).losses) == 2


def test_what_matches_nothing_stops_the_run_before_it_begins(trainer):
    with pytest.raises(ConfigError, match='"atention" matches no linear; did you mean "attention"'):
        trainer("run", adapter={"target_modules": "atention"})


def test_a_rate_that_all_weights_of_a_component_share_is_told_once():
    assert lr_text(GroupRow("mlp", 1e-2, 2, 8, 1e-3, 1e-3)) == "0.001"


def test_the_table_of_the_start_has_all_learning_rates(trainer, capsys):
    changes = {"lr_pattern": {".*layer1": 5e-4}, "b_lr_ratio": 4.0, "rank": 2}
    trainer("run", adapter=changes, max_steps=1, optimizer={"lr": 1e-3})
    text = capsys.readouterr().out
    assert "mlp          0.0005 to 0.004 " in text
    assert "self_attn     0.001 to 0.004 " in text
    assert "llm_adapter           frozen " in text
