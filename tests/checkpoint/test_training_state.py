"""Training states: whole or not there, exact, and refused where they do not fit."""

import json
import os
import re
import shutil
import stat

import pytest
import torch
from safetensors.torch import save_file

from anima_train.adapters.lora import Lora
from anima_train.checkpoint.manifest import StateManifest, checksum
from anima_train.checkpoint.training_state import (
    check_state,
    load_state,
    newest_state,
    save_state,
    saved_states,
    state_tensors,
    trained_parameters,
)
from anima_train.core.errors import ModelFileError, NumericError, SpaceError
from anima_train.core.files import sha256_file
from anima_train.model.dit import MiniTrainDIT, TransformerShape
from anima_train.optim.ema import Ema, WeightAverage
from anima_train.optim.groups import COMPONENTS, LearningRates, optimizer_groups
from anima_train.optim.optimizers import AdamW, AdamWKahan

OPTIMIZERS = [AdamW(lr=1e-3), AdamWKahan(lr=1e-3), AdamWKahan(lr=1e-3, moments_dtype="bfloat16")]
RATES = LearningRates(dict.fromkeys(COMPONENTS, 1e-3))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save(folder, step, model, optimizer, keep_last=2, average=None, **facts):
    facts = StateManifest(step=step, optimizer=type(optimizer).__name__, **facts)
    return save_state(folder, facts, state_tensors(model, optimizer, average), keep_last)


def load(folder, model, optimizer, average=None):
    found = check_state(folder)
    load_state(found, model, optimizer, average)
    return found.manifest.step


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
    folder = save(tmp_path, 5, straight, optimizer, keep_last=2)
    train(straight, optimizer, 5, start=5)

    resumed = lora_model(dtype=dtype, seed=1)
    second = optimizer_for(resumed, settings)
    assert load(folder, resumed, second) == 5
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


# `state.json` as the version before the rooms of today wrote it (837e1a9).
OLD_MANIFEST = """{
 "version": 2,
 "step": 5,
 "optimizer": "AdamW",
 "pending": [
  "evaluation",
  "preview"
 ],
 "score": 0.25,
 "run": {
  "run": "style",
  "seed": 0
 },
 "config": {
  "max_steps": 10
 },
 "files": {
  %s
 }
}"""


@pytest.mark.parametrize("lora_names", [r"\1", r"\1.default.weight"], ids=["ours", "PEFT's"])
def test_a_state_of_the_version_before_resumes_bitwise(tmp_path, lora_names):
    def then(tensors):
        return {re.sub(r"(\.lora_[AB])", lora_names, name): tensor for name, tensor in tensors.items()}

    straight = lora_model()
    optimizer, average = optimizer_for(straight), WeightAverage(trained_parameters(straight), Ema(decay=0.9))
    train(straight, optimizer, 5)
    average.update(5)
    folder = tmp_path / "step-000005"
    folder.mkdir()
    save_file(then(trainable(straight)), folder / "weights.safetensors")
    names = {parameter: name for name, parameter in straight.named_parameters()}
    moments = {
        f"{names[parameter]}.{key}": tensor
        for parameter, state in optimizer.state.items()
        for key, tensor in state.items()
    }
    save_file(then(moments), folder / "optimizer.safetensors")
    save_file(then(average.tensors), folder / "average.safetensors")
    entries = [
        f'"{path.name}": {{"bytes": {path.stat().st_size}, "sha256": "{sha256_file(path)}"}}'
        for path in folder.iterdir()
    ]
    (folder / "state.json").write_text(OLD_MANIFEST % ",\n  ".join(entries))
    train(straight, optimizer, 5, start=5)
    average.update(10)

    resumed = lora_model(seed=1)
    second, other = optimizer_for(resumed), WeightAverage(trained_parameters(resumed), Ema(decay=0.9))
    found = newest_state(tmp_path)
    assert (found.manifest.step, found.manifest.pending, found.manifest.score) == (5, ["evaluation", "preview"], 0.25)
    assert (found.manifest.run, found.manifest.config) == ({"run": "style", "seed": 0}, {"max_steps": 10})
    load_state(found, resumed, second, other)
    train(resumed, second, 5, start=5)
    other.update(10)
    expected = trainable(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainable(resumed).items())
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in average.tensors.items())
    for name, parameter in trained_parameters(straight).items():
        state = second.state[resumed.get_parameter(name)]
        assert all(torch.equal(tensor, state[key]) for key, tensor in optimizer.state[parameter].items())


def test_a_state_fits_parameters_in_another_order(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    train(model, optimizer, 2)
    folder = save(tmp_path, 2, model, optimizer, keep_last=2)
    other = lora_model(seed=1)
    backwards = [parameter for parameter in reversed(list(other.parameters())) if parameter.requires_grad]
    second = torch.optim.AdamW(backwards)
    load(folder, other, second)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = optimizer.state[parameter]["exp_avg"]
            assert torch.equal(second.state[other.get_parameter(name)]["exp_avg"], expected), name


def test_parameters_without_a_gradient_so_far_have_no_state(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    folder = save(tmp_path, 0, model, optimizer, keep_last=2)
    other = lora_model(seed=1)
    second = optimizer_for(other)
    assert load(folder, other, second) == 0
    assert not second.state
    expected = trainable(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainable(other).items())


def test_only_the_newest_states_are_kept_and_nothing_temporary(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    (tmp_path / ".step-000003.tmp").mkdir()  # of a process that was killed
    (tmp_path / "step-notes").mkdir()
    for step in (8, 9, 10, 10, 100):
        save(tmp_path, step, model, optimizer, keep_last=3)
    assert [path.name for path in saved_states(tmp_path)] == ["step-000009", "step-000010", "step-000100"]
    assert sorted(os.listdir(tmp_path)) == ["step-000009", "step-000010", "step-000100", "step-notes"]
    for path in saved_states(tmp_path):
        assert sorted(os.listdir(path)) == ["optimizer.safetensors", "state.json", "weights.safetensors"]
    assert saved_states(tmp_path / "missing") == []


def test_the_state_just_saved_is_kept_even_among_newer_ones(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    for step in (20, 30, 10):
        newest = save(tmp_path, step, model, optimizer, keep_last=2)
    assert newest.is_dir()


@pytest.mark.parametrize("where", ["weights", "moments"])
def test_a_state_that_is_not_finite_is_not_saved_over_good_ones(tmp_path, where):
    model = lora_model()
    optimizer = optimizer_for(model)
    train(model, optimizer, 1)
    save(tmp_path, 1, model, optimizer, keep_last=1)
    name, parameter = next((name, p) for name, p in model.named_parameters() if p.requires_grad)
    broken = parameter.data if where == "weights" else optimizer.state[parameter]["exp_avg_sq"]
    broken[0, 0] = float("inf")
    with pytest.raises(NumericError, match=rf"step-000002: not saved.*{name}"):
        save(tmp_path, 2, model, optimizer, keep_last=1)
    assert os.listdir(tmp_path) == ["step-000001"]


def test_a_full_disk_leaves_the_old_states_and_nothing_else(tmp_path, small_files):
    model = lora_model(rank=1)
    optimizer = optimizer_for(model)
    save(tmp_path, 1, model, optimizer, keep_last=1)
    train(model, optimizer, 1)  # with moments it is too large
    with small_files(), pytest.raises(SpaceError, match="earlier files are intact"):
        save(tmp_path, 2, model, optimizer, keep_last=1)
    assert os.listdir(tmp_path) == ["step-000001"]
    other = lora_model(rank=1)
    assert load(tmp_path / "step-000001", other, optimizer_for(other)) == 1


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"rank": 3}, AdamW(lr=1e-3), r"32 shapes differ: .*lora_A \(2, 48\) instead of \(3, 48\)"),
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
    folder = save(tmp_path, 1, model, optimizer, keep_last=1)
    other = lora_model(**changes, seed=1)
    before = {name: tensor.clone() for name, tensor in trainable(other).items()}
    second = optimizer_for(other, settings)
    with pytest.raises(ModelFileError, match=message) as caught:
        load(folder, other, second)
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
    folder = save(tmp_path, 1, model, optimizer, keep_last=1)
    damage(folder)
    other = lora_model(seed=1)
    before = {name: tensor.clone() for name, tensor in trainable(other).items()}
    second = optimizer_for(other)
    with pytest.raises(ModelFileError, match="step-000001"):
        load(folder, other, second)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable(other).items())
    assert not second.state


DAMAGES = {
    "manifest gone": lambda folder: (folder / "state.json").unlink(),
    "manifest cut off": lambda folder: os.truncate(folder / "state.json", 40),
    "a bit of a weight": lambda folder: flip(folder / "weights.safetensors"),
    "a bit of a moment": lambda folder: flip(folder / "optimizer.safetensors"),
    "a file cut off": lambda folder: os.truncate(folder / "optimizer.safetensors", 2000),
    "a file gone": lambda folder: (folder / "weights.safetensors").unlink(),
    "a file not listed": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"weights.safetensors"', '"other.safetensors"')
    ),
    "a file elsewhere": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"weights.safetensors"', '"../step-000001/weights.safetensors"')
    ),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_state_is_passed_over_with_a_warning(tmp_path, damage, caplog):
    model = lora_model()
    optimizer = optimizer_for(model)
    for step in (1, 2):
        train(model, optimizer, 1, start=step)
        save(tmp_path, step, model, optimizer)
    damage(tmp_path / "step-000002")
    found = newest_state(tmp_path)
    assert found.folder == tmp_path / "step-000001"
    (warning,) = caplog.messages
    assert "step-000002: damaged: " in warning
    assert warning.endswith("going back to step 1")


def test_where_all_are_damaged_each_is_named(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    for step in (1, 2):
        save(tmp_path, step, model, optimizer)
        flip(tmp_path / f"step-{step:06d}" / "weights.safetensors")
    with pytest.raises(ModelFileError) as caught:
        newest_state(tmp_path)
    first, second = caught.value.problems
    assert "step-000002: damaged: weights.safetensors has other content than was written" in first
    assert "step-000001: damaged" in second
    assert newest_state(tmp_path / "none") is None


def test_a_state_of_another_version_is_an_error_and_not_passed_over(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    for step in (1, 2):
        folder = save(tmp_path, step, model, optimizer)
    path = folder / "state.json"
    later = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    later |= {"version": 4, "more": 1}
    path.write_text(json.dumps(later | {"checksum": checksum(later)}))
    with pytest.raises(ModelFileError, match=r"step-000002: a training state of version 4, and this .* 2 and 3;"):
        newest_state(tmp_path)


def test_the_best_state_is_kept_beside_the_newest(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    for step, score in ((1, None), (2, 0.5), (3, 0.2), (4, 0.3), (5, None), (6, 0.4)):
        save(tmp_path, step, model, optimizer, keep_last=2, score=score)
    assert sorted(os.listdir(tmp_path)) == ["step-000003", "step-000005", "step-000006"]


def test_a_whole_state_stays_and_a_damaged_one_is_written_again(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    folder = save(tmp_path, 1, model, optimizer)
    before = (folder / "weights.safetensors").stat().st_ino
    save(tmp_path, 1, model, optimizer)
    assert (folder / "weights.safetensors").stat().st_ino == before
    flip(folder / "weights.safetensors")
    save(tmp_path, 1, model, optimizer)
    assert check_state(folder).manifest.step == 1
    assert os.listdir(tmp_path) == ["step-000001"]


def test_the_average_comes_back_exactly_and_is_not_made_up(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    average = WeightAverage(trained_parameters(model), Ema(decay=0.9))
    train(model, optimizer, 3)
    average.update(3)
    folder = save(tmp_path, 3, model, optimizer, average=average)
    other = lora_model(seed=1)
    second = WeightAverage(trained_parameters(other), Ema(decay=0.9))
    load(folder, other, optimizer_for(other), second)
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in average.tensors.items())
    bare = save(tmp_path, 4, model, optimizer)
    with pytest.raises(ModelFileError, match=r"step-000004: saved by a run without \[ema\]"):
        load(bare, other, optimizer_for(other), second)


def test_a_kill_while_an_old_state_is_removed_leaves_no_part_of_it_under_its_name(tmp_path):
    model = lora_model()
    optimizer = optimizer_for(model)
    folder = save(tmp_path, 1, model, optimizer)
    shutil.copytree(folder, tmp_path / ".step-000000.old.tmp")  # as such a kill leaves it
    assert saved_states(tmp_path) == [folder]
    save(tmp_path, 2, model, optimizer)
    assert sorted(os.listdir(tmp_path)) == ["step-000001", "step-000002"]


@pytest.mark.parametrize(("mask", "folder_mode", "mode"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_permissions_of_a_state_are_those_the_umask_allows(tmp_path, mask, folder_mode, mode):
    model = lora_model()
    before = os.umask(mask)
    try:
        folder = save(tmp_path / "checkpoints", 1, model, optimizer_for(model))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == folder_mode
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {mode}
