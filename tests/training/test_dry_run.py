"""A dry run refuses what the start of the run would refuse, and leaves nothing behind."""

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from anima_train.config.load import load_config
from anima_train.core.errors import ConfigError, ModelFileError, SpaceError
from anima_train.training.train import run_training

TOKENIZERS = {"tokenizer_path": "tokenizer", "t5_tokenizer_path": "t5_tokenizer"}


def dry_run(trainer, **changes):
    run_training(load_config(trainer.config(**changes)), dry_run=True)


def everything_below(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def test_a_start_that_would_go_well_leaves_nothing(trainer):
    config = trainer.config()
    before = everything_below(trainer.folder)
    run_training(load_config(config), dry_run=True)
    assert everything_below(trainer.folder) == before


@pytest.mark.parametrize("inside", ["file", "file/a/b"])
def test_a_file_where_the_run_needs_a_folder(trainer, inside):
    (trainer.folder / "file").touch()
    with pytest.raises(ConfigError, match="file"):
        dry_run(trainer, output_dir=str(trainer.folder / inside))


def test_a_link_that_leads_nowhere(trainer):
    (trainer.folder / "link").symlink_to(trainer.folder / "gone")
    with pytest.raises(ConfigError, match=r"output_dir: .*link is a link that leads nowhere"):
        dry_run(trainer, output_dir=str(trainer.folder / "link" / "runs"))


def test_a_folder_that_cannot_be_written(trainer):
    with pytest.raises(SpaceError, match=r"output_dir: /proc/self cannot be written \("):
        dry_run(trainer, output_dir="/proc/self/runs")


@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
def test_a_disk_without_room_for_the_cache_or_the_first_files(trainer, disk, key):
    small = disk(64 * 1024)
    with pytest.raises(SpaceError, match=r"the disk has no room for .* in .*disk.*missing; free some space"):
        dry_run(trainer, **{key: str(small / "x")})
    assert not (small / "x" / "run").exists()


def test_a_folder_in_which_another_process_trains(trainer):
    run = trainer.folder / "runs" / "run"
    run.mkdir(parents=True)
    with FileLock(run / ".lock"), pytest.raises(ConfigError, match="another process is training in this folder"):
        dry_run(trainer)


@pytest.mark.parametrize("part", ["diffusion_models/*", "vae/*", "text_encoders/*"])
@pytest.mark.parametrize("change", ["extra", "missing"])
def test_files_with_other_weights_than_their_part_has(trainer, tiny, part, change):
    files = {
        slot: next(iter(tiny.glob(f"split_files/{folder}")))
        for slot, folder in {
            "transformer_path": "diffusion_models/*", "vae_path": "vae/*", "llm_path": "text_encoders/*"
        }.items()
    }  # fmt: skip
    slot, path = next((slot, path) for slot, path in files.items() if path.match(part))
    tensors = load_file(path)
    name = list(tensors)[-1]
    if change == "extra":
        tensors[f"{name.rpartition('.')[0]}.another"] = torch.zeros(2, 3)
    else:
        del tensors[name]
    files[slot] = trainer.folder / "changed.safetensors"
    save_file(tensors, files[slot])
    words = {key: str(tiny / folder) for key, folder in TOKENIZERS.items()}
    model = {"tiny_path": None, **words, **{key: str(value) for key, value in files.items()}}
    with pytest.raises(ModelFileError, match=r"changed\.safetensors"):
        dry_run(trainer, model=model)


def test_a_prompt_that_cannot_be_read(trainer):
    sampling = {"every_n_steps": 2, "width": 64, "height": 64, "steps": 2, "prompts": ["(cat:1e999)"]}
    with pytest.raises(ConfigError, match="1e999"):
        dry_run(trainer, sampling=sampling)


def test_nothing_to_resume(trainer):
    with pytest.raises(ConfigError, match="no run to resume"):
        run_training(load_config(trainer.config()), dry_run=True, resume=True)


def test_the_share_of_the_evaluations_in_the_work_is_told(trainer, pictures, capsys):
    seen = {"name": "seen", "role": "train", "quantiles": [0.5, 0.9]}
    seen["config"] = {"resolutions": [96], "num_ar_buckets": 3, "directory": [{"path": str(pictures)}]}
    drawn = {"name": "known", "role": "retention", "captions": "shipped", "quantiles": [0.5], "repeats": 2}
    drawn["pictures"] = {"width": 96, "height": 96}
    run_training(
        load_config(trainer.config(epochs=3, max_steps=None, eval_every_n_steps=6, eval_datasets=[seen])), True
    )
    # 4 evaluations of 6 images at 2 levels with the base, and 18 images forward and backward
    assert "evaluations: 4 with 24 passes of an image each, about 64% of the work of" in capsys.readouterr().out
    keys = {"max_steps": 4, "eval_datasets": [drawn], "eval_before_first_step": False, "eval_every_n_steps": 4}
    run_training(load_config(trainer.config(**keys)), dry_run=True)
    assert "evaluations: 1 with 120 passes of an image each, about 91% of the work of" in capsys.readouterr().out
