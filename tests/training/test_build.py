"""What is looked at before a run."""

import shutil
from collections import Counter

import pytest
import torch

from anima_train.config.load import load_config
from anima_train.config.model_files import build_model_spec
from anima_train.optim.groups import group_rows
from anima_train.training.build import load_trained, trainable_transformer
from anima_train.training.prepare import scan_all
from anima_train.training.summary import trained_text


@pytest.fixture
def scanned(trainer):
    """Scans of a run that is evaluated on the images of these folders, each at two resolutions."""

    def run(folders):
        sets = [
            {"name": name, "config": {"resolutions": [96, 128], "directory": [{"path": str(path)}]}}
            for name, path in folders.items()
        ]
        loaded = load_config(trainer.config(eval_datasets=sets), [])
        return scan_all((loaded.train, *loaded.evals), loaded.config.seed, write=False)

    return run


def test_images_in_training_and_evaluation_are_counted_whatever_their_name(scanned, trainer, pictures, images_drawer):
    other = images_drawer(trainer.folder / "held_out", [(100, 100), (90, 90)])
    shutil.copy(pictures / "image0.png", other / "a copy.png")
    shutil.copy(pictures / "image3.png", other / "another.png")
    scans = scanned({"held_out": other})
    [warning] = [line for line in scans["held_out"].warnings if "training set" in line]
    assert warning == (
        f"2 images are in the training set too, such as {other}/a copy.png; the loss on them shows memory, not quality"
    )
    assert not any("training set" in line for line in scans["train"].warnings)


def test_only_the_set_that_overlaps_is_warned_of(scanned, trainer, pictures, images_drawer):
    apart = images_drawer(trainer.folder / "apart", [(100, 100)])
    one = trainer.folder / "one"
    one.mkdir()
    shutil.copy(pictures / "image1.png", one)
    scans = scanned({"apart": apart, "one": one, "same": pictures})
    overlaps = {name: [line for line in found.warnings if "training set" in line] for name, found in scans.items()}
    assert overlaps["apart"] == overlaps["train"] == []
    assert overlaps["one"][0].startswith("1 image is in the training set too, such as ")
    assert overlaps["same"][0].startswith("6 images are in the training set too, such as ")


@pytest.mark.parametrize("adapter", [{"rank": 2}, None])
@pytest.mark.parametrize("adapter_lr", [0, 1e-5])
def test_what_is_loaded_is_what_the_table_announced(trainer, adapter, adapter_lr):
    loaded = load_config(trainer.config(adapter=adapter, model={"llm_adapter_lr": adapter_lr, "mlp_lr": 0}), [])
    spec = build_model_spec(loaded.config, torch.device("cpu"))
    transformer, groups = load_trained(
        spec,
        loaded.config.adapter,
        loaded.config.learning_rates(),
        loaded.config.seed,
        loaded.config.optimizer.weight_decay,
        False,
    )
    rates = loaded.config.learning_rates()
    announced = group_rows(
        trainable_transformer(spec, loaded.config.adapter, loaded.config.learning_rates(), loaded.config.seed), rates
    )
    assert group_rows(transformer, rates) == announced
    numbers = Counter()
    for group in groups:
        numbers[group["component"]] += sum(weight.numel() for weight in group["params"])
    assert numbers == Counter({row.component: row.num_parameters for row in announced if row.num_parameters})


def test_all_weights_are_said_to_be_trained_where_none_is_frozen(trainer):
    def said(**rates):
        lr = rates.pop("lr", 1e-5)
        changes = {"adapter": None, "optimizer": {"lr": lr}, "model": {"llm_adapter_lr": 1e-6, **rates}}
        config = load_config(trainer.config(**changes), []).config
        [line] = trained_text(config.adapter, config.learning_rates(), spec)
        return line

    spec = build_model_spec(load_config(trainer.config(model={"llm_adapter_lr": 1e-6}), []).config, torch.device("cpu"))
    assert "no [adapter]: all " in said()
    assert " all " not in said(mlp_lr=0)
    of_blocks = {f"{name}_lr": 1e-5 for name in ("self_attn", "cross_attn", "mlp", "mod")}
    assert " all " not in said(lr=0, **of_blocks)
