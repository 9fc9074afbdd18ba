"""What a run will write is known before; a disk that is full, or read-only, costs nothing that was there before."""

import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from anima_train.caching import fill as encode_module
from anima_train.checkpoint.disk_space import MANIFEST, DiskPlan, FileSizes, first_state_bytes, state_bytes
from anima_train.checkpoint.training_state import StateManifest, save_state, state_tensors, trained_parameters
from anima_train.checkpoint.weights import save_weights, weights_to_save
from anima_train.config.load import load_config
from anima_train.config.model_files import build_model_spec
from anima_train.config.resolved import plain
from anima_train.core.device import DTYPES
from anima_train.core.errors import SpaceError
from anima_train.core.files import on_disk
from anima_train.core.format import format_bytes
from anima_train.training import saving as saving_module
from anima_train.training.build import disk_plan, file_sizes, load_trained, plan_run, trainable_transformer
from anima_train.training.dry_run import describe_run
from anima_train.training.prepare import scan_all

KIB = 1024
OPTIMIZERS = [{"type": "adamw"}, {"type": "adamw_optimi"}, {"type": "adamw_optimi", "moments_dtype": "bfloat16"}]


def content(folder):
    """Every file below a folder, with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def disk_bytes(*paths):
    return sum(on_disk(path.stat().st_size) for path in paths)


def fill(folder, leave=0):
    """Take all space of a disk but so much, as another process would."""
    with open(folder / "of-another-process", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4 * KIB)):
                pass
        except OSError:
            file.truncate(file.tell() - leave)


def grow(folder, num_bytes):
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(folder)], check=True)


# Estimates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "optimizer"),
    [
        *(({"adapter": {"type": "lora", "rank": 8, "dtype": "bfloat16"}}, optimizer) for optimizer in OPTIMIZERS),
        ({"adapter": {"type": "lora", "rank": 8}, "save_dtype": "bfloat16"}, OPTIMIZERS[1]),
        *(({"adapter": None, "model": {"dtype": "bfloat16"}}, optimizer) for optimizer in OPTIMIZERS[1:]),
        ({"adapter": None, "model": {"llm_adapter_lr": 1e-4, "mod_lr": 0}, "save_dtype": "bfloat16"}, OPTIMIZERS[0]),
    ],
    ids=str,
)
def test_estimates_are_what_is_written_and_hardly_more(trainer, tmp_path, optimizer, changes):
    loaded = load_config(trainer.config(optimizer={"lr": 1e-3, **optimizer}, **changes), ())
    config = loaded.config
    spec = build_model_spec(loaded.config, torch.device("cpu"))
    estimate = file_sizes(config, spec)

    transformer, groups = load_trained(
        spec, config.adapter, config.learning_rates(), config.seed, config.optimizer.weight_decay, False
    )
    built = config.optimizer.build(groups)
    for parameter in trained_parameters(transformer).values():
        parameter.grad = torch.ones_like(parameter)
    built.step()
    facts = StateManifest(step=1, optimizer="", config=plain(config))
    state = save_state(tmp_path / "states", facts, state_tensors(transformer, built), keep_last=2)
    dtype = None if config.save_dtype is None else DTYPES[config.save_dtype]
    save_weights(
        tmp_path / "a.safetensors", weights_to_save(config.adapter, transformer, spec.files, dtype), {"a": "b"}
    )

    real = disk_bytes(*state.iterdir()) + 4 * KIB  # and the folder
    assert real <= estimate.state <= 1.1 * real + MANIFEST
    real = disk_bytes(tmp_path / "a.safetensors")
    assert real <= estimate.weights <= 1.1 * real + 4 * KIB


def test_an_average_is_in_float32_whatever_is_trained(trainer):
    config = load_config(trainer.config(adapter={"dtype": "bfloat16"}), ()).config
    trained = trained_parameters(
        trainable_transformer(
            build_model_spec(config, torch.device("cpu")), config.adapter, config.learning_rates(), config.seed
        )
    )
    num_trained = sum(parameter.numel() for parameter in trained.values())
    without, with_average = (first_state_bytes(trained, config.optimizer, each) for each in (False, True))
    assert 4 * num_trained <= with_average - without <= 4 * num_trained + 16 * KIB


def test_tensors_without_memory_take_the_same_room(tmp_path):
    tensors = {"a": torch.zeros(3, 1000), "b": torch.zeros(5, dtype=torch.bfloat16)}
    save_weights(tmp_path / "a.safetensors", tensors, {})
    file = disk_bytes(tmp_path / "a.safetensors")
    assert state_bytes({name: tensor.to("meta") for name, tensor in tensors.items()}) == file + MANIFEST


def planned(trainer, pictures, start=0, num_states=0, **changes):
    """What a run of 100 steps in 10 epochs of 20 images each writes: numbers of weights, states and previews."""
    directory = {"path": str(pictures), "num_repeats": 20 / 6}
    loaded = load_config(
        trainer.config(
            max_steps=None, epochs=10, micro_batch_size_per_gpu=1, gradient_accumulation_steps=2,
            dataset={"resolutions": [96], "num_ar_buckets": 3, "directory": [directory]}, **changes,
        ), ()
    )  # fmt: skip
    plan, schedule = plan_run(
        loaded.config, scan_all((loaded.train, *loaded.evals), loaded.config.seed, write=False)["train"].samples, 1
    )
    assert list(schedule.epoch_starts) == list(range(0, 101, 10))
    found = disk_plan(loaded.config, trainer.folder, FileSizes(10, 100, 1), plan, schedule, start, num_states)
    return found.num_weights, found.num_states, found.num_previews


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (1, 0, 0)),
        ({"save_every_n_steps": 40}, (3, 0, 0)),
        ({"save_every_n_steps": 50, "save_every_n_epochs": 4, "start": 40}, (4, 0, 0)),  # 50, 80, 100 twice
        ({"save_every_n_examples": 60}, (4, 0, 0)),  # two images in a step
        ({"save_every_n_examples": 60, "start": 30}, (3, 0, 0)),
        ({"checkpoint_every_n_steps": 20}, (1, 4, 0)),  # the newest two, the best, and the one that is being written
        ({"checkpoint_every_n_steps": 40, "keep_last": 5}, (1, 2, 0)),
        ({"checkpoint_every_n_epochs": 2, "start": 35, "num_states": 2}, (1, 2, 0)),
        ({"checkpoint_every_n_steps": 20, "start": 60, "num_states": 5}, (1, 1, 0)),
        ({"checkpoint_every_n_minutes": 5.0}, (1, 4, 0)),
        ({"sampling": {"every_n_steps": 50, "prompts": ["a"]}}, (1, 0, 3)),
        ({"sampling": {"every_n_steps": 50, "prompts": ["a"]}, "start": 50}, (1, 0, 1)),
    ],
    ids=str,
)
def test_no_file_that_a_run_keeps_is_left_out(trainer, pictures, changes, expected):
    assert planned(trainer, pictures, **changes) == expected


def test_the_warning_says_what_is_missing_and_what_to_change(disk):
    folder = disk(1000 * KIB)
    warned = DiskPlan(folder, FileSizes(100 * KIB, 200 * KIB, 10 * KIB), num_weights=10, num_states=5, num_previews=2)
    assert warned.warning(keep_last=3) == (
        f"{folder}: the disk may become full: 10 x weights (1000.0 KiB), 5 x training state (1000.0 KiB), 2 x previews "
        "(20.0 KiB) need up to 2.0 MiB, 1000.0 KiB free, 1020.0 KiB missing; free some space, save weights less often "
        "(save_every_n_...), keep_last below 3, draw previews less often, or set another output_dir"
    )
    few = DiskPlan(folder, FileSizes(1001 * KIB, 0, 0), num_weights=1, num_states=0, num_previews=0)
    assert few.warning(keep_last=3).endswith("1.0 KiB missing; free some space, or set another output_dir")
    assert DiskPlan(folder, FileSizes(50 * KIB, 100 * KIB, 0), 10, 5, 0).warning(keep_last=3) is None  # 500 + 500


def test_the_report_of_what_a_run_would_do_says_how_much_it_would_write(trainer):
    changes = {"save_every_n_steps": 2, "checkpoint_every_n_steps": 1, "max_steps": 6, "output_dir": "/"}
    loaded = load_config(trainer.config(**changes), ())
    spec = build_model_spec(loaded.config, torch.device("cpu"))
    sizes = file_sizes(loaded.config, spec)
    text = "\n".join(
        describe_run(
            loaded, spec, scan_all((loaded.train, *loaded.evals), loaded.config.seed, write=False), num_processes=1
        )
    )
    assert f"files: 4 x weights ({format_bytes(4 * sizes.weights)}), 4 x training state" in text
    assert f": {format_bytes(4 * sizes.weights + 4 * sizes.state)} in all" in text


# The cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("llm_adapter_lr", [0, pytest.param(1e-4, marks=pytest.mark.slow)])
def test_what_the_cache_is_said_to_need_is_what_it_takes(trainer, tmp_path, monkeypatch, llm_adapter_lr):
    needs = []
    monkeypatch.setattr(encode_module, "require_space", lambda found, remedy: needs.extend(found))
    folder = tmp_path / "cache"
    trainer(cache_dir=str(folder), max_steps=1, model={"llm_adapter_lr": llm_adapter_lr})
    entries = list(folder.rglob("*.safetensors"))
    real = disk_bytes(*entries) + 4 * KIB * len({path.parent for path in entries})
    assert [need.what for need in needs] == ["12 missing cache entries", "the first saved weights"]
    lock_and_schema = 2 * 4 * KIB
    assert real <= needs[0].num_bytes - lock_and_schema <= 1.1 * real


def test_a_cache_that_does_not_fit_is_refused_before_an_image_is_encoded(trainer, disk, monkeypatch):
    monkeypatch.delattr(encode_module, "load_vae")
    folder = disk(100 * KIB)
    message = (
        r"no room for 12 missing cache entries in \S+/disk \([\d.]+ KiB\): [\d.]+ KiB needed, [\d.]+ KiB free, "
        r"[\d.]+ KiB missing; free some space, or set cache_dir"
    )
    with pytest.raises(SpaceError, match=message):
        trainer(cache_dir=str(folder))
    assert not list(folder.rglob("*.safetensors"))


def test_a_first_state_that_does_not_fit_beside_the_cache_is_refused_before_an_image_is_encoded(
    trainer, disk, monkeypatch
):
    folder = disk(1000 * KIB)
    changes = {"cache_dir": str(folder), "output_dir": str(folder / "runs")}
    monkeypatch.delattr(encode_module, "load_vae")
    with pytest.raises(SpaceError) as caught:
        trainer(checkpoint_every_n_steps=2, adapter={"rank": 32}, **changes)
    (problem,) = caught.value.problems
    for part in ("12 missing cache entries", "the first saved weights", "one training state", "missing; "):
        assert part in problem


def test_what_another_process_takes_while_caching_costs_no_entry_that_is_there(trainer, disk, monkeypatch):
    folder = disk(4096 * KIB)
    load_vae = encode_module.load_vae

    def load_and_fill(*arguments):
        fill(folder, leave=44 * KIB)
        return load_vae(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(encode_module, "load_vae", load_and_fill)
        with pytest.raises(SpaceError, match=r"this file needs [\d,]+ bytes") as caught:
            trainer(cache_dir=str(folder))
    assert "latents that are missing need about" in str(caught.value)
    made = content(folder / "latent")
    assert 0 < len(made) < 6
    assert not list(folder.rglob("*.tmp"))
    (folder / "of-another-process").unlink()
    before = {path: path.stat().st_mtime_ns for path in (folder / "latent").rglob("*.safetensors")}
    trainer(cache_dir=str(folder), resume=False, max_steps=1, output_dir=str(trainer.folder / "again"))
    assert {path: path.stat().st_mtime_ns for path in before} == before  # used as they are
    assert len(content(folder / "latent")) == 6


@pytest.mark.slow
def test_a_read_only_cache_serves_what_it_has_and_names_the_bytes_of_the_rest(trainer, disk):
    folder = disk(4096 * KIB)
    first = trainer(cache_dir=str(folder), max_steps=1)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    assert trainer("again", cache_dir=str(folder), max_steps=1).losses == first.losses
    with pytest.raises(
        SpaceError, match=r"disk: cannot be written, where [\d.]+ KiB are needed for 6 missing cache entries; "
    ):
        trainer("other", cache_dir=str(folder), dataset={"resolutions": [64]})


# Training ------------------------------------------------------------------------------------------------------------


def test_a_run_without_room_for_its_first_files_does_not_begin(trainer, disk):
    folder = disk(200 * KIB)
    with pytest.raises(SpaceError, match=r"no room for the first saved weights .* one training state in \S+disk/run "):
        trainer(output_dir=str(folder), checkpoint_every_n_steps=1)
    assert not list(folder.rglob("*.jsonl"))


@pytest.mark.slow
def test_a_run_fills_its_disk_with_the_file_it_was_warned_of(trainer, disk, capsys):
    folder = disk(360 * KIB)
    changes = {"output_dir": str(folder), "save_every_n_steps": 1, "max_steps": 6}
    with pytest.raises(
        SpaceError, match=r"run-s000004\.safetensors: could not be written .* missing; earlier"
    ) as caught:
        trainer(**changes)
    assert caught.value.exit_code == 6
    assert "the disk may become full: 7 x weights" in capsys.readouterr().out
    saved = sorted(path.name for path in (folder / "run" / "weights").iterdir())
    assert saved == [f"run-s00000{step}.safetensors" for step in (1, 2, 3)]
    large = trainer(save_every_n_steps=1, max_steps=6)
    for name in saved:
        ours, other = load_file(folder / "run" / "weights" / name), load_file(large.path / "weights" / name)
        assert ours.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in ours.items())


def test_a_state_that_does_not_fit_leaves_all_earlier_ones_as_they_are_and_the_run_resumes(trainer, disk):
    folder = disk(800 * KIB)
    changes = {"output_dir": str(folder), "checkpoint_every_n_steps": 1, "max_steps": 5}
    with pytest.raises(
        SpaceError, match=r"training state step-000003 in \S+ .* missing; .* resume with the same command or --resume"
    ):
        trainer(**changes)
    states = folder / "run" / "checkpoints"
    assert sorted(os.listdir(states)) == ["step-000001", "step-000002"]
    straight = trainer("straight", checkpoint_every_n_steps=1, max_steps=5)
    grow(folder, 2048 * KIB)
    resumed = trainer(resume=True, **changes)
    assert [line["step"] for line in resumed.metrics] == [1, 2, 3, 4, 5]
    assert resumed.losses == straight.losses
    assert all(torch.equal(tensor, resumed.weights[name]) for name, tensor in straight.weights.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@pytest.mark.parametrize("tensorboard", [False, True])
def test_numbers_that_cannot_be_written_end_the_run_in_good_order(trainer, disk, monkeypatch, tensorboard):
    folder = disk(4096 * KIB)
    changes = {
        "output_dir": str(folder), "checkpoint_every_n_steps": 5, "max_steps": 45,
        "monitoring": {"tensorboard": tensorboard},
    }  # fmt: skip
    save = saving_module.save_state

    def save_and_fill(*arguments):
        saved = save(*arguments)
        fill(folder)
        monkeypatch.setattr(saving_module, "save_state", lambda *ignored: saved)
        return saved

    monkeypatch.setattr(saving_module, "save_state", save_and_fill)
    with pytest.raises(SpaceError, match=r"metrics\.jsonl: could not be written \(No space left on device\)"):
        trainer(**changes)
    monkeypatch.undo()
    before = content(folder / "run" / "checkpoints")
    assert {path.parts[0] for path in before} == {"step-000005"}
    (folder / "of-another-process").unlink()
    resumed = trainer(resume=True, **changes)
    assert [line["step"] for line in resumed.metrics] == list(range(1, 46))


@pytest.mark.slow
def test_previews_without_room_are_a_warning_and_the_run_goes_on(trainer, disk, capsys):
    folder = disk(140 * KIB)
    sampling = {"prompts": ["red"], "width": 256, "height": 256, "steps": 1, "before_first_step": True}
    done = trainer(output_dir=str(folder), sampling=sampling, max_steps=2)
    output = "".join(capsys.readouterr())
    assert "no preview" in output
    assert "No space left on device" in output
    assert len(done.metrics) == 2
    assert all(tensor.isfinite().all() for tensor in done.weights.values())
    assert os.listdir(folder / "run" / "samples") == []


def test_a_read_only_output_folder_is_an_error_of_its_own(trainer, disk):
    folder = disk(4096 * KIB)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    with pytest.raises(SpaceError, match=r"output_dir: \S+/run cannot be written \(Read-only file system\)") as caught:
        trainer(output_dir=str(folder))
    assert caught.value.exit_code == 6


def test_what_a_full_fine_tune_keeps_of_its_base_is_planned(trainer, images_drawer, tmp_path):
    others = images_drawer(tmp_path / "others", [(98, 98), (98, 98)])
    at = {"resolutions": [96], "directory": [{"path": str(others)}]}
    sets = [
        {"name": "known", "role": "retention", "config": at, "sigmas": [0.3, 0.9], "repeats": 2},
        {"name": "new", "config": at},
    ]
    changes = {"adapter": None, "eval_datasets": sets, "max_steps": 1}
    run = trainer(**changes)
    kept = sum(path.stat().st_size for path in (run.path / "base_velocities").rglob("*.safetensors"))
    loaded = load_config(trainer.config(**changes))
    scans = scan_all(loaded.datasets, loaded.config.seed, write=False)
    found = loaded.base_velocity_bytes({name: scan.samples for name, scan in scans.items() if name != "train"})
    assert found == 2 * 2 * 2 * 16 * 12 * 12 * 4
    assert found <= kept < found + 4 * KIB
    plan, schedule = plan_run(loaded.config, scans["train"].samples, 1)
    sizes = FileSizes(10, 100, 1)
    lines = disk_plan(loaded.config, tmp_path, sizes, plan, schedule, base_velocities=found).described()
    assert lines.endswith(", 1 x velocities of the base (72.0 KiB)")
    assert disk_plan(loaded.config, tmp_path, sizes, plan, schedule, 1, base_velocities=found).base_velocities == 0
    of_lora = load_config(trainer.config(eval_datasets=sets, eval_every_n_steps=1, keep_best="new/loss", max_steps=1))
    assert of_lora.base_velocity_bytes({name: scans[name].samples for name in ("known", "new")}) == 0
    assert disk_plan(of_lora.config, tmp_path, sizes, plan, schedule).num_weights == 2  # the last and the best
