"""Saved weights and training states: whole or not there, exact, and refused where they do not fit."""

import contextlib
import json
import os
import resource
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from anima_train.adapters.lora import Lora
from anima_train.config.config import Config
from anima_train.core.errors import ModelFileError, NumericError, SpaceError
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.optim.groups import COMPONENTS, LearningRates, optimizer_groups
from anima_train.optim.optimizers import AdamW, AdamWKahan
from anima_train.training.checkpoints import load_state, save_state, save_weights, saved_states
from anima_train.training.metadata import weights_metadata

OPTIMIZERS = [
    AdamW(lr=1e-3),
    AdamWKahan(lr=1e-3),
    AdamWKahan(lr=1e-3, moments_dtype="bfloat16"),
]
RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-3))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors():
    return {
        "diffusion_model.b.lora_B.weight": draw(6, 2).T,
        "diffusion_model.a.lora_A.weight": nn.Parameter(draw(2, 6).bfloat16()),
        "scalar": torch.tensor(3.0),
    }


@contextlib.contextmanager
def small_files():
    """While open, no file may grow past 20 kB, as on a full disk; short, because pytest's own log is a file too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Weights -------------------------------------------------------------------------------------------------------------


def test_saved_weights_are_the_tensors_and_the_metadata(tmp_path):
    path = tmp_path / "weights" / "style.safetensors"
    save_weights(path, tensors(), {"modelspec.title": "Stil “ü”"})
    found = load_file(path)
    assert set(found) == set(tensors())
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.title": "Stil “ü”"}
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, bad):
    path = tmp_path / "style.safetensors"
    save_weights(path, tensors(), {})
    before = path.read_bytes()
    broken = tensors()
    broken["diffusion_model.a.lora_A.weight"].data[1, 2] = bad
    with pytest.raises(
        NumericError, match=r"style\.safetensors: not saved.* 1 tensor of 3 .*diffusion_model\.a\.lora_A"
    ):
        save_weights(path, broken, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_leaves_the_old_weights_and_nothing_else(tmp_path):
    path = tmp_path / "style.safetensors"
    save_weights(path, tensors(), {})
    before = path.read_bytes()
    message = r"style\.safetensors: could not be written .* earlier files are intact"
    with small_files(), pytest.raises(SpaceError, match=message):
        save_weights(path, {"a": torch.zeros(100_000)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_the_umask_allows(tmp_path, mask, expected):
    path = tmp_path / "style.safetensors"
    before = os.umask(mask)
    try:
        save_weights(path, tensors(), {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == expected


def test_a_disk_that_gives_back_other_bytes_is_noticed_before_the_old_file_is_replaced(tmp_path):
    path = tmp_path / "style.safetensors"
    save_weights(path, tensors(), {})
    before = path.read_bytes()

    class Forgetful(dict):
        """Tensors that differ each time they are asked for, as if the disk had changed what was written."""

        def __getitem__(self, name):
            return super().__getitem__(name) + 1

    with pytest.raises(ModelFileError, match="reads back with other values than were written"):
        save_weights(path, Forgetful(tensors()), {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_metadata_has_what_file_managers_read_and_no_path_or_secret(tmp_path):
    config = Config(
        output_dir=str(tmp_path / "out"),
        dataset=str(tmp_path / "dataset.toml"),
        epochs=3,
        seed=5,
        model={"type": "anima", "transformer_path": str(tmp_path / "anima.safetensors")},
        adapter=Lora(rank=8, alpha=4.0),
        optimizer=AdamWKahan(lr=2e-5),
        monitoring={"wandb_api_key": "s3cret"},
    )
    metadata = weights_metadata(config, "style", step=40, epoch=2, num_samples=12)
    assert all(isinstance(key, str) and isinstance(value, str) and value for key, value in metadata.items())
    required = {"sai_model_spec", "architecture", "implementation", "title"}  # by ModelSpec 1.0.1
    assert {f"modelspec.{key}" for key in required} <= set(metadata)
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.title"] == metadata["ss_output_name"] == "style"
    assert (metadata["ss_steps"], metadata["ss_epoch"], metadata["ss_seed"]) == ("40", "2", "5")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "8")
    assert (metadata["ss_optimizer"], metadata["ss_learning_rate"]) == ("adamw_optimi", "2e-05")
    text = json.dumps(metadata)
    assert str(tmp_path) not in text
    assert "s3cret" not in text
    save_weights(tmp_path / "style.safetensors", tensors(), metadata)
    with safe_open(tmp_path / "style.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


# Training states -----------------------------------------------------------------------------------------------------


def lora_model(rank=2, dtype="float32", seed=0, **frozen):
    generator = torch.Generator().manual_seed(9)
    model = MiniTrainDIT(TransformerShape(1, 48, 24, 16, 20, 8))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    Lora(rank=rank, dtype=dtype).attach(model, LearningRates({**RATES.by_component, **frozen}), seed)
    return model


def train(model, optimizer, num_steps, start=0):
    for step in range(start, start + num_steps):
        for index, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                parameter.grad = draw(*parameter.shape, seed=1000 * index + step).to(parameter.dtype)
        optimizer.step()


def optimizer_for(model, settings=OPTIMIZERS[0]):
    return settings.build(optimizer_groups(model.named_parameters(), RATES, 0.1))


def trainable(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_goes_on_from_a_state_is_bitwise_the_one_that_never_stopped(tmp_path, settings, dtype):
    straight = lora_model(dtype=dtype)
    optimizer = optimizer_for(straight, settings)
    train(straight, optimizer, 5)
    folder = save_state(tmp_path, 5, straight, optimizer, keep_last=2)
    train(straight, optimizer, 5, start=5)

    resumed = lora_model(dtype=dtype, seed=1)
    second = optimizer_for(resumed, settings)
    assert load_state(folder, resumed, second) == 5
    train(resumed, second, 5, start=5)
    expected = trainable(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainable(resumed).items())
    for (name, first), (_, other) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        if first.requires_grad:
            state, other_state = optimizer.state[first], second.state[other]
            assert state.keys() == other_state.keys()
            for key, value in state.items():
                assert torch.equal(value, other_state[key]), (name, key)
                assert value.dtype == other_state[key].dtype


def test_a_state_fits_parameters_in_another_order(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    train(model, optimizer, 2)
    folder = save_state(tmp_path, 2, model, optimizer, keep_last=2)
    other = lora_model(seed=1)
    backwards = [parameter for parameter in reversed(list(other.parameters())) if parameter.requires_grad]
    second = torch.optim.AdamW(backwards)
    load_state(folder, other, second)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = optimizer.state[parameter]["exp_avg"]
            assert torch.equal(second.state[other.get_parameter(name)]["exp_avg"], expected), name


def test_parameters_without_a_gradient_so_far_have_no_state(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    folder = save_state(tmp_path, 0, model, optimizer, keep_last=2)
    other = lora_model(seed=1)
    second = optimizer_for(other)
    assert load_state(folder, other, second) == 0
    assert not second.state
    expected = trainable(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainable(other).items())


def test_only_the_newest_states_are_kept_and_nothing_temporary(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    (tmp_path / ".step-000003.tmp").mkdir()  # of a process that was killed
    (tmp_path / "step-notes").mkdir()
    for step in (8, 9, 10, 10, 100):
        save_state(tmp_path, step, model, optimizer, keep_last=3)
    assert [path.name for path in saved_states(tmp_path)] == ["step-000009", "step-000010", "step-000100"]
    assert sorted(os.listdir(tmp_path)) == ["step-000009", "step-000010", "step-000100", "step-notes"]
    for path in saved_states(tmp_path):
        assert sorted(os.listdir(path)) == ["optimizer.safetensors", "state.json", "weights.safetensors"]
    assert saved_states(tmp_path / "missing") == []


def test_the_state_just_saved_is_kept_even_among_newer_ones(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    for step in (20, 30, 10):
        newest = save_state(tmp_path, step, model, optimizer, keep_last=2)
    assert newest.is_dir()


@pytest.mark.parametrize("where", ["weights", "moments"])
def test_a_state_that_is_not_finite_is_not_saved_over_good_ones(tmp_path, where):
    model = lora_model()
    optimizer = optimizer_for(model)
    train(model, optimizer, 1)
    save_state(tmp_path, 1, model, optimizer, keep_last=1)
    name, parameter = next((name, p) for name, p in model.named_parameters() if p.requires_grad)
    broken = parameter.data if where == "weights" else optimizer.state[parameter]["exp_avg_sq"]
    broken[0, 0] = float("inf")
    with pytest.raises(NumericError, match=rf"step-000002: not saved.*{name}"):
        save_state(tmp_path, 2, model, optimizer, keep_last=1)
    assert os.listdir(tmp_path) == ["step-000001"]


def test_a_full_disk_leaves_the_old_states_and_nothing_else(tmp_path):
    model = lora_model(rank=1)
    optimizer = optimizer_for(model)
    save_state(tmp_path, 1, model, optimizer, keep_last=1)
    train(model, optimizer, 1)  # with moments it is too large
    with small_files(), pytest.raises(SpaceError, match="earlier files are intact"):
        save_state(tmp_path, 2, model, optimizer, keep_last=1)
    assert os.listdir(tmp_path) == ["step-000001"]
    other = lora_model(rank=1)
    assert load_state(tmp_path / "step-000001", other, optimizer_for(other)) == 1


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"rank": 3}, AdamW(lr=1e-3), r"32 shapes differ: .*lora_A.default.weight \(2, 48\) instead of \(3, 48\)"),
        ({"rank": 1}, AdamW(lr=1e-3), "32 shapes differ"),  # 1 would be repeated by copy_
        ({"mlp": 0}, AdamW(lr=1e-3), r"4 keys unexpected: blocks\.0\.mlp\.layer1\.lora_A"),
        ({"dtype": "bfloat16"}, AdamW(lr=1e-3), "another dtype: .* is torch.float32, expected torch.bfloat16"),
        ({}, AdamWKahan(lr=1e-3, moments_dtype="bfloat16"), "optimizer AdamW, and the configuration makes KahanAdamW"),
    ],
    ids=str,
)
def test_a_state_of_another_run_is_refused_with_the_difference_and_changes_nothing(
    tmp_path, changes, settings, message
):
    model = lora_model()
    optimizer = optimizer_for(model)
    train(model, optimizer, 1)
    folder = save_state(tmp_path, 1, model, optimizer, keep_last=1)
    other = lora_model(**changes, seed=1)
    before = {name: tensor.clone() for name, tensor in trainable(other).items()}
    second = optimizer_for(other, settings)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_state(folder, other, second)
    assert str(folder) in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable(other).items())
    assert not second.state


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "state.json").write_text('{"version": 2, "step": 1, "optimizer": "AdamW"}'),
        lambda folder: (folder / "state.json").write_text('{"version": 1, "step": "1", "optimizer": "AdamW"}'),
        lambda folder: (folder / "weights.safetensors").unlink(),
        lambda folder: os.truncate(folder / "weights.safetensors", 3000),
        lambda folder: os.truncate(folder / "optimizer.safetensors", 3000),
        lambda folder: (folder / "optimizer.safetensors").write_bytes(b""),
    ],
)
def test_a_damaged_state_is_an_error_of_ours_and_changes_nothing(tmp_path, damage):
    model = lora_model()
    optimizer = optimizer_for(model)
    train(model, optimizer, 1)
    folder = save_state(tmp_path, 1, model, optimizer, keep_last=1)
    damage(folder)
    other = lora_model(seed=1)
    before = {name: tensor.clone() for name, tensor in trainable(other).items()}
    second = optimizer_for(other)
    with pytest.raises(ModelFileError, match="step-000001"):
        load_state(folder, other, second)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable(other).items())
    assert not second.state
